"""The engine: a source as pieces, worked on in processes, whose results appear whole and outlive a kill.

What a piece gives is kept under a journal's folder until all are there; then outputs are put in their places by
renaming. A killed run that is started again does the pieces that are missing, and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..data import readers, sources
from ..errors import ConfigError, DataError, LuthierError
from .journal import Journal, key_of, key_read
from .outputs import Written, assembled, shard_names, suffix_of, writer
from .processes import Processes

PIECE = 64 << 20  # bytes of a range of a large JSONL file
BLOCK = 8 << 20  # bytes that are looked through at a time for the borders of lines
TICK = 5.0  # seconds between two words of a process on how far it is

Say = Callable[[str], None]


@dataclass(frozen=True)
class Piece:
    """A file, or a range of bytes at line borders of a JSONL file; or a data set on the hub."""

    path: Path
    start: int = 0
    stop: int | None = None
    line: int = 1  # the number of its first line
    hub: str | None = None
    split: str = "train"


class Work:
    """What is done with the rows of one piece. Made in each process, for each piece anew, from plain settings."""

    def begin(self, piece: Any, folder: Path, number: int) -> None:
        """Before the first row; `folder` is for files of its own, which stay until the run is removed."""

    def row(self, row: sources.Row) -> Iterable[tuple[str, dict]]:
        """(stream, row out): stream "" is the main output, others are side files. Row numbers count in the piece."""
        return ()

    def end(self) -> dict:
        """JSON of what was found in the piece."""
        return {}


@dataclass(frozen=True)
class Done:
    """A piece that was worked on."""

    piece: Any
    number: int
    first: int  # the number of its row 0 in the whole
    rows: int  # that were read
    end: dict
    written: dict[str, int] = field(default_factory=dict)  # rows by stream


# ---------------------------------------------------------------------------- pieces


def pieces_of(source: str | Sequence[str], split: str = "train") -> list[Piece]:
    """The pieces of what training would read, in its order."""
    found: list[Piece] = []
    for name in [source] if isinstance(source, str) else source:
        if problem := sources.missing(name):
            raise DataError(problem)
        files = sources.files_of(name, split)
        if files is None:
            found.append(Piece(Path(name.replace("/", "--")), hub=name, split=split))
        else:
            found.extend(piece for file in files for piece in _cut(file))
    return found


def refuse_within(source: str | Sequence[str], outputs: Iterable[Path]) -> None:
    """Outputs in a folder that is read: from then on they would be read as rows of it."""
    for name in [source] if isinstance(source, str) else source:
        folder = Path(name).expanduser()
        for out in outputs if folder.is_dir() else ():
            if not out.resolve().is_relative_to(folder.resolve()):
                continue
            if not any(part.startswith(".") for part in out.resolve().relative_to(folder.resolve()).parts):
                raise ConfigError(
                    f"{out} lies in {name}, and would be read as rows of it from then on: give an output elsewhere"
                )


def _cut(path: Path) -> Iterator[Piece]:
    """Ranges of at least `PIECE` bytes of a large JSONL file that is not compressed; else the whole file."""
    size = path.stat().st_size
    if readers.kind_of(path) not in ((".jsonl", ""), (".ndjson", "")) or size < 2 * PIECE:
        yield Piece(path)
        return
    start, line, lines, at = 0, 1, 0, 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            due = start + PIECE - at  # in this block, where the piece may end
            border = block.find(b"\n", max(0, due - 1)) + 1 if due <= len(block) and size - at > PIECE // 2 else 0
            if border:
                lines += block.count(b"\n", 0, border)
                yield Piece(path, start, at + border, line)
                start, line, lines = at + border, line + lines, block.count(b"\n", border)
            else:
                lines += block.count(b"\n")
            at += len(block)
    if start < size:
        yield Piece(path, start, size, line)


def rows_of(piece: Piece) -> Iterator[sources.Row]:
    """The rows of a piece, counted from 0."""
    if piece.hub is not None:
        yield from sources.read(piece.hub, split=piece.split)
        return
    number = 0
    for item in sources.records(piece.path, piece.start, piece.stop, piece.line):
        if not isinstance(item, int):
            yield sources.Row(number, *item)
            number += 1


# ---------------------------------------------------------------------------- running


def run(
    source: str | Sequence[str] | Sequence[Piece],
    out: Path | None,
    work: Callable[[], Work],
    *,
    settings: Mapping,
    workers: int | None = None,
    say: Say = lambda text: None,
    sides: Mapping[str, Path] | None = None,
    journal: Path | None = None,
    read: Callable[[Any], Iterable[sources.Row]] = rows_of,
    split: str = "train",
) -> list[Done]:
    """Work on all rows of a source; the pieces that were done, in order.

    `out` is a .jsonl file, perhaps .gz or .zst, or a folder for a shard of each piece; None has no main output. `sides`
    are the files of the other streams (`outputs.beside` names one). A row of a side file that begins with the key
    `row` has its number in the piece there, which becomes that in the whole. `work` and `read` are named in modules
    (they go to other processes), `settings` is JSON and decides everything that `work` does. `journal` is where
    `out` is None, the folder in which a killed run finds what it did.
    """
    cut = [*_pieces(source, split)]
    if not cut:
        raise DataError(f"{source}: nothing to read")
    sides = dict(sides or {})
    suffix = suffix_of(out) if out is not None else ""
    place = journal or journal_of(out)
    kept = Journal(place, key_of(settings, [inputs_of(piece) for piece in cut], out, sides))
    names = shard_names([piece.path for piece in cut], suffix) if out is not None and suffix is None else []
    with kept.open([*([out] if out is not None else []), *sides.values()], say) as finished:
        job = _Job(work, read, kept.folder, tuple(["", *sides] if out is not None else sides), suffix or "")
        entries = kept.entries(len(cut))
        todo = [number for number, entry in enumerate(entries) if entry is None]
        if not finished:
            if len(todo) < len(cut):
                say(f"going on: {len(cut) - len(todo):,} of {len(cut):,} pieces were done before")
            with room(place):
                _work(job, [(n, cut[n], kept.key["inputs"][str(n)]) for n in todo], workers, say)
            entries = kept.entries(len(cut))
        found = _numbered(cut, entries)
        if not any(d.rows for d in found):
            raise DataError(f"{source if isinstance(source, str) else cut[0].path}: no rows")
        if not finished:
            written = [Written(d.number, d.first, d.written) for d in found]
            with room(place):
                kept.finish(assembled(kept.folder, written, out, suffix, names, sides))
        else:
            say(f"{out or place}: done before")
    return found


@contextlib.contextmanager
def room(place: Path) -> Iterator[None]:
    """Says of a full disk what to do, and where: what writes does not name its file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise LuthierError(
            f"{error.filename or place}: {error.strerror}: make room there, or give an output elsewhere; "
            "the same command goes on"
        ) from None


