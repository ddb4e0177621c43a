"""What freezing the lower layers saves: time of a step and bytes that live, beside a run in which all layers move.

    python benchmarks/freezing.py            # a Llama of 16 layers on this machine's CPU or GPU

Prints a line for each number of last layers that move: seconds of a step (median of five), the peak of bytes that the
step adds to what rests (PyTorch's own record), and the operations of its backward pass as PyTorch counts them.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import make_memory_page as page

from luthier.monitor import Console
from luthier.train import Trainer

LAYERS = 16


def peak(trainer: Trainer) -> int:
    if torch.cuda.is_available():
        resting = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainer._take()
        return torch.cuda.max_memory_allocated() - resting
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer._take()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def case(work: Path, last: int) -> dict:
    extra = {"trainable": {"last_layers": last}, "max_steps": 12}
    if torch.cuda.is_available():
        extra["parallel"] = {"device": "cuda"}
    trainer = Trainer(page.config_of(work, work / f"last-{last}", "partial", 0, extra), Console(quiet=True))
    trainer._take()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        trainer._take()
        seconds.append(time.perf_counter() - began)
    batch = trainer._batch(trainer.steps[0][0])
    loss = trainer.made.objective(trainer.made.network, batch)
    with FlopCounterMode(display=False) as counter:
        loss.total.backward()
    trainer.optimizer.zero_grad()
    return {
        "last_layers": last, "seconds": round(statistics.median(seconds), 3), "peak_mb": round(peak(trainer) / 1e6),
        "backward_gflop": round(counter.get_total_flops() / 1e9, 1),
    }  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        work = page.prepare(Path(name), num_hidden_layers=LAYERS)
        for last in (LAYERS, LAYERS // 2, LAYERS // 4, 1):
            print("RESULT " + json.dumps(case(work, last)), flush=True)


if __name__ == "__main__":
    main()
