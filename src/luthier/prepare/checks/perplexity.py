"""Rows that the model itself finds far less likely than the others, or far likelier."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from ..views import View
from .check import Again, Check, Decision, Gathered, Gatherer

HIGH, LOW = "high", "low"
TOGETHER = 512  # rows that are scored, and kept, at a time
_FLOOR = 0.1  # of the deviation of log perplexities: rows that are all about as likely are no reason to find some
_BOUND = 700.0  # of what is put into an exponential


class Perplexity(Check):
    """Of what is learnt of a row, given what stands before it, by the recipe's `model` as it is; made where it is asked
    for, as it takes about as long as a third of a pass of training."""

    whats: ClassVar = (HIGH, LOW)
    by_default: ClassVar = False

    kind: Literal["perplexity"] = "perplexity"
    action: Literal["drop", "keep"] = "keep"
    max: float | None = Field(None, gt=1.0)
    """The highest perplexity that a row may have."""
    min: float | None = Field(None, ge=1.0)
    """The lowest."""
    deviations: float = Field(5.0, gt=0)
    """Without either, how far out is far, of the logarithm: multiples of a robust standard deviation (1.4826 x MAD)."""
    least: int = Field(8, ge=1)
    """Rows with fewer learnt tokens are not judged: a word more or less decides over them."""
    max_length: int = Field(1024, ge=2)
    """Tokens of a row that are read."""

    _model: tuple[str, str] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Perplexity:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}")
        return self

    def wanting(self) -> str | None:
        if self.action == "drop" and self.min is None and self.max is None:
            return "action=drop needs min or max; the recipe of an audit has both"
        return None

    def decides(self) -> bool:
        return self.action == "drop"

    def prepared(self, given: Mapping[str, str]) -> Check:
        made = self.model_copy()
        made._model = (given["model"], given["tokenizer"]) if "model" in given else None
        return made

    def gatherer(self) -> Gatherer:
        return _Rows()

    def decide(self, gathered: Sequence[Gathered], again: Again) -> Decision:
        raise AssertionError("it keeps what it has done")

    def decided(self, gathered: Sequence[Gathered], again: Again, folder: Path) -> Decision:
        wanted = sum(len(g.arrays["rows"]) for g in gathered)
        parts = [*self._scores(again, folder)]
        assert sum(len(part["rows"]) for part in parts) == wanted, "the rows are those that were gathered"
        rows, nll, tokens = (np.concatenate([part[name] for part in parts]) for name in ("rows", "nll", "tokens"))
        judged = tokens >= self.least
        return self._judged(rows[judged], nll[judged] / tokens[judged], len(rows))

    def _judged(self, rows: np.ndarray, logs: np.ndarray, count: int) -> Decision:
        """By the logarithms of rows' perplexities; what is not finite is higher than anything."""
        logs = np.where(np.isfinite(logs), logs, _BOUND)
        summary: dict[str, Any] = {"rows": count, "judged": len(rows)}
        if not len(rows):
            return Decision(summary=summary)
        values = np.exp(np.minimum(logs, _BOUND))
        quantiles = np.quantile(values, [0, 0.01, 0.5, 0.9, 0.99, 1])
        names = ("min", "p1", "median", "p90", "p99", "max")
        summary["perplexity"] = {name: _rounded(value) for name, value in zip(names, quantiles.tolist())}
        low, high = self.min, self.max
        if low is None and high is None:
            low, high = bounds(logs, self.deviations)
            summary["proposed"] = {"min": low, "max": high}
        above, below = values > (high if high is not None else np.inf), values < (low if low is not None else 0.0)
        middle = f"perplexity {{number:,.2f}}, median {quantiles[2]:,.2f}"
        out = above | below
        return Decision(rows[out], [(HIGH, middle), (LOW, middle)], below[out].astype(np.uint8), numbers=values[out],
                        summary=summary)  # fmt: skip

    def _scores(self, again: Again, folder: Path) -> Iterator[Mapping[str, np.ndarray]]:
        """Some rows at a time; those that were scored before a kill are read."""
        from ..looking import load, save

        model, views = None, iter(again())
        for number in count():
            if not (part := list(islice(views, TOGETHER))):
                return
            path = folder / f"{self.kind}-scores-{number:06}.safetensors"
            if not path.exists():
                model = model or self._loaded()
                nll, tokens = model([view for _, view in part])
                save(path, {"rows": np.array([row for row, _ in part]), "nll": nll, "tokens": tokens})
            yield load(path)

    def _loaded(self) -> Any:
        from ..likelihood import Likelihood

        assert self._model is not None, "a recipe with this check has a model"
        return Likelihood(*self._model, self.max_length)

    def proposed(self, summary: Mapping) -> Check:
        return self.model_copy(update=summary["proposed"]) if "proposed" in summary else self


def bounds(logs: np.ndarray, deviations: float) -> tuple[float, float]:
    """(lowest, highest) perplexity: so many robust standard deviations from the median, of logarithms."""
    middle = float(np.median(logs))
    spread = max(1.4826 * float(np.median(np.abs(logs - middle))), _FLOOR)
    low, high = (math.exp(min(middle + sign * deviations * spread, _BOUND)) for sign in (-1, 1))
    return max(1.0, _rounded(low)), _rounded(high)


def _rounded(value: float) -> float:
    """To four digits."""
    return float(f"{value:.4g}")


class _Rows(Gatherer):
    def __init__(self) -> None:
        self.rows = array("q")

    def add(self, number: int, view: View) -> None:
        self.rows.append(number)

    def arrays(self) -> dict[str, np.ndarray]:
        return {"rows": np.array(self.rows, np.int64)}
