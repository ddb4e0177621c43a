"""`luthier quantise`: a source in fewer bits, written, loaded again by the library that reads it, and compared."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...errors import ConfigError, ExportError
from ...export import compare
from ...files import new_folder
from ...opened import is_run
from .. import measure, proof
from ..plain import DTYPES, Plain, Say, check, plain
from . import layers, sensitivity
from .schemes import WHOLE_ROW, Quantising

RECORD = "quantisation.json"
HELD_OUT = 16  # documents that perplexity is compared on, at most
SAME = 4  # documents on which what is loaded is compared with what was rounded
MANY = 8  # bits of layers that get more than 4


def _silent(text: str) -> None:
    pass


@dataclass
class Job:
    """What is to be done, as the command line says it."""

    source: str
    out: Path
    quantising: Quantising
    calibration: str | None = None
    """Rows to calibrate on; of a run its own without it."""
    held_out: str | None = None
    """Rows to compare perplexity on; without it a run's own, or a tenth of the calibration rows, or English text."""
    dtype: str | None = None
    bound: float | None = None
    """Largest rise of held-out perplexity, as a share of the source's; by default the scheme's."""
    say: Say = _silent
    warn: Say = _silent

    @property
    def allowed(self) -> float:
        return self.quantising.kind.bound if self.bound is None else self.bound

    @property
    def format(self) -> Any:
        return import_module(f".formats.{self.quantising.written_as.replace('-', '_')}", __package__)


def problems(job: Job) -> list[str]:
    """What is wrong with the request, as far as can be said without loading anything."""
    q, found = job.quantising, job.quantising.problems()
    own = is_run(job.source)
    if job.dtype is not None and job.dtype not in DTYPES:
        found.append(f"--dtype={job.dtype}: known are {', '.join(DTYPES)}")
    if q.calibrated and not (own or job.calibration):
        why = f"--rounding {q.rounding}" if q.rounding != "nearest" else "--bits"
        found.append(f"--calibration: {why} looks at rows: name some")
    if job.held_out and not (own or job.calibration):
        found.append("--held-out: a share or number of the rows of --calibration, or a file beside them: give those")
    if job.bound is not None and not (math.isfinite(job.bound) and job.bound >= 0):
        found.append(f"--bound={job.bound:g}: a share of at least 0, such as 0.03 for 3 %")
    if not found and (text := job.format.lacking()):
        found.append(f"--scheme {q.scheme} as {q.written_as} is checked by loading it again, which needs {text}")
    return found


def quantise(job: Job) -> dict:
    """Do it; returns sizes, bits, and what was compared. Where it fails nothing of `out` is left."""
    if found := problems(job):
        raise ConfigError(found)
    check(job.source)
    with new_folder(job.out) as aside:
        done = write(job, aside)
    return {"out": str(job.out), **done}


