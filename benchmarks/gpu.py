"""The fast path on one GPU: checked against plain transformers, then timed in the real loop.

    python benchmarks/gpu.py check                 # kernels, attention, loss and gradients against plain PyTorch
    python benchmarks/gpu.py resume                # stopped and resumed in another process: the same bytes?
    python benchmarks/gpu.py objectives            # every objective killed and resumed: the same bytes?
    DTYPE=float32 python benchmarks/gpu.py objectives dpo   # without the kernels that bfloat16 has
    python benchmarks/gpu.py full-1b lora-8b       # tokens per second of optimiser steps, random weights
    python benchmarks/gpu.py qlora-8b              # rows of 4,096 slots, every layer recomputed: memory
    DETERMINISTIC=0 python benchmarks/gpu.py full-1b   # with kernels that may give other bytes every time

Shapes are Llama 3.2 1B and Llama 3.1 8B; documents have log-normal lengths (mean 600, 16 to 4,096) of random tokens,
each of which is learnt; a step is 16,384 token slots. Each workload prints one line `RESULT {json}`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from luthier import assemble, configure, kernels
from luthier import train as _train_function  # noqa: F401
from luthier.batch import Batch, Document
from luthier.data import dataset as datasets
from luthier.methods import METHODS
from luthier.models import network, streaming, trials
from luthier.monitor import Console, memory_gb
from luthier.objectives import NextToken
from luthier.parallel import Parallel, layers
from luthier.precision import FP8, NF4, Int8
from luthier.surgery import adapters, swap
from luthier.trainable import Full, LoRA, Trainable
from luthier.trainable.adapter import Adapting

loop = sys.modules["luthier.train"]
SHAPES = {
    "1b": {
        "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "8b": {
        "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU for a try of this script, with TINY=1
TINY = bool(os.environ.get("TINY"))
if TINY:
    for shape in SHAPES.values():
        shape |= {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512}  # fmt: skip
OPTIONS = {  # what else a run can keep between steps
    "optim": {"kind": "muon", "learning_rate": 1e-3}, "averaging": {"kind": "ema", "decay": 0.9},
    "regularisation": {"dropout": 0.1, "neftune_noise_alpha": 5.0},
    "objective": {"label_smoothing_factor": 0.1}, "clipping": {"kind": "adaptive"},
}  # fmt: skip
EIGHT_BIT = {"optim": {"kind": "adamw_8bit", "rounding": "stochastic", "learning_rate": 1e-4}}
WORKLOADS = {"full-1b": ("1b", "full"), "lora-8b": ("8b", "lora"), "lora-1b": ("1b", "lora"),
             "options-1b": ("1b", "options"), "8-bit-1b": ("1b", "8-bit"), "qlora-8b": ("8b", "qlora"),
             "qdora-8b": ("8b", "qdora"), "dora-1b": ("1b", "dora")}  # fmt: skip
LEAN = {"qlora-8b": {"MICRO": "4096", "RECOMPUTE": "1"}, "qdora-8b": {"MICRO": "4096", "RECOMPUTE": "1"}}


def llama(shape: str, dtype: torch.dtype = torch.bfloat16, store=None, **changes):
    """A Llama of random weights, made on the GPU; with a `store`, each layer goes into its bits as it is drawn."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **(SHAPES[shape] | changes), max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    if store is None:
        torch.set_default_dtype(dtype)
        with torch.device(DEVICE):
            model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        return model
    model = streaming.skeleton(config, dtype)
    layers_of = set(store.names(model))
    for name, module in list(model.named_modules()):
        if own := list(module.parameters(recurse=False)):
            module.to_empty(device=DEVICE, recurse=False)
            for parameter in module.parameters(recurse=False):
                torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
        if name in layers_of and own:
            swap(model, name, store.layer(module))
    return model.to(DEVICE)


def documents(count: int, vocabulary: int, longest: int = 4096, mean: float = 600.0) -> list[Document]:
    rng = np.random.default_rng(0)
    lengths = np.clip(np.round(rng.lognormal(np.log(mean) - 0.5, 1.0, count)), 16, longest).astype(int)
    made = []
    for i, n in enumerate(lengths):
        weights = np.ones(n, np.float32)
        weights[0] = 0
        made.append(Document(rng.integers(3, vocabulary, n).astype(np.int32), weights, i))
    return made


