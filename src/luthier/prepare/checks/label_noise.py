"""Rows with a wrong label, by held-out predictions: those likely wrong by a noise model, or by confident learning.

An audit finds them and, in its folder, writes a file with a line for each: what the label is and what it looks like. A
person may take lines out or change them; cleaning then does what the file says, so that doing it twice changes nothing.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from ...data.formats import FORMATS
from ...errors import DataError
from ...labels import WrongLabel, called
from .. import noise_model
from ..bag_of_words import Features, Words
from ..confident import FilterBy, issues, joint
from ..views import View
from .check import Again, Check, Decision, Finding, Gathered, Gatherer

LABELLED = {form.name for form in FORMATS.values() if form.kind == "labelled" and "label" in form.keys}
MISLABELLED, FILE = "mislabelled", "label_noise.jsonl"
SHOWN = 200  # characters of a text that the file shows
MANY = 1000  # classes, of which more are no classes but values
PAIRS = 20  # of classes that are mistaken for one another, told in the summary


class LabelNoise(Check):
    """Predictions are those of a bag-of-words classifier in cross-validation, or yours. Rows have one label each."""

    whats: ClassVar = (MISLABELLED,)

    kind: Literal["label_noise"] = "label_noise"
    action: Literal["drop", "repair", "keep"] = "keep"
    filter_by: Literal["posterior"] | FilterBy = "posterior"
    """Which rows they are: those whose label is wrong with a probability above `threshold` (posterior), or by confident
    learning (arXiv:1911.00068), once it is known how many: those with the largest margin by which another class is
    likelier than their label (prune_by_noise_rate), with the least probability of their label (prune_by_class), `both`,
    those confidently of another class (confident_learning), or all whose likeliest class is another
    (predicted_neq_given)."""
    threshold: float = Field(0.4, gt=0.0, lt=1.0)
    """Of `posterior`: the probability of being wrong above which a row is found; a lower one finds more rows."""
    least: float = Field(0.0, ge=0.0, lt=1.0)
    """The least probability of the suggested label with which a row is found."""
    folds: int = Field(5, ge=2, le=50)
    """Of cross-validation. Rows with the same words, in whatever order, stand in one fold and count together as one; a
    class with fewer different rows than folds is not judged."""
    seed: int = Field(0, ge=0)
    """Of drawing the folds."""
    prune: bool = True
    """Whether a classifier leaves out what looks wrong to others, which learn a part of the same rows only; without, a
    fifth as much is learnt."""
    most: int = Field(20_000, ge=100)
    """Rows that a classifier learns; of more, some are drawn, of each class alike, and all are judged."""
    c: float = Field(20.0, gt=0.0)
    """Inverse strength of the classifier's L2 regularisation, as C of scikit-learn's LogisticRegression."""
    iterations: int = Field(50, ge=1)
    """The most of its optimiser."""
    predictions: str | None = None
    """Your own instead: an .npz file with `probabilities` [rows, classes] and `classes` [classes], where line i is of
    row i of the source; or a column of the rows with the probability of each class by its name. They have to be of
    models that did not learn the row."""
    corrections: str | None = None
    """The file of an audit that says which rows are cleaned, and what their labels become."""

    _corrections: Mapping[tuple[bytes, str], Any] | None = None

    @model_validator(mode="after")
    def _there(self) -> LabelNoise:
        if self.corrections is None and self._is_file() and not Path(str(self.predictions)).expanduser().is_file():
            raise ValueError(f"predictions: there is no file {self.predictions}")
        return self

    def _is_file(self) -> bool:
        return self.predictions is not None and self.predictions.endswith(".npz")

    def wanting(self) -> str | None:
        if self.action == "keep":
            return None
        if self.corrections is None:
            return f"action={self.action} needs corrections: the file {FILE} that an audit with --out writes"
        return None if Path(self.corrections).expanduser().is_file() else f"corrections: no file {self.corrections}"

    def decides(self) -> bool:
        return False  # the file says which rows they are

    def inputs(self) -> list:
        files = [self.corrections] if self.corrections else [self.predictions] if self._is_file() else []
        return [_state(file) for file in files if file is not None]

    def prepared(self, given: Mapping[str, str]) -> Check:
        if self.corrections is None:
            return self
        made = self.model_copy()
        made._corrections = _read(self.corrections, tuple(_state(self.corrections)))
        return made

    def look(self, view: View) -> Sequence[Finding]:
        if self._corrections is None or (label := label_of(view)) is None:
            return ()
        key = text_hash(view), label
        return [Finding(MISLABELLED, _told(label, called(self._corrections[key])))] if key in self._corrections else ()

    def repair(self, view: View, findings: Sequence[Finding]) -> Mapping[str, Any]:
        label = label_of(view)
        assert self._corrections is not None
        assert label is not None
        return {"label": self._corrections[text_hash(view), label]}

    def gatherer(self) -> Gatherer | None:
        if self.corrections is not None:
            return None
        return _Labelled(None if self._is_file() else self.predictions, self.predictions is None)

    def decide(self, gathered: Sequence[Gathered], again: Again) -> Decision:
        rows = np.concatenate([g.arrays["rows"] + g.first for g in gathered])
        names, labels, kinds = _names(gathered)
        summary: dict[str, Any] = {"rows": len(rows), "classes": len(names)}
        if len(names) < 2 or (len(names) > MANY and self.predictions is None):
            return Decision(summary=summary | {"judged": 0})
        judged, probabilities, classes = self._predicted(gathered, rows, names, labels)
        summary["judged"] = int(judged.sum())
        if not judged.any():
            return Decision(summary=summary)
        # Of own predictions, classes that no row is labelled with come after those that are.
        given = labels[judged] if classes is names else np.array([classes.index(n) for n in names])[labels[judged]]
        likeliest = probabilities.argmax(axis=1)
        wrong, estimated, doubt = self._wrong(given, probabilities)
        wrong &= (probabilities[np.arange(len(given)), likeliest] >= self.least) & (likeliest != given)
        summary |= _summary(estimated, classes, given, likeliest, wrong)
        if doubt is not None and wrong.any():
            summary["expected_precision"] = round(float(doubt[wrong].mean()), 4)
        pairs, codes = np.unique(given[wrong] * len(classes) + likeliest[wrong], return_inverse=True)
        details = [(classes[pair // len(classes)], classes[pair % len(classes)]) for pair in pairs.tolist()]
        sure = probabilities[wrong, likeliest[wrong]]
        found = Decision(
            rows[judged][wrong], [(MISLABELLED, _told(*pair) + ": {number:.3f}") for pair in map(_braced, details)],
            codes.astype(np.int64), numbers=sure.astype(float), summary=summary,
        )  # fmt: skip
        lines = self._lines(found, None if doubt is None else doubt[wrong], details, kinds, again)
        return replace(found, files={FILE: lines})

    def _wrong(
        self, given: np.ndarray, probabilities: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:  # fmt: skip
        """(which labels are held to be wrong [J] bool, rows by label and by what they really are [K, K], the
        probability of being wrong [J], None of confident learning)."""
        if self.filter_by != "posterior":
            told = joint(given, probabilities)
            return issues(given, probabilities, told, self.filter_by), told.estimated, None
        doubt, expected = noise_model.wrong(given, probabilities, noise_model.fitted(given, probabilities))
        return doubt > self.threshold, expected, doubt

    def _predicted(
        self, gathered: Sequence[Gathered], rows: np.ndarray, names: list[str], labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """(rows that are judged [N] bool, their probabilities [J, K], names of the K classes)."""
        if self.predictions is None:
            return *self._own(gathered, names, labels), names
        if not self._is_file():
            return _of_column(gathered, names, str(self.predictions))
        probabilities, classes = _of_file(Path(str(self.predictions)).expanduser(), names)
        if len(rows) and rows[-1] >= len(probabilities):
            raise DataError(
                f"checks.label_noise.predictions={self.predictions}: it has {len(probabilities):,} lines, and row "
                f"{rows[-1]:,} of the source is labelled: it needs a line for each row"
            )
        return np.ones(len(rows), bool), probabilities[rows], classes

    def _own(
        self, gathered: Sequence[Gathered], names: list[str], labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """By the classifier. Rows of a class with fewer than folds are learnt as all others, and not judged."""
        from ..held_out import Learning, held_out

        features = [
            Features(
                np.concatenate([[0], np.cumsum(g.arrays["lengths"], dtype=np.int64)]), g.arrays["ids"],
                g.arrays["times"],
            )
            for g in gathered
        ]  # fmt: skip
        _, alike = np.unique(np.concatenate([g.arrays["alike"] for g in gathered]), return_inverse=True)
        different = np.unique(alike * len(names) + labels) % len(names)
        judged = np.bincount(different, minlength=len(names))[labels] >= self.folds
        if not judged.any():
            return judged, np.zeros((0, len(names)))
        how = Learning(self.folds, self.seed, self.c, self.iterations, self.prune, self.most)
        made = held_out(features, labels, alike, len(names), how)
        return judged, made if judged.all() else made[judged]

    def _lines(
        self, found: Decision, doubt: np.ndarray | None, details: Sequence[tuple[str, str]], kinds: Mapping[str, Any],
        again: Again,
    ) -> list[dict]:  # fmt: skip
        wanted = {row: place for place, row in enumerate(found.rows.tolist())}
        made: list[dict] = []
        for number, view in again() if wanted else ():
            if (place := wanted.get(number)) is None:
                continue
            code, _, sure = found.at(place)
            label, other = details[code]
            made.append(
                {"row": number, "text_hash": text_hash(view).hex(), "label": label,
                 "suggested": kinds.get(other, other), "probability": round(sure, 4),
                 **({} if doubt is None else {"wrong": round(float(doubt[place]), 4)}),
                 "text": " | ".join(text.text for text in view.texts)[:SHOWN]}
            )  # fmt: skip
            if len(made) == len(wanted):
                break
        return made

    def proposed(self, summary: Mapping) -> Check:
        return self.model_copy(update={"corrections": summary["files"][FILE]}) if "files" in summary else self


def label_of(view: View) -> str | None:
    """The name of a row's one label; None of a row without."""
    label = view.values.get("label")
    # Messages with a label are told as answers that are liked or not; a name is no such thing.
    if view.format not in LABELLED and not (view.format == "unpaired_messages" and isinstance(label, str)):
        return None
    try:
        return called(label)
    except WrongLabel:
        return None


