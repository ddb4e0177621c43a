"""Augmentation in two passes: given rows and new ones, none twice, none held out, each with its parent."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ...data import formats
from ...data.holdout import PARENT
from ...data.sources import Row
from ...errors import CheckpointError, ConfigError, DataError
from ..checks.exact_duplicates import repeated
from ..encoded import line
from ..journal import difference, finished, refuse_existing
from ..looking import gathered_file, load, save
from ..outputs import beside
from ..pieces import Done, Piece, Say, Work, inputs_of, journal_of, pieces_of, rows_of, run
from ..views import View, view
from . import held_out
from .answering import Own, Server
from .making import Making, New
from .recipe import Augmentation
from .self_instruct import SelfInstruct
from .way import Given

REFUSED = "refused"
REASONS = ("", "the same input as a given row", "the same as another new row", "its input is in the validation set")
HELD_OUT = "its input is in the validation set: it is neither copied nor augmented"


class Places:
    """Where things lie beside the output."""

    def __init__(self, out: Path, recipe: Augmentation):
        self.journal = journal_of(out)
        self.survey = self._beside("survey")
        self.answers = Path(recipe.cache).expanduser() if recipe.cache else self._beside("answers")
        self.written = self._beside("answers") / "rows"  # of ways that make rows of all rows together

    def _beside(self, name: str) -> Path:
        return self.journal.with_name(f"{self.journal.name}.{name}")


class Rows(Work):
    """What both passes see: rows, those that are held out, those that are new already."""

    def __init__(self, recipe: Augmentation, places: Places):
        self.recipe, self.places = recipe, places
        self.making = Making(recipe, places.answers)
        self.held = None
        if recipe.validation:
            known = json.dumps(held_out.state(recipe.validation))
            columns = tuple(recipe.columns.items())
            self.held = held_out.held_out(tuple(recipe.validation), columns, recipe.overlap, known)
        self.whole = {way.kind for way in self.making.ways if way.whole}

    def begin(self, piece: Any, folder: Path, number: int) -> None:
        self.folder, self.number, self.piece = folder, number, piece
        self.made_before = piece.path.parent == self.places.written

    def seen(self, row: Row) -> View:
        if row.fault is not None:
            raise DataError(f"{row.place}: {row.fault}; `luthier data clean` takes such rows out")
        return self.view(row.values, row)

    def view(self, values: dict, row: Row) -> View:
        columns = self.recipe.columns
        return view(formats.renamed(values, columns) if columns else values, row.number, row.place)

    def given(self, row: Row, seen: View) -> Given:
        return Given(row.values, seen, self.recipe.columns)

    def is_held(self, seen: View) -> bool:
        return self.held is not None and self.held.has(seen)

    def is_held_input(self, text: str) -> bool:
        return self.held is not None and self.held.has_input([text])


class Surveying(Rows):
    """The first pass: has models answer, many rows at a time, and keeps a hash of every input."""

    def __init__(self, recipe: Augmentation, places: Places):
        super().__init__(recipe, places)
        self.given_hashes, self.new_hashes, self.leaks = bytearray(), bytearray(), bytearray()
        self.waiting: list[tuple[Row, Given]] = []
        self.most = together(recipe)

    def row(self, row: Row) -> Iterable[tuple[str, dict]]:
        seen = self.seen(row)
        if self.made_before:
            self._new(seen, "")
        elif not self.is_held(seen):
            self.given_hashes += held_out.exact(joined(seen))
            if PARENT not in row.values:
                self.waiting.append((row, self.given(row, seen)))
                if len(self.waiting) == self.most:
                    self._made()
        return ()

    def _made(self) -> None:
        made = self.making.new([given for _, given in self.waiting])
        for (row, _), news in zip(self.waiting, made):
            for new in news:
                if new.values is not None:
                    self._new(self.view(new.values, row), new.way)
        self.waiting = []

    def _new(self, seen: View, way: str) -> None:
        whole = way in self.whole
        self.new_hashes += held_out.exact("whole\x1d" + seen.joined() if whole else joined(seen))
        self.leaks.append(not whole and self.is_held(seen))

    def end(self) -> dict:
        self._made()
        arrays = {
            "given": np.frombuffer(self.given_hashes, np.uint64).reshape(-1, 2),
            "new": np.frombuffer(self.new_hashes, np.uint64).reshape(-1, 2),
            "leaks": np.frombuffer(self.leaks, np.uint8),
        }  # fmt: skip
        save(gathered_file(self.folder, "inputs", self.number), arrays)
        return {"given": len(self.given_hashes) // held_out.BYTES}


class Augmenting(Rows):
    """The second pass: the same new rows again, those of them that may stay, each behind its parent."""

    def __init__(self, recipe: Augmentation, places: Places, offsets: Sequence[int]):
        super().__init__(recipe, places)
        self.offsets = offsets  # by piece: the number of its first row in its file
        self.at = 0
        self.counts: Counter[str] = Counter()
        self.new: Counter[str] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()

    def begin(self, piece: Any, folder: Path, number: int) -> None:
        super().begin(piece, folder, number)
        self.codes = load(gathered_file(self.places.survey, "codes", number))["codes"]

    def row(self, row: Row) -> Iterator[tuple[str, dict]]:
        seen = self.seen(row)
        if self.made_before:
            yield from self._new(row, New(SelfInstruct.model_fields["kind"].default, 0, row.values))
            return
        if self.is_held(seen):
            self.counts["held_out"] += 1
            yield REFUSED, {"row": row.number, "place": row.place, "way": "", "reason": HELD_OUT, "values": row.values}
            return
        self.counts["given"] += 1
        if self.recipe.writes_given:
            yield "", row.values
        if PARENT in row.values:
            self.counts["new_before"] += 1
            return
        given = self.given(row, seen)
        for new in self.making.new([given])[0]:
            if new.values is None:
                yield self._refusal(row, new, new.reason, None)
            else:
                parent = {
                    "file": str(self.piece.hub or self.piece.path), "row": self.offsets[self.number] + row.number,
                    "sha256": given.sha256, "way": new.way, "seed": self.recipe.seed, "copy": new.copy,
                }  # fmt: skip
                yield from self._new(row, new._replace(values=new.values | {PARENT: parent}))

    def _new(self, row: Row, new: New) -> Iterator[tuple[str, dict]]:
        code = int(self.codes[self.at])
        self.at += 1
        if code:
            yield self._refusal(row, new, REASONS[code], new.values)
        else:
            self.new[new.way] += 1
            assert new.values is not None
            yield "", new.values

    def _refusal(self, row: Row, new: New, reason: str, values: dict | None) -> tuple[str, dict]:
        self.refused[new.way, reason] += 1
        told = {"row": row.number, "place": row.place, "way": new.way, "copy": new.copy, "reason": reason}
        return REFUSED, told | ({} if values is None else {"values": values})

    def end(self) -> dict:
        assert self.at == len(self.codes), "both passes make the same rows"
        refused = [[*key, count] for key, count in self.refused.items()]
        return {"counts": dict(self.counts), "new": dict(self.new), "refused": refused}


def joined(seen: View) -> str:
    """A row's input as one text."""
    return "\x1e".join(held_out.inputs(seen))


