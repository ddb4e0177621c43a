"""Reward: the answer means the same as the row's, as mathematics."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from typing import Any, Literal, cast

from pydantic import Field

from ..errors import RewardError
from .reward import INSTALL, Completed, Given, PerCompletion

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?:/\d+(?!\.?\d))?")


class Mathematics(PerCompletion):
    """1 where the answer is mathematically equal to the column's; else 0.

    The last expression of the answer counts, a boxed one before others. Math-Verify reads LaTeX and plain expressions.
    """

    kind: Literal["math"] = "math"
    column: str = Field("answer", min_length=1)
    """Of the data: the right value, LaTeX or plain."""
    numbers_only: bool = False
    """Compare the last number of both, exactly, and nothing else; needs no library."""

    def problem(self) -> str | None:
        if not self.numbers_only and find_spec("math_verify") is None:
            return f"it needs the library math-verify: {INSTALL}, or numbers_only=true"
        return None

    def scorer(self, given: Given) -> Callable[[Completed], float]:
        from .scoring import texts

        equal = _numbers_equal if self.numbers_only else _verifier()

        def score(answer: Completed) -> float:
            return float(any(equal(wanted, answer.completion, self.column) for wanted in texts(answer, self.column)))

        return score


def last_number(text: str) -> Fraction | None:
    """The last number of a text as an exact value: 1,234.50, 3/4, 1e-3; None where there is none."""
    found = [m[0] for m in NUMBER.finditer(text) if any(c.isdigit() for c in m[0])]
    if not found:
        return None
    above, _, below = found[-1].replace(",", "").partition("/")
    if below and not int(below):
        return None
    return Fraction(above) / int(below or 1)


def _numbers_equal(wanted: str, answer: str, column: str) -> bool:
    number = last_number(wanted)
    if number is None:
        raise RewardError(f"column {column!r} has no number: {wanted[:80]!r}")
    return last_number(answer) == number


def _verifier() -> Callable[[str, str, str], bool]:
    import logging

    import math_verify

    verify, parse = math_verify.verify, cast(Any, math_verify.parse)  # which takes None, but does not say so

    # It logs what it cannot read, which in an answer is no fault. Its own limits of time are alarms, as is ours.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def parsed(text: str) -> list[Any]:
        return parse(text, parsing_timeout=None)

    def equal(wanted: str, answer: str, column: str) -> bool:
        gold = parsed(wanted) or parsed(f"${wanted}$")
        if not gold:
            raise RewardError(f"column {column!r} cannot be read as mathematics: {wanted[:80]!r}")
        return bool(verify(gold, parsed(answer), timeout_seconds=None))

    return equal
