"""What must hold before the first step, and only the run's folder, its rows or its model tell: else a ConfigError."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from . import checkpoint
from .config import Config, read_run
from .errors import ConfigError
from .parallel.ranks import Ranks
from .rollouts import Rollouts

Steps = Sequence[list[list[int]]]


def same_run(config: Config, folder: Path) -> None:
    """A folder holds one run: its settings may not change under its checkpoints."""
    path = folder / "config.yaml"
    if not path.exists() or not checkpoint.listed(folder / "checkpoints"):
        return
    free: dict = dict.fromkeys(("output_dir", "evaluation", "checkpoint", "monitor", "parallel", "search"), True)
    free["data"] = {"cache", "cache_dir", "num_proc", "on_bad_row"}  # none changes a row that is learnt
    before, now = (c.model_dump(exclude=free) for c in (read_run(folder), config))
    changed = [
        f"{section}: {before[section]!r} there, {now[section]!r} here"
        for section in now
        if before[section] != now[section]
    ]
    if changed:
        raise ConfigError(
            f"output_dir={str(folder)!r} holds a run with other settings ({'; '.join(changed)}): give another "
            "output_dir, or the same settings to resume it"
        )


def profile(config: Config, steps: Steps) -> None:
    """The steps that are profiled are steps of the run."""
    chosen = config.monitor.profile_steps
    if chosen and chosen[0] > len(steps):
        raise ConfigError(
            f"monitor.profile_steps={chosen} begins after the last of {len(steps)} steps: choose earlier ones"
        )


def fused(config: Config, steps: Steps, ranks: Ranks) -> None:
    """A step inside the backward pass has one row of one process: no other gradient may be added to it."""
    if not config.optim.fused_backward or isinstance(steps, Rollouts):
        return
    rows = max(map(len, steps))
    if ranks.world > 1:
        raise ConfigError(f"optim.fused_backward is for one process, and here are {ranks.world}: leave it out")
    if rows > 1:
        raise ConfigError(
            f"optim.fused_backward allows one row a step, and here a step has up to {rows}: use a larger "
            "batch.micro_tokens, or a smaller batch.examples"
        )


def unfreezing(begins: Mapping[str, int], steps: Steps) -> None:
    """What begins to move later begins within the run."""
    late = max(begins.values(), default=0)
    if late >= len(steps):
        raise ConfigError(
            f"trainable.unfreeze: step={late} is never reached, as the run has {len(steps)} steps: use a "
            "smaller step, or more epochs"
        )
