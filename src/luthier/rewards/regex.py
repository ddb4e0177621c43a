"""Reward: a regular expression matches the answer, or finds in it what the row holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from pydantic import Field

from .reward import Completed, Given, PerCompletion


class Regex(PerCompletion):
    """1 where the pattern matches and, if a group is named, its text is that of the column; else 0."""

    kind: Literal["regex"] = "regex"
    pattern: str = Field(min_length=1)
    """As Python's `re` reads it."""
    match: Literal["search", "fullmatch"] = "search"
    """Anywhere in the answer, or the whole of it."""
    ignore_case: bool = False
    """Of the pattern, and of the group's text beside the column's."""
    dot_all: bool = False
    """A dot matches the ends of lines, too."""
    group: int | str | None = None
    """Number or name of the group that is compared with `column`, white space at its ends left out."""
    column: str | None = None
    """Of the data: the right text for `group`, or a list of right texts; `answer` without a word."""

    @property
    def flags(self) -> int:
        return (re.IGNORECASE if self.ignore_case else 0) | (re.DOTALL if self.dot_all else 0)

    def problem(self) -> str | None:
        try:
            made = re.compile(self.pattern, self.flags)
        except (re.error, RecursionError, OverflowError) as error:
            return f"pattern={self.pattern!r} is no regular expression: {error}"
        if self.column is not None and self.group is None:
            return f"column={self.column!r} is compared with a group of the pattern: give group, for example group=1"
        known = [*range(made.groups + 1), *made.groupindex]
        if self.group is not None and self.group not in known:
            return f"group={self.group!r} is none of the pattern's; it has {', '.join(map(str, known))}"
        return None

    def scorer(self, given: Given) -> Callable[[Completed], float]:
        from .scoring import texts

        made, group = re.compile(self.pattern, self.flags), self.group

        def comparable(text: str) -> str:
            return text.strip().casefold() if self.ignore_case else text.strip()

        def score(answer: Completed) -> float:
            wanted = None if group is None else {comparable(text) for text in texts(answer, self.column or "answer")}
            found = getattr(made, self.match)(answer.completion)
            if wanted is None or found is None or group is None:
                return float(found is not None)
            return float(found[group] is not None and comparable(found[group]) in wanted)

        return score
