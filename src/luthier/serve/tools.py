"""Calls of tools: how a template has them written, how they are read, and grammars that hold an answer to them.

Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`; Llama 3.1: `{"name": ..., "parameters":
{...}}`; Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]name[ARGS]{...}` since 2025.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .grammar.expressions import Choice, Grammar, Literal, Node, Repeat, Special, literal, optional
from .grammar.expressions import Sequence as InOrder
from .grammar.schema import SPACE, node_of

MOST_CALLS = 16  # in one answer
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Style:
    """How the calls of a family stand in its answers."""

    kind: str  # hermes, llama, mistral, mistral_args
    mark: str  # what a call begins with; "" where nothing tells it but JSON itself
    mark_token: int | None = None  # the mark as a special token, which no bytes spell
    args_token: int | None = None
    end: str = ""

    @property
    def arguments(self) -> str:
        return "parameters" if self.kind == "llama" else "arguments"


def style_of(tokenizer: Any) -> Style | None:
    """Told from the template; None where it takes no tools, or writes calls in a way that is not known here."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or "tools" not in template:
        return None
    special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    if "[TOOL_CALLS]" in template:
        args = "[ARGS]" in template
        kind = "mistral_args" if args else "mistral"
        return Style(kind, "[TOOL_CALLS]", special.get("[TOOL_CALLS]"), special.get("[ARGS]"))
    if "<tool_call>" in template and "<function=" not in template:
        return Style("hermes", "<tool_call>", special.get("<tool_call>"), end="</tool_call>")
    if "<|python_tag|>" in template or ('"parameters"' in template and "ipython" in template):
        return Style("llama", "")
    return None


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str  # JSON
    id: str

    def told(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def _call(value: Any, style: Style) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    given = value.get(style.arguments, value.get("arguments", value.get("parameters", {})))
    if isinstance(given, str):  # as JSON inside of JSON
        try:
            given = json.loads(given)
        except ValueError:
            return None
    if not isinstance(given, dict):
        return None
    return Call(value["name"], json.dumps(given, ensure_ascii=False), f"call_{uuid.uuid4().hex[:24]}")


def read(text: str, style: Style) -> tuple[str, list[Call]]:
    """What an answer says beside its calls, and the calls; text that only looks like one stays text."""
    try:
        if style.kind == "hermes":
            return _marked(text, style)
        if style.kind == "llama":
            return _bare(text, style)
        return _listed(text, style)
    except RecursionError:
        return text, []


def _marked(text: str, style: Style) -> tuple[str, list[Call]]:
    calls, kept, at = [], "", 0
    for found in re.finditer(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", text, re.DOTALL):
        call = _call(_json(found[1]), style)
        if call is None:
            continue
        kept += text[at : found.start()]
        at = found.end()
        calls.append(call)
    return (kept + text[at:]).strip() if calls else text, calls


def _bare(text: str, style: Style) -> tuple[str, list[Call]]:
    body = text.strip().removeprefix("<|python_tag|>").strip()
    calls: list[Call] = []
    decoder = json.JSONDecoder()
    at = 0
    while at < len(body):
        try:
            value, at = decoder.raw_decode(body, at)
        except ValueError:
            return text, []
        call = _call(value, style)
        if call is None:
            return text, []
        calls.append(call)
        while at < len(body) and body[at] in " \n\t;":
            at += 1
    return ("", calls) if calls else (text, [])


def _listed(text: str, style: Style) -> tuple[str, list[Call]]:
    before, mark, rest = text.partition(style.mark)
    if not mark:
        return text, []
    calls = []
    for part in [rest] if style.kind == "mistral" else (mark + rest).split(style.mark)[1:]:
        name, args, body = part.partition("[ARGS]")
        if args:
            call = _call({"name": name.partition("[CALL_ID]")[0].strip(), "arguments": _json(body)}, style)
            calls.append(call)
            continue
        value = _json(part.strip())
        for one in value if isinstance(value, list) else [value]:
            calls.append(_call(one, style))
    if not calls or None in calls:
        return text, []
    return before.strip(), [call for call in calls if call is not None]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


class Sifted:
    """Text of an answer as it comes: what is surely no call is handed on, what may be one is held until the end."""

    def __init__(self, style: Style):
        self.style = style
        self.held = ""
        self.shown = ""
        self.calling = False

    def add(self, text: str) -> str:
        """What can be shown now."""
        self.held += text
        if self.calling:
            return ""
        if not self.style.mark:
            start = self.held.lstrip()
            if not start or start[0] == "{" or "<|python_tag|>".startswith(start[:14]):
                self.calling = start.startswith(("{", "<|python_tag|>"))
                return ""
            return self._show(len(self.held))
        if self.style.mark in self.held:
            self.calling = True
            return self._show(self.held.index(self.style.mark))
        mark = self.style.mark
        keep = next((n for n in range(min(len(mark) - 1, len(self.held)), 0, -1) if self.held.endswith(mark[:n])), 0)
        return self._show(len(self.held) - keep)

    def _show(self, upto: int) -> str:
        shown, self.held = self.held[:upto], self.held[upto:]
        return shown

    def end(self) -> tuple[str, list[Call]]:
        """The rest of the text, and the calls."""
        rest, calls = read(self.held, self.style)
        self.held = ""
        return rest, calls


# ---------------------------------------------------------------------------- grammars


def grammar(style: Style, tools: Sequence[tuple[str, dict | None]], parallel: bool) -> Grammar:
    """An answer that is one call, or several, of these (name, schema of its arguments). Raises Unsupported."""
    most = MOST_CALLS if parallel else 1
    if style.kind == "hermes":
        mark = _spelt(style.mark, style.mark_token)
        one = InOrder((mark, inner(style, tools)))
        more = Repeat(InOrder((literal("\n"), one)), 0, most - 1) if parallel else InOrder(())
        return Grammar(InOrder((one, more)))
    calls = _objects(style, tools)
    if style.kind == "llama":
        more = Repeat(InOrder((Literal(b"; "), calls)), 0, most - 1)
        return Grammar(InOrder((calls, more)))
    mark = _spelt(style.mark, style.mark_token)
    if style.kind == "mistral_args":
        named = Choice([
            InOrder((literal(name), _spelt("[ARGS]", style.args_token), node_of(schema or NOTHING)))
            for name, schema in tools
        ])  # fmt: skip
        one = InOrder((mark, named))
        return Grammar(InOrder((one, Repeat(one, 0, most - 1))))
    more = Repeat(InOrder((Literal(b", "), calls)), 0, most - 1)
    return Grammar(InOrder((mark, optional(Literal(b" ")), Literal(b"["), calls, more, Literal(b"]"))))


def inner(style: Style, tools: Sequence[tuple[str, dict | None]]) -> Node:
    """What follows the mark of one call, of the kind that has an end."""
    return InOrder((optional(literal("\n")), _objects(style, tools), optional(literal("\n")), literal(style.end)))


def _objects(style: Style, tools: Sequence[tuple[str, dict | None]]) -> Node:
    made = []
    for name, schema in tools:
        head = literal(f'{{"name": {json.dumps(name)}, "{style.arguments}": ')
        made.append(InOrder((head, node_of(schema or NOTHING), SPACE, Literal(b"}"))))
    return Choice(made)


def _spelt(text: str, token: int | None) -> Node:
    return literal(text) if token is None else Special(token)
