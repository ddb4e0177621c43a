"""First values of a low-rank update: drawn at random with one matrix zero, or the largest parts of W (PiSSA)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def draw(a: Tensor, b: Tensor, init: str, zero: str) -> None:
    """Fill A [r, in] and B [out, r] in place: the one that `zero` names with zeros, the other at random.

    `kaiming` draws evenly within 1 / sqrt(columns), as a fresh linear layer; `gaussian` with deviation 1 / r. Which of
    the two is zero matters: https://arxiv.org/abs/2406.08447.
    """
    drawn, still = (b, a) if zero == "lora_A" else (a, b)
    nn.init.zeros_(still)
    if init == "gaussian":
        nn.init.normal_(drawn, std=1 / a.shape[0])
    else:
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))


@torch.no_grad()
def principal(weight: Tensor, r: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] in float32 with scaling * B A the best approximation of W [out, in] that has rank r.

    PiSSA, https://arxiv.org/abs/2404.02948: `pissa` by the whole decomposition, `pissa_niter_N` by a randomised one
    with N subspace iterations, which takes seconds where the whole one takes minutes.
    """
    weight = weight.float()
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, q=r, niter=int(init.rpartition("_")[2]))
        vh = v.t()
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root
