"""What of a row is text, in which role and where, as its format tells it; and how a changed text is put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ..data.conversations import SHAREGPT_ROLES
from ..data.formats import FORMATS, Format
from ..data.preferences import MESSAGES
from ..data.readers import parse_json
from ..data.sources import Row
from .encoded import dumps

Path = tuple[str | int, ...]  # keys and places from the row's values down to a text; a text of JSON is stepped into
UNKNOWN = "unknown"  # the format of rows that training would not read without data.columns
_MARKS = b" \t\n.,-/()+:"
_DIGITS = bytes(48 if 48 <= i <= 57 else 46 if i == 46 else 32 for i in range(256))
APART = bytes(  # small letters, and blanks for marks; an apostrophe and a hyphen are parts of words
    i + 32 if 65 <= i <= 90 else 32 if chr(i) in '.,;:!?()[]{}<>"*_#/|\t\r\n' else i for i in range(256)
)
_TOKENS = bytes(120 if chr(i).isalnum() or chr(i) in "_-+/=.~:@!#%^&*" else 32 for i in range(128)) + b" " * 128


class Text(NamedTuple):
    """A text of a row. Roles: system, user, assistant, tool; rejected (an answer not to be learnt); text (no roles)."""

    path: Path
    role: str
    text: str


class Runs(NamedTuple):
    """What a row's texts have at all: most have none of it, and need no search for numbers of people or for secrets."""

    digits: bool  # seven of them with only marks in between
    address: bool  # numbers parted by dots, or colons, as addresses on networks have
    token: bool  # sixteen characters such as keys are made of


class View:
    """A row as checks see it: its texts, and where it stands."""

    __slots__ = ("_data", "_runs", "_words", "format", "language", "number", "place", "texts", "values")

    def __init__(self, values: dict, texts: list[Text], format: str, number: int = -1, place: str = ""):
        self.values, self.texts, self.format = values, texts, format
        self.number, self.place = number, place  # the number counts in its piece; the audit tells that in the whole
        self.language: str | None = None  # once it was found, for all who ask
        self._data: bytes | None = None
        self._words: list[bytes] | None = None
        self._runs: Runs | None = None

    def data(self) -> bytes:
        """All texts end to end, in UTF-8: bytes are searched and changed fastest."""
        if self._data is None:
            self._data = "\n".join([text.text for text in self.texts]).encode("utf-8", "surrogatepass")
        return self._data

    def words(self) -> list[bytes]:
        """All words, ASCII letters small, without the marks around them."""
        if self._words is None:
            self._words = self.data().translate(APART).split()
        return self._words

    def runs(self) -> Runs:
        if self._runs is None:
            data = self.data()
            self._runs = Runs(
                b"0000000" in data.translate(_DIGITS, _MARKS),
                data.translate(_DIGITS).count(b"0.0") > 1 or data.count(b":") > 2,
                b"x" * 16 in data.translate(_TOKENS),
            )
        return self._runs

    def joined(self) -> str:
        """All texts with their roles, for what compares whole rows."""
        return "\x1e".join([f"{text.role}\x1f{text.text}" for text in self.texts])


def view(values: dict, number: int = -1, place: str = "") -> View:
    """The texts of a row. One that training would not recognise has all its columns of text."""
    form, tell = _telling(tuple(values))
    texts: list[Text] = []
    for key, told in tell:
        value = values.get(key)
        if not isinstance(told, str):
            told(key, value, texts)
        elif type(value) is str:
            if value:
                texts.append(Text((key,), told, value))
        elif value is not None:
            _leaves((key,), value, told, texts)
    return View(values, texts, form, number, place)


def viewed(row: Row) -> View:
    return view(row.values, row.number, row.place)


def put(values: dict, path: Path, text: str) -> dict:
    """The values with another text at `path`; what is changed is copied, the rest shared. ValueError if it cannot."""
    return _put(values, path, text)


def _put(value: Any, path: Path, text: str) -> Any:
    if not path:
        if isinstance(value, list):  # words: as many after as before, so that their tags still fit
            words = text.split(" ")
            if len(words) != len(value):
                raise ValueError("the number of words would change")
            return words
        return text
    if isinstance(value, str):
        return dumps(_put(parse_json(value), path, text))
    made = dict(value) if isinstance(value, Mapping) else list(value)
    made[path[0]] = _put(value[path[0]], path[1:], text)  # type: ignore[index]
    return made


# ---------------------------------------------------------------------------- texts by format


