"""A recipe: which checks a set goes through, in which order, and what is done about what they find; a YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from ..data import formats
from ..errors import ConfigError
from ..settings import Settings, hint, merged, nearest, parse_override, read_yaml
from .checks import CHECKS
from .checks.check import Check

TAGS = ("openai", "luthier")  # of the union of who is asked, which are no part of a key


class Recipe(Settings):
    """What an audit looks for and `luthier data clean` acts on. Its checks act in the order in which they stand."""

    model: str | None = None
    """Whose tokens lengths are counted in: a name on the hub, a folder or a GGUF file."""
    columns: dict[str, str] = {}
    """Columns by the names that formats know, as in data.columns: `{text: review, label: stars}`."""
    checks: dict[str, Any] = Field(
        default_factory=lambda: {kind: check.model_validate({}) for kind, check in CHECKS.items() if check.by_default}
    )
    """By their kinds, each with its settings; one that is not named is left out. All of them by default."""

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: dict[str, str]) -> dict[str, str]:
        if problem := formats.wrong_columns(columns):
            raise ValueError(problem.removeprefix("data.columns: "))
        return columns

    def given(self) -> dict[str, str]:
        """What checks are prepared with."""
        if self.model is None:
            return {}
        return {"model": self.model, "tokenizer": _tokenizer(self.model)}

    def dump(self) -> str:
        """YAML that is read as this recipe: what stands as it does by default is left out."""
        checks = {
            kind: {"action": check.action}
            | check.model_dump(mode="json", exclude={"kind", "action"}, exclude_defaults=True)
            for kind, check in self.checks.items()
        }
        told = self.model_dump(mode="json", exclude={"checks"}, exclude_defaults=True) | {"checks": checks}
        return yaml.safe_dump(told, sort_keys=False, allow_unicode=True)

    def told(self) -> dict:
        """Everything that decides what is done, as JSON."""
        whole = {kind: check.model_dump(mode="json") for kind, check in self.checks.items()}
        read = {kind: inputs for kind, check in self.checks.items() if (inputs := check.inputs())}
        return {"model": self.model, "columns": self.columns, "order": list(self.checks), "checks": whole, "read": read}


def recipe(*sources: str | Path | Mapping) -> Recipe:
    """A checked recipe from YAML files, mappings and `a.b=c` overrides, later ones over earlier ones.

    Overrides without a recipe change the default one; a check that they name is added to a recipe that lacks it.
    """
    values: dict = {}
    whole = False  # whether checks were listed by a file
    for source in sources:
        if isinstance(source, Mapping):
            read, listed = dict(source), True
        elif isinstance(source, str) and "=" in source:
            read, listed = parse_override(source), False
        else:
            read, listed = read_yaml(source), True
        whole = whole or (listed and "checks" in read)
        values = merged(values, read)
    problems: list[str] = []
    given = values.get("checks", {})
    if not isinstance(given, Mapping):
        raise ConfigError(
            "checks: expected the kinds of checks with their settings, such as `encoding: {action: repair}`"
        )
    standing = [kind for kind, check in CHECKS.items() if check.by_default or kind in given]
    named = list(given) if whole else [*standing, *(kind for kind in given if kind not in CHECKS)]
    values["checks"] = {kind: made for kind in named if (made := _check(kind, given.get(kind), problems)) is not None}
    try:
        made = Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError([*_explained(error, "", Recipe), *problems]) from None
    if problems:
        raise ConfigError(problems)
    lengths = made.checks.get("length")
    if lengths is not None and lengths.unit == "tokens" and made.model is None:
        raise ConfigError("checks.length.unit: tokens are those of a model: give --model, or model in the recipe")
    if "perplexity" in made.checks and made.model is None:
        raise ConfigError("checks.perplexity: it is that of a model: give --model, or model in the recipe")
    return made


def _check(kind: str, settings: Any, problems: list[str]) -> Check | None:
    if kind not in CHECKS:
        meant = nearest(str(kind), CHECKS)
        hint = f"; did you mean {meant!r}?" if meant else ""
        problems.append(f"checks.{kind}: there is no such check{hint} (known: {', '.join(CHECKS)})")
        return None
    if isinstance(settings, str):  # `encoding: repair`
        settings = {"action": settings}
    if settings is not None and not isinstance(settings, Mapping):
        problems.append(f"checks.{kind}: expected settings, such as {{action: drop}}, found {settings!r}")
        return None
    try:
        return CHECKS[kind].model_validate(dict(settings or {}))
    except ValidationError as error:
        problems += _explained(error, f"checks.{kind}.", CHECKS[kind])
        return None


def _explained(error: ValidationError, before: str, of: type[Settings]) -> list[str]:
    """Each problem with the key that it is about, and what was meant."""
    made = []
    for fault in error.errors():
        place = before + ".".join(map(str, [part for part in fault["loc"] if part not in TAGS]))
        if fault["type"] == "extra_forbidden":
            meant = nearest(str(fault["loc"][-1]), of.model_fields)
            known = f"did you mean {meant!r}?" if meant else f"known are {', '.join(of.model_fields)}"
            made.append(f"{place}: unknown; {known}")
        elif fault["type"].startswith("union_tag"):
            known = re.findall(r"'([^']*)'", str(fault.get("ctx", {}).get("expected_tags", "")))
            given = str(fault.get("ctx", {}).get("tag", ""))
            said = f", not {given!r}" if given else ""
            made.append(f"{place}.kind: should be one of {', '.join(known)}{said}{hint(nearest(given, known))}")
        else:
            text = fault["msg"].removeprefix("Value error, ")
            shown = "" if fault["type"] == "value_error" else f" (found {fault['input']!r})"
            made.append(f"{place.rstrip('.')}: {text[:1].lower()}{text[1:]}{shown}")
    return made


def _tokenizer(name: str) -> str:
    """The tokenizer of a model, in the JSON of `tokenizers`: as it stands in a folder, else as training reads it."""
    file = Path(name).expanduser() / "tokenizer.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    from ..models import Model
    from ..models.load import load_tokenizer

    return load_tokenizer(Model(name=name)).backend_tokenizer.to_str()  # type: ignore[call-arg]


def prepared(checks: Sequence[Check], given: Mapping[str, str]) -> list[Check]:
    return [check.prepared(given) for check in checks]
