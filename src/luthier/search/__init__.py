"""Step 9, hyper-parameter search: which settings of any configuration are best, on Optuna's samplers and storages."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, SearchError
from ..files import write_atomically

if TYPE_CHECKING:
    from ..fields import Config
    from ..monitor import Console
    from .plan import Functions, Plan
    from .storage import Storage


@dataclass(frozen=True)
class Searched:
    """A search as it stands: where it is, and its report; None while other processes still work at it."""

    folder: Path
    report: dict | None

    @property
    def best(self) -> Path:
        """The configuration that was found, as a file for `luthier train`."""
        return self.folder / "best.yaml"


def search(
    *sources: str | Path | Mapping | Config, space: Mapping[str, Any] | None = None, method: str | None = None,
    console: Console | None = None, functions: Functions | None = None, rewards: Functions | None = None,
    **settings: Any,
) -> Searched:  # fmt: skip
    """Try settings of a configuration, and go on where the search's folder stands.

    `sources` are those of `configure`, `space` says where to search: `{"optim.learning_rate": "log(1e-5, 1e-3)"}`.
    `settings` are those of the section `search`: metrics, trials, hours, sampler, pruner, seed, folder, storage, ...
    `functions` and `rewards` are those of `train`; a function's figure may be a metric.
    """
    from .plan import plan

    made = plan(*sources, space=space, method=method, functions=functions, rewards=rewards, **settings)
    return run(made, console)


def run(plan: Plan, console: Console | None = None) -> Searched:
    """All trials, and what is made of them at the end."""
    from ..monitor import Console
    from .launch import launch
    from .study import Clock, open_storage, work

    console, clock = console or Console(), Clock.of(plan)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a search is started without torchrun, as each trial is a run of one process: use --workers N for N GPUs"
        )
    storage = open_storage(plan)
    told = storage.trials()[: plan.trials]
    done = sum(t.state.is_finished() for t in told)
    console.say(f"{plan.folder}: {plan.trials} trials" + (f", {done} of them done" if done else ""))
    for key, text in plan.space.described().items():
        console.say(f"  {key}: {text}")
    console.say(f"  sampler {plan.settings.sampler}, pruner {plan.pruner}; {_aims(plan)}")
    if plan.default is None:
        console.say("  the configuration as it is lies outside of the space, so no trial has its values")
    if plan.trials < (plan.settings.trials or 0):
        console.say(f"  the space has {plan.trials} points, so there are no more trials")
    for text in plan.remarks:
        console.warn(text)
    if plan.settings.workers > 1 or plan.settings.launcher != "local":
        launch(plan, storage, console, clock)
    elif not work(plan, storage, console, clock):
        console.say("the hours are over: the same command goes on")
    return conclude(plan, storage, console)


def _aims(plan: Plan) -> str:
    return ", ".join(f"{m.name} is to be {'small' if m.less else 'large'}" for m in plan.metrics)


def conclude(plan: Plan, storage: Storage, console: Console) -> Searched:
    """The report and its files, by the last of several processes; None where others are at work."""
    from . import fresh, plots, report, tensorboard

    if storage.others_work(plan.trials):
        console.say("other processes still work at this search; the last of them writes the report")
        return Searched(plan.folder, None)
    with _alone(plan.folder / ".report.lock"):
        table = report.rows(plan, storage)
        path, key = plan.folder / "report.json", [[r["trial"], r["state"]] for r in table]
        if path.exists() and (made := json.loads(path.read_text()))["state"] == key:
            return Searched(plan.folder, made)
        best = report.best_of(plan, table)
        report.write_best(plan, table, best)
        made: dict[str, Any] = {
            "state": key, "best": best, "metrics": [vars(m) for m in plan.metrics], "space": plan.space.described(),
            "importance": report.importance(plan, storage), "trials": table,
        }  # fmt: skip
        plots.write(plan, made)  # what there is, before the comparison takes its time
        began = time.monotonic()
        made["fresh"] = fresh.compare(plan, table[best[0]], console)
        made["fresh_seconds"] = time.monotonic() - began
        write_atomically(plan.folder / "trials.md", report.markdown(plan, made))
        plots.write(plan, made)
        tensorboard.write(plan, made)
        write_atomically(path, json.dumps(made, indent=1))
    return Searched(plan.folder, made)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no other process of this machine, or of the folder, is in here."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


__all__ = ["SearchError", "Searched", "search"]
