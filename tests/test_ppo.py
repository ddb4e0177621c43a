"""PPO: clipped losses, credit and its KL by hand; the module on a small network; settings that do not go together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from luthier.objectives.actor_critic import PPOObjective, value_loss
from luthier.objectives.policy_gradient import clipped_loss, with_entropy
from luthier.objectives.ppo import PPO
from luthier.sampled import Sampled


def test_the_policy_is_followed_until_it_has_changed_enough():
    """Clip 0.2. r = 1.5, A = 2: -3 and -2 x 1.2, the larger is -2.4. r = 1.5, A = -1: 1.5 and 1.2. r = 0.5, A = 2: -1
    and -1.6. r = 0.5, A = -1: 0.5 and 0.8. The gradient by the log-probability is -A r, or 0 where it was clipped."""
    logprobs = torch.tensor([1.5, 1.5, 0.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([2.0, -1.0, 2.0, -1.0])
    loss, clipped = clipped_loss(logprobs, advantages, 0.2, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-2.4, 1.5, -1.0, 0.8]))
    assert clipped.tolist() == [True, False, False, True]
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 1.5, -1.0, 0.0]))


def test_values_are_followed_until_they_have_changed_enough():
    """Before 0, clip 0.2. V = 0.5, R = 1: 0.25 and (0.2 - 1)^2 = 0.64, half of which is 0.32, without a gradient. R = 0:
    0.25 and 0.04, 0.125, gradient 0.5. V = 0.1, R = 1: 0.81 twice, 0.405, gradient -0.9. Without a clip 0.125 first."""
    values = torch.tensor([0.5, 0.5, 0.1], requires_grad=True)
    returns = torch.tensor([1.0, 0.0, 1.0])
    loss, clipped = value_loss(values, torch.zeros(3), returns, 0.2)
    torch.testing.assert_close(loss, torch.tensor([0.32, 0.125, 0.405]))
    assert clipped.tolist() == [True, False, False]
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.0, 0.5, -0.9]))
    plain, none = value_loss(values.detach(), torch.zeros(3), returns, None)
    torch.testing.assert_close(plain, torch.tensor([0.125, 0.125, 0.405]))
    assert not none.any()


def test_losses_against_a_loop_over_tokens():
    torch.manual_seed(0)
    logprobs, before, advantages = torch.randn(40) / 3, torch.randn(40) / 3, torch.randn(40)
    values, old, returns = torch.randn(40), torch.randn(40), torch.randn(40)
    losses, clips = clipped_loss(logprobs - before, advantages, 0.1, 0.1)
    errors, cuts = value_loss(values, old, returns, 0.3)
    for i in range(40):
        ratio = math.exp(float(logprobs[i] - before[i]))
        a = float(advantages[i])
        # Schulman's objective is a lower bound: it stops where going on would seem to gain.
        stopped = (a > 0 and ratio > 1.1) or (a < 0 and ratio < 0.9)
        assert float(losses[i]) == pytest.approx(-a * ((1.1 if a > 0 else 0.9) if stopped else ratio), rel=1e-5)
        assert bool(clips[i]) == stopped
        v, o, r = float(values[i]), float(old[i]), float(returns[i])
        near = min(max(v, o - 0.3), o + 0.3)
        assert float(errors[i]) == pytest.approx(max((v - r) ** 2, (near - r) ** 2) / 2, rel=1e-5)
        assert bool(cuts[i]) == ((near - r) ** 2 > (v - r) ** 2)


def test_entropy_and_temperature():
    """Logits log 1, log 3: 1/4 and 3/4, entropy (log 4) / 4 + 3/4 log(4/3) = 0.562335. At temperature 1/2 the logits
    double, 1/10 and 9/10: 0.325083."""
    logits = torch.tensor([[1.0, 3.0]]).log()
    torch.testing.assert_close(
        with_entropy(1.0, True)(logits, torch.tensor([1])), torch.tensor([[math.log(0.75), 0.5623351]])
    )
    torch.testing.assert_close(
        with_entropy(0.5, False)(logits, torch.tensor([0])), torch.tensor([[math.log(0.1), 0.3250830]])
    )


class Blank:
    """What building the objective asks of a network."""

    class model:
        @staticmethod
        def get_output_embeddings():
            return torch.nn.Linear(8, 4)


def objective(**settings) -> PPOObjective:
    return PPOObjective(PPO(rewards=["exact_match"], **settings), Blank())


def answers(*scores: float, ended=(True, True)) -> list[Sampled]:
    """The first of two tokens, the second of one."""
    known = [
        {"old_logprobs": [-1.0, -0.5], "reference_logprobs": [-1.1, -0.8], "values": [0.2, 0.4]},
        {"old_logprobs": [-2.0], "reference_logprobs": [-1.5], "values": [0.1]},
    ]
    return [
        Sampled(
            i, i, i, np.arange(2 + len(fields["values"])), 2, ended[i], np.zeros(0), np.zeros(0), score,
            fields={name: np.array(column, np.float32) for name, column in fields.items()},
        )
        for i, (score, fields) in enumerate(zip(scores, known))
    ]  # fmt: skip


def credited(made: PPOObjective, samples) -> tuple[dict, list, list]:
    told = made.credit(samples)
    return told, *([np.round(s.fields[n].astype(float), 6).tolist() for s in samples] for n in ("advantages", "returns"))


def test_credit_by_hand():
    """Coefficient 0.5, gamma 1, lam 0.5. First answer, score 1, KL 0.1 and 0.3: rewards -0.05 and 1 - 0.15 = 0.85;
    d = 0.85 - 0.4 = 0.45; d = -0.05 + 0.4 - 0.2 = 0.15, A = 0.15 + 0.5 x 0.45 = 0.375. Returns 0.575 and 0.85.
    Second, score 2, KL -0.5: reward 2.25, A = 2.15, return 2.25. KL of answers: (0.4 - 0.5) / 2 = -0.05; of rewards with
    it (0.8 + 2.25) / 2 = 1.525."""
    made = objective(kl_coef=0.5, lam=0.5, whiten_advantages=False)
    told, advantages, returns = credited(made, answers(1.0, 2.0))
    assert advantages == [[0.375, 0.45], [2.15]]
    assert returns == [[0.575, 0.85], [2.25]]
    assert told["kl"] == pytest.approx(-0.05)
    assert (told["kl_coef"], told["score"]) == (0.5, 1.5)
    assert told["reward_with_kl"] == pytest.approx(1.525)
    # Returns less values 0.375 0.45 2.15, squares 2.015417 from their mean; returns, 1.613750: worse than a constant.
    assert told["explained_variance"] == pytest.approx(1 - 2.015417 / 1.613750, abs=1e-4)


def test_whitened_advantages_have_no_mean_and_returns_are_not_whitened():
    """0.375 0.45 2.15: mean 0.991667, deviation 1.003847."""
    made = objective(kl_coef=0.5, lam=0.5)
    _, advantages, returns = credited(made, answers(1.0, 2.0))
    assert [*advantages[0], *advantages[1]] == pytest.approx([-0.614303, -0.539591, 1.153894], abs=1e-4)
    assert returns == [[0.575, 0.85], [2.25]]


def test_whitened_rewards_keep_their_mean():
    """-0.05 0.85 2.25: mean 1.016667, deviation 1.159023; whitened with the mean 0.096349 0.872870 2.080781; of gamma 0
    the return is the reward itself."""
    made = objective(kl_coef=0.5, gamma=0.0, whiten_rewards=True, whiten_advantages=False)
    _, _, returns = credited(made, answers(1.0, 2.0))
    assert [*returns[0], *returns[1]] == pytest.approx([0.096349, 0.872870, 2.080781], abs=1e-4)


def test_an_answer_that_does_not_end_is_worth_less():
    """Score 2 less 3; without a KL in the reward that is its return, and it was reward.mean before."""
    made = objective(kl_in="loss", kl_estimator="k3", missing_eos_penalty=3.0, lam=1.0, whiten_advantages=False)
    samples = answers(1.0, 2.0, ended=(True, False))
    told, _, returns = credited(made, samples)
    assert returns == [[1.0, 1.0], [-1.0]]
    assert told["score"] == 0
    assert [s.reward for s in samples] == [1.0, 2.0], "the reward that is reported stays"


def test_an_adaptive_coefficient_acts_on_the_next_batch_and_resumes():
    """KL -0.05 is far below the target: x (1 - 0.2 x 2 / 4) = 0.9."""
    made = objective(kl_coef=0.5, adaptive_kl={"target": 1.0, "horizon": 4})
    assert made.credit(answers(1.0, 2.0))["kl_coef"] == 0.5
    assert made.credit(answers(1.0, 2.0))["kl_coef"] == pytest.approx(0.45)
    again = objective(kl_coef=0.5, adaptive_kl={"target": 1.0, "horizon": 4})
    again.restore({}, made.numbers())
    assert again.credit(answers(1.0, 2.0))["kl_coef"] == pytest.approx(0.405)


def test_passes_end_when_the_policy_has_moved_enough():
    assert objective(target_kl=0.02).enough({"policy/approxkl": 0.021})
    assert not objective(target_kl=0.02).enough({"policy/approxkl": 0.02})
    assert not objective().enough({"policy/approxkl": 9.0})
