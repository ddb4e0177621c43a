"""Divergences of two distributions over tokens, row by row: Kullback-Leibler both ways, generalised Jensen-Shannon.

All take logarithms of probabilities [n, C] and give [n], in nats. They hold for any C cases that partition the
vocabulary. With cases put together they are never greater (data processing inequality).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEVER = -1e4  # log-probability of what cannot be: exp of it is 0, and 0 x it is 0, as 0 log 0 is


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p, q) = sum of p (log p - log q), the entropy of p included."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """beta KL(p, m) + (1 - beta) KL(q, m) with m = beta p + (1 - beta) q (arXiv:2306.13649, eq. 1)."""
    mixture = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl(log_p, mixture) + (1 - beta) * kl(log_q, mixture)


def divergence(kind: str, teacher: Tensor, student: Tensor, beta: float = 0.5) -> Tensor:
    if kind == "forward_kl":
        return kl(teacher, student)
    if kind == "reverse_kl":
        return kl(student, teacher)
    return jensen_shannon(teacher, student, beta)


def entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def with_rest(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities [n, K + 1] of the tokens ids [n, K] or [K], and last of all others together.

    The others' sum is taken over themselves: one less the named ones' would be rounding where these are nearly all.
    """
    ids = ids.long().expand(len(logits), -1)
    total = logits.logsumexp(-1, keepdim=True)
    if ids.shape[-1] == logits.shape[-1]:  # there are no others
        named = logits.gather(-1, ids) - total
        return torch.cat([named, torch.full_like(total, NEVER)], -1)
    others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), others], -1) - total


def top_k(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """What is kept of a teacher's logits [n, V]: the k likeliest tokens [n, k], and [n, k + 2] the logarithms of their
    probabilities, of all others' mass, and of the sum over the others of p^(1 / temperature)."""
    k = min(k, logits.shape[-1])
    ids = logits.topk(k).indices
    found = with_rest(logits, ids)
    if k == logits.shape[-1]:
        return ids, torch.cat([found, found[:, -1:]], -1)
    cooled = ((logits - logits.logsumexp(-1, keepdim=True)) / temperature).scatter(-1, ids, -torch.inf)
    return ids, torch.cat([found, cooled.logsumexp(-1, keepdim=True)], -1)


def at_temperature(kept: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [n, k + 1] at the temperature that was kept with `top_k`, the others' mass last."""
    if temperature == 1:
        return kept[:, :-1]
    cooled = torch.cat([kept[:, :-2] / temperature, kept[:, -1:]], -1)
    return cooled - cooled.logsumexp(-1, keepdim=True)


def most_missing(teacher_rest: Tensor, student_logits: Tensor, ids: Tensor) -> Tensor:
    """[n] How much KL(teacher, student) of the whole vocabulary can at most exceed that of `ids` and one rest.

    The two differ by r KL(p, q) of the distributions among the others, r being the teacher's mass there: at most
    r (log of the student's mass there - log of its least likely token's).
    """
    if ids.shape[-1] == student_logits.shape[-1]:
        return torch.zeros_like(teacher_rest)
    others = student_logits.scatter(-1, ids.long(), -torch.inf)
    least = student_logits.scatter(-1, ids.long(), torch.inf).amin(-1)
    return teacher_rest.exp() * (others.logsumexp(-1) - least)
