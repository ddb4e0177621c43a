"""A row as a line of JSON: the same bytes for the same values, whatever they hold."""

from __future__ import annotations

import json
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any


def _other(value: object) -> Any:
    """What columnar files hold and JSON does not; TypeError of what no text stands for."""
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, bytes):
        raise TypeError("bytes cannot be written as JSON; leave that column out")
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


_plain = json.JSONEncoder(ensure_ascii=False, default=_other).encode
_escaped = json.JSONEncoder(ensure_ascii=True, default=_other).encode


def dumps(value: object) -> str:
    return _plain(value)


def line(value: object) -> bytes:
    """With its line break. Half a surrogate pair, which UTF-8 cannot write, stays an escape."""
    try:
        return _plain(value).encode() + b"\n"
    except UnicodeEncodeError:
        return _escaped(value).encode() + b"\n"
