"""llama.cpp's C interface, of the library inside `xllamacpp`: load a model, score and continue tokens, round blocks.

https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h. Structures of parameters grow from release to
release: here they are blocks of numbers that the library fills with its defaults, of which what is changed is found by
its default.
"""

from __future__ import annotations

import ctypes as c
import importlib.util
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ExportError

INSTALL = "GGUF is checked by llama.cpp itself: pip install luthier[gguf] (xllamacpp); nothing was written"
DEFAULTS = (512, 2048, 512)  # n_ctx, n_batch, n_ubatch: the first numbers of a context's parameters
F32 = 0


class _Parameters(c.Structure):
    _fields_ = [("numbers", c.c_int32 * 256)]  # more than any release has


class _Batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32), ("token", c.POINTER(c.c_int32)), ("embd", c.c_void_p), ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)), ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]  # fmt: skip


SIGNATURES: dict[str, tuple[Any, list]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_Parameters, []),
    "llama_context_default_params": (_Parameters, []),
    "llama_model_load_from_file": (c.c_void_p, [c.c_char_p, _Parameters]),
    "llama_init_from_model": (c.c_void_p, [c.c_void_p, _Parameters]),
    "llama_model_free": (None, [c.c_void_p]),
    "llama_free": (None, [c.c_void_p]),
    "llama_n_ctx": (c.c_uint32, [c.c_void_p]),
    "llama_n_ubatch": (c.c_uint32, [c.c_void_p]),
    "llama_set_n_threads": (None, [c.c_void_p, c.c_int32, c.c_int32]),
    "llama_model_get_vocab": (c.c_void_p, [c.c_void_p]),
    "llama_model_n_ctx_train": (c.c_int32, [c.c_void_p]),
    "llama_model_chat_template": (c.c_char_p, [c.c_void_p, c.c_char_p]),
    "llama_vocab_n_tokens": (c.c_int32, [c.c_void_p]),
    "llama_vocab_is_eog": (c.c_bool, [c.c_void_p, c.c_int32]),
    "llama_tokenize": (
        c.c_int32, [c.c_void_p, c.c_char_p, c.c_int32, c.POINTER(c.c_int32), c.c_int32, c.c_bool, c.c_bool],
    ),
    "llama_batch_init": (_Batch, [c.c_int32, c.c_int32, c.c_int32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (c.c_int32, [c.c_void_p, _Batch]),
    "llama_get_logits": (c.POINTER(c.c_float), [c.c_void_p]),
    "llama_get_memory": (c.c_void_p, [c.c_void_p]),
    "llama_memory_clear": (None, [c.c_void_p, c.c_bool]),
    "llama_adapter_lora_init": (c.c_void_p, [c.c_void_p, c.c_char_p]),
    "llama_set_adapters_lora": (
        c.c_int32, [c.c_void_p, c.POINTER(c.c_void_p), c.c_size_t, c.POINTER(c.c_float)],
    ),
    "ggml_quantize_chunk": (
        c.c_size_t, [c.c_int32, c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, c.c_void_p],
    ),
}  # fmt: skip


def installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


@cache
def library() -> Any:
    """With the signatures of what is used of it; ExportError where it is missing, or another than is known here."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise ExportError(INSTALL)
    files = sorted(p for p in Path(found.origin).parent.glob("xllamacpp*") if p.suffix in (".so", ".pyd", ".dylib"))
    try:
        loaded = c.CDLL(str(files[0]))
        for name, (gives, takes) in SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = gives, takes
    except (IndexError, OSError, AttributeError) as error:
        raise ExportError(
            f"this release of xllamacpp has another interface ({error}): pip install 'xllamacpp>=2026.10', or use "
            "another format; nothing was written"
        ) from None
    return loaded


class Llama:
    """A GGUF file in llama.cpp, on the CPU, with keys and values in float32."""

    def __init__(self, path: str, context: int, threads: int, adapter: str | None = None):
        self.api = library()
        self.api.llama_backend_init()
        self.model = self.api.llama_model_load_from_file(path.encode(), self.api.llama_model_default_params())
        if not self.model:
            raise ExportError(f"llama.cpp does not load {path}")
        self.vocabulary = self.api.llama_model_get_vocab(self.model)
        self.rows = self.api.llama_vocab_n_tokens(self.vocabulary)
        parameters, self.exact = _context(self.api.llama_context_default_params(), context)
        self.context = self.api.llama_init_from_model(self.model, parameters)
        if not self.context or self.api.llama_n_ctx(self.context) < context:
            raise ExportError(f"llama.cpp makes no context of {context} tokens for {path}")
        self.api.llama_set_n_threads(self.context, threads, threads)
        self.size = context
        if adapter is not None:
            self._adapt(adapter)

    def _adapt(self, path: str) -> None:
        loaded = self.api.llama_adapter_lora_init(self.model, path.encode())
        if not loaded:
            raise ExportError(f"llama.cpp does not load the adapter {path}")
        if self.api.llama_set_adapters_lora(self.context, (c.c_void_p * 1)(loaded), 1, (c.c_float * 1)(1.0)):
            raise ExportError(f"llama.cpp does not use the adapter {path}")

    def logits(self, tokens: Sequence[int], begin: int = 0) -> np.ndarray:
        """[T, V] of tokens that stand from position `begin` on; what stood there before is forgotten at 0."""
        if begin == 0:
            self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        batch = self.api.llama_batch_init(len(tokens), 0, 1)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, begin + i, 1, 1
            batch.seq_id[i][0] = 0
        batch.n_tokens = len(tokens)
        failed = self.api.llama_decode(self.context, batch)
        self.api.llama_batch_free(batch)
        if failed:
            raise ExportError(f"llama.cpp does not decode {len(tokens)} tokens ({failed})")
        found = self.api.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, (len(tokens), self.rows)).copy()

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        """[T - 1] of all tokens but the first."""
        logits = self.logits(tokens)[:-1].astype(np.float64)
        chosen = logits[np.arange(len(tokens) - 1), tokens[1:]]
        top = logits.max(-1)
        return (chosen - top - np.log(np.exp(logits - top[:, None]).sum(-1))).astype(np.float32)

    def continued(self, tokens: Sequence[int], count: int, stops: Collection[int] = ()) -> list[int]:
        """The likeliest next tokens, one by one, up to one of `stops`; without, as many as asked."""
        logits, out = self.logits(tokens), []
        for at in range(count):
            out.append(int(logits[-1].argmax()))
            if at + 1 == count or out[-1] in stops:
                break
            logits = self.logits(out[-1:], len(tokens) + at)
        return out

    def tokenised(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text, in which special tokens are found; `special` adds those at its start and end."""
        raw = text.encode()
        room = (c.c_int32 * (len(raw) + 8))()
        found = self.api.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), special, True)
        return list(room[:found])

    def ends(self, token: int) -> bool:
        """Whether an answer is at its end with it."""
        return self.api.llama_vocab_is_eog(self.vocabulary, token)

    def template(self) -> str | None:
        found = self.api.llama_model_chat_template(self.model, None)
        return found.decode() if found else None


