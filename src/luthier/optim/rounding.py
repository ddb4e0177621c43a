"""Stochastic rounding to bfloat16: up or down with the odds that make it right on average (arXiv:2010.06192)."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def seed_of(seed: int, name: str, count: int) -> int:
    """31 bits for one step of one parameter: a pure function, so that resuming and other ranks round alike."""
    return zlib.crc32(f"{seed} {name} {count}".encode()) & 0x7FFFFFFF


def round_(target: Tensor, exact: Tensor, seed: int | None) -> None:
    """Write `exact` float32 to `target`; with a seed stochastically, which bfloat16 alone has."""
    if seed is None:
        target.copy_(exact)
        return
    assert target.dtype == torch.bfloat16
    generator = torch.Generator(exact.device).manual_seed(seed)
    noise = torch.randint(0, 1 << 16, exact.shape, generator=generator, dtype=torch.int32, device=exact.device)
    # The 16 bits that bfloat16 lacks are a share of the way to the next number: noise carries over that often.
    bits = exact.contiguous().view(torch.int32)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    target.copy_(torch.where(exact.isfinite(), rounded, exact))
