"""Cleaning: what a recipe says is done, row by row; what goes or changes is kept beside with its reason."""

from __future__ import annotations

import json
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data import formats
from ..data.sources import Row
from ..errors import ConfigError, DataError
from ..files import write_atomically
from .audit import settings_of
from .checks.check import Check, Decision, Finding
from .checks.structure import UNREADABLE, Structure
from .journal import finished, refuse_existing
from .looking import Gathering, Readable, decided, gathered_file, load, save, views
from .outputs import beside
from .pieces import Done, Piece, Say, Work, journal_of, refuse_changed_since, refuse_within, run
from .recipe import Recipe, prepared
from .views import View, put, view

ROUNDS = 8  # of repairs, one of which may let another check find something
REMOVED, CHANGED = "removed", "changed"


class Mending:
    """What becomes of a row by itself: it is repaired until nothing more is found in it, or dropped."""

    def __init__(self, recipe: Recipe, given: Mapping[str, str]):
        self.columns = recipe.columns
        self.checks = [check for check in prepared(list(recipe.checks.values()), given) if _acts(check)]
        self.unreadable = next((c for c in recipe.checks.values() if isinstance(c, Structure)), None)

    def settle(self, row: Row) -> View | None:
        """The row as it is kept, or None."""
        return self.mended(row)[2]

    def seen(self, values: dict, row: Row) -> View:
        return view(formats.renamed(values, self.columns) if self.columns else values, row.number, row.place)

    def mended(self, row: Row) -> tuple[dict | None, list[dict], View | None]:
        """(the values that are kept, None of a row that goes; why it goes or was changed; its view as it is kept)."""
        if row.fault is not None:
            if self.unreadable is None or self.unreadable.action_of(UNREADABLE) != "drop":
                raise DataError(
                    f"{row.place}: {row.fault}; with `structure: {{action: drop}}` in the recipe such rows go"
                )
            return None, [_reason(self.unreadable, Finding(UNREADABLE, row.fault))], None
        values, reasons = row.values, []
        seen = self.seen(values, row)
        for _ in range(ROUNDS):
            changed = False
            for check in self.checks:
                findings = check.look(seen)
                if not findings:
                    continue
                if gone := next((f for f in findings if check.action_of(f.what) == "drop"), None):
                    return None, [*reasons, _reason(check, gone)], None
                if to_repair := [f for f in findings if check.action_of(f.what) == "repair"]:
                    repaired = self._repaired(values, seen, check, to_repair)
                    if repaired is None:
                        return None, [*reasons, _reason(check, to_repair[0], "cannot be repaired in place: ")], None
                    values, changed = repaired, True
                    reasons += [_reason(check, finding) for finding in to_repair]
                    seen = self.seen(values, row)
            if not changed:
                return values, reasons, seen
        return None, [*reasons[-2:], {"check": "", "what": "endless", "detail": "repairs undo one another"}], None

    def _repaired(self, values: dict, seen: View, check: Check, findings: Sequence[Finding]) -> dict | None:
        """The values with other texts; None where nothing changes, or not without damage."""
        made = values
        for index, text in check.repair(seen, findings).items():
            if isinstance(index, str):
                made = {**made, self.columns.get(index, index): text}
                continue
            path = seen.texts[index].path
            if text != seen.texts[index].text:
                try:
                    made = put(made, (self.columns.get(str(path[0]), path[0]), *path[1:]), text)
                except ValueError:
                    return None
        return None if made is values else made


def _acts(check: Check) -> bool:
    return check.action != "keep" or any(action != "keep" for action in check.actions.values())


def _reason(check: Check, finding: Finding, before: str = "") -> dict:
    return {"check": check.kind, "what": finding.what, "detail": before + finding.detail}