def _context(parameters: _Parameters, context: int) -> tuple[_Parameters, bool]:
    """For so many tokens at once, and whether attention is computed in float32: the types of keys and values stand
    behind a callback and its data, both absent, as two times 1 (float16); whether it is fused stands last of four
    settings that are left to the library (-1), before the two numbers of rotary positions."""
    numbers = list(parameters.numbers)
    if tuple(numbers[:3]) != DEFAULTS:
        raise ExportError("this release of xllamacpp has other parameters: pip install 'xllamacpp>=2026.10'")
    parameters.numbers[0] = parameters.numbers[1] = parameters.numbers[2] = context
    types = [i + 4 for i in range(8, 64) if numbers[i : i + 10] == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]]
    fused = [i + 3 for i in range(4, 32) if numbers[i : i + 6] == [-1, -1, -1, -1, 0, 0]]
    if exact := len(types) == len(fused) == 1:
        parameters.numbers[types[0]] = parameters.numbers[types[0] + 1] = F32
        parameters.numbers[fused[0]] = 0
    return parameters, exact


def rounded(values: np.ndarray, kind: int) -> np.ndarray:
    """A matrix [R, C] of float32 in blocks of one of ggml's types, [R, bytes]."""
    import gguf

    values = np.ascontiguousarray(values, np.float32)
    rows, width = values.shape
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    out = np.empty((rows, width // block * size), np.uint8)
    written = library().ggml_quantize_chunk(kind, values.ctypes.data, out.ctypes.data, 0, rows, width, None)
    assert written == out.nbytes, (written, out.nbytes)
    return out

