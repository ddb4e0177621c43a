"""What pieces write, and how it comes to its place: one file in the order of pieces, or a shard of each."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..data.readers import COMPRESSIONS
from ..errors import ConfigError
from ..files import flush_folder
from .encoded import line

COMPRESSED = (".gz", ".zst")
NUMBER = re.compile(rb'^\{"row": (\d+)', re.M)
BLOCK = 1 << 20


def suffix_of(out: Path) -> str | None:
    """The compression of an output file, or ""; None of a folder. ConfigError of other kinds of files."""
    compression = out.suffix.lower() if out.suffix.lower() in COMPRESSIONS else ""
    name = Path(out.stem).suffix.lower() if compression else out.suffix.lower()
    if name in (".jsonl", ".ndjson") and not out.is_dir():
        if compression and compression not in COMPRESSED:
            raise ConfigError(f"{out}: written are .jsonl, .jsonl.gz and .jsonl.zst")
        return compression
    if compression or (out.suffix and out.suffix.lower()[1:] in ("json", "csv", "tsv", "parquet", "arrow", "txt")):
        raise ConfigError(f"{out}: rows are written as .jsonl, .jsonl.gz or .jsonl.zst, or as a folder of shards")
    return None


def beside(out: Path, stream: str) -> Path:
    """The side file of an output: rows.jsonl.gz has rows.removed.jsonl.gz, a folder `clean` has clean.removed.jsonl."""
    compression = suffix_of(out)
    if compression is None:
        return out.with_name(f"{out.name}.{stream}.jsonl")
    stem = out.name[: len(out.name) - len(compression)]
    return out.with_name(f"{Path(stem).stem}.{stream}{Path(stem).suffix}{compression}")


def shard_names(paths: Sequence[Path], suffix: str | None) -> list[str]:
    """A name for the shard of each piece: its file's own, with a number where a file has several pieces."""
    stems = {path: _stem(path) for path in paths}
    twice = {stem for stem, count in Counter(stems.values()).items() if count > 1}
    several, seen, made = Counter(paths), Counter(), []
    for path in paths:
        stem = path.name if stems[path] in twice else stems[path]
        number = f"-{seen[path]:05}" if several[path] > 1 else ""
        seen[path] += 1
        made.append(f"{stem}{number}.jsonl{suffix or ''}")
    clash = [name for name, count in Counter(made).items() if count > 1]
    if clash:  # files of one name in several folders
        return [f"{i:05}-{name}" for i, name in enumerate(made)]
    return made


def _stem(path: Path) -> str:
    name = path.name
    for _ in range(1 + (path.suffix.lower() in COMPRESSIONS)):
        name = Path(name).stem
    return name


# ---------------------------------------------------------------------------- a piece


def _opened(path: Path, compression: str) -> Any:
    """For writing; equal contents give equal bytes."""
    if compression == ".gz":
        return gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=open(path, "wb"), mtime=0)
    if compression == ".zst":
        import pyarrow

        return pyarrow.output_stream(str(path), compression="zstd")
    return open(path, "wb", buffering=BLOCK)


class Writing:
    """The files of a piece's streams, opened when something is written to them."""

    def __init__(self, folder: Path, number: int, streams: Sequence[str], compression: str):
        self.folder, self.number, self.streams, self.compression = folder, number, streams, compression
        self.files: dict[str, Any] = {}
        self.rows: dict[str, int] = {}

    def __call__(self, stream: str, values: dict) -> None:
        data = line(values)
        file = self.files.get(stream)
        if file is None:
            assert stream in self.streams, f"no stream {stream!r} was asked for"
            # Numbers of rows are still to be changed in side files, so these are compressed at the end.
            file = _opened(self._aside(stream), "" if stream else self.compression)
            self.files[stream], self.rows[stream] = file, 0
        file.write(data)
        self.rows[stream] += 1

    def _aside(self, stream: str) -> Path:
        return self.folder / f".{kept_name(self.number, stream)}.{os.getpid()}"  # a killed run's child may still write

    def close(self) -> None:
        for file in self.files.values():
            raw = getattr(file, "fileobj", None)
            file.close()
            if raw is not None:
                raw.close()

    def discard(self) -> None:
        """Close what is open, though a full disk lets nothing be flushed, and leave nothing behind."""
        with contextlib.suppress(OSError):
            self.close()
        for stream in self.files:
            self._aside(stream).unlink(missing_ok=True)

    def keep(self) -> None:
        for stream in self.files:
            _flushed(self._aside(stream))
            os.replace(self._aside(stream), self.folder / kept_name(self.number, stream))


def kept_name(number: int, stream: str) -> str:
    return f"piece-{number:06}{'.' if stream else ''}{stream}.rows"


@contextlib.contextmanager
def writer(folder: Path, number: int, streams: Sequence[str], compression: str) -> Iterator[Writing]:
    """Writes rows to streams; they are kept under the journal's folder when all went well."""
    made = Writing(folder, number, streams, compression)
    try:
        yield made
        made.close()
        made.keep()
    except BaseException:
        made.discard()
        raise


def _flushed(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------- the whole


class Written(NamedTuple):
    number: int
    first: int  # the number of the piece's row 0 in the whole
    rows: Mapping[str, int]  # by stream


def assembled(
    folder: Path, pieces: Sequence[Written], out: Path | None, suffix: str | None, names: Sequence[str],
    sides: Mapping[str, Path],
) -> list[str]:  # fmt: skip
    """Put everything into its place, side files last; done again after a kill, it goes on. The names that are there."""
    made = []
    if out is not None and suffix is None:
        out.mkdir(parents=True, exist_ok=True)
        for piece, name in zip(pieces, names):
            if "" in piece.rows:
                kept = folder / kept_name(piece.number, "")
                if kept.exists():  # else it was renamed before a kill
                    os.replace(kept, out / name)
        flush_folder(out)
        made.append(out.name)
    elif out is not None:
        _joined(folder, pieces, "", out, "")
        made.append(out.name)
    for stream, path in sides.items():
        if any(stream in piece.rows for piece in pieces):
            _joined(folder, pieces, stream, path, suffix_of(path) or "")
            made.append(path.name)
    for piece in pieces:
        for stream in piece.rows:
            (folder / kept_name(piece.number, stream)).unlink(missing_ok=True)
    return made


def _joined(folder: Path, pieces: Sequence[Written], stream: str, path: Path, compression: str) -> None:
    """The pieces end to end: frames of a compressed file may follow one another."""
    there = [piece for piece in pieces if stream in piece.rows]
    if path.exists() and not all((folder / kept_name(piece.number, stream)).exists() for piece in there):
        return  # it was put there, and pieces were being removed, before a kill
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    to = _opened(aside, compression)
    for piece in there:
        with open(folder / kept_name(piece.number, stream), "rb") as file:
            for block in _blocks(file):
                to.write(
                    NUMBER.sub(lambda m, f=piece.first: b'{"row": %d' % (int(m[1]) + f), block) if stream else block
                )
    raw = getattr(to, "fileobj", None)
    to.close()
    if raw is not None:
        raw.close()
    _flushed(aside)
    os.replace(aside, path)


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Of whole lines."""
    while lines := file.readlines(BLOCK):
        yield b"".join(lines)
