"""SIGTERM and Ctrl-C as a wish: the run saves and stops after what it is at; a second one stops it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stopped(Exception):
    """Thrown out of work that is made again when the run goes on."""


class Signals:
    """While it is entered, a signal is only noted in `caught`; inside `breakable` it also ends the work at hand."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._breakable = False
        self._before: dict = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._take)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def breakable(self) -> Iterator[None]:
        if self.caught is not None:
            raise Stopped
        try:
            self._breakable = True
            yield
        finally:
            self._breakable = False

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None:
            raise KeyboardInterrupt
        self.caught = number
        if self._breakable:
            raise Stopped
