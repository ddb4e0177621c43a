"""Step 2, models: load a network and its tokenizer; packed attention, heads and the fast path."""

from typing import Literal

from ..settings import Settings


class Model(Settings):
    """The base model."""

    name: str
    """A hub name, a folder, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    chat_template: str | None = None
    """A Jinja file, or `chatml`; by default the template that comes with the tokenizer."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model."""
    attention: Literal["auto", "packed", "padded"] = "auto"
    """`packed` refuses a family whose attention cannot be packed exactly; `auto` runs it padded and says so."""
