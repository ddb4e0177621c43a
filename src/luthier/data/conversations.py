"""Rows as conversations: messages, ShareGPT, Alpaca, prompt/completion, plain text, tokens; what is wrong with one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .readers import parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
IGNORED = -100  # the label of a token that is not learnt, as PyTorch's cross-entropy has it
DEEPEST = 64  # levels of lists and objects in a row; templates and JSON recurse on them


class BadRow(Exception):
    """A row from which nothing right can be learnt: which kind of fault, and what exactly.

    The detail may quote the row, so what a terminal would act on, or cannot print, is escaped.
    """

    def __init__(self, kind: str, detail: str):
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in detail[:400])
        self.kind, self.detail = kind, shown + ("..." if len(detail) > 400 else "")
        super().__init__(self.detail)


class Tokens(NamedTuple):
    """A row that is tokens already, without padding, and the weight with which each is learnt."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Conversation:
    """What every format becomes. `plain` rows never pass through a chat template, `tokens` not through a tokenizer."""

    messages: list[dict]
    tools: list[dict] | None = None
    plain: bool = False
    template_arguments: dict = field(default_factory=dict)
    weights: Sequence[float] | None = None  # one a message, where the row has any
    tokens: Tokens | None = None
    rejected: list[dict] | None = None  # of a preference pair: the messages of the worse one; `messages` are the better
    label: Any = None  # what the row says of the whole, as it is written there
    columns: dict = field(default_factory=dict)  # what else the row says, for rewards


# ---------------------------------------------------------------------------- values


def shown(value: object) -> str:
    """The beginning of a value, whatever it is."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested without end; an integer of thousands of digits
        return type(value).__name__
    return text if len(text) <= 60 else text[:60] + "..."


def type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__


def json_or_text(value: object, what: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise BadRow("format", f"{what} is a string, but not JSON ({error}): {shown(value)}") from None


def text_of(value: object, what: str) -> str:
    if isinstance(value, list):  # the parts of the multimodal form
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in value):
            raise BadRow("format", f"{what} has parts other than text")
        if not value:
            raise BadRow("format", f"{what} is an empty list")
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadRow("format", f"{what} is {type_name(value)}, not text")
    return value


def text_or_nothing(value: object, what: str) -> str:
    return "" if value is None else text_of(value, what)


def list_of(value: object, what: str, of: str) -> list:
    if not isinstance(value, list):
        raise BadRow("format", f"{what} is {type_name(value)}, not a list of {of}")
    return value


def weight_of(value: object) -> float:
    """A weight: as a 32-bit number, which is what the loss works with, still finite and not rounded to nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow("format", f"weight is {shown(value)}, not a number from 0 up")
    try:
        made = float(value)
    except OverflowError:
        made = math.inf
    with np.errstate(over="ignore", under="ignore"):
        kept = float(np.float32(made))
    if not math.isfinite(kept) or made < 0 or (made > 0) != (kept > 0):
        raise BadRow("format", f"weight is {shown(value)}, not a finite number from 0 up")
    return made


def texts_in(value: object) -> Iterator[str]:
    """All strings of a value, keys too; BadRow where it is nested too deeply or holds what JSON cannot write."""
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, Mapping | list | tuple):
            if depth == DEEPEST:
                raise BadRow("format", f"nested more than {DEEPEST} levels deep")
            if isinstance(one, Mapping):
                yield from (key for key in one if isinstance(key, str))
                one = one.values()
            waiting.extend((inner, depth + 1) for inner in one)
        elif isinstance(one, float) and not math.isfinite(one):
            raise BadRow("format", f"{one} is no JSON number")


# ---------------------------------------------------------------------------- parts of a conversation


def tools_of(values: Mapping) -> list[dict] | None:
    if values.get("tools") in (None, "", []):
        return None
    tools = json_or_text(values["tools"], "tools")
    if tools is None:
        return None
    for tool in list_of(tools, "tools", "descriptions"):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise BadRow("format", f"a tool's description has no name: {shown(tool)}")
    return tools or None  # type: ignore[return-value]


def _calls(calls: object) -> list[dict]:
    out = []
    for call in list_of(json_or_text(calls, "tool_calls"), "tool_calls", "calls"):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise BadRow("format", f"a tool call has no function name: {shown(call)}")
        arguments = json_or_text(function.get("arguments", {}), "the arguments of a tool call")
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise BadRow("format", f"the arguments of a tool call are {type_name(arguments)}, not an object")
        made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if call.get("id") is not None:
            made["id"] = call["id"]
        out.append(made)
    return out


