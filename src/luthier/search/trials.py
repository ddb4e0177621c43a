"""One trial: a run with the values that were chosen, ended early where it is bad; what goes wrong is its result."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import ConfigError, DataError, ModelError, NonFiniteError
from ..monitor import Console, memory_gb
from ..shared import Shared
from ..train import Trainer
from .metrics import CHEAP, check_logged
from .plan import Plan
from .storage import Claimed, Storage

MUCH = 64 << 20  # bytes
DIVERGED, REFUSED, MEMORY = "diverged", "refused", "out of memory"


class TimeOver(Exception):
    """The search's hours are over; the trial was saved."""


@dataclass(frozen=True)
class Outcome:
    """`kind`: complete, pruned, diverged, refused, out of memory; values where it has them, else the reason."""

    kind: str
    values: Sequence[float] | None = None
    reason: str = ""
    seconds: float = 0.0
    costs: Mapping[str, float] | None = None
    step: int = 0


class Quiet(Console):
    """Of a trial's run only what is wrong is said, and that once in a search."""

    def __init__(self, above: Console, said: set[str]):
        super().__init__(quiet=True)
        self.above, self.said = above, said

    def warn(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            self.above.warn(text)


def run(
    plan: Plan, claimed: Claimed, storage: Storage, shared: Shared, console: Console, said: set[str],
    until: float = math.inf,
) -> Outcome:  # fmt: skip
    """A trial to its end. `until` is of time.monotonic: then it is saved, and TimeOver raised."""
    began = time.monotonic()
    reset_peak()
    with storage.owning(claimed) as check:
        found = _run(plan, claimed, storage, shared, Quiet(console, said), check, until)
    return replace(found, seconds=time.monotonic() - began)


def _run(
    plan: Plan, claimed: Claimed, storage: Storage, shared: Shared, console: Console, check: Any, until: float
) -> Outcome:  # fmt: skip
    trainer = _built(plan, claimed, console, shared)
    if isinstance(trainer, Outcome):
        free(MUCH)
        return trainer
    try:
        with trainer.signals:
            kind = _loop(plan, claimed, storage, trainer, check, until)
    except NonFiniteError as error:
        return Outcome(DIVERGED, reason=_short(error), step=trainer.step)
    except Exception as error:
        if not out_of_memory(error):
            raise
        return Outcome(MEMORY, reason=_short(error), step=trainer.step)
    finally:
        step, held = trainer.step, held_by(trainer)
        del trainer
        free(held)
    return Outcome("pruned", step=step) if kind == "pruned" else _outcome(plan, plan.trial_folder(claimed.number))


def _built(plan: Plan, claimed: Claimed, console: Console, shared: Shared) -> Trainer | Outcome:
    """A trial's run, ready for its first step, or why there can be none with its values."""
    try:
        return Trainer(config_of_trial(plan, claimed), console, plan.functions, plan.rewards, shared)
    except (ConfigError, DataError, ModelError) as error:
        return Outcome(REFUSED, reason=_short(error))
    except Exception as error:
        if not out_of_memory(error):
            raise
        return Outcome(MEMORY, reason=_short(error))


def _loop(plan: Plan, claimed: Claimed, storage: Storage, trainer: Trainer, check: Any, until: float) -> str:
    """The steps of a run, its evaluations told; returns how it ended."""
    # The base is measured by the first trial alone: it is the same for all, and no weight depends on it, but where the
    # rate follows evaluations.
    if claimed.number and trainer.step == 0 and trainer.config.schedule.kind != "reduce_lr_on_plateau":
        trainer.evaluations.last = 0
    key, looked = plan.metrics[0].key, trainer.evaluations.last
    steps: Any = trainer.loop()
    with contextlib.closing(steps):
        for taken in steps:
            check()
            if looked != trainer.evaluations.last and trainer.evaluations.last is not None:
                looked = trainer.evaluations.last
                if looked == 0:
                    check_logged(plan.metrics, trainer.evaluations.figures)
                elif key in trainer.evaluations.figures and len(plan.metrics) == 1:
                    value = trainer.evaluations.figures[key]
                    if storage.report(claimed, looked, math.nan if value is None else value):
                        return "pruned"
                elif plan.pruner != "none":
                    check_logged(plan.metrics[:1], trainer.evaluations.figures)
            if time.monotonic() > until and taken.step < len(trainer.steps):
                trainer.save()
                raise TimeOver
    last = trainer.evaluations.figures.get(key)
    if trainer.evaluations.last == trainer.step and len(plan.metrics) == 1 and last is not None:
        storage.report(claimed, trainer.step, last)
    return "complete"


def _outcome(plan: Plan, folder: Path) -> Outcome:
    report = json.loads((folder / "report.json").read_text())
    figures = {key: figure["tuned"] for key, figure in report.get("figures", {}).items()}
    known = figures | {f"{key}_interval": None for key in figures}
    check_logged(plan.metrics, known)
    costs = costs_of(report)
    values = [costs[m.key] if m.cost else figures[m.key] for m in plan.metrics]
    lost = [m.name for m, value in zip(plan.metrics, values) if value is None or not math.isfinite(value)]
    if lost:
        reason = f"{lost[0]} is not a finite number"
        return Outcome(DIVERGED, reason=reason, costs=costs, step=report["steps"])
    return Outcome("complete", values, costs=costs, step=report["steps"])


def costs_of(report: Mapping) -> dict[str, float]:
    """What a run took: seconds of training, the peak of memory in 10^9 bytes, parameters that move, speed."""
    seconds = report["training_seconds"]
    return {
        "seconds": seconds, "memory": peak_gb(), "parameters": report["trained_parameters"],
        "tokens_per_second": report["tokens"] / seconds if seconds else 0.0,
    }  # fmt: skip


def config_of_trial(plan: Plan, claimed: Claimed) -> Config:
    folder = str(plan.trial_folder(claimed.number))
    return plan.config_of(plan.space.values(claimed.labels), lean(plan), {"output_dir": folder, "search": None})


def lean(plan: Plan) -> dict:
    """Answers and tasks take a trial's time, and are left out where nothing is judged by them."""
    config, e = plan.config, plan.config.evaluation
    judged = {m.key for m in plan.metrics if not m.cost} | {e.metric_for_best_model}
    judged.add(getattr(config.schedule, "metric", "loss"))
    if plan.functions or config.objective.rows == "prompts" or not judged <= set(CHEAP):
        return {}
    return {"evaluation": {"generate": 0, "generate_every": False, "metrics": ["exact_match"], "tasks": [],
                           "forgetting": None}}  # fmt: skip


# ---------------------------------------------------------------------------- memory


def out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))


def free(held: int) -> None:
    """What a trial held, back to the device: circles of objects and frames of errors would keep it for a while. Where
    it was little, that is not worth the time of a search for circles."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_available()
    if held >= MUCH or on_gpu:
        gc.collect()
    if torch is not None and on_gpu:
        torch.cuda.empty_cache()


def held_by(trainer: Trainer) -> int:
    """Bytes of a run's weights."""
    return sum(p.numel() * p.element_size() for p in trainer.made.network.parameters())


def reset_peak() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # the peak is else that of the process so far
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb() -> float:
    """Since `reset_peak`: of the GPU, else resident memory, in 10^9 bytes."""
    torch = sys.modules.get("torch")
    status = Path("/proc/self/status")
    if (torch is not None and torch.cuda.is_available()) or not status.exists():
        return memory_gb()
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) * 1024 / 1e9


def _short(error: BaseException) -> str:
    text = "; ".join(error.problems) if isinstance(error, ConfigError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines)[:500] or type(error).__name__


def drop_weights(folder: Path) -> None:
    """A trial that is not the best keeps its figures, and not its checkpoints."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
