"""A training step of each adapter against LoRA's: the same random Llama, the real loop, turn and turn about.

    python benchmarks/adapters.py                 # every kind in the union of trainables that adapts, a process each
    python benchmarks/adapters.py dora dora/nf4   # some of them; after a stroke, what the frozen weights are kept in
    TINY=1 python benchmarks/adapters.py dora     # a try of this script on a CPU

Shapes are Llama 3.2 1B, or those of SHAPE=8b; rows are those of benchmarks/gpu.py, 16,384 token slots a step, in
bfloat16 with compiled layers (MICRO and RECOMPUTE as there). LoRA and the other kind live in one process and take
turns of ROUND steps, in the order ABBA; the ratio is that of the medians, and its spread that of the rounds. Both keep
their defaults, rank 16 on all linear layers. Each kind prints one line `RESULT {json}`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Annotated, Any, get_args, get_origin

import gpu
import torch

from luthier import assemble, configure
from luthier.data import dataset as datasets
from luthier.methods import METHODS
from luthier.models import load
from luthier.monitor import Console
from luthier.surgery import trainable
from luthier.trainable import Trainable
from luthier.trainable.adapter import Adapting

TINY = bool(os.environ.get("TINY"))
SHAPE = os.environ.get("SHAPE", "1b")
SLOTS = 256 if TINY else 16384
LONGEST = 128 if TINY else 4096
WARM, ROUND = (1, 2) if TINY else (12, 5)
ROUNDS = 2 if TINY else 6


def kinds() -> list[str]:
    """Of every trainable that puts something beside frozen weights."""
    union = get_args(Trainable)[0] if get_origin(Trainable) is Annotated else Trainable
    return [cls.model_fields["kind"].default for cls in get_args(union) if issubclass(cls, Adapting)]


def trainer(kind: str, precision: str, folder: str) -> Any:
    """The loop's trainer on a model and rows that are made on the spot."""
    documents = gpu.documents(700, gpu.SHAPES[SHAPE]["vocab_size"], LONGEST)
    made = datasets.Dataset(documents, [], [], "made", "made", None)  # type: ignore[arg-type]

    def model(config: Any, tokenizer: Any, dtype: torch.dtype, device: torch.device, tell: Any) -> Any:
        store = config.precision.storage(dtype)
        plain = gpu.llama(SHAPE, dtype)
        return plain if store is None else load.stored(plain, store, device, tell)

    assemble._model = model
    gpu.loop.tokenizer_and_renderer = lambda config, say: (None, None)
    datasets.open_rows = lambda *_: (made, None)
    rows = [m for m in METHODS.values() if m.kinds["trainable"] == kind and not m.settings.get("model")]
    row = next(iter([m for m in rows if m.kinds["precision"] == precision] or rows))
    values = {
        "model": "random/weights", "data": {"train": "random/rows", "max_length": LONGEST},
        "max_steps": WARM + ROUND * ROUNDS, "optim": {"learning_rate": 1e-4}, "precision": {"kind": precision},
        "batch": {"tokens": SLOTS, "micro_tokens": int(os.environ.get("MICRO", SLOTS))},
        "monitor": {"report_to": []}, "output_dir": folder, "checkpoint": {"every": None},
        "parallel": {"activation_checkpointing": int(os.environ.get("RECOMPUTE", 0))},
    }  # fmt: skip
    return gpu.loop.Trainer(configure(values, method=row.name), Console(quiet=True))


def seconds(one: Any, steps: int) -> float:
    """Of a step."""
    gpu._wait(reset=False)
    began = time.perf_counter()
    for _ in range(steps):
        one._take()
    gpu._wait(reset=False)
    return (time.perf_counter() - began) / steps


def compared(kind: str, precision: str) -> dict:
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        pair = [trainer("lora", precision, a), trainer(kind, precision, b)]
        for one in pair:
            seconds(one, WARM)
        taken: list[list[float]] = [[], []]
        for i in range(ROUNDS):
            for which in (0, 1) if i % 2 == 0 else (1, 0):
                taken[which].append(seconds(pair[which], ROUND))
        moving = sum(p.numel() for p in trainable(pair[1].made.network.model).values())
    ratios = [other / lora for lora, other in zip(*taken)]
    return {
        "kind": kind, "precision": precision, "shape": SHAPE, "ratio_to_lora": statistics.median(taken[1])
        / statistics.median(taken[0]), "ratios": [round(r, 4) for r in ratios],
        "seconds_of_a_step": statistics.median(taken[1]), "seconds_of_loras": statistics.median(taken[0]),
        "moving": moving,
    }  # fmt: skip


def main() -> None:
    wanted = sys.argv[1:] or kinds()
    if len(wanted) > 1:  # a process each: compiled graphs of one are not another's
        codes = [subprocess.run([sys.executable, __file__, name]).returncode for name in wanted]
        sys.exit(max(codes))
    kind, _, precision = wanted[0].partition("/")
    print("RESULT " + json.dumps(compared(kind, precision or "as_loaded")), flush=True)


if __name__ == "__main__":
    main()
