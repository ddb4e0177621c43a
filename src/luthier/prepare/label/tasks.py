"""What is asked of each row: classes, spans, which of two answers is better, or a better text; and what a label makes of it.

A label is JSON: the name of a class, or several in the order of the task; spans as [start, end, label] of characters;
"a", "b" or "tie"; a text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, field_validator

from ...data import formats
from ...labels import OUTSIDE, called
from ...settings import Settings
from ..views import put, view
from .words import Span, snapped, spans_of, tags, words_of

Label = Any  # JSON
TIE = "tie"


class Decided(NamedTuple):
    """What several votes amount to."""

    label: Label | None  # None where as many are for one as for another
    agreement: float  # between 0 and 1


class Task(Settings):
    """What all tasks have."""

    adds: ClassVar[tuple[str, ...]]  # columns of a row that is labelled
    columns: dict[str, str] = {}
    """Columns by the names that formats know, as in data.columns: `{text: review}`. Rows are written with these names."""
    instructions: str = ""
    """What annotators and models are told: when a row is of which label."""

    def values(self, values: Mapping) -> dict:
        return formats.renamed(values, self.columns)

    def fault(self, values: Mapping) -> str | None:
        """Why a row cannot be labelled."""
        return None if view(dict(values)).texts else "it has no text"

    def before(self, values: Mapping) -> Label | None:
        """The label that a row has already, where it has one of the task's."""
        return None

    def labelled(self, values: Mapping) -> bool:
        return all(values.get(key) is not None for key in self.adds)

    def checked(self, label: Label, values: Mapping) -> Label:
        """The label as it is kept; ValueError where it is none."""
        raise NotImplementedError

    def row(self, values: Mapping, label: Label) -> dict | None:
        """The row with its label, as training reads it; None where the label makes no row."""
        raise NotImplementedError

    def votes(self, label: Label, values: Mapping) -> list[Hashable]:
        """What agreement is measured on: one a row, or one a word."""
        return [label]

    def decided(self, labels: Sequence[Label], values: Mapping) -> Decided:
        """The label with most votes, and its share of them."""
        counts = Counter(labels).most_common(2)
        alone = len(counts) < 2 or counts[0][1] > counts[1][1]
        return Decided(counts[0][0] if alone else None, counts[0][1] / len(labels))


def _names(names: list[str]) -> list[str]:
    if any(not name.strip() or name != name.strip() for name in names):
        raise ValueError("a label is a text that is not empty and has no blanks around it")
    if len({name.lower() for name in names}) < len(names):
        raise ValueError("two labels have the same name, but for capitals")
    return names


