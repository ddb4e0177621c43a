"""A split: rows to sides such as train, validation and test; equal rows and groups stay together, classes keep shares.

Rows that `luthier data augment` made go with their parents.

A row's place is a hash of what it says, so other rows that come or go hardly move it. All sides appear whole at once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.holdout import PARENT
from ..data.sources import Row
from ..errors import ConfigError, DataError
from .encoded import dumps, line
from .journal import refuse_existing
from .looking import gathered_file, load, save
from .pieces import Done, Say, Work, refuse_changed_since, refuse_within, run

CLASSES = 1000  # a key with more values than that is none to stratify by
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Split:
    """How rows are parted; `sizes` are shares (below 1), numbers of rows, or None for the rest, `cuts` first times."""

    sizes: Mapping[str, float | int | None]
    stratify: str | None = None
    group: str | None = None
    time: str | None = None
    cuts: Mapping[str, float] | None = None
    seed: int = 0

    def problems(self) -> list[str]:
        found = [f"{name!r} is no name of a side: use letters, digits, - and _" for name in self.sizes
                 if not NAME.fullmatch(name)]  # fmt: skip
        if len(self.sizes) < 2:
            found.append("a split has two sides or more, such as --sizes train=0.9,validation=0.1")
        if self.time and (self.group or self.stratify):
            found.append("--time parts rows by when they are, and --group or --stratify by what they are: use one")
        if self.cuts and not self.time:
            found.append("--cuts names times: say with --time KEY where a row has its own")
        if self.cuts is not None:
            return found + _wrong_cuts(self.sizes, self.cuts)
        return found + _wrong_sizes(self.sizes)


def _wrong_sizes(sizes: Mapping[str, float | int | None]) -> list[str]:
    rest = [name for name, size in sizes.items() if size is None]
    shares = sum(size for size in sizes.values() if isinstance(size, float))
    found = [f"{name}={size}: give a share above 0, a number of rows, or nothing for the rest"
             for name, size in sizes.items() if size is not None and not size > 0]  # fmt: skip
    if len(rest) > 1:
        found.append(f"only one side can have the rest, not {' and '.join(rest)}")
    if shares > 1 + 1e-9:
        found.append(f"the shares add up to {shares:g}, more than all rows")
    whole = all(isinstance(size, float) for size in sizes.values()) and abs(shares - 1) < 1e-9
    if not rest and not whole and not found:
        found.append(f"the shares add up to {shares:g}: rows are left; name a side without a size for the rest")
    return found


def _wrong_cuts(sizes: Mapping[str, Any], cuts: Mapping[str, float]) -> list[str]:
    names = list(sizes)
    if list(cuts) != names[1:]:
        return [f"--cuts needs the first time of each side but the first: {', '.join(names[1:])}, in this order"]
    times = list(cuts.values())
    return [] if times == sorted(times) else ["--cuts are not in order: a side ends where the next begins"]


# ---------------------------------------------------------------------------- texts to settings


def sizes_of(text: str) -> dict[str, float | int | None]:
    """`train=0.9,validation=500,test` as sizes."""
    made: dict[str, float | int | None] = {}
    for part in text.split(","):
        name, sign, size = (word.strip() for word in part.partition("="))
        if name in made:
            raise ConfigError(f"--sizes names {name!r} twice")
        try:
            made[name] = None if not sign else float(size) if not size.isdigit() else int(size)
        except ValueError:
            raise ConfigError(f"--sizes {part!r}: write NAME=0.1, NAME=500, or NAME for the rest") from None
        if isinstance(made[name], float) and not 0 < made[name] < 1:  # type: ignore[operator]
            raise ConfigError(f"--sizes {part!r}: a share lies between 0 and 1; whole numbers are numbers of rows")
    return made


def cuts_of(text: str) -> dict[str, float]:
    """`validation=2026-01-01,test=2026-03-01` as seconds since 1970."""
    made = {}
    for part in text.split(","):
        name, _, when = (word.strip() for word in part.partition("="))
        try:
            made[name] = seconds(when)
        except ValueError:
            raise ConfigError(f"--cuts {part!r}: write NAME=2026-03-01, or a time as rows have it") from None
    return made


def seconds(value: object) -> float:
    """A time as seconds since 1970: a number (of milliseconds from 1e11 on) or ISO 8601; ValueError of others."""
    if isinstance(value, bool) or value is None:
        raise ValueError(value)
    if isinstance(value, datetime):
        made = value
    else:
        text = str(value).strip()
        if re.fullmatch(r"-?\d+(\.\d+)?([eE]\d+)?", text) and not re.fullmatch(r"\d{4}|\d{8}", text):
            number = float(text)
            return number / 1000 if abs(number) >= 1e11 else number
        made = datetime.fromisoformat(f"{text}-01-01" if re.fullmatch(r"\d{4}", text) else text)
    return (made if made.tzinfo else made.replace(tzinfo=UTC)).timestamp()


def value_of(row: Row, key: str) -> Any:
    """What a row has under a key, with dots into what it holds; DataError where it has nothing."""
    found: Any = row.values
    for part in [key] if key in row.values else key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
        if found is None and key in row.values:
            raise DataError(f"{row.place}: {key!r} is null; `luthier data clean` takes rows without a label out")
        if found is None:
            raise DataError(f"{row.place}: no {key!r}; the row has {', '.join(map(repr, row.values)) or 'nothing'}")
    return found


# ---------------------------------------------------------------------------- two passes


def hashed(value: object) -> int:
    """64 bits of what a value says."""
    return int.from_bytes(hashlib.blake2b(line(value), digest_size=8).digest(), "big")


def _first(digest: str) -> int:
    """64 bits of a SHA-256 in hexadecimal."""
    return int(digest[:16], 16)


def _parent(row: Row) -> int:
    """64 bits of what a row's parent is known by; 0 of one that was made of none."""
    told = row.values.get(PARENT)
    if told is None:
        return 0
    try:
        return _first(told["sha256"])
    except (TypeError, KeyError, ValueError):
        raise DataError(
            f"{row.place}: {PARENT} names no parent by its sha256, as `luthier data augment` does"
        ) from None


