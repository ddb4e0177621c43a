"""Rows recognised by their keys, among the formats of the kind of row that the objective learns from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from ..errors import DataError
from . import conversations, labelled, preferences, prompts, unpaired
from .conversations import BadRow, Conversation
from .sources import Row

EXAMPLES = {
    "text": "{prompt: question, completion: answer}", "pairs": "{prompt: question, chosen: good, rejected: bad}",
    "prompts": "{prompt: question}", "unpaired": "{completion: answer, label: good}",
    "labelled": "{text: review, label: stars}", "tagged": "{tokens: words, labels: ner_tags}",
}  # fmt: skip
SAME_ROWS = {"whole_pairs": "pairs"}  # kinds that are rendered otherwise, but read the rows of another
UNRECOGNISED = 1000  # rows without a known format before a file is given up


@dataclass(frozen=True)
class Format:
    name: str
    keys: tuple[str, ...]  # all needed, enough to recognise it
    convert: Callable[[Mapping], Conversation]
    more: tuple[str, ...] = ()  # other keys that it reads
    kind: str = "text"  # of the rows that it is read for, as an objective wants them


_OF_TOKENS = ("labels", "loss_mask", "attention_mask", "position_ids")
_MARGINS = ("margin", "score_chosen", "score_rejected")
FORMATS = {
    form.name: form
    for form in (
        Format("tokens", ("input_ids",), conversations.ready_tokens, _OF_TOKENS),
        Format("messages", ("messages",), conversations.messages, ("tools",)),
        Format("sharegpt", ("conversations",), conversations.sharegpt, ("system", "tools")),
        Format("alpaca", ("instruction", "output"), conversations.alpaca, ("input", "history", "system")),
        Format("prompt_completion", ("prompt", "completion"), conversations.prompt_completion, ("tools",)),
        Format("text", ("text",), conversations.plain_text),
        Format("preference_sharegpt", ("conversations", "chosen", "rejected"), preferences.sharegpt_preference,
               ("system", "tools", *_MARGINS), "pairs"),
        Format("preference_alpaca", ("instruction", "chosen", "rejected"), preferences.alpaca_preference,
               ("input", "history", "system", *_MARGINS), "pairs"),
        Format("preference", ("chosen", "rejected"), preferences.preference,
               ("prompt", "system", "tools", *_MARGINS), "pairs"),
        Format("unpaired", ("prompt", "completion", "label"), unpaired.unpaired, ("system", "tools"), "unpaired"),
        Format("unpaired_messages", ("messages", "label"), unpaired.unpaired_messages, ("tools",), "unpaired"),
        Format("unpaired_sharegpt", ("conversations", "label"), unpaired.unpaired_sharegpt, ("system", "tools"),
               "unpaired"),
        Format("prompt", ("prompt",), prompts.prompt, ("tools",), "prompts"),
        Format("prompt_messages", ("messages",), prompts.prompt_messages, ("tools",), "prompts"),
        Format("labelled", ("text", "label"), labelled.texts("text", second="text_pair"), ("text_pair",), "labelled"),
        Format("several_labels", ("text", "labels"), labelled.texts("text", label="labels"), (), "labelled"),
        Format("labelled_messages", ("messages", "label"), labelled.conversation, ("tools",), "labelled"),
        Format("sentence_pair", ("sentence1", "sentence2", "label"), labelled.texts("sentence1", "sentence2"), (),
               "labelled"),
        Format("premise", ("premise", "hypothesis", "label"), labelled.texts("premise", "hypothesis"), (), "labelled"),
        Format("question_pair", ("question1", "question2", "label"), labelled.texts("question1", "question2"), (),
               "labelled"),
        Format("question_sentence", ("question", "sentence", "label"), labelled.texts("question", "sentence"), (),
               "labelled"),
        Format("sentence", ("sentence", "label"), labelled.texts("sentence"), (), "labelled"),
        Format("ner_tags", ("tokens", "ner_tags"), labelled.tagged("ner_tags"), (), "tagged"),
        Format("tags", ("tokens", "tags"), labelled.tagged("tags"), (), "tagged"),
        Format("token_labels", ("tokens", "labels"), labelled.tagged("labels"), (), "tagged"),
    )
}  # fmt: skip


def of_kind(kind: str) -> list[Format]:
    """The formats of rows that an objective of this kind reads."""
    kind = SAME_ROWS.get(kind, kind)
    return [form for form in FORMATS.values() if form.kind == kind]


# ---------------------------------------------------------------------------- recognising


def renamed(values: Mapping, columns: Mapping[str, str]) -> dict:
    """The row with the columns of the user's map under the names that the formats know."""
    if not columns:
        return dict(values)
    taken = set(columns.values())
    return {k: v for k, v in values.items() if k not in taken} | {
        k: values[c] for k, c in columns.items() if c in values
    }


def recognise(values: Mapping, place: str, columns: Mapping[str, str], kind: str = "text") -> Format:
    """The first format of this kind all of whose keys the row has."""
    absent = [column for column in columns.values() if column not in values]
    if absent:
        raise DataError(f"data.columns: {place} has no column {absent[0]!r}; it has {_keys(values)}")
    row = renamed(values, columns)
    for form in of_kind(kind):
        if all(key in row for key in form.keys):
            return form
    known = "; ".join(f"{form.name}: {', '.join(form.keys)}" for form in of_kind(kind))
    raise DataError(
        f"{place}: the row's keys {_keys(values)} are of no known format ({known}). "
        f"Name the columns, for example data.columns='{EXAMPLES.get(SAME_ROWS.get(kind, kind), EXAMPLES['text'])}'."
    )


def _keys(values: Mapping) -> str:
    shown = json.dumps([str(key)[:40] for key in sorted(values, key=str)[:20]])
    return shown[:-1] + (", ...]" if len(values) > 20 else "]")


def wrong_columns(columns: Mapping[str, str]) -> str | None:
    """What is wrong with the user's map, as far as that can be said without a row."""
    known = sorted({key for form in FORMATS.values() for key in (*form.keys, *form.more)})
    unknown = [key for key in columns if key not in known]
    return f"data.columns: no format has a key {unknown[0]!r}; known are {', '.join(known)}" if unknown else None


def first_recognised(
    rows: Iterator[Row], columns: Mapping[str, str], kind: str = "text"
) -> tuple[Format, list[Row]]:  # fmt: skip
    """The format that the first row with the keys of one tells, and the rows taken up to it; a bad row may come first.

    DataError, about the very first row, where none tells one.
    """
    if problem := wrong_columns(columns):
        raise DataError(problem)
    taken, wrong = [], []
    for row in islice(rows, UNRECOGNISED):
        taken.append(row)
        try:
            if row.fault is not None:
                raise DataError(f"{row.place}: {row.fault}")
            return recognise(row.values, row.place, columns, kind), taken
        except DataError as error:
            wrong.append(error)
    raise wrong[0] from None


def converted(row: Row, form: Format, columns: Mapping[str, str]) -> Conversation:
    """What a row of this format says; BadRow where it cannot be understood."""
    if row.fault is not None:
        raise BadRow("format", row.fault)
    values = renamed(row.values, columns)
    absent = [key for key in form.keys if key not in values]
    if absent:
        raise BadRow("format", f"no {absent[0]!r}, which {form.name} rows have; the row has {_keys(row.values)}")
    return form.convert(values)
