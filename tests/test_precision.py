"""Frozen weights in fewer bits: codes against bitsandbytes and by hand, loading, gradients, runs, exports, refusals."""

import io
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import LLAMA, make_model, make_tokenizer, save_model
from safetensors.torch import load_file, save_file
from test_train import in_two_parts
from torch import nn

from luthier import checkpoint, surgery, train
from luthier.assemble import assemble, restore
from luthier.batch import Batch, Document
from luthier.config import configure
from luthier.errors import ConfigError, ExportError, ModelError
from luthier.export.readers import transformers_reader
from luthier.models import Model, load, streaming
from luthier.monitor import Console
from luthier.precision import FP8, NF4, Int8
from luthier.trainable import LoRA

CPU = torch.device("cpu")
KINDS = {"nf4": NF4(), "int8": Int8(), "fp8": FP8()}


def layer_of(config, weight, bias=None, dtype=torch.float32):
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    plain.weight = nn.Parameter(weight)
    if bias is not None:
        plain.bias = nn.Parameter(bias)
    return config.storage(dtype).layer(plain)


# ---------------------------------------------------------------------------- codes


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("shape", "block"), [((48, 32), 64), ((33, 50), 64), ((96, 64), 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_bit_for_bit_what_bitsandbytes_keeps(double, shape, block, dtype):
    import bitsandbytes.functional as functional

    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    ours = layer_of(NF4(block_size=block, double_quant=double), weight)
    codes, state = functional.quantize_4bit(weight, blocksize=block, quant_type="nf4", compress_statistics=double)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, state.absmax)
    if double:
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert torch.equal(ours.nested_map, state.state2.code)
        assert torch.equal(ours.offset, state.offset)
    state.dtype = torch.float32
    assert torch.equal(ours.dequantize(torch.float32), functional.dequantize_4bit(codes, state))


def test_pieces_of_a_weight_give_the_same_codes(monkeypatch):
    from luthier.precision import linear

    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    whole = {kind: layer_of(config, weight) for kind, config in KINDS.items()}
    monkeypatch.setitem(linear.PIECE, "cpu", 300)
    for kind, config in KINDS.items():
        for name, part in layer_of(config, weight).named_buffers():
            assert torch.equal(part, whole[kind].get_buffer(name)), (kind, name)


def test_shapes_that_came_first_change_no_codes(monkeypatch):
    """The library keeps its table of 256 levels where it was first asked for, which `explain` does without values."""
    import bitsandbytes.functional as functional

    monkeypatch.setattr(functional, "name2qmap", {})
    layer_of(NF4(), torch.empty(48, 32, device="meta"))
    made = layer_of(NF4(), torch.randn(48, 32))
    assert made.nested_map.device == CPU
    assert made.dequantize(torch.float32).isfinite().all()


def test_nf4_of_one_block_by_hand():
    """Largest 2.0, so values / 2 are -1, 0.5, 0.25, 0, then zeros: nearest of the 16 levels are codes 0, 12, 10, 7, 7.

    Levels near 0.5: 0.4407098293 (12) and 0.5626170039 (13), middle 0.50166: 12. Near 0.25: 0.2461123019 (10).
    """
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([-2.0, 1.0, 0.5, 0.0])
    made = layer_of(NF4(double_quant=False), weight)
    assert made.absmax.tolist() == [2.0]
    assert made.codes[:3, 0].tolist() == [0 << 4 | 12, 10 << 4 | 7, 7 << 4 | 7]
    expected = torch.zeros(64)
    expected[:3] = torch.tensor([-2.0, 2 * 0.44070982933044434, 2 * 0.24611230194568634])
    assert torch.equal(made.dequantize(torch.float32)[0], expected)


def test_int8_is_what_bitsandbytes_gives():
    import bitsandbytes.functional as functional

    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)).half()
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.clone())
    made = layer_of(Int8(), weight)
    assert torch.equal(made.codes, codes)
    assert torch.equal(made.absmax, absmax)
    row = layer_of(Int8(), torch.tensor([[254.0, -100.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))  # by hand: 2 a code
    assert row.codes.tolist() == [[127, -50, 0, 0], [0, 0, 0, 0]]
    assert row.dequantize(torch.float32).tolist() == [[254.0, -100.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_fp8_by_hand_and_as_torchao_keeps_it():
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    row = layer_of(FP8(), torch.tensor([[896.0, 2.0, -34.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))  # scale 2: 448, 1, -17
    assert row.scale.tolist() == [2.0, 1.0]
    assert row.codes.float().tolist() == [[448.0, 1.0, -16.0, 0.0], [0.0] * 4]  # from 16 on by twos, ties to even
    plain = nn.Linear(32, 48, bias=False)
    made = layer_of(FP8(), plain.weight.detach().clone())
    quantize_(plain, Float8WeightOnlyConfig())
    kept = plain.weight
    assert torch.equal(made.codes.float(), kept.qdata.float())
    assert torch.equal(made.scale, kept.scale.reshape(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_product_gradient_and_what_is_kept(kind):
    """Against a plain layer with the dequantised weight; for the backward pass no weight in full is kept."""
    torch.manual_seed(0)
    made = layer_of(KINDS[kind], torch.randn(48, 32), torch.randn(48))
    weight = made.dequantize(torch.float32)
    for shape in ((32,), (5, 32), (2, 3, 32)):
        x, twin = (torch.ones(shape).mul(0.3).requires_grad_() for _ in range(2))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t):
            y = made(x)
        assert not [t for t in kept if t.dtype == torch.float32 and t.numel() >= weight.numel()]
        expected = nn.functional.linear(twin, weight, made.bias)
        assert torch.equal(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, twin.grad)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.parametrize("kind", KINDS)
def test_no_graph_breaks_and_shapes_without_values(kind):
    made = layer_of(KINDS[kind], torch.randn(48, 32), torch.randn(48))
    x = torch.randn(3, 32, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager", dynamic=False)(x)
    assert torch.equal(compiled, made(x))
    assert torch.equal(torch.autograd.grad(compiled.sum(), x)[0], torch.autograd.grad(made(x).sum(), x)[0])
    shapes = layer_of(KINDS[kind], torch.empty(48, 32, device="meta"), torch.empty(48, device="meta"))
    assert shapes(torch.empty(3, 32, device="meta")).shape == (3, 48)
    for name, buffer in made.named_buffers():
        assert (buffer.shape, buffer.dtype) == (shapes.get_buffer(name).shape, shapes.get_buffer(name).dtype)


# ---------------------------------------------------------------------------- loading


def folder_of(tmp_path, family, **saving):
    folder = tmp_path / family
    make_model(family).save_pretrained(folder, **saving)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_streamed_is_what_transformers_loads(tmp_path, family, dtype):
    """Every tensor, buffers and generation settings included; linear layers as their own precision keeps them."""
    folder = folder_of(tmp_path, family, max_shard_size="20KB")
    name, told = Model(name=str(folder)), []
    plain = load.load_model(name, dtype, CPU)
    made = load.load_model(name, dtype, CPU, Int8().storage(dtype), told.append)
    assert not told
    store = Int8().storage(dtype)
    chosen = store.names(plain)
    linear = [n for n, m in plain.named_modules() if surgery.linear_shape(m)]
    assert set(linear) - set(chosen) <= {"lm_head"}
    original = make_model(family)
    for layer in chosen:
        expected = store.layer(original.get_submodule(layer))
        found = made.get_submodule(layer)
        for leaf, tensor in expected.named_buffers():
            assert torch.equal(tensor, found.get_buffer(leaf)), (layer, leaf)
    for leaf, tensor in (*plain.named_parameters(remove_duplicate=False), *plain.named_buffers()):
        if not leaf.startswith(tuple(f"{layer}." for layer in chosen)):
            found = made.get_parameter(leaf) if isinstance(tensor, nn.Parameter) else made.get_buffer(leaf)
            assert torch.equal(tensor, found), leaf
            assert tensor.dtype == found.dtype
    assert made.generation_config.to_dict() == plain.generation_config.to_dict()
    assert not made.training
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        for layer in chosen:  # the plain one with the weights that the other multiplies with
            weight = made.get_submodule(layer).dequantize(dtype)
            into = plain.get_submodule(layer)
            into.weight.copy_(weight.t() if surgery.transposed(into) else weight)
        assert torch.equal(made(tokens).logits, plain(tokens).logits)


# ---------------------------------------------------------------------------- runs


def run_over(settings, kind, **changes):
    return configure(settings, {"method": "qlora" if kind == "nf4" else "lora", "precision": kind, **changes})


QUIET = Console(quiet=True)


@pytest.fixture
def at_hand(monkeypatch):
    """The check of an export in this process: a fresh one takes ten seconds, and one test has it."""

    def run(command, input, **more):
        monkeypatch.setattr("sys.stdin", io.StringIO(input))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers_reader.main()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_over_weights_in_fewer_bits(settings, kind, tmp_path, at_hand):
    """Learns, answers with a cache, and what is exported is what was trained: the adapter, and merged in two dtypes."""
    config = run_over(settings, kind, evaluation={"generate": 2, "max_new_tokens": 4})
    result = train(config, QUIET)
    losses = result.report["held_out_loss"]
    assert losses["tuned"] < losses["base"]
    done = result.export(tmp_path / "adapter")
    assert done["largest_difference"] < 1e-4
    assert done["difference_to_base"] > 0.1
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == config.model.name
    assert (tmp_path / "run" / "base").exists() == (kind != "nf4")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert ("BitsAndBytesConfig" in card) == (kind == "nf4")
    assert f"trained over weights in {kind}" in card
    merged = result.export(tmp_path / "merged", "merged")
    assert merged["largest_difference"] < 1e-4
    rounded = result.export(tmp_path / "rounded", "merged", "bfloat16")
    assert 1e-4 < rounded["largest_difference"] < 1
    assert json.loads((tmp_path / "rounded" / "config.json").read_text())["dtype"] == "bfloat16"
    exact, tensors = (load_file(tmp_path / n / "model.safetensors") for n in ("merged", "rounded"))
    made, _ = restore(tmp_path / "run")
    for name, layer in surgery.adapters(made.network.model):
        weight = layer.base.dequantize(torch.float32) + layer.rule.delta(layer)
        assert torch.equal(exact[f"{name}.weight"], weight)
        assert torch.equal(tensors[f"{name}.weight"], weight.bfloat16())
    for bits in ("nf4", "4bit", "int8", "fp8", "Q4_0"):
        with pytest.raises(ExportError, match="round the trained change away"):
            result.export(tmp_path / "four", "merged", bits)
    with pytest.raises(ExportError, match="known are float32, bfloat16"):
        result.export(tmp_path / "four", "merged", "float64")
    with pytest.raises(ExportError, match="is of whole models"):
        result.export(tmp_path / "four", "adapter", "float32")
    assert not (tmp_path / "four").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_ends_with_the_same_bytes(settings, kind, tmp_path):
    whole = run_over(settings, kind, checkpoint={"every": 2})
    train(whole, QUIET)
    parted = run_over(settings, kind, checkpoint={"every": 2}, output_dir=str(tmp_path / "parted"))
    in_two_parts(parted, 3)
    newest = [checkpoint.newest(tmp_path / n / "checkpoints")[0] for n in ("run", "parted")]
    ends = [checkpoint.read_tensors(folder, "weights") for folder in newest]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# ---------------------------------------------------------------------------- ready-made 4-bit checkpoints


def ready_made(folder, double=True):
    """A folder as transformers saves a model that it has quantised: written by bitsandbytes alone."""
    import bitsandbytes.functional as functional

    model = make_model("llama")
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name in [n for n in state if "_proj." in n]:
        codes, kept = functional.quantize_4bit(state[name], quant_type="nf4", compress_statistics=double)
        state[name] = codes
        state |= {f"{name}.{leaf}": tensor for leaf, tensor in kept.as_dict(packed=True).items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("double", [True, False])
def test_a_ready_made_checkpoint_is_used_as_it_is(tmp_path, double):
    """Against transformers' own load of it, and against the model that it was made from, quantised here."""
    from transformers import AutoModelForCausalLM

    folder = ready_made(tmp_path / "four", double)
    store = NF4().storage(torch.float32)
    made = load.load_model(Model(name=str(folder)), torch.float32, CPU, store)
    original = make_model("llama")
    for name in store.names(original):
        expected = NF4(double_quant=double).storage(torch.float32).layer(original.get_submodule(name))
        for leaf, tensor in expected.named_buffers():
            assert torch.equal(tensor, made.get_submodule(name).get_buffer(leaf)), (name, leaf)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"})
    for module in theirs.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(made(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    assert getattr(made.config, "quantization_config", None) is None


def test_an_adapter_over_four_bits_is_checked_in_a_fresh_process(settings, tmp_path):
    result = train(run_over(settings, "nf4"), QUIET)
    assert result.export(tmp_path / "adapter")["largest_difference"] < 1e-4


def test_a_run_over_a_ready_made_checkpoint(settings, tmp_path, at_hand):
    folder = ready_made(tmp_path / "four")
    with pytest.raises(ConfigError, match=r"is in 4 bits already .* use method=qlora"):
        configure(settings, {"model": str(folder), "method": "lora"})
    with pytest.raises(ModelError, match="use method=qlora"):
        load.load_model(Model(name=str(folder)), torch.float32, CPU)
    result = train(configure(settings, {"model": str(folder), "method": "qlora"}), QUIET)
    for kind in ("adapter", "merged"):
        assert result.export(tmp_path / kind, kind)["largest_difference"] < 1e-4
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in written
    assert not (tmp_path / "run" / "base").exists()


FP4 = "bitsandbytes 4-bit fp4"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, FP4),
    ],
)
def test_other_quantised_checkpoints_are_refused_by_name(settings, tmp_path, values, named):
    folder = save_model(tmp_path / "four")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": values}))
    for method in ("lora", "qlora"):
        with pytest.raises(ConfigError, match=rf"quantised already \({named}\)"):
            configure(settings, {"model": str(folder), "method": method})
    for store in (None, NF4().storage(torch.float32)):
        with pytest.raises(ModelError, match=rf"quantised already \({named}\)"):
            load.load_model(Model(name=str(folder)), torch.float32, CPU, store)


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["full", "partial", "pretrain", "continued_pretraining"])
def test_weights_in_fewer_bits_that_are_asked_to_move_are_refused(settings, kind, method):
    model = {"size": "tiny"} if method == "pretrain" else settings["model"]
    with pytest.raises(ConfigError, match=rf"precision.kind={kind} keeps the weights .* use method=qlora, or prec"):
        configure(settings | {"model": model}, {"method": method, "precision": kind})


def test_what_is_wrong_with_the_section_is_told(settings, monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 'nf4'"):
        configure(settings, {"method": "lora", "precision": "bitsandbytes"})
    with pytest.raises(ConfigError, match=r"does not go with method=qlora, .*; use method=lora"):
        configure(settings, {"method": "qlora", "precision": "as_loaded"})
    with pytest.raises(ConfigError, match=r"precision\.block_size=48"):
        configure(settings, {"method": "qlora", "precision": {"block_size": 48}})
    with pytest.raises(ConfigError, match=r"load_in_4bit: unknown key; did you mean 'precision\.kind'"):
        configure(settings, {"method": "qlora", "load_in_4bit": True})
    assert configure(settings, {"method": "qlora", "precision": {"double_quant": False}}).precision.kind == "nf4"
    assert configure(settings, {"precision": {"dtype": "float32"}}).precision.kind == "as_loaded"
    monkeypatch.setattr("luthier.precision.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'luthier\[quant\]'"):
        configure(settings, {"method": "qlora"})
    assert configure(settings, {"method": "lora", "precision": "int8"}).precision == Int8()


def test_without_the_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ModelError, match=r"pip install 'luthier\[quant\]'"):
        layer_of(NF4(), torch.randn(4, 64))


# ---------------------------------------------------------------------------- memory and speed of loading

PEAK = """
import json, resource, sys, torch
from luthier.models import Model, load
from luthier.precision import FP8, NF4, Int8
import transformers.models.llama.modeling_llama, bitsandbytes.functional

def resident(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

folder, small, dtype, kind = sys.argv[1:]
torch.set_num_threads(1)
store = {"nf4": NF4(), "int8": Int8(), "fp8": FP8()}[kind].storage(getattr(torch, dtype))
load.load_model(Model(name=small), getattr(torch, dtype), torch.device("cpu"), store, sys.exit)
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
made = load.load_model(Model(name=folder), getattr(torch, dtype), torch.device("cpu"), store, sys.exit)
size = sum(t.numel() * t.element_size() for t in (*made.parameters(), *made.buffers()))
print(json.dumps({"size": size, "peak": resident("VmHWM") - before, "held": resident("VmRSS") - before}))
"""


def peak(folder, small, dtype, kind):
    """Bytes of a load, in a process that has loaded the small model before."""
    words = [sys.executable, "-c", PEAK, str(folder), str(small), dtype, kind]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def random_llama(folder, layers, hidden, saved, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 4 * hidden, "vocab_size": 8192}
    config = LlamaConfig(**LLAMA | sizes | changes)
    LlamaForCausalLM(config).to(saved).save_pretrained(folder, max_shard_size="64MB")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("saved", "dtype", "kind"), [(torch.float32, "bfloat16", "nf4")])
def test_loading_takes_hardly_more_memory_than_what_is_loaded(tmp_path, saved, dtype, kind):
    """Peak of the process beyond its libraries; the files have 3.7 times as many bytes as what becomes of them."""
    folder = random_llama(tmp_path / "m", 16, 512, saved, vocab_size=40960)
    found = peak(folder, random_llama(tmp_path / "small", 1, 64, saved), dtype, kind)
    assert found["size"] > 110e6
    assert found["peak"] < 1.15 * found["size"], found


def test_a_random_network_is_drawn_straight_into_its_precision():
    """The same values as a plain draw from the same seed has, quantised."""
    from transformers import GPT2Config, LlamaConfig

    configs = (LlamaConfig(**LLAMA, attention_bias=True), GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4))
    for config in configs:
        plain = streaming.draw(config, torch.float32, CPU, None, 5)
        store = NF4().storage(torch.float32)
        made = streaming.draw(config, torch.float32, CPU, store, 5)
        assert not [n for n, t in (*made.named_parameters(), *made.named_buffers()) if t.is_meta]
        for name in store.names(plain):
            expected = store.layer(plain.get_submodule(name))
            assert torch.equal(expected.dequantize(torch.float32), made.get_submodule(name).dequantize(torch.float32))
        assert torch.equal(plain.get_input_embeddings().weight, made.get_input_embeddings().weight)
        assert made(torch.arange(5)[None]).logits.isfinite().all()


# ---------------------------------------------------------------------------- what cannot be streamed


def small_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2)).eval()


def test_fused_experts_and_routers_stay_and_it_is_told(tmp_path):
    """Their files name tensors otherwise, so they come through transformers, which is told, too."""
    small_mixtral().save_pretrained(tmp_path / "m")
    told = []
    store = NF4().storage(torch.float32)
    made = load.load_model(Model(name=str(tmp_path / "m")), torch.float32, CPU, store, told.append)
    assert [text.partition(":")[0] for text in told] == [
        "weights are read whole, in float32 into the host's memory, and then go to nf4 layer by layer",
        "precision.kind=nf4",
    ]
    assert "fused experts" in told[1]
    kept = {n.rpartition(".")[2] for n, m in made.named_modules() if isinstance(m, surgery.QuantisedLinear)}
    assert kept == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert made(torch.arange(5)[None]).logits.isfinite().all()


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "short"])
def test_files_that_do_not_fit_are_errors(tmp_path, fault):
    folder = save_model(tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    if fault == "missing":
        del state["model.layers.1.mlp.up_proj.weight"]
    elif fault == "unexpected":
        state["model.layers.1.mlp.other.weight"] = torch.zeros(2)
    elif fault == "shape":
        state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    if fault == "short":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-1000])
    named = {"missing": "lacks 1 tensors", "unexpected": "has 1 tensors", "shape": "cannot be loaded",
             "short": "ends too early"}  # fmt: skip
    with pytest.raises(ModelError, match=named[fault]):
        load.load_model(Model(name=str(folder)), torch.float32, CPU, NF4().storage(torch.float32))


