"""Rollouts: answers of the network that is being trained, rewarded and scored, as documents and steps like any other.

A batch of rollouts ("round") is made when the first of its steps is asked for, from the weights as they are then. Each
rank answers its share of the prompts; everybody gets all answers, so that steps are the same on all ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from . import surgery
from .batch import Batch
from .data import stream
from .document import Document
from .errors import ConfigError, DataError, LuthierError, RewardError
from .files import write_atomically
from .generate import complete
from .rewards import Completed, scoring
from .sampled import Sampled, from_arrays, grouped, to_arrays

if TYPE_CHECKING:
    from .assemble import Assembled
    from .config import Config
    from .data.dataset import Dataset

Say = Callable[[str], None]
Step = list[list[int]]
KEPT = 32  # answers of each round that are written down
BAD_ROUNDS = ("rounds_without_end", "rounds_of_equal_rewards", "rounds_passed_over")
LEFT_OUT = "passes_left_out"
CLOCKS = ("rollout_seconds", "rollout_tokens_per_second")  # no part of where a run stands
GIVEN = 1 << 20  # of the random numbers that say which rows keep their answers: no pass or attempt has this number


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
        self.made, self.rewards, self.objective = made, rewards, made.objective

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
        asked = [document for row in rows for document in row]
        samples = self._answers(number, 0, asked)
        samples, again = self._drawn_again(number, samples)
        drawn = time.monotonic() - began
        answers = [one for one in samples if not one.given]
        self._score(samples)
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
        kept = np.random.default_rng([_seed(self.config), number, GIVEN]).random(len(asked)) >= share
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
        prompts = [self._prompt(document) for document in asked for _ in range(each)]
        uniforms = [
            np.random.default_rng([_seed(self.config), *place, k]).random(s.max_completion_length, np.float32)
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

    def _prompt(self, document: int) -> list[int]:
        return prompt_of(self.config, self.prompts, document)

    def _reward(self, samples: Sequence[Sampled]) -> None:
        if not self.rewards or not samples:
            return
        found = scoring.total(self.rewards, [self._completed(one) for one in samples])
        for i, one in enumerate(samples):
            one.reward = found.totals[i]
            one.rewards = {name: column[i] for name, column in found.columns.items()}

    def _completed(self, one: Sampled) -> Completed:
        new = one.tokens[one.start :].tolist()
        return completed(self.made, self.prompts, one.prompt, new, one.ended)

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
        generator = np.random.default_rng([_seed(self.config), number, attempt])
        order = generator.permutation(len(self.prompts)).tolist()
        order = [i for i in order if i not in tried] or order
        return (order * (count // len(order) + 1))[:count]

    def _score(self, samples: list[Sampled]) -> None:
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

    # ------------------------------------------------------------------ what is said of a round
    def _warn_of(self, samples: Sequence[Sampled]) -> None:
        if not samples:
            return
        s, groups = self.settings, grouped(samples)
        wrong = {
            "rounds_without_end": not any(one.ended for one in samples),
            "rounds_of_equal_rewards": s.num_generations > 1 and bool(self.rewards) and all(
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
            given = self._completed(one)
            record = {
                "row": one.row, "prompt": given.prompt, "answer": given.completion, "tokens": len(one),
                "ended": one.ended, "reward": one.reward, **({"rewards": dict(one.rewards)} if one.rewards else {}),
            }  # fmt: skip
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        write_atomically(self.folder / f"round-{number + 1:06}.jsonl", "".join(lines))




def _seed(config: Config) -> int:
    return config.seed % (1 << 32)


def mini_batch(config: Config, lengths: Sequence[int], key: tuple[int, int, int], parts: int) -> Step:
    """The answers of a step, in rows; `key` is its round, pass and place among so many `parts`."""
    number, a_pass, part = key
    order = np.random.default_rng([_seed(config), number, a_pass]).permutation(len(lengths))
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


def prompt_of(config: Config, prompts: Dataset, document: int) -> list[int]:
    """The tokens that are to be answered: of a prompt all, of a conversation those before its last answer."""
    if config.objective.rows == "prompts":
        return prompts.documents[document].tokens.tolist()
    conversation = prompts.conversations[document]
    if conversation.plain:
        raise DataError(
            f"{config.objective.sampling.section} answers the prompts of rows, and plain text has none: give rows with "
            "prompts and answers"
        )
    return prompts.renderer.prompt(conversation)[0]


def completed(made: Assembled, prompts: Dataset, document: int, new: Sequence[int], ended: bool) -> Completed:
    """An answer as rewards see it."""
    conversation = prompts.conversations[document]
    messages = list(conversation.messages)
    if made.config.objective.rows != "prompts":
        messages = messages[: max(i for i, m in enumerate(messages) if m["role"] == "assistant")]
    users = [m["content"] for m in messages if m["role"] == "user"]
    text = made.tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True).strip()
    row = prompts.documents[document].row
    return Completed(users[-1] if users else "", messages, text, conversation.columns, len(new), not ended, row)


def fitting(config: Config, prompts: Dataset, warn: Say) -> Dataset:
    """The prompts that leave room for the longest answer; others are an error, or left out, as data.on_bad_row says."""
    s = config.objective.sampling
    room = config.data.max_length - s.max_completion_length
    lengths = [len(prompt_of(config, prompts, i)) for i in range(len(prompts))]
    long = [i for i, length in enumerate(lengths) if length > room]
    if not long:
        return prompts
    rows = ", ".join(str(prompts.documents[i].row) for i in long[:10]) + (", ..." if len(long) > 10 else "")
    text = (
        f"{len(long)} of {len(prompts)} prompts (rows {rows}; the first has {lengths[long[0]]} tokens) leave no room "
        f"for {s.section}.max_completion_length={s.max_completion_length} tokens in data.max_length="
        f"{config.data.max_length}: raise data.max_length, or lower {s.section}.max_completion_length"
    )
    if config.data.on_bad_row == "error" or len(long) == len(prompts):
        raise DataError(f"{text}. Or leave them out with data.on_bad_row=skip; nothing was trained.")
    warn(f"{text}. They are left out.")
    return prompts.subset([i for i, length in enumerate(lengths) if length <= room])


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
