"""The loop: the ten steps of a fine-tune, in order, for every objective on every parameterisation."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from . import ahead, checkpoint, evaluate, measured, preconditions, resolution, surgery
from .assemble import assemble, seed_everything, tokenizer_and_renderer
from .assembled import Assembled
from .batch import Batch
from .config import Config
from .data import cache
from .data import dataset as datasets
from .data.blocks import Stream
from .data.masks import Renderer
from .errors import CheckpointError, ConfigError, DataError, Interrupted, MetricError, NonFiniteError, RewardError
from .evaluations import Evaluations
from .explain import plan_line, table
from .export import keep_probe
from .files import write_atomically
from .journal import Journal
from .monitor import Console, records, trackers, warnings_of
from .monitor.nonfinite import Guard
from .monitor.profile import Profiler
from .optim.clipping import Clipper
from .optim.optimizer import Optimizer
from .optim.schedule import Scheduler
from .parallel.layers import compiled
from .parallel.ranks import Ranks
from .results import Result, Step, open_run
from .rollouts import Rollouts
from .scores import Scorer
from .shared import Shared
from .signals import Signals, Stopped

Functions = Mapping[str, Callable[..., Any]]


def train(
    config: Config, console: Console | None = None, metrics: Mapping[str, Scorer] | None = None,
    rewards: Functions | None = None,
) -> Result:  # fmt: skip
    """Run a configuration to its end, or go on where its folder stands.

    `metrics` are functions (reference, answer, prompt, row) -> number that score answers, too; a row is a mapping with
    its number `row` and the `messages` that were asked. Each becomes a figure under its name. `rewards` are functions
    (prompt, completion, **columns) -> number, for objectives that learn from rewards.
    """
    return Trainer(config, console, metrics, rewards).run()


def steps(config: Config, console: Console | None = None, rewards: Functions | None = None) -> Iterator[Step]:
    """The same, one optimiser step at a time; the end of the iteration is the end of the run."""
    trainer = Trainer(config, console, rewards=rewards)
    with trainer.signals:
        yield from trainer.loop()


class Trainer:
    """One run. Iterate over it for its steps one by one, or `run` it."""

    def __init__(
        self, config: Config, console: Console | None = None, metrics: Mapping[str, Scorer] | None = None,
        rewards: Functions | None = None, shared: Shared | None = None,
    ):  # fmt: skip
        self.console = console or Console()
        self.ranks = Ranks(config.parallel)
        if not self.ranks.first:
            self.console = Console(quiet=True)  # one speaks for all
        self.config = config = resolution.by_rows(config, self.console.say)
        self.folder = Path(config.output_dir)
        self.shared = shared
        self.signals = Signals()
        self.step = 0
        self.ahead: Batch | None = None  # the next one, made while the device works
        trackers.check(config.monitor.report_to)
        self.folder.mkdir(parents=True, exist_ok=True)
        preconditions.same_run(config, self.folder)
        opened = tokenizer_and_renderer(config, self.console.say, shared)
        self._read_rows(opened[1], metrics or {}, rewards or {})
        self._make_network(opened, rewards or {})
        self._make_optimizer()
        self._make_parts()
        if self.ranks.first:
            write_atomically(self.folder / "config.yaml", config.dump())
        self._resume()
        if self.ranks.first:
            if self.steps.known(self.step):
                self.steps[min(self.step, len(self.steps) - 1)]  # so that a stream has documents at hand
            keep_probe(self.folder, (self.validation or self.rows_read).documents)
            self.journal.open(self.step)
        self.profiler = Profiler(self.folder, config.monitor.profile_steps, self.ranks.first)

    # ------------------------------------------------------------------ 1 data
    def _read_rows(self, renderer: Renderer, metrics: Mapping[str, Scorer], rewards: Functions) -> None:
        """Before the weights: a bad row must not cost a model's loading."""
        config, say, warn = self.config, self.console.say, self.console.warn
        listing = self.folder if self.ranks.first else None  # the first rank lists skipped rows
        self.training: datasets.Dataset | Stream | Rollouts
        self.training, self.validation = self._open_rows(renderer, listing)
        self.rows_read = self.training  # before any that the network makes itself
        self._plan(rewards)
        self.measurement: evaluate.Measurement | None = None
        if self.validation is not None:
            self.measurement = evaluate.Measurement.of(config, self.validation, renderer, say, warn, metrics)
        elif metrics:
            raise ConfigError("metrics score answers to held-out prompts: give data.validation and evaluation.generate")
        if isinstance(self.training, datasets.Dataset):
            for line in config.objective.remarks(self.training):
                warn(line)
        say(plan_line(self.training, self.steps, config.batch.micro_tokens))
        if not checkpoint.listed(self.folder / "checkpoints") and self.steps.known(0):
            self.steps[0]  # of a stream the first rows, too, are read before the weights
        self.schedule = Scheduler(config.schedule, len(self.steps))
        preconditions.fused(config, self.steps, self.ranks)
        preconditions.profile(config, self.steps)

    def _open_rows(self, renderer: Renderer, listing: Path | None) -> Any:
        """Rows as tokens; those of an earlier run of this process where they would be the same."""
        data, say, warn = self.config.data, self.console.say, self.console.warn

        def read() -> Any:
            return datasets.open_rows(data, renderer, listing, say, warn)

        if self.shared is None or data.streaming:
            return read()
        return self.shared.kept("rows", cache.identity(data, renderer), read)

    def _plan(self, functions: Functions) -> None:
        """The steps of the run: of rows that are there, or of answers that are yet to be given."""
        config = self.config
        if config.objective.rolls_out:
            wanted = config.objective.rewarded
            if wanted is not None and not (wanted or functions):
                raise ConfigError(evaluate.NO_REWARD)
            folder = self.folder / "rollouts" if self.ranks.first else None
            assert isinstance(self.training, datasets.Dataset)
            self.training = self.steps = Rollouts(config, self.training, folder, self.console.warn)
            return
        assert not isinstance(self.training, Rollouts)
        self.steps = self.training.plan(
            examples=config.batch.examples, tokens=config.batch.tokens, micro_tokens=config.batch.micro_tokens,
            pack=config.batch.packing, seed=config.data.seed, epochs=config.epochs, max_steps=config.max_steps,
        )  # fmt: skip

    # ------------------------------------------------------------------ 2 model, 3 layer freezing, 4 method
    def _make_network(self, opened: tuple[Any, Renderer], rewards: Functions) -> None:
        self.made: Assembled = assemble(
            self.config, self.console.warn, opened=opened, ranks=self.ranks, shared=self.shared
        )
        if self.ranks.first:
            self.console.show(table(self.made.network.model, self.made.begins))
        preconditions.unfreezing(self.made.begins, self.steps)
        if isinstance(self.steps, Rollouts):
            self._reward_with(rewards)
        if self.config.objective.ahead:
            self._compute_ahead()

    def _reward_with(self, functions: Functions) -> None:
        """Score answers with the rewards of the configuration, and with the functions that it does not name."""
        assert isinstance(self.steps, Rollouts)
        if self.config.objective.rewarded is None:
            self.steps.bind(self.made, [])
            return
        built = evaluate.built_rewards(self.config, functions, self.ranks, self.console.warn)
        self.steps.bind(self.made, built)
        if self.measurement is not None:
            self.measurement = replace(self.measurement, rewards=built)

    def _compute_ahead(self) -> None:
        """What the objective makes of every row by the network as it is now, before anything has moved."""
        say, warn = self.console.say, self.console.warn
        assert isinstance(self.training, datasets.Dataset), "checked with the configuration"
        self.training = ahead.known(self.made, self.training, self.folder / "ahead" / "training", say, warn)
        if self.measurement is not None:
            rows = ahead.known(self.made, self.measurement.rows, self.folder / "ahead" / "held_out", say, warn)
            self.measurement = replace(self.measurement, rows=rows)
        self.made.teacher = None  # has said what it says

    # ------------------------------------------------------------------ 5 schedule, 6 regularisation, 7 clipping
    def _make_optimizer(self) -> None:
        config = self.config
        self.parameters = self.made.parameters()
        self.ranks.agree(list(self.parameters.values()))
        if self.ranks.rank:  # what moves is drawn alike, what is dropped is not
            seed_everything(hash((config.seed, self.ranks.rank)))
        roles = surgery.roles(self.made.network.model)
        roles |= {name: "head" for name in self.parameters if name.startswith("objective.")}
        self.clipper = Clipper(config.clipping, roles)
        self.optimizer = Optimizer(self.parameters, config.optim, roles=roles, clip=self.clipper.each, seed=config.seed)
        for line in self.optimizer.describe():
            self.console.say(line)
        self.average = config.averaging.build(self.optimizer.weights(), len(self.steps))

    # ------------------------------------------------------------------ 8 evaluation, monitoring, checkpoints
    def _make_parts(self) -> None:
        """What the next step depends on, beside the weights."""
        config, stopping = self.config, self.config.early_stopping
        self.guard = Guard(self.folder, self.ranks, config.monitor.on_nonfinite, config.monitor.max_skips)
        self.journal = Journal(config, self.folder, self.console, self.clipper, self.guard)
        patience = stopping.build(config.evaluation.better) if stopping else None
        self.evaluations = Evaluations(self.made, self.measurement, self.folder, patience, self._breakable)
        parts = {
            "optimizer": self.optimizer, "schedule": self.schedule, "clipping": self.clipper,
            "averaging": self.average, "early_stopping": patience, "nonfinite": self.guard,
            "alarms": self.journal.watch, "records": self.journal, "adapters": self.made.sources,
            "rollouts": self.steps if isinstance(self.steps, Rollouts) else None,
            "objective": self.made.objective if hasattr(self.made.objective, "restore") else None,
        }  # fmt: skip
        self.parts: dict[str, checkpoint.Part] = {n: part for n, part in parts.items() if part is not None}

    # ------------------------------------------------------------------ the loop
    def run(self) -> Result:
        with self.signals:
            for _ in self.loop():
                pass
        return self.result()

    def loop(self) -> Iterator[Step]:
        """Both ends and the steps between; each is taken, checked, logged and saved where due before it is yielded."""
        try:
            if self.evaluations.due(self.step, len(self.steps)):  # at the start, or where a run was stopped in it
                self._evaluate(answer=not self.step or self.config.evaluation.generate_every)
            self.console.begin(len(self.steps), self.step)
            yield from self._steps()
            self._finish()
        finally:
            self.profiler.end()
            self.journal.close()
            self.steps.close()

    def _steps(self) -> Iterator[Step]:
        config = self.config
        while not self._ended():
            began = time.monotonic()
            try:
                with self._breakable() if isinstance(self.steps, Rollouts) else contextlib.nullcontext():
                    rows = self.steps[self.step]  # its rows are there
            except Stopped:
                self.save()
                raise self._interrupted() from None
            except (DataError, RewardError):  # of a stream, or a round of answers: what was learnt is not lost
                self.save()
                raise
            self.waited = time.monotonic() - began
            taken = None
            if rows:
                with self.profiler.step(self.step + 1):
                    taken = self._take()
                self.journal.step(taken, self.steps, self.seconds, self.waited)
            else:  # of a round of answers that enough was learnt from
                self.step += 1
                self.ahead = None  # was made before that was known
            last = self.step == len(self.steps)
            due = bool(config.checkpoint.every) and self.step % config.checkpoint.every == 0
            if self.evaluations.due(self.step, len(self.steps)):
                self._evaluate(answer=config.evaluation.generate_every)
                due = True
            stop = self.ranks.any(self.signals.caught is not None)
            if stop or (due and not last):
                self.save()
            if stop:
                raise self._interrupted()
            if taken is not None:
                yield taken

    def _ended(self) -> bool:
        return self.step == len(self.steps) or self.evaluations.exhausted

    def _take(self) -> Step:
        """One optimiser step: rows forward and backward, one division, clipping, the optimiser."""
        made, fused = self.made, self.config.optim.fused_backward
        began = time.monotonic()
        made.unfreeze(self.step)
        factor = self.schedule.factor(self.step)
        total, count, *metrics = torch.zeros(2 + len(made.objective.metrics), device=self.ranks.device)
        self.rows = self.ranks.mine(self.steps[self.step])
        self.guard.begin()
        if survey := getattr(made.objective, "survey", None):
            survey(made.network, map(self._batch, self.rows), self.ranks.sum_)
        tokens = sum(self.training.lengths[d] for row in self.rows for d in row)
        for row, following in pairwise([*self.rows, self._first_row(self.step + 1)]):
            batch = made.objective.prepare(made.network, self.ahead or self._batch(row))
            loss = made.objective(made.network, batch)
            if fused:  # one row, whose count is the step's
                self.optimizer.arm(factor, self.clipper.scale(loss.count) / loss.count)
            loss.total.backward()
            total += loss.total.detach()
            count += loss.count
            for metric, name in zip(metrics, made.objective.metrics):
                metric += loss.metrics[name]
            self.ahead = self._batch(following) if following else None  # while the device is still at work
        self.ranks.sum_gradients(list(self.parameters.values()))
        ran = torch.tensor(float(tokens), device=self.ranks.device)
        sums = self.ranks.sum_(torch.stack([total, count, ran, *metrics]))
        norm = self.optimizer.norm() / sums[1]
        # The step's one wait for the device: before the update, which then runs while the next forward is launched.
        told = torch.stack([sums[0] / sums[1], norm, sums[2], *(sums[3:] / sums[1])])
        loss_value, grad_norm, counted, *values = told.tolist()
        self.step += 1
        fine = self._finite(loss_value, grad_norm)
        clipped = False
        if fine:
            self.journal.histograms(self.step, self.parameters, 1 / sums[1])
            if not fused:
                self.optimizer.step(factor, self.clipper.scale(norm) / sums[1])
            clipped = self.clipper.record(grad_norm)
            if self.average:
                self.average.update(self.step, self.optimizer.weights())
        self.optimizer.zero_grad()
        self.seconds = time.monotonic() - began
        rate = self.config.optim.learning_rate * factor
        found = dict(zip(made.objective.metrics, values))
        if shown := getattr(made.objective, "shown", None):
            found = shown(found)
        if isinstance(self.steps, Rollouts):
            self.steps.seen(self.step - 1, found)
            found = {**self.steps.metrics, **found}
        return Step(self.step, loss_value, rate, grad_norm, int(counted), clipped, not fine, found)

    def _first_row(self, step: int) -> list[int]:
        """What this rank's next batch is made of; empty after the last, and where a stream's rows are bad."""
        with contextlib.suppress(DataError):  # told when that step is due
            known = step < len(self.steps) and self.steps.known(step)
            rows = self.ranks.mine(self.steps[step]) if known else []
            return rows[0] if rows else []
        return []

    def _batch(self, row: list[int]) -> Batch:
        """A row on the device. Compiled graphs want few shapes: filled up with a document that teaches nothing."""
        batch = Batch.pack([self.training.documents[d] for d in row])
        if compiled(self.config.parallel, self.ranks.device) and self.made.network.packed:
            unit = self.config.batch.micro_tokens
            if self.config.batch.tokens is None:
                unit = max(1, unit // 8)
            batch = batch.padded_to(-(-len(batch) // unit) * unit)
        return batch.to(self.ranks.device)

    # ------------------------------------------------------------------ evaluation and checkpoints
    def _evaluate(self, answer: bool) -> None:
        """Held-out loss, and the answers where they are wanted; the random state of training is left alone."""
        if self.validation is None:
            return
        state = checkpoint.random_state()
        try:
            values = self.evaluations.measure(answer, self._deployed(), self.step)
        except Stopped:
            checkpoint.restore_random_state(state)
            self.save()
            raise self._interrupted() from None
        except (MetricError, RewardError):  # a user's function; what was trained must not be lost for it
            checkpoint.restore_random_state(state)
            self.save()
            raise
        checkpoint.restore_random_state(state)
        self.evaluations.last, self.evaluations.figures = self.step, values
        if self.schedule.observe(values):
            self.console.say(f"the rate falls to {self.schedule.ratio:.3g} of its schedule")
        self.console.say(f"held out at step {self.step}: {measured.line(values)}")
        self.journal.evaluation(self.step, values)
        if line := self.evaluations.judge(values, self.step):
            self.console.say(line)

    def _deployed(self) -> dict[str, torch.Tensor] | None:
        """What is evaluated and exported, where that is something else than the weights of the step."""
        return self.average.weights() if self.average else self.optimizer.averaged() or None

    def _breakable(self) -> contextlib.AbstractContextManager:
        """Ends the work inside when a signal comes. Ranks wait for one another inside: there it is heard afterwards."""
        return self.signals.breakable() if self.ranks.world == 1 else contextlib.nullcontext()

    def save(self) -> Path:
        """A checkpoint of everything that the next step depends on."""
        config, best = self.config.checkpoint, self.evaluations.best
        folder = self.folder / "checkpoints" / checkpoint.name_of(self.step)
        deployed = self._deployed()
        group = "weights" if deployed is None else "averaging" if self.average else "deployed"
        random = {f"rank{n}": state for n, state in enumerate(self.ranks.gather(checkpoint.random_state()))}
        if self.ranks.first:
            checkpoint.write_folder(
                folder,
                {"weights": self.parameters, "random": random, "constants": self.made.constants()}
                | {name: part.tensors() for name, part in self.parts.items()}
                | ({"deployed": deployed} if deployed and group == "deployed" else {}),
                {
                    "step": self.step, "best": best, "evaluated": self.evaluations.last,
                    "data": self.steps.position(self.step),
                    "parts": {name: part.numbers() for name, part in self.parts.items()},
                    "deployed": group,
                },
            )  # fmt: skip
            kept = folder.parent / best["name"] if best and config.best else None
            checkpoint.prune(folder.parent, config.keep, kept)
        self.ranks.wait()
        return folder

    def _resume(self) -> None:
        found, refused = checkpoint.newest(self.folder / "checkpoints")
        for line in refused:
            self.console.warn(line)
        if found is None:
            return
        state = checkpoint.read_state(found)
        if what := self.steps.resume(state["data"], state["step"]):
            raise CheckpointError(
                f"the {what} that {found} was trained on are not those of this configuration: restore the data, or "
                "give another output_dir"
            )
        self.made.load_weights(found)
        for name, part in self.parts.items():
            part.restore(checkpoint.read_tensors(found, name), state["parts"].get(name, {}))
        random = checkpoint.read_tensors(found, "random")
        if len(random) == self.ranks.world:
            checkpoint.restore_random_state(random[f"rank{self.ranks.rank}"])
        else:
            self.console.warn(
                f"{found} was written by {len(random)} processes, and this run has {self.ranks.world}: the rows go on "
                "where they were; dropout and noise are drawn anew"
            )
            seed_everything(hash((self.config.seed, state["step"], self.ranks.rank)))
        self.step, self.evaluations.best, self.evaluations.last = state["step"], state["best"], state["evaluated"]
        self.console.say(f"resumed from {found}")

    # ------------------------------------------------------------------ ends
    def _finish(self) -> None:
        """The evaluation at the end, the last checkpoint, and the report of base against tuned."""
        self.console.end()
        path = self.folder / "report.json"
        if path.exists():
            self.console.say(f"{self.folder} is finished; its report stands in {path}")
            return
        if self.evaluations.last != self.step:
            self._evaluate(answer=True)
            self.save()
        final = self._restore_best()
        if self.ranks.first:
            trained = sum(p.numel() for p in self.parameters.values())
            history = records(self.folder / "metrics.jsonl")
            report: dict = {
                "steps": self.step, "best_step": final, "trained_parameters": trained, **self.steps.totals(self.step),
                "training_seconds": sum(r["seconds"] for r in history if "seconds" in r),
            }  # fmt: skip
            report |= self.clipper.figures()
            report |= measured.report(self.folder, final, evaluate.metrics_of(self.config))
            report |= warnings_of(history)
            self.journal.finish(report)
            write_atomically(path, json.dumps(report, indent=1))
        self.ranks.wait()

    def _restore_best(self) -> int:
        """The step whose weights are the run's result: they are in the network now, and have answered."""
        best = self.evaluations.best
        if not (self.config.checkpoint.best and best) or best["step"] == self.step:
            return self.step
        folder = self.folder / "checkpoints" / best["name"]
        self.made.load_weights(folder, checkpoint.read_state(folder)["deployed"])
        if self.config.evaluation.generate and not measured.answers_file(self.folder, best["step"]).exists():
            try:
                self.evaluations.measure(True, None, best["step"])
            except Stopped:
                raise self._interrupted() from None
        self.console.say(f"the best weights, of step {best['step']}, are restored")
        return best["step"]

    def result(self) -> Result:
        return open_run(self.folder)

    def _finite(self, loss: float, norm: float) -> bool:
        """Whether the step may be applied; where it may not, its rows are made again to find the origin."""
        if self.guard.fine(loss, norm):
            return True
        documents = [self.training.documents[d] for row in self.rows for d in row]
        passes = (partial(self._loss, row) for row in self.rows)
        where = self.guard.explain(self.step, loss, norm, self.made, self.parameters, documents, passes)
        if self.guard.skips():
            self.console.warn(f"{where} The step is skipped ({self.guard.total} so far).")
            return False
        last, _ = checkpoint.newest(self.folder / "checkpoints")
        kept = f"the last whole checkpoint is {last}" if last else "there is no checkpoint yet"
        raise NonFiniteError(f"{where} {self.guard.remedy()} No weight was changed by this step; {kept}.")

    def _loss(self, row: list[int]) -> torch.Tensor:
        batch = self.made.objective.prepare(self.made.network, self._batch(row))
        return self.made.objective(self.made.network, batch).total

    def _interrupted(self) -> Interrupted:
        assert self.signals.caught is not None
        name = signal.Signals(self.signals.caught).name
        return Interrupted(
            f"stopped by {name} after step {self.step} of {len(self.steps)}; saved; the same command goes on.",
            self.signals.caught,
        )
