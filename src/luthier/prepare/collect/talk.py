"""Chats between people: a row for each day, thread or whole, as messages with roles or as lines with names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

from .base import Document, File, How, Part, Ready


class Said(NamedTuple):
    """What somebody said; `names` are all by which the speaker goes."""

    name: str
    text: str
    day: str  # 2026-11-25
    at: dict[str, Any]
    names: tuple[str, ...] = ()


def by_day(said: Iterable[Said], how: How) -> Iterator[list[Said]]:
    """Stretches of one day each; all together with per=whole."""
    for _, group in groupby(said, key=lambda one: "" if how.per == "whole" else one.day):
        yield list(group)


def row(said: list[Said], more: dict, file: File, how: How, path: Any = None) -> Iterator[Ready | Document]:
    """The row of what was said together; none where the assistant or everybody else is silent, which is counted."""
    at = said[0].at
    more = {**more, "date": said[0].day}
    if how.me is None:
        yield Document([Part("\n".join(f"{one.name}: {one.text}" for one in said), at)], more, path)
        return
    mine = [how.me in (one.name, *one.names) for one in said]
    if not any(mine) or all(mine):
        file.left[f"a stretch of chat in which {'only ' if any(mine) else 'nothing of '}{how.me} was said"] += 1
        return
    several = len({one.name for one, me in zip(said, mine) if not me}) > 1
    turns = [("assistant", one.text) if me else ("user", f"{one.name}: {one.text}" if several else one.text)
             for one, me in zip(said, mine)]  # fmt: skip
    yield Ready({"messages": merged(turns), **more}, at, path)


def merged(turns: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Messages, those that follow each other in one role as one: templates want turns."""
    return [
        {"role": role, "content": "\n\n".join(text for _, text in group)}
        for role, group in groupby(turns, key=lambda turn: turn[0])
    ]


def absent(names: Counter[str], file: File, how: How) -> None:
    """Counted as a problem where nobody in the chat has the name that was given."""
    if how.me is not None and names and how.me not in names:
        there = ", ".join(name for name, _ in names.most_common(5))
        file.problems[f"nothing of --me {how.me}; the chat has {there}"] += 1
