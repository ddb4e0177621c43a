"""Named sizes of a random start: Llama's architecture (arXiv:2307.09288) in proportions that fit each size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Grouped queries (arXiv:2305.13245), heads of 32 or 64 as FlashAttention likes them, one matrix for both ends."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    intermediate: int
    vocabulary: int  # what it is meant for: about as many parameters in the embedding as its layers can use
    context: int = 2048

    def parameters(self, vocabulary: int) -> int:
        """All of them: V H + L (2 H^2 + 2 H K d + 3 H F + 2 H) + H, with the head tied to the embedding."""
        width = self.hidden // self.heads * self.key_heads
        attention = 2 * self.hidden * (self.hidden + width)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return vocabulary * self.hidden + self.layers * layer + self.hidden

    def config(self, vocabulary: int, context: int) -> dict:
        """The keys of config.json, for at least `context` positions."""
        return {
            "model_type": "llama", "vocab_size": vocabulary, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads, "head_dim": self.hidden // self.heads,
            "max_position_embeddings": max(context, self.context), "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        }  # fmt: skip


SIZES = {
    "tiny": Size(128, 4, 4, 2, 384, 4096),
    "5m": Size(256, 6, 4, 2, 704, 4096),
    "15m": Size(384, 8, 6, 2, 1024, 8192),
    "30m": Size(512, 10, 8, 4, 1280, 8192),
    "60m": Size(640, 12, 10, 5, 1536, 16384),
    "135m": Size(576, 30, 9, 3, 1536, 49152),
    "360m": Size(960, 32, 15, 5, 2560, 49152),
    "1b": Size(2048, 16, 32, 8, 8192, 128256, 8192),
}
DEFAULT_VOCABULARY = 8192


def vocabulary_of(size: str | None, config: dict | None) -> int:
    """How many tokens a trained tokenizer gets when nobody says."""
    if size is not None:
        return SIZES[size].vocabulary
    return int((config or {}).get("vocab_size", DEFAULT_VOCABULARY))
