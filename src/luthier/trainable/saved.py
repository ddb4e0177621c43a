"""Adapter folders in PEFT's layout: written whole, loaded strictly or not at all, for every kind of adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import surgery
from ..errors import AdapterError, CheckpointError, ModelError
from . import fingerprint
from .adapter import PREFIX, Adapting, BesideLayers, OnLayers
from .adapter_files import BASE, CONFIG, TENSORS, Saved

TRAINED = "default"
"""The name of the adapter that a run trains; those beneath it have others."""
Tell = Callable[[str], None]


# ---------------------------------------------------------------------------- writing


def write(
    folder: Path, model: nn.Module, settings: Adapting, name: str = TRAINED, base: str | None = None,
    revision: str | None = None, below: Sequence[Mapping[str, Any]] | None = None,
) -> None:  # fmt: skip
    """The adapter of this name into a folder; `base` is where other tools find the model that it belongs to.

    `below` are the adapters that it was trained on; without it, those that are on.
    """
    tensors = {key: t.detach().contiguous().cpu().clone() for key, t in settings.saved(model, name).items()}
    values = {"task_type": surgery.task(model), "base_model_name_or_path": base, "revision": revision,
              **settings.peft(), **settings.placed(model, name)}  # fmt: skip
    write_files(folder, settings, tensors, values, about_base(model, beneath(model, name) if below is None else below))


def write_files(
    folder: Path, settings: Adapting, tensors: Mapping[str, Tensor], values: Mapping[str, Any],
    base: Mapping[str, Any] | None,
) -> None:  # fmt: skip
    save_file(dict(tensors), folder / TENSORS, {"format": "pt"})
    written = {"peft_type": settings.peft_type, "task_type": "CAUSAL_LM", **values, "inference_mode": True}
    (folder / CONFIG).write_text(json.dumps(written, indent=2))
    if base is not None:
        (folder / BASE).write_text(json.dumps(base))


def about_base(model: nn.Module, below: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fingerprint of the base, and the adapters that lay on it."""
    return {"base": fingerprint.take(model), "beneath": list(below)}


def beneath(model: nn.Module, name: str) -> list[dict[str, Any]]:
    """The loaded adapters that are on while the one of this name is: their names, digests and shares."""
    found: dict[str, dict[str, Any]] = {}
    for module in surgery.switched(model):
        if module.name != name and module.enabled and module.source:
            share = getattr(module, "share", 1.0)
            found.setdefault(module.name, {"name": module.name, "sha256": module.source.digest, "share": share})
    return list(found.values())


# ---------------------------------------------------------------------------- loading


def load(
    model: Any, saved: Saved, name: str, share: float = 1.0, tell: Tell = lambda text: None, values: bool = True,
    check: bool = True,
) -> None:  # fmt: skip
    """Add a saved adapter, frozen, under a name; on an error the model is as it was before.

    Without `values`, as on the meta device, its tensors are made and not filled; without `check`, it is not asked
    whether the model is its base.
    """
    check_name(model, saved, name)
    if _with_heads(saved) and saved.values["task_type"] != surgery.task(model):
        raise AdapterError(
            f"{saved.path}: task_type={saved.values['task_type']!r}, and this {type(model).__name__} is a model of "
            f"{surgery.task(model)}: load it on the class that it was trained with"
        )
    if share != 1.0 and not isinstance(saved.settings, BesideLayers):
        raise AdapterError(f"{saved.path}: share={share:g}, but virtual tokens are there or not: leave it out")
    moving = {id(p): p.requires_grad for p in model.parameters()}
    if values and check:
        check_base(model, saved, tell)
    try:
        with reraised(saved):
            settings = fitting(saved, model)
            (settings.install if _with_heads(saved) else settings.apply)(model, name)
        for module in surgery.switched(model, name):
            module.source = saved
            _like(module, model.training)
            if isinstance(module, surgery.Adapter):
                module.share = share
        if values:
            fill(model, saved, name)
    except BaseException:
        surgery.remove(model, name)
        raise
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(moving.get(id(parameter), False))


def _with_heads(saved: Saved) -> bool:
    """Whether it was trained with the head of a model that ends in scores."""
    return saved.values.get("task_type") in surgery.TASKS.values()


