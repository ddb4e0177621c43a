"""The learning rate as a pure function of the step, or, on a plateau, of the evaluations so far as well."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..figures import greater_is_better
from . import (
    Constant,
    Cosine,
    CosineWithRestarts,
    InverseSqrt,
    Polynomial,
    ReduceLROnPlateau,
    Schedule,
    WarmupStableDecay,
)

if TYPE_CHECKING:
    from torch import Tensor


def steps_of(share: float, total: int) -> int:
    """A share of the steps below 1, or a number of steps, as steps."""
    return math.ceil(share * total) if share < 1 else int(share)


def factor(schedule: Schedule, step: int, total: int) -> float:
    """What the peak rate is multiplied by at `step`, counted from 0, of `total`.

    The warm-up starts at 1 / warm-up, so that the first step moves. What falls is at 1 at the first step after it and
    would be at its end at the step after the last. On a plateau: before any reduction.
    """
    warmup = steps_of(schedule.warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    if isinstance(schedule, Constant | ReduceLROnPlateau):
        return 1.0
    if isinstance(schedule, InverseSqrt):
        timescale = schedule.timescale or warmup or 10_000
        return math.sqrt(timescale / (timescale + step - warmup))
    return schedule.min_ratio + (1 - schedule.min_ratio) * _fall(schedule, step, warmup, total)


def _fall(schedule: Schedule, step: int, warmup: int, total: int) -> float:
    """From 1 to 0."""
    if isinstance(schedule, WarmupStableDecay):
        falling = steps_of(schedule.decay, total)
        share = max(0.0, (step - (total - falling)) / falling)
        return {"linear": 1 - share, "cosine": _cosine(share), "1-sqrt": 1 - math.sqrt(share)}[schedule.decay_type]
    share = (step - warmup) / max(1, total - warmup)
    if isinstance(schedule, CosineWithRestarts):
        return _cosine(share * schedule.num_cycles % 1.0)
    if isinstance(schedule, Cosine):
        return _cosine(share)
    return (1 - share) ** (schedule.power if isinstance(schedule, Polynomial) else 1.0)


def _cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


def curve(schedule: Schedule, total: int) -> list[float]:
    """The factor of every step, for drawing."""
    return [factor(schedule, step, total) for step in range(total)]


def problems(schedule: Schedule, total: int | None) -> list[str]:
    """What is wrong with a schedule for a run of `total` steps, or of a number that is not known yet."""
    found, parts = [], {"warmup": schedule.warmup}
    if isinstance(schedule, WarmupStableDecay):
        parts["decay"] = schedule.decay
    for name, value in parts.items():
        if isinstance(value, float) and value >= 1:
            found.append(f"schedule.{name}={value}: a share of the steps is below 1, a number of them an integer")
    if found:
        return found
    told = " and ".join(f"schedule.{name}={value}" for name, value in parts.items())
    if total is not None:
        taken = sum(steps_of(value, total) for value in parts.values())
        if 1 <= taken >= total + ("decay" in parts):
            found.append(f"{told} take {taken} steps and leave too few of the run's {total}: give smaller ones")
        if isinstance(schedule, CosineWithRestarts) and schedule.num_cycles > max(1, total - taken):
            found.append(
                f"schedule.num_cycles={schedule.num_cycles} are more than the {total - taken} steps after the warm-up"
            )
    elif all(value < 1 for value in parts.values()) and sum(parts.values()) > 1:
        found.append(f"{told} are more than the whole run together: give smaller ones")
    return found


class Scheduler:
    """The schedule of one run, with what it has seen of the evaluations: a part of the checkpoint."""

    def __init__(self, config: Schedule, total: int):
        if found := problems(config, total):
            raise ConfigError(found)
        self.config, self.total = config, total
        self.best: float | None = None
        self.bad, self.cooling, self.ratio = 0, 0, 1.0

    def factor(self, step: int) -> float:
        """What the peak rates are multiplied by at `step`, counted from 0."""
        return factor(self.config, step, self.total) * self.ratio

    def observe(self, values: Mapping) -> bool:
        """Take the figures of an evaluation; whether the rate fell for them."""
        c = self.config
        if not isinstance(c, ReduceLROnPlateau):
            return False
        value = values.get(c.metric)
        if not isinstance(value, int | float):
            known = ", ".join(name for name, v in values.items() if isinstance(v, int | float))
            raise ConfigError(
                f"schedule.metric={c.metric!r} is not a figure of this evaluation; these are: {known}. Figures of "
                "answers need evaluation.generate, and evaluation.generate_every=true to be there each time"
            )
        if self._better(float(value)):
            self.best, self.bad = float(value), 0
        else:
            self.bad += 1
        if self.cooling:
            self.cooling, self.bad = self.cooling - 1, 0
        if self.bad <= c.patience:
            return False
        self.cooling, self.bad = c.cooldown, 0
        before, self.ratio = self.ratio, max(self.ratio * c.factor, c.min_ratio)
        return self.ratio < before

    def _better(self, value: float) -> bool:
        c = self.config
        assert isinstance(c, ReduceLROnPlateau)
        if self.best is None:
            return math.isfinite(value)
        greater = greater_is_better(c.metric) if c.mode == "auto" else c.mode == "max"
        least = c.threshold * (abs(self.best) if c.threshold_mode == "rel" else 1.0)
        return (value - self.best if greater else self.best - value) > least

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def numbers(self) -> dict:
        return {"best": self.best, "bad": self.bad, "cooling": self.cooling, "ratio": self.ratio}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping) -> None:
        self.best, self.bad = numbers["best"], numbers["bad"]
        self.cooling, self.ratio = numbers["cooling"], numbers["ratio"]