def test_a_network_in_memory_is_converted_in_place(settings):
    """A random start, whose layers are converted in place; what is evaluated first is the quantised network."""
    asked = {"model": {"size": "tiny", "tokenizer": settings["model"]}, "method": "pretrain"}
    made = assemble(configure(settings | asked), training=False)
    before = {n: p.detach().clone() for n, p in made.network.model.named_parameters()}
    load.stored(made.network.model, store := Int8().storage(torch.float32), CPU)
    for name, module in made.network.model.named_modules():
        if isinstance(module, surgery.QuantisedLinear):
            codes = Int8().storage(torch.float32).cls.encode(before[f"{name}.weight"], None)[0]["codes"]
            assert torch.equal(module.codes, codes)
    assert store.kind == "int8"


# ---------------------------------------------------------------------------- gradients and what is told beforehand


def test_gradients_of_qlora_are_those_of_lora_over_the_dequantised_weights(settings):
    """The same adapters over plain layers with the weights that the quantised ones multiply with."""
    for kind, config in KINDS.items():
        torch.manual_seed(3)
        quantised, plain = make_model("gpt2"), make_model("gpt2")
        load.stored(quantised, config.storage(torch.float32), CPU)
        for name, module in quantised.named_modules():
            if isinstance(module, surgery.QuantisedLinear):
                plain.get_submodule(name).weight.data = module.dequantize(torch.float32).t()
        gradients = []
        for model in (quantised, plain):
            torch.manual_seed(4)
            LoRA(r=4).apply(model)
            for _, adapter in surgery.adapters(model):
                nn.init.normal_(adapter.lora_B, std=0.1)
            logits = model(torch.arange(3, 40)[None]).logits
            logits.log_softmax(-1).square().mean().backward()
            gradients.append({n: p.grad for n, p in surgery.trainable(model).items()})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-6, msg=f"{kind} {name}")


