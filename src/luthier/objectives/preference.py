"""Preferences: the settings of DPO, SimPO, ORPO and CPO, on pairs of answers, and of KTO, on answers liked or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from ..errors import DataError
from .objective import Known, Learning

if TYPE_CHECKING:
    from torch import nn


class Referring(Learning):
    """An objective that compares log-probabilities with those of the network as it was at the start."""

    precompute_ref_log_probs: bool | Literal["auto"] = "auto"
    """Compute the reference's log-probabilities once for every row, before the first step, and keep them in the run's
    folder; `auto` where that saves work or memory: rows learnt more than once, or weights that move themselves."""

    @property
    def compares(self) -> bool:
        return True

    @property
    def ahead(self) -> str | None:
        return "precompute_ref_log_probs=true" if self.precompute_ref_log_probs is True else None

    def settled(self, known: Known) -> Self:
        if self.precompute_ref_log_probs != "auto":
            return self
        saves = known.passes is not None and (known.moves or known.passes > 1)
        return self.model_copy(update={"precompute_ref_log_probs": saves})


class Paired(Learning):
    """An objective on pairs: `beta` scales what is compared."""

    rows: ClassVar[str] = "pairs"

    def build(self, network: Any = None) -> nn.Module:
        from . import pairs

        return pairs.PairObjective(self)


class DPO(Paired, Referring):
    """Direct preference optimisation (arXiv:2305.18290): the better answer gains on the worse, against the start."""

    kind: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    """How dearly leaving the reference is paid for; of `ipo` its tau."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """`hinge` (arXiv:2305.10425), `ipo` (arXiv:2310.12036) on means over tokens, `robust` (arXiv:2403.00409)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs whose order is taken to be wrong: of `sigmoid` it makes cDPO, of `robust` an unbiased loss."""
    rpo_alpha: float | None = Field(None, gt=0)
    """Weight of the better answer's own loss, its mean over tokens, beside (arXiv:2404.19733)."""

    def problems(self) -> list[str]:
        if self.loss_type == "robust" and not self.label_smoothing:
            return [
                "objective.loss_type=robust with objective.label_smoothing=0 is sigmoid: give the share of pairs that "
                "are in the wrong order, for example objective.label_smoothing=0.1"
            ]
        return smoothing_problems(self.loss_type, self.label_smoothing, ("sigmoid", "robust"))


class CPO(Paired):
    """Contrastive preference optimisation (arXiv:2401.08417): DPO without a reference, the better answer learnt too."""

    kind: Literal["cpo"] = "cpo"
    beta: float = Field(0.1, gt=0)
    """Scale of the difference of log-probabilities; of `ipo` its tau."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """`ipo` compares means over tokens, the others sums."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs whose order is taken to be wrong."""
    cpo_alpha: float = Field(1.0, ge=0)
    """Weight of the better answer's own loss, its mean over tokens."""

    def problems(self) -> list[str]:
        return smoothing_problems(self.loss_type, self.label_smoothing, ("sigmoid",))


class SimPO(Paired):
    """Simple preference optimisation (arXiv:2405.14734): means over tokens, no reference, a margin to be reached."""

    kind: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0)
    """Scale of the means over tokens."""
    simpo_gamma: float = Field(0.5, ge=0)
    """Margin by which the better answer's reward is to be larger."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs whose order is taken to be wrong."""
    cpo_alpha: float = Field(0.0, ge=0)
    """Weight of the better answer's own loss, its mean over tokens: 0 is SimPO, more is CPO-SimPO."""


class ORPO(Paired):
    """Odds ratio preference optimisation (arXiv:2403.07691): the better answer is learnt, and made likelier by odds."""

    kind: Literal["orpo"] = "orpo"
    beta: float = Field(0.1, gt=0)
    """Weight of the odds ratio beside the better answer's own loss; the paper's lambda."""


class KTO(Referring):
    """Kahneman-Tversky optimisation (arXiv:2402.01306): answers that are liked or not, each by itself."""

    rows: ClassVar[str] = "unpaired"

    kind: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0)
    """How dearly leaving the reference is paid for."""
    desirable_weight: float = Field(1.0, ge=0)
    """Weight of answers that are liked."""
    undesirable_weight: float = Field(1.0, ge=0)
    """Weight of answers that are not; desirable_weight x liked to this x others should be 1 to 4/3."""

    def problems(self) -> list[str]:
        if self.desirable_weight or self.undesirable_weight:
            return []
        return ["objective.desirable_weight=0 and objective.undesirable_weight=0: nothing would be learnt; raise one"]

    def remarks(self, dataset: Any) -> list[str]:
        liked = dataset.labels()[:, 0].astype(bool)
        alone = int((dataset.members() < 2).sum())
        if alone == len(dataset):
            raise DataError(
                f"{dataset.source}: no answer fits another row's prompt and differs from that row's own, so KTO's "
                "reference point cannot be estimated: give rows with several prompts and answers, or method=dpo pairs"
            )
        found = []
        if alone:
            found.append(f"{alone} of {len(dataset)} rows have no other row's answer that fits their prompt: KTO's "
                         "reference point is a mean over the others")  # fmt: skip
        yes, no = int(liked.sum()), int((~liked).sum())
        if not yes or not no:
            found.append(
                f"all {len(liked)} rows are labelled {'true' if yes else 'false'}: nothing tells KTO which answers "
                f"{'to leave' if yes else 'to give instead'}"
            )
        elif self.undesirable_weight:
            ratio = self.desirable_weight * yes / (self.undesirable_weight * no)
            if not 0.99 <= ratio <= 1.34:
                found.append(
                    f"{yes} rows are liked and {no} are not: desirable_weight x liked is {ratio:.2f} times "
                    "undesirable_weight x others, and the paper has 1 to 1.33; for example "
                    f"objective.desirable_weight={self.undesirable_weight * no / yes:.2f}"
                )
        return found

    def build(self, network: Any = None) -> nn.Module:
        from . import liked

        return liked.KTOObjective(self)


def smoothing_problems(loss_type: str, smoothing: float, fitting: tuple[str, ...]) -> list[str]:
    if not smoothing or loss_type in fitting:
        return []
    return [
        f"objective.label_smoothing={smoothing} does nothing with objective.loss_type={loss_type}: leave it out, or "
        f"use objective.loss_type={' or '.join(fitting)}"
    ]
