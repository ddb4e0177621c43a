"""Attention over packed documents: each token sees the earlier ones of its own document, and no [T, T] mask exists.

Of encoders, whose layers say that they are not causal, it sees all tokens of its document.

On a GPU in 16 bits the variable-length FlashAttention kernels that PyTorch ships (arXiv:2307.08691), elsewhere one
call of `scaled_dot_product_attention` for each group of documents of similar length.

A document may begin with tokens of the one before it, which then stand in the row once (starts.py). Borders of keys are
those of whole documents, borders of queries those of what stands in the row: a document's queries are its last ones.

A prefix (arXiv:2101.00190) is P keys and values that every token of every document sees, as if they stood before it.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from .starts import Copies, copied, once, paths

NAME = "luthier_packed"
GQA_FLAG = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from torch 2.12 on it has to be asked for
SIMILAR = 0.75  # shortest over longest document of a group


class Unsupported(Exception):
    """The layer asks for something that packed attention does not do."""


def install() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def cumulative(ends: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [P] cumulative lengths, repeated at the end up to a power of two, so that graphs see few shapes."""
    size = max(16, 1 << (len(ends) - 1).bit_length())
    padded = [*ends, *[ends[-1]] * (size - len(ends))]
    made = torch.tensor(padded, dtype=torch.int32)
    if device.type == "cuda":
        return made.pin_memory().to(device, non_blocking=True)
    made = made.to(device)
    if device.type == "meta":
        made.ends = tuple(padded)  # type: ignore[attr-defined]  # for whoever reckons with shapes alone
    return made


def borders(ends: tuple[int, ...], keys: tuple[int, ...], longest: int, device: torch.device) -> dict[str, Any]:
    """What layers are told of documents that end at `ends`, and with the starts that they share at `keys`."""
    made = cumulative(ends, device)
    of_keys = made if keys == ends else cumulative(keys, device)
    return {"cu_seq_lens_q": made, "cu_seq_lens_k": of_keys, "max_length_q": longest, "max_length_k": longest}


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, d]
    key: Tensor,  # [1, K, T, d]
    value: Tensor,  # [1, K, T, d]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int = 0,
    max_length_k: int = 0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    virtual_prefix: Tensor | None = None,  # [layers, 2, K, P, d] float32
    virtual_places: Any = None,  # where copies of it stand among the keys, for kernels that want them there
    shared_starts: Copies | None = None,  # where each document's keys stand, for kernels that want them end to end
    **_: object,
) -> tuple[Tensor, None]:
    """[1, T, H, d]; the signature is that of transformers' attention functions."""
    if softcap is not None or s_aux is not None or attention_mask is not None or cu_seq_lens_q is None:
        raise Unsupported("soft caps, sinks, a mask, or no document borders")
    both = getattr(module, "is_causal", True) is False  # directions
    if both and virtual_prefix is not None:
        raise Unsupported("a prefix before attention in both directions")
    # By a tensor, not by the number `layer_idx`, of which a compiled graph would be made for each layer.
    prefix = None if virtual_prefix is None else virtual_prefix.index_select(0, module.virtual_layer)[0]  # type: ignore
    if on_flash(query):
        if dropout:
            raise Unsupported("attention dropout")
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
        if prefix is not None:
            k, v = (before(p.transpose(0, 1), t, virtual_places) for p, t in zip(prefix, (k, v)))
        if shared_starts is not None:
            k, v = (copied(t, shared_starts) for t in (k, v))
        back = -1 if sliding_window is None else sliding_window - 1
        window = (back, back if both else 0)
        extra: dict[str, Any] = {"enable_gqa": True} if GQA_FLAG and q.shape[1] != k.shape[1] else {}
        out = varlen_attn(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k,
            max_length_q,
            max_length_k,
            scale=scaling,
            window_size=window,
            **extra,
        )
        return out[None], None  # type: ignore[index]
    same = cu_seq_lens_k is None or cu_seq_lens_k is cu_seq_lens_q or virtual_places is not None
    of_keys = cu_seq_lens_q if same else cu_seq_lens_k
    return _grouped(query, key, value, cu_seq_lens_q, of_keys, scaling, dropout, sliding_window, prefix, both), None


