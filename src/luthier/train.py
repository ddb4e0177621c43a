"""The loop: the ten steps of a fine-tune, in order, for every objective on every parameterisation."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from . import checkpoint, evaluate
from .assemble import Assembled, assemble, load_weights, restore, tokenizer_and_renderer
from .batch import Batch
from .config import Config, read_run
from .data import dataset as datasets
from .data import stream
from .errors import CheckpointError, ConfigError, Interrupted, NonFiniteError
from .explain import plan_line, table
from .export import export, keep_probe
from .files import write_atomically
from .generate import Chat
from .monitor import Console, Monitor, memory_gb, records
from .optim import schedule
from .optim.adamw import clip_scale
from .optim.stages import Stages, build
from .parallel.layers import compiled
from .signals import Signals, Stopped


@dataclass(frozen=True)
class Step:
    """One optimiser step that was taken: `step` counts from 1."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int


@dataclass(frozen=True)
class Result:
    """A finished run: where it is, and base against tuned."""

    folder: Path
    report: dict

    def chat(self) -> Chat:
        """The tuned model, ready to be asked."""
        made, _ = restore(self.folder)
        return Chat(made.network, made.renderer)

    def export(self, out: str | Path, kind: str = "adapter") -> dict:
        """Write the model where other tools read it: `adapter`, `merged` or `full`."""
        return export(self.folder, Path(out), kind)


def train(config: Config, console: Console | None = None) -> Result:
    """Run a configuration to its end, or go on where its folder stands."""
    return Trainer(config, console).run()


def steps(config: Config, console: Console | None = None) -> Iterator[Step]:
    """The same, one optimiser step at a time; the end of the iteration is the end of the run."""
    trainer = Trainer(config, console)
    with trainer.signals:
        yield from trainer.loop()


def open_run(folder: str | Path) -> Result:
    """A finished run, to be asked, evaluated or exported."""
    path = Path(folder) / "report.json"
    if not path.exists():
        raise CheckpointError(f"{folder} holds no finished run: it has no report.json; go on with `luthier train`")
    return Result(Path(folder), json.loads(path.read_text()))


