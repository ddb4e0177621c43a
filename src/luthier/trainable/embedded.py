"""A low-rank update of an embedding, and of a head that is tied to it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..surgery import Adapter, device_of, innermost
from .low_rank import LowRank


class LowRankEmbedding:
    """A row of W + scaling * (B A)^T for each token; A [r, tokens] zero, B [width, r] standard normal at the start.

    Names, shapes and first values are PEFT's (`zero="lora_B"` draws A instead). No dropout: the inputs are numbers of
    tokens.
    """

    mergeable = True
    listed = "target_modules"
    constants: ClassVar[tuple[str, ...]] = ()

    def __init__(self, r: int, scaling: float, zero: str = "lora_A"):
        self.r, self.scaling, self.zero = r, scaling, zero

    def start(self, layer: Any) -> None:
        table, device = innermost(layer), device_of(layer)
        layer.lora_embedding_A = nn.Parameter(torch.zeros(self.r, table.num_embeddings, device=device))
        layer.lora_embedding_B = nn.Parameter(torch.zeros(table.embedding_dim, self.r, device=device))
        nn.init.normal_(layer.lora_embedding_B if self.zero == "lora_A" else layer.lora_embedding_A)

    def forward(self, layer: Any, tokens: Tensor) -> Tensor:  # [...] -> [..., width]
        y = layer.base(tokens)
        rows = F.embedding(tokens, layer.lora_embedding_A.t())  # [..., r] in float32
        # Gemma's embeddings multiply their rows, those of the update included.
        scaling = self.scaling * layer.share * getattr(innermost(layer), "embed_scale", 1.0)
        return y + F.linear((rows * scaling).to(y.dtype), layer.lora_embedding_B.to(y.dtype))

    def merge(self, layer: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        change = self.scaling * layer.share * (layer.lora_embedding_B @ layer.lora_embedding_A).t()
        return tensors | {"weight": tensors["weight"] + change}

    def saved(self, layer: Any) -> dict[str, Tensor]:
        return {"lora_embedding_A": layer.lora_embedding_A, "lora_embedding_B": layer.lora_embedding_B}


class TiedLowRank(LowRank):
    """The same update for the head that is tied to the embedding: it has no parameters of its own."""

    def __init__(self, embedding: Adapter):
        rule = embedding.rule
        assert isinstance(rule, LowRankEmbedding)
        super().__init__(rule.r, rule.scaling)
        self.embedding = embedding

    def start(self, layer: Any) -> None:
        for name in self.constants:
            layer.register_buffer(name, None)

    def factors(self, layer: Any) -> tuple[Tensor, Tensor]:
        embedding: Any = self.embedding
        return embedding.lora_embedding_B.t(), embedding.lora_embedding_A.t()
