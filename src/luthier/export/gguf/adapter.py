"""A run's LoRA as llama.cpp loads it beside a base model in GGUF: `--lora FILE`, or ADAPTER in a Modelfile."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ... import surgery
from ...config import Config
from ...errors import ExportError
from ...opened import Opened
from ...trainable.lora import LoRA
from ...trainable.low_rank import LowRank
from .. import compare
from . import check as check_model
from . import checked, families, model, modelfile, numbers

FILE = "adapter.gguf"


def check(source: str, config: Config, kind: str, dtype: str | None) -> None:
    """What can be refused before anything heavy is loaded."""
    if dtype not in (None, "F32", "F16"):
        raise ExportError(f"as={kind}: dtype={dtype!r}: known are F32, F16; nothing was written")
    check_model(source, config, kind, dtype)
    settings: Any = config.trainable
    whole = "use as=gguf, which merges it into the model"
    if type(settings) is not LoRA:
        raise ExportError(
            f"as={kind}: llama.cpp has LoRA alone beside a model, and the run trained {settings.kind}; {whole}"
        )
    if config.model.beneath:
        raise ExportError(f"as={kind}: it was trained on top of other adapters, which the base is without; {whole}")
    if settings.modules_to_save or config.model.new_tokens:
        raise ExportError(f"as={kind}: the run changed whole modules as well (modules_to_save, new_tokens); {whole}")


def write(found: Opened, out: Path, kind: str, dtype: str | None) -> dict[str, Any]:
    """Write `out`/adapter.gguf and a Modelfile; compare in llama.cpp, over a base that is written for it and goes."""
    dtype = dtype or "F32"
    path, base = out / FILE, out / "base.gguf"
    _write(found, path, dtype)
    kept = model.usual(found)
    with surgery.adapters_off(found.model):
        model.write(found, base, kept)
    compared = checked.whole(found, base, kept, adapter=path)
    base.unlink()
    _acts(found, compared)
    weights = found.made.config.model.name if found.made else ""  # type: ignore[union-attr]
    known = weights.endswith(".gguf")
    told = modelfile.text(found, str(Path(weights).resolve()) if known else "./model.gguf", f"./{FILE}")
    note = "" if known else f"# model.gguf is the base: luthier export {weights} base --as gguf\n"
    (out / "Modelfile").write_text(note + told)
    return {**compared, "bytes": path.stat().st_size, "dtype": dtype}


def _acts(found: Opened, compared: dict[str, Any]) -> None:
    """Whatever is allowed of rounding: an adapter that loads and does nothing is none."""
    documents = checked.documents_of(found)
    with surgery.adapters_off(found.model):
        base = compare.logprobs(found, documents)
    apart = (base - compare.logprobs(found, documents)).abs()
    compared["difference_to_base"] = apart.max().item()
    if compared["mean_difference"] > apart.mean().item() / 2:
        raise ExportError(
            "as=gguf-adapter: with it llama.cpp's answers differ from the trained model's by "
            f"{compared['mean_difference']:.3g} on average, and the base's by {apart.mean().item():.3g}: it does "
            "nothing; nothing is left"
        )


def _write(found: Opened, path: Path, dtype: str) -> None:
    """llama.cpp scales B A by alpha / rank, with one alpha for all: what is left of each layer's scale goes into B."""
    import gguf

    config = found.model.config
    family = families.family(config)
    alpha = float(found.made.config.trainable.lora_alpha)  # type: ignore[union-attr]
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in surgery.adapters(found.model):
        if type(layer.rule) is not LowRank or not name.startswith("model.layers."):
            raise ExportError(
                f"as=gguf-adapter: the adapter of {name} is none of a layer between embeddings and head, where "
                "llama.cpp has them; use as=gguf"
            )
        down, up = layer.rule.factors(layer)
        rest = layer.rule.scaling * layer.share * len(down) / alpha
        ours, theirs = families.named(family, f"{name}.weight"), f"{name}.weight"
        up = families.interleaved(config, theirs, up) if family.interleaved else up
        tensors[f"{ours}.lora_a"] = down
        tensors[f"{ours}.lora_b"] = up * rest if rest != 1 else up
    writer = gguf.GGUFWriter(path, family.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, numbers.rounded(tensor, dtype))
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
