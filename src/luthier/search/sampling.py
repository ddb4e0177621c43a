"""What to try next: a function of the space, what has been tried, a seed and the number of the trial.

Nothing is kept between trials, so that a search that was killed and goes on tries what it would have tried.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .space import Dimension, Space
from .storage import optuna

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

REDRAWS = 32  # of what was tried before: a run with the same settings ends with the same figures


def distribution(d: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if d.choices:
        return CategoricalDistribution(d.labels)
    if d.whole:
        return IntDistribution(int(d.low), int(d.high), log=d.log, step=int(d.step or 1))
    return FloatDistribution(float(d.low), float(d.high), log=d.log, step=d.step)


def propose(
    space: Space, tried: Sequence[FrozenTrial], number: int, seed: int, sampler: str, directions: Sequence[str],
    trials: int, default: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The labels of trial `number`, which the others have not where the space has any left.

    `tried` are finished trials and those that run. Trial 0 of all but a grid has the configuration's own values.
    """
    points = space.points()
    if sampler == "grid":
        assert points is not None, "checked with the settings"
        return points[number % len(points)]
    if number == 0 and default is not None:
        return default
    known = {_mark(trial.params) for trial in tried}
    labels: dict[str, Any] = {}
    for attempt in range(REDRAWS):
        name = sampler if attempt < REDRAWS // 2 else "random"
        labels = _ask(space, tried, mixed(seed, number, attempt), name, directions, trials)
        if _mark(labels) not in known:
            return labels
    left = [one for one in points or [] if _mark(one) not in known]
    return left[mixed(seed, number) % len(left)] if left else labels


def mixed(*numbers: int) -> int:
    """One seed of several."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _mark(labels: dict) -> str:
    return json.dumps(sorted(labels.items()))


def _ask(
    space: Space, tried: Sequence[FrozenTrial], seed: int, sampler: str, directions: Sequence[str], trials: int
) -> dict[str, Any]:  # fmt: skip
    """One draw of a sampler that has seen `tried`, in a study of its own that is given up again."""
    library = optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", library.exceptions.ExperimentalWarning)
        made = _sampler(sampler, seed, trials, any(d.when for d in space.dimensions) and len(directions) == 1)
        study = library.create_study(directions=[*directions], sampler=made)
        if sampler != "random":
            study.add_trials(_seen(tried, sampler, directions))
        trial = study.ask()
        labels: dict[str, Any] = {}
        for d in space.dimensions:
            if space.applies(d, labels):
                labels[d.key] = _suggest(trial, d)
    return labels


def _suggest(trial: Any, d: Dimension) -> Any:
    if d.choices:
        return trial.suggest_categorical(d.key, d.labels)
    if d.whole:
        return trial.suggest_int(d.key, int(d.low), int(d.high), log=d.log, step=int(d.step or 1))
    return trial.suggest_float(d.key, float(d.low), float(d.high), log=d.log, step=d.step)


def _sampler(name: str, seed: int, trials: int, conditional: bool) -> Any:
    from optuna import samplers

    startup = min(10, max(4, trials // 4))  # trials at random before there is enough to learn from
    if name == "tpe":
        return samplers.TPESampler(seed=seed, n_startup_trials=startup, group=conditional, constant_liar=True)
    if name == "gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
    return samplers.RandomSampler(seed=seed)


def _seen(tried: Sequence[FrozenTrial], sampler: str, directions: Sequence[str]) -> list[FrozenTrial]:
    """As a sampler is shown them: what has failed is as bad as the worst, as samplers learn nothing of failures."""
    from optuna.trial import TrialState, create_trial

    ended = [t.values for t in tried if t.state in (TrialState.COMPLETE, TrialState.PRUNED) and t.values]
    out = []
    for trial in tried:
        values, state, middle = trial.values, trial.state, trial.intermediate_values
        if state == TrialState.FAIL:
            if not ended:
                continue
            values, state, middle = _worst(ended, directions), TrialState.COMPLETE, {}
        elif state == TrialState.PRUNED and (sampler == "gp" or not middle):
            if not values:
                continue
            state = TrialState.COMPLETE
        if state == TrialState.RUNNING:
            running = create_trial(
                state=state, params=trial.params, distributions=trial.distributions, system_attrs={}, values=None
            )
            out.append(running)
            continue
        out.append(
            create_trial(
                state=state, values=values, params=trial.params, distributions=trial.distributions,
                intermediate_values=middle,
            )
        )  # fmt: skip
    return out


def _worst(values: Sequence[Sequence[float]], directions: Sequence[str]) -> list[float]:
    return [max(c) if way == "minimize" else min(c) for c, way in zip(zip(*values), directions)]
