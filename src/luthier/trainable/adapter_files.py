"""What the folder of a saved adapter says of itself, read and checked without PyTorch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from ..errors import AdapterError, ModelError
from .adapter import Adapting

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE = "luthier_adapter.json"
"""What it was trained on: PEFT and others pass it over."""
PICKLE = "adapter_model.bin"
TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS")
"""The task types that can be loaded: of tokens, and of scores of texts and of tokens."""
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, eq=False)
class Saved:
    """A saved adapter: its settings, the shapes of its tensors, and what is known of its base."""

    path: Path
    settings: Adapting
    values: Mapping[str, Any]  # adapter_config.json
    shapes: Mapping[str, tuple[int, ...]]
    base: Mapping[str, Any] | None  # luthier_adapter.json

    @property
    def tensors(self) -> Path:
        return self.path / TENSORS

    @cached_property
    def digest(self) -> str:
        """SHA-256 of its tensors and its configuration, as they are when it is first asked for."""
        made = hashlib.sha256()
        for name in (TENSORS, CONFIG):
            made.update((self.path / name).read_bytes())
        return made.hexdigest()

    @property
    def parameters(self) -> int:
        return sum(_product(shape) for shape in self.shapes.values())


def kinds() -> Iterator[type[Adapting]]:
    """The answers of the axis that are adapters."""
    from . import Trainable

    union = get_args(Trainable)[0]
    yield from (cls for cls in get_args(union) if issubclass(cls, Adapting))


def read(path: str | Path) -> Saved:
    """The adapter in a folder, nothing of it loaded; an AdapterError says what is wrong with it and the remedy."""
    folder = Path(path).expanduser()
    if problem := _absent(folder):
        raise AdapterError(f"{path}: {problem}")
    values = _json(folder / CONFIG)
    known = [cls for cls in kinds() if cls.reads(values)]
    if not known:
        types = ", ".join(sorted({cls.peft_type for cls in kinds()}))
        raise AdapterError(f"{folder / CONFIG}: peft_type={values.get('peft_type')!r} is not one of {types}")
    if values.get("task_type") not in (None, *TASKS):
        raise AdapterError(
            f"{folder / CONFIG}: task_type={values['task_type']!r}, and adapters of these can be loaded: "
            f"{', '.join(TASKS)}"
        )
    told = values
    if values.get("task_type") in TASKS[1:] and "modules_to_save" not in known[0].model_fields:
        told = {key: value for key, value in values.items() if key != "modules_to_save"}  # its heads, which is known
    try:
        settings = known[0].from_peft(told)
    except ModelError as error:
        raise AdapterError(f"{folder / CONFIG}: {error}") from None
    base = _json(folder / BASE) if (folder / BASE).exists() else None
    return Saved(folder, settings, values, _shapes(folder / TENSORS), base)


def _absent(folder: Path) -> str | None:
    """What a folder lacks to be that of an adapter."""
    if not folder.is_dir():
        return "there is no such folder; an adapter is a folder with adapter_config.json and adapter_model.safetensors"
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        return f"a run's folder; write its adapter with\n    luthier export {folder} {folder.name}-adapter --as adapter"
    if not (folder / CONFIG).is_file():
        return f"has no {CONFIG}, so it holds no adapter"
    if (folder / TENSORS).is_file():
        return None
    if (folder / PICKLE).is_file():
        return (
            f"holds its tensors as a pickle ({PICKLE}), which can run any code when it is opened; convert it once "
            f"with\n    {conversion(folder)}"
        )
    return f"has no {TENSORS}: copy it there, or export the adapter again"


def conversion(folder: Path) -> str:
    """The command that turns a pickled adapter into safetensors, without running what else is in the pickle."""
    return (
        'python -c "import torch, safetensors.torch as s; '
        f"s.save_file({{k: v.contiguous() for k, v in torch.load('{folder / PICKLE}', weights_only=True).items()}}, "
        f"'{folder / TENSORS}')\""
    )


def _json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: not JSON, or damaged ({error}); copy the file again") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: expected keys and values, found {type(values).__name__}; copy the file again")
    return values


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a safetensors file, from its header; a file that is cut or damaged is an error."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 8 + length <= size else b""
    try:
        entries = {name: e for name, e in json.loads(header).items() if name != "__metadata__"}
        wanted = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
        shapes = {name: tuple(e["shape"]) for name, e in entries.items()}
        dtypes = {name: e["dtype"] for name, e in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise AdapterError(f"{path}: cut short or damaged (its header cannot be read); copy the file again") from None
    if size != wanted:
        raise AdapterError(f"{path}: cut short or damaged: {size} bytes instead of {wanted}; copy the file again")
    if not shapes:
        raise AdapterError(f"{path}: holds no tensor; export the adapter again")
    for name, dtype in dtypes.items():
        if dtype not in FLOATS:
            raise AdapterError(f"{path}: {name} is kept as {dtype}, which is not one of {', '.join(FLOATS)}")
    return shapes


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for size in shape:
        out *= size
    return out


def resolved(settings: Any) -> Any:
    """The settings of a run that goes on with a saved adapter: those that are not given are the adapter's own."""
    if not isinstance(settings, Adapting) or settings.init_from is None:
        return settings
    try:
        theirs = read(settings.init_from).settings
    except AdapterError:  # told by `problems`
        return settings
    if type(theirs) is not type(settings):
        return settings
    own = {name: getattr(theirs, name) for name in type(settings).model_fields if name not in settings.model_fields_set}
    return settings.model_copy(update=own)


def problems(settings: Any) -> list[str]:
    """What is wrong with the adapter that a run goes on with."""
    if not isinstance(settings, Adapting) or settings.init_from is None:
        return []
    try:
        theirs: Any = read(settings.init_from).settings
    except AdapterError as error:
        return [f"trainable.init_from: {error}"]
    ours: Any = settings
    if type(theirs) is not type(settings):
        return [
            f"trainable.init_from={settings.init_from!r} is of kind {theirs.kind}, and trainable.kind is {ours.kind}: "
            "give one of the two another kind"
        ]
    fixed = [n for n in type(settings).model_fields if n not in ("init_from", *settings.while_training)]
    return [
        f"trainable.{name}={getattr(ours, name)!r}, but the adapter in trainable.init_from has "
        f"{getattr(theirs, name)!r}: leave it out"
        for name in fixed
        if getattr(ours, name) != getattr(theirs, name)
    ]
