"""GRPO and its kin: advantages, estimators, losses by hand, REINFORCE's gradient, the same for any batching."""

from __future__ import annotations

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import make_model

from luthier import configure
from luthier.batch import Batch
from luthier.errors import ConfigError
from luthier.methods import METHODS
from luthier.models import network, trials
from luthier.objectives import GRPO
from luthier.objectives import group_advantages as advantages
from luthier.objectives import policy_gradient as pg
from luthier.sampled import Sampled, from_arrays, grouped, to_arrays

GRPO_KIN = ("grpo", "rloo", "dr_grpo", "dapo", "gspo")

# ---------------------------------------------------------------------------- advantages


def test_group_relative_advantages_by_hand():
    """Rewards 1, 0, 0, 1: mean 1/2, sample variance 4 (1/4) / 3 = 1/3, deviation 0.57735; each is 0.5 away."""
    rewards = np.array([[1.0, 0, 0, 1], [3, 3, 3, 3]])
    made = advantages.advantages(rewards)
    there = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert made[0].tolist() == pytest.approx([there, -there, -there, there])
    assert made[1].tolist() == [0, 0, 0, 0]


def test_leave_one_out_by_hand():
    """Rewards 1, 2, 6: the others' means are 4, 3.5, 1.5, so what is above them is -3, -1.5, 4.5."""
    made = advantages.advantages(np.array([[1.0, 2, 6]]), "leave_one_out", "none")
    assert made.tolist() == [[-3, -1.5, 4.5]]


def test_scaled_by_the_whole_batch_by_hand():
    """Rewards 0, 2 and 4, 4: mean 2.5, sample variance (6.25 + 0.25 + 2 * 2.25) / 3 = 11/3; only one group differs."""
    rewards = np.array([[0.0, 2], [4, 4]])
    there = 1 / (math.sqrt(11 / 3) + 1e-4)
    assert advantages.advantages(rewards, scale="batch").ravel().tolist() == pytest.approx([-there, there, 0, 0])
    assert advantages.advantages(rewards, scale="none").ravel().tolist() == [-1, 1, 0, 0]


def test_equal_rewards_teach_exactly_nothing():
    """Three times 0.1 has a mean that is not 0.1 in floating point; dividing by a tiny deviation would blow it up."""
    rewards = np.array([[0.1, 0.1, 0.1]])
    assert (rewards - rewards.mean()).any() or rewards.std() == 0
    assert advantages.equal(rewards).tolist() == [True]
    assert not advantages.advantages(rewards).any()
    assert advantages.equal(np.array([[0.0, 1e-6], [1e9, 1e9]])).tolist() == [False, True]


# ---------------------------------------------------------------------------- of tokens


def test_estimators_of_the_divergence_by_hand():
    """Policy 1/2, reference 1/4: log r = -log 2; k1 = log 2, k2 = (log 2)^2 / 2, k3 = 1/2 - 1 + log 2."""
    p, r = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    found = [pg.divergence(p, r, name).item() for name in ("k1", "k2", "k3")]
    assert found == pytest.approx([math.log(2), math.log(2) ** 2 / 2, math.log(2) - 0.5])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimators_are_unbiased(estimator):
    """Their mean over the policy is the divergence itself."""
    p, r = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.6, 0.3])
    mean = (p * pg.divergence(p.log(), r.log(), estimator)).sum()
    torch.testing.assert_close(mean, (p * (p / r).log()).sum())


def test_k2_has_the_gradient_of_the_divergence_and_k1_none():
    """As terms of a loss on samples: the mean of the gradients over the policy, against that of the true divergence."""
    logits = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    reference = torch.tensor([0.1, 0.6, 0.3]).log()
    p = logits.softmax(-1)
    (wanted,) = torch.autograd.grad((p * (p.log() - reference)).sum(), logits)
    fixed, found = p.detach(), {}
    for name in ("k1", "k2"):
        estimate = pg.divergence(logits.log_softmax(-1), reference, name)
        (found[name],) = torch.autograd.grad((fixed * estimate).sum(), logits)
    torch.testing.assert_close(found["k2"], wanted)
    torch.testing.assert_close(found["k1"], torch.zeros(3))