def check_name(model: nn.Module, saved: Saved, name: str) -> None:
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise AdapterError(f"{saved.path}: {name!r} is no name for an adapter: use letters, digits, - and _")
    if name in surgery.names(model):
        raise AdapterError(f"{saved.path}: the model has an adapter of the name {name!r} already; give another")


@contextmanager
def reraised(saved: Saved) -> Iterator[None]:
    """What goes wrong in putting an adapter into a model, with its folder."""
    try:
        yield
    except ModelError as error:
        raise AdapterError(f"{saved.path} does not fit this model: {error}") from None


def _like(module: surgery.Switched, training: bool) -> None:
    """In the mode that the network is in: what is new begins in that of training, with its dropout."""
    module.training = training
    for child, below in module.named_children():
        if child != "base":
            below.train(training)


def fitting(saved: Saved, model: nn.Module) -> Any:
    """The settings without names that neither the file nor the model has a layer for: PEFT allows such."""
    settings: Any = saved.settings
    if not isinstance(settings, OnLayers) or isinstance(settings.target_modules, str):
        return settings
    here = [name for name, _ in surgery.outer(model)]
    there = {key.removeprefix(PREFIX).rpartition(".")[0] for key in saved.shapes}
    there |= {name.rpartition(".")[0] for name in there}  # a key ends in one or two names of the adapter's own

    def known(pattern: str, names: Iterable[str]) -> bool:
        return any(surgery.matches(name, pattern) for name in names)

    wanted = [p for p in settings.target_modules if known(p, here) or known(p, there)]
    excluded = [p for p in settings.exclude_modules if known(p, here)]
    kept = {"target_modules": wanted or settings.target_modules, "exclude_modules": excluded}
    return settings.model_copy(update=kept)


def check_base(model: Any, saved: Saved, tell: Tell) -> None:
    """The model must be the one that the adapter was trained on, with the adapters that lay beneath it."""
    if saved.base is None:
        named = str(saved.values.get("base_model_name_or_path") or "")
        here = str(getattr(model.config, "_name_or_path", "") or "")
        if named and here and Path(named).name != Path(here).name:
            tell(f"{saved.path} names {named!r} as its base, and this model is {here!r}; only shapes can be compared")
        return
    try:
        told = fingerprint.difference(model, saved.base["base"])
        here = {(b["sha256"], round(b["share"], 6)) for b in beneath(model, "")}
        missing = [b for b in saved.base["beneath"] if (b["sha256"], round(b["share"], 6)) not in here]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{saved.path / BASE}: damaged ({error!r}); copy the file again") from None
    if told:
        raise AdapterError(
            f"{saved.path} was trained on another base: {told}. Load it on the one that it was trained on "
            f"({saved.values.get('base_model_name_or_path')!r})"
        )
    if missing:
        raise AdapterError(
            f"{saved.path} was trained on top of the adapter {missing[0]['name']!r} (share {missing[0]['share']:g}), "
            "which this model does not have: load that one first"
        )


@torch.no_grad()
def fill(model: Any, saved: Saved, name: str = TRAINED) -> None:
    """Copy the file's tensors into the adapter of this name, all of them into all of it."""
    live = saved.settings.saved(model, name)
    own = {id(parameter) for parameter in model.parameters()}
    assert all(id(tensor) in own for tensor in live.values()), "what is made from other tensors cannot be copied into"
    pairs = _paired(model, saved, live)
    tensors = load_file(saved.tensors)
    for key in pairs.values():
        if not tensors[key].isfinite().all():
            raise AdapterError(f"{saved.tensors}: {key} holds values that are not finite; export the adapter again")
    _check_beside(model, saved, set(tensors) - set(pairs.values()), tensors)
    for ours, key in pairs.items():
        live[ours].copy_(tensors[key])


