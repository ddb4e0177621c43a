"""What readers of raw documents share: a file with what was left out of it, texts with places, rows that are ready."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...data import readers
from ...data.readers import shown
from .encodings import decoded

LONGEST_TEXT = 256 << 20  # bytes of a document of text, which is held whole
LONGEST_LINE = 32 << 20  # bytes of one line of it: what is longer is no text that was written
HEAD = 64 << 10  # bytes by which a kind is told


class Unreadable(Exception):
    """A file, or a part of one, that gives nothing; the text says why and what would help."""


@dataclass(frozen=True)
class How:
    """What is asked of all files."""

    kind: str | None = None  # told by content where None
    per: str | None = None  # page or whole; None: PDFs whole, chats by day
    max_chars: int | None = None
    quotes: bool = True  # of answered mail
    me: str | None = None  # who is the assistant in chats between people


@dataclass
class File:
    """One document while it is read."""

    path: Path
    kind: str
    days: tuple[Path, ...] = ()  # the files of a channel
    about: Path | None = None  # the users of the export
    left: Counter[str] = field(default_factory=Counter)  # what was left out of it on purpose, by reason
    problems: Counter[str] = field(default_factory=Counter)  # what could not be read
    warnings: Counter[str] = field(default_factory=Counter)

    def text(self, path: Path | None = None, declared: str | None = None) -> str:
        """The whole of it, decoded; Unreadable of what is too long or no text."""
        return self.decoded(contents(path or self.path), declared)

    def decoded(self, data: bytes, declared: str | None = None) -> str:
        text, warning = decoded(data, declared)
        if warning:
            self.warnings[warning] += 1
        if (at := text.find("\0")) >= 0:
            raise Unreadable(f"a NUL character at {at:,}: binary, or damaged")
        return text.replace("\r\n", "\n").replace("\r", "\n")


class Part(NamedTuple):
    """A stretch of a document's text, and where it stands."""

    text: str
    at: dict[str, Any]


class Document(NamedTuple):
    """Texts that follow each other, parted by blank lines, and further keys of the row."""

    parts: Sequence[Part]
    more: Mapping[str, Any] = {}
    path: Path | None = None  # where it is not the file itself


class Ready(NamedTuple):
    """A row as it is to be written."""

    values: dict
    at: dict[str, Any]
    path: Path | None = None  # where it is not the file itself


def opened(path: Path) -> Any:
    """The bytes of a file, decompressed where its name says that it is compressed."""
    return readers._open(path)


def contents(path: Path) -> bytes:
    """All bytes of a text; never more than the limit is held."""
    made, size = io.BytesIO(), 0
    with opened(path) as file:
        while line := file.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise Unreadable(f"a line is longer than {LONGEST_LINE >> 20} MiB: no text that was written")
            size += made.write(line)
            if size > LONGEST_TEXT:
                raise Unreadable(f"longer than {LONGEST_TEXT >> 20} MiB of text; part it into several files")
    return made.getvalue()


def problem_of(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, Unreadable):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = shown(str(error)).splitlines()
    name = "" if type(error).__name__ == "DataError" else f"{type(error).__name__}: "
    return f"{name}{said[0][:300] if said else 'no reason given'}"
