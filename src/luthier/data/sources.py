"""Rows from files, folders of them, patterns and hub data sets, numbered over all of them, from any row on."""

from __future__ import annotations

import glob
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError
from .readers import READERS, ROWS, Item, Record, jsonl_range, kind_of, shown, without_nulls

ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # what `datasets` adds
SPLITS = {"train": "train", "training": "train", "test": "test", "validation": "validation", "valid": "validation",
          "val": "validation", "dev": "validation"}  # fmt: skip


class Row(NamedTuple):
    """A row as it stands in its file; numbers count from 0 over all files. A row with a `fault` has no values."""

    number: int
    values: dict
    place: str  # file and line or row, for messages
    fault: str | None = None


# ---------------------------------------------------------------------------- names


def files_of(source: str, split: str = "train") -> list[Path] | None:
    """The files that `source` names, sorted; None when it can only be a hub name."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path, split)
    if not path.exists():
        if not _is_pattern(source):
            return None
        found = _matches(source)
        if not found:
            raise DataError(f"{source!r} matches no file")
    elif not path.is_file():
        raise DataError(f"{shown(path)}: a pipe or device and no file; rows are read twice: write them to a file")
    else:
        found = [path]
    for file in found:
        if kind_of(file)[0] not in READERS:
            raise DataError(f"{shown(file)}: unknown kind of file; known are {' '.join(READERS)}, plain or compressed")
    return found


def _is_pattern(source: str) -> bool:
    return any(c in source for c in "*?[")


def _matches(pattern: str) -> list[Path]:
    return sorted(p for p in map(Path, glob.glob(str(Path(pattern).expanduser()), recursive=True)) if p.is_file())


def _in_folder(folder: Path, split: str) -> list[Path]:
    """Rows where there are any, texts where there are none (a data set's README is no row); nothing hidden."""
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split).is_dir():
            there = sorted(p.name for p in folder.iterdir() if p.is_dir())
            raise DataError(f"{shown(folder)}: data.split={split!r} is not there; the splits are {', '.join(there)}")
        folder = folder / split
    if (folder / "state.json").is_file() and (saved := _saved(folder)):
        return saved
    found = sorted(
        p for p in folder.rglob("*")
        if kind_of(p)[0] in READERS and p.name not in ABOUT and p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )  # fmt: skip
    found = [p for p in found if kind_of(p)[0] in ROWS] or found
    if not found:
        raise DataError(f"{shown(folder)}: the folder holds no file of a known kind ({' '.join(READERS)})")
    return _of_split(folder, found, split)


def _saved(folder: Path) -> list[Path]:
    """The files of what `datasets.save_to_disk` wrote, in its order."""
    try:
        names = [entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
        files = [folder / name for name in names]
    except (ValueError, KeyError, TypeError):
        return []
    for file in files:
        if not file.is_file():
            raise DataError(f"{shown(folder)}: {file.name}, which state.json names, is not there; copy it whole")
    return files


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """Where names such as train-00000.parquet and test.jsonl tell several splits apart, the files of one."""
    splits = [SPLITS.get(re.split(r"[-_.0-9]", p.name.lower())[0]) for p in files]
    known = {s for s in splits if s}
    if len(known) < 2:
        return files
    if None in splits:
        other = files[splits.index(None)].name
        raise DataError(
            f"{shown(folder)}: files of several splits ({', '.join(sorted(known))}) and others ({other}): name the "
            "files that are meant"
        )
    wanted = SPLITS.get(split, split)
    if wanted not in known:
        raise DataError(f"{shown(folder)}: data.split={split!r} is not there; it has {', '.join(sorted(known))}")
    return [p for p, s in zip(files, splits) if s == wanted]


def missing(source: str) -> str | None:
    """What is wrong with the name of a source, as far as that can be said without opening it."""
    if Path(source).expanduser().exists():
        return None
    if _is_pattern(source):
        return None if _matches(source) else f"{source!r} matches no file"
    looks_local = kind_of(Path(source))[0] in READERS or source.startswith((".", "/", "~")) or source.count("/") != 1
    return f"{source!r} does not exist" if looks_local else None


# ---------------------------------------------------------------------------- rows


def read(
    source: str | list[str], subset: str | None = None, split: str = "train", start: int = 0,
    sample_by: str = "document",
) -> Iterator[Row]:  # fmt: skip
    """The rows of the sources, in order, from row number `start` on; those before are passed over unparsed."""
    number = 0
    for opened in _opened(source, subset, split, sample_by):
        for item in opened(max(0, start - number)):
            if isinstance(item, int):
                number += item
            else:
                yield Row(number, *item)
                number += 1
    if not number:
        raise DataError(f"{source}: no rows")


def _opened(source: str | list[str], subset: str | None, split: str, sample_by: str) -> Iterator[Callable]:
    """For each file or data set, what gives its rows once it is told how many to pass over."""
    for name in [source] if isinstance(source, str) else source:
        files = files_of(name, split)
        if files is None:
            yield partial(_hub, name, subset, split)
        else:
            yield from (partial(_safely, path, sample_by) for path in files)


def records(path: Path, start: int = 0, stop: int | None = None, line: int = 1) -> Iterator[Item]:
    """The records of one file; of JSONL perhaps those between two bytes at borders of lines, the first being `line`."""
    if stop is None:
        return _safely(path, "document", 0)
    return _guarded(path, jsonl_range(path, 0, start, stop, line))


def _safely(path: Path, sample_by: str, skip: int) -> Iterator[Item]:
    return _guarded(path, READERS[kind_of(path)[0]](path, skip, sample_by))


def _guarded(path: Path, items: Iterator[Item]) -> Iterator[Item]:
    """What reading a broken file raises, as one kind of error."""
    try:
        yield from items
    except Exception as error:
        broken = isinstance(error, OSError | EOFError | lzma.LZMAError | zlib.error | ValueError)
        if not broken and type(error).__module__ != "pyarrow.lib":
            raise
        raise DataError(f"{shown(path)}: cannot be read: {error}; copy or write the file again") from None


def _hub(name: str, subset: str | None, split: str, skip: int) -> Iterator[Item]:
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
    yield min(skip, len(rows))
    for number in range(skip, len(rows)):
        yield Record(without_nulls(dict(rows[number])), f"{name}[{number}]")
