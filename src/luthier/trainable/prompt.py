"""Prompt tuning (arXiv:2104.08691): learnt embeddings before every document; PEFT's names for its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import ModelError
from .virtual import OnPositions

if TYPE_CHECKING:
    from torch import nn

    from ..surgery import VirtualTokens


class Prompt(OnPositions):
    """Prompt tuning (arXiv:2104.08691): learnt embeddings before every document."""

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    kind: Literal["prompt"] = "prompt"
    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = "SAMPLE_VOCAB"
    """They begin as tokens of the vocabulary, as the tokens of a text, or at random."""
    prompt_tuning_init_text: str | None = None
    """With TEXT: cut after `num_virtual_tokens` tokens, or repeated up to them."""
    finished: ClassVar[Mapping[str, Any]] = {"prompt_tuning_init": "RANDOM"}

    def problems(self) -> list[str]:
        text = self.prompt_tuning_init_text
        if self.prompt_tuning_init == "TEXT" and not (text or "").strip():
            return ["trainable.prompt_tuning_init=TEXT begins as a text: give trainable.prompt_tuning_init_text"]
        if self.prompt_tuning_init != "TEXT" and text is not None:
            return [
                f"trainable.prompt_tuning_init_text={text!r}, but prompt_tuning_init={self.prompt_tuning_init}: leave "
                "it out, or set trainable.prompt_tuning_init=TEXT"
            ]
        return []

    def apply(
        self, model: nn.Module, name: str = "default", tokenize: Callable[[str], Sequence[int]] | None = None
    ) -> None:
        """`tokenize` gives the tokens of a text; without values, as on the meta device, it is not needed."""
        super().apply(model, name)
        words: Any = model.get_input_embeddings()  # type: ignore[operator]
        if self.prompt_tuning_init == "RANDOM" or words.weight.is_meta:
            return
        from .soft_prompts import begin_as, drawn

        chosen = drawn(self.num_virtual_tokens, model)
        if self.prompt_tuning_init == "TEXT":
            assert tokenize is not None, "a text needs its tokenizer"
            chosen = list(tokenize(self.prompt_tuning_init_text or ""))
            if not chosen:
                raise ModelError("trainable.prompt_tuning_init_text has no token: give another text")
        begin_as(self.tokens(model, name), words, chosen)

    def build(self, model: Any) -> VirtualTokens:
        from .soft_prompts import Embeddings

        return Embeddings(self.num_virtual_tokens, model)

    def peft(self) -> dict[str, Any]:
        """As the table that is saved, which needs no beginning, nor a tokenizer for it."""
        return super().peft() | {"prompt_tuning_init": "RANDOM"}
