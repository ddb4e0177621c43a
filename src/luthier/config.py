"""Configuration: read from YAML and overrides, and checked whole before anything heavy is loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from . import resolution
from .contradictions import contradictions
from .errors import CheckpointError, ConfigError
from .faults import explained, place
from .fields import Config
from .methods import METHODS
from .settings import did_you_mean, merged, parse_override, read_yaml

SHORT = {
    "model": "name", "data": "train", "trainable": "kind", "objective": "kind", "precision": "kind", "optim": "kind",
    "schedule": "kind", "clipping": "kind", "averaging": "kind",
}  # fmt: skip
DEFAULT_KINDS = {  # of sections that name no kind
    "optim": "adamw", "schedule": "linear", "clipping": "norm", "precision": "as_loaded",
}  # fmt: skip


def _expanded(values: Mapping) -> dict:
    """`model: NAME` and the like stand for the section's main key."""
    return {k: {SHORT[k]: v} if k in SHORT and isinstance(v, str | list) else v for k, v in values.items()}


def _with_kinds(values: dict) -> dict:
    """Sections that may leave their kind out, with it; a schedule-free optimiser's schedule is constant."""
    out = dict(values)
    for section, kind in DEFAULT_KINDS.items():
        given = values.get(section)
        if section == "schedule" and (values.get("optim") or {}).get("kind") == "schedule_free_adamw":
            kind, given = "constant", given or {}
        if isinstance(given, Mapping) and "kind" not in given:
            out[section] = {"kind": kind, **given}
    return out


def gathered(*sources: str | Path | Mapping) -> tuple[dict, list[str]]:
    """The nested keys of all sources, later ones over earlier ones, as they are given; and what cannot be read."""
    values: dict = {}
    problems: list[str] = []
    for source in sources:
        try:
            if isinstance(source, Mapping):
                read = dict(source)
            elif isinstance(source, str) and "=" in source:
                read = parse_override(source)
            else:
                read = read_yaml(source)
            values = merged(values, _expanded(read))
        except ConfigError as error:
            problems += error.problems
    return values, problems


def configure(
    *sources: str | Path | Mapping, method: str | None = None, weights: bool = True, training: bool = True
) -> Config:  # fmt: skip
    """A checked Config from YAML files, mappings and `a.b=c` overrides, later ones over earlier ones.

    Everything that is wrong is told at once, in a ConfigError. Without `weights`, a model's folder may lack them, as
    for `luthier explain`; without `training`, what a run learnt from and with may have gone.
    """
    values, problems = gathered(*sources)
    name = method or values.get("method") or "lora"
    values["method"] = name
    if not isinstance(name, str) or name not in METHODS:
        meant = did_you_mean(str(name), METHODS)
        problems.append(f"method: {name!r} is unknown{meant} (known: {', '.join(METHODS)})")
        values["method"] = name = "lora"
    for axis, kind in METHODS[name].fixed.items():
        given = values.get(axis)
        if kind == "as_loaded":  # what any method is without a word about precision
            continue
        if isinstance(given, Mapping) and given.get("kind", kind) != kind:
            fitting = _named(METHODS[name].kinds, values, axis)
            if axis == "precision" and not fitting:
                continue  # any method over any precision, where that has no name of its own
            remedy = (
                f"use method={fitting[0]}"
                if fitting
                else f"known are {sorted({m.kinds[axis] for m in METHODS.values()})}"
            )
            problems.append(
                f"{axis}.kind: {given['kind']!r} does not go with method={name}, which is {kind!r}; {remedy}"
            )
            values[axis] = {"kind": kind}
    values = _with_kinds(merged(METHODS[name].settings, values))
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        faults = error.errors()
        raise ConfigError(problems + explained(faults) + _contradictions_of_the_rest(values, faults)) from None
    config = resolution.by_settings(config)
    problems += contradictions(config, weights, training)
    if problems:
        raise ConfigError(problems)
    return config


def _named(kinds: dict[str, str], values: Mapping, axis: str) -> list[str]:
    """The methods that are what `values` ask for instead of `kinds`; of a precision those of this very point only."""
    point = {a: (values.get(a) or {}).get("kind", kind) for a, kind in kinds.items()}
    if axis == "precision":
        return [m.name for m in METHODS.values() if m.kinds == point]
    shared = {axis} if axis == "objective" else {axis, "objective"}
    return [m.name for m in METHODS.values() if all(m.kinds.get(a) == point[a] for a in shared)]


def read_run(folder: Path) -> Config:
    """The configuration that a run's folder was made with; what only its training needed may have gone."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no folder of a run: it has no config.yaml")
    return configure(path, {"output_dir": str(folder)}, training=False)


def _contradictions_of_the_rest(values: Mapping, faults: list) -> list[str]:
    """What else is wrong with a configuration once its faulty keys are left out, if that can be told."""
    rest = copy.deepcopy(dict(values))
    for path in {place(fault)[0] for fault in faults}:
        *parents, last = path.split(".")
        section: Any = rest
        for part in parents:
            section = section.get(part, {}) if isinstance(section, Mapping) else {}
        if isinstance(section, dict):
            section.pop(last, None)
    try:
        return contradictions(Config.model_validate(rest))
    except ValidationError:
        return []


def schema() -> dict:
    """JSON schema of the YAML file, for editors. What a method's row gives need not be written."""
    made = Config.model_json_schema()
    made["required"] = ["model", "data"]
    made["properties"]["method"]["enum"] = sorted(METHODS)
    for section, kind in DEFAULT_KINDS.items():  # a section without a kind is the default's
        for other, reference in made["properties"][section]["discriminator"]["mapping"].items():
            if other != kind:
                cls = made["$defs"][reference.rpartition("/")[2]]
                cls["required"] = sorted({*cls.get("required", []), "kind"})
    for section, main in SHORT.items():
        made["properties"][section] = {"anyOf": [made["properties"][section], {"type": "string", "description": main}]}
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return made
