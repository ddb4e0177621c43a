"""The collecting of rows: documents in pieces, each row with its source, and a report on every file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ...data.readers import shown
from ...data.sources import Row
from ...errors import CheckpointError, ConfigError, DataError
from ...files import write_atomically
from ..card import sha256
from ..journal import Journal, refuse_existing
from ..outputs import suffix_of
from ..pieces import Done, Say, Work, journal_of, run
from . import pdf
from .base import Document, File, How, Ready, problem_of
from .finding import Batch, Found, Unit, batches, find
from .kinds import KINDS
from .parting import parted

VERSION = 1  # of what is made of documents: another one makes other rows
MODULES = {"text": "texts", "markdown": "texts", "sharegpt": "rows", "eml": "mail", "mbox": "mail"}  # else the kind
SOURCE = "_source"


def problems(how: How) -> list[str]:
    found = []
    if how.kind is not None and how.kind not in KINDS:
        found.append(f"--kind {how.kind}: known are {', '.join(KINDS)}")
    if how.per not in (None, "page", "whole"):
        found.append(f"--per {how.per}: give page (of PDFs) or whole (of chats)")
    if how.max_chars is not None and how.max_chars < 1:
        found.append(f"--max-chars {how.max_chars}: give a number from 1 up")
    if how.me is not None and not how.me.strip():
        found.append("--me: give the name as the chat has it")
    return found


# ---------------------------------------------------------------------------- a document


def units_of(batch: Batch) -> Iterator[Row]:
    """A row of the engine for each document; what is in it, the work reads."""
    for number, unit in enumerate(batch.units):
        yield Row(number, {}, shown(unit.path))


class Collect(Work):
    """Reads the documents of a batch."""

    def __init__(self, how: How):
        self.how = how
        self.files: list[dict] = []

    def begin(self, piece: Any, folder: Path, number: int) -> None:
        self.units = piece.units

    def row(self, row: Row) -> Iterable[tuple[str, dict]]:
        unit: Unit = self.units[row.number]
        file, rows = File(unit.path, unit.kind, unit.days, unit.about), 0
        hashes: dict[Path, str] = {}
        for values, at, path in _safely(file, self.how):
            try:
                if path not in hashes:
                    hashes[path] = sha256(path)
            except OSError as error:
                file.problems[problem_of(error)] += 1
                break
            rows += 1
            yield "", _sourced(values, {"file": shown(path), "at": at, "sha256": hashes[path]})
        if not rows and not file.problems and not file.left:
            file.left["no text"] += 1
        told = {"left": file.left, "problems": file.problems, "warnings": file.warnings}
        self.files.append({"file": shown(unit.path), "kind": unit.kind, "rows": rows,
                           **{name: dict(counts) for name, counts in told.items() if counts}})  # fmt: skip

    def end(self) -> dict:
        return {"files": self.files}


def _sourced(values: dict, source: dict) -> dict:
    """With where it is from; what a row says of its own source stays inside of that."""
    if SOURCE in values:
        source = {**source, "source": values[SOURCE]}
    return {**{key: value for key, value in values.items() if key != SOURCE}, SOURCE: source}


def _safely(file: File, how: How) -> Iterator[tuple[dict, dict, Path]]:
    """The rows of a document up to where it breaks; whatever a damaged one raises is counted and ends this one only."""
    rows = _rows(file, how)
    while True:
        try:
            made = next(rows, None)
        except Exception as error:
            file.problems[problem_of(error)] += 1
            return
        if made is None:
            return
        yield made


def _rows(file: File, how: How) -> Iterator[tuple[dict, dict, Path]]:
    read = import_module(f".{MODULES.get(file.kind, file.kind)}", __package__).read
    for found in read(file, how):
        if isinstance(found, Ready):
            yield found.values, found.at, found.path or file.path
        else:
            for text, at in texts_of(found, how.max_chars):
                yield {"text": text, **found.more}, at, found.path or file.path


def texts_of(document: Document, most: int | None) -> Iterator[tuple[str, dict]]:
    """The document's text whole, or its parts, each with where it begins: page or line, and character in the whole."""
    whole = "\n\n".join(part.text for part in document.parts)
    if most is None or len(whole) <= most:
        if whole.strip():
            yield whole.strip("\n"), document.parts[0].at
        return
    ends, total = [], 0
    for part in document.parts:
        total += len(part.text) + 2
        ends.append(total)
    which, lines, counted = 0, 0, 0
    for start, text in parted(whole, most):
        while start >= ends[which]:
            which += 1
        at = dict(document.parts[which].at)
        if at.get("line") and "message" not in at:
            lines, counted = lines + whole.count("\n", counted, start), start
            at["line"] += lines
        yield text, {**at, "char": start}


