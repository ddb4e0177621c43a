"""Weights from safetensors into a network layer by layer, each into its precision as it is read, and no more than one.

Format: https://huggingface.co/docs/safetensors. The files are read, not mapped, so that nothing of them stays in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..surgery import Storage, swap

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CHUNK = 8 << 20  # bytes that are converted at once
READY = ".quant_state.bitsandbytes__"  # in the name of a tensor that describes a layer in 4 bits


class Unfit(Exception):
    """The files cannot be read straight into the network; the message says why."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """In `dtype`, converted a piece at a time; without one as it is in the file."""
        there = torch.device(device)
        made = torch.empty(self.shape, dtype=self.dtype if there.type != "cpu" else dtype or self.dtype)
        flat = made.reshape(-1)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            if made.dtype == self.dtype:
                _fill(file, flat, self.path)
            else:
                piece = torch.empty(min(CHUNK // self.dtype.itemsize, len(flat)), dtype=self.dtype)
                for begin in range(0, len(flat), len(piece) or 1):
                    part = piece[: len(flat) - begin]
                    _fill(file, part, self.path)
                    flat[begin : begin + len(part)] = part
        return made.to(there, dtype or self.dtype)


def _fill(file: Any, tensor: Tensor, path: Path) -> None:
    if not len(tensor):
        return
    waiting = memoryview(tensor.view(torch.uint8).numpy())
    while waiting:
        count = file.readinto(waiting)
        if not count:
            raise OSError(f"{path} ends too early: it was cut short; get it again")
        waiting = waiting[count:]


def entries(files: Iterable[Path]) -> dict[str, Entry]:
    """All tensors of some files, by name."""
    found: dict[str, Entry] = {}
    for path in files:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise OSError(f"{path} is no safetensors file, or was cut short")
            head = json.loads(file.read(length))
        for name, value in head.items():
            if name == "__metadata__":
                continue
            if value["dtype"] not in DTYPES:
                raise Unfit(f"{name} is in {value['dtype']}")
            if name in found:
                raise Unfit(f"{name} is there twice")
            start, shape = 8 + length + value["data_offsets"][0], tuple(value["shape"])
            found[name] = Entry(path, start, DTYPES[value["dtype"]], shape)
    return found


class _Weightless(TorchFunctionMode):
    """Memory that is asked for without values is not taken; what is computed, as buffers are, is."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def weightless() -> Iterator[None]:
    """Modules made here have parameters without memory, on the meta device, and buffers with their values."""
    with _Weightless():
        yield


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The network of a configuration without its weights, but with its buffers."""
    from transformers import AutoModelForCausalLM

    with weightless():
        made = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    made.tie_weights()
    if left := [name for name, buffer in made.named_buffers() if buffer.is_meta]:
        raise Unfit(f"{type(made).__name__} keeps {left[0]} where it cannot be computed beforehand")
    return made


def check_straight(model: Any, dtype: torch.dtype) -> None:
    """Families whose tensors are renamed, put together or kept in other numbers are read by transformers itself."""
    kept = [getattr(model, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")]
    if dtype != torch.float32 and any(kept):
        raise Unfit(f"{type(model).__name__} keeps some weights in 32 bits")
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        conversions = get_model_conversion_mapping(model, add_legacy=False)
    except (ImportError, TypeError):
        conversions = getattr(model, "_checkpoint_conversion_mapping", None)
    if conversions:
        raise Unfit(f"the files of a {type(model).__name__} name or shape some tensors otherwise than it does")


def fill(model: Any, found: dict[str, Entry], device: torch.device, store: Storage) -> None:
    """Give a skeleton its weights, on `device`, layers of `store` in their precision; largest first.

    Nothing is read if the files and the network differ in any tensor.
    """
    places = _places(model)
    layers = set(store.names(model))
    ready = {name.partition(READY)[0].removesuffix(".weight") for name in found if READY in name}
    if wrong := ready - layers:
        raise Unfit(f"{min(wrong)} is kept in 4 bits, and is no linear layer inside the network's blocks")
    owned = {name: _ready_layer(name, ready) or name for name in found}
    plain = {name for name, owner in owned.items() if owner == name}
    _compare(places, {name: found[name] for name in plain}, {f"{layer}.weight" for layer in ready})
    units: dict[str, list[str]] = {}
    for name, owner in owned.items():
        layer = owner if owner in ready else name.rpartition(".")[0]
        units.setdefault(layer if layer in layers else name, []).append(name)
    for unit in sorted(units, key=lambda unit: -sum(found[name].bytes for name in units[unit])):
        stored = {n: found[n].read(device=device) for n in units[unit] if owned[n] != n}
        for name in sorted(set(units[unit]) - set(stored)):
            wanted = None if unit in layers and name == f"{unit}.weight" else places[name][0][1].dtype
            _place(model, places[name], found[name].read(wanted, device))
        if unit in layers:
            layer = model.get_submodule(unit)
            if unit in ready:
                weight = f"{unit}.weight"
                ends = {"weight" if n == weight else n.removeprefix(weight + "."): t for n, t in stored.items()}
                swap(model, unit, store.ready(layer, ends))
            else:
                swap(model, unit, store.layer(layer))
                del layer
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device != device:  # only what no file holds, which was compared
                raise AssertionError(f"{type(module).__name__}.{name} was not read")


def _ready_layer(name: str, ready: set[str]) -> str | None:
    """The layer in 4 bits that a tensor is part of: its weight and what stands under that."""
    layer, found, rest = name.partition(".weight")
    while found:
        if layer in ready and (not rest or rest.startswith(".")):
            return layer
        more, found, rest = rest.partition(".weight")
        layer += ".weight" + more
    return None


def _places(model: Any) -> dict[str, list[tuple[str, Tensor]]]:
    """Name -> all names and the tensor, of everything that a file has to give; tied tensors under each of their names."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    same: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in state.items():
        same.setdefault(id(tensor), []).append((name, tensor))
    return {name: same[id(tensor)] for name, tensor in state.items()}


