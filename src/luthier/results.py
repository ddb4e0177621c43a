"""What a run gives: its steps one by one, and in the end a folder to be asked, evaluated and exported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .assemble import restore
from .classify import Classifier
from .config import read_run
from .errors import CheckpointError, ConfigError
from .export import export
from .generate import Chat
from .rating import Rater


@dataclass(frozen=True)
class Step:
    """One optimiser step that was taken: `step` counts from 1."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float  # before clipping
    tokens: int
    clipped: bool = False
    skipped: bool = False
    """Its loss or gradient was not finite, and nothing moved."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the objective tells beside its loss."""


@dataclass(frozen=True)
class Result:
    """A finished run: where it is, and base against tuned."""

    folder: Path
    report: dict

    def chat(self) -> Chat:
        """The tuned model, ready to be asked."""
        made, _ = restore(self.folder)
        return Chat(made.network, made.renderer)

    def classifier(self) -> Classifier:
        """The tuned model of a run that classifies, ready to be given texts."""
        self._check("classifier", "labelled", "tagged")
        made, _ = restore(self.folder)
        chat = made.config.data.format == "labelled_messages"
        return Classifier(made.network, made.renderer, chat, made.config.batch.micro_tokens)

    def rater(self) -> Rater:
        """The tuned reward model, ready to be given conversations."""
        self._check("rater", "whole_pairs")
        made, _ = restore(self.folder)
        return Rater(made.network, made.renderer, made.config.data.columns, made.config.batch.micro_tokens)

    def _check(self, asked: str, *rows: str) -> None:
        """Whether the run is one for what is asked of it."""
        config = read_run(self.folder)
        if config.objective.rows not in rows:
            raise ConfigError(f"{asked}(): {self.folder} is a run of method={config.method}, another kind")

    def export(self, out: str | Path, kind: str = "adapter", dtype: str | None = None) -> dict:
        """Write the model where other tools read it: `adapter`, `merged` or `full`, the latter two in `dtype`."""
        return export(self.folder, Path(out), kind, dtype)


def open_run(folder: str | Path) -> Result:
    """A finished run, to be asked, evaluated or exported."""
    path = Path(folder) / "report.json"
    if not path.exists():
        raise CheckpointError(f"{folder} holds no finished run: it has no report.json; go on with `luthier train`")
    return Result(Path(folder), json.loads(path.read_text()))
