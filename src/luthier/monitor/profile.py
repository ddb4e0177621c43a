"""A profile of chosen steps: a Chrome trace, a table of the costliest operations, and the GPU's memory as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..files import write_atomically

ROWS = 30  # operations in the table
EVENTS = 100_000  # allocations that a GPU remembers


class Profiler:
    """Profiles the steps of [start, stop), counted from 1, into `profile/step-…/`; it changes no number of the run."""

    def __init__(self, folder: Path, steps: Sequence[int] | None, wanted: bool = True):
        self.folder = folder / "profile"
        self.start, self.stop = steps if steps and wanted else (0, 0)
        self.running: Any = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around one optimiser step. A run that is resumed inside the range profiles the rest of it."""
        if self.start <= step < self.stop and self.running is None:
            self._begin(step)
        yield
        if self.running is not None and step == self.stop - 1:
            self.end()

    def _begin(self, step: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.into = self.folder / f"step-{step:08}"
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=EVENTS)
        self.running = profile(activities=activities, profile_memory=True, acc_events=True)
        self.running.start()

    def end(self) -> None:
        """Write what was seen, also where the run ends inside the range."""
        if self.running is None:
            return
        running, self.running = self.running, None
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.synchronize()
        running.stop()
        self.into.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(self.into / "trace.json"))
        order = "self_device_time_total" if gpu else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        write_atomically(self.into / "summary.txt", table + "\n")
        if gpu:
            seen = {"stats": torch.cuda.memory_stats(), "snapshot": torch.cuda.memory._snapshot()}
            torch.cuda.memory._record_memory_history(enabled=None)
            write_atomically(self.into / "memory.json", json.dumps(seen, default=str))
