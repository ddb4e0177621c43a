"""Write a trained model as others read it, load it again in a fresh process, compare, and only then call it done."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import __version__, reload, surgery
from .assemble import Assembled, restore
from .batch import Batch, Document
from .config import Config
from .errors import ExportError
from .files import write_atomically
from .logprobs import scored
from .models.names import ready_made
from .precision import NF4, Reduced
from .surgery import QuantisedLinear
from .trainable.adapter import Adapting, OnLayers

KINDS = ("adapter", "merged", "full")
PROBE_DOCUMENTS, PROBE_TOKENS = 8, 512
# Largest and mean difference of log-probabilities between what was trained and what was written.
TOLERANCE = {torch.float32: (5e-3, 5e-4), torch.bfloat16: (1.0, 0.05), torch.float16: (0.5, 0.02)}


def export(run: Path, out: Path, kind: str, dtype: str | None = None) -> dict:
    """Export a run's best checkpoint; returns what was compared: differences, tolerance, files.

    `dtype` is float32 or bfloat16, of a whole model's tensors; without it they stay in those they compute in.
    """
    if kind not in KINDS:
        raise ExportError(f"as={kind!r}: known are {', '.join(KINDS)}")
    wanted = _dtype(dtype, kind)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists: give another folder, or remove it; nothing was written")
    if kind == "adapter" and importlib.util.find_spec("peft") is None:
        raise ExportError(
            "an adapter is checked by loading it with PEFT: pip install luthier[export]; nothing was written"
        )
    made, chosen = restore(run)
    _check_kind(made.config, kind)
    rounded = {"dtype": wanted} if wanted else {}
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        base = _base(made, run) if kind == "adapter" else None
        WRITERS[kind](made, aside, base, **rounded)
        made.tokenizer.save_pretrained(aside)
        _generation_config(made, aside)
        compared = verify(made, run, aside, base, **rounded)
        (aside / "README.md").write_text(card(made.config, run, kind, base, compared))
        _readable(aside)
        if out.exists():
            out.rmdir()
        os.rename(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    files = sorted(p.name for p in out.iterdir())
    return {"out": str(out), "as": kind, "checkpoint": str(chosen), **compared, "files": files}


def _readable(folder: Path) -> None:
    """The permissions that a plain `open` would have given: safetensors files are made for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)


def _dtype(name: str | None, kind: str) -> torch.dtype | None:
    if name is None:
        return None
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known and re.search(r"(?<!\d)[48](?!\d)", name):
        raise ExportError(
            f"dtype={name!r}: merging into 4 or 8 bits would round the trained change away, as it is smaller than "
            "their steps, and what was exported would not be what was trained: use --dtype float32 or bfloat16, or --as "
            "adapter; nothing was written"
        )
    if name not in known:
        raise ExportError(f"dtype={name!r}: known are {', '.join(known)}; nothing was written")
    if kind == "adapter":
        raise ExportError(
            f"dtype={name!r} is of whole models, and an adapter keeps its own: leave it out, or use --as merged"
        )
    return known[name]


def _check_kind(config: Config, kind: str) -> None:
    adapted = isinstance(config.trainable, Adapting)
    if adapted and kind == "full":
        raise ExportError(f"as=full: the run trained an adapter ({config.method}); use as=merged, or as=adapter")
    if not adapted and kind != "full":
        raise ExportError(f"as={kind}: the run trained the model itself ({config.method}); use as=full")


# ---------------------------------------------------------------------------- writers


def _write_adapter(made: Assembled, out: Path, base: str | None) -> None:
    config, model = made.config.trainable, made.network.model
    assert isinstance(config, OnLayers)
    found = dict(surgery.adapters(model))
    tensors = {
        f"base_model.model.{surgery.base_name(name)}.{leaf}": tensor.detach().contiguous().cpu()
        for name, adapter in found.items()
        for leaf, tensor in adapter.rule.saved(adapter).items()
    }
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    written = {
        "peft_type": config.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": made.config.model.revision,
        **config.peft(),
        "target_modules": _short_names(model, list(found)),
        "fan_in_fan_out": any(surgery.transposed(a.base) for a in found.values()),
        "inference_mode": True,
    }
    (out / "adapter_config.json").write_text(json.dumps(written, indent=2))


def _short_names(model: torch.nn.Module, chosen: Sequence[str]) -> list[str]:
    """Last names, where they mean the chosen layers and no others; else the whole names."""
    linear = [n for n, m in surgery.outer(model) if surgery.linear_shape(m)]
    lasts = sorted({n.rpartition(".")[2] for n in chosen})
    others = [n for n in linear if n not in chosen and n.rpartition(".")[2] in lasts]
    return list(chosen) if others else lasts


def _write_merged(made: Assembled, out: Path, base: str | None, dtype: torch.dtype | None = None) -> None:
    model: Any = made.network.model
    config = model.config.get_text_config()
    tied = config.tie_word_embeddings
    if isinstance(model.get_output_embeddings(), surgery.Adapter):
        config.tie_word_embeddings = False  # an adapted head is no longer the embedding
    try:
        _write_model(made, out, surgery.merged_state(model, dtype), dtype)
    finally:
        config.tie_word_embeddings = tied


