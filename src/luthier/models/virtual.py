"""Virtual tokens: learnt embeddings, or keys and values, laid before every document of a row and before every prompt.

Their positions come first: where P of them stand, a document's own tokens begin at position P. Keys and values that are
learnt themselves (a prefix) stand before embeddings, and carry no rotary embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..surgery import VirtualTokens
from . import attention


@dataclass(frozen=True)
class Virtual:
    """What all virtual tokens of a network come to in one pass."""

    embedded: Tensor | None  # [E, H] float32
    prefix: Tensor | None  # [layers, 2, K, F, d] float32

    @property
    def rows(self) -> int:
        """E: how many stand among the embeddings."""
        return 0 if self.embedded is None else len(self.embedded)

    @property
    def length(self) -> int:
        """F + E: the position of a document's first token."""
        return self.rows + (0 if self.prefix is None else self.prefix.shape[3])


def of(model: Any) -> Virtual | None:
    """The virtual tokens of a model, in the order in which they were added; None where none are on."""
    found = [child for child in model.children() if isinstance(child, VirtualTokens) and child.enabled]
    if not found:
        return None
    embedded = [t for t in (child.embeddings() for child in found) if t is not None]
    prefix = [t for t in (child.prefix() for child in found) if t is not None]
    return Virtual(torch.cat(embedded) if embedded else None, torch.cat(prefix, 3) if prefix else None)


# ---------------------------------------------------------------------------- packed rows


@dataclass(frozen=True)
class Row:
    """A packed row as the decoder takes it, and where the batch's own tokens are in what comes out."""

    given: dict[str, Any]
    tokens: Tensor | slice


def row(
    model: Any, virtual: Virtual, tokens: Tensor, positions: Tensor, ends: tuple[int, ...], keys: tuple[int, ...],
    longest: int, fixed: bool,
) -> Row:  # fmt: skip
    """Documents end to end with the virtual tokens before each; on a CPU, as a start that all of them share.

    `ends` are the borders of what stands in the row, `keys` those of documents with their starts: the same where each
    has a copy of the virtual tokens. With `fixed`, lengths are rounded up, so that few shapes occur.
    """
    device, rows, size = positions.device, virtual.rows, None
    if fixed:
        most = max(16, 1 << (len(ends) - 1).bit_length())  # as the borders are filled up
        size = min(most - 1, -(-(len(ends) - 1) // (most // 4)) * (most // 4))
    given: dict[str, Any] = {}
    own: Tensor | slice = slice(None)
    positions = positions + virtual.length
    if virtual.embedded is None:
        given["input_ids"] = tokens[None]
    else:
        embedded, first = model.get_input_embeddings()(tokens[None])[0], virtual.length - rows
        front = torch.arange(first, virtual.length, device=device)
        if attention.apart(tokens):
            where, ends = attention.places(ends, rows, size)
            where = where.to(device)
            given["inputs_embeds"] = attention.before(virtual.embedded, embedded, where)[None]
            positions, own = attention.before(front, positions, where), where.tokens
            ends = keys = _filled(ends, given["inputs_embeds"].shape[1], longest + rows)
        else:
            given["inputs_embeds"] = torch.cat([virtual.embedded.to(embedded.dtype), embedded])[None]
            positions, own = torch.cat([front, positions]), slice(rows, None)
            ends = (0, *(end + rows for end in ends[1:]))  # they run with the first document
            keys = tuple(end + i * rows for i, end in enumerate(keys))
    given |= {"position_ids": positions[None], **attention.borders(ends, keys, longest + rows, device)}
    longest += rows
    if virtual.prefix is not None:
        given["virtual_prefix"] = virtual.prefix
        if attention.apart(tokens):
            count = virtual.prefix.shape[3]
            where, ends = attention.places(ends, count, None if size is None else max(size, len(ends) - 1))
            given |= {"virtual_places": where.to(device), "cu_seq_lens_k": attention.cumulative(ends, device),
                      "max_length_k": longest + count}  # fmt: skip
    return Row(given, own)


def _filled(ends: tuple[int, ...], total: int, longest: int) -> tuple[int, ...]:
    """What a row is filled up with is documents that nobody asks for."""
    return (*ends, *range(ends[-1] + longest, total, longest), *([total] if total > ends[-1] else []))


# ---------------------------------------------------------------------------- padded rows, and answers


def padded(model: Any, virtual: Virtual, tokens: Tensor, mask: Tensor, starts: Sequence[int]) -> dict[str, Any]:
    """What the model's own attention takes for rows [B, L] of documents, each of which begins at its own place."""
    rows, ones = virtual.rows, mask.new_ones(virtual.length)

    def joined(front: Tensor, of_rows: Tensor) -> Tensor:
        return torch.stack([torch.cat([own[:n], front, own[n:]]) for own, n in zip(of_rows, starts)])

    given: dict[str, Any] = {}
    if virtual.embedded is None:
        given["input_ids"] = tokens
    else:
        embedded = model.get_input_embeddings()(tokens)
        given["inputs_embeds"] = joined(virtual.embedded.to(embedded.dtype), embedded)
        mask = joined(ones[:rows], mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if virtual.prefix is not None:
        count = virtual.prefix.shape[3]
        positions = positions + count
        mask = torch.cat([ones[:count].expand(len(mask), -1), mask], 1)
    return given | {"position_ids": positions, "attention_mask": mask}


def cache(model: Any, virtual: Virtual | None, batch: int, dtype: torch.dtype) -> Any:
    """A cache that begins with the prefix, if there is one, in each of `batch` rows."""
    from transformers import DynamicCache

    made = DynamicCache(config=model.config)
    if virtual is not None and virtual.prefix is not None:
        for number, (keys, values) in enumerate(virtual.prefix.to(dtype)):
            keys, values = (t.expand(batch, -1, -1, -1) for t in (keys, values))
            made.update(keys, values, number)
    return made


def slides(model: Any) -> bool:
    """Whether a layer sees near tokens only, so that what lies between a prefix and a prompt would matter."""
    from transformers import DynamicCache

    return any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=model.config).layers)
