"""Preferences: the settings of DPO, SimPO, ORPO and CPO, which learn from pairs of a better and a worse answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from .objective import Learning

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

    def settled(self, moves: bool, passes: int | None) -> Self:
        if self.precompute_ref_log_probs != "auto":
            return self
        saves = passes is not None and (moves or passes > 1)
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


def smoothing_problems(loss_type: str, smoothing: float, fitting: tuple[str, ...]) -> list[str]:
    if not smoothing or loss_type in fitting:
        return []
    return [
        f"objective.label_smoothing={smoothing} does nothing with objective.loss_type={loss_type}: leave it out, or "
        f"use objective.loss_type={' or '.join(fitting)}"
    ]
