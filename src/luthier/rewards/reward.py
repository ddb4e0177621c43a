"""What every reward is: its settings, what it is given for each answer, and what building it may need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from ..settings import Settings

INSTALL = "`pip install 'luthier[rewards]'`"


@dataclass(frozen=True)
class Completed:
    """A prompt and one answer to it."""

    prompt: str  # the last user turn
    messages: list[dict]  # what was asked, all turns of it
    completion: str  # the answer's text, without the token that ends it
    columns: Mapping[str, Any] = field(default_factory=dict)  # what else the row of the data says
    tokens: int = 0  # of the answer, the one that ends it included
    truncated: bool = False  # it was cut before it ended
    row: int = 0  # number of the row of the data


Reward = Callable[[Sequence[Completed]], list[float]]
"""A number for each answer; RewardError where one cannot be given."""


@dataclass(frozen=True)
class Given:
    """What rewards are made with, beside their settings: nothing of it stands in a configuration."""

    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # the user's own, by name
    load_model: Callable[[Any], Reward] | None = None  # the settings of a reward model -> what scores with it


NOTHING = Given()


class Rewarding(Settings):
    """Settings of a reward. `build` makes what scores answers."""

    kind: str
    name: str | None = Field(None, min_length=1)
    """In logs and messages; the kind without it. Two rewards of one kind need names."""
    weight: float = Field(1.0, allow_inf_nan=False)
    """Factor of this reward in the sum."""

    @property
    def called(self) -> str:
        return self.name or self.kind

    def problem(self) -> str | None:
        """What is wrong with the settings as they stand together, or with what is installed."""
        return None

    def build(self, given: Given = NOTHING) -> Reward:
        raise NotImplementedError


class PerCompletion(Rewarding):
    """A reward of each answer by itself: `scorer` makes the function of one."""

    timeout: float = Field(10.0, gt=0, allow_inf_nan=False)
    """Seconds that scoring one answer may take; more is an error that names the row."""

    def scorer(self, given: Given) -> Callable[[Completed], Any]:
        raise NotImplementedError

    def build(self, given: Given = NOTHING) -> Reward:
        from .scoring import each

        return each(self.called, self.scorer(given), self.timeout)
