"""Rewards of tokens, advantages, returns, whitening and KL by hand, and against plain loops over single answers."""

from __future__ import annotations

import math

import pytest
import torch

from luthier.objectives.gae import explained_variance, gae, sums, token_rewards, whitened
from luthier.objectives.kl_control import Coefficient
from luthier.objectives.policy_gradient import divergence


def close(found, wanted):
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-6, rtol=1e-6)


def test_a_token_earns_its_share_of_the_kl_and_the_last_one_the_score():
    """Coefficient 0.5. First answer: KL 0.1, -0.2, 0.3, score 1: -0.05, 0.1, -0.15 + 1. Second: KL 0.4, score -2: -2.2."""
    kl, scores, ends = torch.tensor([0.1, -0.2, 0.3, 0.4]), torch.tensor([1.0, -2.0]), (0, 3, 4)
    close(token_rewards(scores, kl, 0.5, ends), [-0.05, 0.1, 0.85, -2.2])
    close(token_rewards(scores, None, 0.5, ends), [0.0, 0.0, 1.0, -2.0])
    close(sums(kl, ends), [0.2, 0.4])


def test_advantages_and_returns_of_answers_of_other_lengths():
    """gamma 0.9, lam 0.5. First answer, rewards 0 0 1, values 0.5 0.4 0.2, from its end:
    d = 1 - 0.2 = 0.8, A = 0.8;
    d = 0 + 0.9 x 0.2 - 0.4 = -0.22, A = -0.22 + 0.45 x 0.8 = 0.14;
    d = 0 + 0.9 x 0.4 - 0.5 = -0.14, A = -0.14 + 0.45 x 0.14 = -0.077.
    Returns: 0.5 - 0.077, 0.4 + 0.14, 0.2 + 0.8. The second answer, reward 2, value 0.5, knows nothing of the first: 1.5.
    """
    rewards, values = torch.tensor([0.0, 0.0, 1.0, 2.0]), torch.tensor([0.5, 0.4, 0.2, 0.5])
    advantages, returns = gae(rewards, values, (0, 3, 4), 0.9, 0.5)
    close(advantages, [-0.077, 0.14, 0.8, 1.5])
    close(returns, [0.423, 0.54, 1.0, 2.0])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0), (0.0, 0.5)])
def test_advantages_against_a_loop_over_each_answer(gamma, lam):
    """The sum of (gamma lam)^k d_{t+k}, written out as the paper has it, and not as a recursion."""
    torch.manual_seed(0)
    lengths = [4, 1, 7, 3]
    ends = (0, 4, 5, 12, 15)
    rewards, values = torch.randn(15), torch.randn(15)
    wanted = []
    for r, v in zip(rewards.split(lengths), values.split(lengths)):
        n = len(r)
        deltas = [r[t] + gamma * (v[t + 1] if t + 1 < n else 0.0) - v[t] for t in range(n)]
        wanted += [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]
    advantages, returns = gae(rewards, values, ends, gamma, lam)
    torch.testing.assert_close(advantages, torch.stack(wanted))
    torch.testing.assert_close(returns, torch.stack(wanted) + values)
    if lam == 1:  # then a return is the discounted sum of all that is earned from there on, whatever the critic says
        again, _ = gae(rewards, torch.zeros(15), ends, gamma, lam)
        torch.testing.assert_close(returns, again)


def test_whitening_takes_the_mean_away_and_does_not_add_it_again():
    """1 2 3 6: mean 3, variance (4 + 1 + 0 + 9) / 3 = 14/3, its root 2.160247: -0.925820, -0.462910, 0, 1.388730.

    torchtune 0.6 whitens advantages by a function that adds the mean again by default: 2.07, 2.54, 3, 4.39, so that
    every token is made likelier. With rewards, where the mean stays, this is what is wanted.
    """
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    close(whitened(values), [-0.9258201, -0.4629100, 0.0, 1.3887301])
    close(whitened(values, keep_mean=True), [2.0741799, 2.5370900, 3.0, 4.3887301])
    close(whitened(torch.tensor([5.0, 5.0])), [0.0, 0.0])
    close(whitened(torch.tensor([5.0])), [0.0])
    close(whitened(torch.tensor([5.0]), keep_mean=True), [5.0])


