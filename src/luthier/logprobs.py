"""Hidden states to log-probabilities in chunks, so that the whole [N, V] of logits never exists.

The gradient of a chunk is made in the forward pass, while its logits are there (as in Cut Your Losses,
arXiv:2411.09009, and Liger Kernel, arXiv:2410.10989): the logits are written over by their own gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import kernels

CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}  # of logits


@dataclass(frozen=True)
class Head:
    """The output layer of a causal language model, with what its family does to the logits."""

    module: nn.Module  # [..., H] -> [..., V]
    scale: float = 1.0  # Cohere, Granite
    softcap: float | None = None  # Gemma 2: cap * tanh(logits / cap)

    @property
    def layer(self) -> nn.Module:
        """The module, or the plain one that an adapter around it comes to."""
        return getattr(self.module, "plain", None) or self.module

    @property
    def linear(self) -> bool:
        """Whether the module is a plain product, which can be fused with the loss."""
        return type(self.layer) is nn.Linear

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.shape(self.module(hidden))

    def shape(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def chunk_rows(vocabulary: int, hidden: Tensor) -> int:
    limit = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"])
    return max(1, limit // (vocabulary * hidden.element_size()))


def nll_sum(hidden: Tensor, head: Head, targets: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum over i of weights[i] * -log p(targets[i] | hidden[i]); hidden [N, H], targets and weights [N].

    Label smoothing (arXiv:1512.00567) by e makes it (1 - e) * -log p(target) + e * the mean over v of -log p(v).
    """
    if head.linear:
        layer: Any = head.layer
        return _LinearNLL.apply(hidden, layer.weight, layer.bias, targets, weights, head, smoothing)
    total = hidden.new_zeros((), dtype=torch.float32)
    for chunk, wanted, weight in _chunks(_rows_at_once(head, hidden), hidden, targets, weights):
        total = total + checkpoint(_plain_nll, chunk, head, wanted, weight, smoothing, use_reentrant=False)
    return total


def _plain_nll(hidden: Tensor, head: Head, targets: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    logprobs = head(hidden).float().log_softmax(-1)
    wanted = (1 - smoothing) * logprobs.gather(-1, targets[:, None])[:, 0]
    if smoothing:
        wanted = wanted + smoothing * logprobs.mean(-1)
    return -(wanted * weights).sum()


Rowwise = Callable[..., Tensor]  # (logits [n, V] float32, a chunk of each further tensor) -> [n, ...] float32


def rowwise(hidden: Tensor, head: Head, function: Rowwise, *given: Tensor) -> Tensor:
    """[N, ...] what `function` makes of each row of logits, in chunks that are computed again in the backward pass.

    hidden [N, H]; `given` [N, ...] are handed to it in the same chunks, and get no gradient.
    """
    if head.linear:
        layer: Any = head.layer
        return _LinearRows.apply(hidden, layer.weight, layer.bias, head, function, *given)  # type: ignore[return-value]
    parts = [
        checkpoint(lambda h, *g: function(head(h).float(), *g), *part, use_reentrant=False)
        for part in _chunks(_rows_at_once(head, hidden), hidden, *given)
    ]
    return torch.cat(parts)  # type: ignore[arg-type]


def logprob_of(logits: Tensor, targets: Tensor) -> Tensor:
    """[n] log-probabilities of the targets [n]."""
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def _rows_at_once(head: Head, hidden: Tensor) -> int:
    """Beside the logits there are float32 copies of them, of their logarithms and of their gradient."""
    return max(1, chunk_rows(int(getattr(head.module, "out_features", 1 << 17)), hidden) // 4)


def _chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """At least one chunk, if an empty one."""
    for start in range(0, max(1, len(tensors[0])), size):
        yield tuple(t[start : start + size] for t in tensors)


class _LinearRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head, function, *given):
        ctx.head, ctx.function = head, function
        ctx.save_for_backward(hidden, weight, bias, *given)
        product = lambda chunk: F.linear(chunk, weight, bias)  # noqa: E731
        chunks = _chunks(_rows_at_once(head, hidden), hidden, *given)
        return torch.cat([function(head.shape(product(chunk)).float(), *rest) for chunk, *rest in chunks])

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[override]
        hidden, weight, bias, *given = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        start = 0
        for chunk, above, *rest in _chunks(_rows_at_once(ctx.head, hidden), hidden, upstream, *given):
            with torch.enable_grad():
                logits = F.linear(chunk, weight, bias).detach().requires_grad_()
                made = ctx.function(ctx.head.shape(logits).float(), *rest)
            (grad,) = torch.autograd.grad(made, logits, above)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + len(chunk)])
            if grad_weight is not None:
                _add_product_(grad_weight, grad.t(), chunk)
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
            start += len(chunk)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * (2 + len(given)),
        )


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """log p(targets[i] | hidden[i]) in float32, all logits at once; for one chunk."""
    logits = head(hidden).float()
    return logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)


