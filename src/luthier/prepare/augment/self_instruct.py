"""Self-instruct: a model writes new instructions after some that it is shown, and answers them.

https://arxiv.org/abs/2212.10560 (Wang and others).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from ...data.holdout import PARENT
from ...errors import DataError
from ..chat_client import Answer, Question
from .rouge import Pool
from .way import Draw, Given, Refused, Tools, Way

ASKED = (
    "Below are tasks that people give an assistant that reads and writes text. Write {new} more, unlike these and "
    "unlike one another in subject, wording and kind, in the same language. Each must be complete in itself and need "
    "nothing but text to be done. Write one a line, with its number, and nothing else.\n\n{shown}"
)
NUMBERED = re.compile(r"^\s*(?:task\s*)?(\d+)\s*[.):]\s*(.+?)\s*$", re.I)
UNFIT = re.compile(r"\b(images?|pictures?|photos?|graphs?|videos?|audio|diagrams?|plots?|files?)\b", re.I)
SYSTEM = "system"


class Seed(NamedTuple):
    """An instruction that is shown to the model, and where it comes from."""

    text: str
    parent: dict | None  # of a given row; None of one that the model wrote


class SelfInstruct(Way):
    """Rounds of: show the model some instructions, keep what it writes that is new, have it answered."""

    asks: ClassVar = True

    kind: Literal["self_instruct"] = "self_instruct"
    count: int = Field(100, ge=1)
    """New rows that are wanted; fewer come where the model writes nothing new any more."""
    shown: int = Field(8, ge=1, le=64)
    """Instructions shown in each request: three quarters given ones, as far as there are some of both."""
    asked: int = Field(8, ge=1, le=64)
    """New instructions wanted of each request."""
    requests: int = Field(4, ge=1)
    """Requests of a round; what one gives is shown only in later rounds."""
    rouge_l: float = Field(0.7, gt=0.0, le=1.0)
    """An instruction with this ROUGE-L or more to any other is not new."""
    shortest: int = Field(3, ge=1)
    """Words of an instruction, at least."""
    longest: int = Field(150, ge=1)
    """Words of an instruction, at most."""
    patience: int = Field(5, ge=1)
    """Rounds without a new instruction after which no more are asked for."""
    seeds: int = Field(10_000, ge=1)
    """Of the given rows, so many are instructions to show; more are not read."""
    system: str | None = None
    """A system turn with which instructions are answered."""

    def rows(
        self, found: Sequence[tuple[Given, dict]], seed: int, ask: Callable[[Sequence[Question]], list[Answer]],
        tools: Tools, say: Callable[[str], None], refused: Callable[[str], bool] = lambda text: False,
    ) -> Iterator[dict]:  # fmt: skip
        """New rows in the format of the first given one; `found` are given rows, each with where it stands."""
        first = next((given for given, _ in found if given.seen.format in MAKERS), None)
        if first is None:
            raise DataError(
                f"ways.self_instruct: no row is of a format with answers to instructions ({', '.join(MAKERS)})"
            )
        pool, given_seeds = Pool(), []
        for given, parent in found:
            if (text := instruction_of(given)) is not None:
                given_seeds.append(Seed(text, parent))
                pool.add(text)
        own: list[Seed] = []
        made = idle = number = 0
        while made < self.count and idle < self.patience:
            draw = Draw(seed, self.kind, number)
            shown = [self._shown(given_seeds, own, draw) for _ in range(self.requests)]
            questions = [self._question(seeds, draw, tools) for seeds in shown]
            new = [
                (text, seeds) for seeds, answer in zip(shown, ask(questions)) for text in self.instructions(answer)
                if not refused(text) and not pool.like(text, self.rouge_l) and not pool.add(text)
            ][: self.count - made]  # fmt: skip
            answers = ask([self._answering(text, draw, tools) for text, _ in new])
            for (text, seeds), answer in zip(new, answers):
                if answer.text and not answer.cut:
                    made += 1
                    own.append(Seed(text, None))
                    values = MAKERS[first.seen.format](first, text, answer.text)
                    yield values | {PARENT: self._parent(seeds, seed, number)}
            number += 1
            idle = 0 if new else idle + 1
            say(f"self_instruct: {made:,} of {self.count:,} rows after {number:,} rounds")

    def instructions(self, answer: Answer) -> list[str]:
        """The numbered lines of an answer that may be instructions; of one that was cut without the last."""
        answer = answer.said()
        lines = [match[2] for line in answer.text.splitlines() if (match := NUMBERED.match(line))]
        fit = []
        for line in lines[:-1] if answer.cut else lines:
            text = line.strip("*_ ").strip()
            if self.shortest <= len(text.split()) <= self.longest and not UNFIT.search(text) and text[:1].isalpha():
                fit.append(text)
        return fit

    def _shown(self, given: Sequence[Seed], own: Sequence[Seed], draw: Draw) -> list[Seed]:
        of_own = min(len(own), self.shown // 4)
        chosen = draw.some(range(len(given)), self.shown - of_own)
        shown = [*(given[i] for i in chosen), *(own[i] for i in draw.some(range(len(own)), of_own))]
        return draw.some(shown, self.shown)

    def _question(self, seeds: Sequence[Seed], draw: Draw, tools: Tools) -> Question:
        lines = "\n".join(f"{i}. {' '.join(seed.text.split())}" for i, seed in enumerate(seeds, 1))
        return Question((("user", ASKED.format(new=self.asked, shown=lines)),), seed=draw.seed(), **tools.sampling)

    def _answering(self, text: str, draw: Draw, tools: Tools) -> Question:
        system = ((SYSTEM, self.system),) if self.system else ()
        return Question((*system, ("user", text)), seed=draw.seed(), **tools.sampling)

    def _parent(self, seeds: Sequence[Seed], seed: int, number: int) -> dict:
        parents = [one.parent for one in seeds if one.parent is not None]
        first = parents[0] if parents else {}
        return first | {"way": self.kind, "seed": seed, "copy": number, "others": parents[1:]}


def instruction_of(given: Given) -> str | None:
    """The first thing that the user asks; None of a row that asks nothing."""
    if given.seen.format not in MAKERS:
        return None
    try:
        texts = [text for text in given.asked() if text.role == "user"]
    except Refused:
        return None
    if given.seen.format == "alpaca":
        return "\n".join(text.text for text in texts if text.path[0] in ("instruction", "input")) or None
    return texts[0].text if texts else None


# ---------------------------------------------------------------------------- rows of each format


def _messages(first: Given, asked: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def _of_messages(first: Given, asked: str, answer: str) -> dict:
    return {first.column("messages"): _messages(first, asked, answer)}


def _of_sharegpt(first: Given, asked: str, answer: str) -> dict:
    return {first.column("conversations"): [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]}


def _of_alpaca(first: Given, asked: str, answer: str) -> dict:
    return {first.column("instruction"): asked, first.column("input"): "", first.column("output"): answer}


def _of_prompt(first: Given, asked: str, answer: str) -> dict:
    turns: Any = _messages(first, asked, answer)
    values = first.seen.values
    prompt = turns[:1] if isinstance(values["prompt"], list) else asked
    completion = turns[1:] if isinstance(values["completion"], list) else answer
    return {first.column("prompt"): prompt, first.column("completion"): completion}


MAKERS: dict[str, Callable[[Given, str, str], dict]] = {
    "messages": _of_messages, "sharegpt": _of_sharegpt, "alpaca": _of_alpaca, "prompt_completion": _of_prompt,
}  # fmt: skip