def write(job: Job, folder: Path) -> dict:
    """The quantised network in `folder`, compared in a fresh process."""
    began, q = time.monotonic(), job.quantising
    source = plain(job.source, job.warn)
    model, dtype = source.model, DTYPES[job.dtype] if job.dtype else source.dtype
    named = layers.names(model)
    group = layers.group_of(model, named, q)
    data = measure.settings(source, job.calibration, job.held_out)
    rows = measure.rows(source, data, job.say, job.warn) if data is not None else None
    documents, about = _held_out(source, rows)
    before = proof.logprobs(model, documents)
    wanted = []
    if q.calibrated:
        wanted = measure.calibration(source, rows, job.calibration, q.samples, q.sample_tokens, job.say, job.warn)
        if not wanted:
            raise ConfigError("--calibration: no row has two tokens")
    many, measured = _many(job, model, named, wanted, group, dtype)
    made = layers.rounded_(model, named, wanted, q, many, dtype, group, job.say)
    took = time.monotonic() - began
    _round(model, named, dtype)
    _save(job, source, folder, made, dtype)
    compared = _compared(job, source, folder, documents, before, dtype)
    done = {
        "scheme": q.scheme, "rounding": q.rounding, "format": q.written_as, "group_size": group,
        "layers": len(named), "bits_per_weight": _bits(folder, model, named, made),
        "dtype": str(dtype).removeprefix("torch."), "calibration_tokens": sum(map(len, wanted)), "held_out": about,
        "bound": job.allowed, **compared, "bytes_before": _bytes(model, dtype), "bytes": _weights(folder),
        "seconds": round(took, 1), "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip
    if q.bits is not None:
        done |= {"in_8_bits": sorted(many), "sensitivity": measured}
    (folder / RECORD).write_text(json.dumps(done, indent=1))
    (folder / "README.md").write_text(card(job, done))
    return done


def _held_out(source: Plain, rows: measure.Rows | None) -> tuple[list[list[int]], str]:
    """The documents that are compared, and what they are."""
    if rows is not None and rows.held_out is not None:
        cut = [d.tokens[: compare.TOKENS].tolist() for d in rows.held_out.documents[:HELD_OUT]]
        if found := [tokens for tokens in cut if len(tokens) > 1]:
            return found, "held-out rows"
    return proof.probe(None, source), "English text that Python brings"


def _many(job: Job, model: Any, named: list[str], documents: Any, group: int, dtype: torch.dtype) -> tuple[dict, dict]:
    """The layers that get more bits, and what each lost in few; none without a budget."""
    q = job.quantising
    if q.bits is None:
        return {}, {}
    inputs = {name: model.get_submodule(name).weight.shape[1] for name in named}
    few = {name: layers.cost(q.kind.bits, group, n, dtype) for name, n in inputs.items()}
    more = {name: layers.cost(MANY, WHOLE_ROW, n, dtype) for name, n in inputs.items()}
    sizes = {name: model.get_submodule(name).weight.numel() for name in named}
    least = sum(few[name] * n for name, n in sizes.items()) / sum(sizes.values())
    if q.bits < least:
        raise ConfigError(
            f"--bits={q.bits:g}: 4 bits in groups of {group} are {least:.3f} with their scales: allow that, or use "
            "larger groups"
        )
    if any(few[name] >= more[name] for name in named):
        raise ConfigError(f"--bits: groups of {group} cost as much as 8 bits: use larger groups")

    def rounded(layer: Any) -> torch.Tensor:
        weight = layer.weight.data
        return layers.grid(weight, q, q.kind.bits, group, dtype).nearest(weight)

    found = sensitivity.measured(model, documents, named, rounded, job.say)
    chosen = sensitivity.chosen(found, few, more, q.bits)
    job.say(f"{len(chosen)} of {len(named)} layers get 8 bits")
    told = {" ".join(m.weights): float(f"{m.loss:.4g}") for m in found}
    return dict.fromkeys(chosen, MANY), told


@torch.no_grad()
def _round(model: Any, named: list[str], dtype: torch.dtype) -> None:
    """What is not quantised, to the numbers of the file."""
    weights = {f"{name}.weight" for name in named}
    for name, parameter in model.named_parameters():
        if name not in weights:
            parameter.copy_(parameter.to(dtype))


def _save(job: Job, source: Plain, folder: Path, made: Mapping[str, Any], dtype: torch.dtype) -> None:
    model, form = source.model, job.format
    weights = {f"{name}.weight" for name in made}
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in model.state_dict().items() if n not in weights}
    tied = model.config.get_text_config().tie_word_embeddings
    for alias in getattr(model, "_tied_weights_keys", None) or () if tied else ():
        state.pop(alias, None)
    for name, layer in made.items():
        state |= {f"{name}.{end}": t.cpu() for end, t in form.tensors(layer, job.quantising).items()}
    model.config.quantization_config = form.configuration(model, made, job.quantising)
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        del model.config.quantization_config
    if hasattr(form, "finish"):
        form.finish(folder, made)
    source.tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


# ---------------------------------------------------------------------------- the check


