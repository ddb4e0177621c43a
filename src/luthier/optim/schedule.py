"""The learning rate as a pure function of the step: warm-up, then linear, cosine or constant."""

import math

from . import Schedule


def warmup_steps(schedule: Schedule, total: int) -> int:
    return math.ceil(schedule.warmup * total) if schedule.warmup < 1 else int(schedule.warmup)


def factor(schedule: Schedule, step: int, total: int) -> float:
    """What the peak rate is multiplied by at `step`, counted from 0, of `total`.

    The warm-up starts at 1 / warm-up, so that the first step moves; linear and cosine (arXiv:1608.03983) go from 1 at
    the first step after it towards `min_ratio` at the step after the last.
    """
    warmup = warmup_steps(schedule, total)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "constant":
        return 1.0
    share = (step - warmup) / max(1, total - warmup)
    shape = 1 - share if schedule.kind == "linear" else (1 + math.cos(math.pi * share)) / 2
    return schedule.min_ratio + (1 - schedule.min_ratio) * shape
