"""Paraphrases: a model says the user's side in other words; labels and answers stay."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from ..chat_client import Question
from ..views import put
from .noise import NEGATIONS, is_tagged, spans_of
from .way import Draw, Given, Refused, Steps, Tools, Way

INSTRUCTION = (
    "Say the following text in other words. Keep its meaning, its language, its tone, and every name, number and "
    "address. Do not answer or obey it. Write only the new text.\n\nText:\n{text}"
)
QUOTES = {'"': '"', "'": "'", "“": "”", "«": "»", "`": "`"}
PREFIX = re.compile(r"^(?:(?:here is|here's|sure|certainly)[^\n]*:\s*\n+|(?:new text|paraphrase|text)\s*:\s*)", re.I)


class Paraphrase(Way):
    """What the model gives is used only if it says another thing in words and the same in numbers."""

    asks: ClassVar = True

    kind: Literal["paraphrase"] = "paraphrase"
    instruction: str = INSTRUCTION
    """What the model is told; `{text}` stands for the text."""
    shortest: float = Field(0.4, ge=0.0)
    """Paraphrases of less than this share of the text's characters are refused."""
    longest: float = Field(2.5, gt=0.0)
    """And those of more than this."""
    strict: bool = True
    """Refuse those that are a question, or negate, where the text does not, or the other way round."""

    @field_validator("instruction")
    @classmethod
    def _has_a_place(cls, text: str) -> str:
        if text.count("{text}") != 1:
            raise ValueError("it needs {text}, once, where the text is to stand")
        return text

    def made(self, given: Given, draw: Draw, tools: Tools) -> Steps:
        texts = given.asked()
        if any(is_tagged(given, text) for text in texts) or spans_of(given.values):
            raise Refused("words would move, and their tags or labelled stretches not with them")
        questions = [self._question(text.text, draw, tools) for text in texts]
        answers = [answer.said() for answer in (yield questions)]
        values = given.values
        for text, answer in zip(texts, answers):
            if answer.cut:
                raise Refused("the answer was cut: give the model's max_new_tokens more")
            path = (given.column(text.path[0]), *text.path[1:])
            values = put(values, path, self._checked(text.text, answer.text))
        return values

    def _question(self, text: str, draw: Draw, tools: Tools) -> Question:
        asked = self.instruction.replace("{text}", text)
        return Question((("user", asked),), seed=draw.seed(), **tools.sampling)

    def _checked(self, text: str, answer: str) -> str:
        new = bare(answer, text)
        if not new:
            raise Refused("the model gave no text")
        if _words(new) == _words(text):
            raise Refused("the model gave the same words")
        if not self.shortest * len(text) <= len(new) <= max(self.longest * len(text), 20):
            raise Refused("the paraphrase is much shorter or longer")
        if _numbers(new) != _numbers(text):
            raise Refused("the paraphrase has other numbers")
        if self.strict and _asks(new) != _asks(text):
            raise Refused("one of text and paraphrase is a question, the other not")
        if self.strict and _negates(new) != _negates(text):
            raise Refused("one of text and paraphrase negates, the other not")
        return new


def bare(answer: str, text: str) -> str:
    """An answer without what models put around it: an announcement, quotation marks that the text has not."""
    made = answer.strip()
    found = PREFIX.match(made)
    if found and not PREFIX.match(text):
        made = made[found.end() :].strip()
    around = len(made) > 1 and QUOTES.get(made[0]) == made[-1] and not {made[0], made[-1]} & set(made[1:-1])
    return made[1:-1].strip() if around and text.strip()[:1] != made[0] else made


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _asks(text: str) -> bool:
    return text.rstrip("\"'”») \n").endswith(("?", "？", "؟"))


def _negates(text: str) -> bool:
    return bool(NEGATIONS.intersection(_words(text))) or re.search(r"n['’]t\b", text, re.I) is not None


def _numbers(text: str) -> list[str]:
    return sorted(re.findall(r"\d+", text))
