"""Rows from files: JSONL, JSON, CSV, Parquet, plain or compressed, folders of them, and hub data sets."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..errors import DataError

COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": lambda path: gzip.open(path, "rb"),
    ".bz2": lambda path: bz2.open(path, "rb"),
    ".xz": lambda path: lzma.open(path, "rb"),
    ".zst": lambda path: _zstd(path),
}


class Row(NamedTuple):
    """A row as it stands in its file; numbers count from 0 over all files."""

    number: int
    values: dict
    place: str  # file and line or row, for messages


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


def kind_of(path: Path) -> tuple[str, str]:
    """(suffix of the format, suffix of the compression or "")."""
    suffixes = [s.lower() for s in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), compression


def _open(path: Path) -> IO[bytes]:
    compression = kind_of(path)[1]
    return COMPRESSIONS[compression](path) if compression else open(path, "rb")


def _jsonl(path: Path) -> Iterator[tuple[dict, str]]:
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise DataError(f"{place}: not JSON ({error}); mend or remove the line") from None
            yield _record(value, place), place


def _json(path: Path) -> Iterator[tuple[dict, str]]:
    with _open(path) as file:
        text = file.read().decode("utf-8-sig")
    try:
        value = json.loads(text)
    except ValueError as error:
        if "Extra data" in str(error):  # JSON lines under the name of JSON
            yield from _jsonl(path)
            return
        raise DataError(f"{path}: not JSON ({error})") from None
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if len(lists) != 1 or "messages" in value or "conversations" in value:
            raise DataError(f"{path}: expected a list of rows, found one object with the keys {sorted(value)}")
        value = lists[0]
    for number, record in enumerate(value):
        place = f"{path}[{number}]"
        yield _record(record, place), place


def _csv(path: Path) -> Iterator[tuple[dict, str]]:
    with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter="\t" if kind_of(path)[0] == ".tsv" else ",")
        csv.field_size_limit(1 << 30)
        for record in reader:
            place = f"{path}:{reader.line_num}"
            if None in record or None in record.values():
                raise DataError(f"{place}: the row has not as many fields as the header {reader.fieldnames}")
            yield {str(k): v for k, v in record.items()}, place


def _parquet(path: Path) -> Iterator[tuple[dict, str]]:
    import pyarrow
    import pyarrow.parquet

    with _open(path) as file:
        source = file if not kind_of(path)[1] else pyarrow.BufferReader(file.read())
        number = 0
        for group in pyarrow.parquet.ParquetFile(source).iter_batches():
            for record in group.to_pylist():
                yield record, f"{path}[{number}]"
                number += 1


READERS = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
}  # fmt: skip


def _record(value: object, place: str) -> dict:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object with named fields, found {type(value).__name__}")
    return value


def files_of(source: str) -> list[Path] | None:
    """The files that `source` names, sorted; None when it can only be a hub name."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p)[0] in READERS)
        if not found:
            raise DataError(f"{path}: the folder holds no file of a known kind ({' '.join(READERS)})")
        return found
    if path.is_file():
        if kind_of(path)[0] not in READERS:
            raise DataError(f"{path}: unknown kind of file; known are {' '.join(READERS)}, plain or compressed")
        return [path]
    return None


def missing(source: str) -> str | None:
    """What is wrong with the name of a source, as far as that can be said without opening it."""
    if Path(source).expanduser().exists():
        return None
    looks_local = kind_of(Path(source))[0] in READERS or source.startswith((".", "/", "~")) or source.count("/") != 1
    return f"{source!r} does not exist" if looks_local else None


def read(
    source: str | list[str], subset: str | None = None, split: str = "train", start: int = 0
) -> Iterator[Row]:  # fmt: skip
    """All rows of the sources, in order, or those from number `start` on."""
    number = 0
    for name in [source] if isinstance(source, str) else source:
        files = files_of(name)
        records = _hub(name, subset, split) if files is None else (r for path in files for r in _safely(path))
        for values, place in records:
            if number >= start:
                yield Row(number, values, place)
            number += 1
    if not number:
        raise DataError(f"{source}: no rows")


def _safely(path: Path) -> Iterator[tuple[dict, str]]:
    try:
        yield from READERS[kind_of(path)[0]](path)
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, csv.Error, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _hub(name: str, subset: str | None, split: str) -> Iterator[tuple[dict, str]]:
    if problem := missing(name):
        raise DataError(problem)
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{name!r} is no file here, and reading it from the hub needs `pip install luthier[hub]`"
        ) from None
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises many kinds, all of them about what was asked for
        offline = " (offline mode is on)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise DataError(f"{name!r} is no file here and could not be had from the hub{offline}: {error}") from None
    for number, record in enumerate(rows):
        yield dict(record), f"{name}[{number}]"
