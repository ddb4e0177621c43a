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

HIGH, LOW = "high", "low"  # of perplexity
DENSE, THIN = "dense", "thin"  # of bits a byte: more than words have, or fewer
BOUNDS = ("max", "min", "max_bits_per_byte", "min_bits_per_byte")
TOGETHER = 512  # rows that are scored, and kept, at a time
_FLOOR = 0.1  # of the deviation of log perplexities: rows that are all about as likely are no reason to find some
_WIDER = 1.5  # of bits themselves; of logarithms, a bound is beyond all that a byte can cost where rows differ much
_BOUND = 700.0  # of what is put into an exponential


class Perplexity(Check):
    """Of what is learnt of a row, given what stands before it, by the recipe's `model` as it is; made where it is asked
    for, as it takes about as long as a third of a pass of training."""

    whats: ClassVar = (HIGH, LOW, DENSE, THIN)
    by_default: ClassVar = False

    kind: Literal["perplexity"] = "perplexity"
    action: Literal["drop", "keep"] = "keep"
    max: float | None = Field(None, gt=1.0)
    """The highest perplexity that a row may have."""
    min: float | None = Field(None, ge=1.0)
    """The lowest."""
    max_bits_per_byte: float | None = Field(None, gt=0.0)
    """The most bits that a byte of a row may cost. Where letters are those of no words (base64, wrong keys), tokens are
    short, and each alone is not unlikely; their bytes are."""
    min_bits_per_byte: float | None = Field(None, ge=0.0)
    """The fewest."""
    deviations: float = Field(3.5, gt=0)
    """Without any of these, how far out is far, of logarithms: multiples of a robust standard deviation (1.4826 x MAD;
    3.5 is that of Iglewicz and Hoaglin, 1993). Of the most bits also 1.5 times as many of the bits themselves, where
    that is less."""
    least: int = Field(8, ge=1)
    """Rows with fewer learnt tokens are not judged: a word more or less decides over them."""
    max_length: int = Field(1024, ge=2)
    """Tokens of a row that are read."""

    _model: tuple[str, str] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Perplexity:
        for most, least in (("max", "min"), ("max_bits_per_byte", "min_bits_per_byte")):
            high, low = getattr(self, most), getattr(self, least)
            if low is not None and high is not None and low > high:
                raise ValueError(f"{least}={low} is more than {most}={high}")
        return self

    def bounds(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in BOUNDS}

    def wanting(self) -> str | None:
        if self.action == "drop" and not any(bound is not None for bound in self.bounds().values()):
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
        rows, nll, tokens, sizes = (
            np.concatenate([part[name] for part in parts]) for name in ("rows", "nll", "tokens", "bytes")
        )
        judged = (tokens >= self.least) & (sizes > 0)
        logs, bits = nll[judged] / tokens[judged], nll[judged] / sizes[judged] / math.log(2)
        return self._judged(rows[judged], logs, bits, len(rows))

    def _judged(self, rows: np.ndarray, logs: np.ndarray, bits: np.ndarray, count: int) -> Decision:
        """By the logarithms of rows' perplexities, and by bits a byte; what is not finite is higher than anything."""
        logs = np.minimum(np.where(np.isfinite(logs), logs, _BOUND), _BOUND)
        bits = np.where(np.isfinite(bits), bits, np.inf)
        summary: dict[str, Any] = {"rows": count, "judged": len(rows)}
        if not len(rows):
            return Decision(summary=summary)
        values = np.exp(logs)
        summary["perplexity"], summary["bits_per_byte"] = _spread(values), _spread(bits)
        allowed = self.bounds()
        if not any(bound is not None for bound in allowed.values()):
            lowest, highest = bounds(logs, self.deviations)
            fewest, most = bounds(np.log(np.clip(bits, 1e-9, 1e9)), self.deviations)
            most = min(most, above(bits, _WIDER * self.deviations))
            allowed = {
                "max": highest, "min": max(1.0, lowest), "max_bits_per_byte": most, "min_bits_per_byte": fewest,
            }  # fmt: skip
            summary["proposed"] = allowed
        high, low, most, fewest = (
            other if (bound := allowed[name]) is None else bound for name, other in zip(BOUNDS, (np.inf, 0, np.inf, 0))
        )
        codes = np.select([values > high, values < low, bits > most, bits < fewest], [0, 1, 2, 3], default=4)
        out = codes < 4
        told = f"perplexity {{number:,.2f}}, median {summary['perplexity']['median']:,.2f}"
        cost = f"{{number:,.2f}} bits a byte, median {summary['bits_per_byte']['median']:,.2f}"
        return Decision(
            rows[out], [(HIGH, told), (LOW, told), (DENSE, cost), (THIN, cost)], codes[out].astype(np.uint8),
            numbers=np.where(codes < 2, values, bits)[out], summary=summary,
        )  # fmt: skip

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
                nll, tokens, sizes = model([view for _, view in part])
                rows = np.array([row for row, _ in part])
                save(path, {"rows": rows, "nll": nll, "tokens": tokens, "bytes": sizes})
            yield load(path)

    def _loaded(self) -> Any:
        from ..likelihood import Likelihood

        assert self._model is not None, "a recipe with this check has a model"
        return Likelihood(*self._model, self.max_length)

    def proposed(self, summary: Mapping) -> Check:
        return self.model_copy(update=summary["proposed"]) if "proposed" in summary else self


def _spread(values: np.ndarray) -> dict[str, float]:
    quantiles = np.quantile(values, [0, 0.01, 0.5, 0.9, 0.99, 1], method="nearest")
    return dict(zip(("min", "p1", "median", "p90", "p99", "max"), map(_rounded, quantiles.tolist())))


def bounds(logs: np.ndarray, deviations: float) -> tuple[float, float]:
    """(lowest, highest) value: so many robust standard deviations from the median, of logarithms."""
    middle = float(np.median(logs))
    spread = max(1.4826 * float(np.median(np.abs(logs - middle))), _FLOOR)
    low, high = (math.exp(min(middle + sign * deviations * spread, _BOUND)) for sign in (-1, 1))
    return _rounded(low), _rounded(high)


def above(bits: np.ndarray, deviations: float) -> float:
    """Highest value: so many robust standard deviations above the median, of the values themselves."""
    middle = float(np.median(bits))
    return _rounded(middle + deviations * max(1.4826 * float(np.median(np.abs(bits - middle))), _FLOOR))


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
