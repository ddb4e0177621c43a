"""DoRA: numbers worked by hand, parity with PEFT, its norm without the sum of weights, saved and resumed."""

import json

import pytest
import torch
from conftest import FAMILIES, make_model
from test_parity import assert_equal_losses, documents, packed_network
from test_train import QUIET, finished, in_two_parts
from torch import nn

from luthier import configure, train
from luthier.batch import Batch
from luthier.errors import ModelError
from luthier.surgery import Adapter, QuantisedLinear, adapters, adapters_off, dense, merged_state, trainable
from luthier.trainable import DoRA, LoRA
from luthier.trainable.decomposed import Decomposed


def linear(weight, bias=None) -> nn.Linear:
    weight = torch.tensor(weight)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(torch.tensor(bias))
    return made.requires_grad_(False)


def disturb(model, size=0.2) -> None:
    """Matrices anywhere, and lengths that are not those of the rows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter) * size)


def test_gradients_worked_by_hand():
    """The example in Decomposed's docstring; the norm is a constant, so B's first row has 2 and not -0.24."""
    layer = Adapter(linear([[3.0, 0.0], [0.0, 2.0]], [7.0, -1.0]), Decomposed(1, 1.0))
    with torch.no_grad():
        layer.lora_A.copy_(torch.tensor([[0.0, 1.0]]))
        layer.lora_B.copy_(torch.tensor([[4.0], [0.0]]))
        layer.lora_magnitude_vector.copy_(torch.tensor([10.0, 2.0]))
    x = torch.ones(1, 2, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, torch.tensor([[14.0 + 7.0, 2.0 - 1.0]]))
    y.sum().backward()
    torch.testing.assert_close(layer.lora_magnitude_vector.grad, torch.tensor([1.4, 1.0]))
    torch.testing.assert_close(layer.lora_B.grad, torch.tensor([[2.0], [1.0]]))
    torch.testing.assert_close(layer.lora_A.grad, torch.tensor([[8.0, 8.0]]))
    torch.testing.assert_close(x.grad, torch.tensor([[6.0, 8.0 + 2.0]]))  # [1, 1] times [[6, 8], [0, 2]]
    torch.testing.assert_close(dense(layer)["weight"], torch.tensor([[6.0, 8.0], [0.0, 2.0]]))


def test_a_gradient_through_the_norm_would_differ():
    w, a, b, m = (
        torch.tensor(t)
        for t in ([[3.0, 0.0], [0.0, 2.0]], [[0.0, 1.0]], [[4.0], [0.0]], [10.0, 2.0])
    )  # fmt: skip
    b.requires_grad_()
    v = w + b @ a
    (m[:, None] * v / v.norm(dim=1, keepdim=True) @ torch.ones(2)).sum().backward()
    torch.testing.assert_close(b.grad, torch.tensor([[-0.24], [0.0]]))


def theirs_and_ours(family, **settings):
    """PEFT's model and ours with the same values, somewhere away from the start; DoRA's layers by name."""
    from peft import LoraConfig, get_peft_model

    net = packed_network(family)
    DoRA(r=4, lora_alpha=6, **settings).apply(net.model)
    disturb(net.model)
    theirs = get_peft_model(
        make_model(family),
        LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM",
                   fan_in_fan_out=family == "gpt2", **settings),
    )  # fmt: skip
    ours = dict(adapters(net.model))
    wrapped = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert set(ours) == set(wrapped)
    pairs = {}
    for name, adapter in ours.items():
        sides = [wrapped[name].lora_A, wrapped[name].lora_B, wrapped[name].lora_magnitude_vector]
        pairs[name] = list(zip((adapter.lora_A, adapter.lora_B, adapter.lora_magnitude_vector),
                               (side["default"].weight for side in sides)))  # fmt: skip
        with torch.no_grad():
            for mine, other in pairs[name]:
                other.copy_(mine)
    return net, theirs, pairs


@pytest.mark.parametrize("family", FAMILIES)  # phi and gpt2 have biases, gpt2 keeps its weights as [in, out]
@pytest.mark.parametrize("rslora", [False, True])
def test_dora_equals_peft(family, rslora):
    net, theirs, pairs = theirs_and_ours(family, use_rslora=rslora)
    assert_equal_losses(net, theirs)
    for name, sides in pairs.items():
        for mine, other in sides:
            scale = other.grad.abs().max().item()
            torch.testing.assert_close(mine.grad, other.grad, rtol=2e-3, atol=1e-4 * scale + 1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_dora_changes_nothing(family):
    net = packed_network(family)
    batch = Batch.pack(documents())
    with torch.no_grad():
        before = net.hidden(batch)
        DoRA(r=4).apply(net.model)
        torch.testing.assert_close(net.hidden(batch), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "pissa"}, {"zero_init": "lora_A"}])
def test_merged_equals_unmerged_and_off_equals_base(family, settings):
    """With a bias, too: it stands outside of what is turned and lengthened."""
    net, base, merged = (packed_network(family) for _ in range(3))
    DoRA(r=4, **settings).apply(net.model)
    disturb(net.model, 0.1)
    batch = Batch.pack(documents())
    _, extra = merged.model.load_state_dict(merged_state(net.model), strict=False)
    assert not extra
    with torch.no_grad():
        tuned = net.hidden(batch)
        torch.testing.assert_close(merged.hidden(batch), tuned, rtol=1e-4, atol=1e-4)
        assert (tuned - base.hidden(batch)).abs().max() > 1e-2
        with adapters_off(net.model):
            assert torch.equal(net.hidden(batch), base.hidden(batch))


def layer_of(outputs=300, inputs=200, r=8, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    base = nn.Linear(inputs, outputs).to(dtype).requires_grad_(False)
    layer = Adapter(base, Decomposed(r, 2.0))
    with torch.no_grad():
        layer.lora_B.normal_(std=0.05)
        layer.lora_magnitude_vector.mul_(1 + 0.2 * torch.rand(outputs))
    return layer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-4)])
def test_the_norm_is_that_of_the_sum(dtype, tolerance):
    """Against float64. In bfloat16 the matrices are rounded as the product rounds them; a norm that is rounded to
    bfloat16 itself, as PEFT's is, would be wrong by up to 2 ** -9, which is 2e-3."""
    layer = layer_of(dtype=dtype)
    down, up = layer.lora_A.to(dtype), layer.lora_B.to(dtype)
    exact = (layer.base.weight.double() + 2.0 * up.double() @ down.double()).norm(dim=1)
    moved = (exact / layer.base.weight.double().norm(dim=1) - 1).abs().max()
    assert moved > 0.05, "the update has to matter"
    found = layer.rule.lengths(layer, down, up)
    assert found.dtype == torch.float32
    assert ((found.double() - exact) / exact).abs().max() < tolerance


