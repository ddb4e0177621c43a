"""What rows are, for the objectives that learn from them: a line for each kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..document import Document
from . import labelled, preferences, prompts, unpaired, whole_pairs
from .conversations import Conversation
from .masks import Rendered, Renderer

KINDS: dict[str, Callable[[Renderer, Conversation], Rendered]] = {
    "text": Renderer.render,
    "pairs": preferences.rendered,
    "whole_pairs": whole_pairs.rendered,
    "prompts": prompts.rendered,
    "unpaired": unpaired.rendered,
    "labelled": labelled.rendered,
    "tagged": labelled.rendered_tags,
}
MEMBERS = {"pairs": 2, "whole_pairs": 2, "unpaired": 2}  # texts that belong together in a row; else there is one
LABELS = {"pairs": 1, "whole_pairs": 1, "unpaired": 1, "labelled": 1}  # numbers that are said of a row; else none


def render(renderer: Renderer, conversation: Conversation) -> Rendered:
    """What is learnt of a row, or BadRow where nothing right can be."""
    return KINDS[renderer.kind](renderer, conversation)


def finished(renderer: Renderer, documents: Sequence[tuple[Document, int]]) -> Sequence[tuple[Document, int]]:
    """The documents of a stretch of rows, once all are there, with what they take from one another."""
    return unpaired.with_strangers(documents, renderer.max_length) if renderer.kind == "unpaired" else documents
