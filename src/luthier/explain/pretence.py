"""Makes code that runs on the meta device choose the kernels of the device that is reckoned with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import kernels, logprobs


class _Answers(TorchFunctionMode):
    """Answers, for tensors without values, what code asks before it chooses a kernel."""

    def __init__(self, device: str, ends: tuple[int, ...]):
        super().__init__()
        self.device, self.ends = device, ends

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        meta = bool(args) and isinstance(args[0], Tensor) and args[0].device.type == "meta"
        if meta and func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return self.device == "cuda"
        if meta and func is Tensor.tolist:  # the borders of documents are the only numbers that are asked for
            return list(getattr(args[0], "ends", self.ends))
        if meta and func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if meta and func == Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            # The tokens of padded rows: how many the mask lets through cannot be read from it.
            inside = torch.empty(self.ends[-1], dtype=torch.int64, device="meta")
            return args[0].flatten(0, args[1].ndim - 1).index_select(0, inside)
        return func(*args, **kwargs)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The fused kernel that keeps its output and one number a row; unfused ones would keep [L, L]."""
    if key.shape[-1] != value.shape[-1]:
        value = F.pad(value, (0, key.shape[-1] - value.shape[-1]))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device=query.device)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


def _kernel(first: Tensor, *_: object, **__: object) -> Tensor:
    """Our kernels work in place; what they return is a number a row."""
    return torch.empty(len(first), dtype=torch.float32, device=first.device)


@contextmanager
def pretence(device: str, ends: tuple[int, ...]) -> Iterator[None]:
    """Meta tensors pass for tensors on `device`, in a row whose documents end at `ends`."""
    in_place = [name for name, made in vars(kernels).items() if name.endswith("_") and callable(made)]
    before = {name: getattr(kernels, name) for name in [*in_place, "available"]}
    limits = dict(logprobs.CHUNK_BYTES)
    try:
        logprobs.CHUNK_BYTES["meta"] = limits.get(device, limits["cpu"])
        kernels.available = lambda: device == "cuda"  # type: ignore[assignment]
        for name in in_place:
            setattr(kernels, name, _kernel)
        with _Answers(device, ends):
            yield
    finally:
        logprobs.CHUNK_BYTES.clear()
        logprobs.CHUNK_BYTES.update(limits)
        for name, made in before.items():
            setattr(kernels, name, made)
