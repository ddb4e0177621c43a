"""MinHash: rows as sets of shingles, and as short signatures that agree as often as the sets do.

Broder, On the resemblance and containment of documents (1997), https://doi.org/10.1109/SEQUEN.1997.666900. Many rows
are worked on at a time, so that all loops over characters, words and hashes run inside numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np

Unit = Literal["characters", "words"]

BASE = 0x9E3779B97F4A7C15  # odd: of the polynomial in which the units of a shingle are the coefficients
MIX = np.uint64(0xD6E8FEB86659FD93)  # odd: the high half of a product with it depends on all bits
APART = 1 << 21  # above all characters: added to those of texts that are to be like no others
SEED = 1


class Shingles:
    """The shingles of several rows, end to end."""

    def __init__(self, hashes: np.ndarray, starts: np.ndarray):
        self.hashes = hashes  # [S] uint32; a shingle that a row has twice is there twice
        self.starts = starts  # [R] int64: where each row begins; none is empty

    def sizes(self) -> np.ndarray:
        """[R]: how many shingles each row has, repeated ones counted."""
        return np.diff(self.starts, append=len(self.hashes))

    def sets(self) -> tuple[np.ndarray, np.ndarray]:
        """([U] uint32, rising in each row, each once; [R] how many each row has)."""
        rows = np.repeat(np.arange(len(self.starts), dtype=np.uint64) << np.uint64(32), self.sizes())
        rows |= self.hashes
        rows.sort()
        first = np.ones(len(rows), bool)
        first[1:] = rows[1:] != rows[:-1]
        rows = rows[first]
        counts = np.bincount((rows >> np.uint64(32)).astype(np.int64), minlength=len(self.starts))
        return rows.astype(np.uint32), counts


def shingles(texts: Sequence[str], unit: Unit, size: int, apart: Sequence[tuple[int, int, int]] = ()) -> Shingles:
    """The runs of `size` characters or words of normal texts (`normal.normal`), none of which may be empty.

    A text of fewer units is one shingle. `apart` has (text, start, stop) of stretches whose shingles are to be like no
    others.
    """
    if unit == "characters":
        texts = [text.ljust(size) for text in texts]
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if apart:
        begins = np.cumsum(lengths) - lengths
        for text, start, stop in apart:
            codes[begins[text] + start : begins[text] + stop] += np.uint64(APART)
    if unit == "words":
        codes, lengths = _words(codes, lengths, size)
    hashes = rolled(codes, size)
    inside = np.ones(len(hashes), bool)
    inside[(np.cumsum(lengths)[:-1, None] - np.arange(1, size)).ravel()] = False
    hashes = hashes[inside]
    hashes ^= hashes >> np.uint64(29)
    hashes *= MIX
    counts = lengths - size + 1
    return Shingles((hashes >> np.uint64(32)).astype(np.uint32), np.cumsum(counts) - counts)


def _words(codes: np.ndarray, lengths: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Characters to words as numbers, rows of fewer than `least` filled up; and the words of each row."""
    first = np.zeros(len(codes), bool)
    first[np.cumsum(lengths) - lengths] = True
    blank = (codes & np.uint64(APART - 1)) == 32
    first[1:] |= blank[:-1]
    starts = np.flatnonzero(first)
    place = np.arange(len(codes)) - np.repeat(starts, np.diff(starts, append=len(codes)))
    powers = _powers()[np.minimum(place, 255)]
    powers[blank] = 0  # a word is the same before a blank and at the end
    words = np.add.reduceat(codes * powers, starts)
    words ^= words >> np.uint64(31)
    counts = np.diff(np.searchsorted(starts, np.cumsum(lengths)), prepend=0)
    if (counts < least).any():
        missing = np.maximum(least - counts, 0)
        words = np.insert(words, np.repeat(np.cumsum(counts), missing), 0)
        counts += missing
    return words, counts


@cache
def _powers() -> np.ndarray:
    """[256] random odd numbers, one for each place in a word; the last is for all places after it."""
    return np.random.default_rng(SEED).integers(0, 1 << 63, 256, np.uint64) * np.uint64(2) + np.uint64(1)


def rolled(values: np.ndarray, size: int) -> np.ndarray:
    """[L - size + 1] uint64: of each run of `size` values the polynomial in `BASE`, modulo 2**64."""
    if size == 1:
        return values.copy()
    half = size // 2
    low = rolled(values, half)
    both = low[:-half] * np.uint64(pow(BASE, half, 1 << 64)) + low[half:]
    return both if size % 2 == 0 else both[:-1] * np.uint64(BASE) + values[size - 1 :]


# ---------------------------------------------------------------------------- signatures


def signatures(of: Shingles, hashes: int) -> np.ndarray:
    """[hashes, R] uint32: of each row the least value of its shingles under each of as many random orders.

    Two rows agree in a value with a probability that is their Jaccard similarity.
    """
    factors, terms = _orders(hashes)
    made = np.empty((hashes, len(of.starts)), np.uint32)
    room = np.empty_like(of.hashes)
    for i in range(hashes):
        np.multiply(of.hashes, factors[i], out=room)
        np.add(room, terms[i], out=room)
        np.minimum.reduceat(room, of.starts, out=made[i])
    return made


@cache
def _orders(hashes: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(SEED)
    factors = random.integers(0, 1 << 31, hashes, np.uint32) * np.uint32(2) + np.uint32(1)
    return factors, random.integers(0, 1 << 32, hashes, np.uint32)


def found(similarity: float, bands: int, rows: int) -> float:
    """The probability that two rows of this similarity agree in all values of a band, for at least one band."""
    return 1 - (1 - similarity**rows) ** bands


def bands_for(threshold: float, hashes: int, recall: float) -> tuple[int, int]:
    """(bands, values in each): the longest bands that find pairs at the threshold with this probability.

    (0, 0) where even bands of one value do not.
    """
    fitting = [rows for rows in range(1, hashes + 1) if found(threshold, hashes // rows, rows) >= recall]
    return (hashes // fitting[-1], fitting[-1]) if fitting else (0, 0)


def banded(signature: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """[bands, R] uint32: one number for each band of a signature; equal where all its values are."""
    made = np.zeros((bands, signature.shape[1]), np.uint64)
    for i in range(rows):
        made *= np.uint64(BASE)
        made += signature[i : bands * rows : rows]
        made ^= made >> np.uint64(32)
    return made.astype(np.uint32)


def sketches(signature: np.ndarray) -> np.ndarray:
    """[R, hashes / 64] uint64: one bit of each value, so that rows that are not alike agree in half of them.

    b-bit minwise hashing, https://arxiv.org/abs/0910.3349.
    """
    bits = (signature * np.uint32(0x9E3779B1) >> np.uint32(31)).astype(np.uint8)
    return np.ascontiguousarray(np.packbits(bits, axis=0).T).view(np.uint64)


def differing(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[P]: in how many bits the sketches [P, W] differ, row by row."""
    return _ones((a ^ b).view(np.uint8)).sum(axis=1, dtype=np.int64)


def most_differing(threshold: float, hashes: int) -> int:
    """In how many bits rows at the threshold differ at most, but for one pair of a thousand: 3.1 standard deviations.

    Bits agree with the probability (1 + J) / 2.
    """
    apart = (1 - threshold) / 2
    return int(hashes * apart + 3.1 * (hashes * apart * (1 - apart)) ** 0.5)


_ONES = np.array([i.bit_count() for i in range(256)], np.uint8)


def _ones(values: np.ndarray) -> np.ndarray:
    return _ONES[values]
