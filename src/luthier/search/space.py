"""Text to distributions: which settings are searched, over which values, and in which trials."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import configure
from ..errors import ConfigError
from ..faults import fields_of
from ..settings import did_you_mean, hint, nearest, parse_override

CALL = re.compile(r"(\w*)\((.*)\)", re.S)
NAMES = ("log", "uniform", "int", "choice")
ELSEWHERE = {  # what other libraries call them
    "loguniform": "log", "log_uniform": "log", "log_uniform_values": "log", "qloguniform": "log", "lograndint": "log",
    "interval": "uniform", "float": "uniform", "quniform": "uniform", "q_uniform": "uniform", "normal": "uniform",
    "randint": "int", "int_uniform": "int", "qrandint": "int", "range": "int", "integer": "int",
    "choices": "choice", "categorical": "choice", "grid_search": "choice", "values": "choice",
}  # fmt: skip
EXAMPLE = "such as log(1e-5, 1e-3), uniform(0, 0.1), int(1, 4) or [8, 16, 32]"
OF_TRIALS = {  # what a space may not say, and why
    "output_dir": "each trial has a folder of its own",
    "search": "it says how is searched",
    "evaluation": "all trials must be measured alike",
    "data.validation": "all trials must be measured on the same rows",
    "monitor": "it changes nothing that is learnt",
}
OF_METHODS = ("trainable.kind", "objective.kind", "precision.kind")  # a method's row fixes them
COMBINATIONS = 64  # of choices that are tried before anything is trained
FINITE = 100_000  # points of a space that are counted

Condition = tuple[str, tuple]  # a searched setting, and the values of it with which another one applies


@dataclass(frozen=True)
class Dimension:
    """A setting and the values that it can have: choices, or an interval of numbers, both ends included."""

    key: str
    choices: tuple = ()
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    whole: bool = False
    when: tuple[Condition, ...] = ()

    @property
    def labels(self) -> list:
        """The choices as a storage can hold them: plain values as they are, others as JSON."""
        return [c if isinstance(c, str | int | float | None) else json.dumps(c) for c in self.choices]

    def value(self, label: Any) -> Any:
        """What a configuration is given for what the storage holds."""
        if not self.choices:
            return label
        return next(c for c, known in zip(self.choices, self.labels) if known == label and type(known) is type(label))

    def label(self, value: Any) -> Any:
        """The other way round; raises KeyError where the value is not among those that are searched."""
        if self.choices:
            for choice, label in zip(self.choices, self.labels):
                if choice == value and isinstance(choice, bool) == isinstance(value, bool):
                    return label
        elif isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high:
            steps = 0.0 if self.step is None else (value - self.low) / self.step
            if (isinstance(value, int) or not self.whole) and math.isclose(steps, round(steps), abs_tol=1e-9):
                return value
            if self.step is None and not self.whole:
                return value
        raise KeyError(self.key)

    def points(self) -> list | None:
        """All labels, where they are finitely many."""
        if self.choices:
            return self.labels
        step = self.step or (1 if self.whole else None)
        if step is None or (self.log and not self.whole):
            return None
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        if count > FINITE:
            return None
        return [int(self.low + i * step) if self.whole else self.low + i * step for i in range(count)]

    def __str__(self) -> str:
        if self.choices:
            text = json.dumps(list(self.choices))
        else:
            inside = f"{self.low:g}, {self.high:g}" + (f", {self.step:g}" if self.step is not None else "")
            text = f"{'log' if self.log else 'int' if self.whole else 'uniform'}({inside})"
        conditions = [
            f"{k}={json.dumps(v[0])}" if len(v) == 1 else f"{k} in {json.dumps(list(v))}" for k, v in self.when
        ]
        return text + (f" if {' and '.join(conditions)}" if conditions else "")


@dataclass(frozen=True)
class Space:
    """All dimensions, each after those that it depends on."""

    dimensions: tuple[Dimension, ...]
    by_key: Mapping[str, Dimension] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_key", {d.key: d for d in self.dimensions})

    def applies(self, dimension: Dimension, labels: Mapping[str, Any]) -> bool:
        """Whether a dimension is one of a trial in which those before it have these labels."""
        return all(_holds(self, condition, labels) for condition in dimension.when)

    def values(self, labels: Mapping[str, Any]) -> dict[str, Any]:
        """Setting -> value, as a configuration takes them."""
        return {key: self.by_key[key].value(label) for key, label in labels.items()}

    def points(self) -> list[dict[str, Any]] | None:
        """Every combination of labels once, where they are finitely many."""
        found: list[dict[str, Any]] = [{}]
        for dimension in self.dimensions:
            own = dimension.points()
            if own is None:
                return None
            found = [
                one | extra
                for one in found
                for extra in ([{dimension.key: label} for label in own] if self.applies(dimension, one) else [{}])
            ]
            if len(found) > FINITE:
                return None
        return found

    def of(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """The labels of a configuration's own values, by dotted names; None where it does not lie in the space."""
        labels: dict[str, Any] = {}
        for dimension in self.dimensions:
            if self.applies(dimension, labels):
                try:
                    labels[dimension.key] = dimension.label(_inside(values, dimension.key))
                except KeyError:
                    return None
        return labels

    def described(self) -> dict[str, str]:
        return {dimension.key: str(dimension) for dimension in self.dimensions}


