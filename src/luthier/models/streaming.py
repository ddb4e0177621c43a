"""Weights from safetensors into a network layer by layer, each into its precision as it is read, and no more than one.

Format: https://huggingface.co/docs/safetensors. The files are read, not mapped: nothing of them stays in memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..surgery import Storage, swap
from .heads import TOKENS, Ending, attending, is_head

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CHUNK = 8 << 20  # bytes that are converted at once
CPU = torch.device("cpu")
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

    def read(self, scratch: Tensor, dtype: torch.dtype | None = None, device: torch.device = CPU) -> Tensor:
        """In `dtype` on `device`, by way of `scratch`, a piece at a time; without a dtype as it is in the file."""
        made = torch.empty(self.shape, dtype=dtype or self.dtype, device=device)
        flat = made.reshape(-1)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            if made.dtype == self.dtype and made.device == CPU:
                _fill(file, flat, self.path)
                return made
            piece = scratch[:CHUNK].view(self.dtype)
            for begin in range(0, len(flat), len(piece)):
                part = piece[: len(flat) - begin]
                _fill(file, part, self.path)
                flat[begin : begin + len(part)] = part
        return made

    def lent(self, scratch: Tensor, device: torch.device = CPU) -> Tensor:
        """As it is in the file, on `device`; on the CPU in `scratch` itself, until that is used again."""
        if device != CPU:
            return self.read(scratch, None, device)
        made = scratch[: self.bytes].view(self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            _fill(file, made, self.path)
        return made.view(self.shape)


def _fill(file: Any, tensor: Tensor, path: Path) -> None:
    if not len(tensor):
        return
    waiting = tensor.view(torch.uint8).numpy().data
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


def skeleton(config: Any, dtype: torch.dtype, ending: Ending = TOKENS) -> Any:
    """The network of a configuration without its weights, but with its buffers."""
    with weightless():
        made = attending(lambda **kind: ending.auto.from_config(config, dtype=dtype, **kind))
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


def fit_heads(model: Any, found: dict[str, Entry], ending: Ending) -> tuple[list[str], list[str]]:
    """The head's tensors that the files lack or have in another size, and those that are taken out of `found`, as they
    are of another head."""
    if ending.ends_in == "tokens":
        return [], []
    own = {n: p for n, p in model.named_parameters() if is_head(n, model.base_model_prefix)}
    new = [n for n, p in own.items() if n not in found or tuple(p.shape) != found[n].shape]
    strange = [n for n in found if is_head(n, model.base_model_prefix) and (n not in own or n in new)]
    for name in strange:
        del found[name]
    return new, strange


def fill(
    model: Any, found: dict[str, Entry], device: torch.device, store: Storage, drawn: Collection[str] = ()
) -> None:  # fmt: skip
    """Give a skeleton its weights, on `device`, layers of `store` in their precision; largest first.

    Nothing is read if the files and the network differ in any tensor but those that will be `drawn`, which are there.
    """
    places = _places(model)
    for name in drawn:
        tensor = places[name][0][1]
        _place(model, places.pop(name), torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
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
    # One buffer for all that is read and given up again, as a heap that had a new one for each would grow.
    largest = max((found[n].bytes for n in found if n.rpartition(".")[0] in layers), default=0)
    scratch = torch.empty(max(CHUNK, largest), dtype=torch.uint8)
    sizes = {unit: sum(found[name].bytes for name in names) for unit, names in units.items()}
    for unit in sorted(units, key=lambda unit: -sizes[unit]):
        own = {name: found[name] for name in units[unit]}
        if unit in layers:
            _read_layer(model, unit, own, unit in ready, places, store, scratch, device)
        else:
            _place(model, places[unit], own[unit].read(scratch, places[unit][0][1].dtype, device))
        _trim()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device != device:  # only what no file holds, which was compared
                raise AssertionError(f"{type(module).__name__}.{name} was not read")


def _trim() -> None:
    """Give back what the C library keeps of freed memory between what stays; nothing where it is not glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _read_layer(
    model: Any, unit: str, found: dict[str, Entry], ready: bool, places: dict[str, list[tuple[str, Tensor]]],
    store: Storage, scratch: Tensor, device: torch.device,
) -> None:  # fmt: skip
    """All tensors of a layer that goes to fewer bits, or is in them already."""
    weight, layer = f"{unit}.weight", model.get_submodule(unit)
    for name in found.keys() & places.keys() - {weight}:
        _place(model, places[name], found[name].read(scratch, places[name][0][1].dtype, device))
    if ready:
        kept = {n: entry.read(scratch, None, device) for n, entry in found.items() if n.startswith(weight)}
        ends = {"weight" if n == weight else n.removeprefix(weight + "."): tensor for n, tensor in kept.items()}
        swap(model, unit, store.ready(layer, ends))
    else:
        layer._parameters["weight"] = nn.Parameter(found[weight].lent(scratch, device), requires_grad=False)
        swap(model, unit, store.layer(layer))


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
    """Name -> all names and the tensor, of all that a file has to give; tied tensors under each of their names."""
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


@torch.no_grad()
def draw(config: Any, dtype: torch.dtype, device: torch.device, store: Storage | None, seed: int = 0) -> Any:
    """A network of random weights made on `device` a matrix at a time, layers of `store` in their precision at once.

    For measurements: such a network never exists in 16 bits. Matrices have a standard deviation of 0.02, biases are 0.
    """
    made = skeleton(config, dtype)
    layers = set(store.names(made)) if store else set()
    generator = torch.Generator(device).manual_seed(seed)
    places = _places(made)
    for name in sorted(places, key=lambda name: -places[name][0][1].numel()):
        if name not in places or name != places[name][0][0] or not places[name][0][1].is_meta:
            continue
        tensor = places[name][0][1]
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        _place(made, places[name], value.normal_(0, 0.02, generator=generator) if value.ndim > 1 else value.zero_())
        layer = name.rpartition(".")[0]
        if store and layer in layers and name.endswith(".weight"):
            del value
            plain = made.get_submodule(layer)
            if plain.bias is not None and plain.bias.is_meta:
                plain.bias = nn.Parameter(torch.zeros(plain.bias.shape, dtype=plain.bias.dtype, device=device))
            swap(made, layer, store.layer(plain))
            places = {other: tied for other, tied in places.items() if not other.startswith(layer + ".")}
    return made.to(device).eval()


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
