"""IA3 by hand, and against PEFT: outputs and gradients from the same values."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, make_model
from test_parity import assert_equal_losses, packed_network
from torch import nn

from luthier.surgery import Adapter, adapters, trainable
from luthier.trainable import IA3
from luthier.trainable.ia3 import Scale


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_peft(family):
    from peft import IA3Config, get_peft_model

    net = packed_network(family)
    config = IA3()
    config.apply(net.model)
    placed = config.placed(net.model)
    theirs = get_peft_model(
        make_model(family),
        IA3Config(target_modules=placed["target_modules"], feedforward_modules=placed["feedforward_modules"],
                  fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM"),
    )  # fmt: skip
    wrapped = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "ia3_l")}
    ours = dict(adapters(net.model))
    assert set(ours) == set(wrapped)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, adapter in ours.items():
            adapter.ia3_l.normal_(1, 0.3)
            wrapped[name].ia3_l["default"].copy_(adapter.ia3_l)
    assert_equal_losses(net, theirs)
    for name, adapter in ours.items():
        gradient = wrapped[name].ia3_l["default"].grad
        torch.testing.assert_close(adapter.ia3_l.grad, gradient, rtol=2e-3, atol=5e-5, msg=name)


def test_the_count_of_the_paper():
    """arXiv:2205.05638, section 3.3: d_k + d_v + d_ff numbers in each layer."""
    model = make_model("llama")  # two layers, keys and values of 2 heads of width 8, a middle of 48
    IA3().apply(model)
    assert sum(p.numel() for p in trainable(model).values()) == 2 * (16 + 16 + 48)


@pytest.mark.parametrize(("inputs", "expected"), [(False, [2 * (3 + 1), 5 * (7 + 1)]), (True, [1 * 2 + 2 * 5 + 1] * 2)])
def test_hand_worked(inputs, expected):
    """W = ((1, 2), (3, 4)), b = (0, 1) or (1, 1), x = (1, 1), l = (2, 5).

    On outputs: l * (W x + b) with b = (1, 1): (2 (3 + 1), 5 (7 + 1)). On inputs: W (l * x) + b, here with both rows
    (1, 2): 1 * 2 + 2 * 5 + 1 = 13 in both. Merged weights give the same.
    """
    base = nn.Linear(2, 2)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0], [1.0, 2.0] if inputs else [3.0, 4.0]]))
        base.bias.fill_(1)
    layer = Adapter(base, Scale(inputs))
    with torch.no_grad():
        layer.ia3_l.view(-1).copy_(torch.tensor([2.0, 5.0]))
    x = torch.ones(2)
    torch.testing.assert_close(layer(x), torch.tensor(expected, dtype=torch.float32))
    merged = layer.rule.merge(layer, {"weight": base.weight, "bias": base.bias})
    torch.testing.assert_close(merged["weight"] @ x + merged["bias"], layer(x))