class Trainer:
    """One run. Iterate over it for its steps one by one, or `run` it."""

    def __init__(self, config: Config, console: Console | None = None):
        self.config, self.console = config, console or Console()
        self.folder = Path(config.output_dir)
        self.signals = Signals()
        self.step = 0
        self.ahead: Batch | None = None  # the next one, made while the device works
        self.best: dict | None = None
        self.evaluated: int | None = None  # the step of the last evaluation
        self.unlogged: list[tuple[int, float]] = []  # tokens and seconds of the steps since the last record
        say, warn = self.console.say, self.console.warn

        # 1 data, before the weights: a bad row must not cost a model's loading
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_same_run()
        _, renderer = tokenizer_and_renderer(config)
        self.training, self.validation = datasets.open_rows(config.data, renderer, self.folder, say, warn)
        self.steps = stream.plan(
            self.training.lengths, examples=config.batch.examples, tokens=config.batch.tokens,
            micro_tokens=config.batch.micro_tokens, pack=config.batch.packing, seed=config.data.seed,
            epochs=config.epochs, max_steps=config.max_steps,
        )  # fmt: skip
        say(plan_line(self.training, self.steps, config.batch.micro_tokens))
        # 2 model initialisation, 3 layer freezing, 4 method
        self.made: Assembled = assemble(config, warn)
        self.ranks = self.made.ranks
        if self.ranks.first:
            self.console.show(table(self.made.network.model, self.made.begins))
        self._check_begins()
        # 5 to 7: the optimiser with its schedule, regularisation and clipping
        self.parameters = self.made.parameters()
        self.optimizer = build(config.optim, self.parameters, self.made.begins)
        self.parts: dict[str, checkpoint.Part] = {"optimizer": self.optimizer}  # what the next step depends on
        if self.ranks.first:
            write_atomically(self.folder / "config.yaml", config.dump())
            keep_probe(self.folder, (self.validation or self.training).documents)
        self._resume()
        # 8 evaluation and monitoring
        self.monitor = Monitor(self.folder, self.console, config.monitor.tensorboard and self.ranks.first, self.step)

    def _check_begins(self) -> None:
        late = max(self.made.begins.values(), default=0)
        if late >= len(self.steps):
            raise ConfigError(
                f"trainable.unfreeze: step={late} is never reached, as the run has {len(self.steps)} steps: use a "
                "smaller step, or more epochs"
            )

    # ------------------------------------------------------------------ the loop
    def run(self) -> Result:
        with self.signals:
            for _ in self.loop():
                pass
        return self.result()

    def loop(self) -> Iterator[Step]:
        """Both ends and the steps between; each is taken, checked, logged and saved where due before it is yielded."""
        try:
            if self._evaluation_due():  # at the start, or where a run was stopped while it evaluated
                self._evaluate(answer=not self.step or self.config.evaluation.generate_every)
            self.console.begin(len(self.steps), self.step)
            yield from self._steps()
            self._finish()
        finally:
            self.monitor.close()

    def _steps(self) -> Iterator[Step]:
        config = self.config
        while self.step < len(self.steps):
            taken = self._take()
            self._log(taken)
            last = self.step == len(self.steps)
            due = bool(config.checkpoint.every) and self.step % config.checkpoint.every == 0
            if self._evaluation_due():
                self._evaluate(answer=config.evaluation.generate_every)
                due = True
            stop = self.ranks.any(self.signals.caught is not None)
            if stop or (due and not last):
                self.save()
            if stop:
                raise self._interrupted()
            yield taken

    def _take(self) -> Step:
        """One optimiser step: rows forward and backward, one division, clipping, AdamW."""
        config, made = self.config, self.made
        began = time.monotonic()
        made.unfreeze(self.step)
        if isinstance(self.optimizer, Stages):
            self.optimizer.begin(self.step)
        rate = config.optim.learning_rate * schedule.factor(config.schedule, self.step, len(self.steps))
        total = torch.zeros((), device=self.ranks.device)
        count = torch.zeros((), device=self.ranks.device)
        self.rows = self.ranks.mine(self.steps[self.step])
        tokens = sum(self.training.lengths[d] for row in self.rows for d in row)
        for row, following in pairwise([*self.rows, self._first_row(self.step + 1)]):
            batch = made.objective.prepare(made.network, self.ahead or self._batch(row))
            loss = made.objective(made.network, batch)
            loss.total.backward()
            total += loss.total.detach()
            count += loss.count
            self.ahead = self._batch(following) if following else None  # while the device is still at work
        self.ranks.sum_gradients(list(self.parameters.values()))
        gradients = self.optimizer.gradients()
        sums = self.ranks.sum_(torch.stack([total, count, torch.tensor(float(tokens), device=self.ranks.device)]))
        norm = torch.nn.utils.get_total_norm(gradients) / sums[1]
        scale = clip_scale(norm, config.optim.max_grad_norm) / sums[1]
        self.optimizer.step(rate, scale)
        self.optimizer.zero_grad()
        loss_value, grad_norm, counted = (sums[0] / sums[1]).item(), norm.item(), int(sums[2].item())
        self.step += 1
        if not (abs(loss_value) < float("inf") and grad_norm < float("inf")):
            self._not_finite(loss_value, grad_norm)
        self.seconds = time.monotonic() - began
        return Step(self.step, loss_value, rate, grad_norm, counted)

    def _first_row(self, step: int) -> list[int]:
        """What this rank's next batch is made of; empty after the last."""
        rows = self.ranks.mine(self.steps[step]) if step < len(self.steps) else []
        return rows[0] if rows else []

    def _batch(self, row: list[int]) -> Batch:
        """A row on the device. Compiled graphs want few shapes: filled up with a document that teaches nothing."""
        batch = Batch.pack([self.training.documents[d] for d in row])
        if compiled(self.config.parallel, self.ranks.device) and self.made.network.packed:
            unit = self.config.batch.micro_tokens
            if self.config.batch.tokens is None:
                unit = max(1, unit // 8)
            batch = batch.padded_to(-(-len(batch) // unit) * unit)
        return batch.to(self.ranks.device)

    # ------------------------------------------------------------------ 8 evaluation, monitoring, checkpoints
    def _log(self, taken: Step) -> None:
        if not self.ranks.first:
            return
        self.unlogged.append((taken.tokens, self.seconds))
        if taken.step % self.config.monitor.log_every and taken.step != len(self.steps):
            return
        tokens, seconds = (sum(of_step) for of_step in zip(*self.unlogged))  # since the last record
        left = seconds / len(self.unlogged) * (len(self.steps) - taken.step)
        values = {
            "loss": taken.loss, "learning_rate": taken.learning_rate, "grad_norm": taken.grad_norm,
            "tokens": tokens, "tokens_per_second": tokens / seconds, "memory_gb": memory_gb(),
            "seconds": seconds, "seconds_left": left,
        }  # fmt: skip
        self.unlogged.clear()
        self.monitor.log("train", taken.step, values)

    def _evaluation_due(self) -> bool:
        """Before the first step and every n steps; the last one belongs to `_finish`."""
        every = self.config.evaluation.every
        wanted = self.step == 0 or bool(every and self.step % every == 0)
        return wanted and self.evaluated != self.step < len(self.steps)

    def _evaluate(self, answer: bool) -> None:
        """Held-out loss, and the answers where they are wanted; the random state of training is left alone."""
        if self.validation is None:
            return
        state = checkpoint.random_state()
        try:
            values = self._measure(answer)
        except Stopped:
            checkpoint.restore_random_state(*state)
            self.save()
            raise self._interrupted() from None
        checkpoint.restore_random_state(*state)
        self.evaluated = self.step
        text = f"held out at step {self.step}: loss {values['loss']:.4f}"
        text += f", token accuracy {values['token_accuracy']:.3f}"
        if "exact_match" in values:
            text += f", exact match {values['exact_match']:.3f} of {values['rows']}"
        self.console.say(text)
        if self.ranks.first:
            self.monitor.log("evaluation", self.step, values)
        if self.step and (self.best is None or values["loss"] < self.best["loss"]):
            self.best = {"name": self._name(), "loss": values["loss"], "step": self.step}

    def _measure(self, answer: bool) -> dict:
        assert self.validation is not None
        config = self.config.evaluation
        # Ranks wait for one another inside: there a signal is heard after the evaluation.
        with self.signals.breakable() if self.ranks.world == 1 else contextlib.nullcontext():
            values = evaluate.held_out(self.made, self.validation, self.config.batch.micro_tokens)
            if answer and config.generate:
                found = evaluate.answers(
                    self.made, self.validation, config.generate, config.max_new_tokens, config.batch_size
                )
                values |= evaluate.summary(found)
                if self.ranks.first:
                    path = evaluate.answers_file(self.folder, self.step)
                    path.parent.mkdir(exist_ok=True)
                    write_atomically(path, evaluate.to_json(found))
        return values

    def _name(self) -> str:
        return f"step-{self.step:08}"

    def save(self) -> Path:
        """A checkpoint of everything that the next step depends on."""
        config = self.config.checkpoint
        folder = self.folder / "checkpoints" / self._name()
        if self.ranks.first:
            tensors, generators = checkpoint.random_state()
            checkpoint.write_folder(
                folder,
                {"weights": self.parameters, "random": tensors} | {n: p.tensors() for n, p in self.parts.items()},
                {
                    "step": self.step, "random": generators, "best": self.best, "evaluated": self.evaluated,
                    "data": self._position(), "parts": {name: part.numbers() for name, part in self.parts.items()},
                },
            )  # fmt: skip
            best = self.best["name"] if self.best and config.best else None
            checkpoint.prune(folder.parent, config.keep, folder.parent / best if best else None)
        self.ranks.wait()
        return folder

    def _position(self) -> dict:
        """What must be the same for a step to be at the same place of the data."""
        return {"rows": self.training.fingerprint(), "plan": stream.digest(self.steps)}

    def _resume(self) -> None:
        found, refused = checkpoint.newest(self.folder / "checkpoints")
        for line in refused:
            self.console.warn(line)
        if found is None:
            return
        state = checkpoint.read_state(found)
        if state["data"] != self._position():
            what = "rows" if state["data"]["rows"] != self._position()["rows"] else "order of the rows"
            raise CheckpointError(
                f"the {what} that {found} was trained on are not those of this configuration: restore the data, or "
                "give another output_dir"
            )
        load_weights(self.made, found)
        for name, part in self.parts.items():
            part.restore(checkpoint.read_tensors(found, name), state["parts"][name])
        checkpoint.restore_random_state(checkpoint.read_tensors(found, "random"), state["random"])
        self.step, self.best, self.evaluated = state["step"], state["best"], state["evaluated"]
        self.console.say(f"resumed from {found}")

    def _check_same_run(self) -> None:
        """A folder holds one run: its settings may not change under its checkpoints."""
        path = self.folder / "config.yaml"
        if not path.exists() or not checkpoint.listed(self.folder / "checkpoints"):
            return
        free = {"output_dir", "evaluation", "checkpoint", "monitor", "parallel"}
        before, now = (c.model_dump(exclude=free) for c in (read_run(self.folder), self.config))
        changed = [
            f"{section}: {before[section]!r} there, {now[section]!r} here"
            for section in now
            if before[section] != now[section]
        ]
        if changed:
            raise ConfigError(
                f"output_dir={str(self.folder)!r} holds a run with other settings ({'; '.join(changed)}): give another "
                "output_dir, or the same settings to resume it"
            )

    # ------------------------------------------------------------------ ends
    def _finish(self) -> None:
        """The evaluation at the end, the last checkpoint, and the report of base against tuned."""
        self.console.end()
        path = self.folder / "report.json"
        if path.exists():
            self.console.say(f"{self.folder} is finished; its report stands in {path}")
            return
        if self.evaluated != self.step:
            self._evaluate(answer=True)
            self.save()
        if self.ranks.first:
            trained = sum(p.numel() for p in self.parameters.values())
            report: dict = {
                "steps": self.step, "rows": len(self.training), "trained_parameters": trained,
                "tokens": sum(self.training.lengths[d] for rows in self.steps for row in rows for d in row),
                "training_seconds": sum(r["seconds"] for r in records(self.folder / "metrics.jsonl") if "seconds" in r),
            }  # fmt: skip
            report |= evaluate.report(self.folder, self.step)
            write_atomically(path, json.dumps(report, indent=1))
        self.ranks.wait()

    def result(self) -> Result:
        return open_run(self.folder)

    def _not_finite(self, loss: float, norm: float) -> None:
        """Keep the rows that made it, and stop: what follows could only be wrong."""
        folder = self.folder / "nonfinite"
        folder.mkdir(exist_ok=True)
        path = folder / f"{self._name()}-rank{self.ranks.rank}.jsonl"
        rows = [self.training.documents[d] for row in self.rows for d in row]
        write_atomically(
            path,
            "".join(
                json.dumps({"row": d.row, "tokens": d.tokens.tolist(), "weights": d.weights.tolist()}) + "\n"
                for d in rows
            ),
        )
        last, _ = checkpoint.newest(self.folder / "checkpoints")
        where = f"the last whole checkpoint is {last}" if last else "there is no checkpoint yet"
        raise NonFiniteError(
            f"step {self.step}: loss {loss}, gradient norm {norm}. The batch is kept in {path} (rows "
            f"{', '.join(str(d.row) for d in rows[:10])}); {where}. Lower optim.learning_rate, or look at those rows."
        )

    def _interrupted(self) -> Interrupted:
        assert self.signals.caught is not None
        name = signal.Signals(self.signals.caught).name
        return Interrupted(
            f"stopped by {name} after step {self.step} of {len(self.steps)}; saved; the same command goes on.",
            self.signals.caught,
        )
