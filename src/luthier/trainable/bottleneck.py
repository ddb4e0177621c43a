"""Bottleneck adapters: small networks with a skip connection, at the ends of sublayers that stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from .adapter import BesideLayers

if TYPE_CHECKING:
    from torch import Tensor, nn


class Bottleneck(BesideLayers):
    """y + up(f(down(y))) on what a sublayer gives, before it is added to the stream; `up` is zero at the start."""

    peft_type: ClassVar[str] = "LUTHIER_BOTTLENECK"
    mergeable: ClassVar[bool] = False
    kind: Literal["bottleneck"] = "bottleneck"
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """`houlsby`: after attention and after the feed-forward part (arXiv:1902.00751); `pfeiffer`: after the latter
    only (arXiv:2005.00247)."""
    bottleneck_size: int = Field(64, ge=1)
    """Width of the bottleneck; an adapter of a model of width d has 2 d m + d + m parameters."""
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    adapter_dropout: float = Field(0.0, ge=0, lt=1)
    """On what goes into the bottleneck."""

    def apply(self, model: nn.Module, name: str = "default") -> None:
        from ..surgery import Adapter, freeze, swap
        from .selection import ends_of_sublayers

        places = ends_of_sublayers(model, ("mlp",) if self.placement == "pfeiffer" else ("attention", "mlp"))
        freeze(model)
        for place in places:
            swap(model, place, Adapter(model.get_submodule(place), self.rule(model), name))

    def rule(self, model: Any) -> Squeeze:
        width = model.config.get_text_config().hidden_size
        return Squeeze(width, self.bottleneck_size, self.non_linearity, self.adapter_dropout)

    def peft(self) -> dict[str, Any]:
        return self.model_dump(exclude={"kind"})


class Squeeze:
    """The rule: down to the bottleneck, a non-linearity, up again, added to what came; kept in float32."""

    mergeable = False

    def __init__(self, width: int, size: int, non_linearity: str, dropout: float):
        self.width, self.size, self.non_linearity, self.dropout = width, size, non_linearity, dropout

    def start(self, layer: Any) -> None:
        from torch import nn

        from ..surgery import device_of

        device = device_of(layer)
        layer.down = nn.Linear(self.width, self.size, device=device)
        layer.up = nn.Linear(self.size, self.width, device=device)
        nn.init.zeros_(layer.up.weight)
        nn.init.zeros_(layer.up.bias)

    def forward(self, layer: Any, *inputs: Any, **more: Any) -> Any:
        given = layer.base(*inputs, **more)
        if isinstance(given, tuple):  # of an attention: its output, and its weights
            return (self.passed(layer, given[0]), *given[1:])
        return self.passed(layer, given)

    def passed(self, layer: Any, y: Tensor) -> Tensor:  # [..., d] -> [..., d]
        import torch
        import torch.nn.functional as F

        x = F.dropout(y, self.dropout) if self.dropout and layer.training else y
        down, up = layer.down, layer.up
        small = F.linear(x, down.weight.to(y.dtype), down.bias.to(y.dtype))
        made = torch.tanh(small) if self.non_linearity == "tanh" else getattr(F, self.non_linearity)(small)
        return y + layer.share * F.linear(made, up.weight.to(y.dtype), up.bias.to(y.dtype))

    def merge(self, layer: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        raise AssertionError("a non-linearity has no place in a linear layer")

    def saved(self, layer: Any) -> dict[str, Tensor]:
        return {f"{side}.{leaf}": t for side in ("down", "up") for leaf, t in getattr(layer, side).named_parameters()}
