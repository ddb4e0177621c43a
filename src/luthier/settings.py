"""The frozen, typed base of every config class; YAML and overrides as nested keys; the nearest name for a wrong one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from .errors import ConfigError


class Settings(BaseModel):
    """An unknown key is an error, a value is never converted in silence, and nothing changes after it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was most probably meant to be, or None."""
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """What a message about a wrong name ends in: the nearest known one, or `otherwise`."""
    return hint(nearest(name, known)) or otherwise


def hint(meant: str | None) -> str:
    return f"; did you mean {meant!r}?" if meant else ""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for two traps: `1e-4` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ConfigError(
                    f"{key.start_mark.name}, line {key.start_mark.line + 1}: {key.value!r} is given twice"
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str | Path) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            value = yaml.load(file, _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(value).__name__}")
    return value


def parse_override(text: str) -> dict:
    """`a.b=c` as nested keys; the value is read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise ConfigError(f"{text!r}: expected an override such as optim.learning_rate=1e-4")
    try:
        parsed: Any = yaml.load(value, _Loader) if value else None
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r}: the value is not YAML: {error}") from None
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def merged(under: Mapping, over: Mapping) -> dict:
    """Nested keys of `over` over those of `under`; a change of `kind` starts that section afresh."""
    out = dict(under)
    for key, value in over.items():
        before = out.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            fresh = "kind" in value and "kind" in before and value["kind"] != before["kind"]
            out[key] = dict(value) if fresh else merged(before, value)
        else:
            out[key] = value
    return out
