"""What is made of given rows: the ways, the model that is asked, the seed; a YAML file and overrides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from ...data import formats
from ...errors import ConfigError
from ...settings import Settings, merged, nearest, parse_override, read_yaml
from ..recipe import _explained as explained
from . import WAYS
from .answering import Answering, Own, Server
from .preferences import Preferences
from .way import Way


class Augmentation(Settings):
    """A recipe of new rows. Ways act on the given rows, never on what another way made."""

    ways: dict[str, Any] = {}
    """By their kinds, each with its settings."""
    model: Answering | None = None
    """Who is asked: `{kind: openai, base_url, name}`, or `{kind: luthier, name}` of a run or model."""
    columns: dict[str, str] = {}
    """Columns by the names that formats know, as in data.columns: `{text: review, label: stars}`."""
    given: bool | None = None
    """Write the given rows, too, each before its new ones. By default yes, but for pairs, which are other rows."""
    validation: list[str] = []
    """Rows that are held out: a given row with the input of one is neither copied nor augmented; a new one goes."""
    overlap: float = Field(0.8, gt=0.0, le=1.0)
    """From which share of a held-out row's runs of 13 words a row counts as having its input."""
    seed: int = Field(0, ge=0)
    """Another one makes other rows."""
    cache: str | None = None
    """A folder for answers of models, which other runs may share; by default beside the output."""

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: dict[str, str]) -> dict[str, str]:
        if problem := formats.wrong_columns(columns):
            raise ValueError(problem.removeprefix("data.columns: "))
        return columns

    @property
    def writes_given(self) -> bool:
        return not any(way.whole for way in self.ways.values()) if self.given is None else self.given

    def dump(self) -> str:
        """YAML that is read as this recipe."""
        ways = {
            kind: way.model_dump(mode="json", exclude={"kind"}, exclude_defaults=True)
            for kind, way in self.ways.items()
        }  # fmt: skip
        told = self.model_dump(mode="json", exclude={"ways"}, exclude_defaults=True)
        if self.model is not None:  # else it does not say which it is
            told["model"]["kind"] = self.model.kind
        return yaml.safe_dump(told | {"ways": ways}, sort_keys=False, allow_unicode=True)

    def told(self) -> dict:
        """Everything that decides what is made, as JSON; not how many requests go at a time, nor where answers lie."""
        how = {"parallel", "timeout", "retries", "api_key_env"}
        asked = None if self.model is None else self.model.model_dump(mode="json", exclude=how)
        judges = {k: {"judge": w.judge.model_dump(mode="json", exclude=how)} for k, w in self.ways.items()
                  if isinstance(w, Preferences) and w.judge is not None}  # fmt: skip
        return {
            "ways": {kind: way.told() | judges.get(kind, {}) for kind, way in self.ways.items()},
            "order": list(self.ways), "model": asked, "columns": self.columns, "given": self.writes_given,
            "seed": self.seed, "overlap": self.overlap,
        }  # fmt: skip

    def problems(self) -> list[str]:
        """What is wrong beyond its form; nothing heavy is loaded."""
        if not self.ways:
            return [f"ways: none is given; known are {', '.join(WAYS)}"]
        found = [text for way in self.ways.values() if (text := way.problem())]
        asking = [kind for kind, way in self.ways.items() if way.asks]
        if asking and self.model is None:
            found.append(f"model: {asking[0]} asks one: give --model RUN, or --base-url ADDRESS --model NAME")
        if self.model is not None:
            if not asking:
                found.append(f"model: given, but none of the ways ({', '.join(self.ways)}) asks one")
            elif text := self.model.problem():
                found.append(f"model: {text}")
        whole = [kind for kind, way in self.ways.items() if way.whole]
        if whole and len(self.ways) > 1:
            found.append(f"ways: {whole[0]} makes rows of another kind than other ways: give it its own output")
        if whole and self.given:
            found.append(f"given: {whole[0]} makes rows of another kind than the given ones: leave it out")
        drawn = self.ways.get("preferences")
        if drawn is not None and self.model is not None and self.model.temperature == 0:
            found.append("model.temperature: 0 gives preferences the same answer each time: give more")
        instructed = self.ways.get("self_instruct")
        if instructed is not None and (instructed.copies, instructed.share) != (1, 1):
            found.append("ways.self_instruct: it makes `count` rows in all: leave out copies and share")
        return found

    def models(self) -> dict[str, Server | Own]:
        """Those that are asked, by what questions call them."""
        judged = self.ways.get("preferences")
        judge = None if judged is None else judged.judge
        return {name: one for name, one in (("model", self.model), ("judge", judge)) if one is not None}


def augmentation(*sources: str | Path | Mapping) -> Augmentation:
    """A checked recipe from YAML files, mappings and `a.b=c` overrides, later ones over earlier ones."""
    values: dict = {}
    for source in sources:
        if isinstance(source, Mapping):
            read: dict = dict(source)
        elif isinstance(source, str) and "=" in source:
            read = parse_override(source)
        else:
            read = read_yaml(source)
        values = merged(values, _written_out(read))
    given = values.get("ways", {})
    if not isinstance(given, Mapping):
        raise ConfigError("ways: expected kinds of ways with their settings, such as `characters: {rate: 0.05}`")
    problems: list[str] = []
    values["ways"] = {kind: made for kind, way in given.items() if (made := _way(kind, way, problems)) is not None}
    try:
        made = Augmentation.model_validate(values)
    except ValidationError as error:
        raise ConfigError([*explained(error, "", _section(error)), *problems]) from None
    if problems := problems or made.problems():
        raise ConfigError(problems)
    return made


def _written_out(read: dict) -> dict:
    """Short forms in full: `ways: [characters, words]`, `validation: held-out.jsonl`."""
    ways, held = read.get("ways"), read.get("validation")
    if isinstance(ways, list) and all(isinstance(kind, str) for kind in ways):
        read = read | {"ways": dict.fromkeys(ways)}
    return read | {"validation": [held]} if isinstance(held, str) else read


def _section(error: ValidationError) -> type[Settings]:
    """Whose keys are meant where one is unknown: the model's, where the first fault is there."""
    place = error.errors()[0]["loc"]
    of = {"openai": Server, "luthier": Own}
    return next((of[str(part)] for part in place if str(part) in of), Augmentation)


def _way(kind: str, settings: Any, problems: list[str]) -> Way | None:
    if kind not in WAYS:
        meant = nearest(str(kind), WAYS)
        hint = f"; did you mean {meant!r}?" if meant else ""
        problems.append(f"ways.{kind}: there is no such way{hint} (known: {', '.join(WAYS)})")
        return None
    if settings is not None and not isinstance(settings, Mapping):
        problems.append(f"ways.{kind}: expected settings, such as {{copies: 2}}, found {settings!r}")
        return None
    try:
        return WAYS[kind].model_validate(dict(settings or {}))
    except ValidationError as error:
        problems += explained(error, f"ways.{kind}.", WAYS[kind])
        return None
