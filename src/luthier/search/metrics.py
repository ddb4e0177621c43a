"""What a search makes small or large: figures of the held-out rows, and what a trial costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..config import Config
from ..errors import ConfigError
from ..figures import greater_is_better
from ..settings import hint, nearest

COSTS = {"seconds": "min", "memory": "min", "parameters": "min", "tokens_per_second": "max"}
CHEAP = ("loss", "perplexity", "bits_per_byte", "token_accuracy")  # figures that need no answers


@dataclass(frozen=True)
class Metric:
    """`name` as it was asked for; `key` is that of an evaluation's figure, or one of COSTS."""

    name: str
    key: str
    less: bool
    """Whether less is better."""

    @property
    def cost(self) -> bool:
        return self.key in COSTS

    @property
    def direction(self) -> str:
        return "minimize" if self.less else "maximize"

    def better(self, one: float, other: float) -> bool:
        return one < other if self.less else one > other


def read(names: Sequence[str], config: Config) -> list[Metric]:
    """The metrics of a search; those that can never be measured are told before anything is trained."""
    found = [_metric(name) for name in names or [f"eval.{config.evaluation.metric_for_best_model}"]]
    if not names and config.evaluation.greater_is_better is not None:
        found = [Metric(found[0].name, found[0].key, not config.evaluation.greater_is_better)]
    problems = []
    if config.data.validation is None and any(not m.cost for m in found):
        name = next(m.name for m in found if not m.cost)
        problems.append(f"{name} is a figure of held-out rows: give data.validation, for example data.validation=0.05")
    keys = [m.key for m in found]
    if twice := sorted({m.name for m in found if keys.count(m.key) > 1}):
        problems.append(f"--metric {twice[0]} is given twice")
    if all(m.cost for m in found):
        problems.append(
            f"--metric {found[0].name} alone says nothing of quality: the cheapest trial would be the best; add one of "
            "the held-out rows, such as --metric eval.loss"
        )
    if problems:
        raise ConfigError(problems)
    return found


def _metric(text: str) -> Metric:
    name, colon, way = text.partition(":")
    if colon and way not in ("min", "max"):
        raise ConfigError(f"--metric {text}: {way!r} is no direction: write {name}:min or {name}:max")
    key = name.removeprefix("eval.")
    if key == name and name not in COSTS and "." not in name and (meant := nearest(name, COSTS)):
        raise ConfigError(f"--metric {name} is unknown; did you mean {meant!r}? (figures of held-out rows: eval.loss)")
    if not key:
        raise ConfigError(f"--metric {text!r}: expected a name, such as eval.loss or seconds")
    return Metric(name, key, way == "min" if colon else _less(key, name))


def _less(key: str, name: str) -> bool:
    if name in COSTS:
        return COSTS[name] == "min"
    return not greater_is_better(key)


def check_logged(metrics: Sequence[Metric], figures: Mapping) -> None:
    """ConfigError where a metric is not among the figures of an evaluation, with the names of those that are."""
    known = sorted(k for k in figures if f"{k}_interval" in figures)
    for metric in metrics:
        if not metric.cost and metric.key not in figures:
            near = nearest(metric.key, known)
            meant = hint(f"eval.{near}" if near else None) or "."
            raise ConfigError(
                f"--metric {metric.name} is never measured{meant} Measured are "
                f"{', '.join('eval.' + k for k in known)}, and of each trial {', '.join(COSTS)}. Figures of answers "
                "need evaluation.generate"
            )


def front(metrics: Sequence[Metric], values: Mapping[int, Sequence[float]]) -> list[int]:
    """The trials that no other one beats in all metrics (Pareto), best in the first metric first; of equals the
    earliest."""

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        pairs = list(zip(metrics, one, other))
        return all(not m.better(b, a) for m, a, b in pairs) and any(m.better(a, b) for m, a, b in pairs)

    found = [n for n, v in values.items() if not any(beats(other, v) for other in values.values())]
    kept, seen = [], set()
    for number in sorted(found):
        if tuple(values[number]) not in seen:
            kept.append(number)
            seen.add(tuple(values[number]))
    sign = 1 if metrics[0].less else -1
    return sorted(kept, key=lambda n: (sign * values[n][0], n))
