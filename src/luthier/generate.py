"""Answers: batched decoding with a cache, left-padded, finished rows leave the batch; greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .data.conversations import Conversation
from .data.masks import Renderer
from .logprobs import Head
from .models import virtual
from .models.network import Network

SHRINK = 0.75  # share of unfinished rows under which the finished ones are taken out of the cache


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """The next token of each row of logits [B, V]: the likeliest at temperature 0, else sampled (arXiv:1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        # The smallest set that holds top_p, the likeliest always in it.
        ordered[(ordered.cumsum(-1) - ordered) >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    network: Network,
    prompts: Sequence[Sequence[int]],
    stop: set[int],
    max_new_tokens: int,
    *,
    batch_size: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    on_token: Callable[[int], None] | None = None,
    finished: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """The new tokens after each prompt, without the stop token, in the order of the prompts.

    `finished` is asked after each token whether an answer is at its end, which it then keeps.
    """
    generator = None
    if seed is not None and temperature > 0:
        generator = torch.Generator(network.device).manual_seed(seed)
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with network.natively() as model:
        for members in _batches(model, [len(p) for p in prompts], order, batch_size):
            decode = _Decode(model, network.head, [prompts[i] for i in members])
            for _ in range(max_new_tokens):
                chosen = choose(decode.logits(), temperature, top_p, generator).tolist()
                for slot, token in zip(decode.slots, chosen):
                    if slot not in decode.done and token not in stop:
                        answers[members[slot]].append(token)
                        if on_token is not None:
                            on_token(token)
                        if finished is not None and finished(answers[members[slot]]):
                            decode.done.add(slot)
                if not decode.advance(chosen, stop):
                    break
    return answers


def _batches(model: Any, lengths: Sequence[int], order: Sequence[int], batch_size: int) -> list[list[int]]:
    """Prompts that are answered together: neighbours in `order`, of one length where padding would come between."""
    found = virtual.of(model)
    alike = found is not None and found.prefix is not None and virtual.slides(model)
    made: list[list[int]] = []
    for i in order:
        if not made or len(made[-1]) == batch_size or (alike and lengths[made[-1][0]] != lengths[i]):
            made.append([])
        made[-1].append(i)
    return made


class _Decode:
    """One batch on its way: the cache, the mask, and which prompts are still unfinished."""

    def __init__(self, model: Any, head: Head, prompts: Sequence[Sequence[int]]):
        self.model, self.head = model, head
        device = model.get_input_embeddings().weight.device
        longest = max(len(p) for p in prompts)
        self.slots = list(range(len(prompts)))
        self.done: set[int] = set()
        self.tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        self.mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.given = {"input_ids": self.tokens}
        found = virtual.of(model)
        if found is not None:
            starts = [longest - len(p) for p in prompts]
            given = virtual.padded(model, found, self.tokens, self.mask, starts)
            self.positions, self.mask = given.pop("position_ids"), given.pop("attention_mask")
            self.given = given
        dtype = model.get_input_embeddings().weight.dtype
        self.cache = virtual.cache(model, found, len(prompts), dtype)
        self.keyword = virtual.cache_keyword(model)

    def logits(self) -> Tensor:
        """[B, V] after the last token of each row."""
        out = self.model.base_model(
            **self.given, attention_mask=self.mask, position_ids=self.positions, use_cache=True,
            **{self.keyword: self.cache},
        )  # fmt: skip
        return self.head(out.last_hidden_state[:, -1])

    def advance(self, chosen: list[int], stop: set[int]) -> bool:
        """Take the chosen tokens in; False when every row is finished."""
        self.done |= {slot for slot, token in zip(self.slots, chosen) if token in stop}
        keep = [i for i, slot in enumerate(self.slots) if slot not in self.done]
        if not keep:
            return False
        device = self.tokens.device
        self.tokens = torch.tensor(chosen, device=device)[:, None]
        self.positions = self.positions[:, -1:] + 1
        if len(keep) <= SHRINK * len(self.slots):
            index = torch.tensor(keep, device=device)
            self.cache.batch_select_indices(index)
            self.tokens, self.positions, self.mask = (t[index] for t in (self.tokens, self.positions, self.mask))
            self.slots = [self.slots[i] for i in keep]
        self.given = {"input_ids": self.tokens}
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return True


class Chat:
    """A conversation with a model, or many questions at once, through the template that it was trained with."""

    def __init__(self, network: Network, renderer: Renderer, system: str | None = None):
        self.network, self.renderer = network, renderer
        self.history: list[dict] = [{"role": "system", "content": system}] if system else []

    def prompt(self, messages: Sequence[dict]) -> list[int]:
        return self.renderer.prompt_tokens(Conversation(list(messages)), messages)

    def text(self, tokens: Sequence[int]) -> str:
        return self.renderer.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def ask(self, *questions: str, max_new_tokens: int = 256, **options) -> list[str]:
        """Answers to separate questions, decoded together; `options` are those of `generate`."""
        prompts = [self.prompt([*self.history, {"role": "user", "content": q}]) for q in questions]
        new = generate(self.network, prompts, self.renderer.stop_tokens(), max_new_tokens, **options)
        return [self.text(tokens) for tokens in new]

    def say(self, message: str, on_text: Callable[[str], None], max_new_tokens: int = 256, **options) -> str:
        """The answer to the next turn of one conversation, its text handed out as it comes."""
        self.history.append({"role": "user", "content": message})
        tokens: list[int] = []
        shown = ""

        def show(complete: bool = False) -> None:
            nonlocal shown
            text = self.renderer.tokenizer.decode(tokens, skip_special_tokens=True)
            if complete or not text.endswith("\ufffd"):  # the first bytes of a character
                on_text(text[len(shown) :])
                shown = text

        def more(token: int) -> None:
            tokens.append(token)
            show()

        stop = self.renderer.stop_tokens()
        new = generate(self.network, [self.prompt(self.history)], stop, max_new_tokens, on_token=more, **options)
        show(complete=True)
        self.history.append({"role": "assistant", "content": self.text(new[0])})
        return self.history[-1]["content"]
