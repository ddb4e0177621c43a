"""What explain says beforehand against what then happens: bytes, operations, steps, files."""

import json
import random
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, make_model
from test_gguf import written  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

from luthier import configure, explain
from luthier.cli import main
from luthier.errors import ConfigError
from luthier.explain import curve, moving
from luthier.explain.files import running
from luthier.explain.heap import MAPPED, Heap
from luthier.explain.ledger import Ledger
from luthier.explain.plan import assumed, rates
from luthier.monitor import Console
from luthier.optim import schedule
from luthier.train import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import make_memory_page as page

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A Llama of 44M parameters and random texts."""
    return page.prepare(tmp_path_factory.mktemp("memory"))


# ---------------------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return page.prepare(tmp_path_factory.mktemp("small"), hidden_size=128, intermediate_size=352, num_hidden_layers=4)


@pytest.mark.parametrize(("method", "recompute"), [("full", 0), ("full", 1), ("partial", 0), ("lora", 0), ("lora", 1)])
def test_live_bytes_are_those_of_the_allocator(small, method, recompute, tmp_path):
    """PyTorch's own record of what it allocates on a CPU, in the second step of the real loop, within 5 %."""
    work = small
    config = page.config_of(work, tmp_path / "run", method, recompute)
    found = explain(config).memory
    trainer = Trainer(config, QUIET)
    trainer._take()
    resting = sum(
        t.untyped_storage().nbytes()
        for t in {t.data_ptr(): t for t in (
            *trainer.made.network.model.parameters(), *trainer.made.network.model.buffers(),
            *trainer.optimizer.tensors().values())}.values()
    )  # fmt: skip
    assert found.weights + found.adapters + found.buffers + found.optimizer == pytest.approx(resting, rel=0.001)
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        trainer._take()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert found.peak == pytest.approx(resting + peak, rel=0.05)


@pytest.mark.parametrize(("method", "recompute"), [("full", 0), ("partial", 1), ("lora", 0)])
def test_peak_of_a_process_within_a_quarter(work, method, recompute, tmp_path):
    """Growth of the resident set from before the model is loaded; aimed at 15 %, docs/memory.md has the figures."""
    config = page.config_of(work, tmp_path / "run", method, recompute)
    assert explain(config).peak == pytest.approx(page.measured(config, steps=1), rel=0.25)


def test_parts_by_hand(tiny_model, settings):
    """Float32: 4 bytes of weight and gradient, 8 of moments for each element that moves."""
    total = sum(p.numel() for p in make_model().parameters())
    full = explain(configure(settings, method="full")).memory
    assert (full.weights, full.gradients, full.optimizer) == (4 * total, 4 * total, 8 * total)
    lora = explain(configure(settings, {"trainable": {"r": 2, "target_modules": ["q_proj"]}}))
    elements = 2 * 2 * (32 + 32)
    assert (lora.memory.weights, lora.memory.adapters) == (4 * total, 4 * elements)
    assert (lora.memory.gradients, lora.memory.optimizer) == (4 * elements, 8 * elements)
    assert sum(m.trainable for m in lora.moving) == elements


def test_sixteen_bits_have_masters(settings):
    total = sum(p.numel() for p in make_model().parameters())
    found = explain(configure(settings, {"precision": {"dtype": "bfloat16"}}, method="full")).memory
    assert (found.weights, found.gradients, found.optimizer) == (2 * total, 2 * total, 12 * total)


def test_late_parameters_count_when_they_move(settings):
    late = {"trainable": {"last_layers": 1, "unfreeze": [{"step": 2, "embeddings": True}]}}
    found = explain(configure(settings, late, method="partial"))
    assert found.memory.optimizer == found.start.optimizer  # moments are there from the start
    assert found.memory.gradients == found.start.gradients + 4 * 320 * 32
    assert "2 from step 2 on" in found.to_json()["unfreezing"]


def test_a_gpu_of_another_machine(settings):
    """Reckoned without one: 16 bits, masters, compiled layers, which keep less than eager ones."""
    cuda = {"parallel": {"device": "cuda"}, "batch": {"examples": 1}}
    found = explain(configure(settings, cuda, method="full"))
    eager = explain(configure(settings, cuda, {"parallel": {"compile": False}}, method="full"))
    assert found.moving[0].dtype == "bfloat16"
    assert not found.notes
    assert 0 < found.memory.activations < eager.memory.activations
    assert found.memory.gaps == 0