def text_hash(view: View) -> bytes:
    return blake2b(view.joined().encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _told(label: str, other: str) -> str:
    return f"labelled {label!r}, looks like {other!r}"


def _braced(pair: tuple[str, str]) -> tuple[str, str]:
    """Names as they stand in a format string."""
    return tuple(name.replace("{", "{{").replace("}", "}}") for name in pair)  # type: ignore[return-value]


def _summary(
    estimated: np.ndarray, names: list[str], given: np.ndarray, likeliest: np.ndarray, wrong: np.ndarray
) -> dict:  # fmt: skip
    off = estimated.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:PAIRS]
    pairs = [(int(i // len(names)), int(i % len(names)), round(float(off.flat[i]))) for i in order]
    by_class = np.bincount(given[wrong], minlength=len(names))
    return {
        "agreement": round(float((likeliest == given).mean()), 4),  # of held-out predictions with the labels
        "estimated_noise": round(float(off.sum() / len(given)), 4),
        "found_by_label": {names[i]: int(by_class[i]) for i in np.argsort(-by_class, kind="stable") if by_class[i]},
        "mistaken": [{"label": names[i], "looks_like": names[j], "rows": rows} for i, j, rows in pairs if rows],
    }  # fmt: skip


def _names(gathered: Sequence[Gathered]) -> tuple[list[str], np.ndarray, dict[str, Any]]:
    """(all names of labels in order, the number of each row's label, labels by name as rows write them)."""
    written: dict[str, Any] = {}
    for g in gathered:
        for label in json.loads(g.arrays["names"].tobytes() or b"[]"):
            written.setdefault(called(label), label)
    names = sorted(written)
    places = {name: place for place, name in enumerate(names)}
    parts = []
    for g in gathered:
        own = np.array([places[called(label)] for label in json.loads(g.arrays["names"].tobytes() or b"[]")], np.int64)
        parts.append(own[g.arrays["labels"]] if len(own) else np.zeros(0, np.int64))
    return names, np.concatenate(parts), written


# ---------------------------------------------------------------------------- predictions of others


def _of_column(
    gathered: Sequence[Gathered], names: list[str], column: str
) -> tuple[np.ndarray, np.ndarray, list[str]]:  # fmt: skip
    classes: dict[str, int] = {name: place for place, name in enumerate(names)}
    judged = []
    for told in _told_of(gathered):
        judged.append(told is not None)
        for name in told or ():
            classes.setdefault(name, len(classes))
    made, place = np.zeros((sum(judged), len(classes))), 0
    for told in _told_of(gathered):
        if told is not None:
            made[place, [classes[name] for name in told]] = list(told.values())
            place += 1
    if not len(made):
        raise DataError(f"checks.label_noise.predictions={column!r}: no labelled row has probabilities in this column")
    return np.array(judged, bool), _checked(made, f"the column {column!r}"), list(classes)


def _told_of(gathered: Sequence[Gathered]) -> Iterator[dict[str, float] | None]:
    """Of each row what its column says; None of one that says nothing."""
    for g in gathered:
        for line in g.arrays["predicted"].tobytes().splitlines():
            yield json.loads(line)


def _of_file(path: Path, names: list[str]) -> tuple[np.ndarray, list[str]]:
    key = f"checks.label_noise.predictions={path}"
    try:
        with np.load(path, allow_pickle=False) as file:
            probabilities, classes = np.asarray(file["probabilities"], np.float64), [str(c) for c in file["classes"]]
    except KeyError as error:
        raise DataError(f"{key}: it needs the arrays `probabilities` and `classes`: {error.args[0]}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{key}: it is no .npz file of numbers and names: {error}") from None
    if probabilities.ndim != 2 or probabilities.shape[1] != len(classes):
        raise DataError(
            f"{key}: probabilities have the shape {list(probabilities.shape)}, and there are {len(classes)} classes"
        )
    if lacking := [name for name in names if name not in classes]:
        raise DataError(f"{key}: rows are labelled {', '.join(map(repr, lacking[:5]))}, which `classes` has not")
    return _checked(probabilities, key), classes


def _checked(probabilities: np.ndarray, of: str) -> np.ndarray:
    bad = ~np.isfinite(probabilities).all(axis=1) | (probabilities < 0).any(axis=1)
    bad |= np.abs(probabilities.sum(axis=1) - 1) > 0.01
    if bad.any():
        raise DataError(f"{of}: line {int(bad.argmax()):,} is no distribution: probabilities of classes add up to 1")
    return probabilities


# ---------------------------------------------------------------------------- corrections


def _state(name: str) -> list:
    path = Path(name).expanduser()
    try:
        told = os.stat(path)
    except OSError as error:
        raise DataError(f"checks.label_noise: {name}: {error.strerror}") from None
    return [str(path), told.st_size, told.st_mtime_ns]


@lru_cache(maxsize=4)
def _read(name: str, state: tuple) -> Mapping[tuple[bytes, str], Any]:
    """By the hash of a row's texts and its label: what the label becomes, once and for all.

    Where the same text has two labels and each is to become the other, both stay.
    """
    made: dict[tuple[bytes, str], Any] = {}
    with open(Path(name).expanduser(), encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                told = json.loads(line)
                called(told["suggested"])
                made[bytes.fromhex(told["text_hash"]), called(told["label"])] = told["suggested"]
            except (ValueError, KeyError, TypeError, WrongLabel) as error:
                raise DataError(f"checks.label_noise.corrections={name}:{number}: {error!r}") from None
    return {(text, label): to for (text, label), to in made.items() if (text, called(to)) not in made}


# ---------------------------------------------------------------------------- gathering


class _Labelled(Gatherer):
    """Of labelled rows the label, and what they are classified by."""

    def __init__(self, column: str | None, features: bool):
        self.column, self.words = column, Words() if features else None
        self.rows, self.labels, self.lengths = array("q"), array("i"), array("i")
        self.names: dict[str, tuple[int, Any]] = {}
        self.ids, self.times, self.predicted, self.alike = bytearray(), bytearray(), bytearray(), bytearray()

    def add(self, number: int, view: View) -> None:
        if (name := label_of(view)) is None:
            return
        self.rows.append(number)
        self.labels.append(self.names.setdefault(name, (len(self.names), view.values["label"]))[0])
        if self.words is not None:
            ids, times = self.words.of(words := view.words())
            self.alike += blake2b(b" ".join(sorted(words)), digest_size=8).digest()  # in whatever order and case
            self.lengths.append(len(ids))
            self.ids += ids.tobytes()
            self.times += times.tobytes()
        elif self.column is not None:
            self.predicted += _probabilities(view, self.column) + b"\n"

    def arrays(self) -> dict[str, np.ndarray]:
        made = {
            "rows": np.array(self.rows, np.int64),
            "labels": np.array(self.labels, np.int64),
            "names": _bytes(json.dumps([label for _, label in self.names.values()]).encode()),
        }
        if self.words is not None:
            made["lengths"] = np.array(self.lengths, np.int64)
            made["alike"] = np.frombuffer(bytes(self.alike), np.int64)
            made["ids"] = np.frombuffer(bytes(self.ids), np.int32)
            made["times"] = _bytes(bytes(self.times))
        elif self.column is not None:
            made["predicted"] = _bytes(bytes(self.predicted))
        return made


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _probabilities(view: View, column: str) -> bytes:
    told = view.values.get(column)
    if told is None:
        return b"null"
    if isinstance(told, str):
        try:
            told = json.loads(told)
        except ValueError:
            told = None
    if not isinstance(told, Mapping) or not all(isinstance(p, int | float) for p in told.values()):
        raise DataError(
            f"{view.place}: checks.label_noise.predictions: the column {column!r} has no probabilities by the names of "
            'classes, such as {"good": 0.9, "bad": 0.1}'
        )
    return json.dumps({name: float(p) for name, p in told.items() if p is not None}).encode()
