"""A frozen linear layer kept in fewer bits: dequantised for each product, forward and backward, and kept nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..surgery import QuantisedLinear, blocks, linear_shape, transposed
from . import Reduced

ROUTERS = ("gate", "router", "shared_expert_gate")  # of experts: a token's few numbers decide where it goes

PIECE = {"cpu": 1 << 18, "cuda": 1 << 24}  # weights that are encoded at once


class StoredLinear(QuantisedLinear):
    """What all storages share; one of them is a class with `encode` and `decode`.

    `parts` are buffers, whose names and order `decode` knows; `constants` are plain values beside them.
    """

    parts: tuple[str, ...]
    constants: tuple

    def __init__(self, layer: nn.Module, dtype: torch.dtype, encoded: Mapping[str, Tensor], constants: tuple):
        super().__init__()
        self.in_features, self.out_features = linear_shape(layer)  # type: ignore[misc]
        self.dtype, self.turned = dtype, transposed(layer)
        bias: Any = layer.bias
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))
        self.parts, self.constants = tuple(encoded), constants
        for name, tensor in encoded.items():
            self.register_buffer(name, tensor)

    @classmethod
    def encode(cls, weight: Tensor, config: Any) -> tuple[dict[str, Tensor], tuple]:
        """The parts and constants of a weight [out, in] in any floating point, on its device, made by `pieces`."""
        raise NotImplementedError

    @classmethod
    def ready(cls, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[dict[str, Tensor], tuple]:
        """The same of a layer that a checkpoint keeps so already."""
        raise NotImplementedError

    @staticmethod
    def decode(constants: tuple, dtype: torch.dtype, *parts: Tensor) -> Tensor:
        """The weight [out, in] in `dtype`."""
        raise NotImplementedError

    @staticmethod
    def again(constants: tuple, dtype: torch.dtype, *parts: Tensor) -> Tensor:
        """The same for the backward pass, computed by other operations: a compiler that saw the same ones twice would
        do them once and keep the weight in between, which for a whole network is all of it in 16 bits."""
        raise NotImplementedError

    def _parts(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.parts]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.decode(self.constants, dtype, *self._parts())

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return _Product.apply(x, self.bias, self.decode, self.again, self.constants, *self._parts())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}, bias={self.bias is not None}"


def pieces(tensor: Tensor, least: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows in float32) of a tensor, `least` rows or a multiple of them at once: little is in work."""
    width = tensor[:1].numel()
    rows = max(1, PIECE.get(tensor.device.type, PIECE["cuda"]) // (width * least)) * least
    for begin in range(0, len(tensor), rows):
        yield begin, tensor[begin : begin + rows].float()


class _Product(torch.autograd.Function):
    """x W' + b; for the backward pass the parts are kept, which are there anyway, and W is made again."""

    @staticmethod
    def forward(ctx, x, bias, decode: Callable, again: Callable, constants: tuple, *parts: Tensor):
        ctx.save_for_backward(*parts)
        ctx.again, ctx.constants = again, constants
        weight = decode(constants, x.dtype, *parts)
        if bias is None:
            return F.linear(x, weight)
        # No view, as F.linear makes one here: an adapter adds to what comes out in place.
        y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.t())
        return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[override]
        parts = ctx.saved_tensors
        dx = upstream @ ctx.again(ctx.constants, upstream.dtype, *parts)
        return dx, None, None, None, None, *(None for _ in parts)


class InLayers:
    """Which layers are kept in fewer bits, and how one is made from a plain one."""

    def __init__(self, cls: type[StoredLinear], config: Reduced, dtype: torch.dtype):
        self.cls, self.config, self.dtype, self.kind = cls, config, dtype, cls.kind

    def names(self, model: nn.Module) -> list[str]:
        """The linear layers inside the network's blocks, but for those that route tokens to experts."""
        prefix, _ = blocks(model)
        return [
            name
            for name, module in model.named_modules()
            if name.startswith(prefix + ".")
            and (type(module) is nn.Linear or transposed(module))
            and name.rpartition(".")[2] not in ROUTERS
        ]

    @torch.no_grad()
    def layer(self, plain: Any) -> StoredLinear:
        """In place of a plain layer, whose weight may be in any floating point and is on the device it stays on."""
        weight = plain.weight.detach()
        weight = (weight.t() if transposed(plain) else weight).contiguous()
        return self.cls(plain, self.dtype, *self.cls.encode(weight, self.config))

    def ready(self, plain: Any, stored: Mapping[str, Tensor]) -> StoredLinear:
        """In place of a plain layer whose weight a checkpoint keeps in these bits: its tensors by their ends."""
        inputs, outputs = linear_shape(plain)  # type: ignore[misc]
        return self.cls(plain, self.dtype, *self.cls.ready(stored, (outputs, inputs)))