def nested(key: str, value: Any) -> dict:
    """`a.b` and a value as keys of keys."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def overrides(values: Mapping[str, Any]) -> list[dict]:
    """The values of a trial as sources of a configuration: whole sections first, then what is inside of them."""
    return [nested(key, values[key]) for key in sorted(values, key=lambda key: key.count("."))]


def _inside(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        found = found[part] if isinstance(found, Mapping) else {}[part]
    return found


def _holds(space: Space, condition: Condition, labels: Mapping[str, Any]) -> bool:
    """Of a searched setting, or of a key inside a whole section that is a choice."""
    key, allowed = condition
    parent = _parent(key, space.by_key)
    if parent is None or parent not in labels:
        return False
    found = space.by_key[parent].value(labels[parent])
    if key != parent:
        try:
            found = _inside(found, key.removeprefix(parent + ".")) if isinstance(found, Mapping) else None
        except KeyError:
            return False
    return any(found == value and isinstance(found, bool) == isinstance(value, bool) for value in allowed)


def _parent(key: str, known: Mapping[str, Any]) -> str | None:
    """The searched setting that a condition is on: the key itself, or a section around it."""
    parts = key.split(".")
    return next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known), None)


# ---------------------------------------------------------------------------- reading


def is_distribution(key: str, text: str) -> bool:
    """Whether the value of `key=text` on a command line says where to search, and is not the value itself.

    `[a, b]` are choices, but for settings that take a list; `choice([a], [a, b])` are choices of any.
    """
    body, _ = _split(text)
    if CALL.fullmatch(body) or re.match(rf"({'|'.join({*NAMES, *ELSEWHERE})})\(", body):  # perhaps not closed
        return True
    if not (body.startswith("[") and body.endswith("]")):
        return False
    fields, _ = fields_of(key)
    listed = any(_takes(f.annotation, list) for f in fields)
    return not listed or body.replace(" ", "").startswith("[[")


def read(entries: Mapping[str, Any]) -> Space:
    """The space of `search.space`; everything that is wrong with it is told at once, in a ConfigError."""
    found: list[Dimension] = []
    problems: list[str] = []
    for key, entry in entries.items():
        try:
            found.append(_dimension(key, entry))
        except ConfigError as error:
            problems += error.problems
    if not entries:
        problems.append(f"search.space: nothing is searched: give settings and their values, {EXAMPLE}")
    if not problems:
        found, problems = _in_order(found)
    if problems:
        raise ConfigError(problems)
    return Space(tuple(found))


def _dimension(key: str, entry: Any) -> Dimension:
    for path, reason in OF_TRIALS.items():
        if key == path or key.startswith(path + "."):
            raise ConfigError(f"{key} cannot be searched: {reason}")
    fields, problem = fields_of(key)
    if problem:
        raise ConfigError(problem)
    when: list[Condition] = []
    if isinstance(entry, Mapping):
        entry = dict(entry)
        given = entry.pop("if", {})
        if not isinstance(given, Mapping):
            raise ConfigError(f"{key}: `if` should be settings and their values, such as {{method: lora}}")
        when = [(k, tuple(v) if isinstance(v, list) else (v,)) for k, v in given.items()]
        if len(entry) != 1:
            found = ", ".join(map(str, entry)) or "none"
            raise ConfigError(f"{key}: expected one of {', '.join(NAMES)}, and `if`; found {found}")
        ((name, arguments),) = entry.items()
        arguments = arguments if isinstance(arguments, list) else [arguments]
    elif isinstance(entry, list | tuple):
        name, arguments = "choice", list(entry)
    elif isinstance(entry, str):
        name, arguments, when = _parsed(key, entry)
    else:
        raise ConfigError(f"{key}={entry!r}: expected where to search, {EXAMPLE}")
    return _made(key, name, arguments, tuple(when), [f.annotation for f in fields])


def _parsed(key: str, text: str) -> tuple[str, list, list[Condition]]:
    body, condition = _split(text)
    call = CALL.fullmatch(body)
    if call:
        name, arguments = call[1] or "uniform", parse_override(f"{key}=[{call[2]}]")
    elif body.startswith("["):
        name, arguments = "choice", parse_override(f"{key}={body}")
    else:
        raise ConfigError(f"{key}={text!r}: expected where to search, {EXAMPLE}")
    return name, _inside(arguments, key), _conditions(key, condition) if condition else []


def _split(text: str) -> tuple[str, str]:
    """What stands before and after the last ` if ` outside of brackets and quotes."""
    depth, quote, at = 0, "", None
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
            if depth == 0 and text.startswith(" if ", i):
                at = i
    return (text.strip(), "") if at is None else (text[:at].strip(), text[at + 4 :].strip())


def _conditions(key: str, text: str) -> list[Condition]:
    found: list[Condition] = []
    for part in re.split(r"\s+and\s+", text):
        one = re.fullmatch(r"([\w.-]+)\s*(?:==?\s*(.+)|\bin\s*(\[.*\]))", part, re.S)
        if not one:
            raise ConfigError(f"{key}: {part!r} is no condition: expected `method=lora` or `trainable.r in [8, 16]`")
        value = _inside(parse_override(f"{one[1]}={one[2] or one[3]}"), one[1])
        found.append((one[1], tuple(value) if one[3] else (value,)))
    return found


def _made(key: str, name: str, arguments: list, when: tuple[Condition, ...], types: Sequence[Any]) -> Dimension:
    name = "choice" if name == "choices" else name
    if name not in NAMES:
        meant = hint(ELSEWHERE.get(name) or nearest(name, NAMES))
        raise ConfigError(f"{key}: {name!r} is no distribution{meant} (known: {', '.join(NAMES)})")
    if name == "choice":
        return _choice(key, arguments, when)
    told = f"{key}={name}({', '.join(map(str, arguments))})"
    most = 2 if name == "log" else 3
    if not 2 <= len(arguments) <= most or not all(_number(a) for a in arguments):
        step = "" if name == "log" else ", and a step if wanted"
        raise ConfigError(f"{told}: expected two numbers, the least and the greatest{step}")
    low, high, step = (*arguments, None)[:3]
    if not low < high:
        raise ConfigError(f"{told}: the interval is empty: the first number must be less than the second")
    if name == "log" and low <= 0:
        raise ConfigError(f"{told}: a logarithmic interval begins above 0: begin at 1e-6 or so, or use uniform")
    if step is not None and not 0 < step <= high - low:
        raise ConfigError(f"{told}: the step should be above 0 and at most {high - low:g}")
    if step is not None and not math.isclose((high - low) / step, round((high - low) / step), rel_tol=1e-9):
        last = low + math.floor((high - low) / step + 1e-9) * step
        raise ConfigError(f"{told}: no step ends at {high:g}: use {last:g} as the greatest")
    integers = all(isinstance(a, int) for a in arguments)
    takes_float = not types or any(_takes(t, float) for t in types)
    takes_int = not types or any(_takes(t, int) for t in types)
    if types and not takes_float and not takes_int:
        raise ConfigError(f"{told}: the setting takes no numbers: give choices, such as [a, b]")
    whole = name == "int" or (takes_int and (not takes_float or integers) and (bool(types) or integers))
    if whole and not integers:
        raise ConfigError(f"{told}: expected integers, as the setting takes no others")
    return Dimension(key, low=low, high=high, step=step, log=name == "log", whole=whole, when=when)


def _choice(key: str, arguments: list, when: tuple[Condition, ...]) -> Dimension:
    if not arguments:
        raise ConfigError(f"{key}=[]: there is nothing to choose from")
    made = Dimension(key, tuple(arguments), when=when)
    labels = [(type(label) is bool, label) for label in made.labels]
    twice = [label for i, (kind, label) in enumerate(labels) if (kind, label) in labels[:i]]
    if twice:
        raise ConfigError(f"{key}: {twice[0]!r} is there twice")
    if any(a == b for a, b in itertools.combinations(made.labels, 2)):  # a storage would take True for 1
        raise ConfigError(f"{key}: choices that are equal numbers, such as 1 and true, cannot be told apart")
    return made


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _takes(annotation: Any, kind: type) -> bool:
    """Whether a field's type has `kind` in it, at any place of a union; not inside of lists."""
    origin = getattr(annotation, "__origin__", None)
    if annotation is kind or origin is kind:
        return True
    return origin not in (list, dict) and any(_takes(a, kind) for a in getattr(annotation, "__args__", ()))


