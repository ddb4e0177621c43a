"""Telegram's result.json: one chat, or all of an account."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from .base import Document, File, How, Ready, opened
from .stream import Stream
from .talk import Said, absent, by_day, row


def read(file: File, how: How) -> Iterator[Ready | Document]:
    names: Counter[str] = Counter()
    with opened(file.path) as raw:
        stream = Stream(raw)
        for key in stream.fields():
            if key in ("chats", "left_chats") and stream.peek() == "{":
                for inner in stream.fields():
                    if inner == "list" and stream.peek() == "[":
                        for _ in stream.items():
                            yield from _chat(stream, names, file, how)
                    else:
                        stream.value()
            elif key == "messages" and stream.peek() == "[":
                yield from _messages(stream, {}, names, file, how)
            else:
                stream.value()
        stream.end()
    absent(names, file, how)


def _chat(stream: Stream, names: Counter[str], file: File, how: How) -> Iterator[Ready | Document]:
    """One of several chats, whose name stands before what was said."""
    about: dict[str, str] = {}
    for key in stream.fields():
        if key == "messages" and stream.peek() == "[":
            yield from _messages(stream, about, names, file, how)
        else:
            value = stream.value()
            if key == "name" and isinstance(value, str) and value:
                about["title"] = value


def _messages(
    stream: Stream, about: dict, names: Counter[str], file: File, how: How
) -> Iterator[Ready | Document]:  # fmt: skip
    for stretch in by_day(_said(stream, names, file), how):
        yield from row(stretch, about, file, how)


def _said(stream: Stream, names: Counter[str], file: File) -> Iterator[Said]:
    for number in stream.items():
        value = stream.value()
        if not isinstance(value, Mapping):
            file.problems["an entry is no message"] += 1
            continue
        if value.get("type") != "message":
            file.left["a line of the program"] += 1
            continue
        name, text = value.get("from") or value.get("from_id") or "Deleted account", text_of(value.get("text")).strip()
        names.update([str(name), *([str(value["from_id"])] if "from_id" in value else [])])
        if not text:
            file.left["a message without text"] += 1
            continue
        day = str(value.get("date", ""))[:10]
        yield Said(str(name), text, day, {"message": str(value.get("id", number))}, (str(value.get("from_id")),))


def text_of(value: Any) -> str:
    """A text, or pieces of one of which some have a form."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return ""
    return "".join(piece if isinstance(piece, str) else str(_object(piece).get("text", "")) for piece in value)


def _object(value: Any) -> Mapping:
    return value if isinstance(value, Mapping) else {}