def test_a_row_of_zeros_stays_finite():
    layer = Adapter(linear([[0.0, 0.0], [1.0, 2.0]]), Decomposed(1, 1.0))
    y = layer(torch.ones(3, 2))
    y.sum().backward()
    assert torch.equal(y, torch.tensor([[0.0, 3.0]]).expand(3, 2))
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


class Halves(QuantisedLinear):
    """A weight that is kept as numbers of 1/64."""

    def __init__(self, plain: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.dtype = plain.in_features, plain.out_features, torch.float32
        self.register_buffer("codes", (plain.weight * 64).round().to(torch.int8))
        self.bias = plain.bias

    def dequantize(self, dtype):
        return self.codes.to(dtype) / 64

    def forward(self, x):
        return torch.nn.functional.linear(x, self.dequantize(x.dtype), self.bias)


@pytest.mark.parametrize("rule", [Decomposed(4, 2.0), Decomposed(4, 2.0, init="pissa")])
def test_over_a_quantised_layer(rule):
    torch.manual_seed(0)
    layer = Adapter(Halves(nn.Linear(24, 16)), rule)
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), layer.base(x), rtol=1e-5, atol=1e-5)
    disturb(layer, 0.1)
    merged = dense(layer)
    torch.testing.assert_close(layer(x), x @ merged["weight"].t() + merged["bias"], rtol=1e-4, atol=1e-5)
    layer(x).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))


def test_stacked_on_a_lora_that_is_switched_off():
    """The norm is that of the weight which is there: of a base that is adapted itself, with or without it."""
    torch.manual_seed(0)
    lower = Adapter(nn.Linear(12, 10), LoRA(r=2).rule("x", nn.Linear(12, 10)), "first")
    disturb(lower, 0.3)
    layer = Adapter(lower, Decomposed(3, 2.0), "second")
    disturb(layer, 0.1)
    x = torch.randn(4, 12)
    for names in ([], ["first"], ["second"]):
        with adapters_off(layer, names), torch.no_grad():
            merged = dense(layer)
            torch.testing.assert_close(layer(x), x @ merged["weight"].t() + merged["bias"], rtol=1e-4, atol=1e-5)


