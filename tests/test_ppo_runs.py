"""Runs of PPO: ratios and KL at the start, invariance, kill and resume inside a batch of rollouts, learning, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice

import pytest
import torch
from test_train import QUIET, finished

from luthier.config import configure
from luthier.monitor import records
from luthier.train import Trainer, steps, train


def letters(prompt: str, completion: str, **columns) -> float:
    """The share of characters from a to z, which a model of bytes learns to write within seconds."""
    return sum("a" <= c <= "z" for c in completion) / max(1, len(completion))


REWARDS = {"letters": letters}


@pytest.fixture
def settings(settings, tmp_path) -> dict:
    """Prompts, and nothing else that is known of them."""
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{word} {n}"}) + "\n" for n in range(8) for word in ("one", "two")))
    return settings | {"data": {"train": str(rows), "max_length": 64}}


def config_of(settings: dict, *extra: dict, **objective):
    base = {
        "batch": {"examples": 4, "micro_tokens": 128}, "max_steps": 8,
        "objective": {"max_completion_length": 8, "num_mini_batches": 2, "num_ppo_epochs": 2, **objective},
    }  # fmt: skip
    return configure(settings, base, *extra, method="ppo")


def test_the_first_step_is_at_the_policy_that_answered(settings):
    """A fresh adapter is the reference: KL 0; the answers' own policy: ratio 1, nothing clipped, values 0."""
    first, *_, last = steps(config_of(settings), QUIET, REWARDS)
    m = first.metrics
    assert (m["kl"], m["policy/clipfrac"], m["val/clipfrac"]) == (0, 0, 0)
    assert m["ratio"] == pytest.approx(1, abs=1e-5)
    assert m["policy/approxkl"] == pytest.approx(0, abs=1e-6)
    assert m["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert last.metrics["policy/approxkl"] > 0
    assert last.metrics["kl"] != 0
