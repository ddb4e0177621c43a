"""Label Studio's JSON, read and written: choices, labels of spans, pairwise comparison, and text areas.

Its format: https://labelstud.io/guide/task_format and https://labelstud.io/guide/export.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from ...data import sources
from ...data.readers import parse_json
from ...data.sources import Row
from ...errors import ConfigError, DataError
from .. import agreement
from ..encoded import dumps
from ..outputs import Written, assembled, beside, shard_names, suffix_of, writer
from ..views import view
from .rules import ASIDE, names_in
from .tasks import TIE, AnyTask, Classes, Edit, Label, Preference, Spans, answer_text
from .words import Span, snapped, words_of

TYPES = {"classes": "choices", "spans": "labels", "preference": "pairwise", "edit": "textarea"}
SHOWN = "luthier_shown"  # a column of ours: the texts of a row of several, as one
BY = "luthier_by"  # and who an annotation is of, where the name is no address of mail
NAME = "label"  # of the control that is written


# ---------------------------------------------------------------------------- reading


class Reading:
    """A task of Label Studio as a row and the labels that annotators gave it."""

    def __init__(self, task: AnyTask, control: str | None = None, predictions: bool = False):
        self.task, self.control, self.predictions = task, control, predictions
        self.type = TYPES[task.kind]
        self.controls: set[str] = set()
        self.others: set[str] = set()  # types of results that are not the task's

    def check(self) -> None:
        """DataError where nobody said anything of the task's kind, and something of another: that is no empty label."""
        if self.others and not self.controls:
            raise DataError(
                f"task.kind={self.task.kind!r} is what results of type {self.type!r} say, and here are only "
                f"{', '.join(map(repr, sorted(self.others)))}: another task.kind, or another project"
            )

    def values(self, told: Mapping) -> dict:
        data = told.get("data")
        if not isinstance(data, Mapping):
            raise ValueError("it has no `data`: expected Label Studio's JSON (its export `JSON`, not `JSON-MIN`)")
        return self.task.values({key: value for key, value in data.items() if key != SHOWN})

    def labels(self, told: Mapping, values: Mapping) -> dict[str, Label]:
        """By annotator. ValueError where one says what the task cannot have."""
        given = told.get("annotations", told.get("completions"))  # the latter until version 1.0
        if not given and self.predictions:
            given = told.get("predictions")
        made: dict[str, Label] = {}
        for place, one in enumerate(given or []):
            if one.get("was_cancelled") or one.get("skipped"):
                continue
            label = self._label(one.get("result") or [], values)
            if label is not None:
                made[_by(one, place)] = self.task.checked(label, values)
        return made

    def _label(self, results: Sequence[Mapping], values: Mapping) -> Label | None:
        mine = [r for r in results if r.get("type") == self.type and self.control in (None, r.get("from_name"))]
        self.controls |= {str(r.get("from_name")) for r in mine}
        self.others |= {str(r.get("type")) for r in results if r not in mine and r.get("type") != "relation"}
        if self.control is None and len(self.controls) > 1:
            raise ConfigError(
                f"--control: several controls of type {self.type}: {', '.join(sorted(self.controls))}; name one"
            )
        found = [r.get("value") or {} for r in mine]
        if isinstance(self.task, Spans):
            return [self._span(value, values) for value in found]
        if isinstance(self.task, Classes):
            named = [name for value in found for name in value.get("choices", [])]
            if self.task.several:
                return named
            if len(named) > 1:
                raise ValueError(
                    f"several choices ({', '.join(map(str, named))}), and the task is of one: task.several=true"
                )
            return named[0] if named else None
        if not found:
            return None
        if isinstance(self.task, Preference):
            return {"left": "a", "right": "b"}.get(found[0].get("selected", ""), TIE)
        text = found[0].get("text")
        return "\n".join(text) if isinstance(text, list) else text

    def _span(self, value: Mapping, values: Mapping) -> list:
        """Offsets count code points, or, as in files of before October 2021, UTF-16 units: which, the text tells."""
        labels = value.get("labels") or []
        if len(labels) != 1:
            raise ValueError(f"a span has the labels {labels}; one of them is expected")
        text, said = words_of(values).text, value.get("text")
        start, end = value.get("start"), value.get("end")
        if not isinstance(start, int) or not isinstance(end, int):
            raise ValueError(f"a span from {start!r} to {end!r}: expected characters of a text")
        if said is None or text[start:end] == said:
            return [start, end, labels[0]]
        wide = text.encode("utf-16-le", "surrogatepass")
        before, inside = wide[: 2 * start], wide[2 * start : 2 * end]
        if inside.decode("utf-16-le", "surrogatepass") == said:
            from_start = len(before.decode("utf-16-le", "surrogatepass"))
            return [from_start, from_start + len(said), labels[0]]
        raise ValueError(
            f"a span from {start} to {end} is {text[start:end]!r} in the row, and {said!r} in the annotation"
        )


