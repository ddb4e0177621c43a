"""What of a LoRA's settings needs the model: where it stands, what is trained beside it, and tied embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import ModelError
from ..settings import did_you_mean
from ..surgery import (
    Adapter,
    adapters,
    base_name,
    blocks,
    freeze,
    innermost,
    linear_shape,
    matches,
    outer,
    swap,
    transposed,
)  # fmt: skip
from . import copies, experts, wrapping
from .adapter import short_names
from .embedded import LowRankEmbedding, TiedLowRank
from .lora import LoRA


def apply(config: LoRA, model: Any, adapter: str) -> None:
    """Freeze the model, wrap what is asked for, and put copies of what is trained in full in their places."""
    ends = tied(model)
    saved = copies.chosen(model, config.modules_to_save)
    names = wrapping.targets(config, model)
    fused = _experts(config, model)
    if double := [n for n in names if n in saved]:
        raise ModelError(
            f"trainable.modules_to_save: {double[0]} is in target_modules, too: leave it out of one of them"
        )
    kept = tuple(name + "." for name in saved) or "\0"
    names = [name for name in names if not name.startswith(kept)]
    fused = {name: leaves for name, leaves in fused.items() if not f"{name}.".startswith(kept)}
    _check_tying(config, ends, [*names, *saved])
    _check_patterns(config, [*names, *(f"{name}.{leaf}" for name, leaves in fused.items() for leaf in leaves)])
    if not (names or fused):
        raise ModelError(
            f"trainable.target_modules={config.target_modules} and target_parameters={config.target_parameters} leave "
            "nothing to adapt: name more, or exclude less"
        )
    freeze(model)
    together = ends if config.ensure_weight_tying else None
    alone = [n for n in names if not (together and n == together[1])]
    wrapping.wrap(config, model, alone, adapter)
    for name, leaves in fused.items():
        weights = {leaf: config.scale(f"{name}.{leaf}") for leaf in leaves}
        rule = experts.LowRankExperts(weights, config.init, config.zero_init or "lora_B")
        swap(model, name, Adapter(model.get_submodule(name), rule, adapter))
    copies.apply(model, [n for n in saved if not (together and n == together[1])], adapter)
    if together:
        _tie(config, model, together, {*names, *saved}, bool({*saved} & {*together}), adapter)


# ---------------------------------------------------------------------------- where


def _experts(config: LoRA, model: Any) -> dict[str, list[str]]:
    """Module -> the fused expert weights in it that are to be adapted."""
    found = experts.fused(model)
    every = [f"{name}.{leaf}" for name, leaves in found.items() for leaf in leaves]
    if config.target_parameters is None:
        wanted = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
        chosen = set(every) if {"all-linear", "mlp"} & set(wanted) else set()
    else:
        chosen = set()
        for pattern in config.target_parameters:
            mine = {name for name in every if matches(name, pattern)}
            if not mine:
                lasts = {".".join(name.split(".")[-2:]) for name in every}
                meant = did_you_mean(pattern, lasts, "" if every else "; the model has none")
                raise ModelError(f"trainable.target_parameters: {pattern!r} matches no fused expert weight{meant}")
            chosen |= mine
    chosen -= {name for name in every if any(matches(name, pattern) for pattern in config.exclude_modules)}
    prefix, _ = blocks(model)
    chosen = {n for n in chosen if wrapping.in_layers(n, prefix, config.layers_to_transform)}
    if chosen and config.lora_dropout:
        raise ModelError(
            f"trainable.lora_dropout={config.lora_dropout}: fused expert weights ({min(chosen)}) have none, as their "
            "inputs are inside the experts: use lora_dropout=0, or exclude_modules=['*experts*']"
        )
    if chosen and config.pissa:
        raise ModelError(
            f"trainable.init_lora_weights={config.init} is of linear layers, not of fused expert weights "
            f"({min(chosen)}): use another, or exclude_modules=['*experts*']"
        )
    parts = {name: [leaf for leaf in leaves if f"{name}.{leaf}" in chosen] for name, leaves in found.items()}
    return {name: leaves for name, leaves in parts.items() if leaves}


def _check_patterns(config: LoRA, names: Sequence[str]) -> None:
    """A pattern of ranks or alphas that no layer takes would be ignored in silence."""
    from .lora import _first

    for setting in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, setting)
        taken = {_first(patterns, name) for name in names}
        for pattern in patterns:
            if pattern in taken:
                continue
            if any(matches(name, pattern) for name in names):
                raise ModelError(
                    f"trainable.{setting}: patterns before {pattern!r} take all that it matches; put it first"
                )
            meant = did_you_mean(pattern, {part for name in names for part in (name, name.rpartition(".")[2])})
            raise ModelError(f"trainable.{setting}: {pattern!r} matches none of the layers that are adapted{meant}")


# ---------------------------------------------------------------------------- tied embeddings


def tied(model: Any) -> tuple[str, str] | None:
    """The names of the embeddings and of the head, where the two are one matrix."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(innermost(head), "weight", None) is not innermost(table).weight:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return names[id(table)], names[id(head)]


