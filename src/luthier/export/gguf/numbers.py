"""The types of numbers of a GGUF file: which tensor gets which, and the rounding to it.

Blocks: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h. Plain blocks are rounded by the
package `gguf`; the K types, which it does not write, by ggml's own code inside xllamacpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ExportError
from . import library


@dataclass(frozen=True)
class Numbers:
    """A row of the table: the type of most matrices, and what goes with it."""

    kind: str
    file_type: str
    """The name in the file's head."""
    head: str
    """Of the output matrix, or of embeddings that are it as well."""
    bound: float
    """By how much of itself perplexity may grow."""
    better: str | None = None
    """Of the matrices that lose most: values, and what leads out of the feed-forward, in some layers."""
    fallback: str = "Q8_0"
    """Of rows that are no whole blocks."""


TABLE = {
    "F32": Numbers("F32", "ALL_F32", "F32", 0.001),
    "F16": Numbers("F16", "MOSTLY_F16", "F16", 0.005),
    "BF16": Numbers("BF16", "MOSTLY_BF16", "BF16", 0.02),
    "Q8_0": Numbers("Q8_0", "MOSTLY_Q8_0", "Q8_0", 0.01),
    "Q6_K": Numbers("Q6_K", "MOSTLY_Q6_K", "Q6_K", 0.02, fallback="Q8_0"),
    "Q5_K_M": Numbers("Q5_K", "MOSTLY_Q5_K_M", "Q6_K", 0.05, "Q6_K", "Q5_1"),
    "Q5_1": Numbers("Q5_1", "MOSTLY_Q5_1", "Q8_0", 0.05),
    "Q5_0": Numbers("Q5_0", "MOSTLY_Q5_0", "Q8_0", 0.05),
    "Q4_K_M": Numbers("Q4_K", "MOSTLY_Q4_K_M", "Q6_K", 0.12, "Q6_K", "Q5_0"),
    "Q4_1": Numbers("Q4_1", "MOSTLY_Q4_1", "Q8_0", 0.15),
    "Q4_0": Numbers("Q4_0", "MOSTLY_Q4_0", "Q8_0", 0.2),
}
K = {"Q4_K", "Q5_K", "Q6_K"}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Those that are numbers each by itself."""


def needs_library(dtype: str) -> bool:
    return TABLE[dtype].kind in K


def chosen(dtype: str, name: str, shape: tuple[int, ...], layers: int, tied: bool) -> str:
    """The type of a tensor: vectors stay in float32."""
    numbers = TABLE[dtype]
    if len(shape) < 2 or name.startswith("rope_"):
        return "F32"
    kind = numbers.kind
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        kind = numbers.head
    elif numbers.better and (".attn_v." in name or ".ffn_down." in name) and _costly(int(name.split(".")[1]), layers):
        kind = numbers.better
    return fitting(kind, shape[-1], numbers.fallback)


def _costly(layer: int, layers: int) -> bool:
    """The first eighth of the layers, the last, and each third between: the mixture that llama.cpp calls M."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def fitting(kind: str, width: int, fallback: str) -> str:
    """A type whose blocks fill a row of this width."""
    import gguf

    fallback = "Q8_0" if kind == "Q6_K" else fallback
    for one in (kind, fallback, "F16"):
        if width % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[one]][0] == 0:
            return one
    raise AssertionError(width)


def size(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes."""
    import gguf

    block, each = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    count = int(np.prod(shape))
    return count // block * each


def rounded(tensor: Tensor, kind: str) -> np.ndarray:
    """In the type, as bytes or as numbers that `gguf` writes as they are."""
    import gguf

    values: Any = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    if kind == "F32":
        return values
    if kind == "F16":
        with np.errstate(over="ignore"):
            narrow = values.astype(np.float16)
        if not np.isfinite(narrow).all() and np.isfinite(values).all():
            raise ExportError(f"dtype=F16: weights up to {abs(values).max():.3g} are beyond its 65504; use BF16")
        return narrow
    found = gguf.GGMLQuantizationType[kind]
    return library.rounded(values, found.value) if kind in K else gguf.quants.quantize(values, found)
