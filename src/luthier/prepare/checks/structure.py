"""Rows that training would refuse, and turns that say nothing: found by the very functions that training reads with."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np

from ...data.conversations import BadRow, Conversation, check_roles
from ...data.formats import FORMATS
from ..views import UNKNOWN, View
from .check import Action, Again, Check, Decision, Finding, Gathered, Gatherer

_SAID = ("text", "unpaired")  # kinds of rows whose answers are learnt
UNREADABLE = "unreadable"
OTHER = "other_format"


class Structure(Check):
    """Unreadable rows, wrong fields, an order of roles that no conversation has, empty turns and answers.

    Rows of no known format among others that have one are told of and stay, unless `actions` says otherwise.
    """

    whats: ClassVar = (
        UNREADABLE, "format", "role_order", "empty_answer", "empty_turn", "empty_text", "no_trained_token",
        "equal_answers", "label", OTHER,
    )  # fmt: skip

    kind: Literal["structure"] = "structure"
    action: Literal["drop", "keep"] = "drop"

    def action_of(self, what: str) -> Action:
        return self.actions.get(OTHER, "keep") if what == OTHER else super().action_of(what)

    def decides(self) -> bool:
        return self.action_of(OTHER) == "drop"

    def gatherer(self) -> Gatherer:
        return _Formats()

    def decide(self, gathered: Sequence[Gathered], again: Again) -> Decision:
        rows = np.concatenate([g.arrays["rows"] + g.first for g in gathered])
        if not sum(int(g.arrays["known"][0]) for g in gathered):  # a set of another kind, not some rows of it
            rows = rows[:0]
        return Decision(rows, [(OTHER, "its keys are of no known format; those of other rows are")])

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


class _Formats(Gatherer):
    """Rows of no known format, and how many have one."""

    def __init__(self) -> None:
        self.rows, self.known = array("q"), 0

    def add(self, number: int, view: View) -> None:
        if view.format == UNKNOWN:
            self.rows.append(number)
        else:
            self.known += 1

    def arrays(self) -> dict[str, np.ndarray]:
        return {"rows": np.array(self.rows, np.int64), "known": np.array([self.known], np.int64)}


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