def _pieces(source: Any, split: str) -> Iterator[Any]:
    if isinstance(source, str) or all(isinstance(name, str) for name in source):
        yield from pieces_of(source, split)
    else:
        yield from source


def journal_of(out: Path | None) -> Path:
    """Where a run keeps what it has done: in the folder that it writes, or hidden beside the file."""
    assert out is not None, "a run without an output needs a place for its journal"
    return out / ".luthier" if suffix_of(out) is None else out.with_name(f".{out.name}.luthier")


def inputs_of(piece: Any) -> list:
    """What a piece is known by: a file's name, size and time of change, and the range of it."""
    if getattr(piece, "hub", None) is not None:
        return [piece.hub, piece.split]
    told = os.stat(piece.path)
    return [str(piece.path), told.st_size, told.st_mtime_ns, getattr(piece, "start", 0), getattr(piece, "stop", None)]


def refuse_changed(piece: Piece, known: list) -> None:
    """A file that was written to while its rows were read: nobody knows which they were."""
    try:
        same = inputs_of(piece) == known
    except OSError:
        same = False
    if not same:
        raise DataError(
            f"{readers.shown(piece.path)}: changed while it was read; give the command again once it is written"
        )


def refuse_changed_since(done: Sequence[Done], journal: Path) -> None:
    """Files that are not what they were in a run that ended: what was decided over its rows is of others."""
    inputs = key_read(journal)["inputs"]
    for d in done:
        refuse_changed(d.piece, inputs[str(d.number)])


def _numbered(cut: Sequence[Any], entries: Sequence[dict | None]) -> list[Done]:
    rows = [entry["rows"] for entry in entries if entry is not None]
    assert len(rows) == len(cut)
    firsts = [0, *accumulate(rows)]
    return [
        Done(piece, number, firsts[number], entry["rows"], entry["end"], entry["streams"])
        for number, (piece, entry) in enumerate(zip(cut, entries))
        if entry is not None
    ]


@dataclass(frozen=True)
class _Job:
    """All that a process has to know; a call does one piece."""

    work: Callable[[], Work]
    read: Callable[[Any], Iterable[sources.Row]]
    folder: Path
    streams: tuple[str, ...]
    suffix: str

    def __call__(self, task: tuple[int, Any, list], tick: Callable[[int], None]) -> int:
        """Write what the piece gives, then its entry in the journal; the number of its rows."""
        number, piece, known = task
        work, count, due = self.work(), 0, time.monotonic() + TICK
        work.begin(piece, self.folder, number)
        with writer(self.folder, number, self.streams, self.suffix) as write:
            for row in self.read(piece):
                count += 1
                for stream, values in work.row(row):
                    try:
                        write(stream, values)
                    except (TypeError, ValueError) as error:
                        raise DataError(f"{row.place}: {error}") from None
                if not count & 1023 and time.monotonic() > due:
                    tick(count)
                    due = time.monotonic() + TICK
            end = work.end()
            if isinstance(piece, Piece):
                refuse_changed(piece, known)
        Journal.enter(self.folder, number, {"rows": count, "end": end, "streams": write.rows})
        return count


def _work(job: _Job, tasks: Sequence[tuple[int, Any, list]], workers: int | None, say: Say) -> None:
    count = min(cores() if workers is None else workers, len(tasks))
    if workers is not None and workers < 1:
        raise ConfigError(f"workers={workers}: give a number from 1 up")
    began, going, done = time.monotonic(), {}, 0

    def tell(number: int, rows: int, finished: bool) -> None:
        nonlocal done
        going[number] = rows
        done += finished
        total, seconds = sum(going.values()), max(1e-9, time.monotonic() - began)
        say(f"{done:,} of {len(tasks):,} pieces, {total:,} rows, {total / seconds:,.0f} rows/s")

    with Processes(count if count > 1 else 0, job) as processes:
        processes.run(tasks, tell)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
