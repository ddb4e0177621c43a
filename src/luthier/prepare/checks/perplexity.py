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

HIGH, LOW, DENSE = "high", "low", "dense"
BOUNDS = ("min", "max", "min_bits", "max_bits")
TOGETHER = 512  # rows that are scored, and kept, at a time
_FLOOR = 0.1  # of the deviations: rows that are all about as likely are no reason to find some
_BOUND = 700.0  # of what is put into an exponential


class Perplexity(Check):
    """Of what is learnt of a row, given what stands before it, by the recipe's `model` as it is; made where it is asked
    for, as it takes about as long as a third of a pass of training. Tokens of base64 or binary are short, so that each
    is no less likely than a word; they are `dense`, of more bits a byte than text is."""

    whats: ClassVar = (HIGH, LOW, DENSE)
    by_default: ClassVar = False

    kind: Literal["perplexity"] = "perplexity"
    action: Literal["drop", "keep"] = "keep"
    max: float | None = Field(None, gt=1.0)
    """The highest perplexity that a row may have."""
    min: float | None = Field(None, ge=1.0)
    """The lowest."""
    max_bits: float | None = Field(None, gt=0.0)
    """The most bits for a byte of UTF-8: the negative log-likelihood of a row to base 2, over its bytes."""
    min_bits: float | None = Field(None, ge=0.0)
    """The least: what is said over and over has next to none."""
    deviations: float = Field(5.0, gt=0)
    """Without any, how far out is far: multiples of a robust standard deviation (1.4826 x MAD), of the logarithms for
    perplexity and `min_bits`, of the bits themselves for `max_bits`."""
    least: int = Field(8, ge=1)
    """Rows with fewer learnt tokens are not judged: a word more or less decides over them."""
    max_length: int = Field(1024, ge=2)
    """Tokens of a row that are read."""

    _model: tuple[str, str] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Perplexity:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}")
        if self.min_bits is not None and self.max_bits is not None and self.min_bits > self.max_bits:
            raise ValueError(f"min_bits={self.min_bits} is more than max_bits={self.max_bits}")
        return self

    def wanting(self) -> str | None:
        if self.action == "drop" and not self._bounds():
            return f"action=drop needs {', '.join(BOUNDS[:-1])} or {BOUNDS[-1]}; the recipe of an audit has all"
        return None

    def _bounds(self) -> dict[str, float]:
        """Those that are set."""
        return {name: value for name in BOUNDS if (value := getattr(self, name)) is not None}

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
        rows, nll, tokens, size = (
            np.concatenate([part[name] for part in parts]) for name in ("rows", "nll", "tokens", "bytes")
        )
        judged = tokens >= self.least
        nll = nll[judged]
        bits = nll / np.log(2) / np.maximum(size[judged], 1)
        return self._judged(rows[judged], nll / tokens[judged], bits, len(rows))

    def _judged(self, rows: np.ndarray, logs: np.ndarray, bits: np.ndarray, count: int) -> Decision:
        """By the logarithms of rows' perplexities, and bits for a byte; what is not finite is higher than anything."""
        logs, bits = (np.where(np.isfinite(values), values, _BOUND) for values in (logs, bits))
        summary: dict[str, Any] = {"rows": count, "judged": len(rows)}
        if not len(rows):
            return Decision(summary=summary)
        values = np.exp(np.minimum(logs, _BOUND))
        middle, middle_bits = float(np.median(values)), float(np.median(bits))
        summary |= {"perplexity": _spread(values), "bits_per_byte": _spread(bits)}
        limits = self._bounds()
        if not limits:
            limits = summary["proposed"] = proposed(logs, bits, self.deviations)
        low, high, least, most = (limits.get(name, end) for name, end in zip(BOUNDS, (0.0, np.inf) * 2))
        of_value, of_bits = f"perplexity {{number:,.2f}}, median {middle:,.2f}", f"median {middle_bits:.2f}"
        of_bits = f"{{number:.2f}} bits a byte, {of_bits}"
        found = {(DENSE, of_bits): bits > most, (HIGH, of_value): values > high, (LOW, of_bits): bits < least,
                 (LOW, of_value): values < low}  # fmt: skip
        codes = np.select([*found.values()], range(len(found)), -1)
        out = codes >= 0
        numbers = np.where(codes % 2 == 0, bits, values)
        return Decision(rows[out], [*found], codes[out], numbers=numbers[out], summary=summary)

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
                nll, tokens, size = model([view for _, view in part])
                save(path, {"rows": np.array([row for row, _ in part]), "nll": nll, "tokens": tokens, "bytes": size})
            yield load(path)

    def _loaded(self) -> Any:
        from ..likelihood import Likelihood

        assert self._model is not None, "a recipe with this check has a model"
        return Likelihood(*self._model, self.max_length)

    def proposed(self, summary: Mapping) -> Check:
        return self.model_copy(update=summary["proposed"]) if "proposed" in summary else self


def proposed(logs: np.ndarray, bits: np.ndarray, deviations: float) -> dict[str, float]:
    """Bounds: so many robust standard deviations from the median."""
    middle, spread = _middle(logs)
    low, high = (math.exp(min(middle + sign * deviations * spread, _BOUND)) for sign in (-1, 1))
    middle, spread = _middle(np.log(np.maximum(bits, 1e-9)))
    least = math.exp(middle - deviations * spread)
    middle, spread = _middle(bits)
    most = middle + deviations * spread
    return dict(zip(BOUNDS, (max(1.0, _rounded(low)), _rounded(high), _rounded(least), _rounded(most))))


def _middle(values: np.ndarray) -> tuple[float, float]:
    middle = float(np.median(values))
    return middle, max(1.4826 * float(np.median(np.abs(values - middle))), _FLOOR)


def _spread(values: np.ndarray) -> dict[str, float]:
    names = {"min": 0.0, "p1": 0.01, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: _rounded(value) for name, value in zip(names, np.quantile(values, [*names.values()]).tolist())}


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
