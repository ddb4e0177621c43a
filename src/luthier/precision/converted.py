"""From rounded floats to stored integers or float8: convert, and the file layout that compressed-tensors reads."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..surgery import QuantisedLinear, base_name, dense, innermost, linear_shape, merged_state, swap
from . import QAT, qat
from .rounding import FLOAT8, GRIDS, off_grid, on_grid, pack, rounded_activations, scales, unpack


class ConvertedLinear(QuantisedLinear):
    """A linear layer kept in 4 or 8 bits, with inputs rounded as in training. Its buffers are the file's tensors."""

    def __init__(self, weight: Tensor, bias: Tensor | None, config: QAT, dtype: torch.dtype):
        """`weight` [out, in] in float32."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype, self.grid = dtype, GRIDS[config.scheme]
        scale = scales(weight, self.grid, config.group_size, dtype)
        values = on_grid(weight, scale, self.grid)
        if self.grid.bits == 4:
            self.register_buffer("weight_packed", pack(values))
            self.register_buffer("weight_shape", torch.tensor(weight.shape, device=weight.device))
        else:
            self.register_buffer("weight", values.to(torch.int8 if self.grid.weights == "int" else FLOAT8))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        values: Any = unpack(self.weight_packed, self.in_features) if self.grid.bits == 4 else self.weight
        return off_grid(values, self.weight_scale, dtype)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return F.linear(rounded_activations(x, self.grid), self.dequantize(x.dtype), self.bias)


def _converted(layer: Any) -> ConvertedLinear:
    tensors, plain = dense(layer.base), innermost(layer)
    dtype = plain.dtype if isinstance(plain, QuantisedLinear) else plain.weight.dtype
    return ConvertedLinear(tensors["weight"], tensors.get("bias"), layer.rule.config, dtype)


@torch.no_grad()
def convert(model: nn.Module) -> None:
    """Put stored integers in the place of every layer that was trained for them, in place."""
    for name, layer in list(qat.rounding(model)):
        swap(model, name, _converted(layer))


def ptq(model: nn.Module, config: QAT) -> None:
    """Post-training quantisation: the same conversion without training for it. For comparisons."""
    qat.apply(config, model)
    convert(model)


@torch.no_grad()
def converted_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the network after `convert`; the network itself stays as it is."""
    state = merged_state(model)
    for name, layer in qat.rounding(model):
        plain = base_name(name) + "."
        state = {key: tensor for key, tensor in state.items() if not key.startswith(plain)}
        state |= {plain + key: tensor for key, tensor in _converted(layer).state_dict().items()}
    return state


def quantization_config(config: QAT, model: nn.Module) -> dict:
    """What config.json says about the file, in the words of compressed-tensors 0.15 and later."""
    grid, group = GRIDS[config.scheme], config.group_size
    inside = {base_name(name) for name, _ in qat.rounding(model)}
    plain = {base_name(n) for n, m in model.named_modules() if isinstance(m, nn.Linear) and linear_shape(m)} - inside
    numbers = "int" if grid.weights == "int" else "float"
    layout = "pack-quantized" if grid.bits == 4 else f"{numbers}-quantized"
    return described([layers_of(layout, grid.bits, numbers, group, grid.activations)], plain)


def layers_of(
    layout: str,
    bits: int,
    numbers: str,
    group: int,
    activations: str | None = None,
    *,
    per_tensor: bool = False,
    targets: Collection[str] = ("Linear",),
) -> dict:
    """Layers that are stored alike, in the words of compressed-tensors; `group` -1 is a scale for each output."""
    strategy = {"strategy": "group", "group_size": group} if group > 0 else {"strategy": "channel"}
    if per_tensor:
        strategy = {"strategy": "tensor"}
    weights = {"num_bits": bits, "type": numbers, "symmetric": True, "dynamic": False, **strategy}
    inputs = None
    if activations is not None:
        inputs = {"num_bits": 8, "type": "int" if activations == "int8" else "float", "strategy": "token",
                  "symmetric": activations != "int8", "dynamic": True}  # fmt: skip
    return {"targets": list(targets), "weights": weights, "input_activations": inputs, "output_activations": None,
            "format": layout}  # fmt: skip


def described(groups: Sequence[dict], plain: Collection[str]) -> dict:
    """The `quantization_config` of a model whose layers are `groups`, but for those that stay `plain`."""
    return {
        "quant_method": "compressed-tensors", "format": groups[0]["format"], "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": sorted(plain), "kv_cache_scheme": None,
    }  # fmt: skip
