"""AdamW with moments in 8 bits (arXiv:2110.02861): blocks of 256 numbers, each with its largest in float32."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .adamw import AdamWRule
from .rule import Item, Now, Slots

BLOCK = 256
CHUNK = BLOCK << 14  # elements in float32 at once: the moments of an embedding never are


class AdamW8bitRule(AdamWRule):
    def __init__(self, beta1: float, beta2: float, epsilon: float, smallest: int):
        super().__init__(beta1, beta2, epsilon)
        self.smallest = smallest

    def slots(self, parameter: Tensor) -> Slots:
        if parameter.numel() < self.smallest:
            return super().slots(parameter)
        zero = {"exp_avg": int(codes(True).eq(0).nonzero()), "exp_avg_sq": 0}
        blocks = -(-parameter.numel() // BLOCK)
        made = {}
        for name, code in zero.items():
            made[name] = torch.full((parameter.numel(),), code, dtype=torch.uint8, device=parameter.device)
            made[f"{name}_absmax"] = torch.zeros(blocks, device=parameter.device)
        return made

    def fast(self, items: list[Item], now: Now) -> list[Item]:
        small = [item for item in items if "exp_avg_absmax" not in item.slots]
        return [i for i in items if "exp_avg_absmax" in i.slots] + super().fast(small, now)

    def update(self, weight: Tensor, gradient: Tensor, slots: Slots, lr: float, decay: float, count: int) -> None:
        if "exp_avg_absmax" not in slots:
            return super().update(weight, gradient, slots, lr, decay, count)
        flat = weight.contiguous().view(-1)
        for start in range(0, len(flat), CHUNK):
            part, blocks = slice(start, start + CHUNK), slice(start // BLOCK, (start + CHUNK) // BLOCK)
            kept = [(slots[n][part], slots[f"{n}_absmax"][blocks], n == "exp_avg") for n in ("exp_avg", "exp_avg_sq")]
            m, v = (dequantised(code, largest, signed) for code, largest, signed in kept)
            self.move(flat[part], gradient.reshape(-1)[part], m, v, lr, decay, count)
            for moment, (code, largest, signed) in zip((m, v), kept):
                quantise(moment, code, largest, signed)
        if flat.data_ptr() != weight.data_ptr():
            weight.copy_(flat.view_as(weight))
        return None


@cache
def codes(signed: bool, device: str = "cpu") -> Tensor:
    """The 256 numbers of the dynamic tree code, [256] ascending, from -1 (or 0) to 1.

    Seven powers of ten, the smaller ones divided more coarsely: the power 10^-e has 2^(6 - e) signed or 2^(7 - e)
    unsigned numbers, each the middle of one of as many equal parts of [0.1, 1] * 10^-e; and 0 and 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        parts = 2 ** (6 - exponent if signed else 7 - exponent)
        middles = [(0.1 + 0.9 * (i + 0.5) / parts) * 10.0**-exponent for i in range(parts)]
        values += middles + ([-x for x in middles] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float64).float().to(device)


@cache
def borders(signed: bool, device: str = "cpu") -> Tensor:
    """Halfway between neighbouring codes, [255]."""
    values = codes(signed, device)
    return (values[1:] + values[:-1]) / 2


def dequantised(code: Tensor, largest: Tensor, signed: bool) -> Tensor:
    """float32 [n] of codes [n] and the largest of each block."""
    values = codes(signed, str(code.device))[code.int()]
    return (_blocks(values) * largest[:, None]).view(-1)[: len(code)]


def quantise(values: Tensor, code: Tensor, largest: Tensor, signed: bool) -> None:
    """Write `values` [n] float32 to `code` [n] uint8, each as the nearest, and `largest` [blocks]."""
    blocks = _blocks(values)
    torch.amax(blocks.abs(), 1, out=largest)
    shares = blocks / largest.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    found = torch.bucketize(shares, borders(signed, str(values.device)), out_int32=True)
    if not signed:  # a second moment of zero beside a first one that is not would make a step of m / epsilon
        found.clamp_min_((shares > 0).int())
    code.copy_(found.view(-1)[: len(code)])


def _blocks(values: Tensor) -> Tensor:
    return F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
