"""`luthier prune`: a source made smaller, measured before and after, healed where asked, and proven on the disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import __version__, measured
from ...errors import ConfigError, ExportError
from ...files import new_folder, write_atomically
from ...opened import is_run
from .. import measure, proof
from ..plain import DTYPES, Plain, Say, built, check, plain, save
from . import depth, families, importance, sparsity, width
from .settings import Pruning

RECORD = "pruning.json"


def _silent(text: str) -> None:
    pass


@dataclass
class Job:
    """What is to be done, as the command line says it."""

    source: str
    out: Path
    pruning: Pruning
    data: str | None = None
    """Rows to learn from and to look at; of a run its own without it."""
    held_out: str | None = None
    calibration: str | None = None
    """Rows that importance is measured on, where not the first of `data`."""
    dtype: str | None = None
    bound: float | None = None
    """Largest rise of held-out perplexity, as a share of the source's."""
    heal: str | None = None
    steps: int | None = None
    settings: Sequence[str] = ()
    """Of healing, as `luthier train` takes them."""
    say: Say = _silent
    warn: Say = _silent
    quiet: bool = False

    @property
    def work(self) -> Path:
        """Where a pruned network and its healing stand while they are not done, and after."""
        return self.out.with_name(f"{self.out.name}-healing")


def problems(job: Job) -> list[str]:
    """What is wrong with the request, as far as can be said without loading anything."""
    p, found = job.pruning, job.pruning.problems()
    own = is_run(job.source)
    if job.dtype is not None and job.dtype not in DTYPES:
        found.append(f"--dtype={job.dtype}: known are {', '.join(DTYPES)}")
    if p.calibrated and not (own or job.data or job.calibration):
        found.append(f"--calibration: --by {p.by} measures importance on rows: name some (or --data)")
    if job.heal and not (own or job.data):
        found.append(f"--data: --heal {job.heal} learns from rows, and {job.source} is no run that has some")
    if job.held_out and not (own or job.data):
        found.append("--held-out: a share or number of the rows of --data, or a file beside them: give --data")
    if not job.heal:
        if job.steps is not None:
            found.append("--steps: of --heal: leave it out, or add --heal distill")
        if job.settings:
            found.append(f"{job.settings[0]}: settings are of --heal: leave them out, or add --heal distill")
    if job.bound is not None and not (own or job.data):
        found.append("--bound: compares perplexity on held-out rows: give --data")
    return found


def prune(job: Job) -> dict:
    """Do it; returns what was removed, measured and compared. Where it fails nothing of `out` is left."""
    if found := problems(job):
        raise ConfigError(found)
    if job.out.exists() and (not job.out.is_dir() or any(job.out.iterdir())):
        raise ExportError(f"{job.out} exists: give another folder, or remove it; nothing was written")
    check(job.source)
    if job.heal:
        from .heal import healed

        return healed(job)
    with new_folder(job.out) as aside:
        done = write(job, aside)
        _check_bound(job, done)
    return {"out": str(job.out), **done}


def plan(job: Job) -> dict:
    """All that decides what is pruned: a folder that was made by another is not gone on with."""
    path = Path(job.source).expanduser()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    if is_run(job.source):
        files = sorted((path / "checkpoints").glob("*/*.safetensors"))
    return {
        "source": str(path.resolve()) if path.exists() else job.source,
        "files": [[f.name, f.stat().st_size, int(f.stat().st_mtime)] for f in files],
        "pruning": job.pruning.model_dump(mode="json"), "dtype": job.dtype, "calibration": job.calibration,
        "data": job.data, "held_out": job.held_out,
    }  # fmt: skip


def write(job: Job, folder: Path) -> dict:
    """The pruned network as a transformers model in `folder`, compared with itself in a fresh process."""
    source = plain(job.source, job.warn)
    families.check(source.model, job.pruning.by)
    if not job.pruning.structured:
        sparsity.check_pattern(source.model, job.pruning)
    data = measure.settings(source, job.data, job.held_out)
    rows = measure.rows(source, data, job.say, job.warn) if data is not None else None
    held_out = rows.held_out if rows is not None else None
    before = None
    if held_out is not None:
        before = measure.measure(source, held_out)
        job.say(f"the source on {len(held_out):,} held-out rows: {measured.line(before.values())}")
    documents = _documents(job, source, rows)
    with source.network.natively() if source.packed else nullcontext():
        model, removed = pruned(source, documents, job.pruning)
    if source.packed:  # single weights become 0 in the source's own network
        model.set_attn_implementation(source.network.native)
    dtype = DTYPES[job.dtype] if job.dtype else source.dtype
    _round(model, dtype)
    job.say(_told(removed))
    made = source.with_model(model)
    save(source, model, folder, dtype)
    proven = proof.prove(model, folder, dtype, proof.probe(held_out, source))
    done: dict[str, Any] = {**removed, **proven, "dtype": str(dtype).removeprefix("torch.")}
    done["bytes"] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    if held_out is not None and before is not None:
        after = measure.measure(made, held_out)
        job.say(f"pruned: {measured.line(after.values())}")
        done["figures"] = measured.compare(before, after)["figures"]
        measured.keep(folder, 0, before)  # of the source, for what comes after
    done["plan"] = plan(job)
    (folder / RECORD).write_text(json.dumps(done, indent=1))
    (folder / "README.md").write_text(card(job, done))
    return done


