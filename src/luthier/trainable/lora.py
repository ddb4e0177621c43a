"""LoRA (arXiv:2106.09685): W + scale * B A, with W frozen and B zero at the start; PEFT's names for its settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from .adapter import OnLayers

if TYPE_CHECKING:
    from torch import nn

    from ..surgery import Rule


class LoRA(OnLayers):
    """Low-rank adaptation (arXiv:2106.09685): W + scale * B A, with W frozen and B zero at the start."""

    peft_type: ClassVar[str] = "LORA"
    neutral: ClassVar[Mapping[str, Any]] = {
        "bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal"), "megatron_core": ...,
        "loftq_config": ..., "eva_config": ..., "qalora_group_size": ...,
    }  # fmt: skip
    while_training: ClassVar[Collection[str]] = ("lora_dropout",)
    kind: Literal["lora"] = "lora"
    r: int = Field(16, ge=1)
    """Rank."""
    lora_alpha: float = Field(32, gt=0)
    """The update is scaled by lora_alpha / r, with use_rslora by lora_alpha / sqrt(r)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv:2312.03732)."""

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def rule(self, name: str, layer: nn.Module) -> Rule:
        from .low_rank import LowRank

        return LowRank(self.r, self.scaling, self.lora_dropout)

    def peft(self) -> dict[str, Any]:
        return self.model_dump(include={"r", "lora_alpha", "lora_dropout", "use_rslora"}) | {"bias": "none"}
