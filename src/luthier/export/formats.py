"""The formats of an export: for each what it is, who writes it, and in which types of numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A row of the table. Its `home`, a file beside this one, has

    - `check(source, config, kind, dtype)`: ExportError for what can be refused before anything heavy is loaded;
      `config` is a run's, None of a plain model;
    - `write(opened, out, kind, dtype) -> dict`: writes into the folder `out`, loads it again with the format's reader
      and returns what was compared; ExportError where it answers otherwise.
    """

    name: str
    caption: str
    home: str
    runs_only: bool = False
    """Whether only a run can be written so, and not a model in a folder."""
    dtypes: tuple[str, ...] = ()
    """What `dtype` may be."""


TABLE = (
    Format("adapter", "a run's adapter in PEFT's layout", "plain", runs_only=True),
    Format("merged", "base and adapter in one, as transformers reads it", "plain", True, ("float32", "bfloat16")),
    Format("full", "a model trained whole or in part, or a plain one", "plain", dtypes=("float32", "bfloat16")),
    Format("quantised", "a run with precision.kind=qat, in 4 or 8 bits", "integers", runs_only=True),
)  # fmt: skip
FORMATS = {form.name: form for form in TABLE}
KINDS = tuple(FORMATS)
