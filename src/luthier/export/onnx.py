"""ONNX: the network from tokens to logits as a graph for onnxruntime, made by the exporter of transformers."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import surgery
from ..config import Config
from ..errors import ExportError
from ..opened import Opened
from . import compare, plain

NEEDED = ("onnx", "onnxscript", "onnxruntime")
FILE = "model.onnx"


def check(source: str, config: Config | None, kind: str, dtype: str | None) -> None:
    """What can be refused before anything heavy is loaded."""
    if dtype is not None:
        raise ExportError(f"as=onnx: dtype={dtype!r}: it is in float32 alone; leave it out; nothing was written")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ExportError(f"as=onnx needs {', '.join(missing)}: pip install luthier[onnx]; nothing was written")
    import transformers

    if importlib.util.find_spec("transformers.exporters") is None:
        raise ExportError(
            f"as=onnx needs the exporters of transformers, which {transformers.__version__} is without: pip install "
            "'transformers>=5.23'; nothing was written"
        )
    if config is None:
        return
    if config.objective.ends_in != "tokens":
        raise ExportError(
            f"as=onnx: the run is one of method={config.method}, whose network gives scores; networks that predict "
            "tokens are written: use as=merged or as=full"
        )
    plain.check_kind(config, kind)


def write(found: Opened, out: Path, kind: str, dtype: str | None) -> dict[str, Any]:
    """Write the graph with the tokenizer beside it; run it by onnxruntime and compare."""
    documents = compare.probe(found)
    with plain.as_written(found.made, kind):
        ours = compare.logprobs(found, documents)
        with _float32(found) as model, _quiet():
            _graph(model, out)
    plain.beside(found, out)
    compared = compare.proof(
        ours, out, "onnx_runtime", documents, compare.Bound(*compare.TOLERANCE[found.network.dtype])
    )
    compared.pop("found")
    (out / "README.md").write_text(_card(found, compared))
    return compared


@contextmanager
def _float32(found: Opened) -> Iterator[Any]:
    """A plain model in float32 on the CPU, adapters merged: the same one where it is that already."""
    with found.network.natively() as model:
        changed = surgery.names(model) or any(isinstance(m, surgery.QuantisedLinear) for m in model.modules())
        if not changed and model.dtype == torch.float32 and found.network.device.type == "cpu" and found.made is None:
            yield model
            return
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        plain.write_model(found, Path(folder), surgery.merged_state(found.model, torch.float32), torch.float32)
        yield AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _graph(model: Any, out: Path) -> None:
    """Of two texts of seven tokens; the number of texts and of tokens stay open."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    ids = torch.arange(14).reshape(2, 7) % model.config.get_text_config().vocab_size
    cached = model.config.use_cache
    model.config.use_cache = False
    try:
        config = OnnxConfig(dynamic=True)
        made = OnnxExporter().export(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, config=config)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        told = str(error).strip().splitlines()[:1] or [type(error).__name__]
        name = type(model).__name__
        raise ExportError(f"as=onnx: transformers cannot write {name} so: {told[0]}; use as=full") from None
    finally:
        model.config.use_cache = cached
    made.save_pretrained(out)
    assert (out / FILE).exists()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress and what it tries on the way."""
    kept = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(kept)


def _card(found: Opened, compared: dict) -> str:
    shown = found.name.rstrip("/").rsplit("/", 1)[-1]
    return "\n".join([
        "---", "library_name: onnx", "pipeline_tag: text-generation", "---", "", f"# {shown}", "",
        f"Written by Luthier. Run by onnxruntime in a fresh process: {compared['compared']} differ by at most "
        f"{compared['largest_difference']:.2e}.", "", "```python", "import numpy, onnxruntime",
        "from transformers import AutoTokenizer", "",
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")',
        f'session = onnxruntime.InferenceSession("path/of/this/folder/{FILE}")',
        'given = dict(tokenizer("Hello", return_tensors="np"))',
        'logits = session.run(["logits"], {name: given[name] for name in ("input_ids", "attention_mask")})[0]',
        "```", "",
    ])  # fmt: skip
