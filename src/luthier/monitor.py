"""What a run says: the console, `metrics.jsonl`, TensorBoard; and what the machine is using."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import write_atomically

COLUMNS = (  # key of a record, caption on the console, format
    ("loss", "loss", "{:.4f}"),
    ("learning_rate", "lr", "{:.2e}"),
    ("grad_norm", "grad", "{:.3f}"),
    ("tokens_per_second", "tok/s", "{:,.0f}"),
    ("memory_gb", "GB", "{:.2f}"),
)


class Console:
    """Lines for people, on the standard error, with a live progress bar where that is a terminal."""

    def __init__(self, quiet: bool = False):
        from rich.console import Console as Rich

        width = None if sys.stderr.isatty() else 120
        self.rich = Rich(stderr=True, quiet=quiet, highlight=False, soft_wrap=True, width=width)
        self.live = self.rich.is_terminal and not quiet
        self.progress: Any = None
        self.task: Any = None
        self.last_line = 0.0

    def say(self, text: str = "", style: str | None = None) -> None:
        self.rich.print(text, style=style, markup=False)

    def warn(self, text: str) -> None:
        self.say("warning: " + text, style="yellow")

    def show(self, renderable: object) -> None:
        self.rich.print(renderable)

    def begin(self, total: int, done: int) -> None:
        self.total = total
        if not self.live:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
            TextColumn("left"), TimeRemainingColumn(), console=self.rich,
        )  # fmt: skip
        self.task = self.progress.add_task("", total=total, completed=done)
        self.progress.start()

    def step(self, record: Mapping) -> None:
        text = "  ".join(f"{caption} {form.format(record[key])}" for key, caption, form in COLUMNS if key in record)
        if self.progress is not None:
            self.progress.update(self.task, completed=record["step"], description=text)
            return
        now = time.monotonic()
        if now - self.last_line >= 5 or record["step"] in (1, self.total):
            self.last_line = now
            left = f"  left {_clock(record['seconds_left'])}" if "seconds_left" in record else ""
            self.say(f"step {record['step']}/{self.total}  {text}{left}")

    def end(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Monitor:
    """Takes every record of a run to all places it is wanted in; each record has a `kind` and a `step`."""

    def __init__(self, folder: Path, console: Console, tensorboard: bool, resumed_at: int = 0):
        self.console = console
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            # What a killed process did after its last checkpoint is done again.
            kept = [line for line in _whole_lines(self.path) if json.loads(line)["step"] <= resumed_at]
            write_atomically(self.path, "".join(line + "\n" for line in kept) if resumed_at else "")
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)

    def log(self, kind: str, step: int, values: Mapping) -> dict:
        record = {"kind": kind, "step": step, **values}
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.writer is not None:
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(f"{kind}/{key}", value, step)
        if kind == "train":
            self.console.step(record)
        return record

    def close(self) -> None:
        self.console.end()
        if self.writer is not None:
            self.writer.close()


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file that are complete; the last one may have been cut by a kill."""
    lines = path.read_text().split("\n")
    return [line for line in lines[:-1] if line]


def records(path: Path) -> list[dict]:
    """All records of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in _whole_lines(path)]


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
