"""What all adapters have in common: where they stand, how they are named and saved; read without PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from ..surgery import Rule


class Adapting(Settings):
    """A way to move something small beside weights that stay as they are."""

    peft_type: ClassVar[str]
    """As adapter_config.json has it; a kind that PEFT does not know has its own, which begins with LUTHIER_."""
    mergeable: ClassVar[bool] = True
    """Whether plain weights can be made that compute the same."""

    def problems(self) -> list[str]:
        """What of these settings does not go together."""
        return []

    def apply(self, model: nn.Module, name: str = "default") -> None:
        """Freeze the model and add an adapter to it."""
        raise NotImplementedError

    def peft(self) -> dict[str, Any]:
        """These settings as adapter_config.json has them, without what is the same for all kinds."""
        raise NotImplementedError

    @classmethod
    def reads(cls, values: dict[str, Any]) -> bool:
        """Whether an adapter_config.json is of this kind."""
        return values.get("peft_type") == cls.peft_type

    @classmethod
    def from_peft(cls, values: dict[str, Any]) -> Self:
        """The settings of an adapter_config.json; what would be ignored is a ModelError."""
        raise NotImplementedError


class OnLayers(Adapting):
    """An adapter beside each of some layers."""

    target_modules: str | list[str] = "all-linear"
    """`all-linear`, `attention`, `mlp`, or names and patterns of layers."""
    exclude_modules: list[str] = []
    """Names and patterns of layers that are left out all the same."""

    def rule(self, name: str, layer: nn.Module) -> Rule:
        """What is put beside the layer of this name."""
        raise NotImplementedError

    def apply(self, model: nn.Module, name: str = "default") -> None:
        from . import wrapping

        wrapping.apply(self, model, name)
