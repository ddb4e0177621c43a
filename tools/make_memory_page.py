"""Writes docs/memory.md: what `luthier explain` predicts beside what a run then takes, measured in a process."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from luthier import Config, configure, explain

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
CASES = [
    ("full", 0, {}), ("full", 1, {}), ("partial", 0, {}), ("partial", 1, {}), ("lora", 0, {}), ("lora", 1, {}),
    ("lora", 2, {}), ("full", 0, {"batch": {"examples": 2}}), ("lora", 0, {"data": {"max_length": 256}}),
    ("partial", 0, {"trainable": {"unfreeze": [{"step": 1, "last_layers": 4}]}}),
]  # fmt: skip

RUN = """
import ctypes, json, sys
import torch
torch.set_num_threads(1)
import transformers
from transformers import AutoTokenizer, LlamaForCausalLM
from luthier import configure
from luthier import train
from luthier.monitor import Console
def resident(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
config = configure(json.loads(sys.argv[1]), method=sys.argv[2])
ctypes.CDLL(None).malloc_trim(0)  # what imports left free must not be counted as there before and used again
before = resident("VmRSS")
trainer = sys.modules["luthier.train"].Trainer(config, Console(quiet=True))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark starts again
for _ in range(int(sys.argv[3])):
    trainer._take()
print(resident("VmHWM") - before)
"""

HEAD = """\
# Memory: predicted and measured

`luthier explain` runs one step on shapes alone, with no values: the run's own network, objective and optimiser, on the
meta device, while it counts the bytes that live. On a CPU the allocator adds to that: glibc leaves gaps between blocks
of different lengths, which are reckoned by placing the same blocks into a model of its heap. One number in that model
was fitted to such measurements (`TAKEN` in `explain/heap.py`), so the heap's part is an estimate; the live bytes are
within 5 % of PyTorch's own record (`tests/test_explain.py`). The test of the whole asserts 25 %.

What is measured is the growth of the resident set of a process, from before the model is loaded to the peak of three
optimiser steps: a Llama of 44M parameters, random texts of 100 to 500 tokens, rows of up to 1,024 tokens, float32, one
thread. {machine}

| method | recomputed | otherwise | predicted, MB | of it live | measured, MB | error |
| --- | --- | --- | --- | --- | --- | --- |
"""
TAIL = """
What no row of this page covers: evaluation and generation (their rows keep nothing for a backward pass; a cache of keys
and values can be larger than that for long answers), writing checkpoints, and processes that load more than PyTorch and
transformers. On a GPU, `benchmarks/memory.py` compares the prediction with `torch.cuda.max_memory_allocated`.

This page is written by `tools/make_memory_page.py`.
"""


def prepare(folder: Path, **changes: int) -> Path:
    """A model of random weights, a tokenizer of bytes, and rows; `changes` of the model's shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from conftest import make_tokenizer

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8}
    config = LlamaConfig(**(shape | changes), vocab_size=8192, num_key_value_heads=4, max_position_embeddings=2048)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    letters = random.Random(0)
    texts = ["".join(letters.choice("abcdefgh ") for _ in range(letters.randint(100, 500))) for _ in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def config_of(work: Path, out: Path, method: str, recompute: int, extra: dict | None = None) -> Config:
    return configure(
        {
            "model": str(work / "model"), "data": {"train": str(work / "rows.jsonl"), "max_length": 512},
            "batch": {"examples": 8, "micro_tokens": 1024}, "max_steps": 3, "output_dir": str(out),
            "monitor": {"report_to": []}, "parallel": {"activation_checkpointing": recompute, "device": "cpu"},
        },
        {"data": {"on_bad_row": "skip"}}, extra or {}, method=method,
    )  # fmt: skip


def measured(config: Config, steps: int = 3) -> int:
    """Bytes that a process grows by."""
    arguments = [sys.executable, "-c", RUN, json.dumps(config.model_dump(mode="json")), config.method, str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment)
    return int(ran.stdout.split()[-1])


def main() -> None:
    import platform

    import torch
    import transformers

    lines, errors = [], []
    with tempfile.TemporaryDirectory() as name:
        work = prepare(Path(name))
        for i, (method, recompute, extra) in enumerate(CASES):
            config = config_of(work, work / str(i), method, recompute, extra)
            found, real = explain(config), measured(config)
            errors.append(found.peak / real - 1)
            often = {0: "no layer", 1: "all layers"}.get(recompute, f"every layer of {recompute}")
            other = ", ".join(f"{s}.{k}={json.dumps(v)}" for s, values in extra.items() for k, v in values.items())
            lines.append(
                f"| {method} | {often} | {f'`{other}`' if other else ''} | {found.peak / 1e6:,.0f} "
                f"| {found.memory.peak / 1e6:,.0f} | {real / 1e6:,.0f} | {errors[-1]:+.0%} |"
            )
            print(lines[-1], flush=True)
    machine = f"PyTorch {torch.__version__}, transformers {transformers.__version__}, {platform.libc_ver()[1]} glibc."
    mean = sum(abs(e) for e in errors) / len(errors)
    last = f"\nMean error {mean:.0%}, largest {max(errors, key=abs):+.0%}.\n"
    PAGE.write_text(HEAD.format(machine=machine) + "\n".join(lines) + "\n" + last + TAIL)
    print(PAGE)


if __name__ == "__main__":
    main()
