"""Reward: a function of the user's, `f(prompt, completion, **columns) -> float`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from ..errors import ConfigError, RewardError
from .reward import Completed, Given, PerCompletion

REMEDY = "give it with --reward FILE.py:FUNCTION, or as rewards={name: function} in Python"


class Function(PerCompletion):
    """What the function of this name gives, which a configuration cannot hold: it comes with the command or the call.

    The function gets the prompt, the answer, and those of the row's columns that it has parameters for; all of them
    where it takes `**columns`.
    """

    kind: Literal["function"] = "function"
    name: str | None = Field(min_length=1)
    """Of the function."""
    timeout: float = Field(30.0, gt=0, allow_inf_nan=False)
    """Seconds that one call may take; more is an error that names the row."""

    def scorer(self, given: Given) -> Callable[[Completed], Any]:
        function = given.functions.get(self.called)
        if function is None:
            has = f" (given: {', '.join(sorted(given.functions))})" if given.functions else ""
            raise ConfigError(f"objective.rewards: the function {self.called!r} was not given{has}: {REMEDY}")
        wanted, everything = parameters(function)

        def score(answer: Completed) -> Any:
            columns = answer.columns if everything else {k: v for k, v in answer.columns.items() if k in wanted}
            for taken in ("prompt", "completion"):
                if taken in columns:
                    raise RewardError(
                        f"the data has a column {taken!r}, which is the name of what the function is given: "
                        "call that column otherwise"
                    )
            return function(answer.prompt, answer.completion, **columns)

        return score


def parameters(function: Callable) -> tuple[set[str], bool]:
    """The columns that a function takes by name, and whether it takes all."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C
        return set(), False
    named = [p.name for p in found[2:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return set(named), any(p.kind is p.VAR_KEYWORD for p in found)
