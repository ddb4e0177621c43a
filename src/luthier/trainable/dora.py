"""DoRA (arXiv:2402.09353): LoRA turns the rows of a weight, and a trained number for each gives their length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .adapter import OnLayers
from .lora import LoRA

if TYPE_CHECKING:
    from torch import nn

    from ..surgery import Rule


class DoRA(LoRA):
    """Weight-decomposed LoRA (arXiv:2402.09353): m (W + scale * B A) / |W + scale * B A|, with lengths m trained."""

    neutral: ClassVar[Mapping[str, Any]] = {**LoRA.neutral, "use_dora": (True,)}
    fits_experts: ClassVar[bool] = False
    kind: Literal["dora"] = "dora"  # type: ignore[assignment]

    def fits(self, module: nn.Module) -> bool:
        return OnLayers.fits(self, module)

    def rule(self, name: str, layer: nn.Module) -> Rule:
        from .decomposed import Decomposed

        return Decomposed(*self.scale(name), self.lora_dropout, self.init, self.zero_init or "lora_B")

    def peft(self) -> dict[str, Any]:
        return {**super().peft(), "use_dora": True}

    @classmethod
    def reads(cls, values: Mapping[str, Any]) -> bool:
        return values.get("peft_type") == cls.peft_type and bool(values.get("use_dora"))