def _in_order(found: list[Dimension]) -> tuple[list[Dimension], list[str]]:
    """Each after those that it depends on, and what is wrong with conditions."""
    known = {d.key: d for d in found}
    problems = []
    for d in found:
        for key, allowed in d.when:
            parent = _parent(key, known)
            if parent is None:
                told = f"{did_you_mean(key, known)} ({', '.join(known)})"
                problems.append(f"{d.key}: the condition is on {key}, which is not searched{told}")
            elif parent == d.key:
                problems.append(f"{d.key}: the condition is on itself")
            elif key == parent and known[parent].choices:
                for value in allowed:
                    if value not in known[parent].choices:
                        problems.append(f"{d.key}: {key}={value!r} is not among {list(known[parent].choices)}")
    if problems:
        return found, problems
    ordered: list[Dimension] = []
    waiting = list(found)
    while waiting:
        done = {d.key for d in ordered}
        ready = [d for d in waiting if all(_parent(key, known) in done for key, _ in d.when)]
        if not ready:
            return found, [f"{', '.join(d.key for d in waiting)}: their conditions are on one another in a circle"]
        ordered += ready
        waiting = [d for d in waiting if d not in ready]
    return ordered, []


# ---------------------------------------------------------------------------- against the configuration


def refused(space: Space, sources: Sequence[Any]) -> list[str]:
    """What some values can never be, whatever the others are; and remarks on choices that do not go together.

    Raises ConfigError where a value is refused in all combinations that were tried; what only some refuse is said.
    """
    corners = list(itertools.islice(_corners(space), COMBINATIONS * max(1, len(space.dimensions))))
    faults: list[tuple[dict, list[str]]] = []
    for labels in corners:
        try:
            configure(*sources, *overrides(space.values(labels)))
            faults.append((labels, []))
        except ConfigError as error:
            faults.append((labels, error.problems))
    wrong = []
    for d in space.dimensions:
        for label in dict.fromkeys(one[d.key] for one, _ in faults if d.key in one):
            told = [p for one, p in faults if d.key in one and one[d.key] == label]
            own = [[text for text in p if re.match(rf"{re.escape(d.key)}(?![\w])", text)] for p in told]
            if told and all(own):
                remedy = f"; search the method instead, such as method='{d}'" if d.key in OF_METHODS else ""
                wrong.append(f"{own[0][0]} (searched: {d}){remedy}")
    if not wrong and all(problems for _, problems in faults):
        wrong = faults[0][1]
    if wrong:
        raise ConfigError(list(dict.fromkeys(wrong)))
    bad = [(one, problems) for one, problems in faults if problems]
    if not bad:
        return []
    labels, problems = bad[0]
    told = ", ".join(f"{key}={value}" for key, value in space.values(labels).items())
    return [
        f"{len(bad)} of {len(faults)} combinations that were looked at are refused, and as trials will fail; the first "
        f"is {told}: {problems[0]}. A condition keeps them out, such as '[8, 16] if method=lora'"
    ]


def _corners(space: Space) -> Iterator[dict[str, Any]]:
    """Every choice and both ends of every interval, each with several values of the others."""
    ends = {d.key: d.labels if d.choices else [_end(d, d.low), _end(d, d.high)] for d in space.dimensions}
    seen = set()
    for shift in range(max(len(v) for v in ends.values())):
        for fixed in space.dimensions:
            for label in ends[fixed.key]:
                labels: dict[str, Any] = {}
                for i, d in enumerate(space.dimensions):
                    if space.applies(d, labels):
                        own = ends[d.key]
                        labels[d.key] = label if d is fixed else own[(shift * (i + 1)) % len(own)]
                mark = json.dumps(labels)
                if mark not in seen:
                    seen.add(mark)
                    yield labels


def _end(d: Dimension, value: float) -> float:
    return int(value) if d.whole else float(value)
