"""Labels by rules: each names a label where all its conditions hold; what they disagree on or say nothing of is counted."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from ...data.readers import parse_json
from ...data.sources import Row
from ...settings import Settings, nearest
from ..pieces import Work
from ..views import Text, view
from .tasks import AnyTask, Classes, Label, Spans
from .words import Span, Words, snapped, words_of

ROLES = ("system", "user", "assistant", "tool", "rejected", "text")
ASIDE = "aside"


class Length(Settings):
    """How long the texts are together."""

    min: int = Field(0, ge=0)
    max: int | None = Field(None, ge=0)
    unit: Literal["characters", "words"] = "characters"

    @model_validator(mode="after")
    def _some(self) -> Length:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max={self.max} is below min={self.min}")
        if not self.min and self.max is None:
            raise ValueError("give min, max or both")
        return self


class Rule(Settings):
    """A label for rows where all the conditions that are given hold. In `spans`, what they match is of that label."""

    label: str
    name: str | None = None
    """For the report; by default its label and its place."""
    regex: str | None = None
    """A regular expression that is found in a text (Python's `re`)."""
    keywords: list[str] | None = Field(None, min_length=1)
    """Words or phrases, at least one of which stands in a text, as whole words."""
    at_least: int = Field(1, ge=1)
    """How often the regular expression or the keywords must be found, all texts together."""
    ignore_case: bool = True
    json_schema: dict[str, Any] | None = None
    """A text is JSON that this schema allows."""
    length: Length | None = None
    roles: list[str] = []
    """Look at texts of these roles only: system, user, assistant, tool, rejected, or text of rows without roles."""
    never: bool = False
    """The label is given where the conditions do not all hold."""

    @field_validator("roles")
    @classmethod
    def _roles(cls, roles: list[str]) -> list[str]:
        for role in roles:
            if role not in ROLES:
                meant = nearest(role, ROLES)
                hint = f"; did you mean {meant!r}?" if meant else ""
                raise ValueError(f"{role!r} is no role ({', '.join(ROLES)}){hint}")
        return roles

    @model_validator(mode="after")
    def _sound(self) -> Rule:
        if all(one is None for one in (self.regex, self.keywords, self.json_schema, self.length)):
            raise ValueError("give at least one of regex, keywords, json_schema, length")
        if self.regex is not None:
            try:
                found = re.compile(self.regex)
            except re.error as error:
                raise ValueError(f"regex: {error}") from None
            if found.fullmatch(""):
                raise ValueError("regex: it is found in every text, as it matches nothing at all, too")
        if any(not word.strip() for word in self.keywords or ()):
            raise ValueError("keywords: one is empty")
        return self

    @cached_property
    def pattern(self) -> re.Pattern | None:
        """What `regex` and `keywords` look for; with both, `holds` asks each by itself."""
        flags = re.IGNORECASE if self.ignore_case else 0
        return None if self.regex is None else re.compile(self.regex, flags)

    @cached_property
    def words(self) -> re.Pattern | None:
        flags = re.IGNORECASE if self.ignore_case else 0
        listed = "|".join(
            r"\s+".join(map(re.escape, word.split())) for word in sorted(self.keywords or (), key=len, reverse=True)
        )
        return re.compile(rf"(?<!\w)(?:{listed})(?!\w)", flags) if listed else None

    @cached_property
    def allows(self) -> Any:
        import jsonschema

        schema = self.json_schema or {}
        return jsonschema.validators.validator_for(schema)(schema).is_valid

    def holds(self, texts: Sequence[Text]) -> bool:
        told = [text.text for text in texts if not self.roles or text.role in self.roles]
        return bool(told) and self._holds(told) != self.never

    def _holds(self, texts: Sequence[str]) -> bool:
        for pattern in (self.pattern, self.words):
            if pattern is not None and sum(1 for text in texts for _ in pattern.finditer(text)) < self.at_least:
                return False
        if self.length is not None:
            long = sum(len(t) if self.length.unit == "characters" else len(t.split()) for t in texts)
            if long < self.length.min or (self.length.max is not None and long > self.length.max):
                return False
        return self.json_schema is None or any(self._fits(text) for text in texts)

    def _fits(self, text: str) -> bool:
        try:
            return self.allows(parse_json(text))
        except (ValueError, RecursionError):
            return False

    def spans(self, words: Words) -> list[Span]:
        """What its regular expression and its keywords find in the text."""
        patterns = [p for p in (self.pattern, self.words) if p is not None]
        return [Span(*m.span(), self.label) for p in patterns for m in p.finditer(words.text) if m.end() > m.start()]


class Rules(Settings):
    """Rules, in order, and what is done where they say different things or nothing."""

    rules: list[Rule] = Field(min_length=1)
    conflicts: Literal["aside", "majority", "first"] = "aside"
    """Where rules name different labels: put the row aside, take the label that most of them name (aside where there is
    none), or that of the first rule. Of several classes all that are named are taken, and nothing conflicts."""
    otherwise: str | None = None
    """The label of rows of which no rule says anything; without it they are put aside."""

    def problems(self, labels: Sequence[str], kind: str) -> list[str]:
        made = []
        named = [(f"rules.rules[{i}].label", rule.label) for i, rule in enumerate(self.rules)]
        for where, label in [*named, *([("rules.otherwise", self.otherwise)] if self.otherwise is not None else [])]:
            if label not in labels:
                meant = nearest(label, labels)
                hint = f"; did you mean {meant!r}?" if meant else ""
                made.append(f"{where}={label!r}: the labels are {', '.join(labels)}{hint}")
        if kind == "spans":
            if self.otherwise is not None:
                made.append("rules.otherwise: a row without spans is a label of its own; leave it out")
            for i, rule in enumerate(self.rules):
                if (rule.regex is None and rule.keywords is None) or rule.never:
                    made.append(f"rules.rules[{i}]: spans come of what regex or keywords find; it has none, or `never`")
        for i, rule in enumerate(self.rules):
            if rule.json_schema is not None:
                if problem := _wrong_schema(rule.json_schema):
                    made.append(f"rules.rules[{i}].json_schema: {problem}")
        return made

    def names(self) -> list[str]:
        return [rule.name or f"{i + 1}. {rule.label}" for i, rule in enumerate(self.rules)]


def _wrong_schema(schema: dict) -> str | None:
    if find_spec("jsonschema") is None:
        return "it needs the library jsonschema: `pip install luthier[rewards]`"
    import jsonschema

    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        return f"no schema: {error.message}"
    if '"$ref": "http' in json.dumps(schema):
        return "a $ref to an address: nothing is fetched; put what it stands for under $defs"
    return None


# ---------------------------------------------------------------------------- a row


class Ruled(NamedTuple):
    label: Label | None
    why: str | None  # it has none
    fired: list[int]  # places of the rules that said something
    against: list[int]  # of those, the ones that another contradicts


class Ruler:
    """What rules make of a row's values."""

    def __init__(self, task: Classes | Spans, rules: Rules):
        self.task, self.rules = task, rules

    def __call__(self, values: dict) -> Ruled:
        return self._spans(values) if isinstance(self.task, Spans) else self._classes(values)

    def _classes(self, values: dict) -> Ruled:
        texts, rules = view(values).texts, self.rules.rules
        fired = [i for i, rule in enumerate(rules) if rule.holds(texts)]
        named = Counter(rules[i].label for i in fired)
        assert isinstance(self.task, Classes)
        if self.task.several:
            chosen = [name for name in self.task.labels if name in named]
            if not chosen and self.rules.otherwise is None:
                return Ruled(None, "abstained", fired, [])
            return Ruled(chosen or [self.rules.otherwise], None, fired, [])
        if not named:
            other = self.rules.otherwise
            return Ruled(other, None if other is not None else "abstained", fired, [])
        if len(named) == 1:
            return Ruled(next(iter(named)), None, fired, [])
        return Ruled(*self._settled(fired, named), fired, fired)

    def _settled(self, fired: Sequence[int], named: Counter) -> tuple[Label | None, str | None]:
        if self.rules.conflicts == "first":
            return self.rules.rules[fired[0]].label, None
        if self.rules.conflicts == "majority":
            (first, most), (_, next_most) = named.most_common(2)
            if most > next_most:
                return first, None
        return None, "conflict"

    def _spans(self, values: dict) -> Ruled:
        """Spans of all rules; of two that overlap with different labels that of the earlier rule, or none and aside."""
        words = words_of(values)
        texts = [Text(("text",), "text", words.text)]
        kept: list[tuple[Span, int]] = []
        fired, against = [], set()
        for i, rule in enumerate(self.rules.rules):
            found = rule.spans(words) if rule.holds(texts) else []
            fired += [i] if found else []
            for [span] in (snapped(words, [one]) for one in found if snapped(words, [one])):
                clash = [(k, j) for k, j in kept if k.start < span.end and span.start < k.end]
                if not clash:
                    kept.append((span, i))
                elif any(k.label != span.label for k, _ in clash):
                    against |= {i, *(j for _, j in clash)}
        if not fired:
            return Ruled(None, "abstained", [], [])
        if against and self.rules.conflicts != "first":
            return Ruled(None, "conflict", fired, sorted(against))
        return Ruled(sorted([list(span) for span, _ in kept]), None, fired, sorted(against))


class Ruling(Work):
    """Rows with the labels that rules give; the others aside, each with why."""

    def __init__(self, task: AnyTask, rules: Rules, existing: str):
        assert isinstance(task, Classes | Spans)
        self.task, self.rules, self.existing = task, rules, existing
        self.ruler = Ruler(task, rules)
        self.labels: Counter[str] = Counter()
        self.aside: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.of_rule = [Counter[str]() for _ in rules.rules]

    def row(self, row: Row) -> Iterable[tuple[str, dict]]:
        from .existing import settled

        values, label, why = settled(self.task, row, self.existing)
        if why is not None:
            yield self._aside(row, why)
            return
        made = self.ruler(values)
        self._count(made, label, values)
        if label is not None and self.existing == "keep":
            self.counts["kept"] += 1
            yield "", values
        elif made.why is not None:
            yield self._aside(row, made.why, {"rules": [self.rules.names()[i] for i in made.fired]})
        else:
            self.counts["labelled"] += 1
            self.labels.update(map(str, names_in(self.task, made.label)))
            yield "", self.task.row(values, made.label)

    def _aside(self, row: Row, why: str, more: dict | None = None) -> tuple[str, dict]:
        self.aside[why.partition(":")[0]] += 1
        return ASIDE, {"row": row.number, "place": row.place, "why": why, **(more or {}), "values": row.values}

    def _count(self, made: Ruled, before: Label | None, values: dict) -> None:
        """Of each rule the rows it spoke of, those that another spoke of, too, and where it was contradicted."""
        for i in made.fired:
            self.of_rule[i].update(
                {"rows": 1, "overlaps": int(len(made.fired) > 1), "conflicts": int(i in made.against)}
            )
            if before is not None and isinstance(self.task, Classes):
                says = self.rules.rules[i].label
                self.of_rule[i].update(
                    {"known": 1, "right": int(says in before if self.task.several else says == before)}
                )
        if before is not None and made.label is not None:
            self.counts.update({"known": 1, "right": int(made.label == before)})

    def end(self) -> dict:
        return {"counts": self.counts, "labels": self.labels, "aside": self.aside, "rules": self.of_rule}


def names_in(task: AnyTask, label: Label) -> list[str]:
    """The names of the task that a label has, for counts."""
    if isinstance(task, Spans):
        return [span[2] for span in label]
    if isinstance(task, Classes) and task.several:
        return label
    return [label]
