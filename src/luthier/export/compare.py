"""What was written against what it was written from: log-probabilities, perplexity, and how far they may differ."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..batch import Batch, Document
from ..errors import ExportError
from ..logprobs import scored
from ..opened import Opened

DOCUMENTS, TOKENS, LETTERS = 8, 512, 8000  # of a probe of text
READERS = Path(__file__).parent / "readers"
# Largest and mean difference of log-probabilities between what was trained and what was written.
TOLERANCE = {torch.float32: (5e-3, 5e-4), torch.bfloat16: (1.0, 0.05), torch.float16: (0.5, 0.02)}


@dataclass(frozen=True)
class Bound:
    """How far what was written may be from what it was written from; infinite where it is only told."""

    largest: float = math.inf
    """Of differences of log-probabilities of a token."""
    mean: float = math.inf
    """Of their absolute values."""
    perplexity: float = math.inf
    """How much of itself the perplexity may grow by: 0.03 is 3 %."""


def read_again(reader: str, request: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a reader (a file of readers/, without its ending) finds of `request` in a fresh process.

    The request goes to its standard input as JSON; its tensors come in the file `request["out"]`, which is taken away.
    Raises ExportError where it cannot load what was written.
    """
    result = Path(request["out"])
    ran = subprocess.run(
        [sys.executable, "-P", str(READERS / f"{reader}.py")], input=json.dumps(request), capture_output=True,
        text=True, encoding="utf-8", errors="replace",  # llama.cpp's log cuts texts inside of characters
        env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    if ran.returncode or not result.exists():
        raise ExportError(
            f"what was written cannot be loaded again; nothing was exported\n{ran.stderr.strip()[-1500:]}"
        )
    found = load_file(result)
    result.unlink()
    return found


def differences(before: Tensor, after: Tensor) -> dict[str, float]:
    """Of log-probabilities of the same tokens: how far they are apart, and the perplexity of both."""
    apart = (after - before).abs()
    return {
        "largest_difference": apart.max().item(),
        "mean_difference": apart.mean().item(),
        "perplexity_before": math.exp(-before.double().mean().item()),
        "perplexity_after": math.exp(-after.double().mean().item()),
        "compared_tokens": len(before),
    }


def fault(found: Mapping[str, float], bound: Bound) -> str | None:
    """What of it is more than allowed; None where nothing is."""
    if not (found["largest_difference"] <= bound.largest and found["mean_difference"] <= bound.mean):
        return (
            f"log-probabilities differ by up to {found['largest_difference']:.3g}, on average "
            f"{found['mean_difference']:.3g} (allowed {bound.largest:g} and {bound.mean:g})"
        )
    before, after = found["perplexity_before"], found["perplexity_after"]
    if not after <= before * (1 + bound.perplexity):
        return (
            f"perplexity went from {before:.4g} to {after:.4g}, by {after / before - 1:.2%} "
            f"(allowed {bound.perplexity:.2%})"
        )
    return None


def proof(
    before: Tensor | Callable[[Sequence[Sequence[int]]], Tensor],
    out: Path,
    reader: str,
    documents: Sequence[Sequence[int]],
    bound: Bound,
    **request: Any,
) -> dict[str, Any]:
    """Load `out` again by `reader` in a fresh process and compare the log-probabilities of `documents` (tokens) there
    with `before`: those of all tokens but each document's first, end to end, or a function that gives them.

    `request` is what else the reader is told. Returns the figures of `differences`, the bytes of `out`, and what else
    the reader found; ExportError, with the figures, where they are further apart than `bound`.
    """
    ours = before if isinstance(before, Tensor) else before(documents)
    target = out / "probe.safetensors" if out.is_dir() else out.with_name(f".{out.name}.probe.safetensors")
    told = {"documents": [list(map(int, d)) for d in documents], "model": str(out), "out": str(target)}
    theirs = read_again(reader, told | request)
    logprobs = theirs.pop("logprobs")
    assert logprobs.shape == ours.shape, f"{reader} gave {logprobs.shape}, expected {ours.shape}"
    found = differences(ours, logprobs.to(ours))
    if wrong := fault(found, bound):
        raise ExportError(f"what was written answers otherwise than what it was written from: {wrong}; nothing is left")
    largest, grows = (x if math.isfinite(x) else None for x in (bound.largest, bound.perplexity))
    compared = f"log-probabilities of {len(ours)} tokens"
    return {
        **found, "tolerance": largest, "bound": grows, "compared": compared, "bytes": size(out), "found": theirs
    }  # fmt: skip


def size(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


# ---------------------------------------------------------------------------- as it is in memory


def probe(found: Opened) -> list[list[int]]:
    """Documents to compare on: a run's held-out rows, kept when it began; else real English text, which Python brings:
    the topics of its help."""
    if found.made is not None:
        told = json.loads((Path(found.name).expanduser() / "probe.json").read_text())
        return [d for d in (d["tokens"] if isinstance(d, dict) else d for d in told) if len(d) > 1]
    from pydoc_data.topics import topics

    longest = min(TOKENS, getattr(found.model.config.get_text_config(), "max_position_embeddings", None) or TOKENS)
    texts = sorted(topics.values(), key=len)[-DOCUMENTS * 4 :: 4]
    return [found.tokenizer(text[:LETTERS]).input_ids[:longest] for text in texts]


def _scores(made: Any, documents: Sequence[Sequence[int]], types: Sequence[Sequence[int] | None]) -> Tensor:
    """The scores of texts, or of their tokens, one after the other, as the trained model gives them."""
    found = []
    for tokens, of_pair in zip(documents, types):
        ids = np.asarray(tokens, np.int32)
        pair = None if of_pair is None else np.asarray(of_pair, np.int32)
        document = Document(ids, np.zeros(len(ids), np.float32), 0, types=pair)
        with torch.no_grad():
            found.append(made.network.scores(Batch.pack([document]).to(made.network.device)).float().cpu().flatten())
    return torch.cat(found)


def logprobs(made: Any, documents: Sequence[Sequence[int]], types: Sequence[Sequence[int] | None] = ()) -> Tensor:
    """Log-probabilities of all tokens but each document's first, as the model of `made` (a run assembled, or what was
    opened) gives them; or its scores."""
    if made.network.ends_in != "tokens":
        return _scores(made, documents, types)
    packed = [
        Document(np.asarray(d, np.int32), np.r_[0.0, np.ones(len(d) - 1)].astype(np.float32), 0) for d in documents
    ]
    batch = Batch.pack(packed).to(made.network.device)
    with torch.no_grad():
        hidden, targets, _ = made.network.predictions(batch, made.network.hidden(batch))
        return scored(hidden, made.network.head, targets)[0].float().cpu()
