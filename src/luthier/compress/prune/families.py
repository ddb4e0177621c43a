"""Families whose layers can be taken out or made narrower, and along which axes each of their tensors lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import ModelError

DEPTH = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
WIDTH = DEPTH
SCALED = ("gemma", "gemma2", "gemma3_text")  # embeddings are multiplied by the root of hidden_size
HIDDEN, QUERIES, KEYS, CHANNELS = "hidden", "queries", "keys", "channels"
AXES: dict[str, tuple[str | None, ...]] = {
    "embed_tokens.weight": (None, HIDDEN),
    "lm_head.weight": (None, HIDDEN),
    "q_proj.weight": (QUERIES, HIDDEN),
    "q_proj.bias": (QUERIES,),
    "k_proj.weight": (KEYS, HIDDEN),
    "k_proj.bias": (KEYS,),
    "v_proj.weight": (KEYS, HIDDEN),
    "v_proj.bias": (KEYS,),
    "o_proj.weight": (HIDDEN, QUERIES),
    "o_proj.bias": (HIDDEN,),
    "gate_proj.weight": (CHANNELS, HIDDEN),
    "gate_proj.bias": (CHANNELS,),
    "up_proj.weight": (CHANNELS, HIDDEN),
    "up_proj.bias": (CHANNELS,),
    "down_proj.weight": (HIDDEN, CHANNELS),
    "down_proj.bias": (HIDDEN,),
    "q_norm.weight": (None,),
    "k_norm.weight": (None,),
}


def axes(name: str) -> tuple[str | None, ...]:
    """What each dimension of a tensor counts; all other norms are over the residual stream."""
    end = ".".join(name.split(".")[-2:])
    if end in AXES:
        return AXES[end]
    if end.endswith("norm.weight"):
        return (HIDDEN,)
    raise ModelError(f"{name} is a tensor that pruning does not know: --by magnitude or wanda change no shapes")


@dataclass(frozen=True)
class Sizes:
    """Of a network, by what config.json calls them."""

    layers: int
    hidden: int
    channels: int
    heads: int
    groups: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> Sizes:
        heads = config.num_attention_heads
        return cls(
            config.num_hidden_layers, config.hidden_size, config.intermediate_size, heads,
            config.num_key_value_heads or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
        )  # fmt: skip

    def length(self, axis: str | None) -> int | None:
        lengths = {HIDDEN: self.hidden, CHANNELS: self.channels, QUERIES: self.heads * self.head_dim,
                   KEYS: self.groups * self.head_dim}  # fmt: skip
        return lengths.get(axis or "")


def check(model: Any, by: str) -> None:
    """Whether the way can be gone with this family; ModelError names those that can."""
    family = model.config.get_text_config().model_type
    known = {"depth": DEPTH, "width": WIDTH}.get(by)
    if known is not None and (family not in known or model.config is not model.config.get_text_config()):
        raise ModelError(
            f"--by {by}: models of {model.config.model_type!r} are not known to it, only {', '.join(known)}"
        )


def layers(model: Any) -> Any:
    return model.base_model.layers


def embedding_free(model: Any) -> int:
    """Parameters outside of the embeddings and of the head."""
    ends = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    return sum(p.numel() for p in model.parameters() if id(p) not in ends)