def test_a_share_lies_between_the_base_and_the_whole():
    layer, x = layer_of(20, 12, 3), torch.randn(4, 12)
    with torch.no_grad():
        whole, base = layer(x), layer.base(x)
        layer.share = 0.25
        torch.testing.assert_close(layer(x), base + 0.25 * (whole - base), rtol=1e-5, atol=1e-5)
        merged = dense(layer)
        torch.testing.assert_close(layer(x), x @ merged["weight"].t() + merged["bias"], rtol=1e-4, atol=1e-5)


def test_compiled_is_eager_without_a_break():
    layer, x = layer_of(20, 12, 3), torch.randn(4, 12, requires_grad=True)
    found = []
    for module in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        x.grad = None
        y = module(x)
        (y * torch.arange(20)).sum().backward()
        found.append([y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)])
    for mine, other in zip(*found):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_update_alone():
    """What the base gives is never dropped: y is a multiple of it wherever A's inputs are all dropped."""
    torch.manual_seed(0)
    layer = Adapter(linear([[1.0, 0.0], [0.0, 1.0]]), Decomposed(1, 1.0, dropout=0.5))
    with torch.no_grad():
        layer.lora_B.fill_(1.0)
    x = torch.ones(64, 2)
    gain = (layer.lora_magnitude_vector / layer.rule.lengths(layer, layer.lora_A, layer.lora_B)).detach()
    dropped = ((layer.train()(x) - gain).abs() < 1e-6).all(1)
    assert 5 < dropped.sum() < 30, "a quarter of the rows"
    whole = x @ (torch.eye(2) + layer.lora_B @ layer.lora_A).t() * gain
    torch.testing.assert_close(layer.eval()(x), whole)


def test_the_papers_share_of_weights_that_move():
    """Table 1 of arXiv:2402.09353: of LLaMA 7B, 0.83% with LoRA and 0.84% with DoRA, both with r = 32 on q, k, v, up
    and down."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for cls, share in ((LoRA, "0.83%"), (DoRA, "0.84%")):
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig())  # the defaults are the 7B's
        cls(r=32, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]).apply(model)
        moving = sum(p.numel() for p in trainable(model).values())
        assert f"{moving / sum(p.numel() for p in model.parameters()):.2%}" == share


def test_one_number_more_than_lora_for_each_output():
    """r (n + m) for LoRA, and m more for DoRA, of a layer with n inputs and m outputs."""
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    for cls, more in ((LoRA, 0), (DoRA, 1)):
        model = make_model()
        cls(r=4).apply(model)
        counted = sum(p.numel() for p in trainable(model).values())
        assert counted == 2 * sum(4 * (n + m) + more * m for n, m in shapes)


def test_experts_are_refused_by_name():
    from test_lora import mixtral

    with pytest.raises(ModelError, match=r"experts.gate_up_proj\), which DoRA cannot adapt.*exclude_modules"):
        DoRA().apply(mixtral())
    model = mixtral()
    DoRA(exclude_modules=["*experts*"]).apply(model)
    assert {name.rpartition(".")[2] for name, _ in adapters(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_settings_come_back_from_pefts():
    settings = DoRA(r=8, lora_alpha=4, use_rslora=True, rank_pattern={"q_proj": 2})
    values = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], **settings.peft()}
    assert values["use_dora"] is True
    assert DoRA.reads(values)
    assert not LoRA.reads(values)
    expected = settings.model_copy(update={"target_modules": ["q_proj", "v_proj"], "target_parameters": []})
    assert DoRA.from_peft(values) == expected
    plain = {**values, "use_dora": False}
    assert LoRA.reads(plain)
    assert not DoRA.reads(plain)


def test_stopped_and_resumed_and_exported(settings, tmp_path):
    """Bit-exact over a stop; the export is checked by PEFT and by transformers in a fresh process."""
    from luthier.export import export

    extra = {"checkpoint": {"every": 2}, "data": {"validation": 6},
             "trainable": {"r": 4, "lora_dropout": 0.1, "init_lora_weights": "pissa_niter_4"}}  # fmt: skip
    whole = configure(settings, extra, method="dora")
    assert whole.trainable == DoRA(r=4, lora_dropout=0.1, init_lora_weights="pissa_niter_4")
    train(whole, QUIET)
    parted = configure(settings, extra, {"output_dir": str(tmp_path / "parted")}, method="dora")
    in_two_parts(parted, 3)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")
    for kind in ("adapter", "merged"):
        compared = export(tmp_path / "run", tmp_path / kind, kind)
        assert compared["largest_difference"] < 1e-4
        assert compared["difference_to_base"] > 1e-2
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    twice = (written["use_dora"], written["r"], written["lora_alpha"])
    assert twice == (True, 8, 64), "PiSSA is a LoRA of twice the rank"
