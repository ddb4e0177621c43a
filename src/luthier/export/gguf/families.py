"""Families of transformers as llama.cpp has them: names of tensors, how they are laid out, and hyper-parameters.

What llama.cpp computes for each architecture: https://github.com/ggml-org/llama.cpp/tree/master/src/models
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import ExportError
from ...models.gguf import NAMES

OURS = {theirs: ours for ours, theirs in NAMES.items()}
QWEN3 = OURS | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
GEMMA3 = QWEN3 | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
PHI3 = OURS | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
PERIOD = 6  # of Gemma 3's layers: each sixth sees all, where a file says nothing else


@dataclass(frozen=True)
class Family:
    """A class of transformers."""

    architecture: str
    """llama.cpp's name for it."""
    names: Mapping[str, str] = field(default_factory=lambda: OURS)
    """The module in transformers, without its layer -> the tensor in the file."""
    interleaved: bool = False
    """Rotary queries and keys are kept with the two numbers of a pair side by side, not in halves."""
    activation: tuple[str, ...] = ("silu",)
    offset: float = 0.0
    """Added to the weights of all norms: Gemma multiplies with 1 + w."""
    scalings: tuple[str, ...] = ("default", "linear", "yarn")
    """Of rotary positions, that llama.cpp computes for it."""
    windows: bool = False
    """llama.cpp computes its sliding windows; else the file has no longer context than a window."""


FAMILIES = {
    "llama": Family("llama", interleaved=True, scalings=("default", "linear", "yarn", "llama3")),
    "mistral": Family("llama", interleaved=True, scalings=("default", "linear", "yarn", "llama3")),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", QWEN3),
    "gemma3_text": Family("gemma3", GEMMA3, activation=("gelu_pytorch_tanh",), offset=1.0, windows=True,
                          scalings=("default", "linear")),
    "phi3": Family("phi3", PHI3, scalings=("default", "longrope")),
}  # fmt: skip


def family(config: Any) -> Family:
    """That of a configuration of transformers; ExportError for one that the format is not written for."""
    known = ", ".join(FAMILIES)
    if config.model_type not in FAMILIES:
        raise ExportError(
            f"as=gguf: a model of the family {config.model_type!r} cannot be written; those that can are {known}; "
            "use as=full, which all have"
        )
    found = FAMILIES[config.model_type]
    for problem in _problems(found, config):
        raise ExportError(f"as=gguf: {problem}, which llama.cpp's {found.architecture} does not compute; use as=full")
    return found


def _problems(found: Family, config: Any) -> Iterator[str]:
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in found.activation:
        yield f"the activation {activation}"
    for kind, rope in ropes(config).items():
        if rope["rope_type"] not in found.scalings:
            yield f"rotary positions of the type {rope['rope_type']}"
        if kind == "sliding_attention" and rope["rope_type"] != "default":
            yield "scaled rotary positions in layers with a window"
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key, None) is not None:
            yield key
    if getattr(config, "use_bidirectional_attention", False):
        yield "attention in both directions"
    if getattr(config, "mlp_bias", False):
        yield "biases in the feed-forward layers"


def ropes(config: Any) -> dict[str, dict]:
    """Rotary positions by the type of attention, "" where all layers have the same."""
    told = config.rope_parameters
    nested = {k: v for k, v in told.items() if isinstance(v, Mapping)}
    return {k: dict(v) for k, v in nested.items()} or {"": dict(told)}


def windowed(config: Any) -> list[bool]:
    """Of each layer, whether its attention ends at the sliding window."""
    if getattr(config, "sliding_window", None) is None:
        return [False] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [True] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in kinds]


def context(found: Family, config: Any) -> int:
    """The longest text that is answered as trained: a window that llama.cpp does not compute is the end."""
    longest = config.max_position_embeddings
    return min(longest, config.sliding_window) if any(windowed(config)) and not found.windows else longest


def head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# ---------------------------------------------------------------------------- hyper-parameters


