"""Way: the base of everything that makes new rows of given ones; what it is given, what it asks, what it gives."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b, sha256
from typing import Any, ClassVar

from pydantic import Field

from ...settings import Settings
from ..chat_client import Answer, Question
from ..encoded import dumps
from ..views import Text, View

ASKING = ("user", "text")  # the roles whose texts are a model's input


class Refused(Exception):
    """No new row can be made of this one by this way, and why."""


class Draw:
    """Numbers that names tell: the same for the same names, whoever draws and in which order."""

    def __init__(self, *names: object):
        told = "\x1f".join(map(str, names)).encode("utf-8", "surrogatepass")
        seed = int.from_bytes(blake2b(told, digest_size=16).digest(), "big")
        self.number = random.Random(seed).random  # in [0, 1)

    def below(self, count: int) -> int:
        return min(count - 1, int(self.number() * count))

    def one(self, items: Sequence) -> Any:
        return items[self.below(len(items))]

    def some(self, items: Sequence, count: int) -> list:
        """Different ones, in the order drawn; all of them where there are no more."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(min(count, len(left)))]

    def seed(self) -> int:
        """For a model that draws by itself."""
        return self.below(1 << 31)


@dataclass(frozen=True)
class Given:
    """A row of which new ones are made."""

    values: dict
    seen: View
    renamed: Mapping[str, str]  # columns of the file, by the names that formats know

    @property
    def sha256(self) -> str:
        return digest(self.values)

    def asked(self) -> list[Text]:
        """The texts that are a model's input; Refused where there are none, so that what is learnt never changes."""
        if self.seen.format == "unknown":
            raise Refused("its keys are of no known format: name the columns")
        if self.seen.format in ("text", "tokens"):
            raise Refused("all of it is learnt: it has no user's side")
        found = [text for text in self.seen.texts if text.role in ASKING and text.text.strip()]
        if not found:
            raise Refused("it has no user's side")
        return found

    def column(self, name: object) -> Any:
        """The key of the row that a format knows under a name."""
        return self.renamed.get(str(name), name)


def digest(values: Mapping) -> str:
    """Of the row's line of JSON, without its line break."""
    return sha256(dumps(values).encode("utf-8", "surrogatepass")).hexdigest()


Steps = Generator[list[Question], list[Answer], dict]
"""Yields what a model is asked, all at once, is sent the answers, and returns the new row's values."""


def nothing(place: str, key: object, make: Callable[[], Any]) -> Any:
    """Makes a value anew each time it is asked for."""
    return make()


@dataclass(frozen=True)
class Tools:
    """What ways that ask models need beside their settings."""

    sampling: Mapping[str, Any] = field(default_factory=dict)  # what the model's section says
    kept: Callable[[str, object, Callable[[], Any]], Any] = nothing  # a value of JSON, made once for a key
    score: Any = None  # rewards, ready to score
    fingerprint: Any = None  # of what scores


class Way(Settings):
    """A way's settings; `kind` names it in recipes."""

    asks: ClassVar[bool] = False  # whether it needs a model
    whole: ClassVar[bool] = False  # whether new rows differ from their parents in more than the user's side

    kind: str
    copies: int = Field(1, ge=1, le=1000)
    """New rows made of each row."""
    share: float = Field(1.0, gt=0.0, le=1.0)
    """Of the rows, those of which new ones are made; chosen by the seed."""

    def prepared(self) -> Way:
        """The way as it works in a process: what has to be read first is kept on it."""
        return self

    def told(self) -> dict:
        """Everything that decides what it makes, as JSON."""
        return self.model_dump(mode="json")

    def problem(self) -> str | None:
        """What is wrong with the settings beyond their form, such as a table that is not there."""
        return None

    def changed(self, given: Given, draw: Draw) -> dict:
        """The values of a new row, by a way that asks nothing; Refused where none can be made."""
        raise NotImplementedError

    def made(self, given: Given, draw: Draw, tools: Tools) -> Steps:
        """The same by a way that asks."""
        raise NotImplementedError
