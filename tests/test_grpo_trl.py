"""GRPO's losses and gradients against TRL's GRPOTrainer on the same tensors; where they differ, a test says why."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from luthier.batch import Batch
from luthier.logprobs import Head
from luthier.objectives import GRPO
from luthier.objectives import policy_gradient as pg
from luthier.sampled import Sampled

pytest.importorskip("trl")
LENGTHS, PROMPT, WIDTH, VOCABULARY, LONGEST = (1, 4, 3, 6), 2, 8, 11, 7


class Fixed(nn.Module):
    """A network whose hidden states are parameters, one for each token of a batch of one size."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.states = nn.Parameter(torch.randn(sum(LENGTHS) + len(LENGTHS) * (PROMPT - 1), WIDTH))
        self.head = Head(nn.Linear(WIDTH, VOCABULARY, bias=False))

    def hidden(self, batch: Batch) -> torch.Tensor:
        return self.states

    def predictions(self, batch, hidden):
        return hidden[batch.trained], batch.targets[batch.trained], batch.weights[batch.trained]


@pytest.fixture(scope="module")
def given():
    """Four answers of several lengths with advantages, old, reference and rollout log-probabilities."""
    net, generator = Fixed(), torch.Generator().manual_seed(1)
    samples = []
    for i, n in enumerate(LENGTHS):
        tokens = torch.randint(0, VOCABULARY, (PROMPT + n,), generator=generator).int().numpy()
        samples.append(Sampled(i, i, i // 2, tokens, PROMPT, True, *[torch.zeros(n).numpy()] * 2))
    batch = Batch.pack([one.document() for one in samples])
    with torch.no_grad():
        hidden, targets, _ = net.predictions(batch, net.hidden(batch))
        logprobs = net.head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    def away(scale: float) -> torch.Tensor:
        return logprobs + scale * torch.randn(len(logprobs), generator=generator)

    values = {"old": away(0.4), "reference": away(0.5), "rollout": away(0.3)}
    return net, samples, values, [1.5, -0.5, -1.2, 0.7]


def ours(given, **settings) -> tuple[float, torch.Tensor, dict]:
    net, samples, values, advantages = given
    objective = pg.GRPOObjective(GRPO(num_generations=2, max_completion_length=LONGEST, **settings))
    start = 0
    for one, advantage in zip(samples, advantages):
        part = slice(start, start + len(one))
        start += len(one)
        log_ratio = (values["old"] - values["rollout"])[part].numpy()
        one.fields = {f"{name}_logprobs": values[name][part].numpy() for name in ("old", "reference")}
        one.fields["advantages"] = torch.full((len(one),), advantage).numpy()
        if settings["rollout_correction"] != "none":
            one.fields["correction"] = pg.correction(log_ratio, settings["rollout_correction"], 1.2)
    net.zero_grad()
    loss = objective(net, Batch.pack([one.document() for one in samples]))
    (loss.total / loss.count).backward()
    told = {name: float(value / loss.count) for name, value in loss.metrics.items()}
    return (loss.total / loss.count).item(), net.states.grad.clone(), told


def theirs(given, **settings) -> tuple[float, torch.Tensor]:
    """TRL's own loss, given log-probabilities of the same hidden states in padded rows."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    net, samples, values, advantages = given
    batch = Batch.pack([one.document() for one in samples])
    mask = torch.zeros(len(LENGTHS), max(LENGTHS))
    for row, n in zip(mask, LENGTHS):
        row[:n] = 1

    def padded(flat: torch.Tensor) -> torch.Tensor:
        return torch.zeros(mask.shape).masked_scatter(mask.bool(), flat)

    net.zero_grad()
    hidden, targets, _ = net.predictions(batch, net.hidden(batch))
    logprobs = padded(net.head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0])
    correction, cap = settings.pop("rollout_correction"), 1.2
    log_ratio = padded(values["old"] - values["rollout"])
    if correction.startswith("sequence"):
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = log_ratio.exp()
    ratio = ratio.clamp(max=cap) if correction.endswith("truncate") else ratio.masked_fill(ratio > cap, 0.0)
    given_inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), PROMPT, dtype=torch.int64),
        "prompt_mask": torch.ones(len(LENGTHS), PROMPT, dtype=torch.int64),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.int64), "completion_mask": mask.long(),
        "advantages": torch.tensor(advantages), "old_per_token_logps": padded(values["old"]),
        "ref_per_token_logps": padded(values["reference"]), "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": ratio,
    }  # fmt: skip
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros(mask.shape), None),
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, aux_loss_enabled=False, max_completion_length=LONGEST,
        importance_sampling_level=settings.get("importance_sampling_level", "token"), beta=settings["beta"],
        epsilon_low=settings["epsilon"], epsilon_high=settings.get("epsilon_high") or settings["epsilon"],
        loss_type=settings["loss_type"], use_vllm=correction != "none", vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, tools=None,
        _entropy_bonus_enabled=False, _last_policy_loss=None,
        args=SimpleNamespace(
            delta=settings.get("delta"), use_bias_correction_kl=False, steps_per_generation=1, entropy_coef=0.0
        ),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda t: t, reduce=lambda t, reduction=None: t, device=torch.device("cpu")
        ),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    loss = GRPOTrainer._compute_loss(stub, stub.model, given_inputs)
    loss.backward()
    return loss.item(), net.states.grad.clone()


PLAIN = {"epsilon": 0.2, "beta": 0.0, "rollout_correction": "none"}


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "grpo"}, {"loss_type": "bnpo"}, {"loss_type": "dapo", "epsilon_high": 0.28},
        {"loss_type": "dr_grpo"},
        {"loss_type": "grpo", "beta": 0.3}, {"loss_type": "dapo", "beta": 0.3, "rollout_correction": "token_truncate"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.1},
        {"loss_type": "grpo", "delta": 1.3}, {"loss_type": "grpo", "rollout_correction": "sequence_mask"},
        {"loss_type": "dapo", "rollout_correction": "sequence_truncate"},
        {"loss_type": "dapo", "rollout_correction": "token_mask", "beta": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_loss_and_gradient_are_those_of_trl(given, settings):
    mine, gradient, told = ours(given, **PLAIN | settings)
    wanted, other = theirs(given, **PLAIN | settings)
    assert mine == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)
    assert gradient.abs().max() > 1e-3
    if settings == {"loss_type": "dapo", "epsilon_high": 0.28}:
        assert 0 < told["clip_ratio"] < 1, "the clip acts on these numbers"


def test_trl_averages_the_means_of_micro_batches_where_ours_is_one_mean(given):
    """bnpo of answers of 1 and 13 tokens in two micro-batches: TRL divides each by its own tokens, so accumulated
    it is the mean of two means. Ours is the mean over all 14 tokens, whoever shares a micro-batch with whom."""
    net, samples, values, advantages = given
    whole, _, _ = ours(given, **PLAIN | {"loss_type": "bnpo"})
    batch = Batch.pack([one.document() for one in samples])
    hidden, targets, _ = net.predictions(batch, net.hidden(batch))
    now = net.head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    log_ratio = (now - values["old"]).detach()
    each = torch.cat([torch.full((n,), a) for n, a in zip(LENGTHS, advantages)])
    loss, _ = pg.clipped_loss(log_ratio, each, 0.2, 0.2)
    parts = loss.split([LENGTHS[0], sum(LENGTHS[1:])])
    assert whole == pytest.approx(float(loss.mean()), rel=1e-4)
    assert not math.isclose(whole, float((parts[0].mean() + parts[1].mean()) / 2), rel_tol=0.05)
