"""Several adapters on one model, a plain one of transformers too: load, switch, combine, remove, merge, save.

    model = AutoModelForCausalLM.from_pretrained("base")
    adapters.load(model, "out/french", name="french")
    adapters.load(model, "out/polite", name="polite")
    adapters.switch(model, "french")
    adapters.combine(model, {"french": 1.0, "polite": 0.5})

Light to import: PyTorch is loaded when a function is called.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import AdapterError, ModelError
from .files import new_folder

if TYPE_CHECKING:
    from torch import nn


__all__ = ["combine", "concatenate", "load", "merge", "names", "remove", "save", "switch"]


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def load(model: Any, folder: str | Path, name: str | None = None, share: float = 1.0) -> str:
    """Add the adapter in a folder to a model, frozen and switched on, and return its name.

    The name is by default the folder's. `share` is a factor of what the adapter changes. Everything is compared: its
    tensors with the model's layers, and, where Luthier wrote it, its base with this model. An AdapterError leaves the
    model as it was. A warning tells of an adapter that changes nothing.
    """
    from .trainable import adapter_files, saved
    from .trainable.adapter import BesideLayers

    found = adapter_files.read(folder)
    if not isinstance(found.settings, BesideLayers):
        raise AdapterError(
            f"{folder} holds virtual tokens ({found.settings.peft_type}), which Luthier lays in itself: use it as "
            "model.adapters or trainable.init_from of a run, or load it with PEFT"
        )
    chosen = name or found.path.resolve().name.replace(".", "-")
    saved.load(model, found, chosen, share, _warn)
    if saved.idle(model, [chosen]):
        _warn(f"{folder}: the adapter {chosen!r} changes nothing of what the model computes: was it trained?")
    return chosen


def names(model: nn.Module) -> list[str]:
    """The names of the adapters that a model has, sorted."""
    from . import surgery

    return surgery.names(model)


def switch(model: nn.Module, name: str | None) -> None:
    """Only this adapter is on, with all that it changes; with None, the base alone is left."""
    combine(model, {} if name is None else {name: 1.0})


def combine(model: nn.Module, weights: Mapping[str, float]) -> None:
    """These adapters are on, each with its weight as a factor of what it changes; all others are off."""
    from . import surgery

    _check_names(model, weights)
    for module in surgery.switched(model):
        if module.name in weights and weights[module.name] != 1 and not isinstance(module, surgery.Adapter):
            raise AdapterError(f"{module.name!r} is virtual tokens, which are there or not: its weight can be 1 only")
    for module in surgery.switched(model):
        module.enabled = module.name in weights
        if module.enabled and isinstance(module, surgery.Adapter):
            module.share = float(weights[module.name])


def remove(model: nn.Module, name: str) -> None:
    """Take an adapter out of a model."""
    from . import surgery

    _check_names(model, [name])
    surgery.remove(model, name)


def merge(model: Any) -> None:
    """Put the adapters that are on into the weights of the base, with their shares, and take all adapters out."""
    import torch

    from . import surgery

    for module in surgery.switched(model):
        if module.enabled and not (isinstance(module, surgery.Adapter) and module.rule.mergeable):
            raise AdapterError(f"{module.name!r} cannot be merged: no plain weights compute the same")
        if isinstance(module, surgery.Adapter) and isinstance(surgery.innermost(module), surgery.QuantisedLinear):
            raise AdapterError(
                f"{module.name!r} lies on weights that are kept in fewer bits, which would round it away: load the "
                "base in 16 or 32 bits, or `luthier export RUN OUT --as merged`"
            )
    places = [name for name, module in surgery.outer(model) if isinstance(module, surgery.Adapter)]
    head, table = model.get_output_embeddings(), surgery.innermost(model.get_input_embeddings())
    tied = head is not None and surgery.innermost(head).weight is table.weight
    adapted = head is not None and any(isinstance(m, surgery.Adapter) for m in (head, model.get_input_embeddings()))
    state = surgery.merged_state(model)
    for name in surgery.names(model):
        surgery.remove(model, name)
    if tied and adapted:  # from here on they are two
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.get_text_config().tie_word_embeddings = False
    with torch.no_grad():
        for place in places:
            for leaf, tensor in model.get_submodule(place).state_dict(keep_vars=True).items():
                tensor.copy_(state[f"{place}.{leaf}"])


def save(model: Any, name: str, out: str | Path) -> None:
    """Write a loaded adapter to a new folder, in PEFT's layout."""
    from . import surgery
    from .trainable import saved

    _check_names(model, [name])
    source = next((m.source for m in surgery.switched(model, name) if m.source is not None), None)
    if source is None:
        raise AdapterError(f"{name!r} was not loaded from a folder: a run's adapter is written by luthier export")
    base = getattr(model.config, "_name_or_path", None) or source.values.get("base_model_name_or_path")
    with new_folder(Path(out)) as aside:
        saved.write(aside, model, source.settings, name, base, below=source.base["beneath"] if source.base else [])


def concatenate(weights: Mapping[str | Path, float], out: str | Path) -> dict[str, Any]:
    """One LoRA that computes what several do together, each times its weight, written to a new folder.

    Its matrices are theirs side by side, so the ranks add up and nothing is lost. Returns its rank and the parameters.
    """
    from .trainable import adapter_files, joined

    if len(weights) < 2:
        raise AdapterError("to concatenate takes two adapters or more")
    found = {adapter_files.read(folder): float(weight) for folder, weight in weights.items()}
    with new_folder(Path(out)) as aside:
        return joined.write(found, aside)


def _check_names(model: nn.Module, wanted: Any) -> None:
    from . import surgery

    here = surgery.names(model)
    for name in wanted:
        if name not in here:
            has = f"it has {', '.join(map(repr, here))}" if here else "it has none"
            raise ModelError(f"the model has no adapter of the name {name!r}: {has}")
