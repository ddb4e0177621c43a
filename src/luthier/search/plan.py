"""A search as it was asked for, checked whole before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config import configure, gathered
from ..errors import ConfigError
from ..fields import Config, Search
from . import metrics as metrics_
from .metrics import CHEAP, Metric
from .space import Space, overrides, read, refused
from .storage import hidden, optuna

TRIALS = 20
Functions = Mapping[str, Callable[..., Any]]
ALIKE = ("output_dir", "monitor", "parallel", "checkpoint", "search")  # may differ when a search goes on


@dataclass(frozen=True)
class Plan:
    """What is searched, over what, and how much of it."""

    sources: tuple[Mapping, ...]
    """Keys of the configuration, as they were given."""
    config: Config
    """The configuration as it is."""
    settings: Search
    space: Space
    metrics: list[Metric]
    folder: Path
    functions: Functions = field(default_factory=dict)
    rewards: Functions = field(default_factory=dict)
    places: tuple[str, ...] = ()
    """Of a command line: the options that name functions, for workers to be given as well."""
    remarks: tuple[str, ...] = ()

    @cached_property
    def trials(self) -> int:
        """As many as were asked for, and no more than there are points."""
        points = self.space.points()
        if self.settings.sampler == "grid":
            assert points is not None
            return min(self.settings.trials or len(points), len(points))
        wanted = self.settings.trials or TRIALS
        return wanted if points is None else min(wanted, len(points))

    @property
    def directions(self) -> list[str]:
        return [metric.direction for metric in self.metrics]

    @cached_property
    def default(self) -> dict[str, Any] | None:
        """The labels of the configuration as it is, where it lies in the space."""
        return self.space.of(self.config.model_dump(mode="json"))

    @property
    def pruner(self) -> str:
        """The one that `auto` means here."""
        wanted, every = self.settings.pruner, self.config.evaluation.every
        if wanted != "auto":
            return wanted
        known = self.metrics[0].key in CHEAP or self.config.evaluation.generate_every
        return "median" if every and len(self.metrics) == 1 and not self.metrics[0].cost and known else "none"

    def config_of(self, values: Mapping[str, Any], *more: Mapping) -> Config:
        """The configuration with the values of a trial; ConfigError where they do not go together."""
        return configure(*self.sources, *overrides(values), *more)

    def trial_folder(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:04}"

    def told(self) -> dict[str, Any]:
        """What must be the same for all that work at this search, and when it goes on."""
        whole = self.config.model_dump(mode="json", exclude=set(ALIKE))
        named = [f"{m.name} ({m.direction})" for m in self.metrics]
        return {"space": self.space.described(), "metrics": named} | whole

    def build_pruner(self) -> Any:
        pruners, every = optuna().pruners, self.config.evaluation.every or 1
        if self.pruner == "median":
            return pruners.MedianPruner(n_startup_trials=min(5, max(3, self.trials // 4)))
        if self.pruner == "hyperband":
            return pruners.HyperbandPruner(min_resource=every, max_resource=self.config.max_steps or "auto")
        return pruners.NopPruner()


def plan(
    *sources: str | Path | Mapping | Config, space: Mapping[str, Any] | None = None, method: str | None = None,
    functions: Functions | None = None, rewards: Functions | None = None, places: Sequence[str] = (), **settings: Any,
) -> Plan:  # fmt: skip
    """A search of what a configuration's sources say, with `space` and `settings` over their section `search`."""
    plain = [s.model_dump(mode="json") if isinstance(s, Config) else s for s in sources]
    values, problems = gathered(*plain)
    if method is not None:
        values["method"] = method
    section = values.pop("search", None) or {}
    if isinstance(section, Mapping):
        section = {**section, **{key: value for key, value in settings.items() if value is not None}}
        section["space"] = {**(section.get("space") or {}), **(space or {})}
    try:
        whole = configure(values, {"search": section})
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems:
        raise ConfigError(problems)
    chosen = whole.search
    assert chosen is not None
    config = whole.model_copy(update={"search": None})
    found = read(chosen.space)
    remarks = refused(found, [values])
    made = Plan(
        (values,), config, chosen, found, metrics_.read(chosen.metrics, config),
        Path(chosen.folder or f"{config.output_dir.rstrip('/')}-search"), functions or {}, rewards or {}, tuple(places),
        tuple(remarks),
    )  # fmt: skip
    if problems := list(_contradictions(made)):
        raise ConfigError(problems)
    optuna()
    return made


def _contradictions(plan: Plan) -> Any:
    s, config = plan.settings, plan.config
    if s.sampler == "grid" and plan.space.points() is None:
        endless = next(d for d in plan.space.dimensions if d.points() is None)
        yield (
            f"search.sampler=grid: {endless.key}={endless} has no end of values: give choices, such as "
            f"{_some(endless.low, endless.high, endless.log)}, or a step: uniform(low, high, step)"
        )
    if s.sampler == "gp" and not find_spec("scipy"):
        yield "search.sampler=gp needs SciPy: pip install 'luthier[search]'"
    if s.pruner in ("median", "hyperband"):
        if len(plan.metrics) > 1:
            yield f"search.pruner={s.pruner} ends trials by one metric, and here are {len(plan.metrics)}: use none"
        if config.evaluation.every is None:
            yield f"search.pruner={s.pruner} looks at evaluations: give evaluation.every, or search.pruner=none"
        elif plan.metrics[0].key not in CHEAP and config.evaluation.generate and not config.evaluation.generate_every:
            yield (
                f"search.pruner={s.pruner}: {plan.metrics[0].name} is counted at both ends only: give "
                "evaluation.generate_every=true, or search.pruner=none"
            )
    if isinstance(config.data.validation, int | float) and "data.seed" in plan.space.by_key:
        yield "data.seed cannot be searched: it says which rows are held out; give them as a file in data.validation"
    if s.workers > 1 and (plan.functions or plan.rewards) and not plan.places:
        yield "search.workers: functions of Python do not reach other processes: name them as FILE.py:FUNCTION"
    if s.launcher == "ray" and not find_spec("ray"):
        yield "search.launcher=ray: Ray is not installed: pip install 'ray[default]', or use launcher=local"
    if s.storage and s.storage.startswith("redis") and not find_spec("redis"):
        yield f"search.storage={hidden(s.storage)!r}: pip install redis"


def _some(low: float, high: float, log: bool) -> list[float]:
    """Three values of an interval, for a message."""
    return [low, float(f"{(low * high) ** 0.5 if log else (low + high) / 2:.3g}"), high]
