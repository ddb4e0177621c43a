"""Tokens to text as they come: no character is cut, and what may become a stop text is held back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 6  # tokens before a new one that its text may depend on
LONGEST = 64  # tokens that are kept where none of them begins a character
BROKEN = "\ufffd"  # what the first bytes of a character are shown as


class Texts:
    """The text of one answer; `add` gives what can be shown after a token, and whether a stop text came."""

    def __init__(self, tokenizer: Any, stop_texts: Sequence[str] = (), keeps_special: bool = False):
        self.tokenizer, self.stop_texts, self.skips = tokenizer, tuple(stop_texts), not keeps_special
        self.tokens: list[int] = []  # with what the text of the next one depends on
        self.read = 0  # so many of them are in `known`
        self.known = ""
        self.held = ""  # decoded, not shown
        self.stopped: str | None = None  # the stop text that came

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=self.skips)

    def add(self, token: int) -> str:
        self.tokens.append(token)
        text = self._decode(self.tokens)
        if text.endswith(BROKEN) and len(self.tokens) - self.read < 4:  # no character has more bytes than 4
            return ""
        return self._show(text)

    def end(self) -> str:
        """What is left, when no token comes any more."""
        shown = self._show(self._decode(self.tokens)) if len(self.tokens) > self.read else ""
        if self.stopped is None:
            shown, self.held = shown + self.held, ""
        return shown

    def _show(self, text: str) -> str:
        start = len(self.known) if text.startswith(self.known) else _common(text, self.known)
        self.held += text[start:]
        self.known, self.read = text, len(self.tokens)
        if len(self.tokens) > 2 * CONTEXT:
            self._forget()
        found = [(at, stop) for stop in self.stop_texts if (at := self.held.find(stop)) >= 0]
        if found:
            at, self.stopped = min(found)
            shown, self.held = self.held[:at], ""
            return shown
        keep = max((_overlap(self.held, stop) for stop in self.stop_texts), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def _forget(self) -> None:
        """Tokens that the text of the next one does not depend on; never the first bytes of a character."""
        for kept in range(CONTEXT, 2 * CONTEXT):
            text = self._decode(self.tokens[-kept:])
            if (text and self.known.endswith(text)) or len(self.tokens) > LONGEST:
                self.tokens, self.known, self.read = self.tokens[-kept:], text, kept
                return


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _common(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
