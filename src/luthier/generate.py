"""Answers: batched decoding with a cache, left-padded, finished rows leave the batch; greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .data.conversations import Conversation
from .data.masks import Renderer
from .logprobs import Head, logprob_of
from .models import virtual
from .models.network import Network
from .surgery import cache_keyword

SHRINK = 0.75  # share of unfinished rows under which the finished ones are taken out of the cache
PARTS = 1 << 40  # of a probability, when tokens are drawn


@dataclass(frozen=True)
class Completion:
    """What came after one prompt."""

    tokens: list[int]  # the one that ended it included
    ended: bool  # by a stop token; else it was cut, or `finished`
    logprobs: list[float] = field(default_factory=list)  # of each token, under the distribution it was drawn from
    raw_logprobs: list[float] = field(default_factory=list)  # and under the model's own, at temperature 1

    @property
    def answer(self) -> list[int]:
        """Without the token that ended it."""
        return self.tokens[:-1] if self.ended else self.tokens


def distribution(logits: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """[B, V] probabilities of the next token, in float32: the likeliest `top_k` (all with 0), then of those the
    smallest set that holds `top_p` (arXiv:1904.09751). At temperature 0 the likeliest has them all."""
    if temperature == 0:
        return torch.zeros_like(logits, dtype=torch.float32).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        # The likeliest is always in it.
        whole = _whole(ordered)
        ordered[whole.cumsum(-1) - whole >= top_p * PARTS] = 0
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        probabilities /= probabilities.sum(-1, keepdim=True)
    return probabilities


def drawn(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """[B] a token of each row of probabilities [B, V], told by numbers [B] in [0, 1) that are spread evenly."""
    sums = _whole(probabilities).cumsum(-1)
    at = (uniforms.double() * sums[:, -1]).long()
    return torch.searchsorted(sums, at[:, None], right=True)[:, 0]


def _whole(probabilities: Tensor) -> Tensor:
    """In whole numbers, whose running sums are exact: those of fractions are not the same every time on a GPU."""
    return (probabilities.double() * PARTS).long()


def choose(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None, top_k: int = 0
) -> Tensor:
    """The next token of each row of logits [B, V]: the likeliest at temperature 0, else sampled."""
    if temperature == 0:
        return logits.argmax(-1)
    uniforms = torch.rand(len(logits), generator=generator, device=logits.device)
    return drawn(distribution(logits, temperature, top_p, top_k), uniforms)


def generate(
    network: Network, prompts: Sequence[Sequence[int]], stop: set[int], max_new_tokens: int, **options: Any
) -> list[list[int]]:
    """The new tokens after each prompt, without the stop token, in the order of the prompts; options of `complete`."""
    return [made.answer for made in complete(network, prompts, stop, max_new_tokens, **options)]


@torch.no_grad()
def complete(
    network: Network,
    prompts: Sequence[Sequence[int]],
    stop: set[int],
    max_new_tokens: int,
    *,
    batch_size: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    uniforms: Tensor | None = None,
    logprobs: bool = False,
    on_token: Callable[[int], None] | None = None,
    finished: Callable[[list[int]], bool] | None = None,
) -> list[Completion]:
    """The new tokens after each prompt, in the order of the prompts.

    `uniforms` [P, max_new_tokens] in [0, 1) decide what is drawn, so that it does not depend on who shares a batch.
    `finished` is asked after each token whether an answer is at its end, which it then keeps.
    """
    generator = None
    if seed is not None and temperature > 0:
        generator = torch.Generator(network.device).manual_seed(seed)
    tokens: list[list[int]] = [[] for _ in prompts]
    told: list[list[tuple[float, float]]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with network.natively() as model:
        for members in _batches(model, [len(p) for p in prompts], order, batch_size):
            decode = _Decode(model, network.head, [prompts[i] for i in members])
            for at in range(max_new_tokens):
                logits = decode.logits()
                if uniforms is None or temperature == 0:
                    chosen = choose(logits, temperature, top_p, generator, top_k)
                else:
                    own = uniforms[[members[slot] for slot in decode.slots], at].to(logits.device)
                    chosen = drawn(distribution(logits, temperature, top_p, top_k), own)
                rows = _told(logits, chosen, temperature, top_p, top_k) if logprobs else None
                picked = chosen.tolist()
                for row, (slot, token) in enumerate(zip(decode.slots, picked)):
                    if slot in decode.done:
                        continue
                    i = members[slot]
                    tokens[i].append(token)
                    ended[i] = token in stop
                    if rows is not None:
                        told[i].append(rows[row])
                    if ended[i]:
                        continue
                    if on_token is not None:
                        on_token(token)
                    if finished is not None and finished(tokens[i]):
                        decode.done.add(slot)
                if not decode.advance(picked, stop):
                    break
    return [Completion(t, end, *map(list, zip(*r) if r else ([], []))) for t, end, r in zip(tokens, ended, told)]


def _told(
    logits: Tensor, chosen: Tensor, temperature: float, top_p: float, top_k: int
) -> list[tuple[float, float]]:  # fmt: skip
    """Log-probabilities of the chosen tokens: as they were drawn, and of the model itself."""
    raw = logprob_of(logits.float(), chosen)
    if temperature == 1 and top_p == 1 and not 0 < top_k < logits.shape[-1]:
        drawn_as = raw
    else:
        drawn_as = distribution(logits, temperature, top_p, top_k).gather(-1, chosen[:, None])[:, 0].log()
    return [tuple(pair) for pair in torch.stack([drawn_as, raw], 1).tolist()]  # type: ignore[misc]


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
        self.keyword = cache_keyword(model)
        # A mixer without attention takes a mask for one of the tokens at hand, of which all count after the prompts.
        self.attends = any(hasattr(layer, "keys") for layer in self.cache.layers)

    def logits(self) -> Tensor:
        """[B, V] after the last token of each row."""
        begun = self.mask.shape[1] > self.positions.shape[1]
        out = self.model.base_model(
            **self.given, attention_mask=self.mask if self.attends or not begun else None,
            position_ids=self.positions, use_cache=True, **{self.keyword: self.cache},
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
