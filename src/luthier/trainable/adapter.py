"""What all adapters have in common: where they stand, how they are named and saved; read without PyTorch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import ValidationError

from ..errors import ModelError
from ..settings import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..surgery import Rule

PREFIX = "base_model.model."  # of the names of layers in an adapter file
ABOUT = {  # keys of adapter_config.json that say something about the file and change nothing of what is computed
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
}  # fmt: skip
OURS = ("kind", "init_from")  # settings that PEFT has no key for


class Adapting(Settings):
    """A way to move something small beside weights that stay as they are."""

    peft_type: ClassVar[str]
    """As adapter_config.json has it; a kind that PEFT does not know has its own, which begins with LUTHIER_."""
    mergeable: ClassVar[bool] = True
    """Whether plain weights can be made that compute the same."""
    neutral: ClassVar[Mapping[str, Any]] = {}
    """Keys of adapter_config.json that are no settings of ours, and a tuple of the values at which they change nothing;
    null, false and what is empty need not be named. `...` in place of a tuple allows any value."""
    while_training: ClassVar[Collection[str]] = ()
    """Settings that may differ where a saved adapter is trained further, as its tensors do not depend on them."""

    init_from: str | None = None
    """The folder of a saved adapter to go on with: its settings, unless they are given, and its values."""

    def problems(self) -> list[str]:
        """What of these settings does not go together."""
        return []

    def apply(self, model: nn.Module, name: str = "default") -> None:
        """Freeze the model and add an adapter to it."""
        raise NotImplementedError

    def install(self, model: nn.Module, name: str = "default", **given: Any) -> None:
        """The same, and copies of the heads of a model that ends in scores: they always move."""
        from . import copies

        self.apply(model, name, **given)
        copies.add_heads(model, name)

    def remarks(self, model: nn.Module) -> list[str]:
        """What a user should know of these settings on this model, once it is adapted."""
        return []

    def saved(self, model: nn.Module, name: str = "default") -> dict[str, Tensor]:
        """The live tensors of the adapter of this name, as an adapter file names them: a loader copies into them."""
        raise NotImplementedError

    def peft(self) -> dict[str, Any]:
        """These settings as adapter_config.json has them, without what is the same for all kinds."""
        raise NotImplementedError

    def placed(self, model: nn.Module, name: str = "default") -> dict[str, Any]:
        """What adapter_config.json says, beside the settings, of the model at hand: layers, sizes."""
        return {}

    @classmethod
    def reads(cls, values: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json is of this kind."""
        return values.get("peft_type") == cls.peft_type

    @classmethod
    def from_peft(cls, values: Mapping[str, Any]) -> Self:
        """The settings of an adapter_config.json; what would be ignored is a ModelError.

        As it stands here, keys are settings of the same name, and no others may have a value that matters.
        """
        own = {k: v for k, v in values.items() if k in cls.model_fields and k not in OURS and v is not None}
        return cls.understood(own, set(values) - ABOUT - set(own), values)

    @classmethod
    def understood(cls, settings: Mapping[str, Any], rest: Collection[str], values: Mapping[str, Any]) -> Self:
        """Settings made of these values; each key of `rest` must have a value that changes nothing."""
        matter = {
            key: values[key]
            for key in sorted(rest)
            if values[key] not in (None, False, [], {}, "") and not _allowed(values[key], cls.neutral.get(key, ()))
        }
        if matter:
            told = ", ".join(f"{key}={value!r}" for key, value in matter.items())
            raise ModelError(f"{told}: not supported, and it would change what the adapter computes")
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors(include_url=False)
            )
            raise ModelError(faults) from None


def _allowed(value: Any, values: Any) -> bool:
    return values is ... or value in values


def _is_copy(adapter: Any) -> bool:
    """Whether it is a module that is trained in full, and no adapter beside it."""
    return getattr(adapter.rule, "listed", None) == "modules_to_save"


def saved_heads(model: nn.Module, name: str) -> dict[str, Any]:
    """What adapter_config.json says of copies of heads."""
    from . import copies

    names = copies.names_of_heads(model, name)
    return {"modules_to_save": names} if names else {}