def test_published_peaks_of_an_h200(tmp_path):
    """docs/log.md: full 1B took 40.7 GB at 16,384 tokens in rows of up to 4,096; a peer's LoRA 8B 92.3 GB."""
    from transformers import LlamaConfig

    shape = {
        "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    }  # fmt: skip
    LlamaConfig(**shape, max_position_embeddings=8192, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    run = {
        "model": str(tmp_path), "data": {"train": [], "max_length": 4096}, "parallel": {"device": "cuda"},
        "batch": {"tokens": 16384, "micro_tokens": 16384},
    }  # fmt: skip
    assert explain(configure(run, method="full", weights=False)).peak == pytest.approx(40.7e9, rel=0.03)


def test_the_heap_by_hand():
    heap = Heap()
    heap.take(1, 1000)
    first = heap.extent
    heap.give(1)
    heap.take(2, 900)  # fits where the first was
    assert heap.extent == first
    heap.take(3, MAPPED)
    assert (heap.extent, heap.mapped) == (first, MAPPED)
    heap.give(3)
    assert (heap.mapped, heap.peak) == (0, first + MAPPED)
    generator, live = random.Random(0), {}
    for key in range(10, 3000):  # no two blocks ever overlap, and every free chunk is outside them
        if live and generator.random() < 0.5:
            gone = generator.choice(list(live))
            heap.give(gone)
            del live[gone]
        else:
            heap.take(key, generator.randint(1, 50_000))
            live[key] = True
        if key % 100 == 0:
            spans = sorted([s for s in heap.taken.values() if s[0] >= 0] + list(heap.starts.items()))
            assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))
            assert sorted(heap.sizes) == heap.sizes == sorted((n, a) for a, n in heap.starts.items())


def test_the_ledger_sees_storages_once_and_their_end():
    ledger = Ledger()
    with ledger:
        a = torch.empty(1000, device="meta")
        b = a[:10].view(2, 5)
        assert ledger.live == 4000
        c = b + 1
        assert ledger.live == 4000 + 40
        del a, b
        assert ledger.live == 40
        (torch.empty(3, 4, device="meta") @ torch.empty(4, 5, device="meta")).sum()
    assert ledger.flops == 2 * 3 * 4 * 5
    del c
    assert (ledger.live, ledger.peak) == (0, 4040)


# ---------------------------------------------------------------------------- operations


@pytest.mark.parametrize("method", ["full", "partial", "lora"])
def test_operations_are_those_that_pytorch_counts(settings, method):
    config = configure(settings, {"data": {"validation": None}, "batch": {"examples": 1}}, method=method)
    found = explain(config)
    trainer = Trainer(config, QUIET)
    lengths = trainer.training.lengths
    largest = max((row for step in trainer.steps for row in step), key=lambda row: sum(lengths[d] for d in row))
    aten = torch.ops.aten

    def added(total, a, b, out_shape=None, **_):  # PyTorch does not count it where it works in place
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={aten.addmm_: added}) as counter:
        loss = trainer.made.objective(trainer.made.network, trainer._batch(largest))
        loss.total.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op))
    assert found.work.forward + found.work.backward == products


def test_operations_by_the_formula(tiny_model, settings):
    """6 N + A for full, 4 N + 6 N_lora + A for LoRA, where the first layer's input needs no gradient."""
    n, length, width = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) + 320 * 32, 64, 32
    run = {"batch": {"examples": 1}, "data": {"max_length": length}}
    attention = 6 * 2 * width * length
    full = explain(configure(settings, run, method="full"), count=False).per_token()
    assert full["attention"] == attention
    assert full["forward"] + full["backward"] == 6 * n + attention
    lora = explain(configure(settings, run, {"trainable": {"r": 2}}), count=False).per_token()
    n_lora = 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    saved = 2 * (32 * 32 + 2 * 16 * 32) + 2 * 3 * 32 * 2  # gradients of the inputs of q, k and v of the first layer
    assert lora["forward"] + lora["backward"] == 4 * n + 6 * n_lora + attention - saved


def test_recomputation_and_freezing_show(settings):
    def backward(**extra):
        return explain(configure(settings, extra, method="partial")).work.backward

    one = backward(trainable={"last_layers": 1})
    assert backward(trainable={"last_layers": 2}) > 1.5 * one
    assert backward(trainable={"last_layers": 1}, parallel={"activation_checkpointing": 1}) > one


# ---------------------------------------------------------------------------- families, folders, files


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("packing", [True, False])
def test_families(family, packing, settings, tmp_path):
    """With a config.json only, what moves is what moves in the loaded model."""
    model = make_model(family)
    model.config.save_pretrained(tmp_path / "bare")
    extra = {"model": str(tmp_path / "bare"), "batch": {"packing": packing}}
    for method in ("lora", "full"):
        config = configure(settings, extra, method=method, weights=False)
        found = explain(config)
        model = make_model(family)
        config.trainable.apply(model)
        assert found.moving == moving(model)
        assert found.memory.activations > 0
        assert found.made.network.packed == packing
        assert "cannot be counted" in found.plan.source  # there is no tokenizer