def test_clipped_losses_by_hand():
    """Ratios 1.5, 0.5, 1.5, 0.5 with advantages 1, 1, -1, -1 and a clip from 0.8 to 1.3: the smaller of both gains is
    1.3, 0.5, -1.5, -0.8."""
    log_ratio = torch.tensor([1.5, 0.5, 1.5, 0.5]).log()
    loss, clipped = pg.clipped_loss(log_ratio, torch.tensor([1.0, 1, -1, -1]), 0.2, 0.3)
    assert loss.tolist() == pytest.approx([-1.3, -0.5, 1.5, 0.8])
    assert clipped.tolist() == [True, False, False, True]
    loss, _ = pg.clipped_loss(torch.tensor([9.0]).log(), torch.tensor([-1.0]), 0.2, 0.3, delta=4.0)
    assert loss.tolist() == pytest.approx([4.0]), "two-sided: no further than delta"


def test_corrections_by_hand():
    """Differences log 3, log 1/2, log 2: ratios 3, 1/2, 2, and 3 for the whole answer."""
    log_ratio = np.log(np.array([3, 0.5, 2], np.float32))

    def made(how: str, cap: float) -> list[float]:
        return pg.correction(log_ratio, how, cap).tolist()

    assert made("token_truncate", 2.5) == pytest.approx([2.5, 0.5, 2])
    assert made("token_mask", 2.5) == pytest.approx([0, 0.5, 2])
    assert made("sequence_truncate", 2.5) == pytest.approx([2.5] * 3)
    assert made("sequence_mask", 2.5) == [0, 0, 0]
    assert made("sequence_mask", 4.0) == pytest.approx([3] * 3)


def test_entropy_by_hand():
    """Two tokens of 1/2: log 2. At temperature 1/2 probabilities 1/4 and 3/4 are as 1 to 9: 0.1 and 0.9."""
    logits = torch.tensor([[0.0, 0.0]])
    assert pg.entropy_of(logits).item() == pytest.approx(math.log(2))
    logprob, entropy = pg.with_entropy(0.5, False)(torch.tensor([[1.0, 3.0]]).log(), torch.tensor([1]))[0].tolist()
    assert logprob == pytest.approx(math.log(0.9))
    assert entropy == pytest.approx(-(0.1 * math.log(0.1) + 0.9 * math.log(0.9)))


# ---------------------------------------------------------------------------- the objective


@pytest.fixture(scope="module")
def net():
    made = network.Network(make_model())
    trials.prepare(made, "auto")
    return made


def samples(groups: int = 3, each: int = 2, vocabulary: int = 300) -> list[Sampled]:
    """Answers of several lengths, drawn at random with no network."""
    rng = np.random.default_rng(0)
    made = []
    for group in range(groups):
        prompt = rng.integers(5, vocabulary, 3 + group)
        for k in range(each):
            new = rng.integers(5, vocabulary, 2 + (3 * group + 5 * k) % 7)
            logprobs = rng.normal(-5, 0.1, len(new)).astype(np.float32)
            made.append(
                Sampled(group, group, group, np.array([*prompt, *new], np.int32), len(prompt), k > 0, logprobs,
                        logprobs, reward=float(rng.normal()))
            )  # fmt: skip
    return made


def objective_of(net, **settings):
    made = pg.GRPOObjective(GRPO(**{"num_generations": 2, "max_completion_length": 10, **settings}))

    @contextmanager
    def reference():
        yield net

    made.reference = reference
    return made


def scored(net, objective, made: list[Sampled]) -> list:
    """With what the objective says of them, and the old and the reference's log-probabilities moved a little away."""
    documents = [one.document() for one in made]
    with torch.no_grad():
        fields = objective.score(net, Batch.pack(documents))
    ends = np.cumsum([0, *map(len, made)])
    rng = np.random.default_rng(1)
    for at, one in enumerate(made):
        for name, values in fields.items():
            away = rng.normal(0, 0.3, len(one)).astype(np.float32)
            one.fields[name] = values[ends[at] : ends[at + 1]].numpy() + away
    objective.credit(made)
    return [one.document() for one in made if one.learnt]


def gradient(net, objective, parts: list[Batch]) -> tuple[dict, float]:
    """Of the sum over the parts divided by what they count, and that mean itself."""
    net.zero_grad()
    total = count = 0.0
    for part in parts:
        loss = objective(net, objective.prepare(net, part))
        loss.total.backward()
        total, count = total + loss.total.item(), count + loss.count.item()
    return {n: p.grad / count for n, p in net.named_parameters() if p.grad is not None}, total / count


