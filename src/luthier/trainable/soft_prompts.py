"""The modules of prefix, prompt and P-tuning: tables of float32, and the small networks that may make them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..surgery import VirtualTokens, adapters_off, cache_keyword

LAYERS = {"full_attention", "sliding_attention"}


class _Table(VirtualTokens):
    """One row for each virtual token, learnt itself or made by an encoder of what is learnt."""

    embedding: nn.Embedding
    encoder: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.encoder = None

    def made(self) -> Tensor:
        """[P, ...] the table, differentiable."""
        weight = self.embedding.weight
        return weight if self.encoder is None else self.encoder(weight)

    def table(self) -> Tensor:
        """[P, ...] what is saved. One that an encoder made cannot be copied into: that would change nothing."""
        if self.encoder is None:
            return self.embedding.weight
        training = self.encoder.training
        with torch.inference_mode():  # makes a tensor that refuses to be written to
            table = self.encoder.eval()(self.embedding.weight)
        self.encoder.train(training)
        return table


class Embeddings(_Table):
    """[P, H] embeddings, made by an encoder or not; drawn like the words of the model."""

    def __init__(self, count: int, model: Any):
        super().__init__()
        self.embedding = nn.Embedding(count, width(model))

    def embeddings(self) -> Tensor:
        return self.made()


class KeysAndValues(_Table):
    """Keys and values of each layer: [P, layers x 2 x heads x width], in PEFT's order."""

    def __init__(self, count: int, layers: int, heads: int, width: int, hidden: int | None):
        """`hidden` is the width of the encoder, 0 for that of one layer's keys, None for no encoder."""
        super().__init__()
        self.shape = (layers, 2, heads, width)
        keys, outputs = heads * width, layers * 2 * heads * width
        self.embedding = nn.Embedding(count, outputs if hidden is None else keys)
        if hidden is not None:
            hidden = hidden or keys
            self.encoder = nn.Sequential(nn.Linear(keys, hidden), nn.Tanh(), nn.Linear(hidden, outputs))

    def prefix(self) -> Tensor:
        return self.made().unflatten(1, self.shape).permute(1, 2, 3, 0, 4)  # [layers, 2, K, P, d]


class MLP(nn.Sequential):
    """Three layers with ReLU between them, as PEFT's."""

    def __init__(self, width: int, hidden: int):
        super().__init__(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
        )


class LSTM(nn.Module):
    """The paper's: an LSTM in both directions over the virtual tokens, and two layers."""

    def __init__(self, width: int, hidden: int, layers: int, dropout: float):
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))

    def forward(self, table: Tensor) -> Tensor:  # [P, H]
        return self.mlp(self.lstm(table[None])[0])[0]


# ---------------------------------------------------------------------------- of the model


def width(model: Any) -> int:
    """H, of the embeddings. A family that takes in more at a position than one embedding is refused."""
    config = model.config.get_text_config()
    if getattr(config, "hidden_size_per_layer_input", None):
        raise ModelError(
            f"trainable: {type(model).__name__} looks each token up again in its layers, and a virtual token is none "
            "of the vocabulary: use method=lora"
        )
    return model.get_input_embeddings().weight.shape[1]


def shape(model: Any) -> tuple[int, int, int]:
    """Layers, key heads and their width; families whose layers differ in them, or keep other things, are refused."""
    config = model.config.get_text_config()
    name, layers = type(model).__name__, config.num_hidden_layers
    other = set(getattr(config, "layer_types", None) or ()) - LAYERS
    reason = None
    if other:
        reason = f"has layers of the kinds {', '.join(sorted(other))}, which a prefix does not reach"
    elif len(set(_numbers(model))) != layers:
        reason = "has layers without attention, which a prefix does not reach"
    elif getattr(config, "kv_lora_rank", None):
        reason = "keeps compressed keys and values"
    elif getattr(config, "num_kv_shared_layers", 0):
        reason = "has layers that use the keys and values of others"
    elif getattr(config, "global_head_dim", None) or len({_keys(c) for c in _configs(config)}) > 1:
        reason = "has layers whose keys differ in size"
    if reason:
        raise ModelError(f"trainable.kind=prefix: {name} {reason}: use method=prompt, or method=lora")
    return layers, *_keys(config)


def _configs(config: Any) -> list[Any]:
    """The configuration of each layer, where transformers keeps one; else that of all."""
    found = getattr(config, "per_layer_config", None)
    return list(found) if isinstance(found, list | tuple) else [config]


def _keys(config: Any) -> tuple[int, int]:
    """Key heads, and their width."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, width


def _attention(model: Any) -> list[Any]:
    """The modules that attend, in which transformers keeps the number of their layer."""
    return [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and _attends(m)]


def _attends(module: nn.Module) -> bool:
    return any(part in type(module).__name__.lower() for part in ("attention", "attn"))


def _numbers(model: Any) -> list[int]:
    return [module.layer_idx for module in _attention(model)]


def number_layers(model: Any) -> None:
    """The layer's number as a tensor, by which attention takes its keys and values."""
    device = model.get_input_embeddings().weight.device
    for module in _attention(model):
        number = torch.tensor([module.layer_idx], device=device)
        module.register_buffer("virtual_layer", number, persistent=False)


# ---------------------------------------------------------------------------- first values


def drawn(count: int, model: Any) -> list[int]:
    """Tokens of the vocabulary, drawn on the CPU so that a seed gives the same everywhere."""
    return torch.randint(model.get_input_embeddings().weight.shape[0], (count,)).tolist()


@torch.no_grad()
def begin_as(tokens: Any, words: nn.Module, chosen: Sequence[int]) -> None:
    """First values: what the model's embeddings give for these tokens, repeated as often as needed."""
    weight = tokens.embedding.weight
    ids = torch.tensor(list(itertools.islice(itertools.cycle(chosen), len(weight))), device=weight.device)
    weight.copy_(words(ids))


@torch.no_grad()
def begin_as_run(tokens: Any, model: Any, chosen: Sequence[int]) -> None:
    """First values: the keys and values that the model computes for these tokens, as if they came first."""
    from transformers import DynamicCache

    weight, before, training = tokens.embedding.weight, model.config._attn_implementation, model.training
    cache = DynamicCache()
    given: dict[str, Any] = {"use_cache": True, cache_keyword(model): cache}
    try:
        model.set_attn_implementation("eager")
        model.eval()
        with adapters_off(model, [tokens.name]):
            model.base_model(input_ids=torch.tensor([chosen], device=weight.device), **given)
        layers: list[Any] = list(cache.layers)
        made = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
        weight.copy_(made.permute(3, 0, 1, 2, 4).flatten(1))  # of [layers, 2, K, P, d]
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"trainable.kind=prefix: {type(model).__name__} keeps no keys and values of the shape {tokens.shape} for "
            f"each layer, as its configuration says ({str(error).splitlines()[0]}): use method=prompt, or method=lora"
        ) from None
    finally:
        model.set_attn_implementation(before)
        model.train(training)
