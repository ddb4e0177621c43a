"""Reward: the answer is the text that the row holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from .reward import Completed, Given, PerCompletion


class ExactMatch(PerCompletion):
    """1 where the answer equals the column's text, or one of the texts that it lists; else 0."""

    kind: Literal["exact_match"] = "exact_match"
    column: str = Field("answer", min_length=1)
    """Of the data: the right text, or a list of right texts."""
    strip: bool = True
    """Leave out white space at both ends, of both."""
    ignore_case: bool = False

    def scorer(self, given: Given) -> Callable[[Completed], float]:
        from .scoring import texts

        def comparable(text: str) -> str:
            text = text.strip() if self.strip else text
            return text.casefold() if self.ignore_case else text

        def score(answer: Completed) -> float:
            wanted = {comparable(text) for text in texts(answer, self.column)}
            return float(comparable(answer.completion) in wanted)

        return score