# ---------------------------------------------------------------------------- all of them


class Report(dict):
    """What was collected and what was not, as JSON; `exit_code` is for pipelines."""

    @property
    def exit_code(self) -> int:
        return DataError.exit_code if self["strict"] and (self["refused"] or self["damaged"]) else 0


def report_of(out: Path) -> Path:
    """The report's place: beside the output, so that a folder of rows holds rows only."""
    compression = suffix_of(out)
    if compression is None:
        return out.with_name(f"{out.name}.report.json")
    return out.with_name(f"{Path(out.name.removesuffix(out.suffix) if compression else out.name).stem}.report.json")


def collect(
    names: Sequence[str], out: Path, how: How, *, workers: int | None = None, strict: bool = False,
    say: Say = lambda text: None,
) -> Report:  # fmt: skip
    """Write the rows of all documents under these files and folders; the report, which also stands beside them.

    DataError where nothing could be collected: then the report is all that is written.
    """
    if wrong := problems(how):
        raise ConfigError(wrong)
    report, journal = report_of(out), journal_of(out)
    refuse_existing(journal, [out])
    found = find(names, how.kind, [out, report, journal])
    if not found.units and journal.exists():
        raise CheckpointError(f"{out} was begun with other documents: give another output, or remove it and {journal}")
    if any(unit.kind == "pdf" for unit in found.units):
        pdf.needed()
    say(f"{len(found.units):,} documents found, {len(found.left):,} other files")
    done: list[Done] = []
    if found.units:
        settings = {"collect": VERSION, **asdict(how), "inputs": found.inputs()}
        pieces: Any = [*batches(found.units)]
        done = run(pieces, out, partial(Collect, how), settings=settings, workers=workers, say=say, read=units_of)
    told = Report(_told(found, done, out, report, strict))
    if not told["rows"]:
        _unwritten(out, journal)
    write_atomically(report, json.dumps(told, indent=1, ensure_ascii=True) + "\n")
    if not told["rows"]:
        first = "; ".join(f"{one['file']}: {_first(one)}" for one in told["entries"][:3])
        raise DataError(f"nothing was collected: {first or 'no file'}; all reasons are in {report}")
    return told


def _first(entry: dict) -> str:
    return entry.get("reason") or next(iter({**entry.get("problems", {}), **entry.get("left", {})}), "no text")


def _unwritten(out: Path, journal: Path) -> None:
    """Without rows there is no output."""
    Journal(journal, {}).remove()
    if out.is_dir():
        if not any(out.iterdir()):
            out.rmdir()
    elif out.exists() and not out.stat().st_size:
        out.unlink()


def _told(found: Found, done: Sequence[Done], out: Path, report: Path, strict: bool) -> dict:
    files = [file for one in done for file in one.end["files"]]
    kinds: dict[str, Counter[str]] = {}
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("left", "problems", "warnings")}
    for file in files:
        kinds.setdefault(file["kind"], Counter()).update({"files": 1, "rows": file["rows"]})
        for name, counted in counts.items():
            counted.update(file.get(name, {}))
    refused = [{"file": name, "rows": 0, "reason": reason} for name, reason in found.left]
    told = [file for file in files if len(file) > 3]
    return {
        "rows": sum(file["rows"] for file in files),
        "documents": len(files),
        "collected": sum(file["rows"] > 0 for file in files),
        "damaged": sum("problems" in file for file in files),
        "refused": sum(not reason.startswith(("hidden", "the same as", "about a Slack")) for _, reason in found.left)
        + sum(not file["rows"] and "problems" not in file for file in files),
        "kinds": {name: dict(counted) for name, counted in sorted(kinds.items())},
        "reasons": dict(Counter(reason for _, reason in found.left).most_common()),
        **{name: dict(counted.most_common()) for name, counted in counts.items()},
        "strict": strict,
        "out": shown(out),
        "report": shown(report),
        "entries": [*refused, *told],
    }