def describe(writer: Any, found: Family, config: Any, rows: int) -> None:
    """All that llama.cpp must know of the network beside its tensors."""
    import gguf

    width = head_width(config)
    writer.add_vocab_size(rows)
    writer.add_context_length(context(found, config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    by_kind = ropes(config)
    rope = by_kind.get("", by_kind.get("full_attention", {}))
    writer.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if local := by_kind.get("sliding_attention"):
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if kind == "linear" else gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        _yarn(writer, rope, config)
    if kind == "longrope":
        original = _original(rope, config)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(_long_factor(rope, config, original))
    if found.windows and any(windowed(config)):
        writer.add_sliding_window(config.sliding_window)
        if len(set(windowed(config))) > 1 or found.architecture == "gemma3":
            writer.add_sliding_window_pattern(windowed(config))


def _original(rope: Mapping, config: Any) -> int:
    told = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(told or config.max_position_embeddings)


def _yarn(writer: Any, rope: Mapping, config: Any) -> None:
    """YaRN (arXiv:2309.00071); llama.cpp makes the factor of attention from the scaling alone."""
    usual = 0.1 * math.log(rope["factor"]) + 1
    told = rope.get("attention_factor")
    if (told is not None and abs(told - usual) > 1e-6) or rope.get("mscale") or rope.get("mscale_all_dim"):
        raise ExportError("as=gguf: YaRN with a factor of attention of its own is not written; use as=full")
    if rope.get("truncate") is False:
        raise ExportError("as=gguf: YaRN without truncation is not written; use as=full")
    writer.add_rope_scaling_orig_ctx_len(_original(rope, config))
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))


def _long_factor(rope: Mapping, config: Any, original: int) -> float:
    """By what LongRoPE (arXiv:2402.13753) scales queries and keys."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor = rope.get("factor") or config.max_position_embeddings / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


# ---------------------------------------------------------------------------- tensors


def named(found: Family, name: str) -> str:
    """The file's name of a tensor of transformers."""
    module, _, leaf = name.rpartition(".")
    parts = module.split(".")
    if parts[:2] == ["model", "layers"]:
        inner = found.names.get(".".join(parts[3:]))
        ours = inner and f"blk.{parts[2]}.{inner}.{leaf}"
    else:
        outer = found.names.get(module)
        ours = outer and f"{outer}.{leaf}"
    if not ours or leaf not in ("weight", "bias"):
        raise ExportError(f"as=gguf: the tensor {name} has no place in llama.cpp's {found.architecture}; use as=full")
    return ours


def laid_out(found: Family, config: Any, name: str, tensor: Tensor) -> Tensor:
    """The numbers as the file keeps them."""
    if found.interleaved:
        tensor = interleaved(config, name, tensor)
    if found.offset and name.endswith("norm.weight"):
        tensor = tensor.float() + found.offset
    if found.architecture == "gemma3" and ".q_norm." in name:
        tensor = tensor * _queries(config)
    return tensor


def interleaved(config: Any, name: str, tensor: Tensor) -> Tensor:
    """Rows of rotary queries and keys, the halves of each head one by one; other tensors as they are."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    n = next((n for part, n in heads.items() if f".{part}." in name), None)
    if n is None:
        return tensor
    rows = tensor.shape[0]
    return tensor.reshape(n, 2, rows // n // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _queries(config: Any) -> float:
    """Gemma's own scale of queries beside that which llama.cpp takes: one over the root of a head's width, or, with 62
    layers, of the model's width over its heads."""
    width = head_width(config)
    if config.num_hidden_layers == 62:
        width = config.hidden_size // config.num_attention_heads
    return math.sqrt(width / config.query_pre_attn_scalar)


def extra(found: Family, config: Any) -> dict[str, Tensor]:
    """Tensors that transformers computes from the configuration: factors of rotary frequencies."""
    rope = next(iter(ropes(config).values()))
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": _frequency_factors(config, rope)}
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
            for kind in ("long", "short")
        }
    return {}


def _frequency_factors(config: Any, rope: Mapping) -> Tensor:
    """By what each frequency is divided, [width / 2], as transformers has them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled: Callable = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
    frequencies, _ = scaled(config, torch.device("cpu"))
    width = head_width(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return plain / frequencies.float()
