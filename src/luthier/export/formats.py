"""The formats of an export: for each what it is, who writes it, and in which types of numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A row of the table. Its `home`, a file beside this one, has

    - `check(source, config, kind, dtype)`: ExportError for what can be refused before anything heavy is loaded;
      `config` is a run's, None of a plain model;
    - `write(opened, out, kind, dtype) -> dict`: writes into the folder `out`, loads it again with the format's reader
      and returns what was compared; ExportError where it answers otherwise.
    """

    name: str
    caption: str
    home: str
    runs_only: bool = False
    """Whether only a run can be written so, and not a model in a folder."""
    dtypes: tuple[str, ...] = ()
    """What `dtype` may be."""
    bounded: bool = False
    """Whether it rounds, so that `bound` says by how much of itself perplexity may grow; then `write` takes it."""


TABLE = (
    Format("adapter", "a run's adapter in PEFT's layout", "plain", runs_only=True),
    Format("merged", "base and adapter in one, as transformers reads it", "plain", True, ("float32", "bfloat16")),
    Format("full", "a model trained whole or in part, or a plain one", "plain", dtypes=("float32", "bfloat16")),
    Format("quantised", "a run with precision.kind=qat, in 4 or 8 bits", "integers", runs_only=True),
    Format("gguf", "one file for llama.cpp and Ollama, by default in the numbers it has", "gguf", bounded=True,
           dtypes=("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0")),
    Format("gguf-adapter", "a run's LoRA for llama.cpp and Ollama, beside a base in GGUF", "gguf.adapter", True,
           ("F32", "F16")),
    Format("onnx", "a graph from tokens to logits for onnxruntime, in float32", "onnx"),
)  # fmt: skip
FORMATS = {form.name: form for form in TABLE}
KINDS = tuple(FORMATS)