def _compare(places: dict[str, list[tuple[str, Tensor]]], found: dict[str, Entry], elsewhere: set[str]) -> None:
    for name, entry in found.items():
        if name not in places:
            raise Unfit(f"they have a tensor {name} that the network has not")
        if tuple(places[name][0][1].shape) != entry.shape:
            raise Unfit(f"{name} has another shape than in the network")
    for name, tied in places.items():
        given = [other for other, _ in tied if other in found or other in elsewhere]
        if len(given) != 1:
            raise Unfit(f"they {'lack ' + name if not given else 'have ' + ' and '.join(given) + ', which are tied'}")


def _place(model: Any, names: list[tuple[str, Tensor]], tensor: Tensor) -> None:
    """One tensor under all its names."""
    value = nn.Parameter(tensor) if isinstance(names[0][1], nn.Parameter) else tensor
    for name, _ in names:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        (module._parameters if leaf in module._parameters else module._buffers)[leaf] = value  # type: ignore[index]


def convert(model: Any, store: Storage, device: torch.device) -> None:
    """A plain network's layers into their precision on `device`, one after the other, and the rest there, too."""
    for name in store.names(model):
        layer = model.get_submodule(name).to(device)
        swap(model, name, store.layer(layer))
        del layer
    model.to(device)


def sixteen_bit_experts(model: nn.Module, store: Storage) -> str | None:
    """What is said of matrices inside the blocks that are no linear layers, as fused experts are."""
    from ..surgery import blocks

    prefix, _ = blocks(model)
    kept = [(n, p) for n, p in model.named_parameters() if n.startswith(prefix + ".") and p.ndim == 3]
    if not kept:
        return None
    count = sum(p.numel() for _, p in kept)
    return (
        f"precision.kind={store.kind}: {count:,} weights of fused experts ({kept[0][0]} and the like) are no linear "
        f"layers and stay in {str(kept[0][1].dtype).removeprefix('torch.')}"
    )
