"""P-tuning (arXiv:2103.10385): embeddings before every document that a small network makes; PEFT's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from .virtual import OnPositions

if TYPE_CHECKING:
    from ..surgery import VirtualTokens


class PTuning(OnPositions):
    """P-tuning (arXiv:2103.10385): embeddings before every document, made by a small network that is trained."""

    peft_type: ClassVar[str] = "P_TUNING"
    kind: Literal["p_tuning"] = "p_tuning"
    encoder_reparameterization_type: Literal["MLP", "LSTM"] | None = "MLP"
    """The network: three layers, or an LSTM in both directions and two layers. `null` learns the embeddings themselves,
    which is what a saved adapter has."""
    encoder_hidden_size: int | None = Field(None, ge=1)
    """Its width; without it, the model's."""
    encoder_num_layers: int = Field(2, ge=1)
    """Of the LSTM."""
    encoder_dropout: float = Field(0.0, ge=0, lt=1)
    """Between the layers of the LSTM."""
    finished: ClassVar[Mapping[str, Any]] = {"encoder_reparameterization_type": None}

    def problems(self) -> list[str]:
        kind, found = self.encoder_reparameterization_type, []
        of = f"trainable.encoder_reparameterization_type={kind or 'null'}"
        if kind != "LSTM" and self.encoder_num_layers != 2:
            found.append(f"trainable.encoder_num_layers={self.encoder_num_layers} is of the LSTM, but {of}")
        if kind != "LSTM" and self.encoder_dropout:
            found.append(f"trainable.encoder_dropout={self.encoder_dropout} is of the LSTM, but {of}")
        if kind == "LSTM" and self.encoder_dropout and self.encoder_num_layers == 1:
            found.append("trainable.encoder_dropout acts between layers, and trainable.encoder_num_layers=1: use 2")
        if kind is None and self.encoder_hidden_size is not None:
            found.append(f"trainable.encoder_hidden_size={self.encoder_hidden_size}, but {of} has no network")
        return [text if text.endswith("use 2") else f"{text}: leave one of them out" for text in found]

    def build(self, model: Any) -> VirtualTokens:
        from .soft_prompts import LSTM, MLP, Embeddings, width

        hidden = self.encoder_hidden_size or width(model)
        made = Embeddings(self.num_virtual_tokens, model)
        if self.encoder_reparameterization_type == "MLP":
            made.encoder = MLP(width(model), hidden)
        elif self.encoder_reparameterization_type == "LSTM":
            made.encoder = LSTM(width(model), hidden, self.encoder_num_layers, self.encoder_dropout)
        return made

    def peft(self) -> dict[str, Any]:
        """PEFT reads the finished table whatever the network was."""
        kept = {"encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout"}
        return super().peft() | self.model_dump(include=kept, exclude_none=True)

    def placed(self, model: Any, name: str = "default") -> dict[str, Any]:
        placed = super().placed(model)
        return placed | {"encoder_hidden_size": self.encoder_hidden_size or placed["token_dim"]}
