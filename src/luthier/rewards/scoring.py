"""Answers scored by several rewards: a column for each, and the weighted sum; whatever goes wrong names its row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

from ..errors import RewardError
from .limits import Late, within
from .reward import NOTHING, Completed, Given, Reward, Rewarding


class Built(NamedTuple):
    name: str
    weight: float
    score: Reward


class Scores(NamedTuple):
    """What N answers got."""

    columns: dict[str, list[float]]  # by reward, [N], before weighting
    totals: list[float]  # [N] the weighted sums


def build(settings: Sequence[Rewarding], given: Given = NOTHING) -> list[Built]:
    """The rewards of a configuration, ready to score."""
    return [Built(one.called, one.weight, one.build(given)) for one in settings]


def total(rewards: Sequence[Built], completed: Sequence[Completed]) -> Scores:
    """Each reward's column and the weighted sum, added up in the order of the rewards.

    RewardError, naming the reward and the row, where one fails, takes too long, or gives no finite number.
    """
    columns: dict[str, list[float]] = {}
    totals = [0.0] * len(completed)
    for name, weight, score in rewards:
        try:
            found = score(completed)
        except RewardError:
            raise
        except Exception as error:
            raise RewardError(f"reward {name!r} failed on {_rows(completed)}: {_told(error)}") from error
        if not isinstance(found, list) or len(found) != len(completed):
            got = f"{len(found)} numbers" if isinstance(found, list) else f"a {type(found).__name__}"
            raise RewardError(f"reward {name!r} gave {got} for the {len(completed)} answers to {_rows(completed)}")
        columns[name] = [number(name, one.row, value) for one, value in zip(completed, found)]
        totals = [so_far + weight * value for so_far, value in zip(totals, columns[name])]
    return Scores(columns, totals)


def each(name: str, score: Callable[[Completed], Any], seconds: float) -> Reward:
    """A reward of what `score` gives each answer within a time."""

    def scored(completed: Sequence[Completed]) -> list[float]:
        return [one(answer) for answer in completed]

    def one(answer: Completed) -> float:
        try:
            given = within(seconds, lambda: score(answer))
        except RewardError as error:
            raise RewardError(f"reward {name!r}, row {answer.row}: {error}") from error
        except Late:
            raise RewardError(
                f"reward {name!r} took more than {seconds:g} s on row {answer.row}, for {_shown(answer.completion)}: "
                "make it quicker, or give its `timeout` more"
            ) from None
        except Exception as error:
            raise RewardError(
                f"reward {name!r} failed on row {answer.row}, for {_shown(answer.completion)}: {_told(error)}"
            ) from error
        return number(name, answer.row, given)

    return scored


def number(name: str, row: int, value: Any) -> float:
    """A finite number, or RewardError; never a zero in the place of one."""
    if not isinstance(value, Real) and type(value).__name__ != "bool":  # numpy's own `bool` is no Real
        what = f"{_shown(value)} ({type(value).__name__})"
        raise RewardError(f"reward {name!r} gave {what} for row {row}: expected a number")
    if not math.isfinite(made := float(value)):
        raise RewardError(f"reward {name!r} gave {made} for row {row}: expected a finite number")
    return made


def column(answer: Completed, name: str) -> Any:
    """What the row says under a name, or RewardError."""
    if name not in answer.columns:
        has = ", ".join(sorted(map(str, answer.columns))) or "none beside the prompt"
        raise RewardError(f"the data has no column {name!r} (it has {has})")
    return answer.columns[name]


def texts(answer: Completed, name: str) -> list[str]:
    """The texts that a column holds, one or a list of them; whole numbers are written out."""
    found = column(answer, name)
    listed = found if isinstance(found, list | tuple) else [found]
    if not listed or not all(isinstance(t, str | int | float) and not isinstance(t, bool) for t in listed):
        raise RewardError(f"column {name!r} is {_shown(found)}: expected a text, a number, or a list of them")
    return [str(t) for t in listed]


def _rows(completed: Sequence[Completed]) -> str:
    rows = sorted({one.row for one in completed})
    if len(rows) > 8:
        return f"rows {rows[0]} to {rows[-1]} ({len(rows)} of them)"
    return "row " + str(rows[0]) if len(rows) == 1 else "rows " + ", ".join(map(str, rows))


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
