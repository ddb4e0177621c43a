"""What training will see of a file: totals, lengths, packing, and the tokens of a row with what is learnt of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from .dataset import Dataset
from .packing import best_fit, fullness, order


def totals(dataset: Dataset, row_tokens: int, seed: int) -> dict:
    """Counts over all rows; `packing_efficiency` is the share of slots that hold a token, in rows of `row_tokens`."""
    lengths, whole = dataset.lengths, [len(d.tokens) for d in dataset.documents]
    documents = order(len(dataset), seed, 0) if lengths else []
    kinds = Counter(fault.kind for fault in dataset.faults)
    return {
        "format": dataset.found,
        "rows": len(dataset) + len(dataset.faults),
        "usable": len(dataset),
        "tokens": dataset.tokens,
        "trained_tokens": dataset.trained_tokens,
        "truncated": kinds.get("truncated", 0),
        "bad_rows": dict(kinds),
        "packing_efficiency": fullness(best_fit(documents, lengths, row_tokens), lengths, row_tokens)
        if lengths
        else 0.0,
        "lengths": _quantiles(whole),
        "histogram": histogram(whole),
    }


def _quantiles(lengths: Sequence[int]) -> dict[str, int]:
    if not lengths:
        return {}
    found = np.quantile(lengths, [0, 0.5, 0.9, 0.99, 1])
    return {name: round(float(v)) for name, v in zip(("min", "median", "p90", "p99", "max"), found)}


def histogram(lengths: Sequence[int], bins: int = 12) -> list[tuple[int, int, int]]:
    """(from, up to but without, rows), on a scale of whole steps."""
    if not lengths:
        return []
    step = max(1, -(-(max(lengths) + 1 - min(lengths)) // bins))
    low = min(lengths) // step * step
    counts = Counter((n - low) // step for n in lengths)
    return [(low + i * step, low + (i + 1) * step, counts.get(i, 0)) for i in range(max(counts) + 1)]


def tokens_of(dataset: Dataset, index: int) -> list[tuple[str, float]]:
    """The text of each token of a document, with its weight. Tokens that share a character are one piece."""
    document, tokenizer = dataset.documents[index], dataset.renderer.tokenizer
    pieces, waiting = [], []
    for token, weight in zip(document.tokens.tolist(), document.weights.tolist()):
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd"):
            pieces.append((text, weight))
            waiting = []
    if waiting:
        pieces.append((tokenizer.decode(waiting), document.weights[-1].item()))
    return pieces


def bracketed(pieces: Sequence[tuple[str, float]]) -> str:
    """For terminals without colour: what is learnt, between brackets."""
    texts = []
    for learnt, members in groupby(pieces, key=lambda piece: piece[1] > 0):
        text = "".join(piece for piece, _ in members)
        texts.append(f"\u27e6{text}\u27e7" if learnt else text)
    return "".join(texts)


def coloured(pieces: Sequence[tuple[str, float]]) -> Any:
    """Learnt tokens green, the others dim, alternating so that their borders show."""
    from rich.text import Text

    made = Text()
    for position, (text, weight) in enumerate(pieces):
        shade = "on grey15" if position % 2 else ""
        made.append(text, style=f"{'bold green' if weight else 'dim'} {shade}")
    return made
