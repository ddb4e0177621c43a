"""Preference pairs of which both conversations are scored as they stand: run to their ends, nothing predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from . import preferences
from .conversations import BadRow

if TYPE_CHECKING:
    from .conversations import Conversation
    from .masks import Rendered, Renderer


def rendered(renderer: Renderer, conversation: Conversation) -> Rendered:
    """Both conversations up to the token that ends the last answer, that token included."""
    better = preferences.rendered(renderer, conversation)
    return replace(better, whole=True, rest=tuple(replace(worse, whole=True) for worse in better.rest))


def alone(renderer: Renderer, conversation: Conversation) -> Rendered:
    """One conversation in the same way, which ends with the answer that is scored."""
    messages = conversation.messages
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("role_order", "the last turn is not the assistant's, so there is no answer to score")
    weights = [float(i == len(messages) - 1) for i in range(len(messages))]
    made = renderer.render(replace(conversation, weights=weights))
    return replace(made, plain=False, whole=True)
