"""Bottleneck adapters: where they stand in each family, what they compute, how many numbers they have."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, LLAMA, make_model
from torch import nn

from luthier.surgery import Adapter, adapters, adapters_off, trainable
from luthier.trainable import Bottleneck

ENDS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"), "qwen3": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma3": ("self_attn.o_proj", "mlp.down_proj"), "phi": ("self_attn.dense", "mlp.fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_it_stands_at_the_ends_of_sublayers(family, placement):
    model = make_model(family)
    Bottleneck(placement=placement).apply(model)
    found = [name for name, _ in adapters(model)]
    wanted = ENDS[family] if placement == "houlsby" else ENDS[family][1:]
    assert len(found) == 2 * len(wanted)
    assert all(name.endswith(wanted) for name in found)


def test_the_count_of_the_paper():
    """arXiv:1902.00751, section 2.1: 2 m d + d + m parameters each, two in every layer."""
    model = make_model("llama")
    Bottleneck(bottleneck_size=7).apply(model)
    d, m = 32, 7
    assert sum(p.numel() for p in trainable(model).values()) == 2 * 2 * (2 * m * d + d + m)


@pytest.mark.parametrize(
    ("f", "middle"), [("relu", (2.0, 0.0)), ("tanh", (0.9640276, -0.7615942)), ("silu", (1.7615942, -0.2689414))]
)
def test_hand_worked(f, middle):
    """y = (1, 2); D y + a = (0*1 + 1*2 + 0, -1*1 + 0*2 + 0) = (2, -1); f of it; U = ((1, 1), (0, 2)), b = (0, 1).

    relu: (2, 0) -> U: (2, 0) + b: (2, 1) -> y + it = (3, 3).
    """
    layer = _identity(f)
    with torch.no_grad():
        layer.down.weight.copy_(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
        layer.down.bias.zero_()
        layer.up.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
        layer.up.bias.copy_(torch.tensor([0.0, 1.0]))
    y = torch.tensor([1.0, 2.0])
    a, b = middle
    torch.testing.assert_close(layer(y), y + torch.tensor([a + b, 2 * b + 1]))


def _identity(f: str) -> Adapter:
    from luthier.trainable.bottleneck import Squeeze

    base = nn.Linear(2, 2, bias=False)
    nn.init.eye_(base.weight)
    return Adapter(base, Squeeze(2, 2, f, 0.0))


def test_experts_are_wrapped_as_a_whole():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4)).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        before = model(tokens).logits
        Bottleneck().apply(model)
        assert [name.rpartition(".")[2] for name, _ in adapters(model)] == ["o_proj", "mlp"] * 2
        assert torch.equal(model(tokens).logits, before)
        for p in trainable(model).values():
            p.add_(torch.randn_like(p) * 0.1)
        assert (model(tokens).logits - before).abs().max() > 1e-2
        with adapters_off(model):
            assert torch.equal(model(tokens).logits, before)


def test_the_cache_changes_no_answer():
    model = make_model("llama")
    Bottleneck().apply(model)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(torch.randn_like(p) * 0.1)
    tokens = torch.arange(5, 12)[None]
    with_cache, without = (
        model.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    )
    assert torch.equal(with_cache, without)
