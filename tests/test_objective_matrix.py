"""Every objective on every way to choose what moves, on every way to store what does not.

The cells are read from the unions of the three axes: a new answer on any is tried without a line here, and a new kind
of rows asks for rows of it.
"""

from __future__ import annotations

import json
import os
import signal
from functools import partial

import pytest
import torch
from test_matrix import CELLS, assert_alike, base, disturb, kind, members  # noqa: F401
from test_train import QUIET, finished, killed

from luthier import configure, steps, train
from luthier.batch import Batch
from luthier.errors import ConfigError
from luthier.methods import METHODS
from luthier.objectives import Objective
from luthier.rollouts import CLOCKS
from luthier.train import Trainer

OBJECTIVES = [o for o in members(Objective) if kind(o) != "next_token"]  # that one has a matrix of its own
FORKS = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
EVERY_OBJECTIVE = pytest.mark.parametrize("objective", OBJECTIVES, ids=kind)


def rows_of(rows: str) -> list[dict]:
    """Twelve rows of a kind."""
    asked = [f"{word}?" for word in ("a", "bb", "ccc", "dd", "e", "ffff")] * 2
    return {
        "text": [{"prompt": q, "completion": f"say {i}"} for i, q in enumerate(asked)],
        "pairs": [{"prompt": q, "chosen": f"good {i}", "rejected": f"{i} bad"} for i, q in enumerate(asked)],
        "unpaired": [{"prompt": q, "completion": f"say {i}", "label": i % 3 > 0} for i, q in enumerate(asked)],
        "whole_pairs": [{"prompt": q, "chosen": f"good {i}", "rejected": f"{i} bad"} for i, q in enumerate(asked)],
        "labelled": [{"text": f"{q} {i}", "label": "xyz"[i % 3]} for i, q in enumerate(asked)],
        "tagged": [{"tokens": [q, "in", f"{i}"], "tags": ["B-Q", "O", f"B-{i % 2}"]} for i, q in enumerate(asked)],
        "prompts": [{"prompt": q, "answer": str(i)} for i, q in enumerate(asked)],
    }[rows]


def configuration(base, tmp_path, objective, /, trainable="lora", precision="as_loaded", **extra):  # noqa: F811
    point = {"objective": kind(objective), "trainable": trainable, "precision": precision}
    name = next(m.name for m in METHODS.values() if m.fixed.items() <= point.items())
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(objective.rows)))
    settings = {
        "model": str(base), "data": {"train": str(path), "max_length": 64}, "max_steps": 3,
        "batch": {"examples": 4, "micro_tokens": 128}, "output_dir": str(tmp_path / "run"),
        "trainable": {"kind": trainable}, "precision": {"kind": precision}, "monitor": {"report_to": []},
        "optim": {"learning_rate": 1e-2},
    }  # fmt: skip
    if kind(objective) == "ppo":
        reward = {"kind": "length", "unit": "characters", "target": 6}
        settings["objective"] = {"rewards": [reward], "num_mini_batches": 2, "max_completion_length": 8}
    if kind(objective) == "grpo":  # a random model's bytes are up to so many characters
        reward = {"kind": "length", "unit": "characters", "target": 6}
        settings["objective"] = {"rewards": [reward], "num_generations": 2, "max_completion_length": 8}
    if kind(objective) == "distillation":
        settings["objective"] = {"teacher": str(base)}
    if trainable == "partial":
        settings["trainable"]["last_layers"] = 1
    return configure(settings, extra, method=name)


@pytest.fixture
def objective_config(base, tmp_path):  # noqa: F811
    return partial(configuration, base, tmp_path)


def gradients(trainer: Trainer, documents: list, limit: int) -> dict[str, torch.Tensor]:
    """Of all documents, in micro-batches of so many tokens, divided by what they count."""
    made, count = trainer.made, 0.0
    parts = Batch.pack(documents).to(made.ranks.device).split(limit)
    if survey := getattr(made.objective, "survey", None):
        survey(made.network, parts, made.ranks.sum_)
    for part in parts:
        loss = made.objective(made.network, made.objective.prepare(made.network, part))
        assert set(loss.metrics) >= set(made.objective.metrics)
        loss.total.backward()
        count += float(loss.count)
    named = trainer.parameters.items()
    found = {name: p.grad / count for name, p in named if p.grad is not None}
    for parameter in trainer.parameters.values():
        parameter.grad = None
    return found


