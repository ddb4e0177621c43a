"""Writes docs/configuration.md from the settings classes: run it after a setting was added or changed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from luthier.config import Config
from luthier.faults import is_section, nested

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """\
# Configuration

A run is a YAML file, `a.b=c` overrides on the command line, or both; later ones win. `luthier train --show-config`
prints what they come to, `luthier train --schema` a JSON schema for editors. `--method NAME` starts from that row
of `luthier methods`. `model: NAME` and `data: FILE` are short for `model.name` and `data.train`.
An unknown key is an error.

This page is written by `tools/make_configuration_page.py`.
"""


def rows(cls: type[BaseModel], prefix: str, known: frozenset[str] = frozenset()) -> list[str]:
    """A line for each setting of a class but the `known` ones; those of lists of settings under `name[]`."""
    made = []
    for name, field in cls.model_fields.items():
        inner = list(nested(field.annotation))
        if name == "kind" or name in known:
            continue
        if inner and is_section(field.annotation):  # of the run: a heading of its own
            made += [] if cls is Config else [line for one in inner for line in kind_and_rows(one, f"{prefix}{name}.")]
            continue
        default = "required" if field.default is PydanticUndefined else f"`{_yaml(field.default)}`"
        caption = " ".join((field.description or "").split()).replace("|", "\\|")
        made.append(f"| `{prefix}{name}` | {default} | {caption} |")
        for one in inner:  # of entries of a list
            made += kind_and_rows(one, f"{prefix}{name}[].")
    return made


def kind_and_rows(cls: type[BaseModel], prefix: str) -> list[str]:
    """The settings of a class inside a section, after the kind that chooses it."""
    if "kind" not in cls.model_fields:
        return rows(cls, prefix)
    what = " ".join((cls.__doc__ or "").split()).replace("|", "\\|")
    return [f"| `{prefix}kind` | `{cls.model_fields['kind'].default}` | {what} |", *rows(cls, prefix)]


def _yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def shared(kinds: list[type[BaseModel]]) -> type[BaseModel] | None:
    """The class of what all kinds of a section have in common, where they have one of their own."""
    above = [base for base in kinds[0].__mro__[1:] if all(issubclass(kind, base) for kind in kinds)]
    return above[0] if len(kinds) > 1 and getattr(above[0], "model_fields", None) else None


def page() -> str:
    lines = [HEAD, "## The run", "", "| key | default | meaning |", "| --- | --- | --- |", *rows(Config, "")]
    for name, field in Config.model_fields.items():
        kinds = list(nested(field.annotation))
        common, known = shared(kinds) if kinds else None, frozenset()
        if common is not None:
            known = frozenset(common.model_fields)
            lines += ["", f"## {name}, of any kind", "", "| key | default | meaning |", "| --- | --- | --- |"]
            lines += rows(common, f"{name}.")
        for cls in kinds:
            caption = " ".join((cls.__doc__ or "").split())
            kind = f" ({cls.model_fields['kind'].default})" if "kind" in cls.model_fields else ""
            lines += ["", f"## {name}{kind}", "", caption, "", "| key | default | meaning |", "| --- | --- | --- |"]
            if kind:
                lines.append(f"| `{name}.kind` | `{cls.model_fields['kind'].default}` | which answer on this axis |")
            lines += rows(cls, f"{name}.", known)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE}\n")
