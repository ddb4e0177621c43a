"""What prefix, prompt and P-tuning have in common: learnt positions before every document; read without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, ValidationError

from ..errors import ModelError
from .adapter import Adapting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..surgery import VirtualTokens

ABOUT = {  # keys of adapter_config.json that change nothing of what a finished table computes
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "token_dim", "num_attention_heads", "num_layers", "init_weights", "prompt_tuning_init", "prompt_tuning_init_text",
    "tokenizer_name_or_path", "tokenizer_kwargs", "prefix_projection", "encoder_hidden_size", "encoder_num_layers",
    "encoder_dropout", "encoder_reparameterization_type",
}  # fmt: skip


class OnPositions(Adapting):
    """Virtual tokens: positions that hold something learnt, before the first token of every document and prompt."""

    mergeable: ClassVar[bool] = False
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
        return {"prompt_embeddings": self.tokens(model, name).table()}

    def peft(self) -> dict[str, Any]:
        return {"num_virtual_tokens": self.num_virtual_tokens, "num_transformer_submodules": 1}

    def placed(self, model: Any, name: str = "default") -> dict[str, Any]:
        """The sizes of the model, which PEFT keeps with the settings."""
        config = model.config.get_text_config()
        return {"token_dim": config.hidden_size, "num_layers": config.num_hidden_layers,
                "num_attention_heads": getattr(config, "num_attention_heads", None)}  # fmt: skip

    @classmethod
    def from_peft(cls, values: Mapping[str, Any]) -> Self:
        """A finished table has no encoder any more, and what it began from does not matter."""
        own = {"num_virtual_tokens", "num_transformer_submodules"}
        matter = {k: v for k, v in values.items() if k not in ABOUT | own and v not in (None, False, [], {}, "")}
        if values.get("num_transformer_submodules") not in (None, 1):
            matter["num_transformer_submodules"] = values["num_transformer_submodules"]
        if matter:
            told = ", ".join(f"{key}={value!r}" for key, value in sorted(matter.items()))
            raise ModelError(f"{told}: not supported, and it would change what the adapter computes")
        try:
            return cls.model_validate({"num_virtual_tokens": values.get("num_virtual_tokens"), **cls.finished})
        except ValidationError as error:
            raise ModelError(f"num_virtual_tokens={values.get('num_virtual_tokens')!r}: {error.errors()[0]['msg']}") from None

    finished: ClassVar[dict[str, Any]] = {}
    """Settings of a table that no encoder makes."""
