"""JSON schemas as grammars: every answer of the grammar is valid, and what cannot be kept to is refused by name.

https://json-schema.org/draft/2020-12. Properties come in the schema's order; spaces between values are few.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from . import numbers, patterns, strings
from .expressions import EMPTY, Bytes, Choice, Grammar, Literal, Node, Repeat, Rule, Unsupported, byte_set, optional
from .expressions import Sequence as InOrder

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
SILENT = {
    "title", "description", "default", "examples", "example", "$comment", "$schema", "$id", "$anchor", "deprecated",
    "readOnly", "writeOnly", "$defs", "definitions", "contentMediaType", "contentEncoding", "strict", "discriminator",
}  # fmt: skip
"""What says nothing about whether a value is valid."""
OF_TYPE = {
    "object": {"properties", "required", "additionalProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
OF_TYPE["integer"] = OF_TYPE["number"]
ANY = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}
KNOWN = SILENT | ANY | set().union(*OF_TYPE.values())
DEEPEST = 64  # of a schema
MOST_CHARACTERS = 20_000  # that a string may have to have
MOST_ITEMS = 10_000
MOST_PARTS = 20_000  # of a schema, with all that it refers to

BASE = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"
TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
FORMATS = {
    "date": rf"^{BASE.replace('[0-9]{4}', '(1[0-9]{3}|2[0-9]{3})')}$",
    "time": rf"^{TIME}$",
    "date-time": rf"^{BASE.replace('[0-9]{4}', '(1[0-9]{3}|2[0-9]{3})')}T{TIME}$",
    "uuid": r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
    "email": r"^[A-Za-z0-9_+-]{1,32}(\.[A-Za-z0-9_+-]{1,32}){0,3}@[A-Za-z0-9]{1,32}(\.[A-Za-z0-9]{1,32}){1,3}$",
    "ipv4": rf"^{BYTE}(\.{BYTE}){{3}}$",
    "ipv6": r"^[0-9a-f]{1,4}(:[0-9a-f]{1,4}){7}$",
    "hostname": r"^[a-z0-9]{1,32}(\.[a-z0-9]{1,32}){0,4}$",
    "uri": r"^https?://[a-z0-9]{1,32}(\.[a-z0-9]{1,32}){0,4}(/[A-Za-z0-9_.~-]{0,64}){0,8}$",
    "duration": r"^P[0-9]{1,4}D$|^PT[0-9]{1,4}[HMS]$",
}
"""Some texts of each format, enough for an answer; formats that are not here say nothing, as in JSON Schema itself."""
WIDE = {
    "duration": r"^P([0-9]{1,4}Y)?([0-9]{1,4}M)?[0-9]{1,4}D$|"
    r"^PT([0-9]{1,4}H)?([0-9]{1,4}M)?[0-9]{1,4}S$|^P[0-9]{1,4}W$",
}
FORMATS |= WIDE

BLANKS = Bytes(byte_set(b" \t"))
SPACE = Choice((EMPTY, Literal(b" "), InOrder((Literal(b"\n"), Repeat(BLANKS, 0, 32)))))
COMMA = InOrder((Literal(b","), SPACE))
COLON = InOrder((Literal(b":"), SPACE))


def json_object() -> Grammar:
    """Any object."""
    return Grammar(InOrder((optional(Literal(b" ")), _Free().object)))


def of_schema(schema: Mapping | bool) -> Grammar:
    """Raises Unsupported, naming the keyword and where it stands."""
    return Grammar(InOrder((optional(Literal(b" ")), node_of(schema))))


def node_of(schema: Mapping | bool) -> Node:
    return _Schema(schema).node(schema, "schema")


# ---------------------------------------------------------------------------- any value


class _Free:
    """Values of no schema."""

    def __init__(self) -> None:
        self.value = Rule("value")
        member = InOrder((strings.string(), COLON, self.value))
        self.object = Rule("object", _enclosed(b"{", b"}", [_list(member, 0, None)]))
        self.array = Rule("array", _enclosed(b"[", b"]", [_list(self.value, 0, None)]))
        words = [Literal(word) for word in (b"true", b"false", b"null")]
        self.value.body = Choice((self.object, self.array, strings.string(), numbers.number(), *words))


def _enclosed(before: bytes, after: bytes, options: Sequence[Node]) -> Node:
    inner = options[0] if len(options) == 1 else Choice(options)
    return InOrder((Literal(before), SPACE, inner, SPACE, Literal(after)))


def _list(item: Node, low: int, high: int | None) -> Node:
    """Items with commas between."""
    if high == 0:
        return EMPTY
    more = InOrder((COMMA, item))
    some = InOrder((item, Repeat(more, max(low - 1, 0), None if high is None else high - 1)))
    return some if low else optional(some)


# ---------------------------------------------------------------------------- schemas


class _Schema:
    def __init__(self, root: Mapping | bool):
        self.root = root
        self.rules: dict[str, Rule] = {}
        self.free: _Free | None = None
        self.parts = 0

    def node(self, schema: Any, where: str, depth: int = 0) -> Node:
        self.parts += 1
        if depth > DEEPEST or self.parts > MOST_PARTS:
            raise Unsupported(f"{where[:200]}: the schema is nested more than {DEEPEST} deep, or too large")
        if schema is True or schema == {}:
            return self._anything()
        if schema is False:
            raise Unsupported(f"{where}: false allows nothing")
        if not isinstance(schema, Mapping):
            raise Unsupported(f"{where} is no schema: an object, true or false")
        unknown = sorted(key for key in schema if key not in KNOWN and not key.startswith("x-"))
        if unknown:
            raise Unsupported(f"{where}: {unknown[0]!r} is not supported")
        for combined in ("$ref", "allOf", "anyOf", "oneOf"):
            if combined in schema:
                return self._combined(combined, schema, where, depth)
        if "const" in schema or "enum" in schema:
            return self._listed(schema, where)
        return self._typed(schema, where, depth)

    def _anything(self) -> Node:
        self.free = self.free or _Free()
        return self.free.value

    # ------------------------------------------------------------------ of several schemas
    def _combined(self, key: str, schema: Mapping, where: str, depth: int) -> Node:
        rest = {k: v for k, v in schema.items() if k != key and k not in SILENT}
        if key == "$ref":
            if rest:
                return self.node(self._merged([self._resolved(schema[key], where), rest], where), where, depth + 1)
            return self._reference(schema[key], where, depth)
        options = schema[key]
        if not isinstance(options, list) or not options:
            raise Unsupported(f"{where}: {key} is no list of schemas")
        options = [self._followed(option, where) for option in options] if rest or key == "allOf" else options
        if key == "allOf":
            return self.node(self._merged([*options, rest], where), where, depth + 1)
        if rest:
            options = [self._merged([option, rest], where) for option in options]
        if key == "oneOf":
            self._exclusive([self._followed(option, where) for option in options], where)
        return Choice([self.node(option, f"{where}.{key}[{i}]", depth + 1) for i, option in enumerate(options)])

    def _reference(self, name: Any, where: str, depth: int) -> Node:
        target = self._resolved(name, where)
        if name not in self.rules:
            made = self.rules[name] = Rule(name)
            made.body = self.node(target, name, depth + 1)
        return self.rules[name]

    def _resolved(self, name: Any, where: str) -> Any:
        if not isinstance(name, str) or not (name == "#" or name.startswith("#/")):
            raise Unsupported(f"{where}: $ref {str(name)[:80]!r} leads out of the schema")
        at: Any = self.root
        for step in name[2:].split("/") if name != "#" else []:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(at, Mapping) and step in at:
                at = at[step]
            elif isinstance(at, list) and step.isdigit() and int(step) < len(at):
                at = at[int(step)]
            else:
                raise Unsupported(f"{where}: $ref {name[:80]!r} is not there")
        return at

    def _followed(self, schema: Any, where: str) -> Any:
        """What a schema that is only a reference refers to."""
        for _ in range(DEEPEST):
            if not (isinstance(schema, Mapping) and "$ref" in schema and not set(schema) - SILENT - {"$ref"}):
                return schema
            schema = self._resolved(schema["$ref"], where)
        raise Unsupported(f"{where}: $ref refers to itself")

    def _merged(self, schemas: Sequence[Any], where: str) -> dict:
        """One schema that says what all of these say."""
        made: dict[str, Any] = {}
        for schema in schemas:
            schema = self._followed(schema, where)
            if schema is True:
                continue
            if not isinstance(schema, Mapping):
                raise Unsupported(f"{where}: a part that allows nothing, or is no schema")
            if "additionalProperties" in schema or "additionalProperties" in made:
                closed = [s for s in (made, schema) if s.get("additionalProperties", True) is not True]
                keys = [set(s.get("properties", {})) for s in (made, schema)]
                if closed and made and set(schema) - SILENT and keys[0] != keys[1]:
                    raise Unsupported(f"{where}: parts with different properties and additionalProperties")
            for key, value in schema.items():
                if key in SILENT:
                    continue
                if key not in made or made[key] == value:
                    made[key] = value
                elif key == "properties" and isinstance(value, Mapping):
                    both = {name: {"allOf": [made[key][name], value[name]]} for name in value if name in made[key]}
                    made[key] = {**made[key], **value, **both}
                elif key == "required" and isinstance(value, list):
                    made[key] = [*made[key], *(name for name in value if name not in made[key])]
                elif key in ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"):
                    made[key] = max(made[key], value)
                elif key in ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"):
                    made[key] = min(made[key], value)
                elif key == "type":
                    made[key] = self._both_types(made[key], value, where)
                elif key == "enum" and isinstance(value, list):
                    made[key] = [one for one in made[key] if any(_same(one, other) for other in value)]
                else:
                    raise Unsupported(f"{where}: {key!r} is said twice, differently")
        return made

    def _both_types(self, one: Any, other: Any, where: str) -> list[str]:
        one, other = ([kind] if isinstance(kind, str) else kind for kind in (one, other))
        both = [kind for kind in one if kind in other]
        if "integer" not in both and ("integer" in one or "integer" in other) and "number" in (*one, *other):
            both.append("integer")
        if not both:
            raise Unsupported(f"{where}: types {one} and {other} have nothing in common")
        return both

    def _exclusive(self, options: Sequence[Any], where: str) -> None:
        """Raises where a value might be of two options of a oneOf."""
        for i, one in enumerate(options):
            for other in options[:i]:
                if not self._apart(one, other):
                    raise Unsupported(
                        f"{where}: a value could be of two options of oneOf; give them different types, or a required "
                        "property with a const of its own, or use anyOf"
                    )

    def _apart(self, one: Any, other: Any) -> bool:
        if not isinstance(one, Mapping) or not isinstance(other, Mapping):
            return False
        values = [self._values(schema) for schema in (one, other)]
        if values[0] is not None and values[1] is not None:
            return not any(_same(a, b) for a in values[0] for b in values[1])
        kinds = [_types(schema) for schema in (one, other)]
        if kinds[0] and kinds[1]:
            wide = [{*k, "number"} if "integer" in k else set(k) for k in kinds]
            if not wide[0] & wide[1]:
                return True
        shared = set(one.get("required", ())) & set(other.get("required", ()))
        for name in shared:
            parts = [self._followed(s.get("properties", {}).get(name, True), "oneOf") for s in (one, other)]
            found = [self._values(part) if isinstance(part, Mapping) else None for part in parts]
            if None not in found and not any(_same(a, b) for a in found[0] for b in found[1]):  # type: ignore[union-attr]
                return True
        return False

    def _values(self, schema: Mapping) -> list | None:
        if "const" in schema:
            return [schema["const"]]
        return schema["enum"] if isinstance(schema.get("enum"), list) else None

    # ------------------------------------------------------------------ of one
    def _listed(self, schema: Mapping, where: str) -> Node:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list) or not values:
            raise Unsupported(f"{where}: enum is no list of values")
        rest = {key: value for key, value in schema.items() if key not in SILENT}
        fitting = [value for value in values if _valid(value, rest)]
        if not fitting:
            raise Unsupported(f"{where}: no value of enum or const is valid by the rest of the schema")
        return Choice([Literal(_written(value)) for value in fitting])

    def _typed(self, schema: Mapping, where: str, depth: int) -> Node:
        kinds = _types(schema) or self._implied(schema, where)
        for key in schema:
            owners = [kind for kind, keys in OF_TYPE.items() if key in keys]
            if owners and not set(owners) & set(kinds):
                raise Unsupported(f"{where}: {key!r} says something of {owners[0]}, and the type is {', '.join(kinds)}")
        if "number" in kinds and "integer" in kinds:
            kinds = [kind for kind in kinds if kind != "integer"]
        made = [self._of_type(kind, schema, where, depth) for kind in kinds]
        return made[0] if len(made) == 1 else Choice(made)

    def _implied(self, schema: Mapping, where: str) -> list[str]:
        """The types that a schema without one means: those that its keywords are about."""
        told = [kind for kind in ("object", "array", "string", "number") if set(schema) & OF_TYPE[kind]]
        return told or list(TYPES)

    def _of_type(self, kind: str, schema: Mapping, where: str, depth: int) -> Node:
        of: dict[str, Callable[[], Node]] = {
            "object": lambda: self._object(schema, where, depth),
            "array": lambda: self._array(schema, where, depth),
            "string": lambda: self._string(schema, where),
            "number": lambda: self._number(schema, where),
            "integer": lambda: self._integer(schema, where),
            "boolean": lambda: Choice((Literal(b"true"), Literal(b"false"))),
            "null": lambda: Literal(b"null"),
        }
        return of[kind]()

    def _string(self, schema: Mapping, where: str) -> Node:
        low, high = _counts(schema, "minLength", "maxLength", where, MOST_CHARACTERS)
        pattern, form = schema.get("pattern"), schema.get("format")
        if pattern is None and form in FORMATS:
            pattern = FORMATS[form]
        elif pattern is not None and form in FORMATS:
            raise Unsupported(f"{where}: pattern and format together are not supported")
        if pattern is None:
            return strings.string(low, high)
        if low or high is not None:
            raise Unsupported(f"{where}: a pattern or format with minLength or maxLength is not supported: count there")
        if not isinstance(pattern, str):
            raise Unsupported(f"{where}: pattern is no text")
        try:
            return patterns.inside_string(pattern)
        except Unsupported as error:
            raise Unsupported(f"{where}: {error}") from None

    def _bounds(self, schema: Mapping, where: str) -> tuple[Decimal | None, Decimal | None, bool, bool]:
        """Low, high, and whether these are left out."""
        for key in OF_TYPE["number"] & set(schema):
            if isinstance(schema[key], bool) or not isinstance(schema[key], int | float) or abs(schema[key]) > 1e30:
                raise Unsupported(f"{where}: {key} is no number that can be kept to")
        low, above = _tighter(schema.get("minimum"), schema.get("exclusiveMinimum"), max)
        high, below = _tighter(schema.get("maximum"), schema.get("exclusiveMaximum"), min)
        return low, high, above, below

    def _number(self, schema: Mapping, where: str) -> Node:
        multiple = schema.get("multipleOf")
        low, high, above, below = self._bounds(schema, where)
        if multiple is not None:
            if multiple != int(multiple) or multiple < 1:
                raise Unsupported(f"{where}: multipleOf={multiple} is supported for whole numbers from 1 up only")
            return self._integer(schema, where)
        return self._placed(lambda: numbers.number(low, high, above, below), where)

    def _integer(self, schema: Mapping, where: str) -> Node:
        low, high, above, below = self._bounds(schema, where)
        multiple = schema.get("multipleOf", 1)
        if multiple < 1 or multiple != int(multiple):
            raise Unsupported(f"{where}: multipleOf={multiple} is supported for whole numbers from 1 up only")
        first = None if low is None else numbers._up(low, above)
        last = None if high is None else -numbers._up(-high, below)
        return self._placed(lambda: numbers.integer(first, last, int(multiple)), where)

    def _placed(self, make: Callable[[], Node], where: str) -> Node:
        try:
            return make()
        except Unsupported as error:
            raise Unsupported(f"{where}: {error}") from None

    def _array(self, schema: Mapping, where: str, depth: int) -> Node:
        low, high = _counts(schema, "minItems", "maxItems", where, MOST_ITEMS)
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise Unsupported(f"{where}: prefixItems is no list")
        items = schema.get("items", True)
        if items is False:
            high = len(first) if high is None else min(high, len(first))
        parts = [self.node(one, f"{where}.prefixItems[{i}]", depth + 1) for i, one in enumerate(first)]
        if high is not None:
            parts = parts[:high]
        if high is not None and low > high:
            raise Unsupported(f"{where}: minItems is more than maxItems, or than there can be")
        if not parts:
            item = EMPTY if high == 0 else self.node(items, f"{where}.items", depth + 1)
            return _enclosed(b"[", b"]", [_list(item, low, high)])
        rest: Node = EMPTY
        if high is None or high > len(parts):
            item = self.node(items, f"{where}.items", depth + 1)
            more = None if high is None else high - len(parts)
            rest = Repeat(InOrder((COMMA, item)), max(low - len(parts), 0), more)
        for i, part in reversed(list(enumerate(parts))):  # each may be the last, from `low` on
            here = InOrder((COMMA, part, rest) if i else (part, rest))
            rest = here if i < low else optional(here)
        return _enclosed(b"[", b"]", [rest])

    def _object(self, schema: Mapping, where: str, depth: int) -> Node:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise Unsupported(f"{where}: properties is no object")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise Unsupported(f"{where}: required is no list of names")
        more = schema.get("additionalProperties", True)
        missing = [name for name in dict.fromkeys(required) if name not in properties]
        if missing and more is False:
            raise Unsupported(f"{where}: {missing[0]!r} is required, and additionalProperties is false")
        # Only what is named is written, unless nothing is: an answer then may have any keys.
        named = [*properties.items(), *((name, more) for name in missing)]
        members = [
            (self._member(name, of, f"{where}.properties.{name}", depth), name in required) for name, of in named
        ]  # fmt: skip
        low, high = _counts(schema, "minProperties", "maxProperties", where, MOST_ITEMS)
        others = more is not False and not (properties and more is True)
        if low > len(set(required)) or (high is not None and (members or low) and high < len(named)):
            raise Unsupported(f"{where}: minProperties and maxProperties are not supported beside such properties")
        free: Node | None = None
        if others and high != 0:
            key = strings.other_key([name for name, _ in named]) if named else strings.string()
            free = InOrder((key, COLON, self.node(more, f"{where}.additionalProperties", depth + 1)))
        limit = None if high is None else high - len(named)
        return _enclosed(b"{", b"}", [_members(members, free, limit)])

    def _member(self, name: str, of: Any, where: str, depth: int) -> Node:
        return InOrder((Literal(_written(name)), COLON, self.node(of, where, depth + 1)))


def _members(members: Sequence[tuple[Node, bool]], free: Node | None, limit: int | None) -> Node:
    """Members in order, those that are not required or not; after them, `free` ones. A comma stands between two."""
    first = rest = EMPTY  # what may come where nothing stands yet, and where something does
    if free is not None and limit != 0:
        rest = Repeat(InOrder((COMMA, free)), 0, limit)
        first = _list(free, 0, limit)
    for member, required in reversed(members):
        begun, goes_on = InOrder((member, rest)), InOrder((COMMA, member, rest))
        if required:
            first, rest = begun, goes_on
        else:
            first, rest = Choice((begun, first)), Choice((goes_on, rest))
        first, rest = Rule("members", first), Rule("members", rest)
    return first


def _types(schema: Mapping) -> list[str]:
    kinds = schema.get("type")
    if kinds is None:
        return []
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or not kinds or any(kind not in TYPES for kind in kinds):
        raise Unsupported(f"type {str(schema['type'])[:80]!r}: known are {', '.join(TYPES)}")
    return list(dict.fromkeys(kinds))


def _counts(schema: Mapping, least: str, most: str, where: str, limit: int) -> tuple[int, int | None]:
    found = []
    for key in (least, most):
        value = schema.get(key)
        if isinstance(value, float) and value == int(value):
            value = int(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise Unsupported(f"{where}: {key} is no whole number from 0 up")
        found.append(value)
    low, high = found[0] or 0, found[1]
    if high is not None and low > high:
        raise Unsupported(f"{where}: {least} is more than {most}")
    if low > limit:
        raise Unsupported(f"{where}: {least} is more than {limit}")
    return low, high


def _tighter(inclusive: Any, exclusive: Any, pick: Callable) -> tuple[Decimal | None, bool]:
    told = ((inclusive, False), (exclusive, True))
    given = [(Decimal(repr(value)), strict) for value, strict in told if value is not None]
    if not given:
        return None, False
    bound = pick(value for value, _ in given)
    return bound, any(strict for value, strict in given if value == bound)


def _valid(value: Any, schema: Mapping) -> bool:
    """Whether a listed value is valid by the keywords beside the list."""
    kinds = _types(schema)
    if kinds and not any(_is(value, kind) for kind in kinds):
        return False
    if "const" in schema and "enum" in schema and not any(_same(value, other) for other in schema["enum"]):
        return False
    rest = {key for key in schema if key not in ("type", "enum", "const")}
    if rest:
        raise Unsupported(f"{sorted(rest)[0]!r} beside enum or const is not supported: list what is valid")
    return True


def _is(value: Any, kind: str) -> bool:
    if kind in ("number", "integer"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kind == "number" or value == int(value))
    of = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}[kind]
    return isinstance(value, of)


def _same(one: Any, other: Any) -> bool:
    return _written(one) == _written(other) or (
        _is(one, "number") and _is(other, "number") and one == other
    )  # fmt: skip


def _written(value: Any) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text).encode()
    except (ValueError, RecursionError):
        raise Unsupported("a value of the schema that JSON cannot write") from None
