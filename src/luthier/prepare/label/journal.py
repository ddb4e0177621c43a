"""What people said of rows, a line each as it is said: flushed to the disk before they are told that it is kept."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.readers import parse_json
from ...errors import CheckpointError
from ..encoded import line


@dataclass(frozen=True)
class Said:
    """What an annotator said last of a row."""

    label: Any  # None of a row that was passed over
    shown: list[str] | None = None  # the order in which answers stood, of a preference
    seconds: float | None = None  # since the row was shown
    at: str | None = None  # ISO 8601, UTC


class Journal:
    """Appends entries to a file that one process at a time has open, and knows what holds now: by annotator and row."""

    def __init__(self, path: Path):
        self.path = path
        self.said: dict[str, dict[int, Said]] = {}
        self.order: dict[str, list[int]] = {}  # rows in the order in which each annotator came to them, to undo
        self._guard = threading.Lock()
        self._file: Any = None

    @contextlib.contextmanager
    def open(self) -> Iterator[Journal]:
        """Read it, cut off a line that a kill tore, and keep others out."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            _lock(file, self.path)
            self._read(file)
            self._file = file
            try:
                yield self
            finally:
                self._file = None

    def _read(self, file: Any) -> None:
        file.seek(0)
        whole = 0
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                break  # nobody was told that it is kept
            try:
                self._take(parse_json(text.decode()))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise CheckpointError(f"{self.path}:{number}: damaged ({error}); take the line out to go on") from None
            whole += len(text)
        file.truncate(whole)

    def _take(self, entry: dict) -> None:
        by, row = entry["by"], entry["row"]
        mine, order = self.said.setdefault(by, {}), self.order.setdefault(by, [])
        if entry.get("undone"):
            mine.pop(row)
            order.remove(row)
            return
        if row in mine:
            order.remove(row)
        mine[row] = Said(entry["label"], entry.get("shown"), entry.get("seconds"), entry.get("at"))
        order.append(row)

    def add(self, by: str, row: int, label: Any, **more: Any) -> None:
        """Keep it; when this returns, it is on the disk."""
        self._append({"row": row, "by": by, "label": label, **{k: v for k, v in more.items() if v is not None}})

    def undo(self, by: str) -> int | None:
        """Take back what this annotator said last; the row, or None where there is nothing."""
        with self._guard:
            order = self.order.get(by)
            if not order:
                return None
            row = order[-1]
            self._write({"row": row, "by": by, "undone": True})
            return row

    def _append(self, entry: dict) -> None:
        with self._guard:
            self._write(entry)

    def _write(self, entry: dict) -> None:
        assert self._file is not None, "the journal is not open"
        data = line(entry)
        end = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:  # a full disk: nothing half-written may stand before the next line
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise
        self._take(json.loads(data))

    def labels(self) -> dict[str, dict[int, Said]]:
        """What each annotator said, without rows that were passed over."""
        return {
            by: {row: said for row, said in rows.items() if said.label is not None} for by, rows in self.said.items()
        }


def _lock(file: Any, path: Path) -> None:
    """While the file is open. The system frees it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"{path}: another process is at work there; end it first") from None
    except OSError:  # a file system without locks
        pass
