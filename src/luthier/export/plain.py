"""Adapters in PEFT's layout, and whole models as transformers reads them: safetensors, tokenizer, settings, a card."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import surgery
from ..assembled import Assembled
from ..card import card, of_luthier_alone, peft_reads, plain_card
from ..config import Config
from ..errors import ExportError
from ..models.names import ready_made
from ..opened import Opened
from ..precision import NF4, QAT, ROUNDING, Reduced, qat
from ..surgery import QuantisedLinear
from ..trainable import adapter_files, saved
from ..trainable.adapter import Adapting
from . import compare


def check(source: str, config: Config | None, kind: str, dtype: str | None) -> None:
    """Whether a run, or a plain model where `config` is None, can be written so."""
    _dtype(dtype, kind)
    if config is None:
        return
    if kind == "adapter" and not of_luthier_alone(config) and importlib.util.find_spec("peft") is None:
        raise ExportError(
            "an adapter is checked by loading it with PEFT: pip install luthier[export]; nothing was written"
        )
    check_kind(config, kind)


def write(
    found: Opened, out: Path, kind: str, dtype: str | None, writer: Callable[..., None] | None = None
) -> dict:  # fmt: skip
    """Write into `out`, by another `writer` than the kind's own where one is given, and compare."""
    if found.made is None:
        return _plain(found, out, _dtype(dtype, kind))
    made, run, wanted = found.made, Path(found.name).expanduser(), _dtype(dtype, kind)
    rounded = {"dtype": wanted} if wanted else {}
    base = _base(made, run) if kind == "adapter" else None
    (writer or WRITERS[kind])(made, out, base, **rounded)
    beside(made, out)
    with as_written(made, kind):
        compared = verify(made, run, out, base, kind, **rounded)
    (out / "README.md").write_text(card(made.config, run, kind, base, compared))
    return compared


def _plain(found: Opened, out: Path, dtype: torch.dtype | None) -> dict:
    """A model that is no run, as safetensors."""
    state = surgery.merged_state(found.model, dtype) if dtype is not None else None
    write_model(found, out, state, dtype)
    beside(found, out)
    documents = compare.probe(found)
    written = dtype or found.network.dtype
    bound = compare.Bound(*max(compare.TOLERANCE[written], compare.TOLERANCE[found.network.dtype]))
    compared = compare.proof(
        compare.logprobs(found, documents), out, "transformers_reader", documents, bound,
        types=[None] * len(documents), **_asked(found, str(written).removeprefix("torch.")),
    )  # fmt: skip
    compared.pop("found")
    (out / "README.md").write_text(plain_card(found.name, compared))
    return compared


def _asked(found: Opened, dtype: str) -> dict:
    """What the reader is told of a whole model that predicts tokens."""
    return {
        "base": None, "rows": 0, "quantisation": None, "dtype": dtype, "device": found.network.device.type,
        "wide": False, "ends_in": "tokens", "labels": [], "beneath": [], "rounded_activations": True,
        "pad": 0, "ours": False,
    }  # fmt: skip


def beside(made: Any, out: Path) -> None:
    """The tokenizer with its chat template, and generation settings."""
    made.tokenizer.save_pretrained(out)
    _generation_config(made, out)


def _kind(settings: Any) -> str:
    return settings.kind


def _dtype(name: str | None, kind: str) -> torch.dtype | None:
    if name is None:
        return None
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known and re.search(r"(?<!\d)[48](?!\d)", name):
        raise ExportError(
            f"dtype={name!r}: merging into 4 or 8 bits would round the trained change away, as it is smaller than "
            "their steps, and what was exported would not be what was trained: use --dtype float32 or bfloat16, or "
            "--as adapter; nothing was written"
        )
    if name not in known:
        raise ExportError(f"dtype={name!r}: known are {', '.join(known)}; nothing was written")
    if kind == "adapter":
        raise ExportError(
            f"dtype={name!r} is of whole models, and an adapter keeps its own: leave it out, or use --as merged"
        )
    return known[name]


