"""Rows recognised by their keys: messages, ShareGPT, Alpaca, prompt/completion, plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip


class BadRow(Exception):
    """A row from which nothing right can be learnt: which kind of fault, and what exactly."""

    def __init__(self, kind: str, detail: str):
        self.kind, self.detail = kind, detail
        super().__init__(detail)


@dataclass(frozen=True)
class Conversation:
    """What every format becomes. `plain` rows never pass through a chat template."""

    messages: list[dict]
    tools: list[dict] | None = None
    plain: bool = False
    template_arguments: dict = field(default_factory=dict)


def _json_or_text(value: object, what: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise BadRow("format", f"{what} is a string, but not JSON: {value[:60]!r}") from None


def _text(value: object, what: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list):  # the parts of the multimodal form
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in value):
            raise BadRow("format", f"{what} has parts other than text")
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadRow("format", f"{what} is {type(value).__name__}, not text")
    return value


def _tools(values: Mapping) -> list[dict] | None:
    tools = _json_or_text(values.get("tools") or None, "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
        raise BadRow("format", "tools is not a list of descriptions")
    return tools or None  # type: ignore[return-value]


def _calls(calls: object) -> list[dict]:
    calls = _json_or_text(calls, "tool_calls")
    if not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls):
        raise BadRow("format", "tool_calls is not a list of calls")
    out = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("format", "a tool call has no function name")
        arguments = _json_or_text(function.get("arguments", {}), "the arguments of a tool call")
        made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if call.get("id") is not None:
            made["id"] = call["id"]
        out.append(made)
    return out


def _message(message: object) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRow("format", f"a message needs a role and a content, found {str(message)[:60]}")
    made = {k: v for k, v in message.items() if v is not None and k not in ("content", "tool_calls")}
    made["content"] = _text(message.get("content"), "content")
    if message.get("tool_calls"):
        made["tool_calls"] = _calls(message["tool_calls"])
    return made


def _messages(values: Mapping) -> Conversation:
    messages = _json_or_text(values["messages"], "messages")
    if not isinstance(messages, list) or not messages:
        raise BadRow("format", "messages is not a list of messages")
    return Conversation([_message(m) for m in messages], _tools(values))


def _sharegpt(values: Mapping) -> Conversation:
    turns = _json_or_text(values["conversations"], "conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRow("format", "conversations is not a list of turns")
    messages: list[dict] = (
        [{"role": "system", "content": _text(values["system"], "system")}] if values.get("system") else []
    )
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRow("format", f"a turn needs `from` and `value`, found {str(turn)[:60]}")
        if "role" in turn and "from" not in turn:
            messages.append(_message(turn))
            continue
        role = SHAREGPT_ROLES.get(str(turn.get("from")).lower())
        if role is None:
            raise BadRow("role_order", f"unknown speaker {turn.get('from')!r}")
        value = _text(turn.get("value"), "value")
        if turn["from"] == "function_call":
            call = _json_or_text(value, "a function call")
            messages.append(
                {"role": role, "content": "", "tool_calls": _calls(call if isinstance(call, list) else [call])}
            )
        else:
            messages.append({"role": role, "content": value})
    return Conversation(messages, _tools(values))


def _alpaca(values: Mapping) -> Conversation:
    messages: list[dict] = (
        [{"role": "system", "content": _text(values["system"], "system")}] if values.get("system") else []
    )
    for turn in values.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRow("format", "history is not a list of pairs")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    question = _text(values["instruction"], "instruction")
    if values.get("input"):
        question += "\n\n" + _text(values["input"], "input")
    return Conversation(
        [*messages, {"role": "user", "content": question},
         {"role": "assistant", "content": _text(values["output"], "output")}]
    )  # fmt: skip


def _prompt_completion(values: Mapping) -> Conversation:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list):
        answer = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return Conversation([_message(m) for m in [*prompt, *answer]], _tools(values))
    return Conversation(
        [{"role": "user", "content": _text(prompt, "prompt")},
         {"role": "assistant", "content": _text(completion, "completion")}]
    )  # fmt: skip


def _plain_text(values: Mapping) -> Conversation:
    return Conversation([{"role": "assistant", "content": _text(values["text"], "text")}], plain=True)


@dataclass(frozen=True)
class Format:
    name: str
    keys: tuple[str, ...]  # all needed, enough to recognise it
    convert: Callable[[Mapping], Conversation]


FORMATS = {
    form.name: form
    for form in (
        Format("messages", ("messages",), _messages),
        Format("sharegpt", ("conversations",), _sharegpt),
        Format("alpaca", ("instruction", "output"), _alpaca),
        Format("prompt_completion", ("prompt", "completion"), _prompt_completion),
        Format("text", ("text",), _plain_text),
    )
}


def renamed(values: Mapping, columns: Mapping[str, str]) -> dict:
    """The row with the columns of the user's map under the names that the formats know."""
    if not columns:
        return dict(values)
    taken = set(columns.values())
    return {k: v for k, v in values.items() if k not in taken} | {
        k: values[c] for k, c in columns.items() if c in values
    }


def recognise(values: Mapping, place: str, columns: Mapping[str, str]) -> Format:
    """The first format all of whose keys the row has."""
    absent = [column for column in columns.values() if column not in values]
    if absent:
        raise DataError(f"data.columns: {place} has no column {absent[0]!r}; it has {sorted(values)}")
    row = renamed(values, columns)
    for form in FORMATS.values():
        if all(key in row for key in form.keys):
            return form
    known = "; ".join(f"{form.name}: {', '.join(form.keys)}" for form in FORMATS.values())
    raise DataError(
        f"{place}: the row's keys {sorted(values)} are of no known format ({known}). "
        "Name the columns, for example data.columns='{prompt: question, completion: answer}'."
    )


def check_roles(conversation: Conversation) -> None:
    """Refuse an order of speakers that no conversation can have, and an answer that says nothing."""
    before = None
    for position, message in enumerate(conversation.messages):
        role = message["role"]
        if role not in ROLES:
            raise BadRow("role_order", f"unknown role {role!r}; known are {', '.join(ROLES)}")
        if role in ("system", "developer") and position > 0:
            raise BadRow("role_order", f"a {role} turn after the first turn")
        if role == "assistant" and not conversation.plain and before not in ("user", "tool"):
            raise BadRow("role_order", f"an assistant turn follows {before or 'nothing'}")
        if role == "user" and before == "user":
            raise BadRow("role_order", "a user turn follows a user turn")
        if role == "tool" and before not in ("tool", "assistant"):
            raise BadRow("role_order", f"a tool turn follows {before or 'nothing'}")
        if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise BadRow("empty_answer", "an assistant turn has neither content nor tool calls")
        before = role
    if not any(m["role"] == "assistant" for m in conversation.messages):
        raise BadRow("no_trained_token", "no assistant turn, so nothing to learn")
