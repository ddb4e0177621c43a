"""Quantising: rounding against brute force, naive updates and Babai; pipelines that the real libraries load again."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from conftest import LLAMA, ROWS, make_model, make_tokenizer, write_rows

from luthier.cli import main
from luthier.compress import proof
from luthier.compress.quantise import layers, quantising, sensitivity
from luthier.compress.quantise.calibration import stream
from luthier.compress.quantise.folding import folded
from luthier.compress.quantise.formats import compressed_tensors
from luthier.compress.quantise.rounding import awq, gptq, nearest
from luthier.compress.quantise.schemes import Quantising
from luthier.errors import ConfigError, ExportError, ModelError

DOCUMENTS = [[(i * 37 + j * 11) % 300 for j in range(20 + i)] for i in range(4)]
KINDS = ["sliding_attention", "full_attention"]
WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def llama(**more):
    import transformers as t

    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**WIDE | more))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval().requires_grad_(False)


def gemma():
    import transformers as t

    torch.manual_seed(0)
    config = t.Gemma3TextConfig(**WIDE, head_dim=16, sliding_window=6, layer_types=KINDS)
    model = t.Gemma3ForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with a Llama whose layers groups of 32 and 64 divide."""
    folder = tmp_path_factory.mktemp("small")
    llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def correlated(inputs: int, tokens: int = 64, seed: int = 1) -> torch.Tensor:
    """[in, in] X^T X of inputs that hang together and differ in size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=g) * torch.rand(inputs, generator=g) * 2
    x = torch.randn(tokens, inputs, generator=g) @ mix
    return x.t() @ x


def cli(*words, expect: int = 0, capsys=None) -> dict:
    code = main([*map(str, words), "--json", "--quiet"])
    said = json.loads(capsys.readouterr().out)
    assert code == expect, said
    return said


# ---------------------------------------------------------------------------- to the nearest


def test_symmetric_grid_by_hand():
    """The largest magnitude 1.5 is at half of 15 steps: scale 0.2; 1.5 itself would be code 7.5 and is cut to 7."""
    weight = torch.tensor([[1.5, -0.3, 0.1, 0.5]])
    g = nearest.grid(weight, 4)
    assert g.zero is None
    assert torch.allclose(g.scale, torch.tensor([[0.2]]))
    assert g.codes(weight).tolist() == [[7, -2, 0, 2]]  # -1.5 and 0.5 go to the even neighbour, 2.5 too
    assert torch.allclose(g.nearest(weight), torch.tensor([[1.4, -0.4, 0.0, 0.4]]))


def test_asymmetric_grid_by_hand():
    """From -1 to 2 in 15 steps of 0.2: -1 is code -8, so zero is code -3."""
    weight = torch.tensor([[-1.0, 2.0, 0.0, 0.41]])
    g = nearest.grid(weight, 4, symmetric=False)
    assert g.zero is not None
    assert g.zero.tolist() == [[-3]]
    assert g.codes(weight).tolist() == [[-8, 7, -3, -1]]
    assert torch.allclose(g.nearest(weight), torch.tensor([[-1.0, 2.0, 0.0, 0.4]]), atol=1e-6)


def test_groups_have_their_own_scales():
    weight = torch.tensor([[7.5, 1.0, 0.075, 0.01]])
    g = nearest.grid(weight, 4, 2)
    assert torch.allclose(g.scale, torch.tensor([[1.0, 0.01]]))


@pytest.mark.parametrize("group", [-1, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_numbers_are_those_of_qat(bits, group):
    from luthier.precision.rounding import Grid, on_grid, scales

    weight = torch.randn(6, 32)
    other = Grid(bits)
    scale = scales(weight, other, group, torch.float32)
    g = nearest.grid(weight, bits, group)
    assert torch.equal(g.scale, scale)
    assert (g.codes(weight) - on_grid(weight, scale, other)).abs().max() <= 1  # a quotient, or a product with 1 / scale


def test_asymmetric_numbers_are_those_of_torchao():
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    weight = torch.randn(8, 32) + 0.3
    block = (1, 16)
    scale, zero = choose_qparams_affine(weight, MappingType.ASYMMETRIC, block, torch.int8, -8, 7)
    theirs = dequantize_affine(
        quantize_affine(weight, block, scale, zero, torch.int8, -8, 7), block, scale, zero, torch.int8, -8, 7
    )
    assert torch.allclose(nearest.grid(weight, 4, 16, symmetric=False).nearest(weight), theirs, atol=1e-5)


def test_a_searched_range_loses_no_more_and_mostly_less():
    torch.manual_seed(0)
    weight = torch.randn(32, 128)
    weight[:, 0] *= 4
    importance = torch.rand(128)
    for weights in (None, importance):
        plain, found = nearest.grid(weight, 4), nearest.grid(weight, 4, search=True, importance=weights)
        by = torch.ones(128) if weights is None else weights
        lost = [((g.nearest(weight) - weight).square() * by).sum(1) for g in (plain, found)]
        assert (lost[1] <= lost[0]).all()
        assert lost[1].sum() < 0.9 * lost[0].sum()


def test_float8_by_row_and_by_tensor():
    weight = torch.tensor([[448.0, 1.03], [4.48, -0.5]])
    g = nearest.float8(weight)
    assert torch.allclose(g.scale, torch.tensor([[1.0], [0.01]]))
    assert g.nearest(weight)[0].tolist() == [448.0, 1.0]  # 1.03 lies between 1 and 1.125
    assert nearest.float8(weight, per_tensor=True).scale.flatten().tolist() == [1.0, 1.0]


# ---------------------------------------------------------------------------- GPTQ


def naive(weight: torch.Tensor, hessian: torch.Tensor, grid: nearest.Grid, damping: float) -> torch.Tensor:
    """Optimal brain surgery as it is written down: after each column the inverse of what is left is made anew."""
    h = hessian.double() + torch.eye(len(hessian)) * damping * hessian.diagonal().double().mean()
    left, codes = weight.double().clone(), torch.empty_like(weight)
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(h[i:, i:])
        group = i // (weight.shape[1] // grid.scale.shape[1])
        one = nearest.Grid(grid.scale[:, group : group + 1], bits=grid.bits)
        code = one.codes(left[:, i : i + 1].float())
        lost = left[:, i] - one.weight(code)[:, 0].double()
        left[:, i:] -= lost[:, None] / inverse[0, 0] * inverse[0]
        codes[:, i] = code[:, 0]
    return codes


def test_gptq_is_optimal_brain_surgery():
    weight, hessian = torch.randn(5, 24), correlated(24)
    g = nearest.grid(weight, 4, 8)
    ours = gptq.codes(weight, hessian, g, ordered=False, block=7)
    assert torch.equal(ours, naive(weight, hessian, g, 0.01))


def test_gptq_is_babais_nearest_plane():
    """Of the lattice L^T with H = L L^T, dimensions from the last to the first, which is GPTQ from the first to the
    last with columns reversed (https://arxiv.org/abs/2507.18553). Without clipping, on a grid with one scale."""
    weight, hessian = torch.randn(4, 12), correlated(12)
    g = nearest.Grid(torch.full((4, 1), 0.3), bits=8)
    h = hessian.double() + torch.eye(12) * 0.01 * hessian.diagonal().double().mean()
    basis = torch.linalg.cholesky(h.flip(0, 1)).t()  # upper: |R (w - q)|^2 = (w - q) H (w - q) in reversed order
    target, codes = (weight.double() / g.scale).flip(1), torch.zeros(4, 12, dtype=torch.float64)
    for i in range(11, -1, -1):
        pulled = (target[:, i + 1 :] - codes[:, i + 1 :]) @ basis[i, i + 1 :]
        codes[:, i] = (target[:, i] + pulled / basis[i, i]).round()
    assert torch.equal(gptq.codes(weight, hessian, g, ordered=False), codes.flip(1).float())


def test_gptq_lies_between_the_best_there_is_and_the_nearest():
    """Of 4 weights all codes can be tried."""
    lost = {"best": 0.0, "gptq": 0.0, "nearest": 0.0}
    every = torch.tensor(list(itertools.product(range(-8, 8), repeat=4)), dtype=torch.float32)
    for seed in range(40):
        torch.manual_seed(seed)
        weight, hessian = torch.randn(1, 4), correlated(4, seed=seed)
        g = nearest.Grid(weight.abs().amax(1, keepdim=True) / 7, bits=4)  # nothing is cut
        change = every * g.scale - weight
        best = float(((change @ hessian) * change).sum(1).min())
        found = gptq.error(g.weight(gptq.codes(weight, hessian, g, damping=1e-6)) - weight, hessian)
        assert best <= found * (1 + 1e-5)
        lost["best"] += best
        lost["gptq"] += found
        lost["nearest"] += gptq.error(g.nearest(weight) - weight, hessian)
    assert lost["best"] <= lost["gptq"] < 0.7 * lost["nearest"], lost


@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_loses_less_than_the_nearest_on_every_layer(ordered):
    for seed in range(5):
        torch.manual_seed(seed)
        weight, hessian = torch.randn(32, 64), correlated(64, 200, seed)
        g = nearest.grid(weight, 4, 32)
        codes = gptq.codes(weight, hessian, g, ordered=ordered)
        found = gptq.error(g.weight(codes) - weight, hessian)
        assert found < 0.7 * gptq.error(g.nearest(weight) - weight, hessian)


def test_scales_refitted_are_the_least_squares():
    """Of one row and two groups: the error is a parabola in the two scales, whose bottom torch finds as well."""
    torch.manual_seed(2)
    weight, hessian = torch.randn(1, 8), correlated(8)
    g = nearest.grid(weight, 4, 4)
    codes = gptq.codes(weight, hessian, g)
    made = gptq.refitted(weight, hessian, codes, g)
    root = torch.linalg.cholesky(hessian.double()).t()
    columns = torch.block_diag(codes[:, :4].t(), codes[:, 4:].t()).double()
    expected = torch.linalg.lstsq(root @ columns, root @ weight.double().t()).solution[:, 0]
    assert torch.allclose(made.scale[0].double(), expected, rtol=1e-3)
    weight, hessian = torch.randn(32, 64), correlated(64, 200)
    g = nearest.grid(weight, 4, 32, dtype=torch.bfloat16)
    codes = gptq.codes(weight, hessian, g)
    lost = [gptq.error(way.weight(codes) - weight, hessian) for way in (g, gptq.refitted(weight, hessian, codes, g))]
    assert lost[1] < 0.97 * lost[0]


def test_without_correlation_gptq_is_the_nearest():
    weight = torch.randn(6, 16)
    g = nearest.grid(weight, 4, 8)
    assert torch.equal(gptq.codes(weight, torch.diag(torch.rand(16) + 0.1), g), g.codes(weight))


def test_silent_inputs_few_rows_and_blocks_do_no_harm():
    weight, hessian = torch.randn(3, 16), correlated(16, tokens=4)  # of rank 4
    hessian[5], hessian[:, 5] = 0, 0
    g = nearest.grid(weight, 4)
    codes = gptq.codes(weight, hessian, g, block=3)
    assert torch.equal(codes, gptq.codes(weight, hessian, g, block=128))
    assert torch.equal(codes[:, 5], g.codes(weight)[:, 5])
    hessian[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        gptq.codes(weight, hessian, g)


# ---------------------------------------------------------------------------- AWQ


def test_awqs_scales_by_hand_and_their_search():
    assert torch.allclose(awq.scales(torch.tensor([4.0, 1.0]), 0.5), torch.tensor([2.0, 1.0]) / 2**0.5)
    torch.manual_seed(0)
    weight, sizes = torch.randn(16, 32), torch.ones(32)
    sizes[:2] = 30.0
    hessian = torch.diag(sizes.square())

    def rounding(scaled, s):
        return nearest.grid(scaled, 4).nearest(scaled)

    s, before, after = awq.search([weight], hessian, sizes, rounding)
    assert after < 0.5 * before
    assert s[0] > 2 * s[5]
    assert math.isclose(gptq.error(rounding(weight * s, s) / s - weight, hessian), after, rel_tol=1e-5)


@pytest.mark.parametrize("make", [llama, gemma], ids=["llama", "gemma3"])
def test_scales_fold_into_norms_and_layers_exactly_or_not_at_all(make):
    """Into the norm of attention and of the feed-forward, and the rows of up; not through grouped values' heads."""
    model = make()
    plain = proof.logprobs(model, DOCUMENTS)
    flow = stream(model, DOCUMENTS)
    units = flow.observed(layers.names(model))
    assert [len(u.names) for u in units] == [3, 1, 2, 1]
    done = []
    for unit in units:
        scales = 2 ** torch.linspace(-1, 1, unit.layers[0].weight.shape[1])
        before = [layer.weight.clone() for layer in unit.layers]
        done.append(folded(flow, unit, scales))
        for layer, was in zip(unit.layers, before):
            assert torch.allclose(layer.weight, was * scales if done[-1] else was)
    assert done == [True, False, True, True]
    assert torch.allclose(proof.logprobs(model, DOCUMENTS), plain, atol=2e-4)


# ---------------------------------------------------------------------------- calibration


def test_a_block_is_seen_as_the_whole_network_shows_it():
    model = llama()
    seen = {}

    def keep(name):
        return lambda m, given: seen.setdefault(name, []).append(given[0].reshape(-1, given[0].shape[-1]))

    names = layers.names(model)
    handles = [model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in names]
    for document in DOCUMENTS:
        model(input_ids=torch.tensor([document]))
    for handle in handles:
        handle.remove()
    flow, met = stream(model, DOCUMENTS), []
    for _ in range(2):
        for unit in flow.observed(names):
            x = torch.cat(seen[unit.names[0]])
            assert unit.tokens == len(x) == sum(map(len, DOCUMENTS))
            assert torch.allclose(unit.hessian, x.t() @ x, rtol=1e-3, atol=1e-3)
            assert torch.allclose(unit.sizes, x.abs().mean(0), rtol=1e-3, atol=1e-5)
            met += unit.names
        flow.advance()
    assert sorted(met) == sorted(names)


def test_the_rest_of_the_network_from_a_block_on():
    model = llama()
    flow = stream(model, DOCUMENTS)
    flow.advance()
    for row, document in enumerate(DOCUMENTS):
        expected = model(input_ids=torch.tensor([document])).logits
        assert torch.allclose(flow.to_the_end(row), expected, atol=1e-4)


def test_later_blocks_see_what_rounded_ones_give():
    """The second block's codes change with the first block's rounding."""
    found = {}
    for bits in (4, 8):
        model = llama()
        many = {n: 8 for n in layers.names(model) if ".0." in n} if bits == 8 else {}
        wanted = Quantising(scheme="int4", rounding="gptq")
        made = layers.rounded_(model, layers.names(model), DOCUMENTS, wanted, many, torch.float32, 32, print)
        found[bits] = made["model.layers.1.mlp.down_proj"].codes
    assert not torch.equal(found[4], found[8])


@pytest.mark.parametrize("rounding", ["gptq", "awq"])
def test_calibrated_rounding_is_closer_to_the_source(rounding):
    """Of what it answers on the calibration rows, with a few large inputs, as real networks have them."""

    def outlying():
        model = llama()
        for block in model.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight.data[:3] *= 12
        return model

    source = outlying()
    plain = stream(source, DOCUMENTS)
    lost = {}
    for how in ("nearest", rounding):
        model = outlying()
        wanted = Quantising(scheme="int4", rounding=how, ranges="min_max")
        layers.rounded_(model, layers.names(model), DOCUMENTS, wanted, {}, torch.float32, 64, lambda text: None)
        flow = stream(model, DOCUMENTS)
        lost[how] = sum(float((flow.to_the_end(r) - plain.to_the_end(r)).square().sum()) for r in range(len(DOCUMENTS)))
    assert lost[rounding] < 0.9 * lost["nearest"], lost


# ---------------------------------------------------------------------------- bits by sensitivity


def test_bits_go_where_they_take_away_most():
    """12 weights at 4 bits and a budget of 6: 24 more bits. a costs 16 for 3, b 16 for 4, c 8 for 0.1."""
    groups = (({"a": 4}, 3.0), ({"b": 4}, 4.0), ({"c": 2, "d": 2}, 0.1))
    found = [sensitivity.Measured(*group) for group in groups]
    few, many = dict.fromkeys("abcd", 4.0), {"a": 8.0, "b": 8.0, "c": 6.0, "d": 6.0}
    assert sensitivity.chosen(found, few, many, 6.0) == {"b", "c", "d"}
    assert sensitivity.chosen(found, few, many, 8.0) == {"a", "b", "c", "d"}
    assert sensitivity.chosen(found, few, many, 4.5) == set()


def test_sensitivity_is_the_divergence_of_the_whole_network():
    model = llama()
    names = layers.names(model)

    def rounded(layer):
        return nearest.grid(layer.weight.data, 4, 32).nearest(layer.weight.data)

    found = sensitivity.measured(model, DOCUMENTS, names, rounded)
    assert sorted(n for m in found for n in m.weights) == sorted(names)
    other = llama()
    for name in found[5].weights:
        layer = other.get_submodule(name)
        layer.weight.data = rounded(layer)
    total = 0.0
    for document in DOCUMENTS:
        p, q = (m(input_ids=torch.tensor([document])).logits[0].log_softmax(-1) for m in (model, other))
        total += torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()
    assert found[5].loss == pytest.approx(total / sum(map(len, DOCUMENTS)), rel=1e-3)
    assert torch.equal(proof.logprobs(model, DOCUMENTS), proof.logprobs(llama(), DOCUMENTS))


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_codes_are_those_of_compressed_tensors(bits):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 40)).to(torch.int8)
    made = layers.Rounded(codes, nearest.Grid(torch.ones(6, 1), bits=bits), -1)
    packed = compressed_tensors.tensors(made, Quantising(scheme="int4"))["weight_packed"]
    assert torch.equal(packed, pack_to_int32(codes, bits))