def _turns(key: str, value: object, texts: list[Text], said: str = "assistant") -> None:
    """Messages or turns of ShareGPT, perhaps as a text of JSON."""
    if isinstance(value, str):
        value = _parsed(value) or []
    turns = [((key,), value)] if isinstance(value, Mapping) else [((key, i), t) for i, t in enumerate(_listed(value))]
    for path, turn in turns:
        if not isinstance(turn, Mapping):
            continue
        role = turn.get("role")
        if role is None:
            role = SHAREGPT_ROLES.get(str(turn.get("from")).lower(), "user")
        role = said if role == "assistant" else role if isinstance(role, str) else "user"
        for name in ("content", "value"):
            content = turn.get(name)
            if type(content) is str:
                if content:
                    texts.append(Text((*path, name), role, content))
            elif content is not None:
                _leaves((*path, name), content, role, texts)
        if (calls := turn.get("tool_calls")) is not None:
            _leaves((*path, "tool_calls"), calls, role, texts, of=("arguments",))


def _asked(key: str, value: object, texts: list[Text]) -> None:
    """A prompt: what the user says, or messages."""
    if isinstance(value, str):
        if value:
            texts.append(Text((key,), "user", value))
    else:
        _turns(key, value, texts)


def _answers(key: str, value: object, texts: list[Text], role: str = "assistant") -> None:
    """An answer: a text, a message or several. Of pairs, a text may be JSON that holds messages."""
    if isinstance(value, str) and (key == "completion" or not MESSAGES.match(value) or _parsed(value) is None):
        if value:
            texts.append(Text((key,), role, value))
    else:
        _turns(key, value, texts, role)


def _rejected(key: str, value: object, texts: list[Text]) -> None:
    _answers(key, value, texts, "rejected")


def _history(key: str, value: object, texts: list[Text]) -> None:
    for place, pair in enumerate(_listed(_parsed(value) if isinstance(value, str) else value)):
        for which, (role, text) in enumerate(zip(("user", "assistant"), _listed(pair))):
            if isinstance(text, str) and text:
                texts.append(Text((key, place, which), role, text))


def _words(key: str, value: object, texts: list[Text]) -> None:
    if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
        texts.append(Text((key,), "text", " ".join(value)))


def _leaves(path: Path, value: object, role: str, texts: list[Text], of: Sequence[str] | None = None) -> None:
    """Texts inside lists and objects; with `of` only below these keys. The marks of parts (`type`) are no texts."""
    if isinstance(value, str):
        if value and of is None:
            texts.append(Text(path, role, value))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key != "type" or (of is None and not isinstance(inner, str)):
                _leaves((*path, key), inner, role, texts, None if of is not None and key in of else of)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            _leaves((*path, place), inner, role, texts, of)


def _listed(value: object) -> list:
    return value if isinstance(value, list) else []


def _parsed(text: str) -> list | dict | None:
    """The list or object that a text of JSON is; None of any other."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        found = parse_json(text)
    except ValueError:
        return None
    return found if isinstance(found, list | dict) else None


Told = str | Callable[[str, object, list[Text]], None]
TOLD: dict[str, Told] = {  # by column; what a format reads and is not here is no text (labels, margins, numbers)
    "messages": _turns, "conversations": _turns, "prompt": _asked, "completion": _answers, "chosen": _answers,
    "rejected": _rejected, "instruction": "user", "input": "user", "output": "assistant", "history": _history,
    "system": "system", "text": "text", "text_pair": "text", "sentence": "text", "sentence1": "text",
    "sentence2": "text", "premise": "text", "hypothesis": "text", "question": "text", "question1": "text",
    "question2": "text", "tokens": _words,
}  # fmt: skip
NO_TEXT = ("tools", "label", "labels", "input_ids", "ner_tags", "tags", "_source", "_parent")


def format_of(keys: Sequence[str]) -> Format | None:
    """The format of most keys among those whose keys are all there, of any kind of row."""
    there = set(keys)
    fitting = [form for form in FORMATS.values() if there.issuperset(form.keys)]
    return max(fitting, key=lambda form: len(form.keys), default=None)


@lru_cache(maxsize=4096)
def _telling(keys: tuple[str, ...]) -> tuple[str, list[tuple[str, Told]]]:
    """The format's name, and the columns of text in the order of a conversation."""
    form = format_of(keys)
    if form is None:
        return UNKNOWN, [(key, "text") for key in keys if key not in NO_TEXT]
    read = {*form.keys, *form.more}
    return form.name, [(key, told) for key, told in _in_order(read) if key in keys]


def _in_order(read: set[str]) -> Iterator[tuple[str, Told]]:
    order = ("system", "history", "prompt", "instruction", "input")
    yield from ((key, TOLD[key]) for key in order if key in read)
    yield from ((key, told) for key, told in TOLD.items() if key in read and key not in order)
