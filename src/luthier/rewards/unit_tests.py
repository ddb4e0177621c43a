"""Reward: the code in the answer passes the row's unit tests, in a separate, limited process."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ..errors import RewardError
from .reward import NOTHING, Completed, Given, Reward, Rewarding

FENCE = re.compile(r"^[ \t]*(```|~~~)[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1|\Z)", re.S | re.M)
MOST = 1000  # pieces of tests of one row; what passes is told through a pipe that holds some 1,500 lines
PYTHON = ("python", "py", "python3")


class UnitTests(Rewarding):
    """1 where the code in the answer passes all of the row's tests, else 0, or the share of them that it passes.

    What the answer does wrong, running for ever included, is a failed test. A test that is no Python, or a process that
    cannot be started, is an error.
    """

    kind: Literal["tests"] = "tests"
    column: str = Field("tests", min_length=1)
    """Of the data: Python that raises where the code is wrong, or a list of such pieces."""
    entry_point_column: str = Field("entry_point", min_length=1)
    """Of the data, where the row has it: the name of the function that the tests' own `check` is called with."""
    prefix_column: str | None = None
    """Of the data: Python that stands before the answer's, such as imports, or a prompt that it goes on with."""
    partial_credit: bool = False
    """Of a list of tests, the share that passes."""
    cpu_seconds: float = Field(5.0, gt=0, allow_inf_nan=False)
    """Processor time for one answer."""
    wall_seconds: float = Field(20.0, gt=0, allow_inf_nan=False)
    """Time by the clock for one answer; the process is then ended, and what has not passed has failed."""
    memory_mb: int = Field(1024, ge=64)
    """Address space of the process."""
    num_proc: int = Field(2, ge=1)
    """Answers whose tests run at once."""
    confine: bool = True
    """Refuse to run code where the system cannot keep it from files, network and other processes."""

    def build(self, given: Given = NOTHING) -> Reward:
        from concurrent.futures import ThreadPoolExecutor

        def score(completed: Sequence[Completed]) -> list[float]:
            with ThreadPoolExecutor(self.num_proc) as pool:
                return list(pool.map(self._one, completed))

        return score

    def _one(self, answer: Completed) -> float:
        from .sandbox import Limits, passed

        try:
            tests, entry_point = self._tests(answer)
            prefix = self._prefix(answer)
            limits = Limits(self.cpu_seconds, self.wall_seconds, self.memory_mb, self.confine)
            found = passed(prefix + code(answer.completion), tests, entry_point, limits)
        except (RewardError, OSError) as error:
            raise RewardError(f"reward {self.called!r}, row {answer.row}: {error}") from error
        return sum(found) / len(found) if self.partial_credit else float(all(found))

    def _tests(self, answer: Completed) -> tuple[list[str], str | None]:
        from .scoring import column

        found = column(answer, self.column)
        tests = found if isinstance(found, list) else [found]
        if not tests or not all(isinstance(test, str) and test.strip() for test in tests):
            raise RewardError(f"column {self.column!r} is {found!r:.80}: expected Python, or a list of pieces of it")
        if len(tests) > MOST:
            raise RewardError(f"column {self.column!r} has {len(tests)} pieces, more than {MOST}: put some together")
        entry_point = answer.columns.get(self.entry_point_column)
        if entry_point is not None and not (isinstance(entry_point, str) and entry_point.isidentifier()):
            raise RewardError(f"column {self.entry_point_column!r} is {entry_point!r:.80}: expected a function's name")
        checks = [_defines_check(test, self.column) for test in tests]
        if any(checks) and entry_point is None:
            raise RewardError(
                f"the tests define `check`, which nothing calls: the data has no column {self.entry_point_column!r}"
            )
        if entry_point is not None and not all(checks):
            if any(checks):
                raise RewardError(f"some pieces of column {self.column!r} define `check`, and some do not")
            entry_point = None  # they call it by its name
        return tests, entry_point

    def _prefix(self, answer: Completed) -> str:
        from .scoring import column

        if self.prefix_column is None:
            return ""
        prefix = column(answer, self.prefix_column)
        if not isinstance(prefix, str):
            raise RewardError(f"column {self.prefix_column!r} is {prefix!r:.80}: expected Python")
        return prefix if prefix.endswith("\n") else prefix + "\n"


def code(completion: str) -> str:
    """The last block of Python between fences, else the last block of no named language, else the whole answer."""
    blocks = [(m[2].lower(), m[3]) for m in FENCE.finditer(completion)]
    of_python = [text for language, text in blocks if language in PYTHON]
    unnamed = [text for language, text in blocks if not language]
    if of_python or unnamed:
        return (of_python or unnamed)[-1]
    return completion


def _defines_check(test: str, column: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = ast.parse(test)
            compile(made, "<tests>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RewardError(f"column {column!r} is no Python: {error}") from None
    return any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in made.body)
