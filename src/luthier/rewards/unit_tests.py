"""Reward: the code in the answer passes the row's unit tests, in a separate, limited process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from .reward import Completed, Given, PerCompletion


class UnitTests(PerCompletion):
    """The share of the row's tests that the code in the answer passes: 1 for all, 0 for none.

    What the answer does wrong, running for ever included, is a failed test. A test that is no Python, or a process that
    cannot be started, is an error.
    """

    kind: Literal["tests"] = "tests"
    column: str = Field("tests", min_length=1)
    """Of the data: Python that raises where the code is wrong, or a list of such pieces."""
    entry_point_column: str | None = "entry_point"
    """Of the data, where the row has it: the function that is given to the `check` that the tests define."""
    prefix_column: str | None = None
    """Of the data: Python that stands before the answer's, such as imports, or the prompt that it goes on with."""
    cpu_seconds: float = Field(5.0, gt=0, allow_inf_nan=False)
    """Processor time of one answer's tests."""
    wall_seconds: float = Field(15.0, gt=0, allow_inf_nan=False)
    """Time by the clock of one answer's tests."""
    memory_mb: int = Field(512, ge=64)
    """Address space of the process."""
    timeout: float = Field(60.0, gt=0, allow_inf_nan=False)
    """Seconds after which scoring an answer is given up as an error, the process's own limits having failed."""

    def scorer(self, given: Given) -> Callable[[Completed], float]:
        raise NotImplementedError
