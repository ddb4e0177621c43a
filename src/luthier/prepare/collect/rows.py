"""Rows that are rows already: as they are; conversations of ShareGPT become messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...data.conversations import SHAREGPT_ROLES
from ...data.readers import kind_of
from ...data.sources import records
from ..encoded import dumps
from .base import File, How, Ready, opened
from .stream import Stream


def read(file: File, how: How) -> Iterator[Ready]:
    for values, at in _rows(file):
        if file.kind == "sharegpt":
            values = messages_of(values, file)
        try:
            dumps(values)
        except (TypeError, ValueError, RecursionError) as error:
            file.problems[f"a row cannot be written: {error}"] += 1
            continue
        yield Ready(values, at)


def _rows(file: File) -> Iterator[tuple[dict, dict]]:
    if kind_of(file.path)[0] == ".json" and _is_list(file):
        yield from _listed(file)
        return
    for item in records(file.path):
        if isinstance(item, int):
            continue
        if item.fault is not None:
            file.problems[f"a row cannot be read: {item.fault}"] += 1
        else:
            found = re.search(r":(\d+)$|\[(\d+)\]$", item.place)
            yield item.values, {} if not found else {"line": int(found[1])} if found[1] else {"row": int(found[2])}


def _is_list(file: File) -> bool:
    with opened(file.path) as raw:
        return raw.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _listed(file: File) -> Iterator[tuple[dict, dict]]:
    with opened(file.path) as raw:
        stream = Stream(raw)
        for number in stream.items():
            value = stream.value()
            if isinstance(value, dict):
                yield value, {"row": number}
            else:
                file.problems[f"a row cannot be read: expected an object, found {type(value).__name__}"] += 1
        stream.end()


def messages_of(values: dict, file: File) -> dict:
    """A row of ShareGPT with `messages`; as it stands where it has calls of tools or speakers that are not known."""
    key = next((key for key in ("conversations", "items", "conversation") if isinstance(values.get(key), list)), None)
    if key is None:
        return values
    made: list[dict[str, Any]] = []
    for turn in values[key]:
        turn = turn if isinstance(turn, Mapping) else {}
        speaker, said = turn.get("from"), turn.get("value")
        role = SHAREGPT_ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
        if role not in ("system", "user", "assistant") or speaker == "function_call" or not isinstance(said, str):
            file.warnings["a conversation with tools or unknown speakers, left as it is"] += 1
            return values
        made.append({"role": role, "content": said})
    if isinstance(values.get("system"), str) and values["system"] and not any(m["role"] == "system" for m in made):
        made.insert(0, {"role": "system", "content": values["system"]})
    return {"messages": made, **{k: v for k, v in values.items() if k not in (key, "system", "messages")}}
