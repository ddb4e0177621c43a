"""Quantisation-aware training: torchao's numbers, merged weights rounded, the honest base, real integers in files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from safetensors.torch import load_file
from test_parity import documents
from transformers import AutoModelForCausalLM

from luthier import checkpoint, configure, steps, train
from luthier.assemble import restore
from luthier.batch import Batch
from luthier.errors import ConfigError, ExportError, ModelError
from luthier.explain import explain
from luthier.models import network
from luthier.monitor import Console
from luthier.objectives import NextToken
from luthier.parallel import Parallel
from luthier.parallel.layers import checkpoint_activations
from luthier.precision import QAT, ROUNDING, converted, qat
from luthier.precision.rounding import GRIDS, on_grid, pack, rounded_activations, rounded_weight, scales, unpack
from luthier.surgery import Adapter, adapters, adapters_off, dense, freeze, merged_state
from luthier.trainable import Full, LoRA

QUIET = Console(quiet=True)
INT4, INT8, FP8 = "int8-dynamic-act-int4-weight", "int8-dynamic-act-int8-weight", "fp8"
CASES = [(INT4, 8), (INT4, -1), (INT8, -1), (INT8, 16), ("int4-weight-only", 8), (FP8, -1)]
METHODS = {"qat": {}, "qat-lora": {"trainable": {"r": 4}}}


# ---------------------------------------------------------------------------- numbers


def test_by_hand():
    """A group of largest magnitude 7.5 has scale 1: 7.5 rounds to 8 and is cut to 7, and gets no gradient."""
    weight = torch.tensor([[7.5, -7.5, 1.2, -0.4]], requires_grad=True)
    rounded = rounded_weight(weight, GRIDS[INT4], 4, torch.float32)
    assert rounded.tolist() == [[7, -8, 1, 0]]
    rounded.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert weight.grad.tolist() == [[0, 2, 3, 4]]
    # From -1 to 4.1 in 255 steps of 0.02: zero is at -128 + 50, and 0.031 is 1.55 steps.
    x = torch.tensor([[-1.0, 4.1, 0.031]], requires_grad=True)
    rounded = rounded_activations(x, GRIDS[INT4])
    torch.testing.assert_close(rounded, torch.tensor([[-1.0, 4.1, 0.04]]))
    rounded.sum().backward()
    assert x.grad.tolist() == [[1, 1, 1]]


def theirs(scheme, group):
    """torchao's fake quantisers of weights and activations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization.granularity import PerRow
        from torchao.quantization.qat import Float8FakeQuantizeConfig, IntxFakeQuantizeConfig
        from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase
    if scheme == FP8:
        both = Float8FakeQuantizeConfig(torch.float8_e4m3fn, PerRow())
        return FakeQuantizerBase.from_config(both), FakeQuantizerBase.from_config(both)
    where = {"granularity": "per_channel"} if group < 0 else {"group_size": group}
    dtype = torch.int8 if scheme == INT8 else torch.int4
    weights = FakeQuantizerBase.from_config(IntxFakeQuantizeConfig(dtype, is_symmetric=True, **where))
    if scheme == "int4-weight-only":
        return weights, torch.nn.Identity()
    return weights, FakeQuantizerBase.from_config(IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False))


@pytest.mark.parametrize(("scheme", "group"), CASES)
def test_values_are_torchaos(scheme, group):
    torch.manual_seed(0)
    weight, x = torch.randn(24, 32), torch.randn(2, 7, 32) * torch.linspace(0.01, 30, 7)[:, None] + 1
    weights, activations = theirs(scheme, group)
    assert torch.equal(rounded_weight(weight, GRIDS[scheme], group, torch.float32), weights(weight))
    assert torch.equal(rounded_activations(x, GRIDS[scheme]), activations(x))
    assert scheme == "int4-weight-only" or not torch.equal(activations(x), x)


