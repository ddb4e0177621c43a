"""The end of a search: the table of trials, the best configuration as a file, and which settings mattered."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import SearchError
from ..files import write_atomically
from .metrics import front
from .plan import Plan
from .storage import Storage, optuna

ENOUGH = 30  # complete trials from which importances are more than a hint
LEAST = 4  # below which nothing is said of them


def rows(plan: Plan, storage: Storage) -> list[dict[str, Any]]:
    """A row for each trial: what it tried, what came of it, and why where nothing did."""
    out = []
    for trial in storage.trials()[: plan.trials]:
        told = trial.user_attrs
        complete = trial.state == storage.states.COMPLETE
        out.append(
            {
                "trial": trial.number,
                "state": told.get("outcome") or _unfinished(trial, storage),
                "settings": plan.space.values(trial.params) if told.get("proposed") else {},
                "values": {m.name: v for m, v in zip(plan.metrics, trial.values)} if complete else None,
                "reason": told.get("reason", ""),
                "steps": told.get("steps"), "seconds": told.get("seconds"), "attempts": told.get("attempt", 0),
                "costs": told.get("costs") or {},
                "curve": [[s, v] for s, v in sorted(trial.intermediate_values.items()) if math.isfinite(v)],
            }
        )  # fmt: skip
    return out


def _unfinished(trial: Any, storage: Storage) -> str:
    if trial.state == storage.states.WAITING:
        return "waiting"
    return "running" if trial.user_attrs.get("owner") else "stopped"


def best_of(plan: Plan, table: Sequence[Mapping]) -> list[int]:
    """Pareto's front, best in the first metric first; SearchError where no trial came to its end."""
    values = {r["trial"]: list(r["values"].values()) for r in table if r["values"]}
    if not values:
        reasons: dict[str, int] = {}
        for row in table:
            if row["state"] not in ("waiting", "running", "stopped"):
                told = f"{row['state']}: {row['reason']}" if row["reason"] else row["state"]
                reasons[told] = reasons.get(told, 0) + 1
        listed = "".join(f"\n  {count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda i: -i[1]))
        raise SearchError(f"no trial of {plan.folder} came to its end, so there is no best one:{listed or ' none ran'}")
    return front(plan.metrics, values)


def write_best(plan: Plan, table: Sequence[Mapping], best: Sequence[int]) -> None:
    """`best.yaml`, and of several metrics one file for each trial of the front; `luthier train` takes them as they are.

    The run goes to the configuration's own output_dir.
    """
    names = {best[0]: plan.folder / "best.yaml"}
    if len(plan.metrics) > 1:
        (plan.folder / "front").mkdir(exist_ok=True)
        names |= {n: plan.folder / "front" / f"trial-{n:04}.yaml" for n in best[1:]}
        write_one(plan, table[best[0]], plan.folder / "front" / f"trial-{best[0]:04}.yaml")
    for number, path in names.items():
        write_one(plan, table[number], path)


def write_one(plan: Plan, row: Mapping, path: Path) -> None:
    told = ", ".join(f"{name} {value:.6g}" for name, value in row["values"].items())
    config = plan.config_of(row["settings"])
    write_atomically(path, f"# Trial {row['trial']} of {plan.folder}: {told}\n{config.dump()}")


# ---------------------------------------------------------------------------- importance


def importance(plan: Plan, storage: Storage) -> dict[str, Any]:
    """How much each setting matters for each metric: PED-ANOVA's shares (arXiv:2304.10255), which sum to 1.

    Only complete trials are looked at. With few of them it is a hint, and says so.
    """
    library = optuna()
    complete = [t for t in storage.trials()[: plan.trials] if t.state == storage.states.COMPLETE]
    count = len(complete)
    if count < LEAST or all(t.params == complete[0].params for t in complete):
        return {"trials": count, "note": f"of {count} complete trials nothing can be said", "shares": {}}
    shares: dict[str, dict[str, float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = library.importance.PedAnovaImportanceEvaluator(target_quantile=max(0.1, min(0.5, 3 / count)))
        for i, metric in enumerate(plan.metrics):
            view = library.create_study(direction=metric.direction)
            view.add_trials([_of_one_metric(library, t, i) for t in complete])
            try:
                found = library.importance.get_param_importances(view, evaluator=evaluator)
            except (ValueError, RuntimeError) as error:
                return {"trials": count, "note": f"nothing can be said: {error}", "shares": {}}
            shares[metric.name] = {key: float(value) for key, value in found.items()}
    note = "" if count >= ENOUGH else f"{count} complete trials are few: a hint, no more; {ENOUGH} and more tell"
    return {"trials": count, "note": note, "shares": shares}


def _of_one_metric(library: Any, trial: Any, i: int) -> Any:
    return library.trial.create_trial(value=trial.values[i], params=trial.params, distributions=trial.distributions)


# ---------------------------------------------------------------------------- tables


def markdown(plan: Plan, report: Mapping) -> str:
    """All trials, the best first, and what was found, for people."""
    keys, names = [d.key for d in plan.space.dimensions], [m.name for m in plan.metrics]
    lines = [f"# {plan.folder.name}", "", summary(plan, report), "", "## Trials", ""]
    lines += _table(["trial", "state", *names, *keys, "steps", "seconds", "why"], _cells(plan, report))
    found = report["importance"]
    lines += ["", "## Importance", ""]
    if found["shares"]:
        lines += _table(
            ["setting", *names],
            [[key, *(f"{found['shares'][n].get(key, 0):.0%}" for n in names)] for key in keys],
        )
    if found["note"]:
        lines += ["", found["note"] + "."]
    lines += ["", "## Against the configuration as it is", "", *_fresh_lines(report.get("fresh"))]
    return "\n".join(lines) + "\n"


def summary(plan: Plan, report: Mapping) -> str:
    counts: dict[str, int] = {}
    for row in report["trials"]:
        counts[row["state"]] = counts.get(row["state"], 0) + 1
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    best = report["trials"][report["best"][0]]
    values = ", ".join(f"{name} {value:.4g}" for name, value in best["values"].items())
    settings = ", ".join(f"{key}={brief(value)}" for key, value in best["settings"].items())
    several = f"; {len(report['best'])} trials are on the front" if len(plan.metrics) > 1 else ""
    return f"{len(report['trials'])} trials: {told}. Best is trial {best['trial']}: {values} ({settings}){several}."


def _cells(plan: Plan, report: Mapping) -> list[list[str]]:
    best = list(report["best"])
    sign = 1 if plan.metrics[0].less else -1

    def order(row: Mapping) -> tuple:
        first = next(iter(row["values"].values())) * sign if row["values"] else math.inf
        return (row["trial"] not in best, first, row["trial"])

    out = []
    for row in sorted(report["trials"], key=order):
        values = [brief(row["values"][m.name]) if row["values"] else "-" for m in plan.metrics]
        settings = [brief(row["settings"].get(d.key, "-")) for d in plan.space.dimensions]
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f}"
        state = f"**{row['state']}**" if row["trial"] in best else row["state"]
        out.append([str(row["trial"]), state, *values, *settings, str(row["steps"] or "-"), seconds, row["reason"]])
    return out


def _fresh_lines(fresh: Mapping | None) -> list[str]:
    if not fresh:
        return ["Not compared."]
    if "note" in fresh:
        return [fresh["note"]]
    head, *cells = fresh_cells(fresh)
    return [*_table(head, cells), "", fresh["verdict"]]


def fresh_cells(fresh: Mapping) -> list[list[str]]:
    """The comparison on fresh seeds as a table, its head first."""
    cells = [["seed", "figure", "default", "best", "change", "95% interval", "rows won/lost"]]
    for one in fresh["seeds"]:
        for key, figure in one["figures"].items():
            low, high = figure.get("change_interval") or (math.nan, math.nan)
            change = math.nan if figure["change"] is None else figure["change"]
            cells.append(
                [str(one["seed"]), key, brief(figure["base"]), brief(figure["tuned"]), f"{change:+.4g}",
                 f"{low:+.4g} to {high:+.4g}", f"{figure['wins']}/{figure['losses']}"]
            )  # fmt: skip
        for key, (before, after) in one["costs"].items():
            cells.append([str(one["seed"]), key, brief(before), brief(after), f"{after - before:+.4g}", "", ""])
    return cells


def _table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    def line(parts: Sequence[str]) -> str:
        return "| " + " | ".join(part.replace("|", "\\|").replace("\n", " ") for part in parts) + " |"

    return [line(head), line(["---"] * len(head)), *map(line, cells)]


def brief(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value) if isinstance(value, list | dict) else str(value)
