"""Honest gain: figures against numbers worked out by hand and against scikit-learn-free references."""

import math

import numpy as np
import pytest
import torch
from conftest import make_model

from luthier.batch import Batch, Document
from luthier.evaluate import Answer, compare, interval, is_json, summary
from luthier.logprobs import Head, nll_sum, scored
from luthier.models import network


def answers(*exact):
    return [Answer(i, "q", "{}" if e else '{"a": 1}', "{}") for i, e in enumerate(exact)]


def test_exact_match_and_its_gain():
    base, tuned = answers(0, 0, 0, 1), answers(1, 1, 0, 1)
    found = compare(base, tuned)
    assert (found["base"]["exact_match"], found["tuned"]["exact_match"], found["gain"]) == (0.25, 0.75, 0.5)
    assert found["tuned"]["valid_json"] == 1.0
    low, high = found["gain_interval"]
    assert low <= 0.5 <= high
    with pytest.raises(AssertionError):
        compare(base, tuned[:3])


def test_the_bootstrap_interval_covers_as_the_normal_one_does():
    values = np.random.default_rng(0).random(400) < 0.9
    low, high = interval(values.astype(float))
    mean, error = values.mean(), values.std() / math.sqrt(400)
    assert abs(low - (mean - 1.96 * error)) < 0.005
    assert abs(high - (mean + 1.96 * error)) < 0.005
    assert interval([1.0] * 5) == (1.0, 1.0)


def test_answers_need_not_be_json():
    assert "valid_json" not in summary([Answer(0, "", "yes indeed", "{}")])
    assert is_json("[1]")
    assert not is_json("{oops")


def test_token_accuracy_and_loss_by_hand():
    """Two tokens, logits (0, ln 3): the likelier has probability 3/4, so the losses are -ln 3/4 and -ln 1/4."""
    head = torch.nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[0.0], [math.log(3)]])
    hidden, targets = torch.ones(2, 1), torch.tensor([1, 0])
    logprobs, hits = scored(hidden, Head(head), targets)
    assert logprobs.tolist() == pytest.approx([math.log(0.75), math.log(0.25)])
    assert hits.tolist() == [True, False]
    total = nll_sum(hidden, Head(head), targets, torch.tensor([1.0, 2.0]))
    assert total.item() == pytest.approx(-math.log(0.75) - 2 * math.log(0.25))


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False])
def test_chunked_loss_and_gradients_equal_autograd(scale, softcap, bias, monkeypatch):
    from luthier import logprobs

    monkeypatch.setitem(logprobs.CHUNK_BYTES, "cpu", 4 * 11 * 3)  # chunks of three rows, of ten
    torch.manual_seed(0)
    module = torch.nn.Linear(5, 11, bias=bias)
    head = Head(module, scale, softcap)
    targets, weights = torch.randint(11, (10,)), torch.rand(10)
    grads = []
    for chunked in (True, False):
        hidden = torch.randn(10, 5, generator=torch.Generator().manual_seed(1)).mul_(3).requires_grad_()
        module.zero_grad()
        if chunked:
            total = nll_sum(hidden, head, targets, weights)
        else:
            total = (torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none") * weights).sum()
        (total * 0.7).backward()
        grads.append([total.detach(), hidden.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_wrapped_head_takes_the_general_path():
    head = Head(torch.nn.Sequential(torch.nn.Linear(5, 11)))
    assert not head.linear
    hidden = torch.randn(4, 5, requires_grad=True)
    targets, weights = torch.randint(11, (4,)), torch.ones(4)
    total = nll_sum(hidden, head, targets, weights)
    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    torch.testing.assert_close(total, expected)


def test_families_that_cannot_be_packed_say_why():
    net = network.Network(make_model("llama"))
    net.model.config.layer_types = ["chunked_attention", "full_attention"]
    reason = network.prepare(net, "auto")
    assert reason is not None
    assert "chunked_attention" in reason
    assert not net.packed
    hidden = net.hidden(
        Batch.pack([Document(np.arange(5, dtype=np.int32), np.r_[0, np.ones(4)].astype(np.float32), 0)])
    )
    assert hidden.shape == (4, 32)  # the last token is a target only
