"""GPTQ (https://arxiv.org/abs/2210.17323): columns are rounded one by one, and what is lost goes into those to come.

With H = X^T X of a layer's inputs, rounding W to Q costs tr((W - Q) H (W - Q)^T) of its outputs. After column i is
rounded, the columns left move by the change that makes up best for its error: -(w_i - q_i) / U_ii * U_i,i+1:, where U
is the upper Cholesky factor of H^-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....errors import ModelError
from ....precision.rounding import SMALLEST
from .nearest import Grid

TRIES = 4  # tenfold damping each


def error(change: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) of a change [out, in] of the weight: the squared change of the outputs over the calibration rows."""
    wide = change.to(hessian.dtype)
    return float(((wide @ hessian) * wide).sum())


def factor(hessian: Tensor, damping: float) -> Tensor:
    """[in, in] the upper Cholesky factor of (H + damping mean(diag H) I)^-1, in float64.

    An input that is always 0 counts as one of its own. Raises ModelError where H is not finite.
    """
    h = hessian.double().clone()
    if not torch.isfinite(h).all():
        raise ModelError("--rounding gptq: the calibration rows give inputs that are not finite: use other rows")
    diagonal = h.diagonal()
    silent = diagonal <= 0
    diagonal[silent] = 1.0
    mean = float(diagonal[~silent].mean()) if bool((~silent).any()) else 1.0
    for attempt in range(TRIES):
        damped = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (damping * 10**attempt * mean)
        lower, wrong = torch.linalg.cholesky_ex(damped)
        if not int(wrong):
            inverse = torch.cholesky_inverse(lower)
            upper, wrong = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(wrong):
                return upper
    raise ModelError("--rounding gptq: the Hessian cannot be inverted: use more calibration rows, or --damping 0.1")


@torch.no_grad()
def codes(
    weight: Tensor, hessian: Tensor, grid: Grid, *, damping: float = 0.01, ordered: bool = True, block: int = 128
) -> Tensor:  # fmt: skip
    """The codes [out, in] of a weight [out, in] on a grid, in float32.

    `ordered`: columns of large inputs first, while there are others left to make up for them; groups stay as they are,
    so that a file needs no order. Columns are worked off in blocks, which changes nothing but the speed.
    """
    inputs = weight.shape[1]
    group = inputs // grid.scale.shape[1]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if ordered else torch.arange(inputs)
    order = order.to(weight.device)
    upper = factor(hessian[order][:, order], damping).float()
    left = weight.detach().float()[:, order].clone()
    found = torch.empty_like(left)
    scale, zero = grid.scale.float(), grid.zero
    for begin in range(0, inputs, block):
        end = min(begin + block, inputs)
        errors = torch.empty(len(left), end - begin, device=left.device)
        for i in range(begin, end):
            at = int(order[i]) // group
            column = Grid(scale[:, at : at + 1], None if zero is None else zero[:, at : at + 1], grid.bits, grid.float8)
            code = column.codes(left[:, i : i + 1])
            lost = (left[:, i] - column.weight(code)[:, 0]) / upper[i, i]
            left[:, i:end] -= lost[:, None] * upper[i, i:end]
            found[:, i], errors[:, i - begin] = code[:, 0], lost
        left[:, end:] -= errors @ upper[begin:end, end:]
    back = torch.empty_like(order)
    back[order] = torch.arange(inputs, device=order.device)
    return found[:, back]


@torch.no_grad()
def refitted(weight: Tensor, hessian: Tensor, codes: Tensor, grid: Grid) -> Grid:
    """The grid (without zero points) whose scales make tr(E H E^T) of these codes smallest: least squares in the scales
    of each row. A row whose scales, in the numbers of the file, are no better keeps its own."""
    assert grid.zero is None
    groups = grid.scale.shape[1]
    h, c, w = hessian.double(), codes.double().unflatten(1, (groups, -1)), weight.double()
    size = c.shape[2]
    # [out, groups, groups] c_g H_gk c_k of each row, and [out, groups] c_g H_g: w
    inner = torch.empty(len(w), groups, groups, dtype=h.dtype, device=h.device)
    for g in range(groups):
        product = (c[:, g] @ h[g * size : (g + 1) * size]).unflatten(1, (groups, size))
        inner[:, g] = (product * c).sum(-1)
    outer = ((w @ h).unflatten(1, (groups, size)) * c).sum(-1)
    old = grid.scale.double()
    held = 1e-6 * inner.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    ridge = torch.diag_embed(held[:, None].expand(-1, groups))  # groups of zeros stay as they are
    found = torch.linalg.solve(inner + ridge, outer + held[:, None] * old)
    made = found.clamp(min=SMALLEST).to(grid.scale.dtype)

    def lost(scale: Tensor) -> Tensor:
        change = (c * scale.double()[..., None]).flatten(1) - w
        return ((change @ h) * change).sum(1)

    better = lost(made) < lost(grid.scale)
    return Grid(torch.where(better[:, None], made, grid.scale), None, grid.bits, grid.float8)
