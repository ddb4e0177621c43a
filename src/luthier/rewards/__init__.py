"""Rewards: what an answer is worth, a settings class for each kind; nothing here needs PyTorch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .exact_match import ExactMatch
from .function import Function
from .json_value import JsonSchema, JsonValue
from .length import Length
from .mathematics import Mathematics
from .regex import Regex
from .reward import Completed, Given, PerCompletion, Reward, Rewarding
from .reward_model import RewardModel
from .unit_tests import UnitTests

__all__ = [
    "Completed", "ExactMatch", "Function", "Given", "JsonSchema", "JsonValue", "Length", "Mathematics", "PerCompletion",
    "Regex", "Reward", "RewardModel", "RewardSettings", "Rewarding", "Rewards", "UnitTests", "faults", "with_functions",
]  # fmt: skip

_Kinds = Annotated[
    ExactMatch | Regex | JsonValue | JsonSchema | Length | Mathematics | UnitTests | RewardModel | Function,
    Field(discriminator="kind"),
]
_Bare = Literal["exact_match", "json", "math", "tests"]  # those that need no setting


def _of_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


RewardSettings = Annotated[_Kinds, BeforeValidator(_of_kind, json_schema_input_type=_Kinds | _Bare)]
"""One reward; a string stands for a kind."""
Rewards = list[RewardSettings]
"""What `objective.rewards` is."""


def faults(rewards: Sequence[Rewarding], place: str = "objective.rewards") -> list[str]:
    """What is wrong with rewards as they stand together."""
    found = [f"{place}[{i}]: {text}" for i, one in enumerate(rewards) if (text := one.problem())]
    often = [name for name, count in Counter(one.called for one in rewards).items() if count > 1]
    found += [f"{place}: {name!r} is there twice: give each a name of its own" for name in often]
    if rewards and not any(one.weight for one in rewards):
        found.append(f"{place}: every weight is 0, so nothing is rewarded")
    return found


def with_functions(rewards: Sequence[Rewarding], names: Sequence[str]) -> list[Rewarding]:
    """The rewards and, with weight 1, those functions that were given beside the configuration but stand not in it."""
    known = {one.called for one in rewards if isinstance(one, Function)}
    return [*rewards, *(Function(name=name) for name in names if name not in known)]
