"""What a configuration leaves open, decided: by its own settings at once, by its training rows before anything heavy.

A run's folder keeps what was decided: who reads it decides nothing anew, and who resumes it must decide the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from . import critics
from .fields import Config
from .models import names
from .objectives.objective import Known
from .trainable import adapter_files
from .trainable.adapter import Adapting


def by_settings(config: Config) -> Config:
    """What settings decide of one another: how large a step is, where a model comes from, what an objective needs."""
    if config.batch.examples is None and config.batch.tokens is None:
        config = config.model_copy(update={"batch": config.batch.model_copy(update={"examples": 16})})
    followed = {"model": names.resolved(config.model), "trainable": adapter_files.resolved(config.trainable)}
    config = settled(config.model_copy(update=followed))
    return config.model_copy(update={"objective": critics.resolved(config)})


def by_rows(config: Config, say: Callable[[str], None] = lambda text: None) -> Config:
    """What the training rows decide: the names of their labels, and which kind they are of. DataError without any."""
    if not config.objective.asks_labels:
        return config
    from .data import holdout

    assert not config.data.streaming, "checked with the configuration"
    through_template = False

    def labels() -> Iterator[Any]:
        nonlocal through_template
        for row in holdout.training_rows(config.data, config.objective.rows):
            through_template = through_template or not row.plain
            if row.label is not None:
                yield row.label

    made = settled(config, labels())
    scores, data = made.objective.scores, config.data
    told = f"{len(scores)} labels: {', '.join(scores[:12])}{', ...' if len(scores) > 12 else ''}"
    say(f"{made.objective.problem}, told from the training rows; {told}")
    if through_template and data.format == "auto":  # known to whoever is to label further texts
        data = data.model_copy(update={"format": "labelled_messages"})
    return made.model_copy(update={"data": data})


def settled(config: Config, labels: Iterable[Any] | None = None) -> Config:
    """With what the objective leaves open decided by the settings, and by `labels` of rows where these are at hand."""
    passes = config.epochs if config.max_steps is None and not config.data.streaming else None
    known = Known(not isinstance(config.trainable, Adapting), passes, labels)
    return config.model_copy(update={"objective": config.objective.settled(known)})
