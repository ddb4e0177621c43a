"""What training will see of a file: totals, lengths, packing, and the tokens of a row with what is learnt of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

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
        "rows": dataset.rows,
        "usable": dataset.rows - len(dataset.faults),
        "documents": len(dataset),
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


class Piece(NamedTuple):
    """The text of one token; of several where they share a character."""

    text: str
    weight: float
    ids: list[int]


def tokens_of(dataset: Dataset, index: int) -> list[Piece]:
    """A document token by token, each as it reads after the one before: some tokenizers drop a text's first space."""
    document, tokenizer = dataset.documents[index], dataset.renderer.tokenizer
    pieces: list[Piece] = []
    waiting: list[int] = []
    before: list[int] = []
    weight = 0.0
    for token, weight in zip(document.tokens.tolist(), document.weights.tolist()):
        waiting.append(token)
        text = _after(tokenizer, before, waiting)
        if not text.endswith("\ufffd"):
            pieces.append(Piece(text, weight, waiting))
            before, waiting = waiting, []
    if waiting:
        pieces.append(Piece(tokenizer.decode(waiting), weight, waiting))
    return pieces


def _after(tokenizer: Any, before: list[int], tokens: list[int]) -> str:
    head, whole = tokenizer.decode(before), tokenizer.decode([*before, *tokens])
    return whole[len(head) :] if before and whole.startswith(head) else tokenizer.decode(tokens)


def visible(text: str) -> str:
    """What a terminal or a browser would act on or leave out, shown; line breaks stay."""

    def mark(c: str) -> str:
        return c if c in "\n\t" or c.isprintable() else f"[U+{ord(c):04X}]"

    return text if text.isprintable() else "".join(map(mark, text))


def bracketed(pieces: Sequence[Piece]) -> str:
    """For terminals without colour: what is learnt, between brackets, with its weight where that is not 1."""
    texts = []
    for weight, members in groupby(pieces, key=lambda piece: piece.weight):
        text = visible("".join(piece.text for piece in members))
        texts.append(f"\u27e6{factor(weight)}{text}\u27e7" if weight else text)
    return "".join(texts)


def factor(weight: float) -> str:
    return "" if weight == 1 else f"\u00d7{weight:g} "


def coloured(pieces: Sequence[Piece]) -> Any:
    """Learnt tokens green, the others dim, alternating so that their borders show."""
    from rich.text import Text

    made = Text()
    for position, piece in enumerate(pieces):
        shade = "on grey15" if position % 2 else ""
        made.append(visible(piece.text), style=f"{'bold green' if piece.weight else 'dim'} {shade}")
    return made


def labels(dataset: Dataset, indices: Sequence[int]) -> list[str]:
    """What to call documents: by their row, and by the part of it where a row is several."""
    parts = Counter(document.row for document in dataset.documents)
    seen: Counter = Counter()
    names = {}
    for index, document in enumerate(dataset.documents):
        seen[document.row] += 1
        count = parts[document.row]
        names[index] = f"{document.row}" + (f" part {seen[document.row]} of {count}" if count > 1 else "")
    return [names[index] for index in indices]
