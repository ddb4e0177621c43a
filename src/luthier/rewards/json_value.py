"""Rewards: the answer is JSON of the value that the row holds, or JSON that a schema allows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..errors import ConfigError, RewardError
from .reward import INSTALL, Completed, Given, PerCompletion

FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:^|\n)```", re.S)


class JsonValue(PerCompletion):
    """1 where the answer is JSON of the column's value: the order of keys and white space do not matter; else 0."""

    kind: Literal["json"] = "json"
    column: str = Field("answer", min_length=1)
    """Of the data: the right value, as JSON text or as it is."""
    fenced: bool = False
    """Read the last block between fences (```), where the answer has one."""

    def scorer(self, given: Given) -> Callable[[Completed], float]:
        from ..scores import is_json, json_equal
        from .scoring import column

        def score(answer: Completed) -> float:
            found = column(answer, self.column)
            wanted = found if isinstance(found, str) else json.dumps(found)
            if not is_json(wanted):
                raise RewardError(f"column {self.column!r} is no JSON: {wanted[:80]!r}")
            return json_equal(wanted, block(answer.completion) if self.fenced else answer.completion)

        return score


class JsonSchema(PerCompletion):
    """1 where the answer is JSON that the schema allows; else 0. Give one of the three places of a schema."""

    kind: Literal["json_schema"] = "json_schema"
    schema_inline: dict[str, Any] | None = None
    """The schema itself."""
    schema_file: str | None = None
    """Or a file that holds it."""
    schema_column: str | None = None
    """Or the data's column that holds each row's own, as JSON text or as it is."""
    fenced: bool = False
    """Read the last block between fences (```), where the answer has one."""

    def problem(self) -> str | None:
        places = ("schema_inline", "schema_file", "schema_column")
        given = [place for place in places if getattr(self, place) is not None]
        if len(given) != 1:
            return f"give one of {', '.join(places)}" + (f", not {' and '.join(given)}" if given else "")
        if find_spec("jsonschema") is None:
            return f"it needs the library jsonschema: {INSTALL}"
        if self.schema_column is None:
            try:
                validator(self._one())
            except (RewardError, ConfigError) as error:
                return f"{given[0]}: {error}"
        return None

    def _one(self) -> Any:
        if self.schema_file is None:
            return self.schema_inline
        try:
            return json.loads(Path(self.schema_file).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.schema_file} cannot be read as JSON: {error}") from None

    def scorer(self, given: Given) -> Callable[[Completed], float]:
        from ..scores import is_json
        from .scoring import column

        one = None if self.schema_column else validator(self._one())

        def score(answer: Completed) -> float:
            check: Any = one
            if self.schema_column:
                found = column(answer, self.schema_column)
                try:
                    check = validator(json.loads(found) if isinstance(found, str) else found)
                except (ValueError, RewardError) as error:
                    raise RewardError(f"column {self.schema_column!r}: {error}") from None
            text = block(answer.completion) if self.fenced else answer.completion
            return float(is_json(text) and check.is_valid(json.loads(text)))

        return score


def validator(schema: Any) -> Any:
    """What checks values against a schema; nothing that a schema points to is fetched from anywhere."""
    import jsonschema
    from referencing import Registry

    if not isinstance(schema, Mapping | bool):
        raise RewardError(f"a schema is an object, found {type(schema).__name__}")
    made: Any = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        made.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise RewardError(f"no JSON schema: {error.message}") from None
    return made(schema, registry=Registry())


def block(text: str) -> str:
    """The inside of the last fenced block, or the whole text where there is none."""
    found = FENCE.findall(text)
    return found[-1] if found else text
