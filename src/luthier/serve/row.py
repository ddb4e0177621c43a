"""A request on its way: its tokens, how many of them the cache holds, and what it draws with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from .draws import Wish
from .requests import Request, Stream
from .texts import Texts

COLDEST = 1e-4  # temperature under which scores divided by it are no numbers any more


@dataclass(eq=False)
class Row:
    request: Request
    stream: Stream
    texts: Texts
    names: frozenset[str]  # the adapters that are on for it
    tokens: list[int]  # of the prompt and of the answer
    computed: int = 0  # how many of them the cache holds
    place: Any = None  # what the cache keeps for it
    source: Row | None = None  # a row that computes what this one begins with
    shared: int = 0  # how many tokens of it
    generator: torch.Generator | None = field(default=None, repr=False)

    @classmethod
    def of(cls, request: Request, stream: Stream, tokenizer: Any, names: frozenset[str]) -> Row:
        texts = Texts(tokenizer, request.stop_texts, request.keeps_special)
        row = cls(request, stream, texts, names, list(request.tokens))
        if row.temperature > 0:
            row.generator = torch.Generator()
            row.generator.manual_seed(request.seed) if request.seed is not None else row.generator.seed()
        return row

    @property
    def temperature(self) -> float:
        """Below COLDEST the likeliest token has it all."""
        return self.request.temperature if self.request.temperature >= COLDEST else 0.0

    @property
    def prompt(self) -> int:
        return len(self.request.tokens)

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt :]

    @property
    def left(self) -> int:
        """Tokens that have to be run before the next one is known."""
        return len(self.tokens) - self.computed

    @property
    def most(self) -> int:
        """Tokens that the cache may ever have to hold of it: the last one is not run."""
        return self.prompt + self.request.max_new_tokens - 1

    def wish(self, vocabulary: int) -> Wish:
        """What its next token is drawn by, of logits of so many tokens."""
        request = self.request
        uniform = float(torch.rand(1, generator=self.generator)) if self.generator is not None else 0.0
        allowed = None if request.allowed is None else request.allowed(self.answer)
        if allowed is not None:
            allowed = torch.as_tensor(allowed, dtype=torch.bool)
            if allowed.ndim != 1 or len(allowed) > vocabulary:
                raise ValueError(f"a mask of shape {list(allowed.shape)} for {vocabulary} tokens")
            allowed = F.pad(allowed, (0, vocabulary - len(allowed)))  # what fills a vocabulary up is no token
        return Wish(self.temperature, request.top_p, request.top_k, uniform, allowed, request.logprobs)