# ---------------------------------------------------------------------------- checks


def check_kernels() -> None:
    torch.manual_seed(0)
    for rows, vocabulary, smoothing in ((5, 1000, 0.0), (300, 128256, 0.0), (300, 128256, 0.1)):
        logits = torch.randn(rows, vocabulary, device="cuda").bfloat16()
        targets = torch.randint(vocabulary, (rows,), device="cuda")
        weights = torch.rand(rows, device="cuda")
        exact = logits.float().requires_grad_()
        one_by_one = {"reduction": "none", "label_smoothing": smoothing}
        expected = torch.nn.functional.cross_entropy(exact, targets, **one_by_one) * weights
        expected.sum().backward()
        losses = kernels.cross_entropy_(logits, targets, weights, smoothing)
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits.float(), exact.grad, rtol=1e-2, atol=1e-3)
    p = torch.nn.Parameter(torch.randn(1000, 37, device="cuda").bfloat16())
    exact = torch.nn.Parameter(p.detach().float())
    reference = torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.1)
    master, m, v = exact.detach().clone(), *(torch.zeros_like(exact) for _ in range(2))
    for step in range(1, 6):
        grad = torch.randn_like(p)
        exact.grad = grad.float() * 0.5
        reference.step()
        kernels.adamw_(p.detach(), master, grad, m, v, torch.tensor(0.5, device="cuda"), lr=1e-2, decay=0.1,
                       beta1=0.9, beta2=0.999, eps=1e-8, step=step)  # fmt: skip
    torch.testing.assert_close(master, exact.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(p, master.bfloat16())
    print("check: kernels equal PyTorch")


def check_rounding() -> None:
    """AdamW without masters: to the nearest as PyTorch rounds, or to a neighbour with the right odds."""
    torch.manual_seed(0)
    common = {"lr": 1e-2, "decay": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 1}
    start, grad = torch.randn(1000, 37, device="cuda").bfloat16(), torch.randn(1000, 37, device="cuda").bfloat16()
    exact = torch.nn.Parameter(start.float())
    exact.grad = grad.float()
    torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.1).step()
    one = torch.ones((), device="cuda")
    bits = exact.detach().view(torch.int32) & -65536
    neighbours = [(bits + more).view(torch.float32) for more in (0, 65536)]
    for seed in (None, 5, 5, 6):
        p, m, v = start.clone(), torch.zeros_like(exact), torch.zeros_like(exact)
        kernels.adamw_(p, None, grad, m.detach(), v.detach(), one, seed=seed, **common)
        if seed is None:
            # The last bit of float32 may fall otherwise, and then now and then the rounding.
            assert (p != exact.detach().bfloat16()).float().mean() < 1e-3
            continue
        outside = ~((p.float() - neighbours[0]).abs() * (p.float() - neighbours[1]).abs()).eq(0)
        assert outside.float().mean() < 1e-3
        error = (p.float() - exact.detach()) / (neighbours[1] - neighbours[0]).abs()
        assert abs(error.mean().item()) < 5 * 0.5 / error.numel() ** 0.5
    n = 1 << 20
    ends = []
    for seed in (7, 7, 16, 1):
        p = torch.ones(n, device="cuda").bfloat16()
        m, v = torch.zeros(n, device="cuda"), torch.zeros(n, device="cuda")
        kernels.adamw_(p, None, torch.ones_like(p), m, v, one, seed=seed, **common | {"lr": 2**-10, "decay": 0.0})
        share = (p < 1).float().mean().item()  # 1 - 2^-10 is a quarter of the way to the number below 1
        assert abs(share - 0.25) < 5 * (0.25 * 0.75 / n) ** 0.5, share
        ends.append(p)
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    print("check: rounding is to the nearest, or right on average and the same for the same seed")