def check_kind(config: Config, kind: str) -> None:
    adapted = isinstance(config.trainable, Adapting)
    if isinstance(config.precision, QAT) and adapted and kind == "adapter":
        raise ExportError(
            "as=adapter: the run rounded its adapter together with the weights, and would not answer so beside them: "
            "use as=quantised, or as=merged for floating-point weights that are to be rounded elsewhere"
        )
    beneath = [adapter_files.read(entry.path).settings for entry in config.model.beneath]
    lasting = [a for a in (config.trainable, *beneath) if isinstance(a, Adapting) and not a.mergeable]
    if lasting and kind != "adapter":
        raise ExportError(f"as={kind}: no plain weights compute what {_kind(lasting[0])} adds: use as=adapter")
    if kind in ("quantised", "gguf", "onnx"):
        return
    if adapted and kind == "full":
        raise ExportError(f"as=full: the run trained an adapter ({config.method}); use as=merged, or as=adapter")
    if not adapted and kind != "full":
        other = "as=full, or as=quantised" if isinstance(config.precision, QAT) else "as=full"
        raise ExportError(f"as={kind}: the run trained the model itself ({config.method}); use {other}")


# ---------------------------------------------------------------------------- writers


def _write_adapter(made: Assembled, out: Path, base: str | None) -> None:
    config = made.config.trainable
    assert isinstance(config, Adapting)
    saved.write(out, made.network.model, config, base=base, revision=made.config.model.revision)


def _write_merged(made: Assembled, out: Path, base: str | None, dtype: torch.dtype | None = None) -> None:
    model: Any = made.network.model
    config = model.config.get_text_config()
    tied = config.tie_word_embeddings
    state = surgery.merged_state(model, dtype)
    if tied and model.get_output_embeddings() is not None:
        config.tie_word_embeddings = _still_tied(model, state)
    try:
        write_model(made, out, state, dtype)
    finally:
        config.tie_word_embeddings = tied


def _still_tied(model: Any, state: dict[str, Tensor]) -> bool:
    """Whether head and embeddings are one matrix with their adapters merged; then they are one in `state`, too."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    table, head = (next(f"{n}.weight" for n, m in surgery.outer(model) if m is end) for end in ends)
    if head in state and not torch.equal(state[table], state[head]):
        return False
    state[head] = state[table]
    return True


def _rounded(made: Assembled) -> bool:
    return isinstance(made.config.precision, QAT)


def _write_full(made: Assembled, out: Path, base: str | None, dtype: torch.dtype | None = None) -> None:
    write_model(made, out, surgery.merged_state(made.network.model, dtype) if dtype or _rounded(made) else None, dtype)


def write_model(
    made: Assembled | Opened, out: Path, state: dict[str, Tensor] | None, dtype: torch.dtype | None = None
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
            write_model(made, aside, surgery.merged_state(made.network.model))
        made.tokenizer.save_pretrained(aside)
        os.rename(aside, folder)
    return str(folder.resolve())


def _trained_over(made: Assembled, run: Path, base: str) -> tuple[str, dict | None]:
    """The base model in the numbers that the adapter was trained over: where it is, and how transformers quantises it.

    It knows bitsandbytes' 4 bits in blocks of 64; otherwise it is given what the layers multiply with.
    """
    precision = made.config.precision
    if isinstance(precision, Reduced) and (made.config.model.beneath or of_luthier_alone(made.config)):
        return _dequantised(made, run), None
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
    """The model's own, with every token at which a learnt answer ends as a stop token; none where it gives scores."""
    if made.network.ends_in != "tokens":
        return
    config = made.network.model.generation_config
    own = config.eos_token_id
    stops = set(own if isinstance(own, list) else [own] if own is not None else []) | made.renderer.stop_tokens()
    values = config.to_diff_dict() | {"eos_token_id": sorted(stops), "pad_token_id": made.tokenizer.pad_token_id}
    (out / "generation_config.json").write_text(json.dumps(values, indent=2))


# ---------------------------------------------------------------------------- the check


def as_written(made: Assembled | None, kind: str) -> AbstractContextManager:
    """Of a run that trained for rounding: floating-point weights are compared as they are, not rounded; rounded ones in
    float32 and with activations that are not."""
    if made is None:
        return nullcontext()
    if _rounded(made) and kind != "quantised":
        return surgery.adapters_off(made.network.model, {ROUNDING})
    if _rounded(made):
        qat.weights_alone(made.network.model)
    return nullcontext()