def _documents(job: Job, source: Plain, rows: measure.Rows | None) -> list[list[int]]:
    """The rows that importance is measured on, each cut to `sample_tokens`; never held-out ones."""
    if not job.pruning.calibrated:
        return []
    p = job.pruning
    return measure.calibration(source, rows, job.calibration, p.samples, p.sample_tokens, job.say, job.warn)


# ---------------------------------------------------------------------------- the network made smaller


def pruned(source: Plain, documents: Sequence[Sequence[int]], wanted: Pruning) -> tuple[Any, dict]:
    """Another network, and what went; the source's stays as it is but for single weights, which become 0 in place."""
    model = source.model
    whole, free = _parameters(model), families.embedding_free(model)
    if not wanted.structured:
        if wanted.by == "wanda":
            sparsity.wanda_(model, documents, wanted)
        else:
            sparsity.magnitude_(model, wanted)
        zero, total = sparsity.zeros(model)
        return model, {"by": wanted.by, "pattern": wanted.pattern, "zeros": zero, "weights": total,
                       "share": 1 - zero / total, "parameters": [whole, whole]}  # fmt: skip
    state = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    made: dict[str, Tensor]
    if wanted.by == "depth":
        layers, values = depth.chosen(model, documents, wanted)
        config, made = depth.without(model.config, state, layers)
        gone = [i for i in range(len(values)) if i not in layers]
        about: dict[str, Any] = {"layers_gone": gone, "importance": [float(f"{v:.6g}") for v in values.tolist()]}
    else:
        config, made, about = _narrowed(model, documents, wanted, state)
    smaller = built(config, made, model.dtype)
    smaller.generation_config = model.generation_config
    left = families.embedding_free(smaller)
    about |= {"share": left / free, "without_embeddings": [free, left], "parameters": [whole, _parameters(smaller)],
              "shape": {key: getattr(config, key) for key in ("num_hidden_layers", "hidden_size", "intermediate_size",
              "num_attention_heads", "num_key_value_heads")}}  # fmt: skip
    return smaller, {"by": wanted.by, **about}


def _narrowed(model: Any, documents: Any, wanted: Pruning, state: dict[str, Tensor]) -> tuple[Any, dict, dict]:
    now = families.Sizes.of(model.config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    new = width.fitted(shapes, now, wanted)
    width.check_hidden(model.config, new)
    found = importance.parts(model, documents)
    kept = width.chosen(found, now, new)
    config, made = width.narrowed(model.config, state, kept, new)
    if new.hidden != now.hidden:
        width.rescaled(made, kept.hidden, found.energy)
    return config, made, {}


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def _round(model: Any, dtype: torch.dtype) -> None:
    """To the numbers of the file that is to be written, in those it computes in."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


# ---------------------------------------------------------------------------- what is said of it


def _told(removed: Mapping[str, Any]) -> str:
    before, after = removed["parameters"]
    if "zeros" in removed:
        return f"{removed['zeros']:,} of {removed['weights']:,} weights of the layers are 0; the files keep their size"
    shape = ", ".join(f"{key} {value}" for key, value in removed["shape"].items())
    gone = f"layers {', '.join(map(str, removed['layers_gone']))} went; " if "layers_gone" in removed else ""
    return (
        f"{gone}{removed['share']:.1%} of the parameters outside of the embeddings stay, {before:,} -> {after:,} "
        f"in all: {shape}"
    )


def _check_bound(job: Job, done: Mapping[str, Any], figures: Mapping[str, Any] | None = None) -> None:
    if job.bound is None:
        return
    figure = (figures or done.get("figures", {})).get("perplexity")
    if figure is None:
        raise ExportError("--bound: no rows are held out to compare perplexity on: give --held-out; nothing is left")
    before, after = figure["base"], figure["tuned"]
    if not after <= before * (1 + job.bound):
        raise ExportError(
            f"held-out perplexity rose from {before:.4g} to {after:.4g}, by {after / before - 1:.1%}, and --bound "
            f"allows {job.bound:.1%}: heal it, keep more, or raise the bound; nothing is left"
        )


def card(job: Job, done: Mapping[str, Any], how: str = "") -> str:
    """README.md of a pruned model."""
    name = Path(job.source).name if Path(job.source).expanduser().exists() else job.source
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- luthier", "- pruned",
             "---", "", f"# {name}, pruned ({done['by']})", "", f"Made with Luthier {__version__}. {_told(done)}.", how,
             "", "## Figures on held-out rows", "", "| | source | this model |", "| --- | --- | --- |"]  # fmt: skip
    for key, figure in done.get("figures", {}).items():
        if figure.get("base") is not None and figure.get("tuned") is not None:
            lines.append(f"| {key} | {figure['base']:.4g} | {figure['tuned']:.4g} |")
    lines += [
        "", f"Loaded again in a fresh process: log-probabilities of {done['compared_tokens']} tokens differ by at most "
        f"{done['largest_difference']:.2e} from those of the network in memory.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def keep(path: Path, done: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(done, indent=1))


def answer(done: Mapping[str, Any]) -> str:
    """What the command line says at the end."""
    lines = [f"{done['out']}: {_told(done)}"]
    for key, name in (("figures_pruned", "source -> pruned"), ("figures", "source -> this model")):
        if key in done and (told := measure.told(done[key])):
            lines += [f"{name}:", told]
    lines.append(
        f"loaded again in a fresh process: log-probabilities of {done['compared_tokens']} tokens differ by at most "
        f"{done['largest_difference']:.2e} (allowed {done['tolerance']:g})"
    )
    return "\n".join(lines)