KINDS = [
    {"loss_type": "grpo"}, {"loss_type": "bnpo"}, {"loss_type": "dr_grpo"}, {"loss_type": "dapo", "epsilon_high": 0.4},
    {"importance_sampling_level": "sequence"}, {"entropy_coef": 0.1, "kl_estimator": "k2"},
    {"kl_in": "reward", "kl_estimator": "k1", "baseline": "leave_one_out"}, {"temperature": 0.7, "top_p": 0.9},
]  # fmt: skip


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_neither_micro_batches_nor_neighbours_nor_fillers_change_the_gradient(net, settings):
    objective = objective_of(net, **settings)
    documents = scored(net, objective, samples())
    whole = Batch.pack(documents)
    wanted, mean = gradient(net, objective, [whole])
    assert any(g.abs().max() > 1e-4 for g in wanted.values())
    apart = [Batch.pack([d]) for d in reversed(documents)]
    for parts in (whole.split(1), apart, [whole.padded_to(len(whole) + 7)]):
        found, other = gradient(net, objective, parts)
        assert other == pytest.approx(mean, rel=1e-4, abs=1e-6)
        for name, one in wanted.items():
            torch.testing.assert_close(found[name], one, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_at_a_ratio_of_one_the_gradient_is_that_of_reinforce(net, loss_type):
    """Minus the advantage times the log-probability, weighted as the loss type says: 1 / (answers x own length), 1 /
    (all tokens), 1 / (answers x longest)."""
    objective = objective_of(net, loss_type=loss_type, beta=0.0, rollout_correction="none")
    made = samples()
    documents = [one.document() for one in made]
    with torch.no_grad():
        old = objective.score(net, Batch.pack(documents))["old_logprobs"]
    ends = np.cumsum([0, *map(len, made)])
    for at, one in enumerate(made):
        one.fields = {"old_logprobs": old[ends[at] : ends[at + 1]].numpy()}
        one.fields["reference_logprobs"] = one.fields["old_logprobs"]
    objective.credit(made)
    found, _ = gradient(net, objective, [Batch.pack([one.document() for one in made])])
    net.zero_grad()
    total, tokens = 0.0, sum(map(len, made))
    with net.natively() as model:
        for one in made:
            ids = torch.tensor(one.tokens[None].astype(np.int64))
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[one.start - 1 :, 0]
            share = {"grpo": len(made) * len(one), "dapo": tokens, "dr_grpo": len(made) * 10}[loss_type]
            total = total - float(one.fields["advantages"][0]) * logprobs.sum() / share
    total.backward()
    for name, p in net.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_losses_of_every_type_by_hand(net):
    """Two answers of 1 and 3 tokens, ratio 1, advantages 1 and -1: losses -1 and 1 a token.

    grpo: (-1 + 1) / 2 = 0; dapo and bnpo: (-1 + 3) / 4 = 1/2; dr_grpo with max_completion_length 10: (-1 + 3) / 20.
    """
    made = [
        Sampled(0, 0, 0, np.arange(5, 5 + 2 + n, dtype=np.int32), 2, True, *[np.zeros(n, np.float32)] * 2, reward=r)
        for n, r in ((1, 1.0), (3, 0.0))
    ]
    wanted = {"grpo": 0.0, "dapo": 0.5, "bnpo": 0.5, "dr_grpo": 0.1}
    for loss_type, mean in wanted.items():
        objective = objective_of(net, loss_type=loss_type, beta=0.0, rollout_correction="none", scale_rewards="none")
        with torch.no_grad():
            old = objective.score(net, Batch.pack([one.document() for one in made]))["old_logprobs"].numpy()
        for one, part in zip(made, (old[:1], old[1:])):
            one.fields = {"old_logprobs": part, "reference_logprobs": part - np.float32(0.5)}
        objective.credit(made)
        for one in made:
            one.fields["advantages"] *= 2  # of 1/2
        loss = objective(net, Batch.pack([one.document() for one in made]))
        assert (loss.total / loss.count).item() == pytest.approx(mean, abs=1e-6), loss_type
        kl = math.exp(-0.5) - 1 + 0.5  # of every token, whatever the loss is divided by
        assert (loss.metrics["kl"] / loss.count).item() == pytest.approx(kl, rel=1e-4)


def test_answers_that_were_cut_are_left_out_where_wanted(net):
    objective = objective_of(net, mask_truncated_completions=True)
    made = samples()
    documents = scored(net, objective, made)
    assert len(documents) == 3 == sum(one.ended for one in made)
    assert all(one.fields["advantages"].any() for one in made), "they still count in the baseline"


def test_the_divergence_in_the_reward(net):
    """Reward less beta times the sum of log p - log p of the reference, before groups are compared."""
    objective = objective_of(net, kl_in="reward", kl_estimator="k1", beta=0.5, scale_rewards="none")
    made = samples(groups=1)
    for one, away in zip(made, (0.2, 0.0)):
        one.fields = {"old_logprobs": one.logprobs, "reference_logprobs": one.logprobs - np.float32(away)}
    objective.credit(made)
    worth = made[0].reward - 0.5 * 0.2 * len(made[0])
    assert made[0].fields["advantages"][0] == pytest.approx((worth - made[1].reward) / 2, rel=1e-4)


def test_samples_come_back_from_arrays():
    made = samples()
    for one in made:
        one.rewards, one.fields = {"a": one.reward, "b": 0.5}, {"x": one.logprobs, "y": np.stack([one.logprobs] * 2, 1)}
    made[1].learnt = False
    back = from_arrays(to_arrays(made))
    assert [len(group) for group in grouped(back)] == [2, 2, 2]
    for one, other in zip(made, back, strict=True):
        for name, value in vars(one).items():
            if isinstance(value, np.ndarray):
                assert np.array_equal(value, getattr(other, name))
            elif name != "fields":
                assert value == getattr(other, name), name
        assert all(np.array_equal(one.fields[n], other.fields[n]) for n in ("x", "y"))
    assert from_arrays(to_arrays([])) == []


# ---------------------------------------------------------------------------- settings


@pytest.mark.parametrize("method", GRPO_KIN)
def test_each_of_the_names_is_a_row_with_settings(settings, method):
    given = {"batch": {"examples": 8}, "objective": {"rewards": ["exact_match"], "max_completion_length": 8}}
    config = configure(settings, given, method=method)
    for name, value in METHODS[method].settings["objective"].items():
        assert getattr(config.objective, name) == value
    assert config.evaluation.metric_for_best_model == "reward"


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"num_generations": 1}, "at least 2"),
        ({"num_generations": 3}, "no whole number of groups"),
        ({"max_completion_length": 64}, "no room for a prompt"),
        ({"kl_estimator": "k1", "beta": 0.1}, "mean zero"),
        ({"kl_in": "reward", "beta": 0.1}, "use k1"),
        ({"kl_in": "reward", "kl_estimator": "k1", "beta": 0.0}, "takes nothing off"),
        ({"delta": 1.1}, "not above 1"),
        ({"importance_sampling_level": "sequence", "loss_type": "dapo"}, "loss_type=grpo"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"rollout_correction": "sequence"}, "token_truncate"),
        ({"reward_funcs": ["x"]}, "objective.rewards"),
        ({"steps_per_generation": 2}, "num_mini_batches"),
        ({"rewards": ["exact_match", "exact_match"]}, "twice"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, changed, text):
    values = {"rewards": ["exact_match"], "max_completion_length": 8, "num_generations": 4, **changed}
    with pytest.raises(ConfigError, match=text):
        configure(settings, {"objective": values}, method="grpo")


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"batch": {"examples": None, "tokens": 64}}, "use batch.examples"),
        ({"data": {"streaming": True}}, "data.streaming"),
        ({"optim": {"fused_backward": True}, "clipping": "none"}, "fused_backward"),
        ({"evaluation": {"generate": 2}}, "rewards score the answers"),
        ({"evaluation": {"metric_for_best_model": "loss"}}, "use reward"),
        ({"schedule": {"kind": "reduce_lr_on_plateau"}, "evaluation": {"every": 2}}, "schedule.metric"),
        ({"data": {"format": "text"}}, "data.format=text"),
    ],
    ids=str,
)
def test_what_does_not_go_with_rollouts_is_refused(settings, changed, text):
    given = {"objective": {"rewards": ["exact_match"], "max_completion_length": 8, "num_generations": 2}}
    with pytest.raises(ConfigError, match=text):
        configure(settings, given, changed, method="grpo")