CASES = {
    "int8": ["--scheme", "int8"],
    "int8-torchao": ["--scheme", "int8", "--format", "torchao"],
    "int8_dynamic": ["--scheme", "int8_dynamic"],
    "fp8-tensor": ["--scheme", "fp8", "--per-tensor"],
    "nf4": ["--scheme", "nf4"],
    "gptq": ["--scheme", "int4", "--rounding", "gptq"],
    "mixed": ["--scheme", "int4", "--bits", "6", "--rounding", "awq", "--group-size", "32"],
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_loaded_again(case, small, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    out = tmp_path / "out"
    words = (*CASES[case], "--calibration", rows, "--held-out", 4, "--bound", 1)
    done = cli("quantise", small, out, *words, capsys=capsys)
    assert done["layers"] == 14
    assert done["held_out"] == "held-out rows"
    assert done["reading"] <= done["tolerance"]
    assert done["largest_difference"] > 0
    assert done["bytes"] < done["bytes_before"]
    if case == "gptq":
        assert done["group_size"] == 64
        assert done["bits_per_weight"] == pytest.approx(4.5, abs=0.2)
    if case == "mixed":
        assert 0 < len(done["in_8_bits"]) < 14
        assert done["bits_per_weight"] <= 6.2
    assert {"config.json", "tokenizer_config.json", "README.md", "quantisation.json"} <= {p.name for p in out.iterdir()}


def test_beyond_its_bound_nothing_is_left(small, tmp_path, capsys):
    said = cli("quantise", small, tmp_path / "out", "--scheme", "int4", "--bound", "0", expect=7, capsys=capsys)
    assert "perplexity went from" in said["problems"][0] or "differ" in said["problems"][0]
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_an_adapter_is_quantised_on_its_own_rows(small, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    run = tmp_path / "run"
    words = [f"model.name={small}", f"data.train={rows}", f"output_dir={run}", "data.validation=4"]
    assert main(["train", "--quiet", "method=lora", "max_steps=2", *words]) == 0
    capsys.readouterr()
    done = cli("quantise", run, tmp_path / "out", "--scheme", "int4", "--rounding", "gptq", "--bound", 1, capsys=capsys)
    assert done["calibration_tokens"] > 0
    assert done["held_out"] == "held-out rows"


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--scheme int4 --rounding gptq", "--calibration"),
        ("--scheme int4 --bits 4.5", "--calibration"),
        ("--scheme int8 --bits 4.5", "--bits"),
        ("--scheme int4 --bits 3", "--bits"),
        ("--scheme nf4 --format torchao", "--format"),
        ("--scheme nf4 --rounding awq", "--rounding"),
        ("--scheme fp8 --rounding gptq", "--rounding"),
        ("--scheme fp8 --group-size 32", "--group-size"),
        ("--scheme int8 --per-tensor", "--per-tensor"),
        ("--scheme int8_dynamic --group-size 32", "--group-size"),
        ("--scheme int4 --group-size 3", "--group-size"),
        ("--scheme int4 --group-size 48", "use 32"),
        ("--scheme int4 --damping 0", "--damping"),
        ("--scheme int4 --damping 0.1", "of --rounding gptq"),
        ("--scheme int4 --samples 3", "--samples"),
        ("--scheme int4 --bound -1", "--bound"),
        ("--scheme int4 --dtype int3", "--dtype"),
        ("--scheme int4 --held-out 3", "--held-out"),
    ],
)
def test_what_does_not_go_together_is_refused(words, names, small, tmp_path, capsys):
    said = cli("quantise", small, tmp_path / "out", *words.split(), expect=2, capsys=capsys)
    assert any(names in problem for problem in said["problems"]), said
    assert not (tmp_path / "out").exists()


def test_a_budget_below_what_scales_cost_is_refused(small, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    words = f"--scheme int4 --bits 4.1 --group-size 32 --calibration {rows}".split()
    said = cli("quantise", small, tmp_path / "out", *words, expect=2, capsys=capsys)
    assert "with their scales" in said["problems"][0]


def test_models_that_no_format_has_are_refused():
    with pytest.raises(ModelError, match=r"\[in, out\]"):
        layers.names(make_model("gpt2"))
    model = make_model("llama")
    with pytest.raises(ConfigError, match="none of 128, 64, 32"):
        layers.group_of(model, layers.names(model), Quantising(scheme="int4"))


def test_a_quantised_source_and_a_missing_one_are_refused(small, tmp_path, capsys):
    cli("quantise", small, tmp_path / "once", "--scheme", "int8", "--bound", 1, capsys=capsys)
    said = cli("quantise", tmp_path / "once", tmp_path / "twice", "--scheme", "int8", expect=4, capsys=capsys)
    assert "quantised already" in said["problems"][0]
    cli("quantise", tmp_path / "nothing", tmp_path / "twice", "--scheme", "int8", expect=4, capsys=capsys)
    said = cli("quantise", small, tmp_path / "once", "--scheme", "int8", expect=7, capsys=capsys)
    assert "exists" in said["problems"][0]


def test_a_full_disk_leaves_nothing(small, tmp_path, capsys, monkeypatch):
    def full(*given, **more):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(quantising, "_save", full)
    said = cli("quantise", small, tmp_path / "out", "--scheme", "int8", expect=1, capsys=capsys)
    assert "No space left" in said["problems"][0]
    assert list(tmp_path.iterdir()) == []


def test_another_reading_is_an_error(small, tmp_path, monkeypatch):
    read = quantising._read
    monkeypatch.setattr(quantising, "_read", lambda *given, **more: read(*given, **more) + 0.1)
    job = quantising.Job(str(small), tmp_path / "out", Quantising(scheme="int8"))
    with pytest.raises(ExportError, match="not what was rounded"):
        quantising.quantise(job)
    assert list(tmp_path.iterdir()) == []