def _by(one: Mapping, place: int) -> str:
    who = one.get(BY) or one.get("completed_by") or one.get("model_version")
    if isinstance(who, Mapping):
        who = who.get("email") or who.get("id")
    return str(who) if who is not None else f"annotation {place + 1}"


def tasks_of(source: str | Sequence[str]) -> Iterator[Row]:
    """All tasks: of lists of them as exports are, and of files of one task each, as storages synchronise them."""
    number = 0
    for name in [source] if isinstance(source, str) else source:
        files = sources.files_of(name)
        for file in [name] if files is None else map(str, files):
            if (one := _alone(Path(file))) is not None:
                yield Row(number, one, file)
                number += 1
                continue
            for row in sources.read(file):
                yield row._replace(number=number)
                number += 1


def _alone(path: Path) -> dict | None:
    """The task that is all of a file."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    with open(path, "rb") as file:
        if not file.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return None
    try:
        made = parse_json(path.read_bytes().decode("utf-8-sig"))
    except ValueError:  # lines of JSON; what is neither, the reader of rows tells
        return None
    return made if isinstance(made, dict) and isinstance(made.get("data"), dict) else None


def read(
    source: str | Sequence[str], out: Path, task: AnyTask, *, control: str | None = None, predictions: bool = False
) -> dict:
    """Rows with what the annotators of a project agree on; the others aside. What was read, as JSON."""
    suffix = suffix_of(out)
    if suffix is None:
        raise ConfigError(f"{out}: imported rows go to one file: .jsonl, .jsonl.gz or .jsonl.zst")
    if out.exists():
        raise ConfigError(f"{out} exists: give another name, or remove it; nothing was written")
    reading = Reading(task, control, predictions)
    told: dict[str, Any] = {"rows": 0, "labelled": 0, "labels": Counter(), "aside": Counter()}
    votes: dict[str, dict] = {}
    first = ""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.import.{os.getpid()}")
    folder.mkdir()
    try:
        with writer(folder, 0, ["", ASIDE], suffix) as write:
            for row in tasks_of(source):
                told["rows"] += 1
                stream, values = _imported(reading, row, told, votes)
                first = first or (f"{row.place}: {values['why']}" if stream else "")
                write(stream, values)
        reading.check()
        if not told["labelled"]:
            raise DataError(f"none of {told['rows']:,} tasks gives a labelled row; nothing was written. {first}")
        side = beside(out, ASIDE)
        assembled(folder, [Written(0, 0, write.rows)], out, suffix, shard_names([out], suffix), {ASIDE: side})
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    aside = {"aside_rows": str(side)} if ASIDE in write.rows else {}
    counts = {"labels": dict(told["labels"].most_common()), "aside": dict(told["aside"])}
    agreed = agreement.summary(votes) | {
        "annotators": {by: len({row for row, _ in votes[by]}) for by in sorted(votes)},
        "of": "words" if isinstance(task, Spans) else "rows",
    }
    return told | {"out": str(out)} | counts | aside | {"agreement": agreed}


def _imported(reading: Reading, row: Row, told: dict, votes: dict[str, dict]) -> tuple[str, dict]:
    task, labels = reading.task, {}
    why, made = None if row.fault is None else f"unreadable: {row.fault}", None
    values: dict = {}
    if why is None:
        try:
            values = reading.values(row.values)
            why = None if (fault := task.fault(values)) is None else f"unfit: {fault}"
            labels = {} if why else reading.labels(row.values, values)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise DataError(f"{row.place}: {error}") from None
    if why is None and not labels:
        why = "unlabelled"
    if why is None:
        label = task.decided(list(labels.values()), values).label
        made = None if label is None else task.row(values, label)
        why = None if made is not None else "tie" if label is not None else "disagreed"
        for by, one in labels.items():
            votes.setdefault(by, {}).update({(row.number, i): vote for i, vote in enumerate(task.votes(one, values))})
        if made is not None:
            told["labelled"] += 1
            told["labels"].update(names_in(task, label) if not isinstance(task, Edit) else ())
            return "", made
    told["aside"][str(why).partition(":")[0]] += 1
    return ASIDE, {"row": row.number, "place": row.place, "why": why, "labels": labels, "values": values or row.values}


# ---------------------------------------------------------------------------- writing


def told(task: AnyTask, number: int, values: Mapping, labels: Mapping[str, Label]) -> dict:
    """A row as a task of Label Studio, with an annotation of each annotator."""
    values = _two_answers(task, values)
    made = [
        {
            **({"completed_by": {"email": by}} if "@" in by else {BY: by}),
            "was_cancelled": False, "result": _result(task, values, label, f"{number}-{place}"),
        }
        for place, (by, label) in enumerate(labels.items())
    ]  # fmt: skip
    return {"id": number + 1, "data": _data(task, values), "annotations": made}


def _two_answers(task: AnyTask, values: Mapping) -> dict:
    """A row that has its chosen and rejected answers only: they are the two that were compared."""
    if isinstance(task, Preference) and task.answers[0] not in values and "chosen" in values:
        return {**values, task.answers[0]: values["chosen"], task.answers[1]: values["rejected"]}
    return dict(values)


def _data(task: AnyTask, values: dict) -> dict:
    if isinstance(task, Spans):
        return {**{k: v for k, v in values.items() if k != "tags"}, "text": words_of(values).text}
    if isinstance(task, Preference):
        plain = {key: answer_text(values[key]) for key in task.answers}
        return {
            **values,
            **plain,
            SHOWN: _shown({k: v for k, v in values.items() if k not in (*task.answers, *task.adds)}),
        }
    return {**values, SHOWN: _shown(values)}


def _shown(values: dict) -> str:
    texts = view(values).texts
    return texts[0].text if len(texts) == 1 else "\n\n".join(f"{t.role}: {t.text}" for t in texts)


def _result(task: AnyTask, values: Mapping, label: Label, name: str) -> list[dict]:
    def one(place: int, value: dict, to: str = "text") -> dict:
        return {"id": f"{name}-{place}", "from_name": NAME, "to_name": to, "type": TYPES[task.kind], "value": value}

    if isinstance(task, Spans):
        text = words_of(values).text
        spans = [Span(*span) for span in label]
        return [one(i, {"start": s.start, "end": s.end, "text": text[s.start : s.end], "labels": [s.label]})
                for i, s in enumerate(snapped(words_of(values), spans))]  # fmt: skip
    if isinstance(task, Classes):
        return [one(0, {"choices": label if task.several else [label]})]
    if isinstance(task, Preference):
        return [one(0, {"selected": {"a": "left", "b": "right"}[label]}, "a,b")] if label != TIE else []
    return [one(0, {"text": [label]})]


def interface(task: AnyTask) -> str:
    """The labelling configuration that the tasks are for, to be pasted into the settings of a project."""
    text = '<Text name="text" value="$text"/>' if isinstance(task, Spans) else f'<Text name="text" value="${SHOWN}"/>'
    if isinstance(task, Preference):
        inner = [
            f'<Text name="shown" value="${SHOWN}"/>',
            f'<Pairwise name="{NAME}" toName="a,b"/>',
            *(f'<Text name="{n}" value={quoteattr("$" + key)}/>' for n, key in zip("ab", task.answers)),
        ]
    elif isinstance(task, Classes):
        many = "multiple" if task.several else "single"
        choices = "".join(f"<Choice value={quoteattr(name)}/>" for name in task.labels)
        inner = [text, f'<Choices name="{NAME}" toName="text" choice="{many}">{choices}</Choices>']
    elif isinstance(task, Spans):
        names = "".join(f"<Label value={quoteattr(name)}/>" for name in task.labels)
        inner = [f'<Labels name="{NAME}" toName="text">{names}</Labels>', text]
    else:
        inner = [text, f'<TextArea name="{NAME}" toName="text" editable="true" maxSubmissions="1"/>']
    return "<View>\n  " + "\n  ".join(inner) + "\n</View>\n"


def write(tasks: Iterator[dict], out: Path, task: AnyTask) -> dict:
    """A list of tasks as one file of JSON, and the labelling configuration beside it."""
    beside_it = out.with_suffix(".xml")
    for path in (out, beside_it):
        if path.exists():
            raise ConfigError(f"{path} exists: give another name, or remove it; nothing was written")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    count = annotations = 0
    try:
        with open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:
            for one in tasks:
                file.write(("[\n" if not count else ",\n") + dumps(one))
                count, annotations = count + 1, annotations + len(one["annotations"])
            if not count:
                raise DataError("no rows to export")
            file.write("\n]\n")
            file.flush()
            os.fsync(file.fileno())
        beside_it.write_text(interface(task), encoding="utf-8")
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    return {"tasks": count, "annotations": annotations, "out": str(out), "interface": str(beside_it)}


def from_rows(source: str | Sequence[str], task: AnyTask) -> Iterator[dict]:
    """Tasks of rows, with the labels that these have already as annotations."""
    for row in sources.read(source if isinstance(source, str) else list(source)):
        if row.fault is not None:
            raise DataError(f"{row.place}: {row.fault}")
        values = _two_answers(task, task.values(row.values))
        if (fault := task.fault(values)) is not None:
            raise DataError(f"{row.place}: {fault}")
        known = None if isinstance(task, Edit) else task.before(values)
        yield told(task, row.number, values, {} if known is None else {"luthier": known})
