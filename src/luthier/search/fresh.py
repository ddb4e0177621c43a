"""The best of a search against the configuration as it is, on a seed that no trial had: luck is not sold as gain.

The best of many trials looks better than it is, as the luckiest is chosen. Both are therefore trained again with
another seed (first values, order of rows and, where they are drawn, which rows are held out), and compared row by row.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any

from .. import measured
from ..config import Config, read_run
from ..errors import LuthierError
from ..evaluate import metrics_of
from ..files import write_atomically
from ..monitor import Console
from ..shared import Shared
from ..train import Trainer
from . import trials
from .plan import Plan
from .sampling import mixed


def compare(plan: Plan, best: Mapping, console: Console) -> dict[str, Any] | None:
    """For each fresh seed every figure of both with the interval of its paired change, and a verdict on the metric."""
    if not plan.settings.fresh_seeds:
        return None
    if plan.config_of(best["settings"]) == plan.config:
        return {"note": "The best trial is the configuration as it is: there is nothing to compare."}
    shared = Shared()
    seeds = [mixed(plan.settings.seed, plan.config.seed, 1 + i) % (1 << 31) for i in range(plan.settings.fresh_seeds)]
    found = []
    for seed in seeds:
        console.say(f"seed {seed}, which no trial had: the configuration as it is, and the best trial's")
        try:
            sides = {
                side: _run(plan, values, side, seed, shared, console)
                for side, values in (("default", {}), ("best", best["settings"]))
            }
        except LuthierError as error:
            return {"note": f"The comparison on seed {seed} failed: {error}"}
        found.append({"seed": seed, **_compared(sides["default"], sides["best"])})
    return {"seeds": found, "verdict": _verdict(plan, found)}


def _run(plan: Plan, values: Mapping, side: str, seed: int, shared: Shared, console: Console) -> dict[str, Any]:
    folder = plan.folder / "fresh" / f"{side}-{seed}"
    own = {"seed": seed, "data": {"seed": seed}, "output_dir": str(folder), "search": None}
    config = plan.config_of(values, own)
    if not (folder / "report.json").exists():
        trials.reset_peak()
        peak = _train(config, plan, shared, console)
        write_atomically(folder / "peak.json", json.dumps(peak))
    report = json.loads((folder / "report.json").read_text())
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    costs = trials.costs_of(report)
    peak = folder / "peak.json"
    costs["memory"] = json.loads(peak.read_text()) if peak.exists() else costs["memory"]
    return {"folder": folder, "report": report, "costs": costs}


def _train(config: Config, plan: Plan, shared: Shared, console: Console) -> float:
    """`train`, with what runs of this process have in common, and without the base, which nobody asks about; returns
    the peak of memory."""
    trainer = Trainer(config, trials.Quiet(console, set()), plan.functions, plan.rewards, shared)
    if trainer.step == 0 and config.schedule.kind != "reduce_lr_on_plateau":
        trainer.evaluations.last = 0
    trainer.run()
    peak = trials.peak_gb()
    held = trials.held_by(trainer)
    del trainer
    trials.free(held)
    return peak


def _compared(default: Mapping, best: Mapping) -> dict[str, Any]:
    sides = []
    for side in (default, best):
        config = read_run(side["folder"])
        sides.append(measured.read(side["folder"], side["report"]["best_step"], metrics_of(config)))
    costs = {key: [default["costs"][key], best["costs"][key]] for key in default["costs"]}
    before, after = sides
    if before is None or after is None:
        return {"figures": {}, "rows": 0, "costs": costs}
    report = measured.compare(before, after)
    figures = {key: figure for key, figure in report["figures"].items() if "change" in figure}
    return {"figures": figures, "rows": report["rows"], "costs": costs}


def _verdict(plan: Plan, found: list[dict]) -> str:
    """In words, of the first metric that is a figure of rows: surely better, surely worse, or not to be told."""
    metric = next((m for m in plan.metrics if not m.cost), plan.metrics[0])
    told = []
    for one in found:
        figure = one["figures"].get(metric.key)
        if figure is None or not figure.get("change_interval"):
            told.append("not measured")
            continue
        low, high = figure["change_interval"]
        better, worse = (high < 0, low > 0) if metric.less else (low > 0, high < 0)
        told.append("better" if better else "worse" if worse else "no difference that could be told from chance")
    words = {
        "better": "the best trial's settings are better than the default beyond chance of rows",
        "worse": "the best trial's settings are worse than the default: it was luck that made it the best",
    }
    if len(set(told)) == 1:
        return f"{metric.name}: {words.get(told[0], told[0])}, on {len(told)} fresh seed{'s' * (len(told) > 1)}."
    return f"{metric.name}: on {len(told)} fresh seeds: {', '.join(told)}."
