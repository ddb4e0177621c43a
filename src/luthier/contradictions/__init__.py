"""What no single field is wrong about, but several together, and files that are not there; a file for each section."""

from __future__ import annotations

from ..fields import Config
from . import data, evaluation, model, objective, precision, steps, trainable


def contradictions(config: Config, weights: bool = True, training: bool = True) -> list[str]:
    """All of them, told in the words of the configuration, each with its remedy.

    Without `weights`, of a run that is only reckoned with: its model may lack them, and it may have no data. Without
    `training`, of a run that is asked or exported: what it learnt from and with may have gone.
    """
    return [
        *steps.problems(config),
        *evaluation.problems(config),
        *objective.problems(config, weights, training),
        *trainable.problems(config),
        *data.problems(config, weights, training),
        *precision.problems(config),
        *model.problems(config, weights),
    ]