def aligned(width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel takes queries as a document's last tokens: a random start would hide that it does not."""
    drawn = torch.randn(3, 12, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    drawn[:, 5:9] = drawn[:, :4]
    row = once((0, 5, 12), (0, 4), device)
    assert row is not None

    def attend(rows: Tensor, window: int | None, **given: Any) -> Tensor:
        query, key, value = rows[:, None, None]
        return packed_attention(nn.Module(), query, key, value, None, sliding_window=window, **given)[0][0]

    for window in (None, 2):
        apart = attend(drawn, window, **borders((0, 5, 12), (0, 5, 12), 7, device))
        given = borders(row.ends, row.keys, 7, device)
        together = attend(drawn[:, row.kept], window, **given, shared_starts=row.copies)
        if (together - apart[row.kept]).abs().max() > (1e-4 if dtype == torch.float32 else 5e-2):
            return False
    return True


def on_flash(t: Tensor) -> bool:
    return t.is_cuda and t.dtype in (torch.bfloat16, torch.float16) and t.shape[-1] % 8 == 0 and t.shape[-1] <= 256


def apart(tokens: Tensor) -> bool:
    """Whether each document of a row needs its own copy of what all begin with, as a GPU's kernels do."""
    return tokens.is_cuda


@torch.compiler.disable  # its shapes are those of the documents: a graph would be made for every row
def _grouped(query, key, value, ends, keys, scaling, dropout, window, prefix=None, both=False) -> Tensor:
    heads, total = query.shape[1], query.shape[2]
    virtual = 0 if prefix is None else prefix.shape[2]
    bounds = tuple(ends.tolist())
    groups, restore = _groups(bounds, bounds if keys is ends else tuple(keys.tolist()))
    outs = []

    def rows(t: Tensor, places: Tensor) -> Tensor:
        """[D, heads, L, d]"""
        found = t[0].index_select(1, places.flatten().to(t.device))
        return found.view(t.shape[1], *places.shape, t.shape[-1]).transpose(0, 1)

    for group in groups:
        longest = group.keys.shape[1]
        q, k, v = rows(query, group.queries), rows(key, group.keys), rows(value, group.keys)
        near = None if window is None or virtual + longest <= window else window
        mask = None
        if both:
            mask = _within(group.lengths, longest, near, query.device)
        elif near is not None or virtual or group.starts != (0,):
            mask = _band(group.starts, q.shape[2], longest, near, virtual, query.device)
        if prefix is not None:
            k, v = (torch.cat([p.to(t.dtype).expand(len(t), -1, -1, -1), t], 2) for p, t in zip(prefix, (k, v)))
        # A document shorter than its group is filled up at its end, where causal attention never looks.
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and not both, scale=scaling,
            enable_gqa=heads != key.shape[1],
        )  # [D, H, L, d]  # fmt: skip
        outs.append(out.transpose(1, 2).reshape(-1, heads, out.shape[-1]))
    joined = outs[0] if len(outs) == 1 else torch.cat(outs)
    if restore is not None:
        joined = joined.index_select(0, restore.to(query.device))
    assert len(joined) == total
    return joined[None]


class _Group(NamedTuple):
    """Documents of similar length that attend in one call, filled up at their ends."""

    queries: Tensor  # [D, Q] their places in the row
    keys: Tensor  # [D, L]
    starts: tuple[int, ...]  # [D] the number of a document's first query among its keys; [1] where all are the same
    lengths: tuple[int, ...]  # [D] of documents, with what they share


@lru_cache(maxsize=64)
def _groups(ends: tuple[int, ...], keys: tuple[int, ...]) -> tuple[list[_Group], Tensor | None]:
    """The groups of a row, and where each token of it went, None if in order.

    Tokens that another document ran already give keys. Where they are the lesser part of a document, they are queries
    once more, and what comes out is left: a call without a mask is quicker than one that skips them.
    """
    made: list[list[tuple[int, int, int, int]]] = []
    spans = [(d - c, a, b, c) for (a, b), (c, d) in zip(pairwise(ends), pairwise(keys)) if d > c]
    late, early = (lambda s: 2 * (s[0] - s[2] + s[1]) >= s[0]), (lambda s: 2 * (s[0] - s[2] + s[1]) < s[0])
    for chosen in (early, late):
        groups: list[list[tuple[int, int, int, int]]] = []
        for span in sorted(filter(chosen, spans), reverse=True):
            if groups and span[0] >= SIMILAR * groups[-1][0][0]:
                groups[-1].append(span)
            else:
                groups.append([span])
        made += groups
    found, where, offset = paths(ends, keys), torch.arange(ends[-1]), 0
    out = []
    for members in made:
        longest, shared = members[0][0], [length - (b - a) for length, a, b, _ in members]
        starts = shared if 2 * shared[0] >= longest else [0] * len(members)
        rows = max(length - start for (length, *_), start in zip(members, starts))
        of_keys = torch.zeros(len(members), longest, dtype=torch.int64)
        of_queries = torch.zeros(len(members), rows, dtype=torch.int64)
        for slot, (start, before_it, (length, a, b, key)) in enumerate(zip(starts, shared, members)):
            of_keys[slot, :length] = found[key : key + length]
            of_queries[slot, : length - start] = of_keys[slot, start:length]
            where[a:b] = torch.arange(offset + before_it - start, offset + length - start)
            offset += rows
        lengths, starts = tuple(length for length, *_ in members), tuple(starts)
        out.append(_Group(of_queries, of_keys, starts if len(set(starts)) > 1 else starts[:1], lengths))
    ordered = offset == ends[-1] and bool((where == torch.arange(ends[-1])).all())
    return out, None if ordered else where


@lru_cache(maxsize=16)
def _band(
    starts: tuple[int, ...], queries: int, keys: int, window: int | None, virtual: int, device: torch.device
) -> Tensor:
    """[D, 1, Q, P + L] True where a token may look: at itself and what is before it, no further than `window` - 1."""
    first = torch.tensor(starts, device=device)[:, None]
    own = (first + torch.arange(queries, device=device)).clamp(max=keys - 1)[:, None, :, None]
    distance = own + virtual - torch.arange(virtual + keys, device=device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


@lru_cache(maxsize=16)
def _within(lengths: tuple[int, ...], longest: int, window: int | None, device: torch.device) -> Tensor | None:
    """[D, 1, 1 or L, L] True where a token may look in both directions: inside of its document, at most `window` - 1
    away. What a document is filled up with may look anywhere, as looking nowhere has no gradient."""
    if window is None and min(lengths) == longest:
        return None
    at = torch.arange(longest, device=device)
    inside = at < torch.tensor(lengths, device=device)[:, None]  # [D, L]
    if window is None:
        return inside[:, None, None]
    near = (at[:, None] - at).abs() < window
    return ((inside[:, None] & near) | ~inside[:, :, None])[:, None]


class Places(NamedTuple):
    """Where P virtual tokens and the T tokens of a row stand in a longer row, where each document has a copy of them.

    What the row is filled up with is not read, and has no gradient.
    """

    row: Tensor  # [N] which virtual token stands in a slot, or P + the number of a token
    tokens: Tensor  # [T] the slot of each token
    copies: Tensor  # [C, P] the slots of each copy
    live: Tensor  # [C] whether there is such a copy

    def to(self, device: torch.device) -> Places:
        return Places(*(t.to(device, non_blocking=True) for t in self))


def places(ends: tuple[int, ...], virtual: int, copies: int | None = None) -> tuple[Places, tuple[int, ...]]:
    """The places of `virtual` tokens before each document of a row, and the ends of what comes out.

    With `copies`, the row is as long as if it had so many documents.
    """
    documents, total = len(ends) - 1, ends[-1]
    copies = documents if copies is None else copies
    starts, numbers = torch.tensor(ends[:-1]), torch.arange(documents)
    document = numbers.repeat_interleave(torch.tensor(ends).diff(), output_size=total)
    tokens = torch.arange(total) + (document + 1) * virtual
    slots = torch.zeros(copies, virtual, dtype=torch.int64)
    slots[:documents] = (starts + numbers * virtual)[:, None] + torch.arange(virtual)
    row = torch.zeros(total + copies * virtual, dtype=torch.int64)
    row[tokens] = virtual + torch.arange(total)
    row[slots[:documents].flatten()] = torch.arange(virtual).repeat(documents)
    made = Places(row, tokens, slots, torch.arange(copies) < documents)
    return made, tuple(end + i * virtual for i, end in enumerate(ends))


def before(virtual: Tensor, tokens: Tensor, where: Places) -> Tensor:
    """[N, ...] the row of virtual tokens [P, ...] and tokens [T, ...]."""
    return _Before.apply(virtual, tokens, *where)  # type: ignore[return-value]


class _Before(torch.autograd.Function):
    """A gather whose backward pass is gathers, too: the same every time, and blind to what the row is filled with."""

    @staticmethod
    def forward(ctx, virtual, tokens, row, slots, copies, live):
        ctx.save_for_backward(slots, copies, live)
        ctx.dtype = virtual.dtype
        return torch.cat([virtual.to(tokens.dtype), tokens]).index_select(0, row)

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[override]
        slots, copies, live = ctx.saved_tensors
        of_virtual = of_tokens = None
        if ctx.needs_input_grad[0]:
            each = upstream.index_select(0, copies.flatten()).unflatten(0, copies.shape)
            each = torch.where(live.view(-1, *[1] * (each.ndim - 1)), each, 0)
            of_virtual = each.sum(0, dtype=torch.float32).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            of_tokens = upstream.index_select(0, slots)
        return of_virtual, of_tokens, None, None, None, None
