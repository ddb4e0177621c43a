"""Rewards of tokens, generalised advantages and returns of answers of any lengths, whitening.

Answers lie end to end in flat rows [N] of learnt tokens, each at the position that predicts it; `ends` [D + 1] are their
cumulative lengths. Values are of the state before a token is chosen: of the prompt and of the tokens before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def lengths_of(ends: Sequence[int]) -> list[int]:
    return [b - a for a, b in pairwise(ends)]


def sums(values: Tensor, ends: Sequence[int]) -> Tensor:
    """[D] of each answer."""
    return torch.stack([part.sum() for part in values.split(lengths_of(ends))])


def token_rewards(scores: Tensor, kl: Tensor | None, kl_coef: float, ends: Sequence[int]) -> Tensor:
    """[N] what each token earns: less its share of the KL from the reference (arXiv:2203.02155), and its answer's score
    [D] at the last one. Without `kl` [N] the scores alone."""
    rewards = torch.zeros(ends[-1], dtype=torch.float32, device=scores.device) if kl is None else -kl_coef * kl.float()
    last = torch.tensor(ends[1:], device=scores.device) - 1
    return rewards.index_add(0, last, scores.float())


def gae(
    rewards: Tensor, values: Tensor, ends: Sequence[int], gamma: float, lam: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Generalised advantages [N] (arXiv:1506.02438), and returns [N], which are advantages + values.

    A_t = d_t + gamma lam A_{t+1} with d_t = r_t + gamma V_{t+1} - V_t. After an answer's last token nothing is earned,
    whether it ended by itself or was cut.
    """
    lengths = lengths_of(ends)
    r, v = (pad_sequence(list(row.float().split(lengths)), batch_first=True) for row in (rewards, values))  # [D, L]
    following = torch.cat([v[:, 1:], torch.zeros_like(v[:, :1])], 1)
    deltas = r + gamma * following - v  # 0 where padded, so that nothing comes from there
    made, carried = [], torch.zeros_like(deltas[:, 0])
    for column in reversed(deltas.unbind(1)):
        carried = column + gamma * lam * carried
        made.append(carried)
    padded = torch.stack(made[::-1], 1)
    advantages = torch.cat([row[:n] for row, n in zip(padded, lengths)])
    return advantages, advantages + values.float()


def whitened(values: Tensor, keep_mean: bool = False, epsilon: float = 1e-8) -> Tensor:
    """[N] of variance 1 (that of a sample, divided by N - 1), and of mean 0 unless that is to be kept.

    Advantages lose their mean: one that is added back makes all tokens of a batch likelier, or all less likely.
    Rewards keep it, as it is what is to be earned. A single value has no variance and is 0, or itself.
    """
    values = values.float()
    mean = values.mean()
    variance = values.var() if len(values) > 1 else torch.zeros_like(mean)
    made = (values - mean) * torch.rsqrt(variance + epsilon)
    return made + mean if keep_mean else made


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """[] 1 - Var(returns - values) / Var(returns): 1 of a critic that knows, 0 of one that tells a constant; 0 where all
    returns are the same."""
    spread = returns.var(correction=0)
    left = (returns - values).var(correction=0)
    return torch.where(spread > 0, 1 - left / spread.clamp(min=1e-12), torch.zeros_like(spread))
