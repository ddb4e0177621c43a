"""What is pruned, by which measure and how far: the settings, checked without PyTorch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...settings import Settings

STRUCTURED = ("depth", "width")
SHAPES = {
    "depth": ("num_hidden_layers",),
    "width": ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
}


class Pruning(Settings):
    """One way of making a network smaller."""

    by: Literal["depth", "width", "wanda", "magnitude"]
    """Whole layers, or parts of all layers, go; or single weights become 0, by |weight| times the size of its input
    (arXiv:2306.11695), or by |weight| alone."""
    target: float | None = Field(None, gt=0, lt=1)
    """Share that stays: of the parameters outside of embeddings and head (depth, width), or of the weights of each
    linear layer (wanda, magnitude)."""
    shape: dict[str, int] = {}
    """Or exact sizes, by their keys in config.json: num_hidden_layers; hidden_size, intermediate_size,
    num_attention_heads, num_key_value_heads."""
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    """Of wanda and magnitude: any weights, or two of each four neighbours in a row, which GPUs have kernels for."""
    importance: Literal["block_influence", "perplexity"] = "block_influence"
    """Of depth: how little a layer turns its input (arXiv:2403.03853), or the perplexity without it
    (arXiv:2402.02834)."""
    dimensions: list[Literal["heads", "channels", "hidden"]] = Field(["channels", "hidden"], min_length=1)
    """Of width: which may shrink for `target`: groups of heads that share keys and values, feed-forward channels, the
    width of the residual stream."""
    multiple: int = Field(8, ge=1)
    """Of width: sizes of channels and hidden are multiples of it."""
    samples: int = Field(128, ge=1)
    """Rows that importance is measured on."""
    sample_tokens: int = Field(512, ge=2)
    """Of each of them, at most."""

    @property
    def structured(self) -> bool:
        return self.by in STRUCTURED

    @property
    def calibrated(self) -> bool:
        """Whether it looks at rows."""
        return self.by != "magnitude"

    def problems(self) -> list[str]:
        """All that does not go together."""
        found = []
        own = {"depth": ("importance",), "width": ("dimensions", "multiple"), "wanda": ("pattern",),
               "magnitude": ("pattern",)}  # fmt: skip
        for way, names in own.items():
            for name in names:
                given = name in self.model_fields_set and name not in own[self.by]
                if given and name not in " ".join(p.split(":")[0] for p in found):
                    found.append(f"--{name}: of --by {way}, and --by is {self.by}: leave it out")
        semi = self.pattern == "2:4"
        if semi and self.target not in (None, 0.5):
            found.append(f"--target={self.target:g}: --pattern 2:4 keeps two of four, 0.5: leave it out")
        if self.shape and self.target is not None:
            found.append("--target and --shape: give one of the two")
        if not self.shape and self.target is None and not semi:
            found.append("--target: required, the share that stays (for example 0.5)")
        if self.shape and not self.structured:
            found.append(f"--shape: single weights become 0 with --by {self.by}, and no size changes: use --target")
        known = SHAPES.get(self.by, ())
        for key, size in self.shape.items():
            if self.structured and key not in known:
                found.append(f"--shape {key}: --by {self.by} changes {', '.join(known)}")
            elif size < 1:
                found.append(f"--shape {key}={size}: at least 1")
        if self.shape and "dimensions" in self.model_fields_set:
            found.append("--dimensions: of --target; --shape names its own")
        return found
