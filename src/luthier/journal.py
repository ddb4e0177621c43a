"""What a run writes of itself while it runs: records of its steps and evaluations, alarms, histograms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import measured
from .config import Config
from .monitor import Console, Monitor, histograms, memory_gb
from .monitor.alarms import Watch
from .monitor.nonfinite import Guard
from .optim.clipping import Clipper
from .results import Step


class Journal:
    """Of the first rank, once it is open; the others keep nothing. A part of checkpoints, but for the clock."""

    def __init__(self, config: Config, folder: Path, console: Console, clipper: Clipper, guard: Guard):
        self.config, self.folder, self.console = config, folder, console
        self.clipper, self.guard = clipper, guard
        self.watch = Watch(config.monitor.alarms)
        self.monitor: Monitor | None = None
        self.unlogged: list[tuple[int, float]] = []  # tokens and seconds of the steps since the last record
        self.before = 0  # tokens since then, of an earlier process

    def open(self, step: int) -> None:
        """After `step` steps: what an earlier process wrote of later ones is not there."""
        config = self.config.monitor
        names = (config.project, config.run_name)
        settings = self.config.model_dump(mode="json")
        self.monitor = Monitor(self.folder, self.console, config.report_to, step, *names, settings)

    def step(self, taken: Step, steps: Any, seconds: float, waited: float) -> None:
        """A step of `steps` that took so many seconds, after those that its rows were waited for."""
        if not self.monitor:
            return
        self.unlogged.append((taken.tokens, seconds + waited))
        if not taken.skipped:
            self._alarm(taken, seconds)
        if taken.step % self.config.monitor.log_every and taken.step != len(steps) and not taken.skipped:
            return
        tokens, passed = (sum(of_step) for of_step in zip(*self.unlogged))  # since the last record
        left = passed / len(self.unlogged) * (len(steps) - taken.step)
        values = {
            "loss": taken.loss, "learning_rate": taken.learning_rate, "grad_norm": taken.grad_norm,
            "clipped": taken.clipped, **self.clipper.figures(), **taken.metrics,
            "tokens": self.before + tokens, "tokens_per_second": tokens / passed, "memory_gb": memory_gb(),
            "seconds": passed, "seconds_left": left, **getattr(steps, "pace", {}),
        }  # fmt: skip
        if self.guard.total:
            values["skipped_steps"] = self.guard.total
        if taken.skipped:
            values["origin"] = self.guard.origin
        self.unlogged.clear()
        self.before = 0
        self.monitor.log("nonfinite" if taken.skipped else "train", taken.step, values)

    def _alarm(self, taken: Step, seconds: float) -> None:
        """Each episode of a bad curve once: on the console, and as a record that the report lists."""
        assert self.monitor is not None
        values = {
            "loss": taken.loss, "grad_norm": taken.grad_norm, "learning_rate": taken.learning_rate,
            "speed": taken.tokens / seconds, "seconds": seconds,
        }  # fmt: skip
        for alarm in self.watch.look(taken.step, values):
            self.console.warn(f"step {taken.step}: {alarm.text}")
            self.monitor.log("alarm", taken.step, {"alarm": alarm.name, "text": alarm.text})

    def histograms(self, step: int, parameters: Mapping[str, nn.Parameter], scale: torch.Tensor) -> None:
        """Of the weights before this step and of the mean gradients, before clipping."""
        every = self.config.monitor.histogram_every
        if every and step % every == 0 and self.monitor:
            self.monitor.histograms(step, histograms.of_step(parameters, scale))

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """The figures after `step`, and what the folder has of them: answers, and which labels were said."""
        if not self.monitor:
            return
        self.monitor.log("evaluation", step, values)
        self.monitor.samples(step, measured.answers_file(self.folder, step))
        if self.config.objective.ends_in == "text":
            self.monitor.confusion(step, measured.confusion(self.folder, step))

    # ------------------------------------------------------------------ a part of a checkpoint
    def tensors(self) -> dict:
        return {}

    def numbers(self) -> dict:
        return {"tokens": self.before + sum(tokens for tokens, _ in self.unlogged)}

    def restore(self, tensors: Mapping, numbers: Mapping) -> None:
        self.before = numbers.get("tokens", 0)  # older checkpoints have none

    # ------------------------------------------------------------------ the end
    def finish(self, report: dict) -> None:
        if self.monitor:
            self.monitor.finish(report)

    def close(self) -> None:
        if self.monitor:
            self.monitor.close()
