"""4-bit NormalFloat (QLoRA, arXiv:2305.14314), with the storage and kernels of bitsandbytes; its one home here."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from .linear import StoredLinear, pieces

NESTED = 256  # scales that share a scale of their own, as bitsandbytes has it
STATE = "quant_state.bitsandbytes__nf4"  # the end of the tensor that describes a layer in a checkpoint, as JSON


def library() -> Any:
    """bitsandbytes' functions, with its operators registered."""
    told = logging.getLogger("bitsandbytes.backends.cpu.ops")  # of CPU kernels for answers that it would download
    before = told.level
    told.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise ModelError(f"precision.kind=nf4 needs bitsandbytes: pip install 'luthier[quant]' ({error})") from None
    finally:
        told.setLevel(before)
    return functional


class NF4Linear(StoredLinear):
    """Two codes a byte; a scale `absmax` for each block of the flat weight, itself in 8 bits when doubly quantised.

    The constants are the block, the shape [out, in], and the block of the scales or 0.
    """

    kind = "nf4"

    @classmethod
    def encode(cls, weight: Tensor, config: Any) -> tuple[dict[str, Tensor], tuple]:
        functional, block = library(), config.block_size
        flat = weight.reshape(-1)
        codes = torch.empty((len(flat) + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
        absmax = torch.empty(-(-len(flat) // block), device=weight.device)
        for begin, values in pieces(flat, block):
            made, state = functional.quantize_4bit(values, blocksize=block, quant_type="nf4")
            codes[begin // 2 : begin // 2 + len(made)] = made
            absmax[begin // block : begin // block + len(state.absmax)] = state.absmax
        constants = (block, tuple(weight.shape), NESTED if config.double_quant else 0)
        if not config.double_quant:
            return {"codes": codes, "absmax": absmax}, constants
        # On the CPU in one thread, so that a mean of scales is the same wherever the weights are.
        absmax = absmax if weight.is_meta else absmax.cpu()
        offset = _mean(absmax)
        scales, nested = functional.quantize_blockwise(absmax - offset, blocksize=NESTED)
        parts = {"absmax": scales, "nested_absmax": nested.absmax, "nested_map": nested.code, "offset": offset}
        return {"codes": codes} | {name: part.to(weight.device) for name, part in parts.items()}, constants

    @classmethod
    def ready(cls, stored: Mapping[str, Tensor], shape: tuple[int, int]) -> tuple[dict[str, Tensor], tuple]:
        library()
        state = json.loads(bytes(stored[STATE].cpu().tolist()))
        if tuple(state["shape"]) != shape or state["quant_type"] != "nf4":
            raise ModelError(f"a 4-bit layer of the shape {state['shape']} where the network has one of {list(shape)}")
        device = stored["absmax"].device
        parts = {"codes": stored["weight"], "absmax": stored["absmax"]}
        if "nested_absmax" not in stored:
            return parts, (state["blocksize"], shape, 0)
        offset = torch.tensor(float(state["nested_offset"]), device=device)
        parts |= {"nested_absmax": stored["nested_absmax"], "nested_map": stored["nested_quant_map"], "offset": offset}
        return parts, (state["blocksize"], shape, state["nested_blocksize"])

    @staticmethod
    def decode(constants: tuple, dtype: torch.dtype, *parts: Tensor) -> Tensor:
        block, shape, nested = constants
        codes, absmax = parts[:2]
        if nested:
            small, table, offset = parts[2:]
            operator = torch.ops.bitsandbytes.dequantize_blockwise.default
            absmax = operator(absmax, small, table, nested, torch.float32).view(-1) + offset
        return torch.ops.bitsandbytes.dequantize_4bit.default(codes, absmax, block, "nf4", shape, dtype)

    @staticmethod
    def again(constants: tuple, dtype: torch.dtype, *parts: Tensor) -> Tensor:
        return NF4Linear.decode(constants, dtype, parts[0].view(-1), parts[1].view(1, -1), *parts[2:])


def _mean(values: Tensor) -> Tensor:
    """In one thread: several add in another order."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return values.mean()
    finally:
        torch.set_num_threads(threads)
