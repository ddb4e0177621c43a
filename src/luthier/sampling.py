"""A round of answers: drawn by every rank, rewarded, drawn again where they teach nothing, scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from . import surgery
from .batch import Batch
from .completions import completed, prompt_of
from .data import stream
from .errors import LuthierError, RewardError
from .generate import complete
from .rewards import Completed, scoring
from .sampled import Sampled, from_arrays, grouped, to_arrays

if TYPE_CHECKING:
    from .assembled import Assembled
    from .config import Config
    from .data.dataset import Dataset

GIVEN = 1 << 20  # of the random numbers that say which rows keep their answers: no pass or attempt has this number


class Sampling:
    """Answers of the network as it is, to some of the prompts; everybody gets all of them."""

    def __init__(self, made: Assembled, prompts: Dataset, rewards: Sequence[scoring.Built]):
        self.made, self.prompts, self.rewards = made, prompts, rewards
        self.config, self.objective = made.config, made.objective
        self.settings, self.seed = made.config.objective.sampling, seed_of(made.config)

    def round(self, number: int, asked: Sequence[int]) -> tuple[list[Sampled], int]:
        """Rewarded answers to these prompts, and how many groups were drawn again, of other prompts."""
        return self._drawn_again(number, self._answers(number, 0, asked))

    def completed(self, one: Sampled) -> Completed:
        new = one.tokens[one.start :].tolist()
        return completed(self.made, self.prompts, one.prompt, new, one.ended)

    def _answers(self, number: int, attempt: int, asked: Sequence[int]) -> list[Sampled]:
        """Rewarded answers to these prompts, groups in their order, on every rank."""
        error, mine = None, []
        own = self._given(number, asked)
        places = self.made.ranks.mine([at for at in range(len(asked)) if at not in own])
        try:
            mine = self._sampled([(number, attempt, at) for at in places], [asked[at] for at in places])
            self._reward(mine)
        except LuthierError as caught:
            error = caught
        if self.made.ranks.any(error is not None):
            raise error or RewardError("a reward failed on another rank, which says how")
        found = [one for part in self._gathered(to_arrays(mine)) for one in from_arrays(part)]
        return sorted([*found, *own.values()], key=lambda one: one.group)  # stable: answers stay in their order

    def _given(self, number: int, asked: Sequence[int]) -> dict[int, Sampled]:
        """The last answers of rows that the network is not to answer, by their places among what is asked."""
        share, out = getattr(self.objective, "share", 1.0), {}
        kept = np.random.default_rng([self.seed, number, GIVEN]).random(len(asked)) >= share
        for at in np.flatnonzero(kept).tolist():
            document = self.prompts.documents[asked[at]]
            learnt = np.flatnonzero(document.weights)
            before = np.flatnonzero(document.weights[: learnt[-1]] == 0)
            start, stop = int(before[-1]) + 1, int(learnt[-1]) + 1
            none = np.zeros(stop - start, np.float32)
            tokens = np.asarray(document.tokens[:stop], np.int32)
            out[at] = Sampled(asked[at], document.row, at, tokens, start, True, none, none, given=True)
        return out

    def _sampled(self, places: Sequence[tuple[int, int, int]], asked: Sequence[int]) -> list[Sampled]:
        """Answers by this rank. What is drawn depends on its place alone, not on who shares a batch or a rank."""
        s, renderer, each = self.settings, self.made.renderer, self.settings.num_generations
        prompts = [prompt_of(self.config, self.prompts, document) for document in asked for _ in range(each)]
        uniforms = [
            np.random.default_rng([self.seed, *place, k]).random(s.max_completion_length, np.float32)
            for place in places
            for k in range(each)
        ]
        if not prompts:
            return []
        with surgery.merged(self.made.network.model) if s.rollout_merged else nullcontext():
            answers = complete(
                self.made.network, prompts, renderer.stop_tokens(), s.max_completion_length,
                batch_size=s.decode_batch_size, temperature=s.temperature, top_p=s.top_p, top_k=s.top_k,
                uniforms=torch.from_numpy(np.stack(uniforms)), logprobs=True,
            )  # fmt: skip
        out = []
        for i, (prompt, answer) in enumerate(zip(prompts, answers)):
            document = asked[i // each]
            out.append(
                Sampled(
                    document, self.prompts.documents[document].row, places[i // each][2],
                    np.array([*prompt, *answer.tokens], np.int32), len(prompt), answer.ended,
                    np.array(answer.logprobs, np.float32), np.array(answer.raw_logprobs, np.float32),
                )
            )  # fmt: skip
        return out

    def _reward(self, samples: Sequence[Sampled]) -> None:
        if not self.rewards or not samples:
            return
        found = scoring.total(self.rewards, [self.completed(one) for one in samples])
        for i, one in enumerate(samples):
            one.reward = found.totals[i]
            one.rewards = {name: column[i] for name, column in found.columns.items()}

    def _drawn_again(self, number: int, samples: list[Sampled]) -> tuple[list[Sampled], int]:
        """Groups that teach nothing are replaced by such of other prompts, where the objective wants that."""
        again, tried = 0, {one.prompt for one in samples}
        for attempt in range(1, getattr(self.objective, "resamples", 0) + 1):
            groups = grouped(samples)
            idle = [at for at, group in enumerate(groups) if self.objective.idle(group)]
            if not idle:
                break
            asked = self._others(number, attempt, len(idle), tried)
            tried |= set(asked)
            fresh = grouped(self._answers(number, attempt, asked))
            for at, group in zip(idle, fresh):
                again += 1
                if not self.objective.idle(group):
                    groups[at] = group
            for at, group in enumerate(groups):
                for one in group:
                    one.group = at
            samples = [one for group in groups for one in group]
        return samples, again

    def _others(self, number: int, attempt: int, count: int, tried: set[int]) -> list[int]:
        """So many prompts, drawn from all; as long as there are others, none that was asked in this round."""
        generator = np.random.default_rng([self.seed, number, attempt])
        order = generator.permutation(len(self.prompts)).tolist()
        order = [i for i in order if i not in tried] or order
        return (order * (count // len(order) + 1))[:count]

    def score(self, samples: list[Sampled]) -> None:
        """What the objective says of the answers' tokens, by the training forward; each rank of its share."""
        made, mine = self.made, self.made.ranks.mine(range(len(samples)))
        documents = [one.document() for one in samples]
        lengths = [document.inputs for document in documents]
        batch = self.config.batch
        rows = stream.laid_out(
            [mine], lengths, examples=max(1, len(mine)), tokens=None, micro_tokens=batch.micro_tokens,
            pack=batch.packing,
        )  # fmt: skip
        found: dict[int, dict[str, np.ndarray]] = {}
        training = made.network.training
        made.network.eval()
        try:
            with torch.no_grad():
                for row in next(rows, []):
                    packed = Batch.pack([documents[i] for i in row]).to(made.ranks.device)
                    fields = self.objective.score(made.network, packed)
                    ends = np.cumsum([0, *(len(samples[i]) for i in row)])
                    values = {name: tensor.float().cpu().numpy() for name, tensor in fields.items()}
                    for at, i in enumerate(row):
                        found[i] = {name: v[ends[at] : ends[at + 1]].copy() for name, v in values.items()}
        finally:
            made.network.train(training)
        for i, one in enumerate(samples):
            if i in found:
                one.fields = found[i]
        if made.ranks.world > 1:
            scored = [samples[i] for i in mine]
            parts = [from_arrays(part) for part in self._gathered(to_arrays(scored))]
            for rank, part in enumerate(parts):
                for one, theirs in zip(samples[rank :: made.ranks.world], part):
                    one.fields = theirs.fields

    def _gathered(self, arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        """The arrays of every rank, on all of them."""
        if self.made.ranks.world == 1:
            return [dict(arrays)]
        packed = to_bytes({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()})
        parts = self.made.ranks.gather(torch.frombuffer(bytearray(packed), dtype=torch.uint8))
        return [{name: t.numpy() for name, t in from_bytes(bytes(part.numpy())).items()} for part in parts]


def seed_of(config: Config) -> int:
    return config.seed % (1 << 32)
