"""(IA)^3 (arXiv:2205.05638): learnt scales of keys, values and the middle of feed-forward parts, one at the start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .adapter import OnLayers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..surgery import Adapter

ENDS = r"down_proj|fc2|fc_out|w2|mlp\.c_proj|dense_4h_to_h|wo|\d+\.output\.dense"
KEYS_AND_VALUES = r"k_proj|v_proj|key|value|k|v|c_attn|query_key_value|qkv_proj|Wqkv"


class IA3(OnLayers):
    """Frozen layers whose outputs, or in the feed-forward part inputs, are multiplied by a learnt vector each."""

    peft_type: ClassVar[str] = "IA3"
    neutral: ClassVar[Mapping[str, Any]] = {"init_ia3_weights": (True,)}
    kind: Literal["ia3"] = "ia3"
    target_modules: str | list[str] = rf"re:.*\.({KEYS_AND_VALUES}|{ENDS})"
    """`all-linear`, `attention`, `mlp`, or names and patterns; by default keys, values (with the queries where
    one layer gives all three) and the last layer of the feed-forward part."""
    feedforward_modules: str | list[str] = rf"re:.*\.({ENDS})"
    """Of these, those whose inputs are scaled; of the others it is the outputs."""

    def rule(self, name: str, layer: nn.Module) -> Scale:
        from ..surgery import matches

        wanted = self.feedforward_modules
        return Scale(any(matches(name, p) for p in ([wanted] if isinstance(wanted, str) else wanted)))

    def peft(self) -> dict[str, Any]:
        return {}

    def placed(self, model: nn.Module, name: str = "default") -> dict[str, Any]:
        from ..surgery import adapters, base_name

        found = {base_name(place): adapter.rule for place, adapter in adapters(model) if adapter.name == name}
        inputs = [place for place, rule in found.items() if isinstance(rule, Scale) and rule.inputs]
        scaled = [place for place, rule in found.items() if isinstance(rule, Scale)]
        return super().placed(model, name) | {"target_modules": scaled, "feedforward_modules": inputs}


class Scale:
    """The rule: the base's inputs, or its outputs, times a vector that is kept in float32."""

    mergeable = True

    def __init__(self, inputs: bool):
        self.inputs = inputs

    def start(self, layer: Any) -> None:
        import torch

        from ..surgery import device_of, linear_shape

        shape = linear_shape(layer.base)
        assert shape is not None
        size = (1, shape[0]) if self.inputs else (shape[1], 1)  # as PEFT keeps it
        layer.ia3_l = torch.nn.Parameter(torch.ones(size, device=device_of(layer.base)))

    def scale(self, layer: Any) -> Tensor:
        return 1 + layer.share * (layer.ia3_l.flatten() - 1)

    def forward(self, layer: Any, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        scale = self.scale(layer).to(x.dtype)
        return layer.base(x * scale) if self.inputs else layer.base(x) * scale

    def merge(self, layer: Adapter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        scale = self.scale(layer)
        if self.inputs:
            return tensors | {"weight": tensors["weight"] * scale}
        return {leaf: t * (scale[:, None] if t.ndim == 2 else scale) for leaf, t in tensors.items()}

    def saved(self, layer: Any) -> dict[str, Tensor]:
        return {"ia3_l": layer.ia3_l}
