"""A Slack export: a row for each channel and day, and one for each thread; names for ids."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...data.readers import parse_json
from .base import Document, File, How, Ready, contents, problem_of
from .talk import Said, absent, by_day, row

DAY = re.compile(r"\d{4}-\d{2}-\d{2}\.json")
SPOKEN = (None, "bot_message", "thread_broadcast", "me_message", "file_share")  # other subtypes are the program's
MARKED = re.compile(r"<([@#!]?)([^<>|]*)(?:\|([^<>]*))?>")

Users = Mapping[str, tuple[str, ...]]


def read(file: File, how: How) -> Iterator[Ready | Document]:
    users = _users(file)
    names: Counter[str] = Counter()
    talk: list[tuple[Said, Path]] = []
    threads: dict[str, list[tuple[Said, Path]]] = {}
    for path in file.days:
        try:
            entries = parse_json(file.decoded(contents(path)))
            if not isinstance(entries, list):
                raise ValueError("no list of messages")
        except Exception as error:
            file.problems[f"{path.name} cannot be read: {problem_of(error)}"] += 1
            continue
        for entry in entries:
            if (said := _said(entry, path, users, file)) is None:
                continue
            names.update({said.name, *said.names})
            thread = entry.get("thread_ts")
            if thread and how.per != "whole":
                threads.setdefault(str(thread), []).append((said, path))
            else:
                talk.append((said, path))
    absent(names, file, how)
    yield from _rows(talk, threads, file, how)


def _rows(talk: list, threads: dict, file: File, how: How) -> Iterator[Ready | Document]:
    more = {"title": file.path.name}
    paths = {id(said): path for said, path in talk}
    for stretch in by_day((said for said, _ in talk), how):
        yield from row(stretch, more, file, how, paths[id(stretch[0])])
    for thread in threads.values():
        said = [one for one, _ in thread]
        yield from row(said, more, file, how, thread[0][1])


def _said(entry: Any, path: Path, users: Users, file: File) -> Said | None:
    if not isinstance(entry, Mapping) or entry.get("type") != "message":
        file.problems["an entry is no message"] += 1
        return None
    if entry.get("subtype") not in SPOKEN:
        file.left["a line of the program"] += 1
        return None
    text = plain(str(entry.get("text") or ""), users).strip()
    if not text:
        file.left["a message without text"] += 1
        return None
    user = str(entry.get("user") or entry.get("bot_id") or "")
    known = users.get(user) or tuple(str(entry[key]) for key in ("username",) if entry.get(key)) or (user or "unknown",)
    when = str(entry.get("ts", ""))
    return Said(known[0], text, path.stem, {"message": when, **_moment(when)}, (user, *known[1:]))


def _moment(when: str) -> dict[str, str]:
    try:
        return {"time": datetime.fromtimestamp(float(when), UTC).isoformat(timespec="seconds")}
    except (ValueError, OverflowError, OSError):
        return {}


def _users(file: File) -> dict[str, tuple[str, ...]]:
    """All names of each user, the one that is shown first."""
    if file.about is None:
        return {}
    try:
        told = parse_json(file.decoded(contents(file.about)))
        made = {}
        for user in told:
            profile = user.get("profile") or {}
            names = (profile.get("display_name"), user.get("real_name"), profile.get("real_name"), user.get("name"))
            made[str(user["id"])] = tuple(dict.fromkeys(str(name) for name in names if name)) or (str(user["id"]),)
        return made
    except Exception as error:
        file.warnings[f"{file.about.name} cannot be read, so that ids stand for names: {problem_of(error)}"] += 1
        return {}


def plain(text: str, users: Users) -> str:
    """Without Slack's marks for people, channels and links."""

    def shown(found: re.Match) -> str:
        mark, name, label = found[1], found[2], found[3]
        if mark == "@":
            return "@" + (users[name][0] if name in users else label or name)
        if mark == "#":
            return "#" + (label or name)
        if mark == "!":
            return "@" + (label or name.partition("^")[0]).removeprefix("@")
        return f"{label} ({name})" if label and label != name else name.removeprefix("mailto:")

    return html.unescape(MARKED.sub(shown, text))