def _check_tying(config: LoRA, ends: tuple[str, str] | None, names: Sequence[str]) -> None:
    if config.ensure_weight_tying and not (ends and {*ends} & {*names}):
        why = "neither the embeddings nor the head are trained" if ends else "the model's head is not tied"
        raise ModelError(f"trainable.ensure_weight_tying=true: {why}: leave it out")


def _tie(config: LoRA, model: Any, ends: tuple[str, str], names: set[str], in_full: bool, adapter: str) -> None:
    """Give the head what the embeddings have, and the embeddings what only the head was named for."""
    table, head = ends
    if table not in names:
        if in_full:
            copies.apply(model, [table], adapter)
        else:
            wrapping.wrap(config, model, [table], adapter)
    source = model.get_submodule(table)
    rule = copies.TrainedCopy(source) if in_full else TiedLowRank(source)
    swap(model, head, Adapter(model.get_submodule(head), rule, adapter))


# ---------------------------------------------------------------------------- what is said of it


def remarks(config: LoRA, model: Any) -> list[str]:
    told = []
    ends = tied(model)
    if ends and not config.ensure_weight_tying:
        adapted = [isinstance(model.get_submodule(name), Adapter) for name in ends]
        if any(adapted):
            which = "both" if all(adapted) else ends[0] if adapted[0] else ends[1]
            apart = "each by itself" if all(adapted) else "alone"
            told.append(
                f"{ends[0]} and {ends[1]} are one matrix, and {which} of them {'are' if all(adapted) else 'is'} "
                f"trained {apart}: from here on they are two, in merged exports as well; "
                "trainable.ensure_weight_tying=true keeps them one"
            )
    ranks = [(n, getattr(a.rule, "r", 0), linear_shape(a) or (0, 0)) for n, a in adapters(model)]
    wide = [(name, r, shape) for name, r, shape in ranks if r > min(shape) > 0]
    if wide:
        name, r, (inputs, outputs) = wide[0]
        told.append(
            f"trainable: rank {r} is more than the {min(inputs, outputs)} that {base_name(name)} [{outputs}, {inputs}] "
            f"can have, and so of {len(wide)} layers: a lower rank can learn the same"
        )
    if config.lora_dropout and any(isinstance(a.rule, LowRankEmbedding) for _, a in adapters(model)):
        told.append("trainable.lora_dropout does not act on embeddings, whose inputs are numbers of tokens")
    return told


def placed(model: Any, adapter: str) -> dict[str, Any]:
    """Targets, fused expert weights and copies as adapter_config.json names them: short where that means no other."""
    found = {base_name(place): a for place, a in adapters(model) if a.name == adapter}
    listed: dict[str, list[str]] = {"target_modules": [], "target_parameters": [], "modules_to_save": []}
    for place, a in found.items():
        leaves = a.rule.weights if isinstance(a.rule, experts.LowRankExperts) else ("",)
        listed[a.rule.listed] += [f"{place}.{leaf}" if leaf else place for leaf in leaves]  # type: ignore[attr-defined]
    others = [n for n, m in outer(model) if linear_shape(m) or isinstance(innermost(m), nn.Embedding)]
    saved = listed["modules_to_save"]
    return {
        "target_modules": short_names(listed["target_modules"], others),
        "target_parameters": short_names(listed["target_parameters"], experts.names(model), 2) or None,
        # PEFT takes any name with such an end, `input_layernorm` for `norm`.
        "modules_to_save": short_names(saved, [name for name, _ in outer(model)], 1, "") or None,
        "fan_in_fan_out": any(transposed(innermost(a)) for a in found.values()),
    }
