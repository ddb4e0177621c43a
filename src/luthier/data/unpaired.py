"""Answers that are liked or not: a document with a label, and a second member that answers another row's prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..document import Document
from . import conversations
from .conversations import (
    BadRow,
    Conversation,
    conversation_of,
    list_of,
    said,
    shown,
    text_or_nothing,
    tools_of,
    turn_of,
)
from .preferences import check_unweighted, prompt_of

if TYPE_CHECKING:
    from .masks import Rendered, Renderer

CANDIDATES = 64  # rows that are looked at for a prompt's strange answer


# ---------------------------------------------------------------------------- formats


def unpaired(values: Mapping) -> Conversation:
    """`prompt`, `completion` and `label`, which says whether the completion is liked."""
    before, completion = prompt_of(values), values["completion"]
    if isinstance(completion, str | None):
        after = [said("assistant", text_or_nothing(completion, "completion"))]
    else:
        given = [completion] if isinstance(completion, Mapping) else completion
        after = [turn_of(turn) for turn in list_of(given, "completion", "messages")]
    made = conversation_of([*before, *after], tools_of(values))
    check_unweighted(made)
    weights = [float(i >= len(before)) for i in range(len(made.messages))]
    return replace(made, weights=weights, label=_liked(values))


def unpaired_messages(values: Mapping) -> Conversation:
    """`messages` and `label`, which is of the last answer."""
    return _last(conversations.messages(values), values)


def unpaired_sharegpt(values: Mapping) -> Conversation:
    """`conversations` and `label`, which is of the last answer."""
    return _last(conversations.sharegpt(values), values)


def _last(made: Conversation, values: Mapping) -> Conversation:
    last = len(made.messages) - 1
    if made.messages[last]["role"] != "assistant":
        raise BadRow("role_order", "the last turn is not the assistant's, so there is no answer to like or not")
    check_unweighted(made)
    return replace(made, weights=[float(i == last) for i in range(last + 1)], label=_liked(values))


def _liked(values: Mapping) -> bool:
    label = values["label"]
    if isinstance(label, bool):
        return label
    if type(label) is int and label in (0, 1):
        return bool(label)
    raise BadRow("label", f"label is {shown(label)}, not true (liked) or false")


# ---------------------------------------------------------------------------- rendering


def rendered(renderer: Renderer, conversation: Conversation) -> Rendered:
    return replace(renderer.render(conversation), plain=False, labels=(float(conversation.label),))


def with_strangers(documents: Sequence[tuple[Document, int]], longest: int) -> list[tuple[Document, int]]:
    """Each with a second member: its prompt, answered with the answer of another of these documents.

    KTO's reference point is a mean over such pairs (arXiv:2402.01306). Which is whose is drawn once, by the number of
    documents alone. Another prompt's answer that is not the same, and fits, is taken; where there is none, the document
    stays as it is. Neighbours in a file are often answers to one prompt, so they are not simply taken in turn.
    """
    split = [_parts(document) for document, _ in documents]
    order = np.random.default_rng(len(documents)).permutation(len(documents)).tolist()
    made = list(documents)
    for place, i in enumerate(order):
        (prompt, answer), (document, parent) = split[i], documents[i]
        for j in (order[(place + step) % len(order)] for step in range(1, min(CANDIDATES, len(order)))):
            other_prompt, other = split[j]
            fits = len(prompt) + len(other) <= longest
            if fits and not np.array_equal(other, answer) and not np.array_equal(other_prompt, prompt):
                made[i] = (_joined(document, prompt, documents[j][0]), parent)
                break
    return made


def _parts(document: Document) -> tuple[np.ndarray, np.ndarray]:
    """Tokens up to the first that is learnt, and from it on."""
    first = int(np.flatnonzero(document.weights)[0])
    return document.tokens[:first], document.tokens[first:]


def _joined(document: Document, prompt: np.ndarray, other: Document) -> Document:
    first = int(np.flatnonzero(other.weights)[0])
    return document._replace(
        tokens=np.concatenate([document.tokens, prompt, other.tokens[first:]]),
        weights=np.concatenate([document.weights, np.zeros(len(prompt), np.float32), other.weights[first:]]),
        starts=(0, len(document.tokens)),
    )