def test_nothing_is_loaded_or_written(tmp_path, monkeypatch, capsys):
    """A 70B model in seconds, from its config.json; no file appears or changes."""
    from transformers import LlamaConfig

    folder = tmp_path / "large"
    LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    began = time.monotonic()
    assert main(["explain", f"model={folder}", "max_steps=10", "--json"]) == 0
    assert time.monotonic() - began < 30
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["weights"] == 4 * 70_553_706_496
    assert found["plan"]["steps"] == 10
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_gguf_file_by_its_head(settings, written):  # noqa: F811
    path, model = written
    found = explain(configure(settings, {"model": str(path), "data": {"train": [], "validation": None}}, weights=False))
    assert found.memory.weights == 4 * sum(p.numel() for p in model.parameters())


def test_files_are_the_answers_of_the_axes(settings):
    files = running(configure(settings, method="lora"))
    assert files["loop"][0] == "train.py"
    assert "trainable/lora.py" in files["trainable"]
    assert "trainable/partial.py" not in files["trainable"]
    assert files["objectives"] == [f"objectives/{name}.py" for name in ("cross_entropy", "next_token", "objective")]
    assert "optim/adamw.py" in files["optim"]
    assert "trainable/partial.py" in running(configure(settings, method="partial"))["trainable"]
    package = Path(sys.modules["luthier"].__file__).parent
    assert all((package / name).is_file() for names in files.values() for name in names)


# ---------------------------------------------------------------------------- plan, schedule, words


def test_the_plan_is_that_of_the_run(settings):
    config = configure(settings)
    found, trainer = explain(config).plan, Trainer(config, QUIET)
    rows = [row for step in trainer.steps for row in step]
    assert found.steps == len(trainer.steps)
    assert found.rows_per_step == len(rows) / len(trainer.steps)
    assert found.largest.tokens == max(sum(trainer.training.lengths[d] for d in row) for row in rows)
    assert found.tokens_per_step * found.steps == sum(trainer.training.lengths[d] for row in rows for d in row)


@pytest.mark.parametrize(
    ("batch", "row", "rows", "tokens"),
    [
        ({"examples": 16, "micro_tokens": 4096}, 4096, 8, 32768),
        ({"examples": 1, "micro_tokens": 4096}, 2048, 1, 2048),
        ({"tokens": 16384, "micro_tokens": 4096}, 4096, 4, 16384),
        ({"tokens": 5000, "micro_tokens": 5000}, 5000, 1, 5000),
    ],
)
def test_assumed_plans_by_hand(tiny_model, batch, row, rows, tokens):
    values = {"model": str(tiny_model), "data": {"train": [], "max_length": 2048}, "batch": batch}
    config = configure(values, weights=False)
    found = assumed(config, "assumed")
    assert (found.largest.tokens, found.rows_per_step, found.tokens_per_step) == (row, rows, tokens)


def test_the_curve(settings):
    config = configure(settings, {"schedule": {"kind": "linear", "warmup": 2}, "max_steps": 10})
    values = rates(config, 10)
    assert values == [1e-2 * schedule.factor(config.schedule, step, 10) for step in range(10)]
    lines = curve.drawn(values, width=10, height=4).splitlines()
    columns = [sum(curve.BLOCKS.index(line[11:].ljust(10)[i]) for line in lines[:4]) for i in range(10)]
    assert columns == [round(v / 1e-2 * 32) for v in values]
    picture = curve.svg(values, "a < b")
    assert "a &lt; b" in picture
    assert picture.count(",") == 10


def test_the_command(settings, tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(settings))
    assert main(["explain", "--method", "full", "--plot", str(path)]) == 0
    told = capsys.readouterr().out
    for text in ("what moves", "backward through 2 of 2 layers", "peak", "full.py", "6 steps", "learning rate"):
        assert text in told
    out = tmp_path / "rate.svg"
    assert main(["explain", str(path), "--plot", str(out), "--json", "--measure"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] > 0
    assert "measured" in found["rate_source"]
    assert out.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--plot", "rate.png"], "use --plot rate.svg"),
        (["max_steps=null", "data.train=[]", "data.validation=null", "--plot"], "give max_steps"),
        (["optim.learning_rat=1"], "did you mean 'learning_rate'"),
    ],
)
def test_refused(settings, tmp_path, arguments, text, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(settings))
    assert main(["explain", str(path), *arguments]) == ConfigError.exit_code
    assert text in capsys.readouterr().err


def test_help_is_light():
    code = "import sys; from luthier.cli import main\ntry: main(['explain', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
