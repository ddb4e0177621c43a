"""A labelling as a YAML file: the task, the rules, the model that is asked; strict, with the nearest name for a wrong one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from ...errors import ConfigError
from ...settings import Settings, merged, nearest, parse_override, read_yaml
from .judge import Judge
from .rules import Rules
from .tasks import TASKS, AnyTask, Edit, Preference


class Plan(Settings):
    """What is asked of rows, and of whom."""

    task: AnyTask
    rules: Rules | None = None
    """For `luthier data label rules`."""
    judge: Judge | None = None
    """For `luthier data label model`."""
    existing: Literal["refuse", "replace", "keep"] = "refuse"
    """What becomes of a row that has a label already, where rules or a model label. `keep` leaves it as it is."""

    def wanting(self, way: Literal["rules", "judge"]) -> list[str]:
        """What a way of labelling lacks."""
        section = getattr(self, way)
        if section is None:
            return [f"{way}: required, and not given (see docs/data/label.md)"]
        labels = getattr(self.task, "labels", [])
        if way == "rules":
            if isinstance(self.task, Preference | Edit):
                return [f"task.kind={self.task.kind!r}: rules label classes and spans"]
            return section.problems(labels, self.task.kind)
        if isinstance(self.task, Edit):
            return ["task.kind='edit': a model that writes answers is `luthier data augment`; a person edits them here"]
        return section.problems()


def plan(*sources: str | Path | Mapping) -> Plan:
    """A checked plan from YAML files, mappings and `a.b=c` overrides, later ones over earlier ones."""
    values: dict = {}
    for source in sources:
        if isinstance(source, Mapping):
            read = dict(source)
        elif isinstance(source, str) and "=" in source and not Path(source).exists():
            read = parse_override(source)
        else:
            read = read_yaml(source)
        values = merged(values, read)
    if "task" not in values:
        raise ConfigError("task: required, and not given (for example `task: {kind: classes, labels: [spam, ham]}`)")
    try:
        return Plan.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_explained(fault) for fault in error.errors()]) from None


def _explained(fault: Any) -> str:
    """A fault as pydantic tells it: the field, the value, and what was probably meant."""
    parts: list[str] = []
    owners: list[type[BaseModel]] = [Plan]
    at = fault["loc"][:-1] if fault["type"] == "extra_forbidden" else fault["loc"]
    for part in at:
        if isinstance(part, int):
            parts[-1] += f"[{part}]"
            continue
        fields = [owner.model_fields[part] for owner in owners if part in owner.model_fields]
        if fields:
            parts.append(part)
            owners = [inner for field in fields for inner in _nested(field.annotation)]
        else:  # the tag of a union
            owners = [
                owner for owner in owners if "kind" in owner.model_fields and owner.model_fields["kind"].default == part
            ]
    where = ".".join(parts)
    if fault["type"] == "extra_forbidden":
        known = sorted({name for owner in owners for name in owner.model_fields})
        meant = nearest(str(fault["loc"][-1]), known)
        hint = f"did you mean {meant!r}?" if meant else f"known are {', '.join(known)}"
        return f"{where}{'.' if where else ''}{fault['loc'][-1]}: unknown key; {hint}"
    if fault["type"].startswith("union_tag"):
        given = str(fault.get("ctx", {}).get("tag", ""))
        meant = nearest(given, TASKS)
        hint = f"; did you mean {meant!r}?" if meant else ""
        return f"{where}.kind: should be one of {', '.join(TASKS)}" + (f", not {given!r}{hint}" if given else "")
    if fault["type"] == "missing":
        return f"{where}: required, and not given"
    text = fault["msg"].removeprefix("Value error, ").replace("Input should be ", "should be ")
    return f"{where}: {text}" + ("" if fault["type"] == "value_error" else f" (found {fault['input']!r})")


def _nested(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _nested(argument)
