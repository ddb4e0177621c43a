"""What prefix, prompt and P-tuning have in common: learnt positions before every document; read without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from .adapter import ABOUT, Adapting, saved_heads

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..surgery import VirtualTokens

class OnPositions(Adapting):
    """Virtual tokens: positions that hold something learnt, before the first token of every document and prompt."""

    mergeable: ClassVar[bool] = False
    neutral: ClassVar[Mapping[str, Any]] = {
        "num_transformer_submodules": (1,), "token_dim": ..., "num_attention_heads": ..., "num_layers": ...,
        "init_weights": ..., "prompt_tuning_init": ..., "prompt_tuning_init_text": ..., "tokenizer_name_or_path": ...,
        "tokenizer_kwargs": ..., "prefix_projection": ..., "encoder_hidden_size": ..., "encoder_num_layers": ...,
        "encoder_dropout": ..., "encoder_reparameterization_type": ...,
    }  # fmt: skip
    finished: ClassVar[Mapping[str, Any]] = {}
    """Settings of a table that no encoder makes any more, as it is saved."""
    num_virtual_tokens: int = Field(20, ge=1)
    """How many stand before every document; they take as many positions of the model's context."""

    def build(self, model: Any) -> VirtualTokens:
        """The module with its first values, in float32 on the CPU."""
        raise NotImplementedError

    def apply(self, model: nn.Module, name: str = "default") -> None:
        from ..surgery import attach, freeze

        freeze(model)
        made = self.build(model)
        made.length = self.num_virtual_tokens
        attach(model, made.to(model.get_input_embeddings().weight.device), name)  # type: ignore[operator]

    def tokens(self, model: nn.Module, name: str = "default") -> Any:
        """The module of this adapter in a model."""
        from ..surgery import VirtualTokens

        return next(m for m in model.children() if isinstance(m, VirtualTokens) and m.name == name)

    def saved(self, model: nn.Module, name: str = "default") -> dict[str, Tensor]:
        """PEFT's one tensor, the finished table: the live one where it is what moves, else made by the encoder."""
        from . import copies

        heads = {f"base_model.{key}": tensor for key, tensor in copies.of_heads(model, name).items()}
        return {"prompt_embeddings": self.tokens(model, name).table(), **heads}

    def peft(self) -> dict[str, Any]:
        return {"num_virtual_tokens": self.num_virtual_tokens, "num_transformer_submodules": 1}

    def placed(self, model: Any, name: str = "default") -> dict[str, Any]:
        """The sizes of the model, which PEFT keeps with the settings."""
        config = model.config.get_text_config()
        return {"token_dim": config.hidden_size, "num_layers": config.num_hidden_layers,
                "num_attention_heads": getattr(config, "num_attention_heads", None),
                **saved_heads(model, name)}  # fmt: skip

    @classmethod
    def from_peft(cls, values: Mapping[str, Any]) -> Self:
        """What is saved is the finished table: what made it, and what it began from, do not matter."""
        own = {"num_virtual_tokens": values.get("num_virtual_tokens"), **cls.finished}
        return cls.understood(own, set(values) - ABOUT - {"num_virtual_tokens"}, values)
