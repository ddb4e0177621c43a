"""Config: one typed field per decision of a run, in sections; what an axis decides is its own."""

from __future__ import annotations

from typing import Any, Literal, get_args

import yaml
from pydantic import Field

from .data import Data
from .figures import greater_is_better
from .models import Model
from .monitor.alarms import Alarms
from .objectives import Objective
from .optim import (
    AdamW,
    Averaging,
    Clipping,
    EarlyStopping,
    Linear,
    NoAveraging,
    NormClipping,
    Optim,
    Regularisation,
    Schedule,
)
from .parallel import Parallel
from .precision import Precision
from .settings import Settings
from .trainable import Trainable


class BatchSize(Settings):
    """How much is learnt from in one optimiser step, and in one pass of the network."""

    examples: int | None = Field(None, ge=1)
    """Documents in a step; 16 if neither this nor `tokens` is given."""
    tokens: int | None = Field(None, ge=1)
    """Or slots of tokens in a step: a multiple of `micro_tokens`."""
    micro_tokens: int = Field(4096, ge=1)
    """Longest row that passes through the network at once; changes memory and speed, never the gradient."""
    packing: bool = True
    """Lay documents end to end in rows, with no leak between them; false pads them to rectangles."""


PYTHON_DOCS = "python-docs"
MetricName = Literal["exact_match", "f1", "bleu", "chrf", "rouge", "json"]
ON_ANSWERS = (*get_args(MetricName), "rouge_1", "rouge_2", "rouge_l", "json_equal", "valid_json")


class Evaluation(Settings):
    """What is measured on the held-out rows, at both ends of a run and in between."""

    every: int | None = Field(None, ge=1)
    """Steps between evaluations; none but at both ends without it."""
    generate: int = Field(0, ge=0)
    """Answer so many held-out prompts at both ends and score the answers."""
    generate_every: bool = False
    """Answer them, and do the tasks, at every evaluation, not at the ends only."""
    metrics: list[MetricName] = Field(["exact_match"], min_length=1)
    """Of the answers: `exact_match`, `f1` (of words), `bleu`, `chrf`, `rouge` (1, 2, L), `json` (equal values)."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest answer; longer ones are cut and counted."""
    batch_size: int = Field(32, ge=1)
    """Prompts answered at once."""
    forgetting: str | None = None
    """Rows that are not the task's, whose loss must not rise: a file, or `python-docs`, a slice of Python's manual."""
    tasks: list[str] = []
    """Tasks of lm-evaluation-harness, done at both ends: names, YAML files, or folders of them."""
    trust_task_files: bool = False
    """Allow files and folders in `tasks`: a task file may run Python of its own."""
    metric_for_best_model: str = "loss"
    """The figure of an evaluation that tells the best checkpoint and stops a run early."""
    greater_is_better: bool | None = None
    """By default false of losses, errors, perplexity and bits per byte, true of everything else."""

    @property
    def better(self) -> int:
        """1 where a greater figure is the better one, else -1."""
        given = self.greater_is_better
        return 1 if (greater_is_better(self.metric_for_best_model) if given is None else given) else -1


class Checkpointing(Settings):
    every: int | None = Field(None, ge=1)
    """Steps between checkpoints; the last step always leaves one."""
    keep: int = Field(2, ge=1)
    """The newest so many stay."""
    best: bool = True
    """The one with the best evaluation stays, too; it is restored at the end, and is what is exported."""


