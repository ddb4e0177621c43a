"""Rows that training would refuse, and turns that say nothing: found by the very functions that training reads with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from ...data.conversations import BadRow, Conversation, check_roles
from ...data.formats import FORMATS
from ..views import View
from .check import Check, Finding

_SAID = ("text", "unpaired")  # kinds of rows whose answers are learnt
UNREADABLE = "unreadable"


class Structure(Check):
    """Unreadable rows, wrong fields, an order of roles that no conversation has, empty turns and answers."""

    whats: ClassVar = (
        UNREADABLE, "format", "role_order", "empty_answer", "empty_turn", "empty_text", "no_trained_token",
        "equal_answers", "label",
    )  # fmt: skip

    kind: Literal["structure"] = "structure"
    action: Literal["drop", "keep"] = "drop"

    def look(self, view: View) -> Sequence[Finding]:
        form = FORMATS.get(view.format)
        if form is None or (view.format == "messages" and _sound(view)):
            return ()
        try:
            conversation = form.convert(view.values)
            if form.kind in _SAID:
                check_roles(conversation)
            elif form.kind == "pairs":
                check_roles(conversation)
                check_roles(replace(conversation, messages=conversation.rejected or []))
            elif not conversation.tokens and not any(m["content"].strip() for m in conversation.messages):
                return [Finding("empty_text", "the text is empty")]
        except BadRow as fault:
            return [Finding(fault.kind, fault.detail)]
        if form.kind == "labelled" and conversation.label in (None, ""):
            return [Finding("label", "the label is empty")]
        return _empty_turns(conversation)


def _sound(view: View) -> bool:
    """Whether plain messages are as most are: each with a text, questions and answers in turn."""
    messages, texts = view.values["messages"], view.texts
    if type(messages) is not list or len(messages) != len(texts) or len(texts) < 2 or "tools" in view.values:
        return False
    expected = "user"
    for place, (message, (path, role, text)) in enumerate(zip(messages, texts)):
        if role == "system" and place == 0:
            pass
        elif role != expected:
            return False
        else:
            expected = "assistant" if role == "user" else "user"
        if type(message) is not dict or len(message) != 2 or path[-1] != "content" or len(path) != 3:
            return False
        if text.isspace():
            return False
    return expected == "user" or (texts[-1].role == "user" and len(texts) > 2)


def _empty_turns(conversation: Conversation) -> Sequence[Finding]:
    for place, message in enumerate(conversation.messages):
        if not message["content"].strip() and message["role"] in ("user", "system", "developer"):
            return [Finding("empty_turn", f"the {message['role']} turn {place} is empty")]
    return ()