def _compared(job: Job, source: Plain, folder: Path, documents: Any, before: torch.Tensor, dtype: torch.dtype) -> dict:
    """Twice: with the network in memory, whose numbers it has; and with the source, whose answers it should have.

    An activation between two codes falls on either side with the last bit of a sum, so for the former activations are
    not rounded.
    """
    ours = proof.logprobs(source.model, documents[:SAME])
    form, rounds = job.format, job.quantising.kind.activations is not None
    theirs = _read(source, folder, documents[:SAME] if rounds else documents, dtype, form.WIDE, rounded=False)
    same = compare.differences(ours, theirs[: len(ours)].to(ours))
    allowed = compare.Bound(*compare.TOLERANCE[torch.float32 if form.WIDE else dtype])
    if wrong := compare.fault(same, allowed):
        raise ExportError(f"what was written is not what was rounded: {wrong}; nothing is left")
    if rounds:
        theirs = _read(source, folder, documents, dtype, form.WIDE, rounded=True)
    found = compare.differences(before, theirs.to(before))
    if wrong := compare.fault(found, compare.Bound(perplexity=job.allowed)):
        raise ExportError(
            f"--scheme {job.quantising.scheme}: {wrong}; use --rounding gptq with more rows like yours, smaller "
            "groups, --bits, or raise --bound; nothing is left"
        )
    found["rise"] = found["perplexity_after"] / found["perplexity_before"] - 1
    return {**found, "reading": same["largest_difference"], "tolerance": allowed.largest}


def _read(source: Plain, folder: Path, documents: Any, dtype: torch.dtype, wide: bool, rounded: bool) -> torch.Tensor:
    return compare.read_again(
        "transformers_reader",
        {
            "documents": documents, "model": str(folder), "out": str(folder / "probe.safetensors"), "base": None,
            "rows": 0, "quantisation": None, "dtype": "float32" if wide else str(dtype).removeprefix("torch."),
            "device": source.model.device.type, "wide": False, "ends_in": "tokens", "types": [None] * len(documents),
            "labels": [], "beneath": [], "rounded_activations": rounded, "pad": 0, "ours": False,
        },
    )["logprobs"]  # fmt: skip


# ---------------------------------------------------------------------------- what is said of it


def _weights(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def _bytes(model: Any, dtype: torch.dtype) -> int:
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def _bits(folder: Path, model: Any, named: list[str], made: Mapping[str, Any]) -> float:
    """Of a weight of the quantised layers, with scales, as it lies in the file."""
    from safetensors import safe_open

    stored = 0
    inside = tuple(name + ".weight" for name in named)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            keys = file.keys()
            for key in keys:
                if key.startswith(inside):
                    tensor = file.get_tensor(key)
                    stored += tensor.numel() * tensor.element_size()
    return round(stored * 8 / sum(model.get_submodule(name).weight.numel() for name in named), 3)


def line(done: Mapping[str, Any]) -> str:
    """Of what was measured."""
    return (
        f"perplexity {done['perplexity_before']:.4g} -> {done['perplexity_after']:.4g} ({done['rise']:+.2%}, allowed "
        f"{done['bound']:+.2%}) on {done['compared_tokens']:,} tokens of {done['held_out']}; "
        f"{done['bytes_before'] / 1e6:,.1f} -> {done['bytes'] / 1e6:,.1f} MB, {done['bits_per_weight']:.2f} bits a "
        "weight of the layers"
    )


def card(job: Job, done: Mapping[str, Any]) -> str:
    """README.md of a quantised model."""
    name = Path(job.source).name if Path(job.source).expanduser().exists() else job.source
    group = "a row" if done["group_size"] == WHOLE_ROW else f"{done['group_size']} weights"
    return "\n".join([
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- luthier", "- quantised",
        "---", "", f"# {name}, {job.quantising.kind.caption}", "",
        f"Made with Luthier {__version__}: {done['scheme']}, rounded by {done['rounding']}, a scale for {group}, "
        f"written for {done['format']}.", "", f"{line(done)}.", "",
        f"Loaded again by {done['format']} in a fresh process: log-probabilities differ by at most "
        f"{done['reading']:.2e} from those of the rounded network in memory.", "",
    ])  # fmt: skip


def answer(done: Mapping[str, Any]) -> str:
    """What the command line says at the end."""
    return (
        f"{done['out']}: {done['layers']} layers as {done['scheme']} ({done['format']}), rounded by "
        f"{done['rounding']}\n{line(done)}\nloaded again in a fresh process: as rounded, to {done['reading']:.2e} "
        f"(allowed {done['tolerance']:g}); {done['seconds']:.0f} s, {done['peak_memory'] / 1e9:.1f} GB"
    )
