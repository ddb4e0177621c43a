"""Attention of a step: rows of many requests end to end, each over what the cache holds of its own.

On a GPU in 16 bits it is one call of the variable-length kernel that reads the cache where it is: what lies between
two requests is a document without queries. Elsewhere it is one call a request, without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from ..models import attention
from ..models.attention import GQA_FLAG, on_flash

NAME = "luthier_serve"


class Span(NamedTuple):
    """Tokens of one request in a step: queries `first` to `last` of the row, keys from `start` to `end` of the cache.

    Queries are the last of the keys.
    """

    first: int
    last: int
    start: int
    end: int


@dataclass
class Store:
    """Keys and values of all layers, token by token [N, K, d]; a layer's tensors are made when it first has some."""

    size: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def put(self, layer: int, key: Tensor, value: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """[T, K, d] of new tokens into their places."""
        if layer not in self.keys:
            self.keys[layer] = key.new_empty(self.size, *key.shape[1:])
            self.values[layer] = value.new_empty(self.size, *value.shape[1:])
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(0, places, key)
        values.index_copy_(0, places, value)
        return keys, values

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.keys.values()
        yield from self.values.values()

    def move(self, start: int, to: int, count: int) -> None:
        """A copy of `count` places elsewhere, where it may lie over them."""
        for tensor in self._tensors():
            source = tensor[start : start + count]
            tensor[to : to + count] = source.clone() if abs(start - to) < count else source

    def rearrange(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """All moves (from, to, count), in their order; those that go up are kept aside until the others are done."""
        for tensor in self._tensors():
            aside = [(to, tensor[start : start + n].clone()) for start, to, n in moves if to > start]
            for start, to, n in moves:
                if to < start:
                    tensor[to : to + n] = tensor[start : start + n].clone()
            for to, held in aside:
                tensor[to : to + len(held)] = held

    @property
    def bytes_per_token(self) -> int:
        return sum(t[0].numel() * t.element_size() for t in self._tensors())


class Pass:
    """One forward pass: where new tokens go, and who sees what."""

    def __init__(self, store: Store, spans: list[Span], places: Tensor):
        self.store, self.spans, self.places = store, spans, places
        self._borders: tuple[Tensor, Tensor, int, int] | None = None

    def borders(self, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
        """Cumulative lengths of queries and of keys with the gaps between; spans lie in the cache's order."""
        if self._borders is None:
            queries, keys = [0], [0]
            for span in self.spans:
                if span.start > keys[-1]:
                    queries.append(span.first)
                    keys.append(span.start)
                queries.append(span.last)
                keys.append(span.end)
            longest = max(span.last - span.first for span in self.spans), max(s.end - s.start for s in self.spans)
            made = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in (queries, keys))
            self._borders = (*made, *longest)  # type: ignore[assignment]
        return self._borders  # type: ignore[return-value]


def install() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def attend(
    module: nn.Module,
    query: Tensor,  # [1, H, T, d]
    key: Tensor,  # [1, K, T, d]
    value: Tensor,  # [1, K, T, d]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    serve: Pass | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """[1, T, H, d]; the signature is that of transformers' attention functions."""
    if serve is None or attention_mask is not None or getattr(module, "is_causal", True) is False:
        raise attention.Unsupported("a mask, attention in both directions, or a pass that is not the engine's")
    layer: Any = module.layer_idx
    keys, values = serve.store.put(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), serve.places)
    plain = softcap is None and s_aux is None
    if plain and on_flash(query) and keys.shape == values.shape:
        return _flash(serve, query, keys, values, scaling, sliding_window), None
    heads, kv_heads, total = query.shape[1], key.shape[1], query.shape[2]
    by_keys = query[0].transpose(0, 1).reshape(total, kv_heads, heads // kv_heads, -1)  # heads with the same keys
    each = _sdpa if plain else _by_hand
    outs = []
    for span in serve.spans:
        first, last, start, end = span
        if sliding_window is not None:  # the first query sees no further
            start = max(start, end - (last - first) - sliding_window + 1)
        k, v = keys[start:end].transpose(0, 1)[None], values[start:end].transpose(0, 1)[None]
        if plain and last - first == 1:
            outs.append(F.scaled_dot_product_attention(by_keys[first:last], k, v, scale=scaling).reshape(1, heads, -1))
        else:
            q = query[:, :, first:last]
            outs.append(each(q, k, v, scaling, sliding_window, softcap, s_aux)[0].transpose(0, 1))
    return (outs[0] if len(outs) == 1 else torch.cat(outs))[None], None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, *_: Any) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    whole = queries == keys and (window is None or keys <= window)
    mask = None if whole else _mask(queries, keys, window, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=whole, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )


def _by_hand(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """With scores that are capped (Gemma 2: cap * tanh(score / cap)), or a sink beside them that takes its share."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_mask(q.shape[2], k.shape[2], window, q.device), float("-inf")).float()
    if sinks is not None:
        beside = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1).to(scores.dtype)
        return torch.cat([scores, beside], -1).softmax(-1)[..., :-1].to(v.dtype) @ v
    return scores.softmax(-1).to(v.dtype) @ v


@lru_cache(maxsize=32)
def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[Q, L] True where a token may look, queries being the last of the keys."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _flash(
    serve: Pass, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None
) -> Tensor:  # fmt: skip
    of_queries, of_keys, most_queries, most_keys = serve.borders(query.device)
    q = query[0].transpose(0, 1).contiguous()
    extra: dict[str, Any] = {"enable_gqa": True} if GQA_FLAG and q.shape[1] != keys.shape[1] else {}
    used = serve.spans[-1].end
    out = varlen_attn(
        q, keys[:used], values[:used], of_queries, of_keys, most_queries, most_keys, scale=scaling,
        window_size=(-1 if window is None else window - 1, 0), **extra,
    )  # fmt: skip
    return out[None]  # type: ignore[index]
