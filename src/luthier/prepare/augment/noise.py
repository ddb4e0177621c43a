"""Noise: the base of ways that change a row's user-side texts in place; all the rest stays as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from ..views import Text, put
from .way import Draw, Given, Refused, Way

WORD = re.compile(r"\S+")
INNER = re.compile(r"\w(?:.*\w)?", re.S)  # a word without the marks around it
MARKUP = re.compile(  # what programs read: code, addresses, places to fill in, tags
    r"```.*?```|`[^`\n]+`|https?://\S+|www\.\S+|\S+@\S+|\$?\{[^{}\s]*\}|\[[A-Z_]+\]|<[^<>\s][^<>]*>|%\w\b|"
    r"\S*[/\\_]\S*",
    re.S,
)
NEGATIONS = frozenset((
    "not", "no", "never", "none", "nothing", "nobody", "nowhere", "neither", "nor", "without", "cannot",
    "nicht", "kein", "keine", "keinen", "keinem", "nie", "niemals", "ohne", "ne", "pas", "jamais", "rien", "sans",
    "aucun", "nunca", "nada", "sin", "ni", "nem", "sem", "non", "mai", "senza", "niet", "geen", "nooit", "zonder",
))  # fmt: skip
PLACES = ("answer_start", "start", "end", "start_char", "end_char", "start_offset", "end_offset")  # of no known form


class Edit(NamedTuple):
    """A stretch of a text and what comes in its place."""

    start: int
    stop: int
    text: str


def edited(text: str, edits: Sequence[Edit]) -> str:
    """The text after edits, which rise and do not overlap."""
    out, at = [], 0
    for start, stop, new in edits:
        out += [text[at:start], new]
        at = stop
    return "".join([*out, text[at:]])


def moved(edits: Sequence[Edit], start: int, stop: int) -> tuple[int, int]:
    """Where a stretch of the text is after edits; what touches an edit takes in all that came in its place."""
    first, last, shift = start, stop, 0
    for edit in edits:
        grown = len(edit.text) - (edit.stop - edit.start)
        if edit.stop <= start and not (edit.start == edit.stop == start):
            shift += grown
            first, last = start + shift, stop + shift
        elif edit.start < stop:
            if edit.start < start:
                first = edit.start + shift
            shift += grown
            last = max(stop, edit.stop) + shift
        else:
            break
    return first, last


class Noise(Way):
    """What of a text is left alone, whatever the way."""

    moves_words: ClassVar[bool] = False  # and so leaves alone those that belong to a labelled stretch
    rate: float = Field(gt=0.0, le=1.0)
    """The share that is changed of what may be: of characters, or of words. At least one in each new row."""
    protect: list[Literal["numbers", "negations", "answer", "markup"]] = ["numbers", "negations", "answer", "markup"]
    """What stays as it is: words with digits, negations, words that the row's answer or label has, and code,
    addresses and places to fill in."""
    keep: list[str] = []
    """More words that stay as they are."""

    def edits(self, text: str, free: Sequence[bool], words: Sequence[re.Match], draw: Draw, tagged: bool) -> list[Edit]:
        """The changes of a text; of its `words` [W] those that are `free` may be changed. Perhaps none."""
        raise NotImplementedError

    def changed(self, given: Given, draw: Draw) -> dict:
        texts = given.asked()
        answer = self._answer(given)
        found = [self._edits(given, text, answer, draw) for text in texts]
        if not any(found):
            raise Refused("nothing in it may be changed")
        values = given.values
        for text, edits in zip(texts, found):
            if edits:
                path = (given.column(text.path[0]), *text.path[1:])
                try:
                    values = put(values, path, edited(text.text, edits))
                except ValueError:
                    raise Refused("its words have blanks in them, and would get others' tags") from None
        return moved_spans(given, values, texts, found)

    def _edits(self, given: Given, text: Text, answer: frozenset[str], draw: Draw) -> list[Edit]:
        words = list(WORD.finditer(text.text))
        free = self.free(text.text, words, answer)
        if self.moves_words:
            held = [stretch(span) for spans in spans_of(given.values).values() for span in spans]
            free = [may and not any(a < w.end() and w.start() < b for a, b in held) for may, w in zip(free, words)]
        return self.edits(text.text, free, words, draw, is_tagged(given, text))

    def _answer(self, given: Given) -> frozenset[str]:
        """The words of the row's answers and labels."""
        if "answer" not in self.protect:
            return frozenset()
        said = [text.text for text in given.seen.texts if text.role in ("assistant", "rejected", "tool")]
        said += [value for key in ("label", "labels", "answer") for value in _strings(given.seen.values.get(key))]
        return frozenset(word for text in said for word in re.findall(r"\w+", text.casefold()))

    def free(self, text: str, words: Sequence[re.Match], answer: frozenset[str]) -> list[bool]:
        """[W] which words may be changed."""
        kept = {word.casefold() for word in self.keep}
        marked = [match.span() for match in MARKUP.finditer(text)] if "markup" in self.protect else []
        made, at = [], 0
        for word in words:
            start, stop = word.span()
            while at < len(marked) and marked[at][1] <= start:
                at += 1
            made.append(not (at < len(marked) and marked[at][0] < stop) and self._may(word[0].casefold(), kept, answer))
        return made

    def _may(self, word: str, kept: set[str], answer: frozenset[str]) -> bool:
        inner = INNER.search(word)
        if inner is None:  # marks alone
            return False
        bare = inner[0]
        if "numbers" in self.protect and any(c.isdecimal() for c in bare):
            return False
        if "negations" in self.protect and (bare in NEGATIONS or bare.endswith(("n't", "n’t"))):
            return False
        return bare not in kept and not any(part in answer for part in re.findall(r"\w+", bare))


