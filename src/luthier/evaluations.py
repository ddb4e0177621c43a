"""The evaluations of a run: when they are due, what they find, which step is the best so far, and when to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import checkpoint, evaluate, measured, surgery
from .assembled import Assembled
from .errors import ConfigError
from .optim.stopping import Patience


@dataclass
class Evaluations:
    """Of held-out rows, if there are any."""

    made: Assembled
    wanted: evaluate.Measurement | None
    folder: Path
    patience: Patience | None
    breakable: Callable[[], contextlib.AbstractContextManager]
    """Ends the work inside when a signal comes."""
    last: int | None = None
    """The step of the last one."""
    figures: Mapping = field(default_factory=dict)
    """Of the last one."""
    best: dict | None = None
    """Its `name` among the checkpoints, `step`, `metric` and `value`."""

    def due(self, step: int, steps: int) -> bool:
        """Before the first step and every n steps; what comes after the last step belongs to the run's end."""
        every = self.made.config.evaluation.every
        return (step == 0 or bool(every and step % every == 0)) and self.last != step < steps

    def measure(self, answer: bool, weights: Mapping[str, torch.Tensor] | None, step: int) -> dict:
        """The figures under flat keys, as `metrics.jsonl` has them: loss, perplexity, exact_match, forgetting.loss.

        Other `weights` are in place meanwhile, if there are any; they are those of `step`.
        """
        made, wanted = self.made, self.wanted
        assert wanted is not None
        base = contextlib.nullcontext() if step else made.as_base()
        with surgery.replaced(made.parameters(), weights), base, self.breakable():
            found = evaluate.measure(made, wanted, answer)
        if made.ranks.first:
            measured.keep(self.folder, step, found)  # before a function of the user's can fail
        if wanted.functions and found.answers:
            path = measured.answers_file(self.folder, step)
            found = evaluate.score(made.ranks, wanted.functions, found, path)
            if made.ranks.first:
                measured.keep(self.folder, step, found)
        return found.values()

    def judge(self, values: Mapping, step: int) -> str | None:
        """Whether it is the best so far, and why to stop, if so. The base, at step 0, is not among what is judged."""
        config = self.made.config.evaluation
        metric = config.metric_for_best_model
        if metric not in values:
            raise ConfigError(
                f"evaluation.metric_for_best_model={metric!r} is not among what is measured at step {step}: "
                f"{', '.join(sorted(values))}"
            )
        if not step:
            return None
        value = float("nan") if values[metric] is None else values[metric]
        if self.best is None or config.better * (value - self.best["value"]) >= 0:  # of equals the newest
            self.best = {"name": checkpoint.name_of(step), "step": step, "metric": metric, "value": value}
        if self.patience is None:
            return None
        self.patience.observe(value)
        if not self.patience.exhausted:
            return None
        return (
            f"stopped early after step {step}: {metric} has not been better than {self.patience.best:.4f} for "
            f"{self.patience.waited} evaluations"
        )

    @property
    def exhausted(self) -> bool:
        return bool(self.patience and self.patience.exhausted)
