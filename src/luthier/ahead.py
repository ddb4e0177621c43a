"""Computed ahead: what an objective makes of every row before the first step, kept in the run's folder.

The reference's log-probabilities, or a teacher's outputs, do not change while a run trains. An objective whose module
has `ahead(network, batch) -> dict[str, Tensor]` gives them as values [N, ...] of the trained positions. They are
computed once, in stretches of rows that the ranks share, by the network as it was at the start; written as safetensors
with the key of the rows and the settings; and read again when the run goes on. Documents then carry them as `fields`,
batches as `token_fields`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from . import checkpoint
from .assembled import Assembled
from .batch import Batch, rectangles
from .data.dataset import Dataset
from .data.shards import Documents
from .document import Document
from .files import write_atomically

Tell = Callable[[str], None]
STRETCH = 2048  # documents of a file
ENDS = "ends"  # where each document's values end; no field has this name
FREE = ("output_dir", "data", "evaluation", "checkpoint", "monitor", "parallel")  # decide no value, or by the rows only


def known(made: Assembled, dataset: Dataset, folder: Path, say: Tell, warn: Tell) -> Dataset:
    """The same rows, whose documents have what the objective computes ahead; computed now where it is not in `folder`.

    `made` must be as it was assembled: call it before a checkpoint's weights are loaded.
    """
    if made.ranks.first:
        _prepare(folder, _key(made, dataset), warn)
    made.ranks.wait()
    if not (folder / checkpoint.MANIFEST).exists():
        say(f"computing ahead, once for {len(dataset):,} rows, what they are compared with: {folder}")
        _compute(made, dataset, folder)
    assert isinstance(dataset.documents, Documents)
    documents = Known(dataset.documents, sorted(folder.glob("*.safetensors")))
    return replace(dataset, documents=documents, _lengths=dataset.lengths)


def _key(made: Assembled, dataset: Dataset) -> str:
    """Changes with any token or weight of any row, with which rows there are, and with what decides the values."""
    told = [dataset.fingerprint(), made.config.model_dump(mode="json", exclude=set(FREE))]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _prepare(folder: Path, key: str, warn: Tell) -> None:
    """Leave in the folder only what can be used: whole files for these rows and settings."""
    path, reason = folder / "key.json", None
    if not path.exists() or json.loads(path.read_text()) != key:
        shutil.rmtree(folder, ignore_errors=True)
    elif (folder / checkpoint.MANIFEST).exists():
        reason = checkpoint.damage(folder)
    if reason:
        warn(f"what was computed ahead in {folder} is not used, and computed again: {reason}")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(key))


def _compute(made: Assembled, dataset: Dataset, folder: Path) -> None:
    """A file for each stretch of documents, each by one rank; then the manifest, which says that all are there."""
    starts = range(0, len(dataset), STRETCH)
    for start in made.ranks.mine(starts):
        path = folder / f"{start:012}.safetensors"
        if not path.exists():  # by a process that was killed later
            documents = dataset.documents[start : start + STRETCH]
            write_atomically(path, save(_stretch(made, documents)))
    made.ranks.wait()
    if made.ranks.first:
        manifest = {path.name: _bytes_and_hash(path) for path in sorted(folder.glob("[!.]*"))}
        write_atomically(folder / checkpoint.MANIFEST, json.dumps(manifest))
    made.ranks.wait()


def _bytes_and_hash(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _stretch(made: Assembled, documents: Sequence[Document]) -> dict[str, Tensor]:
    """The values of these documents, one after the other, and where each one's end."""
    trained = [int(np.count_nonzero(d.weights)) for d in documents]
    lengths = [d.inputs for d in documents]
    order = sorted(range(len(documents)), key=lambda i: lengths[i])
    values: list[dict[str, Tensor]] = [{} for _ in documents]
    for part in rectangles(order, lengths, made.config.batch.micro_tokens):
        batch = Batch.pack([documents[i] for i in part]).to(made.ranks.device)
        with made.reference() as network:
            found = made.objective.ahead(network, batch)
        for name, every in found.items():
            assert len(every) == len(batch.trained), f"{name}: a value for each trained position"
            for i, own in zip(part, every.detach().cpu().split([trained[i] for i in part])):
                values[i][name] = own.float() if own.dtype == torch.bfloat16 else own  # NumPy has no bfloat16
    joined = {name: torch.cat([own[name] for own in values]) for name in values[0]}
    return joined | {ENDS: torch.tensor([0, *np.cumsum(trained).tolist()])}


class Known(Documents):
    """Documents with fields that stand in files, a stretch of them in each; read when a document is asked for."""

    def __init__(self, documents: Documents, files: Sequence[Path]):
        super().__init__(documents.shards, documents.chosen)
        self.files = [safe_open(path, framework="np") for path in files]
        self.ends = [file.get_tensor(ENDS) for file in self.files]
        self.names = [name for name in self.files[0].keys() if name != ENDS]  # noqa: SIM118 (no mapping)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        document = super().__getitem__(index)
        number, place = divmod(index % len(self), STRETCH)
        return document._replace(fields={name: self._of_tokens(document, name, number, place) for name in self.names})

    def _of_tokens(self, document: Document, name: str, number: int, place: int) -> np.ndarray:
        """[L, ...] the field of each token, zeros where nothing is learnt."""
        first, last = self.ends[number][place : place + 2]
        values = self.files[number].get_slice(name)[int(first) : int(last)]
        made = np.zeros((len(document.tokens), *values.shape[1:]), values.dtype)
        made[document.weights != 0] = values
        return made
