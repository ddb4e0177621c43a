"""What must not be met in training: the inputs of held-out rows, whole or for the most part."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b

from ...data import formats, sources
from ...errors import ConfigError, DataError
from ..overlap import Index
from ..views import View, view
from .way import ASKING

BYTES = 16  # of a hash
RUN = 13  # words in a row that are no chance
COMMON = 10  # runs that more held-out rows have than this are the wording of the task


def inputs(seen: View) -> list[str]:
    """What a model is given of a row: what the user says; all of a row without roles."""
    return [text.text for text in seen.texts if text.role in ASKING] or [text.text for text in seen.texts]


def exact(text: str) -> bytes:
    """The hash of a text but for how its words are parted."""
    plain = " ".join(unicodedata.normalize("NFC", text).split())
    return blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=BYTES).digest()


class HeldOut:
    """The inputs of held-out rows; capitals, marks and blanks make no difference."""

    def __init__(self, paths: Sequence[str], columns: Mapping[str, str], share: float):
        self.share = share
        self.index = Index(_inputs(paths, columns), RUN, 1 << 30, COMMON)

    def has(self, seen: View) -> bool:
        return self.has_input(inputs(seen))

    def has_input(self, texts: Sequence[str]) -> bool:
        """Whether a held-out row has the same words, or this share of its runs of words is among these texts'."""
        return bool(self.index.matches(texts, self.share))


def _inputs(paths: Sequence[str], columns: Mapping[str, str]) -> Iterator[list[str]]:
    for row in sources.read(list(paths), split="validation"):
        if row.fault is not None:
            raise DataError(f"--validation: {row.place}: {row.fault}")
        yield inputs(view(formats.renamed(row.values, columns)))


def state(paths: Sequence[str]) -> list:
    """What held-out rows are known by: their files, with sizes and times of change. ConfigError of a missing one."""
    made: list = []
    for path in paths:
        if problem := sources.missing(path):
            raise ConfigError(f"validation: {problem}")
        files = sources.files_of(path, "validation")
        told = [(str(file), os.stat(file)) for file in files or ()]
        made += [[file, stat.st_size, stat.st_mtime_ns] for file, stat in told] or [path]
    return made


@lru_cache(maxsize=1)
def held_out(paths: tuple[str, ...], columns: tuple[tuple[str, str], ...], share: float, known: str) -> HeldOut:
    """Read once in a process, as long as `known`, the state of the files, is the same."""
    return HeldOut(paths, dict(columns), share)