def check_optimisers() -> None:
    """A few steps of each optimiser, on the GPU and on the CPU."""
    from pydantic import TypeAdapter

    from luthier.optim import Optim
    from luthier.optim.optimizer import Optimizer

    kinds = ("adamw", "adamw_8bit", "adafactor", "sgd", "lion", "muon", "schedule_free_adamw")
    for kind in kinds:
        for dtype in (torch.float32, torch.bfloat16):
            ends = {}
            for device in ("cpu", "cuda"):
                torch.manual_seed(0)
                start = {n: torch.randn(s) for n, s in {"matrix": (300, 200), "vector": (300,)}.items()}
                parameters = {n: torch.nn.Parameter(t.clone().to(device, dtype)) for n, t in start.items()}
                settings = {"kind": kind, "learning_rate": 1e-2, "weight_decay": 0.1}
                optimizer = Optimizer(parameters, TypeAdapter(Optim).validate_python(settings))
                for _ in range(5):
                    for p in parameters.values():
                        p.grad = torch.randn(p.shape).to(device, dtype)
                    optimizer.step(1.0, torch.tensor(0.5, device=device))
                moved = {n: optimizer.masters.get(n, p.detach()).float().cpu() for n, p in parameters.items()}
                ends[device] = torch.cat([(t - start[n].to(dtype)).flatten() for n, t in moved.items()])
            off = ((ends["cuda"] - ends["cpu"]).norm() / ends["cpu"].norm()).item()
            print(f"check: {kind} {dtype}: the GPU's change is {off:.1e} off the CPU's")
            assert off < (0.02 if kind in ("muon", "adamw_8bit", "lion") else 1e-4), kind  # bfloat16, codes, signs


def check_loss(name: str, model, config) -> None:
    """Packed, compiled, chunked against one document at a time through the model's own attention and logits."""
    docs = documents(12, 30000, 900, 200)
    batch = Batch.pack(docs).to(torch.device("cuda"))
    model.train()
    net = network.Network(model)
    net.longest = 1024
    trials.check_head(net)
    assert trials.prepare(net, "packed") is None
    config.apply(model)
    with torch.no_grad():
        for _, adapter in adapters(model):
            adapter.lora_B.normal_(std=0.02)
    moving = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {}
    for compiled in (False, True):
        if compiled:
            layers.compile_layers(Parallel(compile=True), model, torch.device("cuda"))
        loss = NextToken().build()(net, batch)
        loss.total.backward()
        found[compiled] = loss.total.item(), {n: p.grad.float().clone() for n, p in moving.items()}
        model.zero_grad()
    total = 0.0
    with net.natively() as plain:
        plain.train()
        for d in docs:
            tokens = torch.from_numpy(d.tokens.astype(np.int64)).cuda()[None]
            logits = plain(input_ids=tokens, use_cache=False).logits[0, :-1].float()
            one = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
            one.backward()
            total += one.item()
    for compiled, (value, gradients) in found.items():
        worst = min(torch.nn.functional.cosine_similarity(g.flatten(), moving[n].grad.float().flatten(), 0).item()
                    for n, g in gradients.items())  # fmt: skip
        print(
            f"check: {name} compiled={compiled}: loss {value / total - 1:+.1e} from the plain path's, "
            f"gradients' least cosine {worst:.5f}"
        )
        assert abs(value / total - 1) < 2e-3
        assert worst > 0.99


def check_windows() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(vocab_size=32000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
                           num_attention_heads=8, num_key_value_heads=4, head_dim=64, sliding_window=64)  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = MistralForCausalLM(config).bfloat16()
    check_loss("sliding window", model, Full())


def check_adapters() -> None:
    """Every adapter of the union: packed, and compiled with recomputation, against padded."""
    for cls in get_args(get_args(Trainable)[0]):
        if not issubclass(cls, Adapting):
            continue
        found = {}
        for way in ("padded", "packed", "recomputed"):
            model = llama("1b", num_hidden_layers=4)
            vocabulary, longest, mean = (500, 90, 20) if TINY else (30000, 900, 200)
            batch = Batch.pack(documents(12, vocabulary, longest, mean)).to(torch.device(DEVICE))
            model.train()
            net = network.Network(model)
            net.longest = 1024
            assert trials.prepare(net, "padded" if way == "padded" else "packed") is None or way == "padded"
            torch.manual_seed(1)
            cls().apply(model)
            moving = {n: p for n, p in model.named_parameters() if p.requires_grad}
            with torch.no_grad():
                for p in moving.values():
                    p.add_(torch.randn_like(p) * 0.02)
            if way == "recomputed":
                layers.checkpoint_activations(Parallel(activation_checkpointing=1), model)
            if way == "recomputed":
                net.compiled = True
                layers.compile_layers(Parallel(compile=True), model, torch.device(DEVICE))
            loss = NextToken().build()(net, batch)
            loss.total.backward()
            found[way] = loss.total.item(), {n: p.grad.float() for n, p in moving.items()}
        total, exact = found.pop("padded")
        for way, (value, gradients) in found.items():
            cosines = {n: torch.nn.functional.cosine_similarity(g.flatten(), exact[n].flatten(), 0).item()
                       for n, g in gradients.items()}  # fmt: skip
            name = min(cosines, key=cosines.__getitem__)
            print(f"check: {cls.__name__} {way}: loss {value / total - 1:+.1e} from the padded path's, gradients' "
                  f"least cosine {cosines[name]:.5f} ({name})", flush=True)  # fmt: skip
            assert abs(value / total - 1) < 2e-3
            assert cosines[name] > 0.98


