"""Texts as numbers for a light classifier: hashed words, pairs of words and runs of letters; needs no PyTorch."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BITS = 18  # of a feature's number
LETTERS = 4  # of a run of letters
MOST = 512  # words of a text that are read: 3 KB
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio (Knuth's multiplicative hash)


class Features(NamedTuple):
    """What texts have, as numbers: text i has `ids[ends[i] : ends[i + 1]]`, each once, so many times."""

    ends: np.ndarray  # [N + 1] int64
    ids: np.ndarray  # [M] int32 below 2^BITS
    times: np.ndarray  # [M] uint8, at most 255


def chosen(features: Features, rows: np.ndarray) -> Features:
    """Those of some of the texts, in that order."""
    starts, lengths = features.ends[rows], np.diff(features.ends)[rows]
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    at = np.arange(ends[-1]) + np.repeat(starts - ends[:-1], lengths)
    return Features(ends, features.ids[at], features.times[at])


def _mixed(values: np.ndarray, kind: int) -> np.ndarray:
    made = (values.astype(np.uint64) + np.uint64(kind << 40)) * _MIX
    return (made >> np.uint64(64 - BITS)).astype(np.int32)


class Words:
    """Numbers of words, remembered: the same few make up most of a text."""

    def __init__(self, letters: bool = True) -> None:
        self.known: dict[bytes, int] = {}
        self.letters = letters

    def numbers(self, words: Sequence[bytes]) -> np.ndarray:
        known = self.known
        if len(known) > 1 << 20:
            known.clear()
        return np.array([known.get(w) or known.setdefault(w, zlib.crc32(w) | 1 << 32) for w in words], np.uint64)

    def of(self, words: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, times) of a text, ids rising."""
        words = words[:MOST]
        if not words:
            return np.zeros(0, np.int32), np.zeros(0, np.uint8)
        one = self.numbers(words)
        parts = [_mixed(one, 1)]
        if len(one) > 1:
            parts.append(_mixed(one[:-1] * np.uint64(31) + one[1:], 2))
        if self.letters:
            text = np.frombuffer(b" " + b" ".join(words) + b" ", np.uint8)
            if len(text) >= LETTERS:
                runs = np.lib.stride_tricks.sliding_window_view(text, LETTERS)
                parts.append(_mixed(np.ascontiguousarray(runs).view(np.uint32)[:, 0], 3))
        ids, times = np.unique(np.concatenate(parts), return_counts=True)
        return ids, np.minimum(times, 255).astype(np.uint8)
