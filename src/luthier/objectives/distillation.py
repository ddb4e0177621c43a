"""Distillation: the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ..settings import Settings
from .objective import Learning

if TYPE_CHECKING:
    from torch import nn


class Teacher(Settings):
    """A network that is learnt from, and never moves."""

    name: str = Field(min_length=1)
    """A hub name, a folder, a .gguf file, or the folder of a run, whose best checkpoint it is, adapters included."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    precision: Literal["as_loaded", "nf4", "int8", "fp8"] | None = None
    """What its linear layers are kept in; by default `as_loaded`, of a run what the run has."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What it computes in; `auto` is bfloat16 on a GPU that has it and float32 elsewhere."""
    trust_remote_code: bool = False
    """Run the Python code that comes with it."""


class HiddenStates(Settings):
    """The student's hidden states are drawn to the teacher's (arXiv:1909.10351), beside their distributions."""

    weight: float = Field(1.0, gt=0)
    """Of this loss, added to the others."""
    layers: list[Annotated[list[int], Field(min_length=2, max_length=2)]] | None = None
    """Pairs [student's layer, teacher's layer], counted from 0; by default each of the student's, spread evenly over
    the teacher's, the last on the last."""
    loss: Literal["cosine", "mse"] = "cosine"
    """1 - cosine of each token's two states (arXiv:1910.01108), or the mean over their width of squared differences.
    Where the widths differ, a linear map from the student's to the teacher's is learnt for each pair."""


class OnPolicy(Settings):
    """Some rows are answered by the student as it is then, and the teacher says of each of its tokens what it thinks
    (generalised knowledge distillation, arXiv:2306.13649). Of a conversation its last answer is learnt."""

    lmbda: float = Field(0.5, gt=0, le=1)
    """Share of the rows that the student answers; the others keep their own answers."""
    max_completion_length: int = Field(128, ge=1)
    """Longest answer in tokens; longer ones are cut. With the prompt it must fit data.max_length."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Of the distribution that answers are drawn from; objective.temperature is that of the loss."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the smallest set of tokens that holds this probability."""
    top_k: int = Field(0, ge=0)
    """Draw from so many of the likeliest tokens; 0 for all."""
    num_mini_batches: int = Field(1, ge=1)
    """Optimiser steps on answers that were drawn together, batch.examples rows for each; with 1 all are the student's
    as it is."""
    decode_batch_size: int = Field(64, ge=1)
    """Answers that are drawn at once; changes memory and speed only."""
    rollout_merged: bool = False
    """Merge adapters into copies of their layers while answers are drawn: quicker, for the memory of the copies."""

    section: ClassVar[str] = "objective.on_policy"
    num_generations: ClassVar[int] = 1
    passes: ClassVar[int] = 1


def _named(value: Any) -> Any:
    """`teacher: NAME` stands for its name."""
    return {"name": value} if isinstance(value, str) else value


class Distillation(Learning):
    """The distribution of a teacher at each learnt token (arXiv:1503.02531), and the token itself."""

    kind: Literal["distillation"] = "distillation"
    teacher: Annotated[Teacher, BeforeValidator(_named, json_schema_input_type=str | Teacher)] | None = None
    """Who is learnt from; required."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Of the student from the teacher: KL(teacher, student), KL(student, teacher), or the generalised Jensen-Shannon
    divergence (arXiv:2306.13649, eq. 1)."""
    beta: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of `divergence=jsd`; near 0 it goes like forward KL, near 1 like reverse."""
    temperature: float = Field(1.0, gt=0)
    """Both distributions are softmax(logits / temperature)."""
    temperature_squared: bool = True
    """Multiply the divergence by temperature^2, so that its gradient keeps its size (arXiv:1503.02531, section 2)."""
    alpha: float = Field(0.5, ge=0, lt=1)
    """Share of the hard loss, the cross-entropy with the row's own tokens; the divergence has 1 - alpha."""
    top_k: int | None = Field(None, ge=1)
    """Compute so many likeliest tokens of the teacher and the mass of all others once, before the first step, and keep
    them in the run's folder; the teacher is not in memory while the run trains."""
    hidden_states: HiddenStates | None = None
    """Match the teacher's hidden states, too."""
    on_policy: OnPolicy | None = None
    """Learn from the student's own answers, too, on which there is no hard loss."""
    vocabulary: Literal["same", "align"] = "same"
    """`same` refuses a teacher with other tokens. `align` has it read the same text in its own tokens, and compares
    where both come to the end of a token: equal tokens each, all others as one."""

    @property
    def taught(self) -> bool:
        return True

    @property
    def rolls_out(self) -> bool:
        return self.on_policy is not None

    @property
    def sampling(self) -> Any:
        return self.on_policy

    @property
    def ahead(self) -> str | None:
        return f"top_k={self.top_k}" if self.top_k else None

    def problems(self) -> list[str]:
        found = [] if self.teacher else ["objective.teacher: required, and not given (for example a model's folder)"]
        if self.divergence != "jsd" and self.beta != type(self).model_fields["beta"].default:
            found.append(
                f"objective.beta={self.beta} with objective.divergence={self.divergence}, which has none: use "
                "objective.divergence=jsd, or leave it out"
            )
        if self.top_k and self.hidden_states:
            found.append(
                f"objective.top_k={self.top_k} keeps the teacher's likeliest tokens, not its layers, which "
                "objective.hidden_states compares with: leave one of them out"
            )
        if self.top_k and self.vocabulary == "align":
            found.append(
                f"objective.top_k={self.top_k} keeps tokens of the student's, and objective.vocabulary=align is for a "
                "teacher with others: leave one of them out"
            )
        if self.top_k and self.on_policy:
            found.append(
                f"objective.top_k={self.top_k} keeps what the teacher says of rows before the first step, and answers "
                "of objective.on_policy are given later: leave one of them out"
            )
        if self.hidden_states and self.vocabulary == "align":
            found.append(
                "objective.hidden_states compares token by token, and objective.vocabulary=align has other tokens: "
                "leave one of them out"
            )
        return found

    def remarks(self, dataset: Any) -> list[str]:
        """What on_policy does not learn of rows: answers before the last, weights of messages."""
        several = weighted = 0
        for document in dataset.documents if self.on_policy else ():
            learnt = document.weights != 0
            several += int((learnt[1:] & ~learnt[:-1]).sum() > 1)
            weighted += int((document.weights[learnt] != 1).any())
        told = {"have several answers, of which the last is learnt": several,
                "give messages weights, which do not count": weighted}  # fmt: skip
        return [f"objective.on_policy: {n} of {len(dataset)} rows {what}" for what, n in told.items() if n]

    def build(self, network: Any = None) -> nn.Module:
        from . import teacher_matching

        return teacher_matching.DistillationObjective(self)
