"""JSON read bit by bit: the values of a long list one at a time, without holding the file."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

from ...data.readers import DECODER
from .base import Unreadable

BLOCK = 1 << 20
LONGEST = 64 << 20  # characters of one value
BLANK = " \t\n\r"
AFTER = {*BLANK, ",", "]", "}"}  # what tells that a number is whole: 0 may be the beginning of 0.5


class Stream:
    """A place in a text of JSON. Values are asked for whole, or lists and objects are stepped into."""

    def __init__(self, file: Any, block: int = BLOCK):
        self.block = block  # bytes that are read at a time
        self.file, self.text, self.at, self.ended = file, "", 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def _more(self, times: int = 1) -> bool:
        """Read on; False at the end."""
        if self.ended:
            return False
        block = self.file.read(self.block * times)
        self.ended = not block
        try:
            self.text = self.text[self.at :] + self.decoder.decode(block, self.ended)
        except UnicodeDecodeError:
            raise Unreadable("JSON that is not UTF-8; save it as UTF-8") from None
        self.at = 0
        return not self.ended

    def peek(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in BLANK:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self, wanted: str) -> str:
        """The next character, one of these."""
        found = self.peek()
        if not found or found not in wanted:
            raise Unreadable(f"not JSON: {found or 'the end'!r} where one of {wanted} belongs")
        self.at += 1
        return found

    def value(self) -> Any:
        """The next value as a whole."""
        self.peek()
        times = 1
        while True:
            try:
                made, end = DECODER.raw_decode(self.text, self.at)
                if self.ended or self.text[end - 1] in '"]}' or self.text[end : end + 1] in AFTER:
                    self.at = end
                    return made
            except RecursionError:
                raise Unreadable("JSON that is nested too deeply") from None
            except ValueError as error:
                if self.ended:
                    raise Unreadable(f"not JSON: {error}") from None
            if len(self.text) - self.at > LONGEST:
                raise Unreadable(f"one value of JSON is longer than {LONGEST >> 20} MiB, or not JSON")
            self._more(times)
            times *= 2  # so that a long value is looked through a few times only

    def items(self) -> Iterator[int]:
        """Steps into a list: the number of each item, which the caller then takes."""
        self.take("[")
        if self.peek() == "]":
            self.at += 1
            return
        number = 0
        while True:
            yield number
            number += 1
            if self.take(",]") == "]":
                return

    def fields(self) -> Iterator[str]:
        """Steps into an object: each key, whose value the caller then takes."""
        self.take("{")
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            if self.peek() != '"':
                raise Unreadable("not JSON: an object's key belongs between quotes")
            name = self.value()
            self.take(":")
            yield name
            if self.take(",}") == "}":
                return

    def end(self) -> None:
        if self.peek():
            raise Unreadable("more text after the JSON")
