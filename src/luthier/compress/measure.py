"""The rows of a source, and what is measured on them: held-out loss and perplexity, and a run's answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..data import Data
from ..data.dataset import Dataset, open_rows
from ..data.masks import Renderer
from ..errors import ConfigError
from ..evaluate import answers, held_out
from ..measured import Measured
from ..objectives import NextToken
from .plain import Plain, Say

HELD_OUT = 0.1  # of rows that name none
MICRO_TOKENS = 4096


@dataclass
class Rows:
    """What is learnt from, or looked at, and what is held out; None where no rows were given."""

    data: Data
    training: Dataset
    held_out: Dataset | None


def settings(source: Plain, train: str | None, validation: str | None) -> Data | None:
    """The data of a run, or what is given in its place; None where there is none."""
    own = source.run.data if source.run is not None else None
    held = None if validation is None else _number(validation)
    if train is None:
        if own is None:
            return None
        return own if held is None else own.model_copy(update={"validation": held})
    made = Data(train=train, validation=HELD_OUT if held is None else held)  # type: ignore[call-arg]
    if own is None:
        return made
    kept = {"max_length": own.max_length, "train_on": own.train_on, "long_text": own.long_text, "seed": own.seed}
    return made.model_copy(update=kept)


def _number(text: str) -> str | float | int:
    """A share below 1, a number of rows, or a file."""
    for cast in (int, float):
        try:
            found = cast(text)
        except ValueError:
            continue
        if found <= 0 or (isinstance(found, float) and found >= 1):
            raise ConfigError(f"--held-out={text}: a number of rows, a share between 0 and 1, or a file")
        return found
    return text


def rows(source: Plain, data: Data, say: Say, warn: Say) -> Rows:
    """Read and rendered as training reads them."""
    if data.streaming:
        data = data.model_copy(update={"streaming": False})
    r = source.renderer
    renderer = Renderer(r.tokenizer, data.train_on, data.max_length, data.long_text)
    training, validation = open_rows(data, renderer, None, say, warn)
    assert isinstance(training, Dataset)
    return Rows(data, training, validation)


def calibration(
    source: Plain, found: Rows | None, path: str | None, samples: int, tokens: int, say: Say, warn: Say
) -> list[list[int]]:  # fmt: skip
    """Rows to look at, of a file or of those that are learnt from, never held-out ones: so many, evenly over all of
    them, which may be in an order, each cut to so many tokens."""
    if path is not None:
        data = settings(source, path, None)
        assert data is not None
        dataset = rows(source, data.model_copy(update={"validation": None}), say, warn).training
    else:
        assert found is not None, "checked before"
        dataset = found.training
    wanted = min(samples, len(dataset))
    step = len(dataset) / wanted
    cut = [dataset.documents[int(i * step)].tokens[:tokens].tolist() for i in range(wanted)]
    return [row for row in cut if len(row) > 1]


def measure(source: Plain, dataset: Dataset, answer: bool = True) -> Measured:
    """Loss, perplexity and bits per byte of rows; of a run whose evaluations answer prompts its figures of answers,
    too, on the same rows."""
    made: Any = source  # evaluate.py asks for no more than its network, tokens and ranks
    documents = held_out(made, dataset, MICRO_TOKENS, NextToken().build())
    found, metrics = [], ("exact_match",)
    if answer and source.run is not None and source.run.evaluation.generate:
        e = source.run.evaluation
        metrics = tuple(e.metrics)
        found = answers(made, dataset, e.generate, e.max_new_tokens, e.batch_size)
    return Measured({"held_out": documents}, found, {}, metrics)


def told(figures: dict) -> str:
    """A report of `measured.compare` in a line a figure."""
    lines = []
    for name, figure in figures.items():
        before, after = figure.get("base"), figure.get("tuned")
        if name in ("perplexity", "exact_match") or name.startswith(("f1", "bleu", "chrf", "rouge", "json", "valid")):
            if before is None or after is None:
                continue
            low, high = figure.get("change_interval") or (None, None)
            span = "" if low is None else f" (change {low:+.3g} to {high:+.3g}, 95 %)"
            lines.append(f"  {name}: {before:.4g} -> {after:.4g}{span}")
    return "\n".join(lines)
