"""Alarms: pure functions of a run's curves that say what is wrong with them, and a watch that says each once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pydantic import Field

from ..settings import Settings

SIGMA = 1.4826  # a normal deviate's standard deviation in median absolute deviations
LEAST = 20  # values before one can be called unusual
NATS = 0.05  # the least spread that a loss is taken to have: below it, hard rows are no spikes
BELOW = 5  # steps in a row with a small gradient
SLOW = 10  # steps in a row that are slow, and the least seconds that they took together
QUIET = 10  # steps without the condition that end an episode


class Alarms(Settings):
    """When a curve is worth a warning; null switches an alarm off. They warn and never change the training."""

    window: int = Field(100, ge=LEAST)
    """Steps that a new value is compared with."""
    spike: float | None = Field(10.0, gt=0)
    """Loss: so many robust standard deviations (1.4826 x the median absolute deviation) above the median."""
    stuck: int | None = Field(20, ge=2)
    """So many steps with the very same loss, or with a learning rate of 0."""
    vanishing: float | None = Field(1e-3, gt=0, lt=1)
    """Gradient norm: below this share of its median for 5 steps, or 0."""
    exploding: float | None = Field(100.0, gt=1)
    """Gradient norm: above its median times this, and above 3 times the largest one of the window."""
    slowdown: float | None = Field(0.25, gt=0, lt=1)
    """Tokens a second: 10 steps of at least 10 seconds below this share of the median."""


# ---------------------------------------------------------------------------- what is wrong with a curve, or None


def spike(losses: Sequence[float], deviations: float) -> str | None:
    """The last loss against the median and the median absolute deviation of those before it."""
    *before, last = losses or [0.0]
    if len(before) < LEAST:
        return None
    middle = median(before)
    spread = SIGMA * median(abs(value - middle) for value in before)
    spread = max(spread, NATS)
    if last <= middle + deviations * spread:
        return None
    return (
        f"loss {last:.4g}, {(last - middle) / spread:.0f} deviations above the median {middle:.4g} of the last "
        f"{len(before)} steps: look at the rows of this step, or lower optim.learning_rate or clipping.max_grad_norm"
    )


def dead(losses: Sequence[float], steps: int) -> str | None:
    """The last `steps` losses are one and the same number, to the rounding of float32."""
    last = losses[-steps:]
    if len(last) < steps or max(last) - min(last) > 1e-6 * max(map(abs, last)):
        return None
    remedy = "is anything trainable, and do the rows teach anything (`luthier data inspect`)?"
    return f"loss has been {last[-1]:.4g} for {steps} steps, exactly: nothing is learnt; {remedy}"


def idle(rates: Sequence[float], steps: int) -> str | None:
    """The last `steps` learning rates are 0."""
    if len(rates) < steps or any(rates[-steps:]):
        return None
    return f"learning rate has been 0 for {steps} steps: nothing moves; look at schedule and max_steps"


def vanishing(norms: Sequence[float], share: float) -> str | None:
    """The last 5 norms are below a share of the median of those before them, or 0."""
    before, last = norms[:-BELOW], norms[-BELOW:]
    if len(last) < BELOW:
        return None
    if not any(last):
        return f"gradient is 0 for {BELOW} steps: nothing is learnt; is the loss 0, or do the weights not reach it?"
    if len(before) < LEAST or max(last) >= share * median(before):
        return None
    return (
        f"gradient norm {last[-1]:.3g} for {BELOW} steps, its median was {median(before):.3g}: the loss is at a floor, "
        "or the gradient is lost in 16 bits; stop early, or use precision.dtype=float32"
    )


def exploding(norms: Sequence[float], factor: float) -> str | None:
    """The last norm is above the median of those before it times a factor, and three times the largest of them."""
    *before, last = norms or [0.0]
    if len(before) < LEAST or last <= factor * median(before) or last <= 3 * max(before):
        return None
    return (
        f"gradient norm {last:.3g}, its median of the last {len(before)} steps is {median(before):.3g}: lower "
        "optim.learning_rate, or clip with clipping.max_grad_norm"
    )


def slow(speeds: Sequence[float], seconds: Sequence[float], share: float) -> str | None:
    """The last 10 steps took 10 seconds or more and were slower than a share of the median speed before them."""
    before, last = speeds[:-SLOW], speeds[-SLOW:]
    if len(before) < LEAST or sum(seconds[-SLOW:]) < SLOW or max(last) >= share * median(before):
        return None
    return (
        f"{median(last):,.0f} tokens/s for {SLOW} steps, the median was {median(before):,.0f}: something else is using "
        "this machine, or its memory is swapped out or its processor throttled"
    )


# ---------------------------------------------------------------------------- over a run


@dataclass(frozen=True)
class Alarm:
    name: str
    step: int
    text: str


class Watch:
    """Looks at every step; an episode is said once, and ends after 10 steps in order. A part of checkpoints.

    Speeds differ from one start to the next: they are watched, too, and kept in no checkpoint.
    """

    KEPT = ("loss", "grad_norm", "learning_rate")

    def __init__(self, config: Alarms):
        self.config = config
        self.curves: dict[str, list[float]] = {name: [] for name in (*self.KEPT, "speed", "seconds")}
        self.quiet: dict[str, int] = {}  # alarm -> steps since its condition held, while its episode lasts

    def look(self, step: int, values: Mapping[str, float]) -> list[Alarm]:
        """What begins at this step. `values`: finite, one for each curve."""
        longest = max(self.config.window, self.config.stuck or 0) + 1
        for name, curve in self.curves.items():
            curve.append(values[name])
            del curve[:-longest]
        begun = []
        for name, text in self._conditions().items():
            if text is not None:
                if name not in self.quiet:
                    begun.append(Alarm(name, step, text))
                self.quiet[name] = 0
            elif name in self.quiet:
                self.quiet[name] += 1
                if self.quiet[name] >= QUIET:
                    del self.quiet[name]
        return begun

    def _conditions(self) -> dict[str, str | None]:
        config, curve = self.config, self.curves

        def of(function: Callable[..., str | None], name: str, limit: Any) -> str | None:
            return None if limit is None else function(curve[name][-config.window - 1 :], limit)

        return {
            "loss_spike": of(spike, "loss", config.spike),
            "dead_loss": None if config.stuck is None else dead(curve["loss"], config.stuck),
            "idle_learning_rate": None if config.stuck is None else idle(curve["learning_rate"], config.stuck),
            "vanishing_gradient": of(vanishing, "grad_norm", config.vanishing),
            "exploding_gradient": of(exploding, "grad_norm", config.exploding),
            "slow": None if config.slowdown is None else slow(curve["speed"], curve["seconds"], config.slowdown),
        }

    def tensors(self) -> dict:
        return {}

    def numbers(self) -> dict:
        curves = {name: list(self.curves[name]) for name in self.KEPT}
        return {"curves": curves, "quiet": {k: n for k, n in sorted(self.quiet.items()) if k != "slow"}}

    def restore(self, tensors: Mapping, numbers: Mapping) -> None:
        for name in self.KEPT:
            self.curves[name] = list(numbers["curves"][name])
        self.quiet = dict(numbers["quiet"])