def check_storage() -> None:
    """Weights in fewer bits: the same numbers made on a GPU as on a CPU, and products as of the dequantised weight."""
    for config in (NF4(), NF4(double_quant=False), Int8(), FP8()):
        torch.manual_seed(0)
        plain = torch.nn.Linear(512, 768, dtype=torch.bfloat16)
        store = config.storage(torch.bfloat16)
        there = store.layer(plain)
        here = store.layer(copy.deepcopy(plain).to(DEVICE))
        parts = {n: (t.float() - here.get_buffer(n).cpu().float()).abs().max().item() for n, t in there.named_buffers()}
        x = torch.randn(64, 512, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        weight = here.dequantize(torch.bfloat16)
        expected = torch.nn.functional.linear(x, weight, here.bias)
        upstream = torch.randn_like(expected)
        (dx,) = torch.autograd.grad(expected, x, upstream)
        for way in (here, torch.compile(here, fullgraph=True)):
            y = way(x)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(torch.autograd.grad(y, x, upstream)[0], dx, rtol=2e-2, atol=2e-2)
        print(f"check: {config.kind}: GPU and CPU differ by {parts}", flush=True)
        assert max(parts.values()) < 1e-6


def check() -> None:
    check_storage()
    check_adapters()
    check_kernels()
    check_rounding()
    check_optimisers()
    check_loss("llama full", llama("1b", num_hidden_layers=4), Full())
    check_loss("llama lora", llama("1b", num_hidden_layers=4), LoRA(r=16))
    check_windows()


# ---------------------------------------------------------------------------- every objective


OBJECTIVES = ("classify", "classify_tokens", "dpo", "simpo", "orpo", "cpo", "kto", "reward", "distill", "grpo", "dapo",
              "gspo", "ppo")  # fmt: skip
ROWS = {
    "pairs": lambda q, i: {"prompt": q, "chosen": f"good {i}", "rejected": f"{i} bad"},
    "unpaired": lambda q, i: {"prompt": q, "completion": f"say {i}", "label": i % 3 > 0},
    "labelled": lambda q, i: {"text": f"{q} {i}", "label": "xyz"[i % 3]},
    "tagged": lambda q, i: {"tokens": [q, "in", f"{i}"], "tags": ["B-Q", "O", f"B-{i % 2}"]},
    "prompts": lambda q, i: {"prompt": q, "answer": str(i)},
    "text": lambda q, i: {"prompt": q, "completion": f"say {i}"},
}
ROWS["whole_pairs"] = ROWS["pairs"]
UNNAMED = argparse.Namespace(default=None)


def objective_run(method: str, base: str, folder: str):
    """Configuration of six steps on made rows: bfloat16 and compiled, as a GPU does by default."""
    from luthier.objectives import objective as objectives

    kind = METHODS[method].kinds["objective"]
    learning = next(c for c in _subclasses(objectives.Learning) if c.model_fields.get("kind", UNNAMED).default == kind)
    rows = Path(folder + ".jsonl")
    asked = [(f"what is {word} {i % 5}?", i) for i, word in enumerate(("a", "bb", "ccc", "dd", "e", "ffff") * 8)]
    rows.write_text("".join(json.dumps(ROWS[learning.rows](q, i)) + "\n" for q, i in asked))
    given: dict = {}
    if kind in ("grpo", "ppo"):
        target = {"kind": "length", "unit": "characters", "target": 6}
        given = {"rewards": [target], "num_mini_batches": 2, "max_completion_length": 12}
        given |= {"num_generations": 4} if kind == "grpo" else {}
    if method == "distill":
        given = {"teacher": base, "top_k": 8}
    return configure(
        {
            "model": base, "data": {"train": str(rows), "max_length": 128}, "max_steps": 6, "objective": given,
            "batch": {"examples": 8, "micro_tokens": 1024}, "monitor": {"report_to": []}, "output_dir": folder,
            "optim": {"learning_rate": 1e-3}, "checkpoint": {"every": 3},
            "precision": {"dtype": os.environ.get("DTYPE", "auto")},
        },
        method=method,
    )  # fmt: skip


def _subclasses(cls) -> list:
    return [c for sub in cls.__subclasses__() for c in (sub, *_subclasses(sub))]


def objective_part(method: str, base: str, folder: str, until: int) -> None:
    for step in loop.Trainer(objective_run(method, base, folder), Console(quiet=True)).loop():
        assert np.isfinite(step.loss), step
        if step.step == until:
            os._exit(0)


def objective_base(folder: str) -> str:
    """A small model with a tokenizer that both can be loaded by name."""
    rows = Path(folder + ".jsonl")
    rows.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": f"say {i}"}) + "\n" for i in range(64)))
    shape = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
    config = configure(
        {"model": {"config": shape, "tokenizer": "train", "vocab_size": 300, "chat_template": "chatml"},
         "data": {"train": str(rows), "max_length": 128}, "max_steps": 2, "monitor": {"report_to": []},
         "output_dir": folder + "-run"},
        method="full",
    )  # fmt: skip
    loop.train(config, Console(quiet=True)).export(Path(folder), "full")
    return folder


def objectives(methods: Sequence[str]) -> None:
    """Whole, again, and dropped dead after step 4 and resumed from step 3; methods side by side."""
    from concurrent.futures import ThreadPoolExecutor

    with tempfile.TemporaryDirectory() as root:
        base = objective_base(f"{root}/base")

        def ends(method: str) -> str:
            found, began = [], time.perf_counter()
            for name, stops in (("whole", [7]), ("again", [7]), ("parted", [4, 7])):
                folder = f"{root}/{method}-{name}"
                for stop in stops:
                    command = [sys.executable, __file__, "objective", method, base, folder, str(stop)]
                    ran = subprocess.run(command, capture_output=True, text=True)
                    if ran.returncode:
                        return f"check: {method}: FAILED {ran.stderr[-1500:]}"
                last = Path(folder) / "checkpoints" / "step-00000006"
                found.append({p.name: p.read_bytes() for p in sorted(last.iterdir()) if p.suffix == ".safetensors"})
            same = [all(found[0][name] == end[name] for name in found[0]) for end in found[1:]]
            return (f"check: {method}: a second run has the same bytes: {same[0]}; a resumed one: {same[1]} "
                    f"({time.perf_counter() - began:.0f} s)")  # fmt: skip

        with ThreadPoolExecutor(7) as pool:
            said = list(pool.map(ends, methods))
        print("\n".join(said), flush=True)
        assert all("FAILED" not in one and "False" not in one for one in said)


# ---------------------------------------------------------------------------- timing


def trainer_of(shape: str, method: str, steps: int, folder: str, checkpoint: int | None = None, **changes):
    """The trainer itself, on random weights and made documents instead of files."""
    for key, value in LEAN.get(f"{method}-{shape}", {}).items():
        os.environ.setdefault(key, value)
    micro = int(os.environ.get("MICRO", 16384))
    docs = documents(700, SHAPES[shape]["vocab_size"])
    made = datasets.Dataset(docs, [], [], "made", "made", None)  # type: ignore[arg-type]
    assemble._model = lambda config, tokenizer, dtype, device, tell: llama(
        shape, dtype, config.precision.storage(dtype), **changes
    )
    loop.tokenizer_and_renderer = lambda config, say: (None, None)
    datasets.open_rows = lambda *_: (made, None)
    config = configure(
        {
            "model": "random/weights", "data": {"train": "random/rows", "max_length": 4096}, "max_steps": steps,
            "batch": {"tokens": 16384, "micro_tokens": micro}, "monitor": {"report_to": []},
            "output_dir": folder, "checkpoint": {"every": checkpoint},
            "parallel": {
                "activation_checkpointing": int(os.environ.get("RECOMPUTE", 0)),
                "deterministic": os.environ.get("DETERMINISTIC", "1") == "1",
            },
        },
        {"optim": {"learning_rate": 1e-5 if method == "full" else 1e-4}},
        {"trainable": {"r": 16}} if "lora" in method or "dora" in method else {},
        {"options": OPTIONS, "8-bit": EIGHT_BIT}.get(method, {}),
        method=method if method in METHODS else "full",
    )  # fmt: skip
    return loop.Trainer(config, Console(quiet=True))


def part(method: str, folder: str, until: int) -> None:
    """Go on with a run of six steps, and drop dead after `until`."""
    for step in trainer_of("1b", method, 6, folder, 3, num_hidden_layers=4).loop():
        if step.step == until:
            os._exit(0)


def resume(methods: Sequence[str]) -> None:
    for method in methods:
        ends = []
        with tempfile.TemporaryDirectory() as root:
            for name, stops in (("whole", [7]), ("again", [7]), ("parted", [4, 7])):
                folder = Path(root) / name
                for stop in stops:
                    command = [sys.executable, __file__, "part", method, str(folder), str(stop)]
                    subprocess.run(command, check=True)
                last = folder / "checkpoints" / "step-00000006"
                ends.append({p.name: p.read_bytes() for p in sorted(last.iterdir()) if p.suffix == ".safetensors"})
        same = [all(ends[0][name] == end[name] for name in ends[0]) for end in ends[1:]]
        print(f"check: {method}: a second run has the same bytes: {same[0]}; a resumed one: {same[1]}", flush=True)
        assert all(same) or os.environ.get("DETERMINISTIC") == "0"


def workload(name: str, profile: str | None = None) -> dict:
    steps, warmup = (3, 1) if TINY else (12, 4)
    shape, method = WORKLOADS[name]
    trainer = trainer_of(shape, method, steps, tempfile.mkdtemp())
    speeds, losses = [], []
    for i in range(steps):
        if i == warmup:
            _wait()
            began, counted = time.perf_counter(), 0
        taken = trainer._take()
        losses.append(taken.loss)
        if i >= warmup:
            speeds.append(taken.tokens / trainer.seconds)
            counted += taken.tokens
    _wait(reset=False)
    result = {
        "workload": name, "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_wall": counted / (time.perf_counter() - began),
        "peak_gb": memory_gb(),
        "first_loss": losses[0], "last_loss": losses[-1], "tokens_per_step": counted / (steps - warmup),
    }  # fmt: skip
    if profile:
        _profile(trainer, profile)
    return result


def _wait(reset: bool = True) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()


def _profile(trainer, path: str) -> None:
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        trainer.step = 0
        for _ in range(2):
            trainer._take()
        torch.cuda.synchronize()
    kernels_ = [e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels_.sort(key=lambda e: -e.self_device_time_total)
    lines = [f"{e.self_device_time_total / 2000:8.2f} ms a step {e.count // 2:5d}  {e.key[:70]}" for e in kernels_[:30]]
    busy = sum(e.self_device_time_total for e in kernels_) / 2000
    Path(path).write_text("\n".join([f"{busy:8.2f} ms a step of kernels", *lines]) + "\n")


def main() -> None:
    wanted = sys.argv[1:] or ["check", *WORKLOADS]
    if wanted[0] == "part":
        part(wanted[1], wanted[2], int(wanted[3]))
        return
    if wanted[0] == "objective":
        objective_part(*wanted[1:4], int(wanted[4]))
        return
    if wanted[0] == "objectives":
        objectives(wanted[1:] or OBJECTIVES)
        return
    if wanted[0] == "resume":
        resume(wanted[1:] or ("full", "lora", "options", "8-bit"))
        return
    if len(wanted) > 1:  # a process each: memory and compiled graphs of one are not another's
        codes = [subprocess.run([sys.executable, __file__, name]).returncode for name in wanted]
        sys.exit(max(codes))
    if wanted[0] == "check":
        check()
        return
    print("RESULT " + json.dumps(workload(wanted[0], profile=os.environ.get("PROFILE"))), flush=True)


if __name__ == "__main__":
    main()