def families(whole: Mapping[str, np.ndarray]) -> np.ndarray:
    """[N] uint64: the units, where rows that were made of others are of their parents', or of one with their siblings
    where the parent is not there."""
    made, parents = whole["unit"].copy(), whole["parent"]
    new = np.flatnonzero(parents)
    if len(new):
        order = np.argsort(whole["own"], kind="stable")
        own = whole["own"][order]
        at = np.minimum(np.searchsorted(own, parents[new]), len(own) - 1)
        made[new] = np.where(own[at] == parents[new], whole["unit"][order[at]], parents[new])
    return made


class Keys(Work):
    """The first pass: what of a row decides its side, as numbers."""

    def __init__(self, split: Split):
        self.split = split

    def begin(self, piece: Any, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.columns: dict[str, list] = {"unit": [], "own": [], "parent": []}
        self.classes: dict[int, str] = {}

    def row(self, row: Row) -> Iterable[tuple[str, dict]]:
        if row.fault is not None:
            raise DataError(f"{row.place}: {row.fault}; `luthier data clean` takes such rows out")
        split, columns = self.split, self.columns
        said = {key: value for key, value in row.values.items() if not key.startswith("_")}
        columns["unit"].append(hashed(value_of(row, split.group)) if split.group else hashed(said))
        columns["own"].append(_first(hashlib.sha256(dumps(row.values).encode("utf-8", "surrogatepass")).hexdigest()))
        columns["parent"].append(_parent(row))
        if split.stratify:
            value = value_of(row, split.stratify)
            if isinstance(value, str) and not value.strip():
                raise DataError(f"{row.place}: {split.stratify!r} is empty, which is no class; label the row, or take "
                                "it out (`luthier data clean` does)")  # fmt: skip
            columns.setdefault("class", []).append(hashed(value))
            if self.classes.setdefault(columns["class"][-1], str(value)) and len(self.classes) > CLASSES:
                raise DataError(f"{split.stratify!r} has over {CLASSES:,} values: it is no class to stratify by")
        if split.time:
            value = value_of(row, split.time)
            try:
                columns.setdefault("time", []).append(seconds(value))
            except ValueError:
                raise DataError(f"{row.place}: {split.time}={value!r} is no time: write it as ISO 8601") from None
        return ()

    def end(self) -> dict:
        arrays = {name: np.array(values, np.float64 if name == "time" else np.uint64)
                  for name, values in self.columns.items()}  # fmt: skip
        save(gathered_file(self.folder, "keys", self.number), arrays)
        return {"classes": {str(number): text for number, text in self.classes.items()}}


class Placing(Work):
    """The second pass: each row to its side."""

    def __init__(self, names: Sequence[str], keys: Path):
        self.names, self.keys = names, keys

    def begin(self, piece: Any, folder: Path, number: int) -> None:
        self.sides = load(gathered_file(self.keys, "sides", number))["sides"]

    def row(self, row: Row) -> Iterable[tuple[str, dict]]:
        yield self.names[self.sides[row.number]], row.values


def split(
    source: str | Sequence[str], out: Path, how: Split, *, workers: int | None = None, suffix: str = "",
    say: Say = lambda text: None, part: str = "train",
) -> dict:  # fmt: skip
    """Write OUT/NAME.jsonl for each side; what is in each, as JSON. `suffix` is that of compression or ""."""
    if problems := how.problems():
        raise ConfigError(problems)
    refuse_within(source, [out])
    names = list(how.sizes)
    sides = {name: out / f"{name}.jsonl{suffix}" for name in names}
    told = {"verb": "split", "sizes": {n: str(s) for n, s in how.sizes.items()}, "stratify": how.stratify,
            "group": how.group, "time": how.time, "cuts": how.cuts, "seed": how.seed}  # fmt: skip
    journal = out / ".luthier"
    if not (journal / "key.json").exists() and not (journal / "keys" / "key.json").exists():
        refuse_existing(journal, [out])
    keyed = {name: told[name] for name in ("verb", "stratify", "group", "time")}  # other sizes need no other first pass
    seen = run(source, None, partial(Keys, how), settings=keyed, workers=workers, say=say, journal=journal / "keys",
               split=part)  # fmt: skip
    arrays = [load(gathered_file(journal / "keys", "keys", d.number)) for d in seen]
    whole = {name: np.concatenate([a[name] for a in arrays]) for name in arrays[0]}
    if not how.group:
        whole["unit"] = families(whole)
    chosen = placed(whole, how)
    classes = {int(n): text for d in seen for n, text in d.end["classes"].items()}
    report = _report(whole, chosen, names, classes)
    if empty := [name for name in names if not report["sides"][name]["rows"]]:
        raise DataError(f"{', '.join(empty)}: no rows of {len(chosen):,} would be there; see --sizes or --cuts")
    refuse_changed_since(seen, journal / "keys")
    for d in seen:
        mine = chosen[d.first : d.first + d.rows]
        save(gathered_file(journal / "keys", "sides", d.number), {"sides": mine})
    run([d.piece for d in seen], None, partial(Placing, names, journal / "keys"), settings=told, workers=workers,
        say=say, sides=sides, journal=journal / "rows", split=part)  # fmt: skip
    return {**report, "files": {name: str(path) for name, path in sides.items()}, "pieces": _inputs(seen)}


def _inputs(seen: Sequence[Done]) -> list[dict]:
    rows: dict[str, int] = {}
    for d in seen:
        path = str(d.piece.hub or d.piece.path)
        rows[path] = rows.get(path, 0) + d.rows
    return [{"file": path, "rows": count} for path, count in rows.items()]


def _report(whole: Mapping[str, np.ndarray], chosen: np.ndarray, names: Sequence[str], classes: Mapping) -> dict:
    made: dict[str, Any] = {"rows": len(chosen), "sides": {}}
    for at, name in enumerate(names):
        here = chosen == at
        made["sides"][name] = {"rows": int(here.sum()), "share": float(here.mean())}
        if "class" in whole:
            found, counts = np.unique(whole["class"][here], return_counts=True)
            made["sides"][name]["classes"] = {classes[int(n)]: int(c) for n, c in zip(found, counts)}
    every = set(classes.values())
    made["lacking"] = {
        name: sorted(every - set(side["classes"])) for name, side in made["sides"].items()
        if "classes" in side and every - set(side["classes"])
    }  # fmt: skip
    return made


# ---------------------------------------------------------------------------- which side


def placed(whole: Mapping[str, np.ndarray], how: Split) -> np.ndarray:
    """[N] uint8: the number of each row's side."""
    count = len(whole["unit"])
    if how.cuts is not None:
        times = np.array(list(how.cuts.values()))
        return np.searchsorted(times, whole["time"], side="right").astype(np.uint8)
    wanted = quotas(how.sizes, count)
    if how.time:
        units, of_row = np.unique(whole["time"], return_inverse=True)
        return _cut(np.arange(len(units)), np.bincount(of_row), wanted)[of_row]
    units, of_row, sizes = np.unique(whole["unit"], return_inverse=True, return_counts=True)
    order = mixed(units, how.seed)
    if "class" not in whole:
        return _cut(np.argsort(order, kind="stable"), sizes, wanted)[of_row]
    names, of_class = np.unique(whole["class"], return_inverse=True)
    table = np.zeros((len(units), len(names)), np.int64)  # rows of each unit and class
    np.add.at(table, (of_row, of_class), 1)
    alone = (table > 0).sum(1) == 1
    if alone.all():
        return _stratified(order, table.argmax(1), sizes, wanted)[of_row]
    return _balanced(order, table, wanted)[of_row]


def quotas(sizes: Mapping[str, float | int | None], count: int) -> np.ndarray:
    """Rows of each side, `count` in all: shares by the largest remainder."""
    fixed = sum(size for size in sizes.values() if isinstance(size, int))
    exact = np.array([0.0 if size is None else size * count if isinstance(size, float) else size
                      for size in sizes.values()])  # fmt: skip
    if any(size is None for size in sizes.values()):
        made = np.rint(exact).astype(np.int64)
        rest = count - int(made.sum())
        if rest < 0:
            raise DataError(f"--sizes asks for {made.sum():,} rows, and there are {count:,}")
        made[[size is None for size in sizes.values()]] = rest
        return made
    assert not fixed
    made = np.floor(exact).astype(np.int64)
    for at in np.argsort(made - exact, kind="stable")[: count - int(made.sum())]:
        made[at] += 1
    return made


def mixed(values: np.ndarray, seed: int) -> np.ndarray:
    """Hashes of hashes, another for each seed (the finaliser of SplitMix64, doi:10.1145/2660193.2660195)."""
    with np.errstate(over="ignore"):
        z = values + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % (1 << 64))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _cut(order: np.ndarray, sizes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Units in this order to sides, one after the other: a unit goes where its middle lies."""
    ends = np.cumsum(sizes[order])
    middle = ends - sizes[order] / 2
    made = np.zeros(len(order), np.uint8)
    made[order] = np.searchsorted(np.cumsum(wanted)[:-1], middle, side="right")
    return made


def _stratified(order: np.ndarray, classes: np.ndarray, sizes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Units of one class each: sorted by how far through its class each is, so that every stretch has all in shares."""
    by_class = np.lexsort((order, classes))
    ends = np.cumsum(sizes[by_class])
    first = np.concatenate([[True], classes[by_class][1:] != classes[by_class][:-1]])
    starts = np.maximum.accumulate(np.where(first, ends - sizes[by_class], 0))
    of_class = np.bincount(classes, sizes)[classes[by_class]]
    far = np.empty(len(order))
    far[by_class] = (ends - starts - sizes[by_class] / 2) / of_class
    return _cut(np.lexsort((order, far)), sizes, wanted)


def _balanced(order: np.ndarray, table: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Units of several classes: the largest first, each to the side that is then least far from its shares."""
    share = wanted / wanted.sum()
    goal = np.concatenate([table.sum(0)[None] * share[:, None], wanted[:, None]], 1)  # [sides, classes + 1]
    scale = 1 / np.maximum(goal, 1)
    rows = np.concatenate([table, table.sum(1, keepdims=True)], 1)
    have, made = np.zeros_like(goal), np.zeros(len(table), np.uint8)
    for unit in np.lexsort((order, -rows[:, -1])):
        gain = ((have + rows[unit] - goal) * scale) ** 2 - ((have - goal) * scale) ** 2
        at = int(gain.sum(1).argmin())
        have[at] += rows[unit]
        made[unit] = at
    return made
