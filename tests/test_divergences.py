"""Losses of distillation: by hand, against PyTorch and TRL, with gradients, and with the teacher's likeliest tokens."""

from __future__ import annotations

from math import log

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from luthier import logprobs
from luthier.batch import Batch
from luthier.errors import ModelError
from luthier.logprobs import Head
from luthier.objectives import Distillation
from luthier.objectives.distillation import HiddenStates
from luthier.objectives.divergences import (
    at_temperature,
    divergence,
    entropy,
    jensen_shannon,
    kl,
    most_missing,
    top_k,
    with_rest,
)
from luthier.objectives.hidden_states import HiddenStateMatching, distance, layer_pairs

P, Q = torch.tensor([[1 / 2, 1 / 4, 1 / 4]]).log(), torch.tensor([[1 / 8, 3 / 4, 1 / 8]]).log()  # teacher, student
KINDS = ("forward_kl", "reverse_kl", "jsd")


def test_kullback_leibler_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/8, 3/4, 1/8).

    KL(p, q) = 1/2 log 4 + 1/4 log 1/3 + 1/4 log 2 = 5/4 log 2 - 1/4 log 3
    KL(q, p) = 1/8 log 1/4 + 3/4 log 3 + 1/8 log 1/2 = 3/4 log 3 - 3/8 log 2
    H(p) = 1/2 log 2 + 2 x 1/4 log 4 = 3/2 log 2; without it, "forward KL" would be 11/4 log 2 - 1/4 log 3.
    """
    assert kl(P, Q).item() == pytest.approx(5 / 4 * log(2) - 1 / 4 * log(3), rel=1e-6)
    assert kl(Q, P).item() == pytest.approx(3 / 4 * log(3) - 3 / 8 * log(2), rel=1e-6)
    assert entropy(P).item() == pytest.approx(3 / 2 * log(2), rel=1e-6)
    assert kl(P, P).item() == 0
    assert divergence("forward_kl", P, Q).item() == kl(P, Q).item()
    assert divergence("reverse_kl", P, Q).item() == kl(Q, P).item()


def test_jensen_shannon_by_hand():
    """With beta 1/2 the mixture is m = (5/16, 1/2, 3/16):

    KL(p, m) = 1/2 log 8/5 + 1/4 log 1/2 + 1/4 log 4/3, KL(q, m) = 1/8 log 2/5 + 3/4 log 3/2 + 1/8 log 2/3.
    With beta 1/4 it is (7/32, 5/8, 5/32): the teacher has a quarter of it.
    """
    to_p = 1 / 2 * log(8 / 5) + 1 / 4 * log(1 / 2) + 1 / 4 * log(4 / 3)
    to_q = 1 / 8 * log(2 / 5) + 3 / 4 * log(3 / 2) + 1 / 8 * log(2 / 3)
    assert jensen_shannon(P, Q, 0.5).item() == pytest.approx(to_p / 2 + to_q / 2, rel=1e-5)
    to_p = 1 / 2 * log(16 / 7) + 1 / 4 * log(2 / 5) + 1 / 4 * log(8 / 5)
    to_q = 1 / 8 * log(4 / 7) + 3 / 4 * log(6 / 5) + 1 / 8 * log(4 / 5)
    assert jensen_shannon(P, Q, 0.25).item() == pytest.approx(to_p / 4 + 3 / 4 * to_q, rel=1e-5)
    # Its ends are the two divergences (arXiv:2306.13649, section 3.1), each divided by the vanishing weight.
    one, other = P.double(), Q.double()
    assert (jensen_shannon(one, other, 1e-6) / 1e-6).item() == pytest.approx(kl(one, other).item(), rel=1e-4)
    assert (jensen_shannon(one, other, 1 - 1e-6) / 1e-6).item() == pytest.approx(kl(other, one).item(), rel=1e-4)


def some_logits(n: int = 7, v: int = 50):
    torch.manual_seed(0)
    return torch.randn(n, v) * 3, torch.randn(n, v) * 3


def test_as_in_pytorch_and_trl(monkeypatch):
    """TRL's `generalized_jsd_loss` gives KL(teacher, student) for beta 0 and KL(student, teacher) for beta 1
    themselves, not their limit, which is 0; and it never multiplies by temperature^2."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    teacher, student = some_logits()
    for temperature in (1.0, 2.5):
        p, q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
        torch.testing.assert_close(kl(p, q), F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
        cases = (("forward_kl", 0.5, 0), ("reverse_kl", 0.5, 1), ("jsd", 0.5, 0.5), ("jsd", 0.1, 0.1))
        for kind, beta, theirs in cases:
            wanted = GKDTrainer.generalized_jsd_loss(
                student[None], teacher[None], beta=theirs, temperature=temperature, reduction="sum"
            )
            torch.testing.assert_close(divergence(kind, p, q, beta).sum(), wanted)


# ---------------------------------------------------------------------------- the likeliest tokens and the rest


def test_the_likeliest_token_and_the_rest_by_hand():
    """With token 0 alone, p is (1/2, 1/2) and q (1/8, 7/8): KL = 1/2 log 4 + 1/2 log 4/7 = 1/2 log 16/7.

    KL of all three is greater by 1/2 KL((1/2, 1/2), (6/7, 1/7)) = 1/4 log 7/12 + 1/4 log 7/2, and at most by
    1/2 (log 7/8 - log 1/8) = 1/2 log 7.
    """
    ids, kept = top_k(P, 1, 1.0)
    assert ids.tolist() == [[0]]
    torch.testing.assert_close(kept[:, :2], torch.tensor([[1 / 2, 1 / 2]]).log())
    coarse = kl(at_temperature(kept, 1), with_rest(Q, ids)).item()
    assert coarse == pytest.approx(log(16 / 7) / 2, rel=1e-5)
    gap = log(7 / 12) / 4 + log(7 / 2) / 4
    assert kl(P, Q).item() - coarse == pytest.approx(gap, rel=1e-5)
    assert most_missing(kept[:, 1], Q, ids).item() == pytest.approx(log(7) / 2, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_kept_probabilities_are_those_of_the_whole_vocabulary(temperature):
    """At temperature 1 and at that of the run, the rest included, which no k likeliest logits alone could tell."""
    teacher, student = some_logits()
    ids, kept = top_k(teacher, 5, temperature)
    for t in (1.0, temperature):
        whole = (teacher / t).softmax(-1)
        named = whole.gather(-1, ids)
        found = at_temperature(kept, t).exp()
        torch.testing.assert_close(found, torch.cat([named, 1 - named.sum(-1, keepdim=True)], -1), rtol=1e-4, atol=1e-6)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    for kind in KINDS:  # the divergence is never more than the whole one, and of KL it is known how much less
        whole = divergence(kind, p, q)
        coarse = divergence(kind, at_temperature(kept, 1), with_rest(student, ids))
        assert (coarse <= whole + 1e-5).all()
        assert (coarse < whole - 1e-3).any()
    short = kl(p, q) - kl(at_temperature(kept, 1), with_rest(student, ids))
    assert (short <= most_missing(kept[:, -2], student, ids) + 1e-5).all()


@pytest.mark.parametrize("k", [50, 80])
def test_all_tokens_kept_are_the_whole_loss(k):
    teacher, student = some_logits()
    student.requires_grad_()
    for kind in KINDS:
        for t in (1.0, 2.0):
            ids, kept = top_k(teacher, k, t)
            assert ids.shape == (7, 50)
            whole = divergence(kind, (teacher / t).log_softmax(-1), (student / t).log_softmax(-1))
            found = divergence(kind, at_temperature(kept, t), with_rest(student / t, ids))
            torch.testing.assert_close(found, whole)
            (wanted,) = torch.autograd.grad(whole.sum(), student)
            (gradient,) = torch.autograd.grad(found.sum(), student)
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
            assert most_missing(kept[:, -2], student.detach(), ids).tolist() == [0] * 7


def test_a_rest_that_is_next_to_nothing_keeps_its_gradient():
    """1 - q(named) would be 0, and its logarithm's gradient without end."""
    teacher, student = torch.tensor([[0.0, -40.0, -41.0]]), torch.tensor([[0.0, -50.0, -60.0]], requires_grad=True)
    ids, kept = top_k(teacher, 1, 1.0)
    found = kl(with_rest(student, ids), at_temperature(kept, 1)).sum()
    found.backward()
    assert found.isfinite()
    assert student.grad.isfinite().all()
    assert with_rest(student, ids)[0, 1].item() == pytest.approx(-50, abs=1e-3)


# ---------------------------------------------------------------------------- the objective


class Stub:
    """A network whose hidden states are given, with a head of its own."""

    translation = None

    def __init__(self, hidden, layer, cap=None):
        self.states, self.head, self.width = hidden, Head(layer, softcap=cap), layer.out_features
        self.network = self

    def hidden(self, batch):
        return self.states

    def predictions(self, batch, hidden):
        return hidden[batch.trained], batch.targets[batch.trained], batch.weights[batch.trained]


def identity(v: int) -> nn.Linear:
    layer = nn.Linear(v, v, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(v))
    return layer


def batch_of(targets, weights) -> Batch:
    weights = torch.tensor(weights)
    n = len(weights)
    return Batch(torch.zeros(n, dtype=torch.int64), torch.arange(n), (0, n), torch.tensor(targets), weights,
                 weights.nonzero()[:, 0], rows=(0,))  # fmt: skip


def objective_of(teacher, **settings):
    made = Distillation(teacher="it", **settings).build()
    made.teacher = lambda: teacher
    return made


def test_the_loss_of_three_tokens_by_hand():
    """Logits whose softmax at temperature 2 is P and Q: p ~ (16, 4, 4), q ~ (1, 36, 1).

    Tokens 1 and 2 with weights 1 and 0.5 (and 0, which is not learnt): hard losses log 38/36 and log 38. The divergence
    is 4 KL(P, Q) of each. With alpha 1/4 the total is
    1 (1/4 log 38/36 + 3/4 4 KL) + 1/2 (1/4 log 38 + 3/4 4 KL), and the count 1.5: divided once.
    """
    theirs, own = (torch.tensor([x]).log().expand(3, 3) for x in ([16.0, 4.0, 4.0], [1.0, 36.0, 1.0]))
    student, teacher = Stub(own, identity(3)), Stub(theirs, identity(3))
    batch = batch_of([1, 0, 2], [1.0, 0.0, 0.5])
    made = objective_of(teacher, temperature=2.0, alpha=0.25)
    loss = made(student, made.prepare(student, batch))
    hard, soft = [log(38 / 36), log(38)], 4 * kl(P, Q).item()
    assert loss.count.item() == 1.5
    wanted = (hard[0] / 4 + soft * 3 / 4) + (hard[1] / 4 + soft * 3 / 4) / 2
    assert loss.total.item() == pytest.approx(wanted, rel=1e-5)
    assert set(loss.metrics) == set(made.metrics)
    assert loss.metrics["hard_loss"].item() == pytest.approx(hard[0] + hard[1] / 2, rel=1e-5)
    assert loss.metrics["soft_loss"].item() == pytest.approx(1.5 * soft, rel=1e-5)
    assert loss.metrics["agreement"].item() == 0
    # Told at temperature 1, whatever the loss has: p = (2/3, 1/6, 1/6), q = (1/38, 36/38, 1/38).
    at_one = 2 / 3 * log(2 / 3 * 38) + 1 / 6 * log(38 / 36 / 6) + 1 / 6 * log(38 / 6)
    assert loss.metrics["kl"].item() == pytest.approx(1.5 * at_one, rel=1e-5)
    assert loss.metrics["teacher_entropy"].item() == pytest.approx(1.5 * (2 / 3 * log(1.5) + log(6) / 3), rel=1e-5)
    made = objective_of(teacher, temperature=2.0, alpha=0.25, temperature_squared=False)
    loss = made(student, made.prepare(student, batch))
    assert loss.metrics["soft_loss"].item() == pytest.approx(1.5 * soft / 4, rel=1e-5)


@pytest.mark.parametrize("head", ["linear", "capped"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_whole_logits(monkeypatch, kind, head):
    """In chunks that do not divide the length, of hidden states and of the head, kept on disk or not."""
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", {"cpu": 4 * 30 * 4 * 4})  # four rows
    torch.manual_seed(0)
    n, v, t, alpha = 11, 30, 1.5, 0.3
    layer, theirs = nn.Linear(8, v), nn.Linear(6, v)
    cap = 3.0 if head == "capped" else None
    hidden, states = torch.randn(n, 8, requires_grad=True), torch.randn(n, 6)
    batch = batch_of(torch.randint(0, v, (n,)).tolist(), torch.rand(n).tolist())
    student, teacher = Stub(hidden, layer, cap), Stub(states, theirs)

    def gradients(total):
        return torch.autograd.grad(total, [hidden, layer.weight, layer.bias])

    logits, p = student.head(hidden), theirs(states).detach()
    soft = divergence(kind, (p / t).log_softmax(-1), (logits / t).log_softmax(-1), 0.2) * t**2
    hard = F.cross_entropy(logits, batch.targets, reduction="none")
    total = ((alpha * hard + (1 - alpha) * soft) * batch.weights).sum()
    wanted = gradients(total)
    beta = {"beta": 0.2} if kind == "jsd" else {}
    made = objective_of(teacher, divergence=kind, temperature=t, alpha=alpha, **beta)
    loss = made(student, made.prepare(student, batch))
    torch.testing.assert_close(loss.total, total)
    for one, other in zip(gradients(loss.total), wanted):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert theirs.weight.grad is None

    kept = objective_of(teacher, divergence=kind, temperature=t, alpha=alpha, top_k=v, **beta)
    with_kept = Batch(**{**batch.__dict__, "token_fields": kept.ahead(student, batch)})
    kept.teacher = None  # is not asked
    again = kept(student, kept.prepare(student, with_kept))
    torch.testing.assert_close(again.total, total)
    for one, other in zip(gradients(again.total), wanted):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for name in ("kl", "teacher_entropy", "agreement", "hard_loss"):
        torch.testing.assert_close(again.metrics[name], loss.metrics[name], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------- hidden states


def test_distances_of_hidden_states_by_hand():
    """(3, 4) and (4, 3): cosine 24/25, squared differences 1 and 1; (1, 0) and (0, 2): cosine 0, squares 1 and 4."""
    own, theirs = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, 2.0]])
    torch.testing.assert_close(distance("cosine", own, theirs), torch.tensor([1 / 25, 1.0]))
    torch.testing.assert_close(distance("mse", own, theirs), torch.tensor([1.0, 2.5]))


def test_layers_are_spread_over_the_teachers():
    wanted = HiddenStates()  # type: ignore[call-arg]
    assert layer_pairs(wanted, 2, 4) == [(0, 1), (1, 3)]
    assert layer_pairs(wanted, 3, 8) == [(0, 1), (1, 4), (2, 7)]
    assert layer_pairs(wanted, 4, 4) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert layer_pairs(HiddenStates(layers=[[0, 3], [1, 0]]), 2, 4) == [(0, 3), (1, 0)]  # type: ignore[call-arg]
    for pair, whose in (([2, 0], "student"), ([0, 4], "teacher"), ([-1, 0], "student")):
        with pytest.raises(ModelError, match=f"the {whose} has the layers"):
            layer_pairs(HiddenStates(layers=[pair]), 2, 4)  # type: ignore[call-arg]


def test_a_map_is_learnt_where_widths_differ():
    torch.manual_seed(0)
    wanted = HiddenStates(loss="mse")  # type: ignore[call-arg]
    assert not list(HiddenStateMatching(wanted, [(0, 0)], 4, 4).parameters())
    made = HiddenStateMatching(wanted, [(0, 0), (1, 1)], 4, 6)
    own, theirs = [torch.randn(3, 4) for _ in range(2)], [torch.randn(3, 6) for _ in range(2)]
    found = made(own, theirs)
    each = [((o @ m.weight.t() - t) ** 2).mean(-1) for o, t, m in zip(own, theirs, made.maps)]
    torch.testing.assert_close(found, (each[0] + each[1]) / 2)
    found.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in made.parameters())
