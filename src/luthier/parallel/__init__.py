"""Where and how the numbers are computed: device, ranks, activation checkpointing, compilation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..settings import Settings


class Parallel(Settings):
    """Never changes what is learnt, only where and how fast."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    """Compile every decoder layer; `auto` does on a GPU."""
    activation_checkpointing: int = Field(0, ge=0)
    """Recompute every n-th decoder layer in the backward pass: 1 all of them (least memory), 0 none (fastest)."""
    deterministic: bool = True
    """Choose the GPU's kernels that give the same bytes every time, so that a resumed run ends as one never stopped."""
