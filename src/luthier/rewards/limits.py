"""A limit on the time that one call of Python code may take."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any


class Late(BaseException):
    """The limit has passed. No `Exception`, so that the code which is timed does not take it for one of its own."""


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns, or `Late` once `seconds` have passed.

    In the main thread an alarm ends the call where it stands, regular expressions included. Elsewhere, and on systems
    without alarms, the call goes on in a thread of its own, whose result nobody waits for any longer.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _alarmed(seconds, call)
    return _awaited(seconds, call)


def _alarmed(seconds: float, call: Callable[[], Any]) -> Any:
    def late(number: int, frame: Any) -> None:
        raise Late

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, late)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # somebody else's alarm goes on
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, left - (time.monotonic() - began)), interval)


def _awaited(seconds: float, call: Callable[[], Any]) -> Any:
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, call()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise Late
    fine, value = outcome[0]
    if fine:
        return value
    raise value