def _write_full(made: Assembled, out: Path, base: str | None, dtype: torch.dtype | None = None) -> None:
    _write_model(made, out, surgery.merged_state(made.network.model, dtype) if dtype else None, dtype)


def _write_model(
    made: Assembled, out: Path, state: dict[str, Tensor] | None, dtype: torch.dtype | None = None
) -> None:
    """Shards with their index; tied weights once."""
    with made.network.natively() as model:
        model.save_pretrained(out, state_dict=state)
    if dtype is not None:
        path = out / "config.json"
        written = json.loads(path.read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
        path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


WRITERS = {"adapter": _write_adapter, "merged": _write_merged, "full": _write_full}


def _base(made: Assembled, run: Path) -> str:
    """Where PEFT finds the base model; one read from GGUF is kept, dequantised, in the run's folder."""
    name = made.config.model.name
    if not name.endswith(".gguf"):
        path = Path(name).expanduser()
        return str(path.resolve()) if path.is_dir() else name
    return _dequantised(made, run)


def _dequantised(made: Assembled, run: Path) -> str:
    """The base model that an adapter was trained over, in plain numbers; kept in the run's folder."""
    folder = run / "base"
    if not folder.exists():
        aside = run / f".base.{os.getpid()}"
        with surgery.adapters_off(made.network.model):
            _write_model(made, aside, surgery.merged_state(made.network.model))
        made.tokenizer.save_pretrained(aside)
        os.rename(aside, folder)
    return str(folder.resolve())


def _trained_over(made: Assembled, run: Path, base: str) -> tuple[str, dict | None]:
    """The base model in the numbers that the adapter was trained over: where it is, and how transformers quantises it.

    It knows bitsandbytes' 4 bits in blocks of 64; otherwise it is given what the layers multiply with.
    """
    precision = made.config.precision
    if not isinstance(precision, Reduced) or made.config.model.name.endswith(".gguf"):
        return base, None
    ready = ready_made(made.config.model)
    known = isinstance(precision, NF4) and importlib.util.find_spec("accelerate")
    if known and (ready or precision.block_size == 64):
        return base, None if ready else _as_transformers_has_it(made)
    return _dequantised(made, run), None


def _as_transformers_has_it(made: Assembled) -> dict:
    """The arguments of its BitsAndBytesConfig that quantise the same layers in the same way."""
    named = list(surgery.outer(made.network.model))
    plain = [n for n, m in named if surgery.linear_shape(m) and not isinstance(surgery.innermost(m), QuantisedLinear)]
    layer = next(m for m in map(surgery.innermost, dict(named).values()) if isinstance(m, QuantisedLinear))
    return {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": getattr(made.config.precision, "double_quant", False),
        "bnb_4bit_compute_dtype": str(layer.dtype).removeprefix("torch."), "llm_int8_skip_modules": plain,
    }  # fmt: skip


def _generation_config(made: Assembled, out: Path) -> None:
    """The model's own, with every token at which a learnt answer ends as a stop token."""
    config = made.network.model.generation_config
    own = config.eos_token_id
    stops = set(own if isinstance(own, list) else [own] if own is not None else []) | made.renderer.stop_tokens()
    values = config.to_diff_dict() | {"eos_token_id": sorted(stops), "pad_token_id": made.tokenizer.pad_token_id}
    (out / "generation_config.json").write_text(json.dumps(values, indent=2))


# ---------------------------------------------------------------------------- the check


def keep_probe(run: Path, documents: Sequence[Document]) -> None:
    """A few held-out documents, on which every export of the run will be compared."""
    kept = [d.tokens[:PROBE_TOKENS].tolist() for d in documents[:PROBE_DOCUMENTS]]
    write_atomically(run / "probe.json", json.dumps(kept))


def logprobs(made: Assembled, documents: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities of all tokens but each document's first, as the trained model gives them."""
    packed = [
        Document(np.asarray(d, np.int32), np.r_[0.0, np.ones(len(d) - 1)].astype(np.float32), 0) for d in documents
    ]
    batch = Batch.pack(packed).to(made.ranks.device)
    with torch.no_grad():
        hidden, targets, _ = made.network.predictions(batch, made.network.hidden(batch))
        return scored(hidden, made.network.head, targets)[0].float().cpu()


def verify(
    made: Assembled, run: Path, out: Path, base: str | None, dtype: torch.dtype | None = None
) -> dict:  # fmt: skip
    """Load `out` in a fresh process that knows nothing of Luthier, and compare log-probabilities."""
    documents = [d for d in json.loads((run / "probe.json").read_text()) if len(d) > 1]
    computed = next(made.network.model.parameters()).dtype if base is None else _base_dtype(made)
    dtype = dtype or computed
    source, quantisation = _trained_over(made, run, base) if base is not None else (None, None)
    ours = logprobs(made, documents)
    device = made.ranks.device.type
    result = out / "probe.safetensors"
    request = {"documents": documents, "model": str(out), "base": source, "quantisation": quantisation,
               "dtype": str(dtype).removeprefix("torch."), "device": device, "out": str(result)}  # fmt: skip
    ran = subprocess.run(
        [sys.executable, reload.__file__], input=json.dumps(request), capture_output=True, text=True,
        env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    if ran.returncode or not result.exists():
        raise ExportError(
            f"what was written cannot be loaded again; nothing was exported\n{ran.stderr.strip()[-1500:]}"
        )
    loaded = load_file(result)["logprobs"]
    result.unlink()
    difference = (loaded - ours).abs()
    worst, mean = max(TOLERANCE[dtype], TOLERANCE[computed])
    compared = {
        "largest_difference": difference.max().item(),
        "mean_difference": difference.mean().item(),
        "tolerance": worst,
        "compared_tokens": len(ours),
    }
    if isinstance(made.config.trainable, Adapting):
        with surgery.adapters_off(made.network.model):
            to_base = (logprobs(made, documents) - ours).abs()
        compared["difference_to_base"] = to_base.max().item()
        # An adapter that loads and does nothing would be as far away as the base: rounding must not hide that.
        mean = min(mean, max(to_base.mean().item() / 2, mean / 100))
    if not (difference.max() <= worst and difference.mean() <= mean):
        raise ExportError(
            f"what was written answers differently from what was trained: log-probabilities differ by up to "
            f"{difference.max():.3g}, on average {difference.mean():.3g} "
            f"(allowed {worst:g} and {mean:g}); nothing was written"
        )
    return compared


def _base_dtype(made: Assembled) -> torch.dtype:
    return made.network.model.get_input_embeddings().weight.dtype


# ---------------------------------------------------------------------------- the card


def card(config: Config, run: Path, kind: str, base: str | None, compared: dict) -> str:
    """README.md: what it is, from which data and settings, and what was measured."""
    report = json.loads((run / "report.json").read_text()) if (run / "report.json").exists() else {}
    base_name = config.model.name if not config.model.name.endswith(".gguf") else Path(config.model.name).name
    random = config.model.starts_at_random  # then it has no base model
    title = f"{run.name} ({config.method})" if random else f"{base_name}, fine-tuned ({config.method})"
    named = [] if random else [f"base_model: {base_name}"]
    front = ["---", *named, "library_name: " + ("peft" if kind == "adapter" else "transformers"),
             "pipeline_tag: text-generation", "tags:", "- luthier", f"- {config.method}", "---"]  # fmt: skip
    lines = [
        *front, "", f"# {title}", "",
        f"Made with Luthier {__version__} from `{config.data.train}`.", "", "## Figures", "",
    ]  # fmt: skip
    if "held_out_loss" in report:
        lines += [
            f"- held-out loss: base {report['held_out_loss']['base']:.4f}, tuned {report['held_out_loss']['tuned']:.4f}"
        ]
    if "answers" in report:
        base_figures, tuned = report["answers"]["base"], report["answers"]["tuned"]
        low, high = tuned["exact_match_interval"]
        lines += [
            f"- exact match on {tuned['rows']} held-out rows: base {base_figures['exact_match']:.3f}, tuned "
            f"{tuned['exact_match']:.3f} (95% interval {low:.3f} to {high:.3f})"
        ]
    lines += [
        f"- steps {report.get('steps', 'unknown')}, tokens {report.get('tokens', 'unknown')}",
        f"- loaded again in a fresh process: log-probabilities of {compared['compared_tokens']} tokens "
        f"differ by at most {compared['largest_difference']:.2e} from the trained model's",
        "", "## Loading", "", "```python", *_loading(config, kind, base), "```", "", *_numbers(config, kind),
        "## Configuration", "", "```yaml",
        config.dump().rstrip(), "```", "",
    ]  # fmt: skip
    return "\n".join([*lines])


def _numbers(config: Config, kind: str) -> list[str]:
    """What is to be known of a model that was trained over weights in fewer bits."""
    precision = config.precision
    if not isinstance(precision, Reduced):
        return []
    if kind == "merged":
        return [f"Its weights are those in {precision.kind} that it was trained over, dequantised, with the adapter.", ""]
    return [
        f"The adapter was trained over weights in {precision.kind}, and was compared over the same. Over weights in 16 "
        "or 32 bits it answers a little differently.", "",
    ]  # fmt: skip


def _loading(config: Config, kind: str, base: str | None) -> list[str]:
    precision = config.precision
    if kind == "adapter" and isinstance(precision, NF4) and precision.block_size == 64 and not ready_made(config.model):
        return [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig", "",
            "four_bits = BitsAndBytesConfig(",
            f'    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant={precision.double_quant},',
            "    bnb_4bit_compute_dtype=\"bfloat16\",",
            ")",
            f'base = AutoModelForCausalLM.from_pretrained("{base}", quantization_config=four_bits)',
            'model = PeftModel.from_pretrained(base, "path/of/this/folder")',
            'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")',
        ]  # fmt: skip
    if kind == "adapter":
        return [
            "from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            f'base = AutoModelForCausalLM.from_pretrained("{base}")',
            'model = PeftModel.from_pretrained(base, "path/of/this/folder")',
            'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")',
        ]  # fmt: skip
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")',
    ]  # fmt: skip
