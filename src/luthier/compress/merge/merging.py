"""`luthier merge`: several sources into one, loaded again, and measured on the rows of each source that is a run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import __version__, adapters, measured, surgery
from ...assemble import quietly, restore
from ...config import read_run
from ...data.dataset import Dataset
from ...errors import ConfigError, ExportError, ModelError
from ...export import compare
from ...files import new_folder
from ...measured import Measured
from ...opened import is_run
from ...parallel import Parallel
from ...parallel.ranks import Ranks
from ...trainable import LoRA, adapter_files, saved
from ...trainable.adapter import Adapting
from .. import measure, proof
from ..plain import DTYPES, Plain, Say, check, plain, save
from . import adapters as of_adapters
from . import models
from .settings import OF_CHANGES, Merging

RECORD = "merging.json"


def _silent(text: str) -> None:
    pass


@dataclass
class Job:
    sources: Sequence[str]
    out: Path
    merging: Merging
    base: str | None = None
    """That whole models began with, for ties and dare; of runs their own without it."""
    dtype: str | None = None
    whole: bool = False
    """Merge the models of runs that trained adapters, not the adapters."""
    bound: float | None = None
    """Largest rise of a run's held-out perplexity, as a share of its own."""
    say: Say = _silent
    warn: Say = _silent


@dataclass
class Task:
    """A run among the sources: its rows, and what it answers itself."""

    name: str
    rows: Dataset
    before: Measured


def kind(source: str) -> str:
    """`adapter`, `lora run`, `run`, or `model`."""
    path = Path(source).expanduser()
    if (path / adapter_files.CONFIG).is_file():
        return "adapter"
    if not is_run(source):
        return "model"
    return "lora run" if type(read_run(path).trainable) is LoRA else "run"


def problems(job: Job) -> list[str]:
    """What is wrong with the request, as far as can be said without loading anything."""
    found = job.merging.problems(len(job.sources))
    if len(set(map(str, job.sources))) < len(job.sources):
        found.append("a source is given twice: give it once, with the sum of its weights")
    if job.dtype is not None and job.dtype not in DTYPES:
        found.append(f"--dtype={job.dtype}: known are {', '.join(DTYPES)}")
    kinds = {source: kind(source) for source in job.sources}
    of_adapters, of_models = ([s for s, k in kinds.items() if k in ks] for ks in (("adapter",), ("model", "run")))
    if of_adapters and of_models:
        found.append(f"{of_adapters[0]} is an adapter and {of_models[0]} a whole model: merge the same kind")
    if of_adapters and job.whole:
        found.append(f"--whole: {of_adapters[0]} is an adapter, which has no model of its own: leave it out")
    if as_adapters(job):
        for name in ("base", "dtype"):
            if getattr(job, name) is not None:
                found.append(f"--{name}: of whole models, and these are adapters: leave it out, or add --whole")
        return found
    if "rank" in job.merging.model_fields_set:
        found.append("--rank: of adapters, and these are whole models: leave it out")
    if job.merging.by in OF_CHANGES and job.base is None and own_base(job) is None:
        found.append(f"--base: required with --by {job.merging.by}, which looks at what each model has beyond it")
    return found


def as_adapters(job: Job) -> bool:
    return not job.whole and all(kind(source) in ("adapter", "lora run") for source in job.sources)


def own_base(job: Job) -> str | None:
    """The one model that all sources, runs, began with."""
    if not all(is_run(source) for source in job.sources):
        return None
    found = {read_run(Path(source).expanduser()).model.name for source in job.sources}
    return found.pop() if len(found) == 1 and "" not in found else None


def merge(job: Job) -> dict:
    """Do it; returns what was made, measured and compared. Where it fails nothing of `out` is left."""
    if found := problems(job):
        raise ConfigError(found)
    quietly()
    with new_folder(job.out) as aside:
        done = _adapters(job, aside) if as_adapters(job) else _models(job, aside)
        _check_bound(job, done)
        done |= {"by": job.merging.by, "weights": job.merging.factors(len(job.sources)), "sources": list(job.sources)}
        (aside / RECORD).write_text(json.dumps(done, indent=1))
        (aside / "README.md").write_text(card(done))
    return {"out": str(job.out), **done}


# ---------------------------------------------------------------------------- whole models


def _models(job: Job, folder: Path) -> dict:
    for source in job.sources:
        check(source)
    found = [plain(source, job.warn) for source in job.sources]
    name = job.base or own_base(job)
    base = plain(name, job.warn) if job.merging.by in OF_CHANGES and name is not None else None
    model = models.merged(found, base, job.merging)
    tasks = [_task(job, source) for source in found if source.run is not None]
    dtype = DTYPES[job.dtype] if job.dtype else found[0].dtype
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    save(found[0], model, folder, dtype)
    told = [t.rows for t in tasks if t is not None]
    proven = proof.prove(model, folder, dtype, proof.probe(told[0] if told else None, found[0]))
    model.to(found[0].ranks.device)
    done: dict[str, Any] = {"kind": "model", "parameters": sum(p.numel() for p in model.parameters()), **proven}
    done["tasks"] = {}
    packed = found[0].with_model(model)
    for source, task in zip((s for s in found if s.run is not None), tasks):
        if task is not None:
            _told(job, done, task, measure.measure(source.with_model(model, packed.network), task.rows))
    return done


def _task(job: Job, source: Plain) -> Task | None:
    """The held-out rows of a run, and how it answers them."""
    data = measure.settings(source, None, None)
    assert data is not None
    rows = measure.rows(source, data, lambda text: None, job.warn).held_out
    if rows is None:
        job.warn(f"{source.name} holds no rows out, so the merged model is not measured on its task")
        return None
    return Task(source.name, rows, measure.measure(source, rows))


