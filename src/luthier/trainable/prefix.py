"""Prefix tuning (arXiv:2101.00190): learnt keys and values before every document, in each layer; PEFT's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from .virtual import OnPositions

if TYPE_CHECKING:
    from torch import nn

    from ..surgery import VirtualTokens


class Prefix(OnPositions):
    """Prefix tuning (arXiv:2101.00190): learnt keys and values before every document, in each layer."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    kind: Literal["prefix"] = "prefix"
    prefix_projection: bool = False
    """While training, make them of smaller embeddings by two layers with a tanh between; their result is saved."""
    encoder_hidden_size: int | None = Field(None, ge=1)
    """Width between these two layers; without it, that of the keys of one layer."""

    def problems(self) -> list[str]:
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            return [
                f"trainable.encoder_hidden_size={self.encoder_hidden_size} is of the layers that make the prefix, and "
                "there are none: leave it out, or set trainable.prefix_projection=true"
            ]
        return []

    def apply(self, model: nn.Module, name: str = "default") -> None:
        """Without the layers that make it, it begins as what the model computes for tokens that are drawn."""
        super().apply(model, name)
        if self.prefix_projection or model.get_input_embeddings().weight.is_meta:  # type: ignore[operator]
            return
        from .soft_prompts import begin_as_run, drawn

        begin_as_run(self.tokens(model, name), model, drawn(self.num_virtual_tokens, model))

    def build(self, model: Any) -> VirtualTokens:
        from .soft_prompts import KeysAndValues, number_layers, shape

        number_layers(model)
        hidden = self.encoder_hidden_size or 0 if self.prefix_projection else None
        return KeysAndValues(self.num_virtual_tokens, *shape(model), hidden)

    def peft(self) -> dict[str, Any]:
        """As the table that is saved: without the layers that made it."""
        return super().peft() | {"prefix_projection": False}

    def placed(self, model: Any, name: str = "default") -> dict[str, Any]:
        from .soft_prompts import shape

        layers, heads, width = shape(model)
        own = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * width}
        return super().placed(model, name) | own
