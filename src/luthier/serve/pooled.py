"""Embeddings of texts: hidden states of an encoder or of a language model, pooled and scaled to length 1."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import surgery
from ..batch import Batch, rectangles
from ..document import Document
from ..errors import DataError
from ..models import Model, load, names
from ..models.network import Network
from ..parallel import Parallel
from ..parallel.ranks import Ranks
from ..precision import AsLoaded
from .settings import Serving

MICRO_TOKENS = 4096  # of a pass


def pooled(hidden: Tensor, inside: Tensor, how: str) -> Tensor:
    """[B, H] of length 1, of hidden states [B, L, H]; `inside` [B, L] tells tokens from what fills rows up."""
    if how == "mean":
        weights = inside[..., None].to(hidden.dtype)
        made = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    elif how == "last":
        places = torch.arange(inside.shape[1], device=inside.device)
        made = hidden[torch.arange(len(hidden)), (inside * places).argmax(1)]
    else:
        assert how == "first"
        made = hidden[torch.arange(len(hidden)), inside.int().argmax(1)]
    return torch.nn.functional.normalize(made.float(), dim=-1)


def shortened(vectors: Tensor, dimensions: int | None) -> Tensor:
    """The first numbers of each (Matryoshka embeddings, arXiv:2205.13147), of length 1 again."""
    if dimensions is None:
        return vectors
    if dimensions > vectors.shape[-1]:
        raise DataError(f"dimensions={dimensions}: the model's embeddings have {vectors.shape[-1]}")
    return torch.nn.functional.normalize(vectors[:, :dimensions], dim=-1)


class Encoder:
    """An encoder without a head, as sentence-transformers and transformers keep it."""

    def __init__(self, source: str, settings: Serving):
        import transformers

        named = names.resolved(Model(name=source))  # type: ignore[call-arg]
        self.tokenizer = load.load_tokenizer(named)
        self.device = Ranks(Parallel()).device  # type: ignore[call-arg]
        self.model = load.explained(named, lambda: transformers.AutoModel.from_pretrained(
            source, dtype=AsLoaded().resolve(self.device), use_safetensors=True, trust_remote_code=False
        ))  # fmt: skip
        self.model.to(self.device).requires_grad_(False).eval()
        self.how = settings.pooling or _kept(source) or "mean"
        longest = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        first = getattr(self.model.embeddings, "padding_idx", None) if hasattr(self.model, "embeddings") else None
        if first and hasattr(self.model.embeddings, "create_position_ids_from_input_ids"):
            longest -= first + 1  # RoBERTa counts from there
        self.longest = min(longest, settings.max_length or longest)

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    @torch.no_grad()
    def embed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[B, H]"""
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        check(rows, self.longest, vocabulary)
        out: list[Tensor] = [torch.empty(0)] * len(rows)
        lengths = [len(row) for row in rows]
        for part in rectangles(sorted(range(len(rows)), key=lengths.__getitem__), lengths, MICRO_TOKENS):
            if not part:
                continue
            width = max(lengths[i] for i in part)
            pad = self.tokenizer.pad_token_id or 0
            tokens = torch.tensor([[*rows[i], *[pad] * (width - lengths[i])] for i in part], device=self.device)
            inside = torch.tensor([[1] * lengths[i] + [0] * (width - lengths[i]) for i in part], device=self.device)
            hidden = self.model(input_ids=tokens, attention_mask=inside).last_hidden_state
            for i, vector in zip(part, pooled(hidden, inside, self.how).cpu()):
                out[i] = vector
        return torch.stack(out)


class NetworkEncoder:
    """The network of a run that gives scores: its hidden states before the head."""

    def __init__(self, network: Network, tokenizer: Any, settings: Serving):
        self.network, self.tokenizer = network, tokenizer
        self.how = settings.pooling or ("last" if network.causal else "mean")
        longest = getattr(network.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        self.longest = min(longest - network.first_position, settings.max_length or longest)
        self.on = frozenset(module.name for module in surgery.switched(network.model) if module.enabled)

    def embed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        check(rows, self.longest, self.network.model.get_input_embeddings().weight.shape[0])
        return of_network(self.network, rows, self.on, self.how)


def _kept(source: str) -> str | None:
    """How sentence-transformers pools this model, where it says so."""
    path = Path(source).expanduser() / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    told = json.loads(path.read_text())
    modes = {"pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}
    return next((how for key, how in modes.items() if told.get(key)), None)


def check(rows: Sequence[Sequence[int]], longest: int, vocabulary: int) -> None:
    for i, row in enumerate(rows):
        if not row:
            raise DataError(f"input {i} is empty")
        if len(row) > longest:
            raise DataError(f"input {i} has {len(row)} tokens, and the limit is {longest}")
        if any(not 0 <= token < vocabulary for token in row):
            raise DataError(f"input {i} has a token outside of the model's vocabulary of {vocabulary}")


@torch.no_grad()
def of_network(
    network: Network, rows: Sequence[Sequence[int]], on: frozenset[str], how: str
) -> Tensor:
    """[B, H] of a language model's last hidden states, with these adapters on."""
    model = network.model
    was = {module: module.enabled for module in surgery.switched(model)}
    out: list[Tensor] = [torch.empty(0)] * len(rows)
    lengths = [len(row) for row in rows]
    documents = [
        Document(np.asarray(row, np.int32), np.zeros(len(row), np.float32), number) for number, row in enumerate(rows)
    ]
    try:
        for module in was:
            module.enabled = module.name in on
        for part in rectangles(sorted(range(len(rows)), key=lengths.__getitem__), lengths, MICRO_TOKENS):
            if not part:
                continue
            batch = Batch.pack([documents[i] for i in part]).to(network.device)
            hidden = network.hidden(batch)
            for i, states in zip(part, hidden.split(batch.lengths)):
                inside = torch.ones(1, len(states), dtype=torch.int64, device=states.device)
                out[i] = pooled(states[None], inside, how)[0].cpu()
    finally:
        for module, enabled in was.items():
            module.enabled = enabled
    return torch.stack(out)


