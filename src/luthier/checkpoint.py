"""Checkpoints that are whole or not there: written aside, flushed, hashed, renamed; safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from .errors import CheckpointError
from .files import flush_folder, write_atomically

MANIFEST = "manifest.json"


class Part(Protocol):
    """Something that the next step depends on, beside the weights: it is kept in every checkpoint."""

    def tensors(self) -> Mapping[str, Tensor]: ...
    def numbers(self) -> dict: ...
    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping) -> None: ...


def write_folder(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping) -> None:
    """A checkpoint at `folder`: a file `<group>.safetensors` for each group of tensors, and `state.json`."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for group, members in tensors.items():
        if members:
            made = {name: t.detach().contiguous().cpu() for name, t in members.items()}
            save_file(made, aside / f"{group}.safetensors")
    (aside / "state.json").write_text(json.dumps(state, indent=1))
    manifest = {}
    for path in sorted(aside.iterdir()):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
            manifest[path.name] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    write_atomically(aside / MANIFEST, json.dumps(manifest, indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(aside, folder)
    flush_folder(folder.parent)


def damage(folder: Path) -> str | None:
    """Why the checkpoint must not be used, or None when every byte is what was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, wanted in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {wanted['bytes']}"
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != wanted["sha256"]:
                    return f"{name} was changed after it was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def name_of(step: int) -> str:
    """Of the checkpoint after so many steps."""
    return f"step-{step:08}"


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def listed(root: Path) -> list[Path]:
    """The checkpoints below a run's folder, oldest first, whole or not."""
    found = [p for p in root.glob("step-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of)


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that is not, saying why."""
    refused = []
    for folder in reversed(listed(root)):
        reason = damage(folder)
        if reason is None:
            return folder, refused
        refused.append(f"checkpoint {folder} is not used: {reason}")
    return None, refused


def read_state(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text())


def best_or_newest(folder: Path) -> tuple[Path, list[str]]:
    """The checkpoint to use of a finished or interrupted run, and why newer ones were refused."""
    latest, refused = newest(folder / "checkpoints")
    if latest is None:
        told = "".join(f"\n  {line}" for line in refused)
        raise CheckpointError(f"{folder} has no whole checkpoint{told}; start it again with `luthier train`")
    best = read_state(latest).get("best")
    if best and (folder / "checkpoints" / best["name"]).is_dir():
        chosen = folder / "checkpoints" / best["name"]
        reason = damage(chosen)
        if reason is None:
            return chosen, refused
        refused.append(f"checkpoint {chosen} is not used: {reason}")
    return latest, refused


def read_tensors(folder: Path, group: str) -> dict[str, Tensor]:
    path = folder / f"{group}.safetensors"
    return load_file(path) if path.exists() else {}


def prune(root: Path, keep: int, best: Path | None) -> None:
    """Remove all checkpoints but the newest `keep` and the best, and what a killed process left half-written."""
    for folder in listed(root)[:-keep]:
        if best is None or folder.name != best.name:
            # Renamed first: a half-removed checkpoint must not look like one.
            gone = folder.with_name(f".{folder.name}.removed")
            os.rename(folder, gone)
            shutil.rmtree(gone)
    for left in root.glob(".step-*"):
        if not left.name.endswith(f".{os.getpid()}"):
            shutil.rmtree(left, ignore_errors=True)


def random_state() -> Tensor:
    """The states of all random generators of this process, PyTorch's, NumPy's and Python's, as bytes [n] uint8."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    others = {"python": [version, list(words), gauss], "numpy": [name, position, has_gauss, cached]}
    return torch.frombuffer(bytearray(save(tensors, {"others": json.dumps(others)})), dtype=torch.uint8)


def restore_random_state(state: Tensor) -> None:
    data = bytes(state.numpy())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # of the safetensors format
    tensors, others = load(data), json.loads(header["__metadata__"]["others"])
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, words, gauss = others["python"]
    random.setstate((version, tuple(words), gauss))
    name, position, has_gauss, cached = others["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))


def load_into(named: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy saved tensors over named ones; the two must have the same names and shapes."""
    missing, extra = sorted(set(named) - set(saved)), sorted(set(saved) - set(named))
    if missing or extra:
        raise CheckpointError(
            f"{what}: the checkpoint lacks {len(missing)} of the tensors that this run trains ({missing[:3]}) and has "
            f"{len(extra)} that it does not ({extra[:3]}). It was written by a run with another `trainable`: "
            "give this run another `output_dir`."
        )
    with torch.no_grad():
        for name, tensor in named.items():
            if tensor.shape != saved[name].shape:
                raise CheckpointError(
                    f"{what}: {name} has shape {tuple(saved[name].shape)} in the checkpoint and {tuple(tensor.shape)} "
                    "in this run: give this run another `output_dir`."
                )
            tensor.copy_(saved[name])
