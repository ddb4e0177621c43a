"""Distillation: a student's distribution of each learnt token, and its hidden states, drawn to a teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import surgery
from ..batch import Batch, Loss
from ..logprobs import logprob_of, rowwise
from ..sampled import Sampled
from .distillation import Distillation
from .divergences import at_temperature, divergence, entropy, kl, top_k, with_rest
from .hidden_states import HiddenStateMatching, layer_pairs

STATES, ALIGNED, LAYERS = "teacher_states", "teacher_aligned", "teacher_layers"  # fields of tokens, from `prepare`
IDS, KEPT = "teacher_ids", "teacher_logprobs"  # from `ahead`
GIVEN = "given"  # from `credit`: 1 of a row's own answer, 0 of one by the student
TOLD = ("hard_loss", "soft_loss", "kl", "teacher_entropy", "agreement")


class Said(NamedTuple):
    """What a teacher says of some tokens [n, ...]: its last hidden states, or what was kept of its distributions."""

    states: Tensor | None = None
    aligned: Tensor | None = None  # [n] 1 where it has read the same text, else 0
    ids: Tensor | None = None
    kept: Tensor | None = None


class DistillationObjective(nn.Module):
    """`teacher()` gives the teacher: its `network`, the `width` of the vocabulary that both score, a `translation`
    where it has another; None where a run is only measured and its teacher has gone.

    total = sum of w (alpha -log q(token) + (1 - alpha) T^2 D(p, q) + weight x distance of hidden states) over the
    learnt tokens, count = sum of w. Without `temperature_squared` there is no T^2; where an aligned teacher has not
    read the same text, D is 0; on answers of the student's own, the first term is 0.
    """

    passing = ("matching.",)  # parameters that only training needs
    credits = (GIVEN,)
    teacher: Callable[[], Any] | None = None

    def __init__(self, config: Distillation):
        super().__init__()
        self.config = config
        self.matching: HiddenStateMatching | None = None
        names = [*TOLD]
        names += ["hidden_loss"] if config.hidden_states else []
        names += ["aligned"] if config.vocabulary == "align" else []
        names += ["teacher_rest"] if config.top_k else []
        names += ["on_policy"] if config.on_policy else []
        self.metrics = tuple(names)
        self.share = config.on_policy.lmbda if config.on_policy else 0.0

    def meet(self, student: Any, teacher: Any) -> None:
        """What depends on both networks: maps between their widths, if hidden states are matched."""
        wanted = self.config.hidden_states
        if wanted is not None:
            pairs = layer_pairs(wanted, *(len(surgery.blocks(net.model)[1]) for net in (student, teacher)))
            widths = [net.config.get_text_config().hidden_size for net in (student, teacher)]
            self.matching = HiddenStateMatching(wanted, pairs, *widths).to(student.device)

    # ------------------------------------------------------------------ the teacher
    @torch.no_grad()
    def prepare(self, network: Any, batch: Batch) -> Batch:
        """With the teacher's hidden states of each token: the last [T, H'], and of its layers [T, pairs, H']."""
        fields = dict(batch.token_fields)
        if IDS in fields:
            return batch
        assert self.teacher is not None
        teacher = self.teacher()
        if teacher is None:
            return batch
        if teacher.translation is not None:
            theirs, at = teacher.translation.read(batch)
            fields[STATES] = teacher.network.hidden(theirs)[at.clamp(min=0)]
            fields[ALIGNED] = (at >= 0).float()
        elif self.matching is None:
            fields[STATES] = teacher.network.hidden(batch)
        else:
            layers = [theirs for _, theirs in self.matching.pairs]
            fields[STATES], of_layers = hidden_with_layers(teacher.network, batch, layers)
            fields[LAYERS] = torch.stack(of_layers, 1)
        return replace(batch, token_fields=fields)

    @torch.no_grad()
    def ahead(self, network: Any, batch: Batch) -> dict[str, Tensor]:
        """What is kept of the teacher for each learnt token: ids [N, k] and log-probabilities [N, k + 2]."""
        assert self.teacher is not None
        teacher, config = self.teacher(), self.config
        assert config.top_k is not None
        k = config.top_k

        def kept(logits: Tensor) -> Tensor:
            ids, logprobs = top_k(logits[:, : teacher.width], k, config.temperature)
            return torch.cat([ids.float(), logprobs], -1)  # float32 counts exactly up to 2^24 tokens

        rows = rowwise(teacher.network.hidden(batch)[batch.trained], teacher.network.head, kept)
        k = rows.shape[-1] // 2 - 1  # no more than there are tokens
        return {IDS: rows[:, :k].to(torch.int32), KEPT: rows[:, k:]}

    # ------------------------------------------------------------------ answers of the student's own
    def score(self, network: Any, batch: Batch) -> dict[str, Tensor]:
        """Nothing that has to be kept: the loss wants the student as it is."""
        return {}

    def credit(self, samples: Sequence[Sampled]) -> dict[str, float]:
        """Which tokens have a hard loss: an answer of the student's own is no truth."""
        for one in samples:
            one.fields[GIVEN] = np.full(len(one), one.given, np.float32)
        return {}

    # ------------------------------------------------------------------ the loss
    def forward(self, network: Any, batch: Batch) -> Loss:
        if self.matching is None:
            hidden, own = network.hidden(batch), []
        else:
            hidden, own = hidden_with_layers(network, batch, [layer for layer, _ in self.matching.pairs])
        hidden, targets, weights = network.predictions(batch, hidden)
        config, said = self.config, _said(batch)
        told = dict(zip(TOLD, self._rows(network, hidden, targets, said).unbind(-1)))
        if GIVEN in batch.token_fields:
            given = batch.token_fields[GIVEN][batch.trained]
            told |= {"hard_loss": told["hard_loss"] * given, "on_policy": 1 - given}
        each = config.alpha * told["hard_loss"] + (1 - config.alpha) * told["soft_loss"]
        if self.matching is not None and config.hidden_states is not None:
            theirs = batch.token_fields[LAYERS][batch.trained].unbind(1)
            told["hidden_loss"] = self.matching([states[batch.trained] for states in own], theirs)
            each = each + config.hidden_states.weight * told["hidden_loss"]
        if said.aligned is not None:
            told["aligned"] = said.aligned
        if said.kept is not None:
            told["teacher_rest"] = said.kept[:, -2].exp()
        metrics = {name: (told[name].detach() * weights).sum() for name in self.metrics}
        return Loss((each * weights).sum(), weights.sum(), metrics)

    def _rows(self, network: Any, hidden: Tensor, targets: Tensor, said: Said) -> Tensor:
        """[N, 5] of each learnt token what TOLD names: the last three at temperature 1, and without gradients."""
        config, names = self.config, [name for name in Said._fields if getattr(said, name) is not None]
        factor = config.temperature**2 if config.temperature_squared else 1.0

        def of_chunk(logits: Tensor, targets: Tensor, *given: Tensor) -> Tensor:
            said = Said(**dict(zip(names, given)))
            again = network.head.linear and torch.is_grad_enabled()  # in the backward pass, for the gradient alone
            hard = logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]
            teacher, student, agree = self._sides(logits, said, config.temperature)
            soft = factor * divergence(config.divergence, teacher, student, config.beta)
            told = logits.new_zeros(len(logits), 3)
            if not again:
                with torch.no_grad():
                    if config.temperature != 1:
                        teacher, student, agree = self._sides(logits, said, 1.0)
                    told = torch.stack([kl(teacher, student), entropy(teacher), agree.float()], -1)
            columns = torch.cat([soft[:, None], told], -1)
            if said.aligned is not None:
                columns = columns * said.aligned[:, None]
            return torch.cat([hard[:, None], columns], -1)

        return rowwise(hidden, network.head, of_chunk, targets, *(getattr(said, name) for name in names))

    def _sides(self, logits: Tensor, said: Said, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """The two distributions as logarithms [n, C], the teacher's first, and whether their likeliest tokens [n] are
        the same."""
        if said.ids is not None and said.kept is not None:
            agree = logits.argmax(-1) == said.ids[:, 0]
            return at_temperature(said.kept, temperature), with_rest(logits / temperature, said.ids), agree
        assert self.teacher is not None
        teacher = self.teacher()
        with torch.no_grad():
            theirs = teacher.network.head(said.states).float()  # type: ignore[arg-type]
        if (words := teacher.translation) is None:
            logits, theirs = logits[:, : teacher.width], theirs[:, : teacher.width]
            agree = logits.argmax(-1) == theirs.argmax(-1)
            return (theirs / temperature).log_softmax(-1), (logits / temperature).log_softmax(-1), agree
        sides = with_rest(theirs / temperature, words.theirs), with_rest(logits / temperature, words.own)
        best = [side.argmax(-1) for side in sides]
        return *sides, (best[0] == best[1]) & (best[0] < len(words.own))  # the rest is no token

    @torch.no_grad()
    def evaluate(self, network: Any, batch: Batch) -> Loss:
        """The next token's loss of each row [U], as a student alone has it; beside it what the teacher says, if it is
        there."""
        batch = self.prepare(network, batch)
        hidden, targets, weights = network.predictions(batch, network.hidden(batch))
        said, owners = _said(batch), batch.owners()
        figures = {"token_accuracy": rowwise(hidden, network.head, _hits, targets)}
        named = ["token_accuracy"]
        if said == Said():
            figures["hard_loss"] = -rowwise(hidden, network.head, logprob_of, targets)
        else:
            figures |= dict(zip(TOLD, self._rows(network, hidden, targets, said).unbind(-1)))
            named += ["kl", "agreement"]

        def of_rows(values: Tensor) -> Tensor:
            sums = torch.zeros(batch.documents, dtype=torch.float64, device=owners.device)
            return sums.index_add_(0, owners, values.double())

        columns = {name: of_rows(figures[name] * weights) for name in named}
        nll = figures["hard_loss"]
        return Loss(of_rows(nll * weights), of_rows(weights), columns | {"nll": of_rows(nll)})


def _hits(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.argmax(-1) == targets).float()


def _said(batch: Batch) -> Said:
    """Of the learnt tokens [N, ...]."""
    names = {"states": STATES, "aligned": ALIGNED, "ids": IDS, "kept": KEPT}
    found = {name: batch.token_fields.get(field) for name, field in names.items()}
    return Said(**{name: values[batch.trained] for name, values in found.items() if values is not None})


def hidden_with_layers(network: Any, batch: Batch, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """[T, H] after the last norm, and [T, H] after each of the layers.

    The layers' states are laid beside the last ones, so that whatever a network does with the rows of its output,
    such as padding or starts that documents share, is done with them, too.
    """
    found: dict[int, Tensor] = {}

    def beside(module: nn.Module, arguments: Any, out: Any) -> Any:
        out.last_hidden_state = torch.cat([out.last_hidden_state, *(found[layer] for layer in layers)], -1)
        return out

    with surgery.watched(surgery.blocks(network.model)[1], set(layers), found):
        handle = network.model.base_model.register_forward_hook(beside)
        try:
            hidden = network.hidden(batch)
        finally:
            handle.remove()
    widths = [found[layer].shape[-1] for layer in layers]  # some families' last states have another
    last, *states = hidden.split([hidden.shape[-1] - sum(widths), *widths], -1)
    return last, states
