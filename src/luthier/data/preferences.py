"""Preference pairs: a better and a worse answer to one prompt, as one document of two members."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from .conversations import (
    BadRow,
    Conversation,
    conversation_of,
    json_or_text,
    list_of,
    message_of,
    said,
    text_of,
    text_or_nothing,
    tools_of,
)

if TYPE_CHECKING:
    from .masks import Rendered, Renderer


def preference(values: Mapping) -> Conversation:
    """`prompt`, `chosen` and `rejected`, texts or messages; without `prompt` both begin with the same messages."""
    better, worse = (_turns(values.get("prompt"), values[key], key) for key in ("chosen", "rejected"))
    made = conversation_of([message_of(m) for m in better], tools_of(values))
    other = conversation_of([message_of(m) for m in worse])
    if made.messages == other.messages:
        raise BadRow("equal_answers", "chosen and rejected are the same, so nothing is preferred")
    return replace(made, rejected=other.messages)


def _turns(prompt: object, answer: object, key: str) -> list[dict]:
    """The whole conversation that ends with this answer."""
    if isinstance(answer, str | None):
        answer = [said("assistant", text_or_nothing(answer, key))[0]]
    turns = list_of(json_or_text(answer, key), key, "messages")
    if not turns:
        raise BadRow("empty_answer", f"{key} is empty")
    if prompt is None:
        return turns
    before = prompt if isinstance(prompt, list) else [said("user", text_of(prompt, "prompt"))[0]]
    return turns if turns[: len(before)] == before else [*before, *turns]


def rendered(renderer: Renderer, conversation: Conversation) -> Rendered:
    """Both answers after what is common to them; what is learnt is all that the assistant says from there on."""
    better, worse = conversation.messages, conversation.rejected or []
    common = 0
    for a, b in zip(better, worse):
        if a != b:
            break
        common += 1
    if not common:
        raise BadRow("format", "chosen and rejected begin with different messages: give the prompt that both answer")
    members = []
    for messages in (better, worse):
        weights = [float(i >= common) for i in range(len(messages))]
        members.append(renderer.render(replace(conversation, messages=messages, weights=weights, rejected=None)))
    return replace(members[0], rest=(members[1],))