def test_gradients_are_those_of_peft_over_bitsandbytes(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = ready_made(tmp_path / "four")
    ours = load.load_model(Model(name=str(folder)), torch.float32, CPU, NF4().storage(torch.float32))
    LoRA(r=4, lora_alpha=8).apply(ours)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"})
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    theirs.train()
    ours.train()
    state = dict(theirs.named_parameters())
    pairs = []
    for name, adapter in surgery.adapters(ours):
        nn.init.normal_(adapter.lora_B, std=0.1)
        for leaf in ("lora_A", "lora_B"):
            other = state[f"base_model.model.{name}.{leaf}.default.weight"]
            other.data.copy_(getattr(adapter, leaf).data)
            pairs.append((getattr(adapter, leaf), other))
    for model in (ours, theirs):
        model(input_ids=torch.arange(3, 40)[None]).logits.log_softmax(-1).square().mean().backward()
    assert len(pairs) == 28
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_explain_counts_what_a_run_has(settings, kind):
    """Bytes of the weights as loaded, all elements in the table, and a peak below that of plain weights."""
    from luthier.explain import explain

    config = run_over(settings, kind, precision={"kind": kind, "dtype": "float32"}, parallel={"device": "cpu"})
    told = explain(config)
    made = assemble(config).network.model
    own = {id(p) for p in surgery.trainable(made).values()}
    tensors = [*(p for p in made.parameters() if id(p) not in own), *(b for m in made.modules()
               if isinstance(m, surgery.QuantisedLinear) for b in m.buffers())]  # fmt: skip
    assert told.memory.weights == sum(t.numel() * t.element_size() for t in tensors)
    plain = explain(configure(settings, {"method": "lora", "parallel": {"device": "cpu"}}))
    assert sum(m.total for m in told.moving) == sum(m.total for m in plain.moving)
    assert told.memory.weights < plain.memory.weights
    assert {m.dtype for m in told.moving if "q_proj.weight" in m.name} == {kind}


def test_recomputed_activations_change_nothing(settings):
    found = []
    for every in (0, 1):
        config = run_over(settings, "nf4", parallel={"activation_checkpointing": every, "device": "cpu"})
        made = assemble(config)
        document = Document(np.arange(3, 30, dtype=np.int32), np.r_[0, np.ones(26)].astype(np.float32), 0)
        made.objective(made.network, Batch.pack([document])).total.backward()
        found.append({n: p.grad for n, p in made.parameters().items()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