def together(recipe: Augmentation) -> int:
    """Rows whose questions are asked together."""
    if recipe.model is None:
        return 64
    return 16 * recipe.model.parallel if isinstance(recipe.model, Server) else 4 * recipe.model.batch_size


# ---------------------------------------------------------------------------- what is decided over the whole set


def _decide(done: Sequence[Done], folder: Path) -> None:
    """For each piece the codes of its new rows: 0 of one that stays, else why it does not."""
    gathered = [load(gathered_file(folder, "inputs", d.number)) for d in done]
    given = np.concatenate([arrays["given"] for arrays in gathered])
    hashes = np.concatenate([given, *(arrays["new"] for arrays in gathered)])
    found, first = repeated(hashes, np.arange(len(hashes)))
    codes = np.zeros(len(hashes), np.uint8)
    codes[found] = np.where(first < len(given), 1, 2)
    at = len(given)
    for d, arrays in zip(done, gathered):
        own = codes[at : at + len(arrays["new"])].copy()
        own[arrays["leaks"] != 0] = 3
        save(gathered_file(folder, "codes", d.number), {"codes": own})
        at += len(own)


def _offsets(done: Sequence[Done]) -> list[int]:
    """Of each piece, the number of its first row in its file."""
    made: list[int] = []
    for before, d in zip([None, *done], done):
        goes_on = before is not None and before.piece.path == d.piece.path
        made.append(made[-1] + before.rows if goes_on else 0)  # type: ignore[union-attr]
    return made


# ---------------------------------------------------------------------------- the whole


class Augmented(dict):
    """What was done, as JSON; `exit_code` is for pipelines: new rows were asked for, and there are none."""

    @property
    def exit_code(self) -> int:
        return 0 if self["new"] or self["new_before"] else DataError.exit_code