class BesideLayers(Adapting):
    """An adapter that is a rule beside each of some parts of the network."""

    def saved(self, model: nn.Module, name: str = "default") -> dict[str, Tensor]:
        from ..surgery import adapters, base_name

        return {
            f"{PREFIX}{base_name(place)}.{leaf}": tensor
            for place, adapter in adapters(model)
            if adapter.name == name
            for leaf, tensor in adapter.rule.saved(adapter).items()
        }


class OnLayers(BesideLayers):
    """One whose layers are chosen by name."""

    target_modules: str | list[str] = "all-linear"
    """`all-linear`, `attention`, `mlp`, or names and patterns of layers."""
    exclude_modules: list[str] = []
    """Names and patterns of layers that are left out all the same."""
    fits_experts: ClassVar[bool] = False
    """Whether it can stand beside weights [experts, out, in] of mixture-of-experts models."""

    def fits(self, module: nn.Module) -> bool:
        """Whether it can stand beside a layer of this kind."""
        from ..surgery import linear_shape

        return linear_shape(module) is not None

    def rule(self, name: str, layer: nn.Module) -> Rule:
        """What is put beside the layer of this name."""
        raise NotImplementedError

    def apply(self, model: nn.Module, name: str = "default") -> None:
        from . import wrapping

        wrapping.apply(self, model, name)

    def placed(self, model: nn.Module, name: str = "default") -> dict[str, Any]:
        """The layers, by their last names where these mean no other layer, and whether they keep [in, out]."""
        from ..surgery import adapters, base_name, innermost, linear_shape, outer, transposed

        found = {base_name(place): a for place, a in adapters(model) if a.name == name and not _is_copy(a)}
        linear = [place for place, module in outer(model) if linear_shape(module)]
        return {
            "target_modules": short_names(list(found), linear),
            "fan_in_fan_out": any(transposed(innermost(a)) for a in found.values()),
            **saved_heads(model, name),
        }

    @classmethod
    def from_peft(cls, values: Mapping[str, Any]) -> Self:
        taken = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"}
        known = set(cls.model_fields) - taken - set(OURS)
        own = {k: v for k, v in values.items() if k in known and v is not None} | targets_of_peft(values)
        return cls.understood(own, set(values) - ABOUT - taken - set(own), values)


def targets_of_peft(values: Mapping[str, Any]) -> dict[str, Any]:
    """`target_modules` and `exclude_modules` as ours: a text is a regular expression there, and layers are counted."""
    wanted, excluded = values.get("target_modules"), values.get("exclude_modules")
    if wanted is None:
        raise ModelError("target_modules: names no layer")
    if isinstance(wanted, str) and wanted != "all-linear":
        wanted = [f"re:{wanted}"]
    if isinstance(excluded, str):
        excluded = [f"re:{excluded}"]
    layers = values.get("layers_to_transform")
    if layers is not None:
        wanted = _of_layers(wanted, [layers] if isinstance(layers, int) else layers, values.get("layers_pattern"))
    return {"target_modules": wanted, "exclude_modules": excluded or []}


def _of_layers(wanted: str | Sequence[str], layers: Sequence[int], pattern: str | Sequence[str] | None) -> list[str]:
    """PEFT's `layers_to_transform`: those whose last number, after a name of `layers_pattern`, is one of these."""
    if isinstance(wanted, str) or any(name.startswith("re:") for name in wanted):
        raise ModelError(f"layers_to_transform={list(layers)} needs a list of names as target_modules, not {wanted!r}")
    lists = [pattern] if isinstance(pattern, str) else pattern or [r"[^.]+"]
    names, numbers = "|".join(map(re.escape, wanted)), "|".join(map(str, layers))
    return [rf"re:(?:.*\.)?(?:{'|'.join(lists)})\.(?:{numbers})\.(?!.*\.\d+\.)(?:.*\.)?(?:{names})"]


def short_names(chosen: Sequence[str], names: Sequence[str], parts: int = 1, dot: str = ".") -> list[str]:
    """The last parts of names, where they mean the chosen and no others of `names`; else the whole names."""
    lasts = sorted({".".join(name.split(".")[-parts:]) for name in chosen})
    others = {name for name in names if any(name == s or name.endswith(dot + s) for s in lasts)} - set(chosen)
    return list(chosen) if others else lasts
