"""What an answer is worth beside the others to its prompt: pure functions of rewards [G, K], in float64."""

from __future__ import annotations

import numpy as np

EQUAL = 1e-12  # spread below which the rewards of a group are the same
FLOOR = 1e-4  # added to a standard deviation


def centred(rewards: np.ndarray, baseline: str) -> np.ndarray:
    """[G, K] rewards less the mean of their group, or less the mean of the K - 1 others in it."""
    above = rewards - rewards.mean(1, keepdims=True)
    size = rewards.shape[1]
    return above * size / (size - 1) if baseline == "leave_one_out" else above


def scaled(advantages: np.ndarray, rewards: np.ndarray, scale: str) -> np.ndarray:
    """Divided by the standard deviation (of samples, n - 1) of each group's rewards, of all, or not at all."""
    if scale == "none":
        return advantages
    deviation = rewards.std(1, ddof=1, keepdims=True) if scale == "group" else rewards.std(ddof=1)
    return advantages / (deviation + FLOOR)


def advantages(rewards: np.ndarray, baseline: str = "group_mean", scale: str = "group") -> np.ndarray:
    """[G, K] of the rewards [G, K] of K answers to each of G prompts; 0 throughout a group of equal rewards."""
    made = scaled(centred(rewards, baseline), rewards, scale)
    made[equal(rewards)] = 0.0  # not the rounding of their mean
    return made


def equal(rewards: np.ndarray) -> np.ndarray:
    """[G] groups all of whose rewards are the same, so that nothing can be learnt from them."""
    return np.ptp(rewards, axis=1) <= EQUAL * np.maximum(1.0, np.abs(rewards).max(1))