MARKS = {"weight": "a number", "train": "true or false", "loss": "true or false"}


def _weight(turn: Mapping, role: str) -> float | None:
    """What a turn says of how it is learnt: `weight` as OpenAI has it, `train` as Axolotl, `loss` as ms-swift.

    A turn that is not the assistant's is never learnt, so only a mark that says the same is right there.
    """
    given = [key for key in MARKS if turn.get(key) is not None]
    if len(given) > 1:
        raise BadRow("format", f"a turn has both {given[0]!r} and {given[1]!r}; leave one")
    if not given:
        return None
    key, value = given[0], turn[given[0]]
    if key != "weight" and not isinstance(value, bool):
        raise BadRow("format", f"{key} is {shown(value)}, not true or false; a number is called weight")
    made = weight_of(value) if key == "weight" else float(value)
    if made and role != "assistant":
        raise BadRow("format", f"{key}={value} on a {role} turn: only assistant turns are learnt; remove it or say 0")
    return made


def message_of(message: object) -> tuple[dict, float | None]:
    """The message as templates have it, and its weight."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRow("format", f"a message needs a role and a content, found {shown(message)}")
    role, content = message["role"], message.get("content")
    apart = ("content", "tool_calls", *MARKS)
    made = {k: v for k, v in message.items() if v is not None and k not in apart}
    if content is None and role in ("system", "developer", "user"):
        raise BadRow("format", f"a {role} turn has no content")
    made["content"] = text_or_nothing(content, "content")
    calls = message.get("tool_calls")
    if calls is not None and calls != []:
        if role != "assistant":
            raise BadRow("format", f"tool_calls on a {role} turn; only the assistant calls tools")
        made["tool_calls"] = _calls(calls)
    return made, _weight(message, role)


def conversation_of(turns: Sequence[tuple[dict, float | None]], tools: list[dict] | None = None) -> Conversation:
    weights = None
    if any(weight is not None for _, weight in turns):
        weights = [1.0 if weight is None else weight for _, weight in turns]
    return Conversation([message for message, _ in turns], tools, weights=weights)


def said(role: str, content: str) -> tuple[dict, float | None]:
    return {"role": role, "content": content}, None


def system_of(values: Mapping) -> list[tuple[dict, float | None]]:
    text = text_or_nothing(values.get("system"), "system")
    return [said("system", text)] if text else []


# ---------------------------------------------------------------------------- formats


def messages(values: Mapping) -> Conversation:
    messages = list_of(json_or_text(values["messages"], "messages"), "messages", "messages")
    if not messages:
        raise BadRow("format", "messages is empty")
    return conversation_of([message_of(m) for m in messages], tools_of(values))


def sharegpt(values: Mapping) -> Conversation:
    turns = list_of(json_or_text(values["conversations"], "conversations"), "conversations", "turns")
    if not turns:
        raise BadRow("format", "conversations is empty")
    return conversation_of([*system_of(values), *(turn_of(turn) for turn in turns)], tools_of(values))


def turn_of(turn: object) -> tuple[dict, float | None]:
    """A turn of ShareGPT, or a message, as templates have it."""
    if not isinstance(turn, dict):
        raise BadRow("format", f"a turn needs `from` and `value`, found {shown(turn)}")
    if "role" in turn and "from" not in turn:
        return message_of(turn)
    speaker = turn["from"].lower() if isinstance(turn.get("from"), str) else None
    role = SHAREGPT_ROLES.get(speaker) if speaker is not None else None
    if role is None:
        raise BadRow("role_order", f"unknown speaker {shown(turn.get('from'))}; known are {', '.join(SHAREGPT_ROLES)}")
    value, weight = turn.get("value"), _weight(turn, role)
    if value is None and role in ("system", "user"):
        raise BadRow("format", f"a {speaker} turn has no value")
    if speaker != "function_call":
        return {"role": role, "content": text_or_nothing(value, "value")}, weight
    call = json_or_text(value, "a function call")
    calls = _calls(call if isinstance(call, list) else [call])
    if not calls:
        raise BadRow("empty_answer", "a function_call turn calls nothing")
    return {"role": role, "content": "", "tool_calls": calls}, weight


def alpaca(values: Mapping) -> Conversation:
    turns = system_of(values)
    history = None if values.get("history") == "" else json_or_text(values.get("history"), "history")
    for pair in [] if history is None else list_of(history, "history", "pairs"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("format", f"history is not a list of pairs: {shown(pair)}")
        turns += [said("user", text_of(pair[0], "history")), said("assistant", text_of(pair[1], "history"))]
    question = text_of(values["instruction"], "instruction")
    more = text_or_nothing(values.get("input"), "input")
    if more:
        question += "\n\n" + more
    answer = text_or_nothing(values["output"], "output")
    return conversation_of([*turns, said("user", question), said("assistant", answer)])


def prompt_completion(values: Mapping) -> Conversation:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list):
        answer = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return conversation_of([message_of(m) for m in [*prompt, *answer]], tools_of(values))
    answer = text_or_nothing(completion, "completion")
    return conversation_of([said("user", text_of(prompt, "prompt")), said("assistant", answer)], tools_of(values))


def plain_text(values: Mapping) -> Conversation:
    return Conversation([said("assistant", text_of(values["text"], "text"))[0]], plain=True)


def ready_tokens(values: Mapping) -> Conversation:
    """`input_ids`; `labels` or `loss_mask` say which are learnt, and what `attention_mask` hides is dropped."""
    ids = _integers(values, "input_ids")
    if not ids:
        raise BadRow("format", "input_ids is empty")
    weights = [1.0] * len(ids)
    if values.get("loss_mask") is not None:
        mask = list_of(json_or_text(values["loss_mask"], "loss_mask"), "loss_mask", "weights")
        _same_length("loss_mask", mask, ids)
        weights = [float(w) if isinstance(w, bool) else weight_of(w) for w in mask]
    if values.get("labels") is not None:
        labels = _integers(values, "labels")
        _same_length("labels", labels, ids)
        for at, (label, token) in enumerate(zip(labels, ids)):
            if label not in (IGNORED, token):
                raise BadRow("format", f"labels[{at}] is {label}: neither input_ids[{at}]={token} nor {IGNORED}")
            if values.get("loss_mask") is not None and at and (label == IGNORED) != (weights[at] == 0):
                raise BadRow("format", f"labels and loss_mask disagree on whether token {at} is learnt; leave one out")
        if values.get("loss_mask") is None:
            weights = [float(label != IGNORED) for label in labels]
    seen = _seen(values, ids)
    hidden = [at for at in range(len(ids)) if at not in seen and weights[at]]
    if hidden and not (values.get("labels") is None and values.get("loss_mask") is None):
        raise BadRow("format", f"token {hidden[0]} is to be learnt, but attention_mask hides it")
    places = values.get("position_ids")
    if places is not None:
        found = _integers(values, "position_ids")
        _same_length("position_ids", found, ids)
        if [found[at] for at in seen] != list(range(len(seen))):
            raise BadRow("format", "position_ids start again: the row holds several documents; write one to a row")
    return Conversation([], tokens=Tokens(ids[seen.start : seen.stop], weights[seen.start : seen.stop]))


def _integers(values: Mapping, key: str) -> list[int]:
    found = list_of(json_or_text(values[key], key), key, "integers")
    for at, value in enumerate(found):
        if type(value) is not int:
            raise BadRow("format", f"{key}[{at}] is {shown(value)}, not an integer")
    return found


def _same_length(key: str, found: list, ids: list[int]) -> None:
    if len(found) != len(ids):
        raise BadRow("format", f"{key} has {len(found)} entries, input_ids {len(ids)}")


def _seen(values: Mapping, ids: list[int]) -> range:
    """The one stretch of tokens that is not padding."""
    if values.get("attention_mask") is None:
        return range(len(ids))
    mask = list_of(json_or_text(values["attention_mask"], "attention_mask"), "attention_mask", "zeros and ones")
    _same_length("attention_mask", mask, ids)
    bits = [int(m) if isinstance(m, bool) else m for m in mask]
    if any(type(b) is not int or b not in (0, 1) for b in bits):
        raise BadRow("format", "attention_mask holds more than zeros and ones")
    if 1 not in bits:
        raise BadRow("no_trained_token", "attention_mask hides every token")
    seen = range(bits.index(1), len(bits) - bits[::-1].index(1))
    if sum(bits) != len(seen):
        raise BadRow("format", "attention_mask has a hole: only padding before or after the tokens can be left out")
    return seen


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
            raise BadRow(
                "empty_answer",
                "the text is empty" if conversation.plain else "an assistant turn has neither content nor tool calls",
            )
        before = role
    if not any(m["role"] == "assistant" for m in conversation.messages):
        raise BadRow("no_trained_token", "no assistant turn, so nothing to learn")
