"""A table of counts as a picture: PNG bytes (https://www.w3.org/TR/png/), drawn without a library for that."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np

CELL, LARGEST, SCALE = 44, 1024, 2  # pixels of a cell, of the picture, of a digit's dot
DIGITS = (  # 3 x 5 dots each, a number for each line from above
    (7, 5, 5, 5, 7), (2, 6, 2, 2, 7), (7, 1, 7, 4, 7), (7, 1, 7, 1, 7), (5, 5, 7, 1, 1),
    (7, 4, 7, 1, 7), (7, 4, 7, 5, 7), (7, 1, 1, 1, 1), (7, 5, 7, 5, 7), (7, 5, 7, 1, 7),
)  # fmt: skip


def confusion(counts: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8: a cell for each true label (downwards) and each said one (to the right), the darker the larger
    its share of the row is, with its count; labels are numbered at the edges."""
    table = np.asarray(counts, np.float64)
    size = len(table)
    cell = max(1, min(CELL, LARGEST // (size + 1)))
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    picture = np.full(((size + 1) * cell, (size + 1) * cell, 3), 255, np.uint8)
    for i in range(size):
        for j in range(size):
            blue = np.array([255 - 215 * share[i, j], 255 - 150 * share[i, j], 255 - 60 * share[i, j]])
            place = (slice((i + 1) * cell + 1, (i + 2) * cell), slice((j + 1) * cell + 1, (j + 2) * cell))
            picture[place] = blue.astype(np.uint8)
            _write(picture[place], str(int(table[i, j])), 255 if share[i, j] > 0.6 else 0)
        _write(picture[(i + 1) * cell : (i + 2) * cell, :cell], str(i), 110)
        _write(picture[:cell, (i + 1) * cell : (i + 2) * cell], str(i), 110)
    return picture


def _write(place: np.ndarray, text: str, shade: int) -> None:
    """Digits in the middle of a part of the picture, where they fit."""
    width, height = (4 * len(text) - 1) * SCALE, 5 * SCALE
    top, left = (place.shape[0] - height) // 2, (place.shape[1] - width) // 2
    if top < 0 or left < 0:
        return
    for n, digit in enumerate(text):
        dots = np.array([[line >> (2 - bit) & 1 for bit in range(3)] for line in DIGITS[int(digit)]], bool)
        large = dots.repeat(SCALE, 0).repeat(SCALE, 1)
        begin = left + 4 * n * SCALE
        place[top : top + height, begin : begin + 3 * SCALE][large] = shade


def png(picture: np.ndarray) -> bytes:
    """[H, W, 3] uint8 as a PNG file."""
    height, width, _ = picture.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = b"".join(b"\0" + line.tobytes() for line in picture)  # each unfiltered
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