@pytest.mark.parametrize(("scheme", "group"), CASES)
def test_a_layer_and_its_gradients_are_torchaos(scheme, group):
    """Of float8, torchao 0.18 casts the gradient itself to float8, in which small ones vanish; there the oracle is the
    estimator's definition: no value is out of range, so that gradients pass as if nothing had been rounded."""
    torch.manual_seed(1)
    layer = torch.nn.Linear(32, 24)
    ours = Adapter(layer, qat.FakeQuantised(QAT(scheme=scheme, group_size=group)), ROUNDING)
    x = torch.randn(2, 7, 32, requires_grad=True)
    y = ours(x)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, layer.weight, layer.bias], upstream)
    weights, activations = theirs(scheme, group)
    if scheme == FP8:
        rounding = weights
        weights = activations = lambda t: t + (rounding(t) - t).detach()
    expected = F.linear(activations(x), weights(layer.weight), layer.bias)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(found, torch.autograd.grad(expected, [x, layer.weight, layer.bias], upstream)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_words_are_those_of_compressed_tensors():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    values = torch.randint(-8, 8, (5, 64))
    assert torch.equal(pack(values), pack_to_int32(values.to(torch.int8), 4))
    assert pack(torch.tensor([[-7, -8, -8, -8, -8, -8, -8, 7]])).tolist() == [[-(2**28) + 1]]  # 0xF0000001
    for inputs in (64, 61):
        assert torch.equal(unpack(pack(values[:, :inputs]), inputs), values[:, :inputs].to(torch.int8))


# ---------------------------------------------------------------------------- layers


def rounded_model(trainable, config, family="llama"):
    model = make_model(family)
    trainable.apply(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    config.apply(model)
    return model.train()


def test_it_is_the_merged_weight_that_is_rounded():
    config = QAT(group_size=8)
    model = rounded_model(LoRA(r=4), config)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(3, 32, requires_grad=True)
    lora = layer.base
    merged = lora.base.weight + lora.rule.scaling * lora.lora_B @ lora.lora_A
    grid = GRIDS[INT4]
    expected = F.linear(rounded_activations(x, grid), rounded_weight(merged, grid, 8, torch.float32))
    y = layer(x)
    assert torch.equal(y, expected)
    wanted = [x, lora.lora_A, lora.lora_B]
    for one, other in zip(*(torch.autograd.grad(out.square().sum(), wanted) for out in (y, expected))):
        torch.testing.assert_close(one, other)
    assert lora.base.weight.grad is None


@pytest.mark.parametrize("trainable", [Full(), LoRA(r=4)], ids=lambda t: t.kind)
def test_all_linear_layers_of_the_blocks_and_no_others(trainable):
    model = rounded_model(trainable, QAT(group_size=8))
    found = [name for name, layer in adapters(model) if isinstance(layer.rule, qat.FakeQuantised)]
    assert len(found) == 2 * 7
    assert not isinstance(model.get_output_embeddings(), Adapter)
    assert merged_state(model).keys() == make_model().state_dict().keys()


class Beside:
    """An adapter that has no plain layer like it."""

    mergeable = False

    def start(self, layer):
        layer.gain = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, layer, x):
        return layer.base(x) + layer.gain * x.sin().sum(-1, keepdim=True)

    def merge(self, layer, tensors):
        raise AssertionError

    def saved(self, layer):
        return {"gain": layer.gain}


def test_what_cannot_be_merged_stays_outside_of_the_rounding():
    model = make_model()
    freeze(model)
    mlp = model.get_submodule("model.layers.0.mlp")
    mlp.up_proj = Adapter(mlp.up_proj, Beside())
    model.model.layers[0].mlp = Adapter(mlp, Beside())
    QAT(group_size=8).apply(model)
    outer = model.get_submodule("model.layers.0.mlp.base.up_proj")
    assert isinstance(outer.rule, Beside)
    assert isinstance(outer.base.rule, qat.FakeQuantised)
    assert isinstance(outer.base.base, torch.nn.Linear)
    assert sum(isinstance(a.rule, qat.FakeQuantised) for _, a in adapters(model)) == 14
    loss = model(input_ids=torch.arange(8)[None], use_cache=False).logits.square().mean()
    loss.backward()
    assert outer.gain.grad.abs() > 0


@pytest.mark.parametrize("trainable", [Full(), LoRA(r=4)], ids=lambda t: t.kind)
def test_the_base_is_the_plain_model(trainable):
    tokens = torch.arange(12)[None]
    plain, model = make_model(), rounded_model(trainable, QAT(group_size=8)).eval()
    with torch.no_grad():
        base = plain(input_ids=tokens).logits
        with adapters_off(model):
            assert torch.equal(model(input_ids=tokens).logits, base)
        assert (model(input_ids=tokens).logits - base).abs().max() > 1e-3


def test_what_is_kept_for_decoding_follows_the_weights():
    """The rounded weight is made once, and again when a weight or an adapter inside changes."""
    model = rounded_model(LoRA(r=4), QAT(group_size=8)).eval()
    layer, x = model.get_submodule("model.layers.0.mlp.up_proj"), torch.randn(3, 32)
    with torch.no_grad():
        first = layer(x)
        kept = layer.kept[1]
        assert torch.equal(layer(x), first)
        assert layer.kept[1] is kept
        layer.base.lora_B.add_(0.3)
        changed = layer(x)
        assert not torch.equal(changed, first)
        with adapters_off(model, {"default"}):
            grid = GRIDS[INT4]
            base = rounded_weight(layer.base.base.weight, grid, 8, torch.float32)
            assert torch.equal(layer(x), F.linear(rounded_activations(x, grid), base))
        assert torch.equal(layer(x), changed)
    layer.train()(x)
    assert layer.kept is None


def test_only_inputs_are_kept_for_the_backward_pass():
    """Rounded weights, masks and rounded inputs are made again: what autograd holds is x, A and B."""
    layer = torch.nn.Linear(64, 128, bias=False)
    layer.requires_grad_(False)
    wrapped = Adapter(Adapter(layer, LoRA(r=2).rule("", layer)), qat.FakeQuantised(QAT()), ROUNDING)
    x, held = torch.randn(16, 64, requires_grad=True), {}

    def keep(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        wrapped(x)
    assert sum(held.values()) <= 4 * (16 * 64 + 2 * 64 + 2 * 128)


def loss_of(model, docs):
    net = network.Network(model)
    network.pack(net)
    return NextToken().build()(net, Batch.pack(docs)).total


def gradients(model, rows):
    model.zero_grad()
    for row in rows:
        loss_of(model, row).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to", "ignore:The .grad attribute of a")
def test_gradients_do_not_depend_on_rows_recomputation_or_graphs():
    docs = documents()
    expected = gradients(rounded_model(LoRA(r=4), QAT(group_size=8)), [docs])
    found = {"rows": gradients(rounded_model(LoRA(r=4), QAT(group_size=8)), [docs[:1], docs[1:]])}
    recomputed = rounded_model(LoRA(r=4), QAT(group_size=8))
    checkpoint_activations(Parallel(activation_checkpointing=1), recomputed)
    found["recomputed"] = gradients(recomputed, [docs])
    torch._dynamo.reset()
    compiled = rounded_model(LoRA(r=4), QAT(group_size=8))
    compiled.model.layers[0].compile(backend="aot_eager", dynamic=False)
    found["compiled"] = gradients(compiled, [docs])
    for how, other in found.items():
        assert other.keys() == expected.keys()
        for name, grad in expected.items():
            # An input that lies on a border between two steps may fall on the other side of it.
            assert (other[name] - grad).norm() <= 1e-2 * grad.norm(), (how, name)


# ---------------------------------------------------------------------------- runs


def config_of(settings, method="qat-lora", **extra):
    return configure(settings, METHODS[method], {"precision": {"group_size": 16}}, extra, method=method)


def weights_of(folder: Path) -> dict[str, bytes]:
    last = checkpoint.listed(folder / "checkpoints")[-1]
    return {p.name: p.read_bytes() for p in sorted(last.iterdir())}


@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_ends_with_the_same_bytes(settings, method, tmp_path):
    """Stopped before and after the rounding begins."""
    late = {"precision": {"group_size": 16, "fake_quant_after_n_steps": 3}, "checkpoint": {"every": 1}}
    whole = config_of(settings, method, **late)
    train(whole, QUIET)
    for stop in (2, 4):
        part = config_of(settings, method, **late, output_dir=str(tmp_path / f"stopped-{stop}"))
        for taken in steps(part, QUIET):
            if taken.step == stop:
                break
        train(part, QUIET)
        assert weights_of(tmp_path / f"stopped-{stop}") == weights_of(tmp_path / "run")
    assert configure(tmp_path / "run" / "config.yaml").precision.fake_quant_after_n_steps == 3


def test_training_rounds_from_its_step_on_and_evaluations_always(settings, tmp_path):
    """Until then losses are those of a run without rounding; what is measured is what would be deployed."""
    late = {"precision": {"group_size": 16, "fake_quant_after_n_steps": 3}, "evaluation": {"every": 2}}
    run = train(config_of(settings, "qat", **late), QUIET)
    plain = train(configure(settings, {"evaluation": {"every": 2}, "output_dir": str(tmp_path / "plain")},
                            method="full"), QUIET)  # fmt: skip
    rows = [[json.loads(line) for line in (r.folder / "metrics.jsonl").read_text().splitlines()] for r in (run, plain)]
    ours, theirs_ = ([r["loss"] for r in row if r["kind"] == "train"] for row in rows)
    assert ours[:3] == theirs_[:3]
    assert all(a != b for a, b in zip(ours[3:], theirs_[3:]))
    held, held_plain = ([r["loss"] for r in row if r["kind"] == "evaluation"] for row in rows)
    assert held[0] == held_plain[0] == run.report["held_out_loss"]["base"]  # the base is not rounded
    assert held[1] != held_plain[1]  # after step 2, whose weights are the same


def test_the_base_of_a_finished_run_is_not_rounded(settings):
    from luthier.assemble import restore
    from luthier.data.dataset import open_rows
    from luthier.evaluate import base_of, held_out

    for method in METHODS:
        config = config_of(settings, method, output_dir=settings["output_dir"] + method)
        result = train(config, QUIET)
        made, _ = restore(result.folder)
        rows = open_rows(config.data, made.renderer, None, lambda _: None, lambda _: None)[1]
        with base_of(made, lambda _: None) as base:
            columns = held_out(base, rows, 64).columns
        loss = columns["loss"].sum() / columns["weight"].sum()
        assert loss == pytest.approx(result.report["held_out_loss"]["base"], rel=1e-6), method


def test_names_of_a_selection_are_those_of_the_model():
    """What unfreezes later, and what a group of rates names, although layers are wrapped."""
    from luthier.assemble import _apply_precision
    from luthier.optim import AdamW
    from luthier.optim.groups import buckets
    from luthier.trainable import Partial, Unfreeze

    class Config:
        later = Unfreeze(step=2, patterns=["layers.1.mlp.down_proj.weight"])
        trainable = Partial(patterns=["layers.1.mlp.up_proj.weight"], unfreeze=[later])
        precision = QAT(group_size=16)

    model = make_model()
    Config.trainable.apply(model)
    begins = _apply_precision(Config, model)
    assert begins == {"model.layers.1.mlp.down_proj.base.weight": 2}
    named = {n: p for n, p in model.named_parameters() if p.requires_grad or n in begins}
    made = buckets(named, AdamW.model_validate({"groups": [{"patterns": ["mlp.up_proj.weight"], "lr_scale": 0.5}]}), {})
    assert [b.names for b in made if b.because] == [["model.layers.1.mlp.up_proj.base.weight"]]


# ---------------------------------------------------------------------------- conversion


@pytest.mark.parametrize(("scheme", "group"), CASES)
def test_converted_is_what_was_trained(scheme, group, tmp_path):
    """Integers in memory give the same bytes of logits as the floats that were rounded; their file, read by
    transformers and compressed-tensors alone, the same to rounding."""
    config = QAT(scheme=scheme, group_size=group)
    model = rounded_model(LoRA(r=4), config, "qwen3").eval()
    tokens = (torch.arange(24) * 37 % 320)[None]
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        state = converted.converted_state(model)
        model.config.quantization_config = converted.quantization_config(config, model)
        model.save_pretrained(tmp_path, state_dict=dict(state))
        del model.config.quantization_config
        converted.convert(model)
        assert torch.equal(model(input_ids=tokens).logits, expected)
        assert state.keys() == model.state_dict().keys()
        loaded = loaded_by_transformers(tmp_path)
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
    stored = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if "layers" in n and "norm" not in n}
    kinds = {t.dtype for n, t in stored.items() if "weight_scale" not in n and "weight_shape" not in n}
    assert kinds == {torch.int32 if "int4" in scheme else torch.int8 if scheme == INT8 else torch.float8_e4m3fn}


def loaded_by_transformers(folder):
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_ptq_is_the_same_conversion_untrained():
    model, config = make_model(), QAT(group_size=8)
    weight = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    converted.ptq(model, config)
    layer = model.model.layers[1].mlp.down_proj
    assert isinstance(layer, converted.ConvertedLinear)
    assert not dict(layer.named_parameters())
    scale = scales(weight, GRIDS[INT4], 8, torch.float32)
    assert torch.equal(unpack(layer.weight_packed, layer.in_features), on_grid(weight, scale, GRIDS[INT4]).char())
    assert torch.equal(dense(layer)["weight"], rounded_weight(weight, GRIDS[INT4], 8, torch.float32))


def test_exports(settings, tmp_path):
    """Both are loaded again in a fresh process: integers against the rounded model, floats against the one below."""
    result = train(config_of(settings, "qat"), QUIET)
    for kind in ("quantised", "full"):
        assert result.export(tmp_path / kind, kind)["largest_difference"] < 1e-4
    made, _ = restore(result.folder)  # with its activations rounded, too
    tokens = torch.arange(3, 40)[None]
    with made.network.natively() as rounded, torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", dtype=torch.float32)
        torch.testing.assert_close(loaded(tokens).logits, rounded(tokens).logits, rtol=1e-4, atol=1e-4)
    own, plain = (of_layers(tmp_path / kind) for kind in ("quantised", "full"))
    shapes = sum(t.nbytes for n, t in own.items() if n.endswith("_shape"))
    bits = 8 * (sum(t.nbytes for t in own.values()) - shapes) / sum(t.numel() for t in plain.values())
    assert bits == 4 + 32 / 16  # and a scale of 32 bits for each group of 16
    config = json.loads((tmp_path / "quantised" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["ignore"] == ["lm_head"]
    weight, stored = plain["model.layers.0.mlp.up_proj.weight"], own["model.layers.0.mlp.up_proj.weight_packed"]
    scale = scales(weight, GRIDS[INT4], 16, torch.float32)
    assert torch.equal(unpack(stored, 32), on_grid(weight, scale, GRIDS[INT4]).char())
    with pytest.raises(ExportError, match="use as=full"):
        result.export(tmp_path / "adapter", "adapter")


def test_sixteen_bits_are_compared_in_thirty_two(settings, tmp_path):
    """With the scales that the file keeps in 16 bits: nothing but the order of sums is left of a difference."""
    result = train(config_of(settings, "qat", precision={"dtype": "bfloat16"}), QUIET)
    assert result.export(tmp_path / "out", "quantised")["largest_difference"] < 1e-4
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale"].dtype == (
        torch.bfloat16
    )


def of_layers(folder):
    found = load_file(folder / "model.safetensors")
    return {n: t for n, t in found.items() if ".layers." in n and "norm" not in n}


def test_an_adapter_that_was_rounded_with_its_layer_is_not_written_alone(settings, tmp_path):
    result = train(config_of(settings), QUIET)
    with pytest.raises(ExportError, match="use as=quantised, or as=merged"):
        result.export(tmp_path / "adapter", "adapter")
    merged = result.export(tmp_path / "merged", "merged")
    assert merged["largest_difference"] < 1e-4 < merged["difference_to_base"]


def test_what_is_no_quantised_model(settings, tmp_path, monkeypatch):
    result = train(configure(settings, method="full"), QUIET)
    with pytest.raises(ExportError, match="method=qat"):
        result.export(tmp_path / "out", "quantised")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("precision", "trainable", "message"),
    [
        ({"scheme": "8da4w"}, {}, "did you mean 'int8-dynamic-act-int4-weight'"),
        ({"scheme": FP8, "group_size": 32}, {}, "should be -1"),
        ({"group_size": 0}, {}, "2 or more, or -1"),
        ({"fake_quant_after_n_steps": -1}, {}, "fake_quant_after_n_steps"),
        ({"fake_quant_after_n_steps": 6}, {}, "never reached"),
        ({"weight_dtype": "int4"}, {}, "precision.scheme"),
        ({}, {"lora_dropout": 0.1}, "trainable.lora_dropout=0"),
    ],
)
def test_contradictions(settings, precision, trainable, message):
    with pytest.raises(ConfigError, match=message):
        configure(settings, {"precision": precision, "trainable": trainable}, method="qat-lora")


def test_the_default_group_is_that_of_the_scheme(settings):
    for scheme, group in ((INT4, 32), (INT8, -1), (FP8, -1), ("int4-weight-only", 32)):
        config = configure(settings, f"precision.scheme={scheme}", method="qat")
        assert config.precision.group_size == group
        assert f"group_size: {group}" in config.dump()


def test_a_group_that_does_not_divide_names_the_layer():
    with pytest.raises(ModelError, match=r"group_size=32 does not divide the 48 inputs of .*down_proj: use 16"):
        QAT().apply(make_model())


def test_layers_that_no_format_has():
    with pytest.raises(ModelError, match=r"h\.0\.attn\.c_attn"):
        QAT(group_size=8).apply(make_model("gpt2"))
    model = make_model()
    model.model.layers[0].experts = torch.nn.ParameterDict({"up": torch.nn.Parameter(torch.zeros(2, 32, 32))})
    with pytest.raises(ModelError, match="3-dimensional"):
        QAT(group_size=8).apply(model)


def test_explained_beforehand(settings):
    """Rounding adds what a layer needs for a moment, and nothing that stays."""
    plain = explain(configure(settings, METHODS["qat-lora"], method="lora"), count=False)
    rounded = explain(config_of(settings), count=False)
    assert rounded.memory.weights == plain.memory.weights
    assert rounded.memory.adapters == plain.memory.adapters
    assert rounded.memory.activations <= 1.1 * plain.memory.activations
