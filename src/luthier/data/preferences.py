"""Preference pairs: a better and a worse answer to one prompt, as one document of two members."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from . import conversations
from .conversations import (
    BadRow,
    Conversation,
    conversation_of,
    json_or_text,
    list_of,
    said,
    shown,
    system_of,
    text_of,
    text_or_nothing,
    tools_of,
    turn_of,
)

if TYPE_CHECKING:
    from .masks import Rendered, Renderer

Turn = tuple[dict, float | None]  # a message and its weight
MESSAGES = re.compile(r"\s*\[\s*\{")  # a text that is a list of messages in JSON
DIALOGUE = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # of texts as Anthropic's HH-RLHF has them


# ---------------------------------------------------------------------------- formats


def preference(values: Mapping) -> Conversation:
    """`prompt`, `chosen` and `rejected`, texts or messages; without `prompt` both begin alike."""
    chosen, rejected = values["chosen"], values["rejected"]
    if values.get("prompt") is not None:
        before = prompt_of(values)
    elif all(isinstance(text, str) and not MESSAGES.match(text) for text in (chosen, rejected)):
        return _of_texts(values, chosen, rejected)
    else:
        before = []
    return _pair(values, before, tools_of(values))


def sharegpt_preference(values: Mapping) -> Conversation:
    """`conversations`, which end with the question, and the two answers to it, as LLaMA-Factory has them."""
    asked = conversations.sharegpt(values)
    return _pair(values, [(message, None) for message in asked.messages], asked.tools)


def alpaca_preference(values: Mapping) -> Conversation:
    """`instruction`, `input`, `history`, `system`, and two answers in the place of `output`."""
    asked = conversations.alpaca({**values, "output": ""})
    return _pair(values, [(message, None) for message in asked.messages[:-1]], None)


def _pair(values: Mapping, before: list[Turn], tools: list[dict] | None) -> Conversation:
    better, worse = (_turns(before, values[key], key) for key in ("chosen", "rejected"))
    return _judged(values, conversation_of(better, tools), conversation_of(worse))


def _judged(values: Mapping, better: Conversation, worse: Conversation) -> Conversation:
    for conversation in (better, worse):
        check_unweighted(conversation)
    if better.messages == worse.messages:
        raise BadRow("equal_answers", "chosen and rejected are the same, so nothing is preferred")
    return replace(better, rejected=worse.messages, label=_margin(values))


def check_unweighted(conversation: Conversation) -> None:
    """What is compared is whole answers, each token as much as any other."""
    if conversation.weights is not None:
        raise BadRow("format", "a turn has a weight (weight, train, loss); answers that are compared have none")


def prompt_of(values: Mapping) -> list[Turn]:
    """The turns of `prompt`: messages, a dialogue in a text, or a text that the user says; after `system`."""
    prompt = values["prompt"]
    if isinstance(prompt, list):
        return [*system_of(values), *(turn_of(turn) for turn in prompt)]
    text = text_of(prompt, "prompt")
    return [*system_of(values), *(_dialogue(text) or [said("user", text)])]


def _turns(before: list[Turn], answer: object, key: str) -> list[Turn]:
    """The whole conversation that ends with this answer, which may repeat what stands before."""
    if answer is None or (isinstance(answer, str) and not MESSAGES.match(answer)):
        return [*before, said("assistant", text_or_nothing(answer, key))]
    given = [answer] if isinstance(answer, Mapping) else list_of(json_or_text(answer, key), key, "messages")
    if not given:
        raise BadRow("empty_answer", f"{key} is empty")
    turns = [turn_of(turn) for turn in given]
    asked = [message for message, _ in before]
    return turns if [message for message, _ in turns[: len(asked)]] == asked else [*before, *turns]


def _of_texts(values: Mapping, chosen: str, rejected: str) -> Conversation:
    """Two texts that begin alike: dialogues, or texts of which the words in common are the prompt."""
    better, worse = _dialogue(chosen), _dialogue(rejected)
    if better and worse:
        return _judged(values, conversation_of(better), conversation_of(worse))
    alike = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    common = chosen[:alike]
    if alike < max(len(chosen), len(rejected)):  # up to the last whole word; the blank after it is the answers'
        common = re.sub(r"\s*\S*$", "", common)
    if not common.strip():
        raise BadRow("format", "chosen and rejected are texts that begin differently: give the prompt that both answer")
    pair = [[said("user", common), said("assistant", text[len(common) :])] for text in (chosen, rejected)]
    better, worse = (replace(conversation_of(turns), plain=True) for turns in pair)
    return _judged(values, better, worse)


def _dialogue(text: str) -> list[Turn]:
    """The turns of a text that has `Human:` and `Assistant:` before each; none where it does not begin so."""
    text = text.strip()
    if not text.startswith("Human:") or "\n\nAssistant:" not in text:
        return []
    _, *parts = DIALOGUE.split(text)
    turns = zip(parts[::2], parts[1::2])
    made = [said("user" if who == "Human" else "assistant", what.strip()) for who, what in turns]
    if made[-1][0]["role"] == "assistant" and not made[-1][0]["content"]:  # a prompt that ends with `Assistant:`
        del made[-1]
    return made


def _margin(values: Mapping) -> float:
    """By how much the better answer is the better one, where the row says so: `margin`, or both scores; else 0."""
    scores = [number_of(values, key) for key in ("score_chosen", "score_rejected")]
    if values.get("margin") is not None:
        return number_of(values, "margin") or 0.0
    if scores[0] is None or scores[1] is None:
        return 0.0
    if scores[0] < scores[1]:
        raise BadRow("label", f"score_chosen={scores[0]:g} is less than score_rejected={scores[1]:g}")
    return scores[0] - scores[1]


def number_of(values: Mapping, key: str) -> float | None:
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow("label", f"{key} is {shown(value)}, not a finite number")
    return float(value)


# ---------------------------------------------------------------------------- rendering


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
    for messages, key in ((better, "chosen"), (worse, "rejected")):
        if len(messages) == common:
            raise BadRow("empty_answer", f"{key} ends where the other goes on: it holds no answer of its own")
    if not better[common]["role"] == worse[common]["role"] == "assistant":
        raise BadRow("role_order", "chosen and rejected part at a turn that is not the assistant's: they answer "
                                   "different prompts")  # fmt: skip
    members = []
    for messages in (better, worse):
        weights = [float(i >= common) for i in range(len(messages))]
        made = renderer.render(replace(conversation, messages=messages, weights=weights, rejected=None))
        members.append(replace(made, plain=False))  # never cut
    if members[0].text == members[1].text:
        raise BadRow("equal_answers", "chosen and rejected are the same once the chat template has written them")
    return replace(members[0], rest=(members[1],), labels=(float(conversation.label or 0.0),))
