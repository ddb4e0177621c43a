"""What rows are, for the objectives that learn from them: a line for each kind."""

from __future__ import annotations

from collections.abc import Callable

from . import labelled, preferences, prompts
from .conversations import Conversation
from .masks import Rendered, Renderer

KINDS: dict[str, Callable[[Renderer, Conversation], Rendered]] = {
    "text": Renderer.render,
    "pairs": preferences.rendered,
    "prompts": prompts.rendered,
    "labelled": labelled.rendered,
    "tagged": labelled.rendered_tags,
}


def render(renderer: Renderer, conversation: Conversation) -> Rendered:
    """What is learnt of a row, or BadRow where nothing right can be."""
    return KINDS[renderer.kind](renderer, conversation)