class Surveying(Work):
    """The first of two passes: gathers from rows as they will be, for checks that decide over the whole set."""

    def __init__(self, recipe: Recipe, given: Mapping[str, str]):
        self.mending = Mending(recipe, given)
        self.gathering = Gathering([check for check in self.mending.checks if check.decides()], places=False)
        self.readable = Readable(recipe.columns)
        self.touched = array("q")

    def begin(self, piece: Any, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.gathering.begin(piece, folder, number)

    def row(self, row: Row) -> Iterable[tuple[str, dict]]:
        self.readable.fault(row)
        _, reasons, seen = self.mending.mended(row)
        if reasons:
            self.touched.append(row.number)
        if seen is not None:
            self.gathering.add(row, seen)
        return ()

    def end(self) -> dict:
        self.readable.end()
        self.gathering.end()
        save(gathered_file(self.folder, TOUCHED, self.number), {"rows": np.array(self.touched, np.int64)})
        return {}


class Cleaning(Work):
    """Rows that stay, as they are then; rows that go or were changed, as they were, with why."""

    def __init__(self, recipe: Recipe, given: Mapping[str, str], surveyed: Path | None):
        self.mending, self.surveyed = Mending(recipe, given), surveyed
        self.readable = Readable(recipe.columns)
        self.kept = self.changed_rows = 0
        self.removed: Counter[tuple[str, str]] = Counter()
        self.changed: Counter[tuple[str, str]] = Counter()
        self.gone: Gone | None = None
        self.touched: Rising | None = None  # rows that change or go by themselves, where a first pass has told

    def begin(self, piece: Any, folder: Path, number: int) -> None:
        if self.surveyed is not None:
            self.gone = Gone(self.surveyed, number)
            self.touched = Rising(load(gathered_file(self.surveyed, TOUCHED, number))["rows"])

    def row(self, row: Row) -> Iterable[tuple[str, dict]]:
        self.readable.fault(row)
        values: dict | None = row.values
        reasons: list[dict] = []
        if self.touched is None or self.touched.at(row.number) is not None:
            values, reasons, _ = self.mending.mended(row)
        if values is not None and self.gone is not None and (gone := self.gone.reason(row.number)) is not None:
            values, reasons = None, [*reasons, gone]
        if values is None:
            self.removed[reasons[-1]["check"], reasons[-1]["what"]] += 1
            yield REMOVED, {"row": row.number, "place": row.place, **reasons[-1], "values": row.values}
            return
        if reasons:
            self.changed.update({(r["check"], r["what"]) for r in reasons})
            self.changed_rows += 1
            yield CHANGED, {"row": row.number, "place": row.place, "reasons": reasons, "values": row.values}
        self.kept += 1
        yield "", values

    def end(self) -> dict:
        self.readable.end()
        return {"kept": self.kept, "changed_rows": self.changed_rows, "removed": _nested(self.removed),
                "changed": _nested(self.changed)}  # fmt: skip


def _nested(counts: Mapping[tuple[str, str], int]) -> dict:
    made: dict[str, dict[str, int]] = {}
    for (check, what), count in sorted(counts.items()):
        made.setdefault(check, {})[what] = count
    return made


# ---------------------------------------------------------------------------- decisions over the whole set

TOLD = "told.json"
TOUCHED = "touched"


class Rising:
    """Where numbers stand in a rising array; they are asked for in rising order."""

    def __init__(self, rows: np.ndarray):
        self.rows, self.place = rows, 0
        self.due = int(rows[0]) if len(rows) else -1

    def at(self, number: int) -> int | None:
        while -1 < self.due < number:
            self.place += 1
            self.due = int(self.rows[self.place]) if self.place < len(self.rows) else -1
        return self.place if self.due == number else None


class Gone:
    """Rows of a piece that go by what was decided over the whole set; asked in rising order."""

    def __init__(self, folder: Path, number: int):
        self.arrays = load(gathered_file(folder, "gone", number))
        self.told = json.loads((folder / TOLD).read_text())
        self.rows = Rising(self.arrays["rows"])

    def reason(self, number: int) -> dict | None:
        if (at := self.rows.at(number)) is None:
            return None
        kind, told = self.told[int(self.arrays["checks"][at])]
        what, detail = told[int(self.arrays["codes"][at])]
        other = f"{int(self.arrays['others'][at]):,}"
        return {"check": kind, "what": what, "detail": detail.format(other=other, number=self.arrays["numbers"][at])}


def _keep_decisions(
    checks: Sequence[Check], decisions: Mapping[str, Decision], done: Sequence[Done], folder: Path
) -> None:
    """For each piece a file of its rows that go, with the first check that says so."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("rows", "checks", "codes", "others", "numbers")}
    for place, check in enumerate(checks):
        decision = decisions[check.kind]
        count = len(decision.rows)
        codes = np.zeros(count, np.int64) if decision.codes is None else decision.codes.astype(np.int64)
        drops = np.array([check.action_of(what) == "drop" for what, _ in decision.told] or [False])
        goes = drops[codes] if count else np.zeros(0, bool)
        columns["rows"].append(decision.rows[goes])
        columns["checks"].append(np.full(int(goes.sum()), place, np.int64))
        columns["codes"].append(codes[goes])
        columns["others"].append(np.full(count, -1)[goes] if decision.others is None else decision.others[goes])
        columns["numbers"].append(
            np.zeros(count)[goes] if decision.numbers is None else decision.numbers[goes].astype(float)
        )
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    _, first = np.unique(whole["rows"], return_index=True)  # of several checks the one that stands first
    whole = {name: values[first] for name, values in whole.items()}
    for d in done:
        low, high = np.searchsorted(whole["rows"], [d.first, d.first + d.rows])
        part = {name: values[low:high] for name, values in whole.items()}
        save(gathered_file(folder, "gone", d.number), {**part, "rows": part["rows"] - d.first})
    write_atomically(folder / TOLD, json.dumps([[c.kind, list(decisions[c.kind].told)] for c in checks]))


# ---------------------------------------------------------------------------- the whole


class Cleaned(dict):
    """What was done, as JSON; `exit_code` is for pipelines: nothing can be trained on where no row is kept."""

    @property
    def exit_code(self) -> int:
        return 0 if self["kept"] else DataError.exit_code


def clean(
    source: str | Sequence[str], out: Path, recipe: Recipe, *, workers: int | None = None,
    say: Say = lambda text: None, split: str = "train",
) -> Cleaned:  # fmt: skip
    """Do what the recipe says; what was done, as JSON. Cleaning what comes out by the same recipe changes nothing."""
    if problems := [f"checks.{c.kind}: {text}" for c in recipe.checks.values() if (text := c.wanting())]:
        raise ConfigError(problems)
    given = recipe.given()
    settings = settings_of(recipe, given, "clean")
    journal = journal_of(out)
    sides = {REMOVED: beside(out, REMOVED), CHANGED: beside(out, CHANGED)}
    refuse_within(source, [out])
    mending = Mending(recipe, given)
    pieces: str | Sequence[str] | Sequence[Piece] = source
    setwise = [check for check in mending.checks if check.decides()]
    surveyed = journal.with_name(f"{journal.name}.survey") if setwise else None
    if surveyed is not None and not finished(journal):
        say(f"first pass, for {', '.join(check.kind for check in setwise)}")
        refuse_existing(journal, [out, *sides.values()])
        seen = run(source, None, partial(Surveying, recipe, given), settings=settings, workers=workers, say=say,
                   journal=surveyed, split=split)  # fmt: skip
        decisions = decided(setwise, seen, surveyed, partial(views, seen, mending.settle))
        _keep_decisions(setwise, decisions, seen, surveyed)
        refuse_changed_since(seen, surveyed)
        pieces = [d.piece for d in seen]
        say("second pass")
    done = run(pieces, out, partial(Cleaning, recipe, given, surveyed), settings=settings, workers=workers, say=say,
               sides=sides, journal=journal, split=split)  # fmt: skip
    if surveyed is not None:
        shutil.rmtree(surveyed, ignore_errors=True)
    rows = sum(d.rows for d in done)
    told: dict[str, Any] = {"rows": rows, "kept": sum(d.end["kept"] for d in done)}
    told |= {"removed": rows - told["kept"], "changed": sum(d.end["changed_rows"] for d in done), "out": str(out)}
    told |= {"why_removed": _summed(done, "removed"), "why_changed": _summed(done, "changed")}
    return Cleaned(told | {f"{name}_rows": str(path) for name, path in sides.items() if path.exists()})


def _summed(done: Sequence[Done], key: str) -> dict:
    counts: Counter[tuple[str, str]] = Counter()
    for d in done:
        counts.update({(check, what): n for check, whats in d.end[key].items() for what, n in whats.items()})
    return _nested(counts)
