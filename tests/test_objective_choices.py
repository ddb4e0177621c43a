"""Every choice of every objective learns the same however its rows are cut, packed and shared among processes.

The choices are read from the settings of the objectives: each value of a literal, each switch turned, each number in
another place, each part that may be left out put in. A new objective or choice is tried without a line here; one that
goes only with others is tried with the first of the objective's choices that it goes with.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import pytest
import torch
from conftest import make_model
from test_distillation import other_tokenizer, teacher  # noqa: F401
from test_matrix import base, kind, members  # noqa: F401
from test_objective_matrix import FORKS, configuration, rows_of
from test_ranks import forked
from test_train import QUIET, finished

from luthier import checkpoint, configure, train
from luthier.config import Config
from luthier.errors import ConfigError
from luthier.monitor import records
from luthier.objectives import Objective
from luthier.rollouts import CLOCKS
from luthier.settings import Settings
from luthier.shared import Shared
from luthier.train import Trainer

OBJECTIVES = members(Objective)
STEPS = 3
HERE = {"kind", "teacher", "rewards", "labels", "trust_remote_code", "revision", "trainable", "precision", "dtype"}
"""Fields that are no choices of how rows are learnt, or other axes."""
EDGES = {"epsilon"}  # where 0 leaves it to rounding what is clipped
ALWAYS = {  # of the first pass all ratios are 1; some answers are to come to their end
    "grpo": {"num_iterations": 2, "max_completion_length": 12}, "ppo": {"max_completion_length": 12},
}  # fmt: skip
SHORT = {"max_completion_length": 8}  # where parts of an objective have it
ROWS: dict[str, Callable[[int], Any]] = {
    "multi_label_classification": lambda i: list("xyz"[i % 4 :]),
    "regression": lambda i: i / 7,
}
TOGETHER: dict[str, list[dict[str, Any]]] = {
    "classification": [{"problem_type": "multi_label_classification", "class_weights": "balanced"}],
    "token_classification": [{"class_weights": "balanced", "label_smoothing_factor": 0.2}],
    "distillation": [{"top_k": 3, "divergence": "jsd"}, {"on_policy": SHORT, "divergence": "reverse_kl"}],
    "grpo": [
        {"loss_type": "dapo", "epsilon_high": 0.28, "max_resamples": 2, "mask_truncated_completions": True},
        {"importance_sampling_level": "sequence", "epsilon": 3e-4, "top_k": 20},
    ],
}  # fmt: skip


def choices(settings: Any, model: str) -> Iterator[dict[str, Any]]:
    """What may be set in these settings, one field at a time."""
    for name, field in settings.model_fields.items():
        if name not in HERE:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            for value in values(field.annotation, default, model, name in EDGES):
                yield {name: value}


def values(annotation: Any, default: Any, model: str, edge: bool = False) -> Iterator[Any]:
    """Other values of a field with such a type; of a number several, as not all may be allowed."""
    parts = _parts(annotation)
    for part in parts:
        if get_origin(part) is Literal:
            yield from (value for value in get_args(part) if value != default)
        elif part is bool:
            yield from (value for value in (True, False) if value is not default)
        elif part in (int, float):
            near = (2, 3) if part is int else (0.3, 1.5)
            yield Numbers((part(0), *near) if default and not edge else near)
        elif isinstance(part, type) and issubclass(part, Settings):
            own = {n: model for n, f in part.model_fields.items() if f.is_required()}
            own |= {"kind": kind(part)} if "kind" in part.model_fields else {}
            own |= {n: value for n, value in SHORT.items() if n in part.model_fields}
            yield own
            yield from (own | choice for choice in choices(part, model))


class Numbers(tuple):
    """Of which the first that is allowed is taken."""


def _parts(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [part for each in get_args(annotation) for part in _parts(each)]
    return [annotation] if annotation is not NoneType else []


# ---------------------------------------------------------------------------- runs


class Networks(NamedTuple):
    base: Path
    teacher: Path
    foreign: Path  # a teacher with another vocabulary


@pytest.fixture(scope="session")
def networks(base, teacher, tmp_path_factory):  # noqa: F811
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("networks")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 20  # ends its answers now and then
    model.config.classifier_dropout = 0.0  # what is dropped in front of a head of tokens is drawn for each place
    for made in (model, tokenizer):
        made.save_pretrained(folder / "base")
    make_model().save_pretrained(folder / "foreign")
    other_tokenizer(folder / "foreign", ["say and good bad user assistant"] * 9)
    return Networks(folder / "base", teacher, folder / "foreign")


def runs(objective: Any, networks: Networks, folder: Path, wanted: Iterable[dict]) -> dict[str, Config]:
    """A configuration for each of these choices of an objective, by what is chosen, in a folder of its own."""
    every = [*choices(objective, str(networks.base))]
    return {
        str(choice): _first_allowed(objective, networks, folder / str(i), choice, every)
        for i, choice in enumerate(wanted)
    }


def _first_allowed(objective: Any, networks: Networks, folder: Path, choice: dict, others: Iterable[dict]) -> Config:
    """Alone, or with another choice; with the first of its numbers that may be."""
    for other in ({}, *others):
        for number in range(3):
            chosen = ALWAYS.get(kind(objective), {}) | _numbered(other | choice, number)
            try:
                return configured(objective, networks, folder, chosen)
            except ConfigError as error:
                if "objective" not in str(error):
                    raise
    raise AssertionError(f"{kind(objective)}: {choice} goes with no other choice")


def _numbered(choice: Any, number: int) -> Any:
    if isinstance(choice, dict):
        return {name: _numbered(value, number) for name, value in choice.items()}
    return choice[min(number, len(choice) - 1)] if isinstance(choice, Numbers) else choice


def configured(objective: Any, networks: Networks, folder: Path, chosen: dict) -> Config:
    """Of rows that differ in length, in steps of plain gradients, which make no small difference large."""
    folder.mkdir(exist_ok=True)
    changes = {
        "objective": chosen, "max_steps": STEPS + 1, "optim": {"kind": "sgd", "learning_rate": 0.02},
        "batch": {"micro_tokens": 512},
    }  # fmt: skip
    if "teacher" in objective.model_fields:
        theirs = networks.foreign if chosen.get("vocabulary") == "align" else networks.teacher
        changes["objective"] = {"teacher": str(theirs)} | chosen
    made = configuration(networks.base, folder, objective, output_dir=str(folder / "one"), **changes)
    rows = rows_of(objective.rows)
    for i, row in enumerate(rows):
        if label := ROWS.get(chosen.get("problem_type", "")):
            row["label"] = label(i)
        if objective.rows == "whole_pairs":
            row["margin"] = i / 10
        for name, more in (("completion", " and"), ("chosen", " and"), ("text", " and so on it goes")):
            if name in row:
                row[name] += more * (i % 4)
        if "tags" in row:
            row["tokens"] += ["and", "so"] * (2 * i % 8)
            row["tags"] += ["O", "B-Q"] * (2 * i % 8)
    Path(made.data.train).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def told(config: Config, shared: Shared, rows: range) -> list[dict[str, float]]:
    """What the first steps say: the loss, the gradient's norm, and the objective's figures; most rows of a step."""
    found, trainer, most = [], Trainer(config, QUIET, shared=shared), 0
    for step in trainer.loop():
        most = max(most, len(trainer.steps[step.step - 1]))
        figures = {name: float(value) for name, value in step.metrics.items() if name not in CLOCKS}
        found.append({"loss": step.loss, "grad_norm": step.grad_norm, "tokens": step.tokens} | figures)
        if len(found) == STEPS:
            break
    assert most in rows
    return found


@pytest.mark.parametrize("objective", OBJECTIVES, ids=kind)
@FORKS
def test_two_processes_with_rows_in_parts_learn_what_one_does_with_all_in_one(objective, networks, tmp_path):
    """Micro-batches, accumulation, packing and ranks at once: of each choice the first steps say the same."""
    found, shared = {}, Shared()
    every = [{}, *choices(objective, str(networks.base)), *TOGETHER.get(kind(objective), [])]
    wanted = runs(objective, networks, tmp_path, every)
    for name, config in wanted.items():
        found[name] = told(config, shared, range(1, 2))

    def parted() -> None:
        for config in wanted.values():
            folder = Path(config.output_dir).parent
            other = {"output_dir": str(folder / "two"), "batch": {"micro_tokens": 64, "packing": False}}
            said = told(configure(config.model_dump(mode="json", exclude_unset=True), other), shared, range(2, 99))
            if os.environ["RANK"] == "0":
                (folder / "two.json").write_text(json.dumps(said))

    assert forked(parted) == [0, 0]
    wrong = []
    if objective.model_fields.keys() & {"mask_truncated_completions", "missing_eos_penalty"}:
        assert 0 < next(iter(found.values()))[0]["truncated"] < 1
    for name, config in wanted.items():
        theirs = json.loads((Path(config.output_dir).parent / "two.json").read_text())
        assert len(theirs) == len(found[name])
        for number, (one, two) in enumerate(zip(found[name], theirs), 1):
            if two != pytest.approx(one, rel=1e-3, abs=1e-4):
                apart = {n: (one.get(n), two.get(n)) for n in one | two
                         if two.get(n) != pytest.approx(one.get(n), rel=1e-3, abs=1e-4)}
                wrong.append((name, number, apart))
    assert not wrong


KEPT: dict[str, list[dict[str, Any]]] = {  # choices by which a run keeps more than weights and optimiser
    "dpo": [{"precompute_ref_log_probs": True}],
    "kto": [{"precompute_ref_log_probs": True}],
    "distillation": [{"top_k": 3}, {"hidden_states": {}}, {"on_policy": SHORT | {"num_mini_batches": 2}}],
    "grpo": [{"num_mini_batches": 2, "max_resamples": 2, "mask_truncated_completions": True}],
    "ppo": [{"adaptive_kl": {"horizon": 20}, "target_kl": 1e-4, "num_mini_batches": 1, "num_ppo_epochs": 3}],
}  # fmt: skip
MACHINE = {"tokens_per_second", "memory_gb", "seconds", "seconds_left", *CLOCKS}


def recorded(folder: Path) -> list[dict[str, Any]]:
    """All that is written of the steps, but for what the clock and the machine say."""
    return [{n: v for n, v in r.items() if n not in MACHINE} for r in records(folder / "metrics.jsonl")]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=kind)
@FORKS
def test_killed_and_resumed_ends_with_the_same_bytes(objective, world, networks, tmp_path):
    """All processes are killed after step 3 and go on from step 2, of rollouts in the middle of a round."""
    every = [*([{}] if world > 1 else []), *KEPT.get(kind(objective), [])]  # of one process: test_objective_matrix
    extra = {"checkpoint": {"every": 2}, "evaluation": {"every": 2}, "monitor": {"log_every": 3}}
    extra["data"] = {"validation": 4}
    for i, config in enumerate(runs(objective, networks, tmp_path, every).values()):
        given = config.model_dump(mode="json", exclude_unset=True)
        folders = [{"output_dir": str(tmp_path / f"{i}{name}")} for name in ("whole", "parted")]
        whole, parted = (configure(given, extra, folder) for folder in folders)

        def dying(parted=parted) -> None:
            for step in Trainer(parted, QUIET).loop():
                if step.step >= 3:
                    os.kill(os.getpid(), signal.SIGKILL)

        died = forked(dying, world)
        assert -signal.SIGKILL in died
        assert 0 not in died
        assert checkpoint.step_of(checkpoint.newest(Path(parted.output_dir) / "checkpoints")[0]) == 2
        assert forked(lambda: (train(parted, QUIET), train(whole, QUIET)), world) == [0] * world  # noqa: B023
        one, two = Path(whole.output_dir), Path(parted.output_dir)
        assert finished(one) == finished(two), config.objective
        assert recorded(one) == recorded(two), config.objective
        assert json.loads((one / "report.json").read_text())["steps"] == STEPS + 1
