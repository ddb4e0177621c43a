"""What training will see of a file: totals, lengths, packing, and the tokens of a row with what is learnt of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from ..document import Document
from ..labels import NOTHING, ONE, SEVERAL
from .dataset import Dataset
from .packing import best_fit, fullness, order

SIDES = {  # what the members of a row are
    "pairs": ("chosen", "rejected"), "whole_pairs": ("chosen", "rejected"),
    "unpaired": ("answer", "another row's answer, for the reference point"),
}  # fmt: skip


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
        "labels": label_counts(dataset),
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


def said_of(dataset: Dataset, document: Document) -> dict[str, Any]:
    """What a row says of the whole of it: its label, labels or value, whether it is liked, by how much it is better."""
    renderer, given = dataset.renderer, document.labels
    if not given:
        return {}
    if renderer.kind == "unpaired":
        return {"liked": bool(given[0])}
    if renderer.kind in ("pairs", "whole_pairs"):
        return {"margin": given[0]} if given[0] else {}
    if renderer.kind != "labelled":
        return {}
    if renderer.problem == ONE:
        return {"label": renderer.labels[int(given[0])]}
    if renderer.problem == SEVERAL:
        return {"labels": [name for name, has in zip(renderer.labels, given) if has]}
    return {"value": given[0]}


def label_counts(dataset: Dataset) -> dict[str, int]:
    """How many rows say what, or how many words have which tag; nothing of values and margins."""
    renderer, counts = dataset.renderer, Counter()
    if renderer.kind == "tagged":
        for document in dataset.documents:
            assert document.token_labels is not None
            counts.update(int(tag) for tag in document.token_labels if tag != NOTHING)
        return {name: counts[i] for i, name in enumerate(renderer.labels)}
    if renderer.kind == "unpaired" and len(dataset):
        liked = int(dataset.labels()[:, 0].sum())
        return {"liked": liked, "not liked": len(dataset) - liked}
    if renderer.kind == "labelled" and renderer.problem in (ONE, SEVERAL) and len(dataset):
        given = dataset.labels()
        one = renderer.problem == ONE
        return {n: int((given[:, 0] == i).sum() if one else given[:, i].sum()) for i, n in enumerate(renderer.labels)}
    return {}


def how_learnt(dataset: Dataset) -> str:
    """What marks stand for."""
    if dataset.renderer.kind == "tagged":
        return "tags before the words that they are of"
    return "learnt in green" if dataset.renderer.kind in ("text", "pairs", "unpaired") else "none of them predicted"


def told(said: Mapping[str, Any]) -> str:
    """What is said of a row, in words."""
    if "liked" in said:
        return "liked" if said["liked"] else "not liked"
    if "labels" in said:
        return f"labels {visible(', '.join(said['labels'])) or 'none'}"
    return ", ".join(f"{name} {v:g}" if isinstance(v, float) else f"{name} {visible(v)}" for name, v in said.items())


class Piece(NamedTuple):
    """The text of one token; of several where they share a character."""

    text: str
    weight: float
    ids: list[int]
    tag: str = ""  # of the word that begins here


def tokens_of(dataset: Dataset, index: int) -> list[Piece]:
    """A document token by token, one member after the other."""
    return [piece for _, pieces in members_of(dataset, index) for piece in pieces]


def members_of(dataset: Dataset, index: int) -> list[tuple[str, list[Piece]]]:
    """What each member of a document is, and its tokens; the one member of most has no name."""
    members = dataset.documents[index].members
    names = SIDES.get(dataset.renderer.kind, ("",))
    return [(name, _pieces(dataset, member)) for name, member in zip(names, members, strict=False)]


def _pieces(dataset: Dataset, document: Document) -> list[Piece]:
    """Token by token, each as it reads after the one before: some tokenizers drop a text's first space."""
    tokenizer, names = dataset.renderer.tokenizer, dataset.renderer.labels
    pieces: list[Piece] = []
    waiting: list[int] = []
    before: list[int] = []
    weight, tag = 0.0, ""
    tags = [NOTHING] * len(document.tokens) if document.token_labels is None else document.token_labels.tolist()
    for token, weight, place in zip(document.tokens.tolist(), document.weights.tolist(), tags):
        waiting.append(token)
        tag = tag if place == NOTHING else names[place]
        text = _after(tokenizer, before, waiting)
        if not text.endswith("\ufffd"):
            pieces.append(Piece(text, weight, waiting, tag))
            before, waiting, tag = waiting, [], ""
    if waiting:
        pieces.append(Piece(tokenizer.decode(waiting), weight, waiting, tag))
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
    """For terminals without colour: what is learnt, between brackets, with a weight that is not 1, or its tag."""
    texts = []
    for (weight, tag), members in groupby(pieces, key=lambda piece: (piece.weight, piece.tag)):
        for text in _stretches(members, bool(tag)):
            texts.append(f"\u27e6{sign(weight, tag)}{text}\u27e7" if weight or tag else text)
    return "".join(texts)


def _stretches(pieces: Iterable[Piece], apart: bool) -> list[str]:
    texts = [visible(piece.text) for piece in pieces]
    return texts if apart else ["".join(texts)]


def factor(weight: float) -> str:
    return "" if weight == 1 else f"\u00d7{weight:g} "


def sign(weight: float, tag: str) -> str:
    """What stands before what is learnt."""
    return f"{visible(tag)}: " if tag else factor(weight)


def coloured(pieces: Sequence[Piece]) -> Any:
    """Learnt tokens green, the others dim, alternating so that their borders show."""
    from rich.text import Text

    made = Text()
    for position, piece in enumerate(pieces):
        shade = "on grey15" if position % 2 else ""
        if piece.tag:
            made.append(f"{visible(piece.tag)}:", style="bold cyan")
        made.append(visible(piece.text), style=f"{'bold green' if piece.weight or piece.tag else 'dim'} {shade}")
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