class Monitoring(Settings):
    """What a run says while it runs, and what it does about a number that is not finite."""

    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = ["tensorboard"]
    """Trackers beside metrics.jsonl; all write to this machine only, unless their own variables send them elsewhere."""
    project: str = Field("luthier", min_length=1)
    """Of the run in its trackers."""
    run_name: str | None = Field(None, min_length=1)
    """In its trackers; the last part of output_dir without it."""
    log_every: int = Field(1, ge=1)
    """Steps between records in metrics.jsonl."""
    histogram_every: int | None = Field(None, ge=1)
    """Steps between histograms of the weights that move and of their gradients; for trackers only."""
    profile_steps: list[int] | None = Field(None, min_length=2, max_length=2)
    """[start, stop): profile these steps, counted from 1, into profile/ of the run's folder."""
    alarms: Alarms = Alarms()  # type: ignore[call-arg]
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite ends the run, or its step is not applied; both name its origin."""
    max_skips: int = Field(10, ge=1)
    """More steps than this skipped in a row end the run."""


class Search(Settings):
    """Of `luthier search` alone: what is tried, and what is best; a run takes no notice of it."""

    space: dict[str, Any] = {}
    """Settings that are searched, by their dotted names: `log(1e-5, 1e-3)`, `uniform(0, 0.1)` or `(0, 0.1)`,
    `int(1, 4)`, `[8, 16, 32]`, with ` if method=lora` behind it where it applies to some trials only."""
    metrics: list[str] = []
    """Figures of an evaluation (`eval.loss`), or `seconds`, `memory`, `parameters`, `tokens_per_second`; `:min` or
    `:max` behind it says which way, where its name does not. Several give a Pareto front. By default
    evaluation.metric_for_best_model."""
    trials: int | None = Field(None, ge=1)
    """20 without it; of a grid all of its points."""
    hours: float | None = Field(None, gt=0)
    """Ends the search after so long, a trial that runs included; the same command goes on with it."""
    sampler: Literal["tpe", "gp", "random", "grid"] = "tpe"
    """Tree-structured Parzen estimator (arXiv:2304.11127), a Gaussian process, at random, or every point."""
    pruner: Literal["auto", "median", "hyperband", "none"] = "auto"
    """Ends bad trials at an evaluation: worse than the `median` of the others at the same step, or `hyperband`
    (arXiv:1603.06560). `auto`: the median, where there is one metric and evaluation.every."""
    seed: int = Field(0, ge=0)
    """Of what is tried; each trial's run has the seed of its configuration."""
    fresh_seeds: int = Field(1, ge=0)
    """Seeds that no trial had, on which the best is compared with the configuration as it is."""
    folder: str | None = None
    """Of the search: trials, storage, report; output_dir with `-search` behind it without one."""
    storage: str | None = None
    """An Optuna storage, such as sqlite:///search.db or postgresql://...; a journal in `folder` without one."""
    workers: int = Field(1, ge=1)
    """Processes on this machine, one GPU each."""
    launcher: Literal["local", "ray"] = "local"
    """Who starts the workers."""


class Config(Settings):
    """A whole run."""

    method: str = "lora"
    """The row of the method table to start from."""
    model: Model
    data: Data
    trainable: Trainable
    precision: Precision
    objective: Objective
    optim: Optim = AdamW()  # type: ignore[call-arg]
    schedule: Schedule = Linear()  # type: ignore[call-arg]
    clipping: Clipping = NormClipping()  # type: ignore[call-arg]
    regularisation: Regularisation = Regularisation()  # type: ignore[call-arg]
    averaging: Averaging = NoAveraging()
    early_stopping: EarlyStopping | None = None
    batch: BatchSize = BatchSize()  # type: ignore[call-arg]
    evaluation: Evaluation = Evaluation()  # type: ignore[call-arg]
    checkpoint: Checkpointing = Checkpointing()  # type: ignore[call-arg]
    monitor: Monitoring = Monitoring()  # type: ignore[call-arg]
    parallel: Parallel = Parallel()  # type: ignore[call-arg]
    epochs: int = Field(1, ge=1)
    """Times that every row is learnt."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many steps, however many epochs that takes."""
    seed: int = 0
    """Of adapters' first values and dropout; the order of rows has data.seed."""
    output_dir: str = "runs/luthier"
    """The run's folder: a second start with it resumes."""
    search: Search | None = None

    def dump(self) -> str:
        """YAML that starts the same run again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
