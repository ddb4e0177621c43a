"""Rows that people label: a copy of them beside the output, what was said of each, and the output made from both."""

from __future__ import annotations

import contextlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, ConfigError, DataError
from ...files import flush_folder, write_atomically
from .. import agreement
from ..encoded import line
from ..journal import difference
from ..outputs import Written, assembled, beside, shard_names, suffix_of, writer
from ..pieces import Say, inputs_of, journal_of, pieces_of, rows_of
from .journal import Journal, Said
from .plan import Plan
from .rules import ASIDE, names_in
from .tasks import Label

KEY, ROWS, SAID, STARTS = "key.json", "rows.jsonl", "said.jsonl", "starts.bin"
VERSION = 1
TOLD = 1000  # rows between two words on how far the copying is


class Project:
    """A folder beside the output, in which labelling goes on where it stood.

    Rows are copied once, with where each begins: any row of any kind of file is then read in no time, and a source
    that changes under the annotators changes nothing.
    """

    def __init__(
        self, source: str | list[str], out: Path, plan: Plan, say: Say = lambda text: None, split: str = "train"
    ):
        self.out, self.plan, self.task = out, plan, plan.task
        self.folder = journal_of(out)
        self.suffix = suffix_of(out)
        if self.suffix is None:
            raise ConfigError(f"{out}: labels of people go to one file: .jsonl, .jsonl.gz or .jsonl.zst")
        self.key = _key(source, plan, split)
        self._begin(source, split, say)
        self.starts = array("Q", (self.folder / STARTS).read_bytes())
        self.rows = open(self.folder / ROWS, "rb")
        self.journal = Journal(self.folder / SAID)

    def __enter__(self) -> Project:
        with contextlib.ExitStack() as stack:
            stack.callback(self.rows.close)
            stack.enter_context(self.journal.open())
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.close()

    def __len__(self) -> int:
        return len(self.starts)

    def values(self, number: int) -> dict:
        """A row, by the names of formats."""
        return self._entry(number)["values"]

    def place(self, number: int) -> str:
        return self._entry(number)["place"]

    def _entry(self, number: int) -> dict:
        return json.loads(os.pread(self.rows.fileno(), self._length(number), self.starts[number]))

    def _length(self, number: int) -> int:
        end = self.starts[number + 1] if number + 1 < len(self.starts) else os.fstat(self.rows.fileno()).st_size
        return end - self.starts[number]

    # ------------------------------------------------------------------------ the beginning

    def _begin(self, source: str | list[str], split: str, say: Say) -> None:
        known = _read_key(self.folder)
        if known is None:
            if self.out.exists():
                raise ConfigError(f"{self.out} exists: give another name, or remove it; nothing was written")
            self._copy(source, split, say)
            write_atomically(self.folder / KEY, json.dumps(self.key))
            flush_folder(self.folder)
        elif differs := difference(known, self.key):
            raise CheckpointError(
                f"{self.folder} was begun otherwise: {differs}. Give another output, or remove the folder with all labels "
                "that are in it"
            )

    def _copy(self, source: str | list[str], split: str, say: Say) -> None:
        """All rows that can be labelled; the others are counted, and an error where none is left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        starts, at, number, unfit = array("Q"), 0, 0, Counter()
        first = ""
        aside = self.folder / f".{ROWS}.{os.getpid()}"
        with open(aside, "wb") as file:
            for piece in pieces_of(source, split):
                for row in rows_of(piece):
                    why = f"unreadable: {row.fault}" if row.fault is not None else None
                    values = self.task.values(row.values)
                    why = why or self.task.fault(values)
                    if why is not None:
                        unfit[why] += 1
                        first = first or f"{row.place}: {why}"
                    else:
                        data = line({"row": number, "place": row.place, "values": values})
                        starts.append(at)
                        at += file.write(data)
                    number += 1
                    if number % (100 * TOLD) == 0:
                        say(f"{number:,} rows read")
            file.flush()
            os.fsync(file.fileno())
        if not starts:
            aside.unlink()
            raise DataError(first or f"{source}: no rows")
        if unfit:
            say(f"{sum(unfit.values()):,} of {number:,} rows cannot be labelled, the first: {first}")
        os.replace(aside, self.folder / ROWS)
        write_atomically(self.folder / STARTS, starts.tobytes())

    # ------------------------------------------------------------------------ the output

    def write(self) -> dict:
        """Rows with what annotators agree on, in order, and the others of which something was said aside."""
        said = self.journal.labels()
        side = beside(self.out, ASIDE)
        told: dict[str, Any] = {
            "rows": len(self),
            "labelled": 0,
            "out": str(self.out),
            "labels": Counter(),
            "aside": Counter(),
        }
        with writer(self.folder, 0, ["", ASIDE], self.suffix or "") as write:
            for stream, row in self._rows_out(said, told):
                write(stream, row)
        if not write.rows and not self.out.exists():
            return told | {"out": None, "labels": {}, "aside": {}, "agreement": self.agreement(said)}
        side.unlink(missing_ok=True)
        assembled(self.folder, [Written(0, 0, write.rows)], self.out, self.suffix,
                  shard_names([self.out], self.suffix), {ASIDE: side})  # fmt: skip
        told["labels"], told["aside"] = dict(told["labels"].most_common()), dict(told["aside"])
        return told | ({"aside_rows": str(side)} if ASIDE in write.rows else {}) | {"agreement": self.agreement(said)}

    def _rows_out(self, said: Mapping[str, Mapping[int, Said]], told: dict) -> Iterator[tuple[str, dict]]:
        by_row: dict[int, dict[str, Label]] = {}
        for by in sorted(said):
            for row, one in said[by].items():
                by_row.setdefault(row, {})[by] = one.label
        for number in sorted(by_row):
            entry, labels = self._entry(number), by_row[number]
            values = entry["values"]
            label = self.task.decided(list(labels.values()), values).label
            row = None if label is None else self.task.row(values, label)
            if row is None:
                why = "tie" if label is not None else "disagreed"
                told["aside"][why] += 1
                yield (
                    ASIDE,
                    {"row": entry["row"], "place": entry["place"], "why": why, "labels": labels, "values": values},
                )
                continue
            told["labelled"] += 1
            if self.task.kind != "edit":
                told["labels"].update(names_in(self.task, label))
            yield "", row

    def for_label_studio(self) -> Iterator[dict]:
        """All rows as tasks of Label Studio, with what each annotator said."""
        from .label_studio import told

        said = self.journal.labels()
        for number in range(len(self)):
            labels = {by: rows[number].label for by, rows in sorted(said.items()) if number in rows}
            yield told(self.task, number, self.values(number), labels)

    def agreement(self, said: Mapping[str, Mapping[int, Said]]) -> dict:
        """Between annotators; of spans by words, of several classes by class."""
        votes: dict[str, dict] = {}
        for by, rows in said.items():
            others = {r for name, theirs in said.items() if name != by for r in theirs}
            mine = votes.setdefault(by, {})
            for row in rows:
                if row in others:
                    made = self.task.votes(rows[row].label, self.values(row))
                    mine.update({(row, i): vote for i, vote in enumerate(made)})
        made = agreement.summary(votes)
        made["of"] = "words" if self.task.kind == "spans" else "rows"
        made["annotators"] = {by: len(rows) for by, rows in sorted(said.items())}
        return made


def _key(source: str | list[str], plan: Plan, split: str) -> dict:
    inputs = [inputs_of(piece) for piece in pieces_of(source, split)]
    task = plan.task.model_dump(mode="json", exclude={"instructions"})  # better told, labels still hold
    return json.loads(json.dumps({"version": VERSION, "task": task, "inputs": inputs}))


def _read_key(folder: Path) -> dict | None:
    try:
        return json.loads((folder / KEY).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise CheckpointError(f"{folder / KEY} is damaged; without it nobody can say what the labels are of") from None
