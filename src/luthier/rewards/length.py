"""Reward: the answer is as long as it should be, and falls off on both sides of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from .reward import Completed, Given, PerCompletion


class Length(PerCompletion):
    """1 from `min` to `max` (or at `target`), falling in a straight line to 0 outside.

    With `max` and `tolerance` this is, but for a constant, the soft punishment of overlong answers (arXiv:2503.14476).
    """

    kind: Literal["length"] = "length"
    unit: Literal["tokens", "characters"] = "tokens"
    target: int | None = Field(None, ge=1)
    """The one right length."""
    min: int | None = Field(None, ge=1)
    """Or the shortest right length."""
    max: int | None = Field(None, ge=1)
    """And, or, the longest."""
    tolerance: int | None = Field(None, ge=0)
    """By how much a length may be wrong until the reward is 0; without it, by as much as the bound itself."""

    def problem(self) -> str | None:
        if self.target is None and self.min is None and self.max is None:
            return "give target, min or max"
        if self.target is not None and (self.min is not None or self.max is not None):
            return f"target={self.target} is min and max at once: leave those out"
        if self.min is not None and self.max is not None and self.min > self.max:
            return f"min={self.min} is more than max={self.max}"
        return None

    def scorer(self, given: Given) -> Callable[[Completed], float]:
        low, high = self.target or self.min, self.target or self.max

        def falls(wrong: int, bound: int) -> float:
            over = bound if self.tolerance is None else self.tolerance
            return max(0.0, 1 - wrong / over) if over else 0.0

        def score(answer: Completed) -> float:
            length = answer.tokens if self.unit == "tokens" else len(answer.completion)
            if low is not None and length < low:
                return falls(low - length, low)
            if high is not None and length > high:
                return falls(length - high, high)
            return 1.0

        return score
