"""What was written, loaded again in a fresh process by transformers and compared with the network in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..export import compare

BOUND = compare.Bound(*compare.TOLERANCE[torch.float32])  # both compute in float32, from the same numbers


def probe(dataset: Dataset | None, source: Any) -> list[list[int]]:
    """The documents that are compared: of the rows, or of English text where there are none."""
    documents = dataset.documents[: compare.DOCUMENTS] if dataset is not None else ()
    found = [d.tokens[: compare.TOKENS].tolist() for d in documents if len(d.tokens) > 1]
    return found or compare.probe(SimpleNamespace(made=None, model=source.model, tokenizer=source.tokenizer))  # type: ignore


@torch.no_grad()
def logprobs(model: Any, documents: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities of all tokens but each document's first, by a plain model of transformers."""
    device = model.get_input_embeddings().weight.device
    out = []
    for document in documents:
        tokens = torch.tensor([list(document)], device=device)
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        out.append(logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].cpu())
    return torch.cat(out)


def prove(model: Any, out: Path, dtype: torch.dtype, documents: Sequence[Sequence[int]]) -> dict:
    """Compare `out`, whose tensors are in `dtype`, with `model`, which has the same numbers; ExportError where they
    answer differently."""
    computes = model.dtype
    ours = logprobs(model.float(), documents)
    model.to(computes)
    found = compare.proof(
        ours, out, "transformers_reader", documents, BOUND, base=None, rows=0, quantisation=None,
        dtype=str(dtype).removeprefix("torch."), device=model.device.type, wide=True, ends_in="tokens",
        types=[None] * len(documents), labels=[], beneath=[], rounded_activations=True, pad=0, ours=False,
    )  # fmt: skip
    kept = ("largest_difference", "mean_difference", "tolerance", "compared_tokens")
    return {name: found[name] for name in kept}
