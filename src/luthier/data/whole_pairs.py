"""Preference pairs of which both conversations are scored as they stand: run to their ends, nothing predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from . import preferences

if TYPE_CHECKING:
    from .conversations import Conversation
    from .masks import Rendered, Renderer


def rendered(renderer: Renderer, conversation: Conversation) -> Rendered:
    """Both conversations up to the token that ends the last answer, that token included."""
    better = preferences.rendered(renderer, conversation)
    return replace(better, whole=True, rest=tuple(replace(worse, whole=True) for worse in better.rest))
