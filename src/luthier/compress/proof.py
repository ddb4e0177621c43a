"""What was written, loaded again in a fresh process by transformers and compared with the network in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .. import reload
from ..data.dataset import Dataset
from ..errors import ExportError

DOCUMENTS, TOKENS = 8, 512
LARGEST, MEAN = 5e-3, 5e-4  # of differences of log-probabilities, both computed in float32 from the same numbers


def probe(dataset: Dataset | None, tokenizer: Any) -> list[list[int]]:
    """The documents that are compared: of the rows, or every so many of the tokens where there are none."""
    found: list[list[int]] = []
    for document in dataset.documents[:DOCUMENTS] if dataset is not None else ():
        tokens = document.tokens[:TOKENS].tolist()
        if len(tokens) > 1:
            found.append(tokens)
    drawn = torch.randint(len(tokenizer), (2, 64), generator=torch.Generator().manual_seed(0)).tolist()
    return found or drawn


@torch.no_grad()
def logprobs(model: Any, documents: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities of all tokens but each document's first, by a plain model of transformers."""
    device = model.get_input_embeddings().weight.device
    out = []
    for document in documents:
        tokens = torch.tensor([document], device=device)
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        out.append(logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].cpu())
    return torch.cat(out)


def prove(model: Any, out: Path, dtype: torch.dtype, documents: Sequence[Sequence[int]]) -> dict:
    """Compare `out`, whose tensors are in `dtype`, with `model`, which has the same numbers; ExportError where they
    answer differently."""
    result = out / "probe.safetensors"
    request = {
        "documents": documents, "types": [None] * len(documents), "model": str(out), "base": None, "rows": 0,
        "quantisation": None, "dtype": str(dtype).removeprefix("torch."), "device": model.device.type,
        "out": str(result), "wide": True, "ends_in": "tokens", "labels": [], "beneath": [], "rounded_activations": True,
        "pad": 0, "ours": False,
    }  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-P", reload.__file__], input=json.dumps(request), capture_output=True, text=True,
        env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    if ran.returncode or not result.exists():
        raise ExportError(f"what was written cannot be loaded again; nothing is left\n{ran.stderr.strip()[-1500:]}")
    theirs = load_file(result)["logprobs"]
    result.unlink()
    kept = model.dtype
    ours = logprobs(model.float(), documents)
    model.to(kept)
    apart = (theirs - ours).abs()
    found = {"largest_difference": apart.max().item(), "mean_difference": apart.mean().item(),
             "compared_tokens": len(ours), "tolerance": LARGEST}  # fmt: skip
    if not (apart.max() <= LARGEST and apart.mean() <= MEAN):
        raise ExportError(
            f"what was written answers differently from what was made: log-probabilities differ by up to "
            f"{apart.max():.3g}, on average {apart.mean():.3g} (allowed {LARGEST:g} and {MEAN:g}); nothing is left"
        )
    return found
