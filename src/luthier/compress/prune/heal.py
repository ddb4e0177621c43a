"""Healing: what is left after pruning is trained by the loop that trains everything, the source its teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ... import measured
from ...config import Config, configure, read_run
from ...errors import ConfigError, ExportError
from ...export import export
from ...files import new_folder
from ...monitor import Console
from ...opened import is_run
from ...settings import merged, parse_override
from ...train import Trainer
from .. import measure
from . import pruning
from .sparsity import linears, weight

METHODS = {"distill": "distill", "next_token": "full"}
MASKED = ("adamw", "adamw_8bit", "sgd", "lion", "adafactor")
"""Optimisers that leave a weight alone whose value and gradient are 0."""


def healed(job: pruning.Job) -> dict:
    """Prune, train, export: each stage is done once, so the same command goes on where it was stopped."""
    job.out.parent.mkdir(parents=True, exist_ok=True)
    work = job.work
    configuration(job, work / "pruned", heard=False)  # what is wrong with its settings is told first
    record = _pruned(job, work)
    config = configuration(job, work / "pruned")
    trainer = Trainer(config, Console(quiet=job.quiet))
    if not job.pruning.structured:
        keep_zeros(trainer)
    result = trainer.run()
    done = {k: v for k, v in record.items() if k not in ("figures", "plan")}
    done |= {"healing": str(result.folder), "steps": result.report["steps"]}
    metrics = tuple(config.evaluation.metrics)
    source = measured.read(work / "pruned", 0, metrics)
    at_start, after = (measured.read(result.folder, step, metrics) for step in (0, result.report["best_step"]))
    if source is not None and after is not None and at_start is not None:
        done["figures_pruned"] = measured.compare(source, at_start)["figures"]
        done["figures"] = measured.compare(source, after)["figures"]
        pruning._check_bound(job, done)
    done |= _export(job, result.folder, done)
    return {"out": str(job.out), **done}


def _pruned(job: pruning.Job, work: Path) -> dict:
    folder = work / "pruned"
    if folder.exists():
        record = json.loads((folder / pruning.RECORD).read_text())
        if record["plan"] != json.loads(json.dumps(pruning.plan(job))):
            raise ConfigError(
                f"{folder} was pruned from another source or with other settings: give another OUT, or remove {work}"
            )
        job.say(f"{folder} is pruned already; its healing goes on")
        return record
    with new_folder(folder) as aside:
        return pruning.write(job, aside)


def configuration(job: pruning.Job, model: Path, heard: bool = True) -> Config:
    """The run that heals. Rows, batches and evaluation are those of the source where it is a run; what the command
    line sets goes over all."""
    assert job.heal is not None
    source = Path(job.source).expanduser()
    values: dict[str, Any] = {
        "schedule": {"kind": "cosine", "warmup": 0.05, "min_ratio": 0.1},
        "optim": {"kind": "adamw", "learning_rate": 3e-4}, "monitor": {"report_to": []},
    }  # fmt: skip
    if is_run(job.source):
        run = read_run(source)
        for section in ("batch", "evaluation"):
            values[section] = getattr(run, section).model_dump(mode="json", exclude_unset=True)
        values["data"], values["seed"] = run.data.model_dump(mode="json", exclude_unset=True), run.seed
        values["data"] |= {"streaming": False}
    if job.data is not None:
        kept = {k: v for k, v in values.get("data", {}).items() if k in ("max_length", "train_on", "long_text", "seed")}
        values["data"] = {**kept, "train": job.data, "validation": measure.HELD_OUT}
    if job.held_out is not None:
        values["data"]["validation"] = measure._number(job.held_out)
    if job.steps is not None:
        values["max_steps"] = job.steps
    if job.heal == "distill":
        teacher = str(source.resolve()) if source.exists() else job.source
        values["objective"] = {"teacher": teacher}
    for text in job.settings:
        values = merged(values, parse_override(text))
    fixed = {"model": {"name": str(model)}, "output_dir": str(job.work / "run")}
    if wrong := [key for key in ("model", "output_dir", "method") if key in values]:
        raise ConfigError(f"{wrong[0]}: of healing it follows from the command: leave it out")
    if not job.pruning.structured:
        _check_masked(values)
    if not heard:
        fixed["model"] = {"name": "not/made-yet"}
    return configure(values, fixed, method=METHODS[job.heal])


def _check_masked(values: dict) -> None:
    """Whether zeros would stay zeros."""
    kind = values["optim"].get("kind", "adamw")
    if kind not in MASKED:
        raise ConfigError(
            f"optim.kind={kind}: would move weights that were pruned to 0: use one of {', '.join(MASKED)}"
        )
    trained = values.get("trainable", {})
    kind = trained.get("kind", "full") if isinstance(trained, dict) else trained
    if kind not in ("full", "partial"):
        raise ConfigError(f"trainable.kind={kind}: merged, it would fill the weights that were pruned to 0: use full")


def keep_zeros(trainer: Any) -> None:
    """Weights that are 0 in the pruned network get no gradient, so they stay 0."""
    from ..plain import plain

    start = plain(trainer.config.model.name).model
    masks = {f"{name}.weight": weight(module) != 0 for name, module in linears(start).items()}
    for name, parameter in trainer.made.network.model.named_parameters():
        if name in masks and parameter.requires_grad:
            stays = masks[name].to(parameter.device)
            parameter.register_hook(lambda gradient, stays=stays: gradient * stays)


def _export(job: pruning.Job, run: Path, done: dict) -> dict:
    """The healed network at OUT, checked by the export's own comparison, with what is known of it."""
    aside = job.work / "healed"
    if not aside.exists():
        export(run, aside, "full", done["dtype"] if done["dtype"] in ("float32", "bfloat16") else None)
    found = {"bytes": sum(f.stat().st_size for f in aside.glob("*.safetensors"))}
    if not job.pruning.structured:
        found["zeros"] = _zeros(aside, done["zeros"])
    how = f"Healed for {done['steps']} steps ({job.heal}) on {job.data or 'the rows of the source'}."
    (aside / "README.md").write_text(pruning.card(job, done | found, how))
    pruning.keep(aside / pruning.RECORD, done | found)
    if job.out.exists():
        job.out.rmdir()
    aside.rename(job.out)
    return found


def _zeros(folder: Path, wanted: int) -> int:
    from ..plain import plain
    from .sparsity import zeros

    with torch.no_grad():
        found, _ = zeros(plain(str(folder)).model)
    if found < wanted:
        raise ExportError(f"{wanted - found:,} weights that were pruned to 0 are 0 no more; nothing is left")
    return found