@pytest.mark.parametrize(("trainable", "precision"), CELLS)
@EVERY_OBJECTIVE
def test_every_cell_is_refused_by_name_or_its_gradient_is_that_of_any_micro_batch(
    objective_config, objective, trainable, precision
):
    refused, config = None, None
    try:
        config = objective_config(objective, trainable, precision)
    except ConfigError as error:
        refused = str(error)
    if config is None:
        assert all(word in str(refused) for word in (trainable, precision, "use "))
        return
    trainer = Trainer(config, QUIET)
    documents = [trainer.training.documents[d] for row in trainer.steps[0] for d in row]
    disturb(trainer.made)
    trainer.made.network.eval()
    whole = gradients(trainer, documents, 10_000)
    assert whole
    assert all(gradient.isfinite().all() for gradient in whole.values())
    assert any(gradient.abs().max() > 1e-6 for gradient in whole.values())
    assert_alike(gradients(trainer, documents, 1), whole)


@pytest.mark.parametrize("trainable", ["lora", "full"])
@EVERY_OBJECTIVE
@FORKS
def test_killed_and_resumed_ends_with_the_same_bytes(objective_config, objective, trainable, tmp_path):
    """After step 4, to go on from step 3: of rollouts in the middle of a round."""
    extra = {"checkpoint": {"every": 3}, "max_steps": 5}
    parted = objective_config(objective, trainable, **extra, output_dir=str(tmp_path / "parted"))

    def until_4() -> None:
        for step in steps(parted, QUIET):
            if step.step == 4:
                os.kill(os.getpid(), signal.SIGKILL)

    killed(until_4)
    assert len(list((tmp_path / "parted" / "checkpoints").iterdir())) == 1
    torch.manual_seed(99)
    train(parted, QUIET)
    train(objective_config(objective, trainable, **extra), QUIET)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")


WRITING = {"dpo": {}, "distillation": {"top_k": 4}, "ppo": {}, "classification": {}}


@pytest.mark.parametrize("name", WRITING)
@FORKS
def test_killed_before_any_file_appears(objective_config, name, tmp_path, monkeypatch):
    """Files are written beside their place and renamed: killed before each renaming of a run, which then goes on.

    What is computed ahead, what a round left, checkpoints and reports are among them.
    """
    objective = next(o for o in OBJECTIVES if kind(o) == name)

    def config(folder: str):
        extra = {"checkpoint": {"every": 1}, "max_steps": 2, "output_dir": str(tmp_path / folder)}
        made = objective_config(objective, "full" if name == "dpo" else "lora", **extra)
        return configure(made.model_dump(exclude_unset=True), {"objective": WRITING[name]})

    told: list[int] = []
    rename = {name: getattr(os, name) for name in ("rename", "replace")}

    def instead(before) -> None:
        for verb, usual in rename.items():

            def then(*given, usual=usual) -> None:
                before()
                usual(*given)

            monkeypatch.setattr(os, verb, then)

    instead(lambda: told.append(1))
    train(config("whole"), QUIET)
    instead(lambda: None)
    assert len(told) > 5

    for at in range(len(told)):
        parted = config(str(at))

        def dying(at=at, parted=parted) -> None:
            left = iter(range(at))
            instead(lambda: os.kill(os.getpid(), signal.SIGKILL) if next(left, None) is None else None)
            train(parted, QUIET)

        killed(dying)
        train(parted, QUIET)
        assert finished(tmp_path / "whole") == finished(tmp_path / str(at)), at


@EVERY_OBJECTIVE
def test_packed_rows_and_padded_ones_learn_the_same(objective_config, objective, tmp_path):
    """The figures of the first step, whose numbers are those of the same rows either way."""
    found = []
    for packing in (True, False):
        config = objective_config(objective, batch={"packing": packing}, output_dir=str(tmp_path / str(packing)))
        found.append(next(iter(steps(config, QUIET))))
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-4, abs=1e-6)
    assert found[0].grad_norm == pytest.approx(found[1].grad_norm, rel=1e-3, abs=1e-6)
    told = [{name: value for name, value in step.metrics.items() if name not in CLOCKS} for step in found]
    assert told[0] == pytest.approx(told[1], rel=1e-3, abs=1e-5)
