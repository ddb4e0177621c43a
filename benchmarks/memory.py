"""`luthier explain` against the memory of a GPU: predicted, `torch.cuda.max_memory_allocated`, error.

    python benchmarks/memory.py                                   # all workloads, a process each
    python benchmarks/memory.py full-1b lora-8b lora-8b-recompute # some
    python benchmarks/memory.py --predict                         # without a GPU: the predictions only

The runs are those of `benchmarks/gpu.py`: Llama 3.2 1B and 3.1 8B, random weights, documents of log-normal lengths,
16,384 token slots a step. Each workload prints one line `RESULT {json}`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu

from luthier import configure
from luthier.assemble import outline
from luthier.explain.plan import Plan, Row
from luthier.explain.rehearsal import rehearse
from luthier.parallel.layers import compiled

WORKLOADS = {  # shape, method, recompute, micro_tokens
    "full-1b": ("1b", "full", 0, 16384),
    "full-1b-recompute": ("1b", "full", 1, 16384),
    "full-1b-accumulated": ("1b", "full", 0, 4096),
    "lora-8b": ("8b", "lora", 0, 16384),
    "lora-8b-recompute": ("8b", "lora", 1, 16384),
    "lora-8b-half": ("8b", "lora", 2, 16384),
    "lora-8b-accumulated": ("8b", "lora", 0, 4096),
}


def predicted(name: str) -> dict:
    from transformers import LlamaConfig

    shape, method, recompute, micro = WORKLOADS[name]
    with tempfile.TemporaryDirectory() as folder:
        made = LlamaConfig(**gpu.SHAPES[shape], max_position_embeddings=8192, architectures=["LlamaForCausalLM"])
        made.save_pretrained(folder)
        config = configure(
            {
                "model": folder, "data": {"train": [], "max_length": 4096}, "parallel": {
                    "device": "cuda", "activation_checkpointing": recompute},
                "batch": {"tokens": 16384, "micro_tokens": micro},
            },
            {"trainable": {"r": 16}} if method == "lora" else {}, method=method, weights=False,
        )  # fmt: skip
        network = outline(config, "cuda")
    lengths, left = [], micro
    for document in gpu.documents(700, 32000):  # as full as packing makes rows
        if left - len(document.tokens) >= 0:
            lengths.append(len(document.tokens))
            left -= len(document.tokens)
    row = Row(tuple([*lengths, left] if left else lengths), micro)
    plan = Plan((row,), 16384 / micro, 16384, 0.0, None, "")
    memory, _ = rehearse(
        network, plan.rows, plan.rows_per_step > 1, "cuda", 0, compiled(config.parallel, torch.device("cuda"))
    )
    return asdict(memory)


def measured(name: str) -> int:
    shape, method, recompute, micro = WORKLOADS[name]
    os.environ |= {"MICRO": str(micro), "RECOMPUTE": str(recompute)}
    trainer = gpu.trainer_of(shape, method, 6, tempfile.mkdtemp())
    trainer._take()  # compiles
    trainer._take()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        trainer._take()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    names = [name for name in sys.argv[1:] if not name.startswith("--")] or list(WORKLOADS)
    if "--predict" in sys.argv:
        for name in names:
            print("RESULT " + json.dumps({"workload": name, "predicted_gb": predicted(name)["peak"] / 1e9}), flush=True)
        return
    if len(names) > 1:
        sys.exit(max(subprocess.run([sys.executable, __file__, name]).returncode for name in names))
    memory = predicted(names[0])  # before the loop's own compiled graphs are there
    real = measured(names[0])
    print("RESULT " + json.dumps({
        "workload": names[0], "predicted_gb": memory["peak"] / 1e9, "measured_gb": real / 1e9,
        "error": memory["peak"] / real - 1, "parts": memory,
    }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
