"""Step 2, models: load or start a network and its tokenizer; packed attention, heads and the fast path."""

import re
from pathlib import PurePath
from typing import Any, Literal

from pydantic import Field

from ..settings import Settings


class Beneath(Settings):
    """A saved adapter that lies frozen on the base."""

    path: str = Field(min_length=1)
    """Its folder, as `luthier export RUN OUT --as adapter` or PEFT's `save_pretrained` wrote it."""
    name: str | None = Field(None, pattern=r"^[\w-]+$")
    """By default the last part of its path."""
    share: float = 1.0
    """Factor of what it changes."""


class Model(Settings):
    """The base model: loaded weights, or a random start from a configuration."""

    name: str = ""
    """A hub name, a folder, or a .gguf file; not with `size` or `config`."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    init: Literal["loaded", "random"] | None = None
    """`loaded` goes on from the weights of `name`; `random` starts from its config.json alone, with the first values
    that the family gives itself, drawn by `seed`. `random` with `size` and `config`, else `loaded`."""
    size: Literal["tiny", "5m", "15m", "30m", "60m", "135m", "360m", "1b"] | None = None
    """A random start of Llama's architecture with about so many parameters."""
    config: dict[str, Any] | None = None
    """A random start from the keys of a config.json: `model_type` and what differs from that family's defaults."""
    tokenizer: str | None = None
    """A hub name, a folder, or `train`: byte-level BPE (arXiv:1508.07909) learnt from the training rows, never from
    held-out ones, and kept in the run's folder. `train` with `size` and `config`, else the one of `name`."""
    vocab_size: int | None = Field(None, ge=260)
    """Tokens of a tokenizer that is trained; by default what `size` is meant for, with `config` 8192."""
    new_tokens: list[str] = []
    """Tokens to add, such as <tool>. Their embeddings start at the mean of the old ones, and have to be trained."""
    new_tokens_special: bool = True
    """Special tokens are left out of decoded answers, and may not stand in the text of a row; plain ones may."""
    chat_template: str | None = None
    """A Jinja file, or `chatml`; by default the template that comes with the tokenizer."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""
    attention: Literal["auto", "packed", "padded"] = "auto"
    """`packed` refuses a family whose attention cannot be packed exactly; `auto` runs it padded and says so."""

    adapters: list[str | Beneath] = []
    """Saved adapters that lie frozen on the base, beneath what is trained: folders, or `{path, name, share}`."""

    @property
    def beneath(self) -> list[Beneath]:
        """The adapters, each with its name."""
        entries = [Beneath(path=e) if isinstance(e, str) else e for e in self.adapters]  # type: ignore[call-arg]
        return [e.model_copy(update={"name": e.name or re.sub(r"[^\w-]", "-", PurePath(e.path).name)}) for e in entries]

    @property
    def starts_at_random(self) -> bool:
        return self.init == "random"
