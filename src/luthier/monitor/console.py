"""The console: a line for each step, or a live bar where the standard error is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

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
        text = line(record)
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


def line(record: Mapping) -> str:
    """A step's record in one line; `clipped` stands behind the gradient's norm where it was."""
    words = []
    for key, caption, form in COLUMNS:
        if key in record:
            clipped = " clipped" if key == "grad_norm" and record.get("clipped") else ""
            words.append(f"{caption} {form.format(record[key])}{clipped}")
    if record.get("skipped_steps"):
        words.append(f"skipped {record['skipped_steps']}")
    return "  ".join(words)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