def verify(
    made: Assembled, run: Path, out: Path, base: str | None, kind: str, dtype: torch.dtype | None = None
) -> dict:  # fmt: skip
    """Load `out` in a fresh process that knows nothing of Luthier, and compare log-probabilities.

    In 16 bits two programs can drift apart through many layers, although they have the same numbers: then what keeps
    its numbers in 32 bits is compared there, where little is allowed.
    """
    compared, fault = _compared(made, run, out, base, kind, dtype)
    exact = kind in ("adapter", "full") and not isinstance(made.config.precision, Reduced)
    if fault and exact and _base_dtype(made) != torch.float32:
        dtype = _base_dtype(made)
        made.network.model.float()
        compared, fault = _compared(made, run, out, base, kind, dtype, wide=True)
    if fault:
        raise ExportError(fault)
    return compared


def _compared(
    made: Assembled, run: Path, out: Path, base: str | None, kind: str, dtype: torch.dtype | None, wide: bool = False
) -> tuple[dict, str | None]:  # fmt: skip
    """What was found, and what is wrong with it, if anything; `wide`: what is loaded in `dtype` computes in float32."""
    told = [d if isinstance(d, dict) else {"tokens": d} for d in json.loads((run / "probe.json").read_text())]
    scoring = made.network.ends_in != "tokens"
    told = [d for d in told if len(d["tokens"]) > 1 or scoring]
    documents, types = [d["tokens"] for d in told], [d.get("types") for d in told]
    computed = next(made.network.model.parameters()).dtype if base is None else _base_dtype(made)
    dtype = dtype or computed
    source, quantisation = _trained_over(made, run, base) if base is not None else (None, None)
    ours = compare.logprobs(made, documents, types)
    device = made.ranks.device.type
    rows = made.network.model.get_input_embeddings().weight.shape[0]
    request = {"documents": documents, "model": str(out), "base": source, "rows": rows, "quantisation": quantisation,
               "dtype": str(dtype).removeprefix("torch."), "device": device, "out": str(out / "probe.safetensors"),
               "wide": wide, "ends_in": made.network.ends_in, "types": types,
               "labels": list(made.config.objective.scores) if scoring else [],
               "beneath": [entry.model_dump() for entry in made.config.model.beneath],
               "rounded_activations": kind != "quantised",
               "pad": made.network.padding,
               "ours": of_luthier_alone(made.config) or not peft_reads(made.config)
               or bool(made.config.model.beneath and dtype != torch.float32),
               }  # fmt: skip
    loaded = compare.read_again("transformers_reader", request)["logprobs"]
    difference = (loaded - ours).abs()
    worst, mean = compare.TOLERANCE[computed] if wide else max(compare.TOLERANCE[dtype], compare.TOLERANCE[computed])
    compared = {
        "largest_difference": difference.max().item(),
        "mean_difference": difference.mean().item(),
        "tolerance": worst,
        "compared_tokens": len(ours),
        "compared": f"{len(ours)} scores of {len(documents)} texts"
        if scoring
        else f"log-probabilities of {len(ours)} tokens",
    }
    if isinstance(made.config.trainable, Adapting):
        with surgery.adapters_off(made.network.model, {saved.TRAINED}):
            to_base = (compare.logprobs(made, documents, types) - ours).abs()
        compared["difference_to_base"] = to_base.max().item()
        # An adapter that loads and does nothing would be as far away as the base: rounding must not hide that.
        mean = min(mean, max(to_base.mean().item() / 2, mean / 100))
    if difference.max() <= worst and difference.mean() <= mean:
        return compared, None
    return compared, (
        "what was written answers differently from what was trained: "
        f"{'scores' if scoring else 'log-probabilities'} differ by up to "
        f"{difference.max():.3g}, on average {difference.mean():.3g} "
        f"(allowed {worst:g} and {mean:g}); nothing was written"
    )


def _base_dtype(made: Assembled) -> torch.dtype:
    return made.network.model.get_input_embeddings().weight.dtype
