"""The server of the labelling page: this machine only, a random word in the address, no file read by name."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ...errors import LuthierError
from ..encoded import dumps
from ..views import view
from .page import page
from .project import Project
from .tasks import TIE, Edit, Preference, Spans, answer_text
from .words import words_of

HOST = "127.0.0.1"
LARGEST = 8 << 20  # bytes of a request
NAME = 64  # characters of an annotator's name
PATIENCE = 30  # seconds for a request to come


class Refused(Exception):
    """What a request asks cannot be done: (state, why)."""

    def __init__(self, state: int, why: str):
        self.state, self.why = state, why
        super().__init__(why)


# ---------------------------------------------------------------------------- what the page asks for


class Desk:
    """Hands rows to annotators and takes what they say of them; one request at a time."""

    def __init__(self, project: Project, by: str, per_row: int | None = None):
        self.project, self.by, self.per_row = project, by, per_row
        self.guard = threading.Lock()
        self.handed: dict[str, int] = {}  # the row that an annotator has before them
        self.labels: Counter[int] = Counter(
            row for rows in project.journal.said.values() for row, said in rows.items() if said.label is not None
        )
        self.from_row: dict[str, int] = {}  # before it an annotator has nothing left to do

    def __call__(self, what: str, body: Mapping) -> dict:
        acts: dict[str, Callable[[str, Mapping], dict]] = {
            "task": self._task, "next": self._next, "label": self._label, "skip": self._skip, "undo": self._undo,
            "write": self._write,
        }  # fmt: skip
        if what not in acts:
            raise Refused(404, "there is nothing here")
        by = body.get("by")
        if what != "task" and not _is_name(by):
            raise Refused(400, f"the name of an annotator is a text of 1 to {NAME} characters that can be printed")
        with self.guard:
            return acts[what](by, body)  # type: ignore[arg-type]

    def _task(self, by: str, body: Mapping) -> dict:
        task = self.project.task
        told = {"kind": task.kind, "instructions": task.instructions, "by": self.by}
        return told | {key: getattr(task, key) for key in ("labels", "several", "ties") if hasattr(task, key)}

    def _next(self, by: str, body: Mapping) -> dict:
        return self._shown(by, self._chosen(by, body.get("again") is True))

    def _label(self, by: str, body: Mapping) -> dict:
        row = self._row(body)
        self._not_elsewhere(by, row)
        values, label = self.project.values(row), body.get("label")
        shown = None
        try:
            if isinstance(self.project.task, Preference):
                shown = order(by, row)
                label = {"first": shown[0], "second": shown[1], TIE: TIE}.get(label if isinstance(label, str) else "")
            elif isinstance(self.project.task, Spans):
                label = _characters(values, label)
            label = self.project.task.checked(label, values)
        except (ValueError, TypeError, IndexError) as error:
            raise Refused(400, str(error)) from None
        self._say(by, row, label, shown=shown, seconds=_seconds(body.get("seconds")))
        return self._next(by, body)

    def _skip(self, by: str, body: Mapping) -> dict:
        row = self._row(body)
        self._not_elsewhere(by, row)
        self._say(by, row, None)
        return self._next(by, body)

    def _not_elsewhere(self, by: str, row: int) -> None:
        """Two windows of one annotator may show the same row: the second one must not undo in silence what the first
        one said."""
        if self.handed.get(by) != row and row in self.project.journal.said.get(by, {}):
            raise Refused(409, f"row {row} was done in another window of {by}; here is the next one")

    def _say(self, by: str, row: int, label: Any, **more: Any) -> None:
        before = self._said(by, row)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self.project.journal.add(by, row, label, at=at, **more)
        self.labels[row] += (label is not None) - before

    def _said(self, by: str, row: int) -> bool:
        said = self.project.journal.said.get(by, {}).get(row)
        return said is not None and said.label is not None

    def _undo(self, by: str, body: Mapping) -> dict:
        order = self.project.journal.order.get(by)
        if not order:
            raise Refused(400, "there is nothing to take back")
        before = self._said(by, order[-1])
        row = self.project.journal.undo(by)
        assert row is not None
        self.labels[row] -= before
        self.from_row[by] = min(row, self.from_row.get(by, 0))
        return self._shown(by, row)

    def _write(self, by: str, body: Mapping) -> dict:
        made = self.project.write()
        return {"labelled": made["labelled"], "aside": sum(made["aside"].values()), "out": made["out"] or "nothing yet"}

    def _row(self, body: Mapping) -> int:
        row = body.get("row")
        if type(row) is not int or not 0 <= row < len(self.project):
            raise Refused(400, f"row {row!r}: there are rows 0 to {len(self.project) - 1}")
        return row

    # ------------------------------------------------------------------------ rows in turn

    def _chosen(self, by: str, again: bool) -> int | None:
        said = self.project.journal.said.get(by, {})
        if again:  # what was skipped longest ago
            skipped = [row for row in self.project.journal.order.get(by, []) if said[row].label is None]
            if skipped:
                return skipped[0]
        others = {row for name, row in self.handed.items() if name != by}
        start = self.from_row.get(by, 0)
        while start < len(self.project) and start in said:
            start += 1
        self.from_row[by] = start
        for row in range(start, len(self.project)):
            full = self.per_row is not None and self.labels[row] + (row in others) >= self.per_row
            if row not in said and not full:
                return row
        return None

    def _shown(self, by: str, row: int | None) -> dict:
        said = self.project.journal.said.get(by, {})
        labelled = sum(one.label is not None for one in said.values())
        told = {
            "row": row,
            "progress": {"rows": len(self.project), "labelled": labelled, "skipped": len(said) - labelled},
        }
        if row is None:
            self.handed.pop(by, None)
            return told
        self.handed[by] = row
        values = self.project.values(row)
        return told | {"place": self.project.place(row), **_seen(self.project.task, values, by, row)}


def _seen(task: Any, values: dict, by: str, row: int) -> dict:
    """What is shown of a row."""
    before = task.before(values)
    if isinstance(task, Spans):
        words = words_of(values)
        gaps = [0, *(end for _, end in words.borders)]
        shown = [[words.text[gap:start], words.text[start:end]] for gap, (start, end) in zip(gaps, words.borders)]
        places = {start: i for i, (start, _) in enumerate(words.borders)}
        ends = {end: i for i, (_, end) in enumerate(words.borders)}
        known = [[places[start], ends[end], label] for start, end, label in before or []]
        return {"texts": [], "words": shown, "tail": words.text[gaps[-1] :], "before": known}
    if isinstance(task, Preference):
        rest = {key: value for key, value in values.items() if key not in (*task.answers, *task.adds)}
        pair = {"a": answer_text(values[task.answers[0]]), "b": answer_text(values[task.answers[1]])}
        return {"texts": _texts(rest), "answers": [pair[name] for name in order(by, row)], "before": None}
    texts = _texts(values)
    if isinstance(task, Edit) and before:
        texts = texts[:-1]  # it stands in the field
    return {"texts": texts, "before": before}


def _texts(values: dict) -> list[dict]:
    return [{"role": text.role, "text": text.text} for text in view(values).texts]


def order(by: str, row: int) -> list[str]:
    """In which order the two answers of a row are shown to an annotator; the same whenever it is."""
    return ["a", "b"] if hashlib.sha256(f"{row}\n{by}".encode()).digest()[0] & 1 else ["b", "a"]


def _characters(values: dict, label: Any) -> list:
    """Spans of words [first, last, label] as spans of characters."""
    borders, made = words_of(values).borders, []
    if not isinstance(label, list):
        raise ValueError("expected a list of spans")
    for first, last, name in label:
        if type(first) is not int or type(last) is not int or not 0 <= first <= last < len(borders):
            raise ValueError(f"{first!r} to {last!r} are no words of this row")
        made.append([borders[first][0], borders[last][1], name])
    return made


def _is_name(by: object) -> bool:
    return isinstance(by, str) and 0 < len(by) <= NAME and by.isprintable() and by == by.strip()


def _seconds(value: object) -> float | None:
    return round(float(value), 2) if isinstance(value, int | float) and 0 <= value < 1e6 else None


# ---------------------------------------------------------------------------- HTTP


class Server(ThreadingHTTPServer):
    """Listens on this machine's own address; `url` has the word without which nothing is answered."""

    daemon_threads = True

    def __init__(self, desk: Desk, port: int = 0):
        super().__init__((HOST, port), _Handler)
        self.desk, self.token = desk, secrets.token_urlsafe(24)
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is nothing to tell."""


class _Handler(BaseHTTPRequestHandler):
    server: Server  # type: ignore[bad-override]
    timeout = PATIENCE
    server_version, sys_version = "luthier", ""

    def log_message(self, format: str, *arguments: Any) -> None:
        """The address holds the token, so nothing is logged."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, make: Callable[[], tuple[str, str]]) -> None:
        try:
            if self.headers.get("Host", "") not in self.server.hosts:  # another name that was pointed here
                raise Refused(403, "this page is for this machine only")
            kind, text = make()
            self._send(200, kind, text)
        except Refused as refused:
            self._send(refused.state, "application/json", dumps({"error": refused.why}))
        except (LuthierError, OSError) as error:  # a full disk, say: nothing was kept
            self._send(500, "application/json", dumps({"error": f"not kept: {error}"}))

    def _get(self) -> tuple[str, str]:
        if self._inner() != "":
            raise Refused(404, "there is nothing here")
        return "text/html; charset=utf-8", page()[0]

    def _post(self) -> tuple[str, str]:
        inner = self._inner()
        own = f"http://{self.headers.get('Host')}"
        if self.headers.get("Origin") != own or self.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            raise Refused(403, "another page asked")
        if self.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
            raise Refused(415, "expected JSON")
        if not inner.startswith("api/"):
            raise Refused(404, "there is nothing here")
        return "application/json", dumps(self.server.desk(inner[4:], self._body()))

    def _inner(self) -> str:
        """The path after the token; whoever does not know it is told nothing."""
        _, token, *rest = [*self.path.split("/", 2), ""][:3]
        if (
            not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode())
            or self.path.count("/") < 2
        ):
            raise Refused(404, "there is nothing here")
        return rest[0]

    def _body(self) -> dict:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            raise Refused(413, f"expected a body of at most {LARGEST} bytes")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refused(400, "the body is no JSON") from None
        if not isinstance(body, dict):
            raise Refused(400, "the body is no object")
        return body

    def _send(self, state: int, kind: str, text: str) -> None:
        data = text.encode("utf-8", "replace")
        self.send_response(state)
        for name, value in (
            ("Content-Type", kind), ("Content-Length", str(len(data))), ("Content-Security-Policy", page()[1]),
            ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store"),
            ("Cross-Origin-Resource-Policy", "same-origin"), ("Cross-Origin-Opener-Policy", "same-origin"),
            ("X-Frame-Options", "DENY"), ("Connection", "close"),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