def is_tagged(given: Given, text: Text) -> bool:
    """Whether it is a list of words, each with its tag."""
    return len(text.path) == 1 and isinstance(given.seen.values.get(text.path[0]), list)  # type: ignore[arg-type]


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


# ---------------------------------------------------------------------------- places in the text


def moved_spans(given: Given, values: dict, texts: Sequence[Text], found: Sequence[Sequence[Edit]]) -> dict:
    """The values with stretches that columns name moved to where their texts are now; Refused where one is lost."""
    made = dict(values)
    for key, spans in spans_of(values).items():
        if len(texts) != 1 or len(texts[0].path) != 1:
            raise Refused(f"{key} names places in a text, and the row has several")
        made[key] = [_moved(span, found[0], texts[0].text) for span in spans]
    return made


def spans_of(values: Mapping) -> dict[str, list]:
    """The columns that list {start, end, ...} or [start, end, label]; Refused where places are told in another way."""
    for key, value in values.items():
        if key in PLACES or (isinstance(value, Mapping) and any(name in value for name in PLACES)):
            raise Refused(f"{key} names places in a text in a form that is not known")
    return {
        key: value for key, value in values.items()
        if isinstance(value, list) and value and all(_places(span) is not None for span in value)
    }  # fmt: skip


def stretch(span: Any) -> tuple[int, int]:
    keys = _places(span)
    assert keys is not None
    return span[keys[0]], span[keys[1]]


def _places(span: Any) -> tuple[Any, Any] | None:
    """The keys of the first and the last place of a stretch."""
    if isinstance(span, Mapping):
        stop = "end" if "end" in span else "stop"
        whole = all(type(span.get(key)) is int for key in ("start", stop))
        return ("start", stop) if whole else None
    if isinstance(span, list) and len(span) > 2 and type(span[0]) is type(span[1]) is int and isinstance(span[2], str):
        return 0, 1
    return None


def _moved(span: Any, edits: Sequence[Edit], text: str) -> Any:
    start, stop = stretch(span)
    if not 0 <= start < stop <= len(text):
        raise Refused(f"a stretch from {start} to {stop} is not in the text")
    first, last = moved(edits, start, stop)
    new = edited(text, edits)
    while first < last and new[first].isspace() and not text[start].isspace():
        first += 1
    while first < last and new[last - 1].isspace() and not text[stop - 1].isspace():
        last -= 1
    if first >= last:
        raise Refused("a stretch that is labelled would be lost")
    keys: Any = _places(span)
    made: Any = dict(span) if isinstance(span, Mapping) else list(span)
    made[keys[0]], made[keys[1]] = first, last
    if isinstance(made, dict) and made.get("text") == text[start:stop]:
        made["text"] = new[first:last]
    return made