@torch.no_grad()
def scored(hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N] and whether the target was the likeliest token [N], in chunks, without gradients."""
    logprobs, hits = [], []
    size = chunk_rows(int(getattr(head.module, "out_features", 1 << 17)), hidden) // 2 + 1
    for start in range(0, len(hidden), size):
        logits = head(hidden[start : start + size]).float()
        wanted = targets[start : start + size, None]
        logprobs.append(logits.gather(-1, wanted)[:, 0] - logits.logsumexp(-1))
        hits.append(logits.argmax(-1) == wanted[:, 0])
    if not logprobs:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.bool)
    return torch.cat(logprobs), torch.cat(hits)


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, weights, head, smoothing):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wanted = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None
        size = chunk_rows(len(weight), hidden)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            chunk = hidden[part]
            logits = chunk @ weight.t() if bias is None else torch.addmm(bias, chunk, weight.t())
            total += _nll_and_gradient_(logits, targets[part], weights[part], head, smoothing, any(wanted[:3]))
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product_(grad_weight, logits.t(), chunk)
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
        )
        return total

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[override]
        return (*(None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors), None, None, None, None)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in float32 although a and b may be shorter."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, out=total)
    elif a.is_meta:  # shapes only: the same work, and no memory of its own either
        torch.mm(a, b, out=total.view(a.dtype)[:, : total.shape[1]])
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a.float() @ b.float()


def _nll_and_gradient_(
    logits: Tensor, targets: Tensor, weights: Tensor, head: Head, smoothing: float, gradient: bool,
) -> Tensor:  # fmt: skip
    """The weighted sum; `logits` is overwritten by its gradient."""
    plain = head.scale == 1.0 and head.softcap is None
    if plain and gradient and logits.is_cuda and kernels.available():
        return kernels.cross_entropy_(logits, targets, weights, smoothing).sum()
    shaped = logits if plain else head.shape(logits)
    full = shaped.float()
    wanted = full.gather(-1, targets[:, None])[:, 0]
    if smoothing:
        wanted = (1 - smoothing) * wanted + smoothing * full.mean(-1)
    if not gradient:
        return ((full.logsumexp(-1) - wanted) * weights).sum()
    largest, where = full.max(-1)
    full = torch.softmax(full, -1, out=full) if plain else full.softmax(-1)
    # The likeliest token's probability is never too small for its logarithm, as the target's may be.
    lse = largest - full.gather(-1, where[:, None])[:, 0].log()
    full[torch.arange(len(targets), device=targets.device), targets] -= 1 - smoothing
    if smoothing:
        full -= smoothing / full.shape[-1]
    full *= weights[:, None]
    if head.softcap is not None:
        full *= 1 - (shaped.float() / head.softcap) ** 2
    if head.scale != 1.0:
        full *= head.scale
    if full.data_ptr() != logits.data_ptr():
        logits.copy_(full)
    return ((lse - wanted) * weights).sum()
