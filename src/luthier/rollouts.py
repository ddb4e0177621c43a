"""Rollouts: answers of the network that is being trained, rewarded and scored, as documents and steps like any other.

A batch of rollouts ("round") is made when the first of its steps is asked for, from the weights as they are then. Each
rank answers its share of the prompts; everybody gets all answers, so that steps are the same on all ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .completions import fitting
from .data import stream
from .document import Document
from .errors import ConfigError
from .files import write_atomically
from .rewards import scoring
from .sampled import Sampled, from_arrays, grouped, to_arrays
from .sampling import Sampling, seed_of

if TYPE_CHECKING:
    from .assembled import Assembled
    from .config import Config
    from .data.dataset import Dataset

Say = Callable[[str], None]
Step = list[list[int]]
KEPT = 32  # answers of each round that are written down
BAD_ROUNDS = ("rounds_without_end", "rounds_of_equal_rewards", "rounds_passed_over")
LEFT_OUT = "passes_left_out"
CLOCKS = ("rollout_seconds", "rollout_tokens_per_second")  # no part of where a run stands


class Rollouts(Sequence[Step]):
    """What the loop asks of a data set and of its steps, and a part of every checkpoint.

    `documents` are those of the round at hand. A round has `num_mini_batches` steps for each of the passes over it.
    """

    def __init__(self, config: Config, prompts: Dataset, folder: Path | None, warn: Say):
        self.config, self.settings, self.warn = config, config.objective.sampling, warn
        self.prompts = fitting(config, prompts, warn)
        self.folder = folder  # where answers are written down, of the rank that does
        self.round_steps = self.settings.num_mini_batches * self.settings.passes
        rounds = None if config.max_steps is None else -(-config.max_steps // self.round_steps)
        self.rounds = self.prompts.plan(
            examples=asked_at_once(config), tokens=None, micro_tokens=config.batch.micro_tokens, pack=True,
            seed=config.data.seed, epochs=config.epochs, max_steps=rounds,
        )  # fmt: skip
        self.round: int | None = None  # that is at hand
        self.samples: list[Sampled] = []
        self.documents: list[Document] = []
        self.lengths: list[int] = []
        self.metrics: dict[str, float] = {}  # of the round
        self.pace: dict[str, float] = {}  # by the clock, which no checkpoint keeps
        self.left_out: int | None = None  # the pass of the round from which on nothing more is learnt
        self.counts = {"rollouts": 0, "rollout_tokens": 0, "tokens": 0, "drawn_again": 0, LEFT_OUT: 0}
        self.counts |= dict.fromkeys(BAD_ROUNDS, 0)
        self._laid: tuple[Any, Step] | None = None

    def bind(self, made: Assembled, rewards: Sequence[scoring.Built]) -> None:
        """Everything that answers need: the network, its objective, and what rewards them."""
        self.sampling, self.objective = Sampling(made, self.prompts, rewards), made.objective

    # ------------------------------------------------------------------ what the loop asks of any steps
    def __len__(self) -> int:
        last = len(self.rounds) - 1
        answers = self._asked(last) * self.settings.num_generations
        parts = min(self.settings.num_mini_batches, -(-answers // self._examples))
        total = last * self.round_steps + parts * self.settings.passes
        return total if self.config.max_steps is None else min(total, self.config.max_steps)

    @property
    def _examples(self) -> int:
        assert self.config.batch.examples is not None
        return self.config.batch.examples

    @property
    def caption(self) -> str:
        count, s = len(self.rounds), self.settings
        return (
            f"{len(self.prompts):,} prompts; {len(self):,} steps on {count:,} rounds of {asked_at_once(self.config):,} "
            f"prompts with {s.num_generations} answers each, {s.num_mini_batches * s.passes} steps a round"
        )

    def __getitem__(self, step: Any) -> Any:
        """Rows of documents; none of a step that is left out."""
        if not 0 <= step < len(self):
            raise IndexError(step)
        number, within = divmod(step, self.round_steps)
        if number != self.round:
            self._enter_whole(number)
        a_pass, part = divmod(within, self._parts(number))
        if self.left_out is not None and a_pass >= self.left_out:
            return []
        return self._rows(number, a_pass, part)

    def known(self, step: int) -> bool:
        """Whether its answers are there; those of a later round need weights that are not."""
        return step // self.round_steps == self.round

    def seen(self, step: int, metrics: Mapping[str, float]) -> None:
        """Told of each step that was taken: enough may have been learnt from this round."""
        self.counts["tokens"] += sum(self.lengths[d] for row in self[step] for d in row)
        enough = getattr(self.objective, "enough", None)
        if enough is not None and self.left_out is None and (why := enough(metrics)):
            number, within = divmod(step, self.round_steps)
            self.left_out = within // self._parts(number) + 1
            self._count_left_out(number, why)

    def _count_left_out(self, number: int, why: str) -> None:
        """The passes of this round that are not made, of those that the run has steps for."""
        begins = number * self.round_steps
        steps = min(len(self) - begins, self._parts(number) * self.settings.passes)
        passes = -(-steps // self._parts(number))
        assert self.left_out is not None
        if not (left := passes - self.left_out):
            return
        if not self.counts[LEFT_OUT]:
            self.warn(
                f"round {number + 1}, pass {self.left_out} of {passes}: {why}, so the passes after it are left out "
                f"(said once; {LEFT_OUT} counts them, of each round in the log, of all in the report)"
            )
        self.metrics[LEFT_OUT] = left
        self.counts[LEFT_OUT] += left

    def totals(self, steps: int | None = None) -> dict:
        return {"rows": len(self.prompts), **self.counts}

    def position(self, step: int) -> dict:
        return self.rounds.position(step)

    def resume(self, position: dict, step: int) -> str | None:
        return self.rounds.resume(position, step)

    def close(self) -> None:
        """Nothing is open."""

    # ------------------------------------------------------------------ a part of a checkpoint
    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in to_arrays(self.samples).items()}

    def numbers(self) -> dict:
        return {"round": self.round, "metrics": self.metrics, "left_out": self.left_out, "counts": self.counts}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping) -> None:
        self._take(from_arrays({name: tensor.numpy() for name, tensor in tensors.items()}))
        self.round, self.left_out = numbers["round"], numbers["left_out"]
        self.metrics, self.counts = dict(numbers["metrics"]), self.counts | numbers["counts"]

    # ------------------------------------------------------------------ where a step is
    def _asked(self, number: int) -> int:
        return self.rounds.rows[self.rounds.steps[number + 1]] - self.rounds.rows[self.rounds.steps[number]]

    def _parts(self, number: int) -> int:
        """Steps in a pass: fewer in the last round, where it has fewer answers."""
        answers = self._asked(number) * self.settings.num_generations
        return min(self.settings.num_mini_batches, -(-answers // self._examples))

    def _rows(self, number: int, a_pass: int, part: int) -> Step:
        """The documents of a step, in rows: every pass has an order of its own."""
        key = (number, a_pass, part)
        if self._laid is None or self._laid[0] != key:
            self._laid = (key, mini_batch(self.config, self.lengths, key, self._parts(number)))
        return self._laid[1]

    # ------------------------------------------------------------------ a round
    def _enter_whole(self, number: int) -> None:
        """A signal may come anywhere in it: then the objective knows what it knew, as the round is made again."""
        before = self.objective.numbers() if hasattr(self.objective, "restore") else {}
        try:
            self._enter(number)
        except BaseException:
            if before:
                self.objective.restore({}, before)
            raise

    def _enter(self, number: int) -> None:
        began = time.monotonic()
        rows = self.rounds[number]
        # In an order that is not that of packing: what is drawn for a prompt depends on its place.
        asked = sorted(document for row in rows for document in row)
        samples, again = self.sampling.round(number, asked)
        drawn = time.monotonic() - began
        answers = [one for one in samples if not one.given]
        self.sampling.score(samples)
        metrics = _told_of(answers, self.settings.num_generations > 1) if answers else {}
        metrics |= self.objective.credit(samples)
        tokens = sum(map(len, answers))
        self.pace = dict(zip(CLOCKS, (drawn, tokens / max(drawn, 1e-9))))
        if getattr(self.objective, "resamples", 0):
            metrics["drawn_again"] = again
        if hasattr(self.objective, "enough"):
            metrics[LEFT_OUT] = 0
        self._warn_of(answers)
        self._take(samples)
        self.round, self.left_out, self.metrics = number, None, metrics
        self.counts["rollouts"] += len(answers)
        self.counts["rollout_tokens"] += tokens
        self.counts["drawn_again"] += again
        self._write(number)

    def _take(self, samples: list[Sampled]) -> None:
        self.samples, self._laid = samples, None
        self.documents = [one.document() for one in samples if one.learnt]
        self.lengths = [document.inputs for document in self.documents]

    # ------------------------------------------------------------------ what is said of a round
    def _warn_of(self, samples: Sequence[Sampled]) -> None:
        if not samples:
            return
        s, groups = self.settings, grouped(samples)
        wrong = {
            "rounds_without_end": not any(one.ended for one in samples),
            "rounds_of_equal_rewards": s.num_generations > 1 and bool(self.sampling.rewards) and all(
                len({one.reward for one in group}) == 1 for group in groups
            ),
            "rounds_passed_over": not any(one.learnt for one in samples),
        }  # fmt: skip
        texts = {
            "rounds_without_end": f"no answer of a round of {len(samples)} came to its end within "
            f"{s.section}.max_completion_length={s.max_completion_length}: raise it, start from a model that ends its "
            "answers (method=lora on some right ones), or reward short ones (rewards: length)",
            "rounds_of_equal_rewards": f"in each of the {len(groups)} groups of a round all answers have equal "
            "rewards, so none is better: begin with easier prompts or a model that is right now and then, raise "
            "objective.num_generations or temperature, or give objective.rewards that tell answers apart",
            "rounds_passed_over": "no answer of a round is learnt from, so its steps are passed over; of "
            "objective.mask_truncated_completions the remedy is a larger objective.max_completion_length",
        }
        for name in BAD_ROUNDS:
            self.counts[name] += wrong[name]
            if wrong[name] and self.counts[name] == 1:
                self.warn(f"{texts[name]} (said once; the report counts such rounds)")

    def _write(self, number: int) -> None:
        """Some answers of the round, for people."""
        if self.folder is None:
            return
        self.folder.mkdir(exist_ok=True)
        lines = []
        for one in self.samples[:KEPT]:
            given = self.sampling.completed(one)
            record = {
                "row": one.row, "prompt": given.prompt, "answer": given.completion, "tokens": len(one),
                "ended": one.ended, "reward": one.reward, **({"rewards": dict(one.rewards)} if one.rewards else {}),
            }  # fmt: skip
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        write_atomically(self.folder / f"round-{number + 1:06}.jsonl", "".join(lines))


def mini_batch(config: Config, lengths: Sequence[int], key: tuple[int, int, int], parts: int) -> Step:
    """The answers of a step, in rows; `key` is its round, pass and place among so many `parts`."""
    number, a_pass, part = key
    order = np.random.default_rng([seed_of(config), number, a_pass]).permutation(len(lengths))
    # Answers to one prompt side by side, as the network runs what neighbours begin with once.
    mine = sorted(np.array_split(order, parts)[part].tolist())
    batch = config.batch
    steps = stream.laid_out(
        [mine], lengths, examples=max(1, len(mine)), tokens=None, micro_tokens=batch.micro_tokens, pack=batch.packing
    )
    return next(steps, [])


def asked_at_once(config: Config) -> int:
    """Prompts of a round."""
    s = config.objective.sampling
    assert config.batch.examples is not None
    answers = config.batch.examples * s.num_mini_batches
    if answers % s.num_generations:
        raise ConfigError(
            f"batch.examples={config.batch.examples} x objective.num_mini_batches={s.num_mini_batches} answers are no "
            f"whole number of groups of objective.num_generations={s.num_generations}"
        )
    return answers // s.num_generations


def _told_of(samples: Sequence[Sampled], groups: bool) -> dict[str, float]:
    """Of any round: rewards, lengths, and how many answers were cut."""
    rewards = np.array([one.reward for one in samples])
    told = {"completion_length": float(np.mean([len(one) for one in samples])),
            "truncated": float(np.mean([not one.ended for one in samples]))}  # fmt: skip
    if not samples[0].rewards:
        return told
    told |= {"reward": float(rewards.mean()), "reward_std": float(rewards.std())}
    told |= {f"reward.{name}": float(np.mean([one.rewards[name] for one in samples])) for name in samples[0].rewards}
    if groups:
        spread = [np.std([one.reward for one in group]) for group in grouped(samples)]
        told["frac_reward_zero_std"] = float(np.mean(np.array(spread) < 1e-12))
    return told
