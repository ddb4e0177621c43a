"""Preference pairs: each loss by hand, DPO at the reference, what changes no number, kill and resume, bad rows."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import write_rows
from test_train import QUIET, finished

from luthier import configure, steps, train
from luthier.monitor import records
from luthier.objectives import CPO, DPO, ORPO, SimPO
from luthier.objectives.pairs import Sides, judged

PAIRS = [
    {"prompt": f"{word} {n}", "chosen": f"{n} {word[::-1]}", "rejected": f"{word} {n} {n}"}
    for n in range(8)
    for word in ("one", "three", "seven", "ab")
]


@pytest.fixture
def pairs(settings, tmp_path) -> dict:
    """A run on pairs of a few seconds."""
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    return settings | {"data": settings["data"] | {"train": str(path)}, "batch": {"examples": 4, "micro_tokens": 256}}


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


LOGPS = Sides(torch.tensor([-4.0, -9.0]), torch.tensor([-6.0, -8.0]))
REFERENCE = Sides(torch.tensor([-5.0, -8.0]), torch.tensor([-5.0, -8.5]))
TOKENS = Sides(torch.tensor([2.0, 4.0]), torch.tensor([3.0, 2.0]))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (DPO(beta=0.5), [-log_sigmoid(1.0), -log_sigmoid(-0.75)]),
        (DPO(beta=0.5, label_smoothing=0.1),
         [-0.9 * log_sigmoid(1.0) - 0.1 * log_sigmoid(-1.0), -0.9 * log_sigmoid(-0.75) - 0.1 * log_sigmoid(0.75)]),
        (DPO(beta=0.25, loss_type="hinge"), [0.5, 1.375]),
        (DPO(beta=0.5, loss_type="ipo"), [(0.5 + 1 / 3 - 1) ** 2, (-0.25 - 0.25 - 1) ** 2]),
        (DPO(beta=0.5, loss_type="robust", label_smoothing=0.2),
         [(-0.8 * log_sigmoid(1.0) + 0.2 * log_sigmoid(-1.0)) / 0.6,
          (-0.8 * log_sigmoid(-0.75) + 0.2 * log_sigmoid(0.75)) / 0.6]),
        (DPO(beta=0.5, rpo_alpha=2.0), [-log_sigmoid(1.0) + 2 * 2.0, -log_sigmoid(-0.75) + 2 * 2.25]),
        (CPO(beta=0.5), [-log_sigmoid(1.0) + 2.0, -log_sigmoid(-0.5) + 2.25]),
        (CPO(beta=0.25, loss_type="hinge", cpo_alpha=0.0), [0.5, 1.25]),
        (CPO(beta=0.5, loss_type="ipo", cpo_alpha=0.0), [1.0, (1.75 - 1) ** 2]),
        (SimPO(beta=2.0, simpo_gamma=0.5), [-log_sigmoid(-0.5), -log_sigmoid(2 * 1.75 - 0.5)]),
        (ORPO(beta=0.5), [2.0 - 0.5 * log_sigmoid(0.0), 2.25 - 0.5 * log_sigmoid(
            math.log(math.exp(-2.25) / (1 - math.exp(-2.25))) - math.log(math.exp(-4) / (1 - math.exp(-4))))]),
    ],
    ids=lambda v: type(v).__name__ + "-" + str(getattr(v, "loss_type", "")) if not isinstance(v, list) else "",
)  # fmt: skip
def test_losses_by_hand(config, wanted):
    """Two pairs: sums -4 and -9 against -6 and -8, where the reference has -5 and -8 against -5 and -8.5.

    Log-ratios are 1 and -1 of the better, -1 and 0.5 of the worse answers: margins 2 and -1.5. Answers have 2 and 4,
    3 and 2 tokens: means -2 and -2.25 against -2 and -4, margins 0 and 1.75; of log-ratios 0.5 + 1/3 and -0.25 - 0.25.
    """
    found = judged(config, LOGPS, TOKENS, REFERENCE if isinstance(config, DPO) else None)
    torch.testing.assert_close(found.loss, torch.tensor(wanted))


def test_a_run_learns_what_is_preferred(pairs):
    result = train(configure(pairs, {"max_steps": 20, "objective": {"beta": 0.5}}, method="dpo"), QUIET)
    figures = result.report["figures"]
    assert figures["loss"]["base"] == pytest.approx(math.log(2), abs=1e-6)
    assert figures["rewards/accuracies"]["base"] == 0.5
    assert figures["rewards/margins"]["tuned"] > 0.5
    history = [r for r in records(result.folder / "metrics.jsonl") if r["kind"] == "train"]
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[-1]["rewards/margins"] == pytest.approx(
        history[-1]["rewards/chosen"] - history[-1]["rewards/rejected"], abs=1e-5
    )


BOTH = pytest.mark.parametrize("precompute", [False, True])


@BOTH
@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_stopped_and_resumed_ends_with_the_same_bytes(pairs, tmp_path, trainable, precompute):
    extra = {
        "trainable": {"kind": trainable}, "checkpoint": {"every": 2}, "evaluation": {"every": 3},
        "objective": {"precompute_ref_log_probs": precompute},
    }  # fmt: skip
    train(configure(pairs, extra, method="dpo"), QUIET)
    parted = configure(pairs, extra, {"output_dir": str(tmp_path / "parted")}, method="dpo")
    for step in steps(parted, QUIET):
        if step.step == 3:
            break
    torch.manual_seed(99)
    train(parted, QUIET)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")
    assert (tmp_path / "run" / "ahead").exists() == precompute


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_the_reference_computed_ahead_gives_the_same_losses(pairs, tmp_path, trainable):
    told = {}
    for precompute in (False, True):
        extra = {"objective": {"precompute_ref_log_probs": precompute}, "trainable": {"kind": trainable}}
        out = {"output_dir": str(tmp_path / str(precompute)), "max_steps": 8}
        result = train(configure(pairs, extra, out, method="dpo"), QUIET)
        told[precompute] = list(records(result.folder / "metrics.jsonl"))
    for now, before in zip(told[False], told[True]):
        assert now["kind"] == before["kind"]
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert now[name] == pytest.approx(before[name], abs=2e-4), (now["step"], name)
    assert told[True][-1]["rewards/margins"] > 0.01