def augment(
    source: str | Sequence[str], out: Path, recipe: Augmentation, *, workers: int | None = None,
    say: Say = lambda text: None, split: str = "train",
) -> Augmented:  # fmt: skip
    """Write the given rows with new ones behind them; what was done, as JSON."""
    if problems := recipe.problems():
        raise ConfigError(problems)
    places = Places(out, recipe)
    sides = {REFUSED: beside(out, REFUSED)}
    refuse_existing(places.journal, [out, *sides.values()])
    models = {name: one.identity() for name, one in recipe.models().items()}
    settings = {"verb": "augment", **recipe.told(), "held_out": held_out.state(recipe.validation), "models": models}
    _refuse_other(places.journal, settings)
    workers = _workers(recipe, workers)
    pieces = [*pieces_of(source, split)]
    if (way := recipe.ways.get("self_instruct")) is not None:
        pieces.append(Piece(_instructed(way, pieces, recipe, places, settings, say)))
    offsets: list[int] = []
    if not finished(places.journal):
        say("first pass: what would be made")
        done = run(pieces, None, partial(Surveying, recipe, places), settings=settings, workers=workers, say=say,
                   journal=places.survey)  # fmt: skip
        if not sum(d.rows for d in done):
            raise DataError(f"{source}: no rows")
        if not sum(d.end["given"] for d in done):
            raise DataError(f"{source}: the input of every row is in --validation, so there is nothing to augment")
        _decide(done, places.survey)
        offsets = _offsets(done)
        say("second pass: writing")
    done = run(pieces, out, partial(Augmenting, recipe, places, offsets), settings=settings, workers=workers, say=say,
               sides=sides, journal=places.journal)  # fmt: skip
    shutil.rmtree(places.survey, ignore_errors=True)
    return _told(done, out, sides[REFUSED])


def _told(done: Sequence[Done], out: Path, refused: Path) -> Augmented:
    counts, new = Counter(), Counter()
    reasons: dict[str, Counter[str]] = {}
    for d in done:
        counts.update(d.end["counts"])
        new.update(d.end["new"])
        for way, reason, count in d.end["refused"]:
            reasons.setdefault(way, Counter())[reason] += count
    told: dict[str, Any] = {
        "given": counts["given"] + counts["held_out"], "held_out": counts["held_out"],
        "new_before": counts["new_before"], "new": sum(new.values()), "ways": dict(new),
        "refused": {way: dict(why) for way, why in reasons.items()}, "out": str(out),
    }  # fmt: skip
    return Augmented(told | ({"refused_rows": str(refused)} if refused.exists() else {}))


def _workers(recipe: Augmentation, workers: int | None) -> int | None:
    """A model that answers here is in one process; a server is asked by one, several times at once, unless told."""
    own = any(isinstance(one, Own) for one in recipe.models().values())
    if own and workers is not None and workers > 1:
        raise ConfigError(f"--workers {workers}: a model of kind luthier answers in one process: leave it out")
    asks = any(way.asks for way in recipe.ways.values())
    return 1 if own or (asks and workers is None) else workers


def _refuse_other(journal: Path, settings: Mapping) -> None:
    """Before a model is asked anything: an output that was begun with other settings."""
    try:
        before = json.loads((journal / "key.json").read_text())["settings"]
    except (OSError, ValueError, KeyError):
        return
    if differs := difference(before, json.loads(json.dumps(settings)), "settings"):
        raise CheckpointError(f"the output was begun otherwise: {differs}. Give another, or remove it with {journal}")


def _instructed(
    way: SelfInstruct, pieces: Sequence[Piece], recipe: Augmentation, places: Places, settings: Mapping, say: Say
) -> Path:  # fmt: skip
    """A file of the rows that self-instruct makes; written whole, once."""
    told = json.dumps([settings, [inputs_of(piece) for piece in pieces]], sort_keys=True)
    path = places.written / f"{way.kind}-{sha256(told.encode()).hexdigest()[:16]}.jsonl"
    if path.exists():
        return path
    rows = Rows(recipe, places)
    found: list[tuple[Given, dict]] = []
    for piece, number, row in islice(_counted(pieces), way.seeds):
        seen = rows.seen(row)
        if PARENT not in row.values and not rows.is_held(seen):
            given = rows.given(row, seen)
            told = {"file": str(piece.hub or piece.path), "row": number, "sha256": given.sha256}
            found.append((given, told))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "wb") as file:
        for values in way.rows(found, recipe.seed, rows.making.ask, rows.making.tools, say, rows.is_held_input):
            file.write(line(values))
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    return path


def _counted(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, int, Row]]:
    """All rows with their numbers in their files."""
    number, path = 0, None
    for piece in pieces:
        number = number if piece.path == path else 0
        path = piece.path
        for row in rows_of(piece):
            yield piece, number, row
            number += 1
