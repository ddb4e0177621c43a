"""The few kernels that we write for NVIDIA GPUs; every one has a plain PyTorch twin at its place of use."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor


@cache
def available() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


@cache
def _cross_entropy():
    import triton  # type: ignore[import-not-found]
    import triton.language as tl  # type: ignore[import-not-found]

    @triton.jit
    def kernel(x_ptr, stride, target_ptr, weight_ptr, loss_ptr, vocabulary, smoothing, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        x_ptr += row * stride
        target = tl.load(target_ptr + row)
        weight = tl.load(weight_ptr + row)
        offsets = tl.arange(0, BLOCK)
        largest = float("-inf")
        total = 0.0
        plain_sum = 0.0
        for start in range(0, vocabulary, BLOCK):
            inside = start + offsets < vocabulary
            x = tl.load(x_ptr + start + offsets, mask=inside, other=float("-inf")).to(tl.float32)
            new = tl.maximum(largest, tl.max(x))
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new))
            plain_sum += tl.sum(tl.where(inside, x, 0.0))
            largest = new
        lse = largest + tl.log(total)
        wanted = (1 - smoothing) * tl.load(x_ptr + target).to(tl.float32) + smoothing * plain_sum / vocabulary
        tl.store(loss_ptr + row, (lse - wanted) * weight)
        for start in range(0, vocabulary, BLOCK):
            inside = start + offsets < vocabulary
            x = tl.load(x_ptr + start + offsets, mask=inside, other=float("-inf")).to(tl.float32)
            hit = tl.where(start + offsets == target, 1.0 - smoothing, 0.0)
            gradient = (tl.exp(x - lse) - hit - smoothing / vocabulary) * weight
            tl.store(x_ptr + start + offsets, gradient.to(x_ptr.dtype.element_ty), mask=inside)

    return kernel


def cross_entropy_(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """Weighted losses [N] of logits [N, V], which are overwritten by the gradient of the losses' sum."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _cross_entropy()[(len(logits),)](
            logits, logits.stride(0), targets, weights, losses, logits.shape[1], float(smoothing),
            BLOCK=8192, num_warps=16,
        )  # fmt: skip
    return losses


@cache
def _adamw():
    import triton  # type: ignore[import-not-found]
    import triton.language as tl  # type: ignore[import-not-found]

    @triton.jit(do_not_specialize=["seed"])
    def kernel(
        p_ptr, master_ptr, grad_ptr, m_ptr, v_ptr, scale_ptr, n, seed,
        lr, decay, beta1, beta2, eps, correction1, correction2_sqrt,
        MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        grad = tl.load(grad_ptr + i, mask=inside, other=0.0).to(tl.float32) * tl.load(scale_ptr)
        if MASTER:
            weight = tl.load(master_ptr + i, mask=inside, other=0.0)
        else:
            weight = tl.load(p_ptr + i, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + i, mask=inside, other=0.0)
        v = tl.load(v_ptr + i, mask=inside, other=0.0)
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad * grad
        weight = weight * (1 - lr * decay)
        weight = weight - lr / correction1 * m / (tl.sqrt(v) / correction2_sqrt + eps)
        tl.store(m_ptr + i, m, mask=inside)
        tl.store(v_ptr + i, v, mask=inside)
        if MASTER:
            tl.store(master_ptr + i, weight, mask=inside)
        if STOCHASTIC:  # the 16 bits that bfloat16 lacks are a share of the way to the next number
            bits = weight.to(tl.int32, bitcast=True)
            noise = tl.randint(seed, i).to(tl.int32, bitcast=True) & 0xFFFF
            rounded = ((bits + noise) & -65536).to(tl.float32, bitcast=True)
            weight = tl.where((bits & 0x7F800000) == 0x7F800000, weight, rounded)
        tl.store(p_ptr + i, weight.to(p_ptr.dtype.element_ty), mask=inside)

    return kernel


def adamw_(
    parameter: Tensor, master: Tensor | None, gradient: Tensor, m: Tensor, v: Tensor, scale: Tensor,
    *, lr: float, decay: float, beta1: float, beta2: float, eps: float, step: int, seed: int | None = None,
) -> None:  # fmt: skip
    """One AdamW step of weights that compute in 16 bits and of their float32 moments, in one pass of memory.

    With a float32 master it is that which moves; without one the weights themselves do, rounded stochastically where a
    seed of 31 bits is given, which is for bfloat16, else to the nearest.
    """
    n = parameter.numel()
    block = 1024
    _adamw()[((n + block - 1) // block,)](
        parameter, parameter if master is None else master, gradient, m, v, scale, n, seed or 0,
        lr, decay, beta1, beta2, eps, 1 - beta1**step, (1 - beta2**step) ** 0.5,
        MASTER=master is not None, STOCHASTIC=seed is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
