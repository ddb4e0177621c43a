"""Write a model as GGUF: what it is, its tokenizer, then one tensor after the other, never all rounded at once."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import surgery
from ...errors import ExportError
from ...opened import Opened
from . import families, numbers
from .vocabulary import describe, vocabulary

USUAL = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def usual(found: Opened) -> str:
    """The type that keeps the numbers as they are."""
    return USUAL[found.network.model.get_input_embeddings().weight.dtype]


def write(found: Opened, path: Path, dtype: str) -> list[str]:
    """Into the file `path`; returns what is to be known of it. ExportError where the format cannot hold the model or
    its tokenizer, before anything is written."""
    import gguf

    with found.network.natively() as model:
        config = model.config
        family = families.family(config)
        state, tied = _state(model, config)
        rows = state["model.embed_tokens.weight"].shape[0]
        tokens = vocabulary(found.tokenizer, rows)
        layout = {families.named(family, name): name for name in state}
        extra = families.extra(family, config)
        writer = gguf.GGUFWriter(path, family.architecture)
        writer.add_type("model")
        writer.add_name(_name(found, family))
        writer.add_file_type(gguf.LlamaFileType[numbers.TABLE[dtype].file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        families.describe(writer, family, config, rows)
        describe(writer, tokens, found.tokenizer, found.renderer.stop_tokens())
        kinds: dict[str, str] = {}
        for ours, theirs in layout.items():
            shape = tuple(state[theirs].shape)
            kinds[ours] = numbers.chosen(dtype, ours, shape, config.num_hidden_layers, tied)
            _announce(writer, ours, shape, kinds[ours])
        for name, tensor in extra.items():
            _announce(writer, name, tuple(tensor.shape), "F32")
        with closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for ours, theirs in layout.items():
                tensor = families.laid_out(family, config, theirs, state[theirs])
                writer.write_tensor_data(numbers.rounded(tensor, kinds[ours]))
            for tensor in extra.values():
                writer.write_tensor_data(numbers.rounded(tensor, "F32"))
    return _remarks(family, config, dtype, kinds)


def _state(model: Any, config: Any) -> tuple[dict[str, Tensor], bool]:
    """Plain tensors, adapters merged, without a head that is the embeddings; whether it is."""
    state = surgery.merged_state(model)
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    if table not in state:
        raise ExportError(f"as=gguf: {type(model).__name__} has no tensor {table}; use as=full")
    tied = config.tie_word_embeddings and (head not in state or torch.equal(state[head], state[table]))
    if tied:
        state.pop(head, None)
    return state, tied


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    import gguf
    import numpy as np

    kind_of = gguf.GGMLQuantizationType[kind]
    plain = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}.get(kind)
    if plain is not None:
        writer.add_tensor_info(name, shape, plain, numbers.size(kind, shape))
        return
    block, each = gguf.GGML_QUANT_SIZES[kind_of]
    bytes_of = (*shape[:-1], shape[-1] // block * each)
    writer.add_tensor_info(name, bytes_of, np.dtype(np.uint8), numbers.size(kind, shape), raw_dtype=kind_of)


def _name(found: Opened, family: families.Family) -> str:
    """By a name with phi-3 in it llama.cpp knows that white space behind special tokens is theirs."""
    name = Path(found.name).name.removesuffix(".gguf") or found.name
    strips = any(added.rstrip for added in found.tokenizer.added_tokens_decoder.values())
    return f"phi-3 {name}" if strips and family.architecture == "phi3" else name


def _remarks(family: families.Family, config: Any, dtype: str, kinds: dict[str, str]) -> list[str]:
    told = []
    longest = families.context(family, config)
    if longest < config.max_position_embeddings:
        told.append(
            f"its context ends at {longest} tokens, the width of its sliding window, which llama.cpp's "
            f"{family.architecture} does not compute"
        )
    numbers_of = numbers.TABLE[dtype]
    usual = {numbers_of.kind, numbers_of.head, numbers_of.better, "F32"}
    others = sorted({kind for kind in kinds.values() if kind not in usual})
    if others:
        told.append(f"matrices whose rows are no whole blocks of {numbers_of.kind} are kept in {', '.join(others)}")
    return told