def _told(job: Job, done: dict, task: Task, after: Measured) -> None:
    done["tasks"][task.name] = measured.compare(task.before, after)["figures"]
    job.say(f"{task.name}: itself {measured.line(task.before.values())}; merged {measured.line(after.values())}")


# ---------------------------------------------------------------------------- adapters


def _adapters(job: Job, folder: Path) -> dict:
    with tempfile.TemporaryDirectory() as aside:
        folders, runs = [], []
        for at, source in enumerate(job.sources):
            path = Path(source).expanduser()
            if kind(source) == "adapter":
                folders.append(path)
                continue
            made, _ = restore(path, job.warn)
            _check_run(source, made)
            written = Path(aside) / f"{at}-{path.name}"
            written.mkdir()
            settings = made.config.trainable
            assert isinstance(settings, Adapting)
            saved.write(written, made.network.model, settings, base=made.config.model.name)
            folders.append(written)
            runs.append((source, made))
        found = [adapter_files.read(path) for path in folders]
        done: dict[str, Any] = {"kind": "adapter", **of_adapters.write(found, job.merging, folder), "tasks": {}}
    for source, made in runs:
        made.network.requires_grad_(False).eval()
        opened = Plain(source, made.network.model, made.renderer, made.ranks, made.network.dtype, made.config)
        opened._network = made.network
        task = _task(job, opened)
        with made.network.natively() as model:
            adapters.load(model, folder, "merged")
        for module in surgery.switched(made.network.model):
            module.enabled = module.name != saved.TRAINED
        if task is not None:
            _told(job, done, task, measure.measure(opened, task.rows))
    return done | _proven(job, folder)


def _check_run(source: str, made: Any) -> None:
    if made.network.ends_in != "tokens":
        raise ModelError(f"{source} is a run of method={made.config.method}, whose network predicts no tokens")


def _proven(job: Job, folder: Path) -> dict:
    """The merged adapter as PEFT loads it in a fresh process, compared with Luthier's own, where its base is here."""
    values = adapter_files.read(folder).values
    name = str(values.get("base_model_name_or_path") or "")
    beneath = adapter_files.read(folder).base
    if not Path(name).expanduser().is_dir() or (beneath and beneath["beneath"]):
        job.warn(f"the base {name!r} is no folder here, or has adapters beneath: what PEFT makes of it is not compared")
        return {}
    source = plain(name, job.warn)
    documents = proof.probe(None, source)
    adapters.load(source.model, folder, "merged")
    ours = proof.logprobs(source.model, documents)
    dtype = str(source.model.dtype).removeprefix("torch.")
    found = compare.proof(
        ours, folder, "transformers_reader", documents, compare.Bound(*compare.TOLERANCE[source.model.dtype]),
        base=str(Path(name).expanduser().resolve()), rows=source.model.get_input_embeddings().weight.shape[0],
        quantisation=None, dtype=dtype, device=Ranks(Parallel()).device.type, wide=False, ends_in="tokens",  # type: ignore
        types=[None] * len(documents), labels=[], beneath=[], rounded_activations=True, pad=0, ours=False,
    )  # fmt: skip
    return {key: found[key] for key in ("largest_difference", "mean_difference", "tolerance", "compared_tokens")}


# ---------------------------------------------------------------------------- what is said of it


def _check_bound(job: Job, done: Mapping[str, Any]) -> None:
    if job.bound is None:
        return
    if not done["tasks"]:
        raise ExportError("--bound: compares with runs on their held-out rows, and no source is one; nothing is left")
    for name, figures in done["tasks"].items():
        before, after = figures["perplexity"]["base"], figures["perplexity"]["tuned"]
        if not after <= before * (1 + job.bound):
            raise ExportError(
                f"on the held-out rows of {name} perplexity rose from {before:.4g} to {after:.4g}, by "
                f"{after / before - 1:.1%}, and --bound allows {job.bound:.1%}: other --weights, another way, or a "
                "larger bound; nothing is left"
            )


def answer(done: Mapping[str, Any]) -> str:
    """What the command line says at the end."""
    size = f"{done['parameters']:,} parameters"
    if done["kind"] == "adapter":
        size = f"a LoRA of rank {done['r']} beside {done['layers']} layers, {size}"
        size += "" if done["kept"] > 1 - 1e-6 else f"; it has {done['kept']:.1%} of the squared size of the change"
    lines = [f"{done['out']}: {size}, by {done['by']} of {len(done['sources'])}"]
    for name, figures in done["tasks"].items():
        if told := measure.told(figures):
            lines += [f"{name}, itself -> merged:", told]
    if "compared_tokens" in done:
        lines.append(
            f"loaded again in a fresh process: log-probabilities of {done['compared_tokens']} tokens differ by at most "
            f"{done['largest_difference']:.2e} (allowed {done['tolerance']:g})"
        )
    return "\n".join(lines)


def card(done: Mapping[str, Any]) -> str:
    """README.md of a merged model or adapter."""
    library = "peft" if done["kind"] == "adapter" else "transformers"
    lines = ["---", f"library_name: {library}", "tags:", "- luthier", "- merge", "---", "", f"# Merged by {done['by']}",
             "", f"Made with Luthier {__version__} of", ""]  # fmt: skip
    lines += [f"- {Path(name).name}, weight {weight:g}" for name, weight in zip(done["sources"], done["weights"])]
    if done["tasks"]:
        lines += ["", "| held-out rows of | figure | that run | merged |", "| --- | --- | --- | --- |"]
    for name, figures in done["tasks"].items():
        for key, figure in figures.items():
            if figure.get("base") is not None and figure.get("tuned") is not None:
                lines.append(f"| {Path(name).name} | {key} | {figure['base']:.4g} | {figure['tuned']:.4g} |")
    return "\n".join([*lines, ""])
