"""An audit: what is wrong with a set of rows, changing nothing; a verdict, a page, and the recipe that mends it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..data import formats
from ..data.sources import Row
from ..files import write_atomically
from .checks.check import Check, Decision
from .encoded import line
from .looking import EXAMPLES, Found, Looking, Places, decided, findings_of, views
from .pieces import Done, Say, refuse_changed_since, refuse_within, run
from .recipe import Recipe, prepared
from .views import view

FINDINGS, VERDICT, PAGE, RECIPE = "findings.jsonl", "verdict.json", "audit.html", "recipe.yaml"
AUDITED = "audited"  # in the journal, once all of these are there
FAULTY = 8  # the exit code of an audit that finds more than its recipe allows


class Verdict(dict):
    """What an audit says, as JSON; `exit_code` is for pipelines."""

    @property
    def exit_code(self) -> int:
        return 0 if self["verdict"] == "sound" else FAULTY


def settings_of(recipe: Recipe, given: Mapping[str, str], what: str) -> dict:
    tokenizer = sha256(given["tokenizer"].encode()).hexdigest() if "tokenizer" in given else None
    return {"what": what, "recipe": recipe.told(), "tokenizer": tokenizer}


def audit(
    source: str | Sequence[str], folder: Path, recipe: Recipe, *, workers: int | None = None,
    say: Say = lambda text: None, split: str = "train",
) -> Verdict:  # fmt: skip
    """Look at all rows; `folder` gets the verdict, its page, every finding, and a recipe for `luthier data clean`."""
    refuse_within(source, [folder])
    given = recipe.given()
    checks: list[Check] = prepared(list(recipe.checks.values()), given)
    journal = folder / ".luthier"
    found = journal / "by-row.jsonl"
    done = run(
        source, None, partial(Looking, recipe, given), settings=settings_of(recipe, given, "audit"), workers=workers,
        say=say, sides={"findings": found}, journal=journal, split=split,
    )  # fmt: skip
    rows = sum(d.rows for d in done)
    if (journal / AUDITED).exists():
        return Verdict(json.loads((folder / VERDICT).read_text()))
    setwise = [check for check in checks if check.gatherer() is not None]
    again = partial(views, done, lambda row: _seen(row, recipe.columns))
    decisions = decided(setwise, done, journal, again)
    refuse_changed_since(done, journal)
    for decision in decisions.values():
        for name, lines in decision.files.items():
            write_atomically(folder / name, b"".join(map(line, lines)).decode())
    whole = _written(folder / FINDINGS, found, setwise, decisions, Places(done, journal))
    verdict = _verdict(source, rows, checks, done, decisions, whole, folder)
    write_atomically(folder / RECIPE, mending(recipe, verdict).dump())
    write_atomically(folder / VERDICT, json.dumps(verdict, indent=1, ensure_ascii=False) + "\n")
    from .page import page

    write_atomically(folder / PAGE, page(verdict))
    write_atomically(journal / AUDITED, "")
    for path in journal.glob("*.safetensors"):
        path.unlink()
    if found.exists():  # an output of the run, which has to be there; all of it stands in the findings
        write_atomically(found, "")
    return verdict


def _seen(row: Row, columns: Mapping[str, str]) -> Any:
    return view(formats.renamed(row.values, columns), row.number, row.place)


def _written(
    path: Path, by_row: Path, checks: Sequence[Check], decisions: Mapping[str, Decision], places: Places
) -> Found:  # fmt: skip
    """The file of all findings: those of single rows, then those of the whole set; and what the latter come to."""
    found = Found(checks)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "wb", buffering=1 << 20) as to:
        if by_row.exists():
            with open(by_row, "rb") as file:
                while block := file.read(1 << 20):
                    to.write(block)
        for check in checks:
            for number, finding, place in findings_of(check, decisions[check.kind], places):
                to.write(line(found.add(Row(number, {}, place), check, finding, None)))
        to.flush()
        os.fsync(to.fileno())
    os.replace(aside, path)
    return found


def _verdict(
    source: Any, rows: int, checks: Sequence[Check], done: Sequence[Done], decisions: Mapping[str, Decision],
    whole: Found, folder: Path,
) -> Verdict:  # fmt: skip
    ends = [_with_first(d) for d in done] + [whole.told()]
    told: dict[str, dict] = {}
    for check in checks:
        kind = check.kind
        counts: Counter[str] = Counter()
        for end in ends:
            counts.update(end["counts"].get(kind, {}))
        found, acting = (sum(end[key].get(kind, 0) for end in ends) for key in ("rows", "acting"))
        judged = found if check.action == "keep" else acting
        told[kind] = {
            "action": check.action, "rows": found, "share": found / rows, "acting": acting, "allowed": check.limit(),
            "sound": judged <= check.limit() * rows, "what": dict(counts.most_common()),
            "examples": [e for end in ends for e in end["examples"].get(kind, [])][:EXAMPLES],
        }  # fmt: skip
        if kind in decisions and decisions[kind].summary:
            told[kind]["summary"] = dict(decisions[kind].summary)
            if files := decisions[kind].files:
                told[kind]["summary"]["files"] = {name: str(folder / name) for name in files}
    kinds: Counter[str] = Counter()
    for d in done:
        kinds.update(d.end["formats"])
    faults = [kind for kind, one in told.items() if not one["sound"]]
    made = {
        "verdict": "faulty" if faults else "sound", "faults": faults,
        "source": source if isinstance(source, str) else list(source), "rows": rows,
        "unreadable": sum(d.end["unreadable"] for d in done), "files": len({str(d.piece.path) for d in done}),
        "formats": dict(kinds.most_common()), "checks": told, "findings": str(folder / FINDINGS),
        "page": str(folder / PAGE), "recipe": str(folder / RECIPE),
    }  # fmt: skip
    return Verdict(json.loads(json.dumps(made)))  # as it is read again


def _with_first(d: Done) -> dict:
    """What a piece found, with row numbers of the whole."""
    examples = {
        kind: [{**one, "row": one["row"] + d.first} for one in found] for kind, found in d.end["examples"].items()
    }
    return {**d.end, "examples": examples}


def mending(recipe: Recipe, verdict: Mapping) -> Recipe:
    """The recipe that would mend what was found: the same checks, with thresholds of the data as numbers."""
    checks = {kind: check.proposed(verdict["checks"][kind].get("summary", {})) for kind, check in recipe.checks.items()}
    return recipe.model_copy(update={"checks": checks})
