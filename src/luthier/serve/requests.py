"""What is asked of the engine, and what it says: requests, events, streams between threads and asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..errors import LuthierError

if TYPE_CHECKING:
    from torch import Tensor

Reason = Literal["stop", "length", "cancelled", "deadline", "error"]
Allowed = Callable[[list[int]], "Tensor | None"]


class Refused(LuthierError):
    """A request that the engine does not take; `status` is HTTP's code for it."""

    status = 400


class Busy(Refused):
    """The queue is full: try again later."""

    status = 429


class Stopping(Refused):
    """The engine is not running, or not for long."""

    status = 503


class Unknown(Refused):
    """An adapter of a name that the engine does not have."""

    status = 404


@dataclass
class Request:
    """One prompt, as tokens, and how it is to be answered."""

    tokens: list[int]
    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0
    top_k: int = 0  # 0 is all
    seed: int | None = None  # what is drawn follows from it alone; None draws one
    stop: frozenset[int] = frozenset()  # tokens that end the answer and are no part of its text
    stop_texts: tuple[str, ...] = ()  # the answer ends before the first of these
    logprobs: int | None = None  # of each token, and of this many likeliest ones; None: of none
    adapter: str | None = None  # None: the model as it is with all adapters off
    allowed: Allowed | None = None
    """Called before each token, once and in order, with the answer so far: bool [V] of what may come next, or None
    for all. It runs on the engine's thread; what it raises fails its own request alone."""
    deadline: float | None = None  # by time.monotonic()
    keeps_special: bool = False  # whether special tokens are a part of the text
    user: str = ""  # those who wait are served in turn by user
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def problems(self) -> list[str]:
        """What is wrong with it by itself."""
        found = []
        if not self.tokens:
            found.append("the prompt is empty")
        if self.max_new_tokens < 1:
            found.append(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            found.append(f"temperature={self.temperature}: must be at least 0")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p}: must be in (0, 1]")
        if self.top_k < 0:
            found.append(f"top_k={self.top_k}: must be at least 0; 0 is all")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 64:
            found.append(f"seed={self.seed}: must be a number of 64 bits")
        if self.logprobs is not None and self.logprobs < 0:
            found.append(f"logprobs={self.logprobs}: must be at least 0")
        if "" in self.stop_texts:
            found.append("an empty stop text would end every answer at once: leave it out")
        return found


@dataclass(frozen=True)
class Event:
    """A token, or, without one, an end that came between two tokens."""

    token: int | None
    text: str = ""  # that can be shown now; "" while a character or what may be a stop text is incomplete
    logprob: float | None = None  # under the model's own distribution, at temperature 1
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens with theirs, likeliest first
    finish_reason: Reason | None = None  # of the last event, and of no other
    stop: int | str | None = None  # which stop token or stop text it was
    error: str | None = None  # of `error`, in words


@dataclass(frozen=True)
class Answer:
    """All events of a request in one."""

    tokens: list[int]  # a stop token included
    text: str
    finish_reason: Reason
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    stop: int | str | None = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        """By a stop token."""
        return self.finish_reason == "stop" and isinstance(self.stop, int)

    @property
    def answer(self) -> list[int]:
        """The tokens without the one that ended it."""
        return self.tokens[:-1] if self.ended else self.tokens


class Stream:
    """The events of a request as they come: `for event in stream`, `async for event in stream`, or `result()`.

    The engine's thread puts them in; one reader takes them out, in any thread or event loop.
    """

    def __init__(self, request: Request, cancel: Callable[[str], None] = lambda id: None):
        self.request = request
        self.submitted = time.monotonic()
        self.started: float | None = None  # when its prompt was begun
        self.first: float | None = None  # when its first token came
        self.ended: float | None = None
        self.reused = 0  # tokens of the prompt that were in the cache already
        self._cancel = cancel
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._wake: Callable[[], None] | None = None
        self._at_end: Callable[[Stream], None] | None = None

    @property
    def done(self) -> bool:
        return self.ended is not None

    def cancel(self) -> None:
        """Ask for its end; the last event says `cancelled`, unless it was done already."""
        self._cancel(self.request.id)

    def put(self, event: Event) -> None:
        """By the engine alone."""
        now = time.monotonic()
        with self._changed:
            assert not self.done, "an event after the last one"
            if event.token is not None and self.first is None:
                self.first = now
            if event.finish_reason is not None:
                self.ended = now
            self._events.append(event)
            self._changed.notify()
            wake, at_end = self._wake, self._at_end if self.done else None
        if wake is not None:
            wake()
        if at_end is not None:
            at_end(self)

    def when_done(self, function: Callable[[Stream], None]) -> None:
        """Have a function called once all events are there, on the engine's thread, or at once if they are."""
        with self._changed:
            self._at_end, done = function, self.done
        if done:
            function(self)

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._changed:
                while not self._events:
                    self._changed.wait()
                event = self._events.popleft()
            yield event
            if event.finish_reason is not None:
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the reader's loop has ended
                loop.call_soon_threadsafe(ready.set)

        with self._changed:
            self._wake = wake
        try:
            while True:
                with self._changed:
                    event = self._events.popleft() if self._events else None
                    if event is None:
                        ready.clear()
                if event is None:
                    await ready.wait()
                    continue
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            with self._changed:
                self._wake = None

    def result(self) -> Answer:
        """Wait for the end."""
        return collected(list(self))

    async def aresult(self) -> Answer:
        return collected([event async for event in self])


def collected(events: list[Event]) -> Answer:
    last = events[-1]
    assert last.finish_reason is not None
    said = [event for event in events if event.token is not None]
    return Answer(
        tokens=[event.token for event in said if event.token is not None],
        text="".join(event.text for event in events),
        finish_reason=last.finish_reason,
        logprobs=[event.logprob for event in said if event.logprob is not None],
        top=[event.top for event in said if event.logprob is not None],
        stop=last.stop,
        error=last.error,
    )