def _paired(model: Any, saved: Saved, live: Mapping[str, Tensor]) -> dict[str, str]:
    """Our key -> the file's, after everything was compared."""
    pairs: dict[str, str] = {}
    left: list[str] = []
    for key in saved.shapes:
        ours = next((form for form in _forms(key) if form in live), None)
        if ours is None:
            left.append(key)
        elif ours in pairs:
            raise AdapterError(f"{saved.tensors}: {pairs[ours]} and {key} are the same tensor; remove one of the two")
        else:
            pairs[ours] = key
    unmatched = [key for key in left if _beside(model, key) is None]
    missing = [key for key in live if key not in pairs]
    if unmatched or missing:
        told = []
        if unmatched:
            told.append(f"{len(unmatched)} of its {len(saved.shapes)} tensors match nothing here ({_some(unmatched)})")
        if missing:
            told.append(f"{len(missing)} of the {len(live)} that it would have here are not in it ({_some(missing)})")
        raise AdapterError(
            f"{saved.path} does not fit this {type(model).__name__}: {' and '.join(told)}. It belongs to another "
            f"model, or its {CONFIG} is not the one that it was saved with"
        )
    for ours, key in pairs.items():
        if saved.shapes[key] != tuple(live[ours].shape):
            raise AdapterError(
                f"{saved.path}: {key} has shape {list(saved.shapes[key])}, and in this {type(model).__name__} it is "
                f"{list(live[ours].shape)}: load it on the base that it was trained on"
            )
    return pairs


def _forms(key: str) -> Iterator[str]:
    """How a key may stand elsewhere: without its prefix, with an adapter's name, or from a compiled model."""
    plain = key.replace("_orig_mod.", "").replace(".default.", ".").replace(".base_layer.lora_", ".lora_")
    for form in (key, plain, plain.removesuffix(".default"), plain.removesuffix(".weight"), plain + ".weight"):
        yield form
        yield PREFIX + form.removeprefix("base_model.").removeprefix("model.model.")
        yield PREFIX + form


def _beside(model: nn.Module, key: str) -> str | None:
    """The name of the base's own tensor, where a file holds one beside its adapter."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".").replace("_orig_mod.", "")
    here = {surgery.base_name(n) for n, _ in model.named_parameters(remove_duplicate=False)}
    return name if name in here else None


def _check_beside(model: nn.Module, saved: Saved, keys: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """PEFT saves whole embeddings beside an adapter for them: the base's own ones change nothing, others would."""
    own = {surgery.base_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    for key in sorted(keys):
        ours, theirs = own[_beside(model, key) or key], tensors[key]
        if ours.shape != theirs.shape:
            raise AdapterError(
                f"{saved.path} holds {key} of shape {list(theirs.shape)} beside the adapter, and this model's is "
                f"{list(ours.shape)}: its vocabulary was resized; resize and save the base model likewise first"
            )
        if not torch.equal(ours.detach().cpu(), theirs.to(ours.dtype)):
            raise AdapterError(
                f"{saved.path} holds {key} beside the adapter with other values than this model's: they were trained, "
                "or it was made for another base; merge it there, with the tool that wrote it"
            )


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


# ---------------------------------------------------------------------------- does it do anything?


@torch.no_grad()
def idle(model: Any, names: Iterable[str]) -> list[str]:
    """The adapters that change nothing of what the model computes: none that was trained."""
    tokens = torch.arange(1, 9, device=model.get_input_embeddings().weight.device)[None]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        found = []
        beside = {adapter.name for _, adapter in surgery.adapters(model)}
        for name in beside.intersection(names):  # virtual tokens always change something
            with surgery.adapters_on(model, {name}):
                changed = model(input_ids=tokens, use_cache=False).logits.float()
                with surgery.adapters_off(model, {name}):
                    plain = model(input_ids=tokens, use_cache=False).logits.float()
            if (changed - plain).abs().max() <= 1e-6 * plain.abs().max():
                found.append(name)
        return found
    finally:
        for module, mode in modes.items():
            module.training = mode


class Sources:
    """The files of the adapters that a run loads, as a part of its checkpoints: they must stay what they were."""

    def __init__(self, files: Mapping[str, Saved]):
        self.files = files
        self.digests = {name: saved.digest for name, saved in files.items()}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def numbers(self) -> dict:
        return self.digests

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping) -> None:
        for name, saved in self.files.items():
            if numbers.get(name) != saved.digest:
                raise CheckpointError(
                    f"{saved.path} (adapter {name!r}) is not what it was when the run began: restore its files, or "
                    "give another output_dir"
                )

