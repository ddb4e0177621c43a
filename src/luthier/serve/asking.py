"""Bodies of requests as requests of the engine: prompts by the model's template, limits, forms of answers, tools."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.conversations import BadRow, Conversation, message_of, tools_of
from .grammar import Guide, Triggered, Unsupported, json_object, of_schema
from .grammar.expressions import Grammar, literal, optional
from .grammar.expressions import Sequence as InOrder
from .problems import Problem
from .requests import Request
from .schemas import ChatRequest, CompletionRequest, FormatObject, FormatSchema, Message, NamedTool, Tool
from .served import Answering, Entry
from .settings import Serving
from .tools import Sifted, Style, grammar, inner

COMPLETION = 16  # tokens of a completion that does not say how many, as OpenAI has it


@dataclass
class Asked:
    """One answer that is wanted, and how it is to be read."""

    request: Request
    prompt: int  # which of the prompts it answers
    guide: Guide | None = None
    sifted: Sifted | None = None
    forced: bool = False  # a call of a tool


@dataclass
class Wanted:
    """All that a body asks for."""

    entry: Entry
    answering: Answering
    asked: list[Asked] = field(default_factory=list)
    prompt_tokens: int = 0


def answering_of(entry: Entry, what: str) -> Answering:
    if what not in entry.does or not isinstance(entry.source, Answering):
        raise Problem(400, f"the model {entry.name!r} gives {', '.join(entry.does)}, no {what}", "model")
    return entry.source


# ---------------------------------------------------------------------------- chat


def chat(body: ChatRequest, entry: Entry, settings: Serving, user: str) -> Wanted:
    """Raises Problem, Refused, Unsupported."""
    answering = answering_of(entry, "chat")
    tools = _tools(body, answering)
    if body.top_logprobs is not None and not body.logprobs:
        raise Problem(400, "top_logprobs needs logprobs=true", "top_logprobs")
    if body.max_completion_tokens is not None and body.max_tokens is not None:
        raise Problem(400, "max_tokens is the old name of max_completion_tokens: give one of them", "max_tokens")
    tokens = prompt(body.messages, tools, answering)
    most = _most(body.max_completion_tokens or body.max_tokens, len(tokens), entry, settings, None)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    made = Wanted(entry, answering, prompt_tokens=len(tokens))
    held = _forms(body, answering, tools, most)
    for choice in range(body.n or 1):
        guide, allowed, sifted, forced = held()
        request = Request(
            tokens, most, stop=answering.stops, logprobs=logprobs, adapter=entry.adapter, allowed=allowed,
            keeps_special=sifted is not None and _special(sifted.style), **_sampling(body, choice, settings, user),
        )  # fmt: skip
        made.asked.append(Asked(request, 0, guide, sifted, forced))
    return made


def prompt(messages: Sequence[Message], tools: Sequence[Tool], answering: Answering) -> list[int]:
    """The tokens after which the model is to answer."""
    renderer = answering.renderer
    if messages[-1].role == "assistant":
        raise Problem(400, "the last message is the assistant's, so there is nothing to answer", "messages")
    try:
        turns = []
        for i, message in enumerate(messages):
            values = message.model_dump(exclude_none=True)
            values["role"] = "system" if message.role == "developer" else message.role
            if message.role == "tool" and message.content is None:
                raise BadRow("format", "a tool turn has no content")
            if message.role == "assistant" and message.content is None and not message.tool_calls:
                raise BadRow("format", f"messages[{i}]: an assistant turn has neither content nor tool calls")
            for call in message.tool_calls or ():
                if not isinstance(_object(call.function.arguments), dict):
                    raise BadRow("format", f"messages[{i}]: the arguments of a tool call are no JSON object")
            turns.append(message_of(values)[0])
        described = [tool.model_dump(exclude_none=True) for tool in tools]
        conversation = Conversation(turns, tools_of({"tools": described}) if described else None)
        renderer.check_texts(conversation)
        if not renderer.tokenizer.chat_template and any("tool_calls" in turn for turn in turns):
            raise BadRow("template", "the model has no chat template, and so no way to write calls of tools")
        return renderer.prompt_tokens(conversation, conversation.messages)
    except BadRow as fault:
        raise Problem(400, fault.detail, "messages", fault.kind) from None


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _tools(body: ChatRequest, answering: Answering) -> list[Tool]:
    """The tools that may be called."""
    tools = body.tools or []
    names = [tool.function.name for tool in tools]
    if not tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise Problem(400, "tool_choice asks for a call, and there are no tools", "tool_choice")
        return []
    if len(set(names)) < len(names):
        raise Problem(400, "two tools have the same name", "tools")
    if answering.style is None:
        raise Problem(400, "the model's chat template takes no tools in a way that is known here", "tools")
    if isinstance(body.tool_choice, NamedTool) and body.tool_choice.function.name not in names:
        raise Problem(400, f"tool_choice: there is no tool {body.tool_choice.function.name!r}", "tool_choice")
    return [] if body.tool_choice == "none" else tools


def _forms(body: ChatRequest, answering: Answering, tools: Sequence[Tool], most: int) -> Any:
    """A function that makes, for each choice: (guide, allowed, sifted, forced)."""
    form, stops = body.response_format, answering.stops
    held_to_json = isinstance(form, FormatObject | FormatSchema)
    if tools:
        assert answering.style is not None
        forced = body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)
        if held_to_json and not forced:
            said = "response_format beside tools that need not be called is not supported"
            raise Problem(400, said, "response_format")
        return _calling(body, answering, answering.style, tools, most, forced)
    if not held_to_json:
        return lambda: (None, None, None, False)
    if isinstance(form, FormatSchema):
        schema = form.json_schema.schema_
        key = "schema", _key(schema)
        masks = _placed("response_format", lambda: answering.machines.get(key, lambda: of_schema(schema), stops))
    else:
        masks = _placed("response_format", lambda: answering.machines.get("object", json_object, stops))

    def make() -> tuple:
        guide = _placed("response_format", lambda: Guide(masks, most))
        return guide, guide, None, False

    return make


def _calling(
    body: ChatRequest, answering: Answering, style: Style, tools: Sequence[Tool], most: int, forced: bool
) -> Any:
    if isinstance(body.tool_choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == body.tool_choice.function.name]
    described = [(tool.function.name, tool.function.parameters) for tool in tools]
    parallel = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool)
    key = (forced, parallel, style, _key(described))
    if forced:
        masks = _placed("tools", lambda: answering.machines.get(
            key, lambda: grammar(style, described, parallel), answering.stops
        ))  # fmt: skip

        def make() -> tuple:
            guide = _placed("tools", lambda: Guide(masks, most))
            return guide, guide, Sifted(style), True

        return make
    try:  # a call that the model begins of itself is held to its form where that is known to the end
        if style.kind != "hermes":
            raise Unsupported("no end that tells where text goes on")
        masks = answering.machines.get(
            key, lambda: Grammar(InOrder((optional(literal(" ")), inner(style, described)))), ()
        )  # fmt: skip
    except Unsupported:
        if any(tool.function.strict for tool in tools):
            _placed("tools", lambda: grammar(style, described, parallel))  # says what is wrong with a schema
        return lambda: (None, None, Sifted(style), False)
    mark = style.mark.encode() if style.mark_token is None else b""
    return lambda: (None, Triggered(masks, mark, style.mark_token, most), Sifted(style), False)


def _special(style: Style) -> bool:
    """Whether calls are told by tokens that text leaves out otherwise."""
    return style.mark_token is not None or style.kind == "llama"


def _key(schema: Any) -> str:
    return json.dumps(schema)  # in its own order, which answers follow


def _placed(param: str, make: Any) -> Any:
    try:
        return make()
    except Unsupported as error:
        raise Problem(400, str(error), param, "unsupported_schema") from None
    except RecursionError:
        raise Problem(400, "a schema that is nested too deeply", param, "unsupported_schema") from None


# ---------------------------------------------------------------------------- completions


def completions(body: CompletionRequest, entry: Entry, settings: Serving, user: str) -> Wanted:
    """Raises Problem, Refused."""
    answering = answering_of(entry, "completions")
    choices = body.n or 1
    if body.best_of is not None and body.best_of != choices:
        raise Problem(400, "best_of other than n is not supported", "best_of")
    prompts = texts_or_tokens(body.prompt, answering.tokenizer)
    if not prompts:
        raise Problem(400, "there is no prompt", "prompt")
    if len(prompts) * choices > settings.waiting + settings.slots:
        raise Problem(400, f"{len(prompts) * choices} answers in one request are more than may wait", "prompt")
    made = Wanted(entry, answering, prompt_tokens=sum(map(len, prompts)))
    for number, tokens in enumerate(prompts):
        if not tokens:
            raise Problem(400, f"prompt {number} is empty", "prompt")
        most = _most(body.max_tokens, len(tokens), entry, settings, COMPLETION)
        for choice in range(choices):
            request = Request(
                tokens, most, stop=answering.stops, logprobs=body.logprobs, adapter=entry.adapter,
                **_sampling(body, choice, settings, user),
            )  # fmt: skip
            made.asked.append(Asked(request, number))
    return made


def texts_or_tokens(given: Any, tokenizer: Any) -> list[list[int]]:
    """A text, texts, tokens, or lists of them, as lists of tokens."""
    if isinstance(given, str):
        given = [given]
    if given and isinstance(given[0], int):
        return [list(given)]
    if given and isinstance(given[0], str):
        return tokenizer(list(given), return_attention_mask=False, verbose=False)["input_ids"]
    return [list(tokens) for tokens in given]


# ---------------------------------------------------------------------------- what both have


def _most(asked: int | None, prompt: int, entry: Entry, settings: Serving, default: int | None) -> int:
    """How many tokens an answer may have."""
    assert entry.engine is not None
    room = entry.engine.length - prompt
    if asked is not None and asked > settings.max_new_tokens:
        raise Problem(
            400, f"max_tokens={asked}: this server gives at most {settings.max_new_tokens}", "max_tokens",
            "max_tokens_too_large",
        )  # fmt: skip
    if room < 1 or (asked is not None and asked > room):
        wanted = "" if asked is None else f" and max_tokens={asked}"
        raise Problem(
            400, f"the prompt has {prompt} tokens{wanted}, and the limit of both is {entry.engine.length}", "messages",
            "context_length_exceeded",
        )  # fmt: skip
    return asked or min(settings.max_new_tokens if default is None else default, room)


def _sampling(body: ChatRequest | CompletionRequest, choice: int, settings: Serving, user: str) -> dict[str, Any]:
    stop = [] if body.stop is None else [body.stop] if isinstance(body.stop, str) else body.stop
    return {
        "temperature": 1.0 if body.temperature is None else float(body.temperature),
        "top_p": 1.0 if body.top_p is None else float(body.top_p),
        "top_k": body.top_k or 0,
        "seed": _seed(body.seed, choice),
        "stop_texts": tuple(dict.fromkeys(stop)),
        "deadline": time.monotonic() + settings.timeout,
        "user": f"{user} {body.user or ''}",
    }


def _seed(seed: int | None, choice: int) -> int | None:
    """Of each choice its own; of the first the one that was given."""
    if seed is None or choice == 0:
        return seed
    return random.Random(f"{seed} {choice}").getrandbits(63)
