"""Which files there are under what was named: each once, with its kind, or the reason why it is left."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ...data.readers import shown
from ...errors import DataError
from . import kinds
from .base import Unreadable, problem_of
from .slack import DAY

COSTS = {"pdf": 60, "docx": 10, "html": 6, "eml": 4}  # times what a byte of plain text takes
BATCH = 16 << 20  # bytes of plain text, or as much work
FILES = 64  # in a batch at most


class Unit(NamedTuple):
    """A document: a file, or a channel of a Slack export with the files of its days."""

    path: Path
    kind: str
    size: int
    days: tuple[Path, ...] = ()
    about: Path | None = None


@dataclass(frozen=True)
class Batch:
    """Documents that a process reads one after the other; a piece of the engine, known by its first file."""

    path: Path
    units: tuple[Unit, ...]


@dataclass
class Found:
    units: list[Unit] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)  # (file or folder, reason)
    known: list[tuple] = field(default_factory=list)  # of each file: name, size, time of change

    def inputs(self) -> dict:
        """What the files are known by, for a run that goes on."""
        told = repr(self.known).encode("utf-8", "surrogateescape")
        return {"files": len(self.known), "bytes": sum(one[1] for one in self.known),
                "hash": hashlib.sha256(told).hexdigest()[:16]}  # fmt: skip


def find(names: Sequence[str], kind: str | None, without: Iterable[Path]) -> Found:
    """All documents under these files and folders, in the order of names; `without` are our own outputs."""
    search = _Search(kind, {path.absolute() for path in without})
    for name in names:
        path = Path(name).expanduser()
        if not os.path.lexists(path):
            raise DataError(f"{name!r} does not exist")
        search.visit(path, named=True)
    return search.found


class _Search:
    def __init__(self, kind: str | None, without: set[Path]):
        self.kind, self.without, self.found = kind, without, Found()
        self.seen: dict[tuple[int, int], str] = {}

    def visit(self, path: Path, named: bool = False) -> None:
        if path.absolute() in self.without:
            return
        if path.name.startswith(".") and not named:
            self.leave(path, "hidden; name it on the command line")
            return
        try:
            told = path.stat()
            if (key := (told.st_dev, told.st_ino)) in self.seen:  # a link, a circle of them, or named twice
                raise Unreadable(f"the same as {self.seen[key]}")
            self.seen[key] = shown(path)
            if stat.S_ISDIR(told.st_mode):
                self.folder(path)
            elif stat.S_ISREG(told.st_mode):
                self.file(path, told)
            else:
                raise Unreadable("neither a file nor a folder")
        except FileNotFoundError:
            self.leave(path, "a link to nothing")
        except Exception as error:  # whatever a damaged file makes its reader raise
            self.leave(path, problem_of(error))

    def file(self, path: Path, told: os.stat_result) -> None:
        self.found.known.append((str(path), told.st_size, told.st_mtime_ns))
        kind = kinds.forced(path, self.kind) if self.kind else kinds.kind(path)
        if kind == "slack":
            raise Unreadable("--kind slack reads folders of exports, and this is no file of one")
        self.found.units.append(Unit(path, kind, told.st_size))

    def folder(self, path: Path) -> None:
        inside = sorted(path.iterdir(), key=lambda one: one.name)
        channels = [one for one in inside if one.is_dir() and not one.name.startswith(".") and _days(one)]
        export = (path / "users.json").is_file() or (path / "channels.json").is_file()
        if channels and self.kind in (None, "slack") and (export or self.kind):
            self.export(path, inside, channels)
        elif _days(path) and self.kind == "slack":
            self.channel(path, path.parent)
        else:
            for one in inside:
                self.visit(one)

    def export(self, path: Path, inside: list[Path], channels: list[Path]) -> None:
        for one in inside:
            if one in channels:
                self.channel(one, path)
            elif one.name.startswith("."):
                self.leave(one, "hidden; name it on the command line")
            else:
                self.leave(one, "about a Slack export, not what was said in it")

    def channel(self, path: Path, root: Path) -> None:
        days = _days(path)
        for other in sorted(set(path.iterdir()) - set(days)):
            self.leave(other, "in a channel of a Slack export, but no day of it")
        size = 0
        about = root / "users.json"
        for day in (*days, *([about] if about.is_file() else [])):
            told = day.stat()
            size += told.st_size
            self.found.known.append((str(day), told.st_size, told.st_mtime_ns))
        self.found.units.append(Unit(path, "slack", size, tuple(days), about if about.is_file() else None))

    def leave(self, path: Path, reason: str) -> None:
        self.found.left.append((shown(path), reason))


def _days(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if DAY.fullmatch(one.name) and one.is_file())


def batches(units: Sequence[Unit]) -> Iterator[Batch]:
    """Documents that follow each other, as many as make some work; the same for any number of processes."""
    batch: list[Unit] = []
    work = 0
    for unit in units:
        cost = unit.size * COSTS.get(unit.kind, 1)
        if batch and (work + cost > BATCH or len(batch) == FILES):
            yield _batch(batch)
            batch, work = [], 0
        batch.append(unit)
        work += cost
    if batch:
        yield _batch(batch)


def _batch(units: list[Unit]) -> Batch:
    first = units[0]
    return Batch(first.days[0] if first.days else first.path, tuple(units))
