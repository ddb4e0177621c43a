"""How long rows are, in characters, words, and the model's own tokens; and those that are far from the others."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from ..views import View
from .check import Again, Check, Decision, Finding, Gathered, Gatherer

_FLOOR = 0.15  # of the deviation of log lengths: rows that are all about as long are no reason to find every other one
TOGETHER = 256  # rows that are tokenised at a time


class Length(Check):
    """Bounds that are given hold for each row; without any, an audit finds what lies far out, and proposes bounds."""

    whats: ClassVar = ("short", "long", "empty")

    kind: Literal["length"] = "length"
    action: Literal["drop", "keep"] = "keep"
    min: int | None = Field(None, ge=0)
    """Fewest units that a row may have."""
    max: int | None = Field(None, ge=1)
    """Most of them."""
    unit: Literal["characters", "words", "tokens"] = "characters"
    """What the bounds count: of all texts of a row together; `tokens` are those of the recipe's `model`."""
    deviations: float = Field(5.0, gt=0)
    """How far out is far, of the logarithm of lengths, in robust standard deviations (1.4826 times the MAD)."""

    _tokenizer: Any = None

    @model_validator(mode="after")
    def _ordered(self) -> Length:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}")
        return self

    def wanting(self) -> str | None:
        if self.action == "drop" and self.min is None and self.max is None:
            return "action=drop needs min or max; the recipe of an audit has both"
        return None

    def decides(self) -> bool:
        return self.action == "drop" and self.unit == "tokens"

    def prepared(self, given: Mapping[str, str]) -> Check:
        if "tokenizer" not in given:
            return self
        from tokenizers import Tokenizer

        made = self.model_copy()
        made._tokenizer = Tokenizer.from_str(given["tokenizer"])
        made._tokenizer.no_truncation()
        made._tokenizer.no_padding()
        return made

    def look(self, view: View) -> Sequence[Finding]:
        if not any(text.text.strip() for text in view.texts) and "input_ids" not in view.values:
            return [Finding("empty", "no text at all")]
        if (self.min is None and self.max is None) or self.unit == "tokens":
            return ()
        length = _measure(view, self.unit)
        if self.min is not None and length < self.min:
            return [Finding("short", f"{length:,} {self.unit}")]
        if self.max is not None and length > self.max:
            return [Finding("long", f"{length:,} {self.unit}")]
        return ()

    def gatherer(self) -> Gatherer:
        return _Lengths(self._tokenizer)

    def decide(self, gathered: Sequence[Gathered], again: Again) -> Decision:
        rows = np.concatenate([g.arrays["rows"] + g.first for g in gathered])
        found = {
            unit: np.concatenate([g.arrays[unit] for g in gathered])
            for unit in ("characters", "words", "tokens") if all(unit in g.arrays for g in gathered)
        }  # fmt: skip
        summary: dict[str, Any] = {unit: quantiles(lengths) for unit, lengths in found.items()}
        lengths = found[self.unit]
        summary["histogram"] = {"unit": self.unit, "bins": histogram(lengths)}
        low, high = self.min, self.max
        if low is None and high is None:
            low, high = bounds(lengths, self.deviations)
            summary["proposed"] = {"min": low, "max": high}
        elif self.unit != "tokens":  # found row by row
            return Decision(summary=summary)
        short = (lengths < (low or 0)) & (lengths > 0)
        long = lengths > (high if high is not None else np.inf)
        out = short | long
        told = [("short", f"{{number:,.0f}} {self.unit}"), ("long", f"{{number:,.0f}} {self.unit}")]
        return Decision(
            rows[out], told, long[out].astype(np.uint8), numbers=lengths[out].astype(float), summary=summary
        )

    def proposed(self, summary: Mapping) -> Check:
        return self.model_copy(update=summary["proposed"]) if "proposed" in summary else self


def _measure(view: View, unit: str) -> int:
    if unit == "words":
        return len(view.words())
    return sum([len(text.text) for text in view.texts])


def bounds(lengths: np.ndarray, deviations: float) -> tuple[int, int]:
    """The shortest and longest length that is not far out, of the lengths that are not 0."""
    logs = np.log(lengths[lengths > 0].astype(float))
    if not len(logs):
        return 0, 1
    middle = float(np.median(logs))
    spread = max(_FLOOR, 1.4826 * float(np.median(np.abs(logs - middle))))
    return math.floor(math.exp(middle - deviations * spread)), math.ceil(math.exp(middle + deviations * spread))


def quantiles(lengths: np.ndarray) -> dict[str, float]:
    if not len(lengths):
        return {}
    values = np.quantile(lengths, [0, 0.01, 0.5, 0.9, 0.99, 1])
    made = {name: round(float(v)) for name, v in zip(("min", "p1", "median", "p90", "p99", "max"), values)}
    return made | {"mean": round(float(lengths.mean()), 1), "total": int(lengths.astype(np.int64).sum())}


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, up to but without, rows): each bin twice as wide as the one before."""
    if not len(lengths):
        return []
    most = int(lengths.max())
    edges = [0, *(1 << i for i in range(most.bit_length() + 1))]
    counts, _ = np.histogram(lengths, [*edges[:-1], edges[-1]])
    made = [(a, b, int(n)) for a, b, n in zip(edges, edges[1:], counts)]
    first = next((i for i, (*_, n) in enumerate(made) if n), 0)
    return made[first:]


class _Lengths(Gatherer):
    """Tokens are counted of many rows at a time."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.rows, self.characters, self.words, self.tokens = array("i"), array("i"), array("i"), array("i")
        self.waiting: list[list[str]] = []

    def add(self, number: int, view: View) -> None:
        self.rows.append(number)
        self.characters.append(_measure(view, "characters"))
        self.words.append(_measure(view, "words"))
        if self.tokenizer is not None:
            self.waiting.append([text.text for text in view.texts])
            if len(self.waiting) >= TOGETHER:
                self._count()

    def _count(self) -> None:
        flat = [text for texts in self.waiting for text in texts]
        lengths = iter([len(coded.ids) for coded in self.tokenizer.encode_batch(flat, add_special_tokens=False)])
        self.tokens.extend(sum(next(lengths) for _ in texts) for texts in self.waiting)
        self.waiting = []

    def arrays(self) -> dict[str, np.ndarray]:
        made = {"rows": np.array(self.rows, np.int64), "characters": np.array(self.characters, np.int32),
                "words": np.array(self.words, np.int32)}  # fmt: skip
        if self.tokenizer is not None:
            self._count()
            made["tokens"] = np.array(self.tokens, np.int32)
        return made