def test_whitening_does_not_know_where_answers_end():
    """Nothing is padded, so no zero of a shorter answer enters the mean."""
    torch.manual_seed(0)
    values = torch.randn(50) * 3 + 1
    made = whitened(values)
    assert abs(float(made.mean())) < 1e-6
    assert float(made.std()) == pytest.approx(1, abs=1e-5)


def test_explained_variance():
    """Returns 1 2 3, variance 2/3. Values 1 2 4: errors 0 0 -1, variance 2/9: 1 - 1/3."""
    returns = torch.tensor([1.0, 2.0, 3.0])
    close(explained_variance(torch.tensor([1.0, 2.0, 4.0]), returns), 2 / 3)
    close(explained_variance(returns, returns), 1.0)
    close(explained_variance(torch.zeros(3), returns), 0.0)
    close(explained_variance(torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)), 0.0)


def test_estimates_of_the_kl_of_a_token():
    """Policy 1/2, reference 1/4: l = log 2 = 0.693147, l^2 / 2 = 0.240227, exp(-l) - 1 + l = 0.5 - 1 + 0.693147."""
    policy, reference = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    close(divergence(policy, reference, "k1"), [math.log(2)])
    close(divergence(policy, reference, "k2"), [0.2402265])
    close(divergence(policy, reference, "k3"), [0.1931472])
    for kind in ("k1", "k2", "k3"):
        close(divergence(policy, policy, kind), [0.0])


def test_what_the_estimates_are_on_average():
    """Over all tokens of a vocabulary, weighted by the policy: k1 and k3 are the KL; the gradient of k2 is that of the
    KL, and that of k1 is 0, which is why it does not do in a loss."""
    torch.manual_seed(0)
    logits, reference = torch.randn(6, dtype=torch.float64, requires_grad=True), torch.randn(6).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    (wanted,) = torch.autograd.grad(exact, logits, retain_graph=True)
    drawn = logprobs.exp().detach()  # how often each is drawn
    gradients = {}
    for kind in ("k1", "k2", "k3"):
        mean = (drawn * divergence(logprobs, reference, kind)).sum()
        if kind != "k2":
            assert float(mean.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
        (gradients[kind],) = torch.autograd.grad(mean, logits, retain_graph=True)
    torch.testing.assert_close(gradients["k2"], wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients["k1"], torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-7)


def test_a_coefficient_follows_the_kl_that_is_seen():
    """Target 6, horizon 100, 50 answers. KL 9: 9/6 - 1 = 0.5, kept at 0.2: x (1 + 0.2 x 50 / 100) = 1.1. KL 5.4:
    -0.1: x 0.95. KL 0: -1, kept at -0.2: x 0.9."""
    made = Coefficient(0.1, 6.0, 100)
    for kl, wanted in ((9.0, 0.11), (5.4, 0.1045), (0.0, 0.09405), (6.0, 0.09405)):
        made.observe(kl, 50)
        assert made.value == pytest.approx(wanted)
    again = Coefficient(0.1, 6.0, 100)
    again.restore({}, made.numbers())
    assert again.value == made.value
    fixed = Coefficient(0.1)
    fixed.observe(100.0, 50)
    assert fixed.value == 0.1


def test_answers_do_not_touch_one_another():
    """Advantages of a batch are those of its answers alone."""
    torch.manual_seed(0)
    rewards, values = torch.randn(9), torch.randn(9)
    together, _ = gae(rewards, values, (0, 4, 9), 0.9, 0.8)
    apart = [gae(rewards[a:b], values[a:b], (0, b - a), 0.9, 0.8)[0] for a, b in ((0, 4), (4, 9))]
    assert torch.equal(together, torch.cat(apart))
