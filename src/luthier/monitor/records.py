"""The records of a run: `metrics.jsonl`, and from there to the console and the trackers."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .console import Console
from .trackers import About, Histogram, Trackers

SAMPLES = 16  # answers of an evaluation that trackers are shown


class Monitor:
    """Takes every record of a run to all places it is wanted in; each record has a `kind` and a `step`.

    After a kill the records that come after the checkpoint, at `resumed_at`, are dropped, as those steps are made
    again. What was dropped is known: trackers that cannot take a record back are not sent it twice.
    """

    def __init__(
        self, folder: Path, console: Console, report_to: Sequence[str] = (), resumed_at: int = 0,
        project: str = "luthier", run_name: str | None = None, settings: Mapping | None = None,
    ):  # fmt: skip
        self.console = console
        self.path = folder / "metrics.jsonl"
        sent: set[tuple[str, int]] = set()
        if self.path.exists():
            lines = _whole_lines(self.path)
            places = [(r["kind"], r["step"]) for r in map(json.loads, lines)]
            kept = [line for line, (_, step) in zip(lines, places) if step <= resumed_at]
            write_atomically(self.path, "".join(line + "\n" for line in kept) if resumed_at else "")
            sent = set(places) if resumed_at else set()
        self.path.touch()  # a run whose steps are all passed over has records, too: none
        finished = (folder / "report.json").exists()
        about = About(folder, project, run_name or folder.resolve().name, resumed_at, flat(settings or {}))
        self.trackers = Trackers([] if finished else report_to, about, console.warn, sent)

    def log(self, kind: str, step: int, values: Mapping) -> dict:
        """Numbers that are not finite are written as text: JSON has no other place for them."""
        record = {"kind": kind, "step": step} | {k: _written(v) for k, v in values.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        self.trackers.scalars(kind, step, numbers(record, skip=("step",)))
        if kind == "train":
            self.console.step(record)
        return record

    def samples(self, step: int, path: Path) -> None:
        """The first held-out answers of an evaluation, from its file, where it has one."""
        if path.exists():
            rows = [json.loads(line) for line in path.read_text().splitlines()[:SAMPLES]]
            self.trackers.samples(step, rows)

    def confusion(self, step: int, found: tuple[Sequence[str], Any] | None) -> None:
        """Labels and counts of an evaluation, where it has such."""
        if found is not None:
            self.trackers.confusion(step, *found)

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        self.log("histograms", step, {"tensors": len(found)})
        self.trackers.histograms(step, found)

    def finish(self, report: Mapping) -> None:
        """The hyper-parameters' table: the settings beside the figures of the report."""
        self.trackers.finish(numbers(flat(report)))

    def close(self) -> None:
        self.console.end()
        self.trackers.close()


def _written(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def flat(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; lists stay whole, as JSON."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = json.dumps(value) if isinstance(value, list | tuple) else value
    return out


def numbers(values: Mapping, skip: Sequence[str] = ()) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and k not in skip}


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file that are complete; the last one may have been cut by a kill."""
    lines = path.read_text().split("\n")
    return [line for line in lines[:-1] if line]


def records(path: Path) -> list[dict]:
    """All records of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in _whole_lines(path)]


def warnings_of(history: Sequence[Mapping]) -> dict:
    """What a report says of a run's alarms and of the steps that were not applied."""
    return {
        "alarms": [{k: r[k] for k in ("step", "alarm", "text")} for r in history if r["kind"] == "alarm"],
        "skipped_steps": [r["step"] for r in history if r["kind"] == "nonfinite"],
    }


def memory_gb() -> float:
    """Peak memory of this process so far: of the GPU where there is one, else resident, in 10^9 bytes."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if os.name == "nt":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
