"""Reward models ready to score answers: saved sequence classifiers of transformers, and runs of the method `reward`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .assemble import restore
from .batch import Batch, Document
from .config import read_run
from .data.conversations import BadRow, Conversation
from .data.masks import Renderer
from .errors import ModelError, RewardError
from .models import Model, heads, load, names, network, trials
from .parallel.ranks import Ranks
from .precision import AsLoaded
from .rewards import Completed, Reward, RewardModel

Tell = Callable[[str], None]


def loader(ranks: Ranks, tell: Tell = lambda text: None) -> Callable[[RewardModel], Reward]:
    """What makes rewards of the settings of reward models, on this rank's device."""

    def load_model(settings: RewardModel) -> Reward:
        judge = Judge(*opened(settings.model, ranks, tell), settings.called)
        return lambda completed: judge.scores(completed, settings.batch_size)

    return load_model


def opened(name: str, ranks: Ranks, tell: Tell) -> tuple[network.Network, Renderer]:
    """A reward model's network, which gives a score for each text, and what renders conversations for it."""
    folder = Path(name).expanduser()
    try:
        with _same_randomness():
            return _of_run(folder, ranks, tell) if (folder / "config.yaml").is_file() else _of_folder(name, ranks, tell)
    except ModelError as error:
        raise ModelError(f"objective.rewards: model={name!r}: {error}") from error


def _of_run(folder: Path, ranks: Ranks, tell: Tell) -> tuple[network.Network, Renderer]:
    objective = read_run(folder).objective
    if objective.kind != "reward":
        raise ModelError(f"it is a run of objective.kind={objective.kind}: give one of method=reward")
    made, _ = restore(folder, lambda text: None if text.startswith("a new head") else tell(text))  # it is filled next
    made.network.requires_grad_(False).to(ranks.device)
    return made.network, made.renderer


def _of_folder(name: str, ranks: Ranks, tell: Tell) -> tuple[network.Network, Renderer]:
    model = names.resolved(Model(name=name))
    if text := names.problem(model):
        raise ModelError(text)
    tokenizer = load.load_tokenizer(model)

    def refuse(text: str) -> None:
        raise ModelError(
            f"it is no sequence classifier with one score, and would get {text}: give the folder of a run of "
            "method=reward, what `luthier export` made of one, or a reward model of transformers"
        )

    ending = heads.Ending("text", ("reward",), "regression")
    dtype = AsLoaded().resolve(ranks.device)
    made = load.load_model(model, dtype, ranks.device, tell=tell, ending=ending, tell_head=refuse)
    heads.name_padding(made, tokenizer)
    made.eval()
    net = network.Network(made, "text")
    trials.find_scores(net)
    if reason := trials.prepare(net, "auto"):
        tell(f"the reward model {name} runs padded instead of packed: {reason}")
    net.requires_grad_(False).eval()
    return net, Renderer(tokenizer, "all", 1 << 30, kind="whole_pairs")


class Judge:
    """Scores whole conversations with a network that ends in one score."""

    def __init__(self, net: network.Network, renderer: Renderer, called: str = "reward_model"):
        self.network, self.renderer, self.called = net, renderer, called
        self.longest = getattr(net.config.get_text_config(), "max_position_embeddings", None)

    @torch.no_grad()
    def scores(self, completed: Sequence[Completed], batch_size: int = 16) -> list[float]:
        """[N] the score of each prompt with its answer; the same whatever it is batched with, up to rounding."""
        tokens = [self.tokens(one) for one in completed]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        out = [0.0] * len(tokens)
        for start in range(0, len(order), batch_size):
            members = order[start : start + batch_size]
            documents = [Document(tokens[i], np.zeros(len(tokens[i]), np.float32), completed[i].row) for i in members]
            batch = Batch.pack(documents).to(self.network.device)
            for i, score in zip(members, self.network.scores(batch)[:, 0].float().tolist()):
                out[i] = score
        return out

    def tokens(self, one: Completed) -> np.ndarray:
        """[L] the conversation as this model's own tokens, closed by the end of the turn unless it was cut."""
        try:
            text = self._text(one)
        except BadRow as fault:
            raise RewardError(f"reward {self.called!r}, row {one.row}: {fault.detail}") from fault
        found = self.renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.longest is not None and len(found) > self.longest:
            raise RewardError(
                f"reward {self.called!r}, row {one.row}: prompt and answer have {len(found)} tokens, more than the "
                f"{self.longest} positions of the reward model"
            )
        return np.asarray(found, np.int32)

    def _text(self, one: Completed) -> str:
        renderer, tokenizer = self.renderer, self.renderer.tokenizer
        end: Any = renderer.end_of_turn
        if not tokenizer.chat_template:
            begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
            asked = "".join(message["content"] for message in one.messages)
            start, stop = tokenizer.bos_token if begins else "", "" if one.truncated else end or ""
            return start + asked + one.completion + stop
        messages = [*one.messages, {"role": "assistant", "content": one.completion}]
        text = renderer.apply(Conversation(messages), messages)
        if end is None or end not in text:
            return text
        stop = text.rindex(end)
        return text[:stop] if one.truncated else text[: stop + len(end)]


@contextmanager
def _same_randomness() -> Iterator[None]:
    """Loading a network draws numbers; the run's own go on as if it had not."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
