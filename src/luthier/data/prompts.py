"""Prompts that the model is to answer, with what else their rows say, for rewards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from .conversations import BadRow, Conversation, Tokens, check_roles, message_of, said, text_of, tools_of
from .conversations import messages as whole

if TYPE_CHECKING:
    from .masks import Rendered, Renderer


def prompt(values: Mapping) -> Conversation:
    """`prompt`, a text or messages; the other columns are kept for rewards."""
    asked = values["prompt"]
    said_so = [message_of(m) for m in asked] if isinstance(asked, list) else [said("user", text_of(asked, "prompt"))]
    turns = [message for message, _ in said_so]
    columns = {key: value for key, value in values.items() if key not in ("prompt", "tools")}
    return Conversation(turns, tools_of(values), columns=columns)


def prompt_messages(values: Mapping) -> Conversation:
    """`messages`; where the last one is the assistant's, it is the `answer` that rewards compare with."""
    made = whole(values)
    columns = {key: value for key, value in values.items() if key not in ("messages", "tools")}
    messages = made.messages
    if messages[-1]["role"] == "assistant":
        columns.setdefault("answer", messages[-1]["content"])
        messages = messages[:-1]
    return replace(made, messages=messages, weights=None, columns=columns)


def rendered(renderer: Renderer, conversation: Conversation) -> Rendered:
    """The tokens after which the model is to answer, of which nothing is learnt."""
    messages = conversation.messages
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise BadRow("role_order", "a prompt ends with a user's or a tool's turn")
    check_roles(replace(conversation, messages=[*messages, {"role": "assistant", "content": "x"}]))
    renderer.check_texts(conversation)
    ids = renderer.prompt_tokens(conversation, messages)
    return renderer.ready(Tokens(ids, [0.0] * len(ids)), whole=True)
