"""What a configuration will do, said before it does it: what moves, bytes, operations, time; nothing is loaded."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..optim.schedule import steps_of
from .movement import Moving, moving, table, walk_line, walked
from .plan import Plan, made_plan, plan_line, rates, read_at_once

if TYPE_CHECKING:
    from ..assembled import Assembled
    from ..config import Config
    from .rehearsal import Memory, Work

__all__ = ["Explanation", "explain", "moving", "plan_line", "table", "walked"]

FIRST_USE = 30 << 20  # bytes of libraries that are only touched when the first step runs, on a CPU
CONTEXT = 600 << 20  # bytes of a CUDA context and its libraries, beside what PyTorch counts


@dataclass(frozen=True)
class Explanation:
    """What was found out; `to_json` gives plain values."""

    config: Config
    device: str
    made: Assembled
    moving: list[Moving]
    plan: Plan
    memory: Memory  # of the step that takes most, with all that ever moves moving
    start: Memory  # of the first step
    work: Work
    overhead: int  # bytes of the process with its libraries, before a model is there
    rate: float | None  # 10^12 operations a second
    rate_source: str
    files: dict[str, list[str]]
    notes: list[str]

    @property
    def peak(self) -> int:
        """Bytes on the device that a step takes; on a CPU of the process beyond its libraries."""
        return self.memory.taken + (FIRST_USE + self.plan.bytes if self.device == "cpu" else 0)

    @property
    def host(self) -> int:
        """Bytes of the host's memory at the peak of the process: on a GPU, while a checkpoint is written."""
        if self.device == "cpu":
            return self.overhead + self.peak
        moved = sum(p.numel() * p.element_size() for p in self.made.parameters().values())
        return self.overhead + CONTEXT + self.plan.bytes + moved + self.memory.optimizer

    def per_token(self) -> dict[str, float]:
        """Operations for each token that is run."""
        w, attention = self.work, self.plan.squares_per_token
        own = max(1.0, w.squares / w.tokens)
        scale = attention / own / w.tokens
        return {
            "forward": w.forward / w.tokens + w.attention_forward * scale,
            "backward": w.backward / w.tokens + w.attention_backward * scale,
            "attention": (w.attention_forward + w.attention_backward) * scale,
        }

    @property
    def flops_per_step(self) -> float:
        of_token = self.per_token()
        return (of_token["forward"] + of_token["backward"]) * self.plan.run_per_step

    @property
    def seconds_per_step(self) -> float | None:
        return self.flops_per_step / (self.rate * 1e12) / self.ranks if self.rate else None

    @property
    def ranks(self) -> int:
        return int(os.environ.get("WORLD_SIZE", 1))

    def to_json(self) -> dict[str, Any]:
        seconds, steps = self.seconds_per_step, self.plan.steps
        passed, layers = walked(self.made.network.model)
        trained, total = (sum(getattr(row, k) for row in self.moving) for k in ("trainable", "total"))
        schedule: dict[str, Any] = {"kind": self.config.schedule.kind}
        if steps:
            schedule |= {"warmup_steps": steps_of(self.config.schedule.warmup, steps)}
            schedule |= {"first": rates(self.config, steps)[0], "last": rates(self.config, steps)[-1]}
        return {
            "device": self.device, "packed": self.made.network.packed,
            "parameters": {"trained": trained, "total": total, "moving": [asdict(m) for m in self.moving]},
            "backward_layers": passed, "layers": layers,
            "unfreezing": walk_line(self.made.network.model, self.made.begins),
            "memory": asdict(self.memory) | {"taken": self.memory.taken}, "memory_at_start": asdict(self.start),
            "peak_bytes": self.peak, "host_bytes": self.host, "overhead_bytes": self.overhead,
            "flops_per_token": self.per_token(), "flops_per_step": self.flops_per_step,
            "tflops_per_second": self.rate, "rate_source": self.rate_source,
            "seconds_per_step": seconds, "seconds": seconds * steps if seconds and steps else None,
            "plan": self.plan.to_json(), "schedule": schedule, "files": self.files, "notes": self.notes,
        }  # fmt: skip


def explain(config: Config, count: bool = True, measure: bool = False) -> Explanation:
    """What a run of `config` takes, without loading a weight.

    Data files up to 4 MB are read and counted, unless `count` is false; else lengths are assumed, and said to be. With
    `measure`, this machine's rate of operations is measured for half a second instead of taken from what was seen.
    """
    from ..assemble import outline, quietly
    from ..models.attention import Unsupported
    from ..models.network import unpack
    from ..parallel.layers import compiled
    from ..resolution import by_rows
    from . import files, speed
    from .rehearsal import passes_of, rehearse

    overhead = _resident()
    quietly()
    device = _device(config)
    notes: list[str] = []
    if config.objective.asks_labels:
        config = by_rows(config, notes.append) if count and read_at_once(config) else _assumed(config, notes)
    made = outline(config, device, notes.append)
    found = moving(made.network.model, made.begins)
    plan = made_plan(config, count, lambda row: passes_of(made, row, device))
    graphs = compiled(config.parallel, torch.device(device)) and device == "cuda"
    stages = sorted({0, max(made.begins.values(), default=0), getattr(config.precision, "fake_quant_after_n_steps", 0)})
    accumulate = plan.rows_per_step > int(os.environ.get("WORLD_SIZE", 1))

    def rehearsed(step: int) -> tuple[Memory, Work]:
        try:
            return rehearse(made, plan.rows, accumulate, device, step, graphs and made.network.packed)
        except Unsupported as error:
            unpack(made.network)
            notes.append(f"rows run padded: {error}")
        except (RuntimeError, ImportError) as error:
            if not graphs:
                raise
            notes.append(f"memory of eager layers, more than compiled ones keep: {str(error).splitlines()[0]}")
        return rehearse(made, plan.rows, accumulate, device, step)

    results = [rehearsed(step) for step in stages]
    made.unfreeze(0)
    rate, source = speed.rate(device, measure)
    memory, work = max(results, key=lambda one: one[0].taken)
    return Explanation(
        config, device, made, found, plan, memory, results[0][0], work, overhead, rate, source, files.running(config),
        notes,
    )  # fmt: skip


def _assumed(config: Config, notes: list[str]) -> Config:
    """Two labels."""
    from ..resolution import settled

    notes.append("two labels are assumed, as they are told from the training rows, which are not read")
    return settled(config, ["0", "1"] if config.objective.rows == "labelled" else [["0", "1"]])


def _device(config: Config) -> str:
    """The one that is asked for, whether it is here or not."""
    if config.parallel.device != "auto":
        return config.parallel.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _resident() -> int:
    """Bytes that this process holds with PyTorch and transformers imported; what was seen where it cannot be told."""
    import transformers  # noqa: F401

    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 400 << 20