class Classes(Task):
    """Each row is of one class, or of any number of them."""

    kind: Literal["classes"] = "classes"
    labels: list[str] = Field(min_length=2)
    """The names of the classes."""
    several: bool = False
    """A row may be of several classes, or of none; its column is then `labels`, else `label`."""

    _checked = field_validator("labels")(_names)

    @property
    def adds(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("labels",) if self.several else ("label",)

    def before(self, values: Mapping) -> Label | None:
        found = values.get(self.adds[0])
        try:
            return (
                None
                if found is None
                else self.checked([*map(called, found)] if self.several else called(found), values)
            )
        except (ValueError, TypeError):
            return None

    def checked(self, label: Label, values: Mapping) -> Label:
        if not self.several:
            if label not in self.labels:
                raise ValueError(f"{label!r} is not among the labels ({', '.join(self.labels)})")
            return label
        if not isinstance(label, list) or any(one not in self.labels for one in label):
            raise ValueError(f"{label!r} is no list of labels ({', '.join(self.labels)})")
        return [name for name in self.labels if name in label]

    def row(self, values: Mapping, label: Label) -> dict:
        return {**values, self.adds[0]: label}

    def votes(self, label: Label, values: Mapping) -> list[Hashable]:
        return [name in label for name in self.labels] if self.several else [label]

    def decided(self, labels: Sequence[Label], values: Mapping) -> Decided:
        """Of several classes each by itself: those that more than half are for; agreement over those anybody named."""
        if not self.several:
            return super().decided(labels, values)
        counts = Counter(name for label in labels for name in label)
        if any(2 * n == len(labels) for n in counts.values()):
            return Decided(None, 0.5)
        shares = [max(n, len(labels) - n) / len(labels) for n in counts.values()]
        chosen = [name for name in self.labels if 2 * counts[name] > len(labels)]
        return Decided(chosen, sum(shares) / len(shares) if shares else 1.0)


class Spans(Task):
    """Words of each row are of entities. Rows are written as `tokens` and `tags` (IOB2)."""

    adds = ("tags",)
    kind: Literal["spans"] = "spans"
    labels: list[str] = Field(min_length=1)
    """The names of the entities."""

    _checked = field_validator("labels")(_names)

    @field_validator("labels")
    @classmethod
    def _no_outside(cls, names: list[str]) -> list[str]:
        if OUTSIDE in names:
            raise ValueError(f"{OUTSIDE!r} is the tag of words that are of no entity, and no label")
        return names

    def fault(self, values: Mapping) -> str | None:
        tokens, text = values.get("tokens"), values.get("text")
        if isinstance(tokens, list) and tokens and all(isinstance(t, str) and t for t in tokens):
            return None
        if tokens is None and isinstance(text, str) and words_of(values).borders:
            return None
        return "it has neither `tokens`, a list of words, nor a `text` with words; name it in task.columns"

    def before(self, values: Mapping) -> Label | None:
        found = values.get("tags")
        if not isinstance(values.get("tokens"), list) or not isinstance(found, list):
            return None
        if any(not isinstance(tag, str) for tag in found) or len(found) != len(values["tokens"]):
            return None
        spans = spans_of(words_of(values), found)
        return [list(span) for span in spans] if all(span.label in self.labels for span in spans) else None

    def checked(self, label: Label, values: Mapping) -> Label:
        words = words_of(values)
        if not isinstance(label, list):
            raise ValueError("expected a list of [start, end, label]")
        spans = []
        for one in label:
            if not (isinstance(one, list | tuple) and len(one) == 3 and type(one[0]) is type(one[1]) is int):
                raise ValueError(f"{one!r} is no [start, end, label]")
            if one[2] not in self.labels:
                raise ValueError(f"{one[2]!r} is not among the labels ({', '.join(self.labels)})")
            if not 0 <= one[0] < one[1] <= len(words.text):
                raise ValueError(f"{one!r} is not inside the text of {len(words.text)} characters")
            spans.append(Span(*one))
        return [list(span) for span in snapped(words, spans)]

    def row(self, values: Mapping, label: Label) -> dict:
        words = words_of(values)
        rest = {key: value for key, value in values.items() if key not in ("text", "tokens", "tags")}
        return {"tokens": words.all(), "tags": tags(words, _spans(label)), **rest}

    def votes(self, label: Label, values: Mapping) -> list[Hashable]:
        return list(tags(words_of(values), _spans(label)))

    def decided(self, labels: Sequence[Label], values: Mapping) -> Decided:
        """The spans that more than half are for; agreement over words that anybody sees in an entity."""
        words = words_of(values)
        counts = Counter(span for label in labels for span in _spans(label))
        each = [tags(words, _spans(label)) for label in labels]
        named = [column for column in zip(*each) if set(column) != {OUTSIDE}]
        shares = [Counter(column).most_common(1)[0][1] / len(labels) for column in named]
        chosen = sorted(list(span) for span, n in counts.items() if 2 * n > len(labels))
        return Decided(chosen, sum(shares) / len(shares) if shares else 1.0)


def _spans(label: Label) -> list[Span]:
    return [Span(*one) for one in label]


class Preference(Task):
    """Which of two answers is better. Rows are written with `chosen` and `rejected`; those without a better one are not."""

    adds = ("chosen", "rejected")
    kind: Literal["preference"] = "preference"
    answers: list[str] = Field(["a", "b"], min_length=2, max_length=2)
    """The columns of the two answers. They are shown in an order that is drawn for each row and kept with the label."""
    ties: bool = True
    """That neither is better may be said, too."""

    @field_validator("answers")
    @classmethod
    def _two(cls, names: list[str]) -> list[str]:
        if names[0] == names[1]:
            raise ValueError("the two answers are the same column")
        return names

    def labelled(self, values: Mapping) -> bool:
        return not set(self.answers) & set(self.adds) and super().labelled(values)

    def before(self, values: Mapping) -> Label | None:
        if not self.labelled(values):
            return None
        a, b = (values.get(key) for key in self.answers)
        pairs = {"a": (a, b), "b": (b, a)}
        return next((label for label, pair in pairs.items() if pair == (values["chosen"], values["rejected"])), None)

    def fault(self, values: Mapping) -> str | None:
        for key in self.answers:
            if key not in values:
                return f"it has no column {key!r}; name those of the two answers in task.answers"
            if answer_text(values[key]) is None:
                return f"{key} is neither a text nor messages"
        return None

    def checked(self, label: Label, values: Mapping) -> Label:
        allowed = ("a", "b", TIE) if self.ties else ("a", "b")
        if label not in allowed:
            raise ValueError(f"{label!r} is none of {', '.join(allowed)}")
        return label

    def row(self, values: Mapping, label: Label) -> dict | None:
        if label == TIE:
            return None
        a, b = (values[key] for key in self.answers)
        rest = {key: value for key, value in values.items() if key not in self.answers and key not in self.adds}
        return {**rest, "chosen": a if label == "a" else b, "rejected": b if label == "a" else a}


def answer_text(value: object) -> str | None:
    """An answer, a text or messages, as it is shown; None of what is neither."""
    if isinstance(value, str):
        return value
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not messages:
        return None
    texts = [m.get("content") for m in messages if isinstance(m, Mapping)]
    if len(texts) < len(messages) or not all(isinstance(text, str) for text in texts):
        return None
    return texts[0] if len(texts) == 1 else "\n\n".join(f"{m.get('role')}: {m['content']}" for m in messages)


class Edit(Task):
    """A better text for the last answer of each row, or an answer where there is none yet."""

    adds = ()
    kind: Literal["edit"] = "edit"

    def labelled(self, values: Mapping) -> bool:
        return False

    def fault(self, values: Mapping) -> str | None:
        try:
            self.row(values, "")
        except (ValueError, TypeError, KeyError):
            return "it has no answer to edit, and nothing to answer"
        return None

    def before(self, values: Mapping) -> Label:
        """The answer as it stands."""
        texts = view(dict(values)).texts
        answers = [text for text in texts if text.role in ("assistant", "text")]
        return answers[-1].text if answers and answers[-1] is texts[-1] else ""

    def checked(self, label: Label, values: Mapping) -> Label:
        if not isinstance(label, str):
            raise ValueError("expected a text")
        if not label.strip():
            raise ValueError("the answer is empty")
        return label

    def row(self, values: Mapping, label: Label) -> dict:
        texts = view(dict(values)).texts
        if not texts:
            raise ValueError("no text")
        if texts[-1].role in ("assistant", "text"):
            return put(dict(values), texts[-1].path, label)
        if isinstance(values.get("messages"), list):
            asked = values["messages"]
            if isinstance(asked[-1], Mapping) and asked[-1].get("role") == "assistant":  # it says nothing yet
                asked = asked[:-1]
            return {**values, "messages": [*asked, {"role": "assistant", "content": label}]}
        for asked, answer in (("prompt", "completion"), ("instruction", "output")):
            if asked in values:
                return {**values, answer: label}
        raise ValueError("nothing to answer")


AnyTask = Annotated[Classes | Spans | Preference | Edit, Field(discriminator="kind")]
TASKS = {task.model_fields["kind"].default: task for task in (Classes, Spans, Preference, Edit)}
