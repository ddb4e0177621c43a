"""The engine: a thread that answers all requests at once with one model."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any


from .. import surgery
from ..generate import complete
from ..models.network import Network
from .requests import Busy, Event, Refused, Request, Stopping, Stream, Unknown
from .texts import Texts


@dataclass(frozen=True)
class Limits:
    """What the engine may use."""

    slots: int = 32  # requests that are answered at a time
    cache_tokens: int | None = None  # that the cache has room for; by default as many as `memory` holds
    chunk: int = 256  # tokens of prompts that a step takes in beside the next tokens of answers
    waiting: int = 1024  # requests that may wait
    length: int | None = None  # of a prompt and its answer; by default what the model was made for


class _Ended(Exception):
    def __init__(self, reason: str):
        self.reason = reason


class Engine:
    """`submit` from any thread; answers come through the stream that it returns.

    A tokenizer has a `decode`. The network's adapters are chosen by each request; those that are on when the engine
    starts are no different.
    """

    def __init__(self, network: Network, tokenizer: Any, limits: Limits = Limits()):
        self.network, self.tokenizer, self.limits = network, tokenizer, limits
        self.adapters = surgery.names(network.model)
        config = network.config.get_text_config()
        self.vocabulary = config.vocab_size
        self.length = min(limits.length or 1 << 30, getattr(config, "max_position_embeddings", None) or 1 << 30)
        self._lock = threading.Condition()
        self._waiting: deque[tuple[Request, Stream] | tuple[Callable, Future]] = deque()
        self._cancelled: set[str] = set()
        self._running: str | None = None
        self._state = "new"
        self._thread: threading.Thread | None = None
        self._counts: Counter[str] = Counter()

    # ------------------------------------------------------------------ from any thread
    def start(self) -> Engine:
        assert self._state == "new"
        self._state = "running"
        self._thread = threading.Thread(target=self._run, name="luthier-engine", daemon=True)
        self._thread.start()
        return self

    def stop(self, drain: float = 0.0) -> None:
        """Take no more requests, give those at hand `drain` seconds, then end them as `cancelled`, and wait."""
        with self._lock:
            self._state = "draining"
            self._lock.notify()
        assert self._thread is not None
        self._thread.join(drain)
        with self._lock:
            self._state = "stopped"
            self._lock.notify()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def submit(self, request: Request) -> Stream:
        """Raises Refused, with HTTP's status."""
        self.check(request)
        with self._lock:
            if self._state != "running":
                raise Stopping("the server is stopping")
            if len(self._waiting) >= self.limits.waiting:
                self._counts["refused"] += 1
                raise Busy(f"{len(self._waiting)} requests are waiting already; try again later")
            stream = Stream(request, self.cancel)
            self._waiting.append((request, stream))
            self._counts["submitted"] += 1
            self._lock.notify()
        return stream

    def check(self, request: Request) -> None:
        """Raises Refused where it can never be answered."""
        if problems := request.problems():
            raise Refused("; ".join(problems))
        if request.adapter is not None and request.adapter not in self.adapters:
            raise Unknown(f"no adapter {request.adapter!r}; there are: {', '.join(self.adapters) or 'none'}")
        if not all(0 <= token < self.vocabulary for token in request.tokens):
            raise Refused(f"the prompt has a token outside of the model's vocabulary of {self.vocabulary}")
        if (wanted := len(request.tokens) + request.max_new_tokens) > self.length:
            raise Refused(
                f"the prompt has {len(request.tokens)} tokens and max_new_tokens={request.max_new_tokens}: {wanted} "
                f"in all, and the limit is {self.length}"
            )

    def cancel(self, id: str) -> None:
        with self._lock:
            self._cancelled.add(id)
            self._lock.notify()

    def between(self, function: Callable[[], Any]) -> Future:
        """Run a function on the engine's thread between two steps, where nobody else uses the network."""
        future: Future = Future()
        with self._lock:
            if self._state != "running":
                raise Stopping("the server is stopping")
            self._waiting.append((function, future))
            self._lock.notify()
        return future

    def stats(self) -> dict[str, float]:
        """Numbers for a monitor: counts since the start, and what is in use now."""
        with self._lock:
            return {
                "running": float(self._running is not None), "waiting": float(len(self._waiting)),
                "slots": float(self.limits.slots), **{name: float(n) for name, n in self._counts.items()},
            }  # fmt: skip

    # ------------------------------------------------------------------ the engine's thread
    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._waiting and self._state == "running":
                    self._lock.wait()
                if not self._waiting and self._state != "running":
                    return
                one, two = self._waiting.popleft()
                self._running = one.id if isinstance(one, Request) else None
            if isinstance(two, Future):
                try:
                    two.set_result(one())  # type: ignore[operator]
                except Exception as error:
                    two.set_exception(error)
            else:
                self._answer(one, two)  # type: ignore[arg-type]
            with self._lock:
                self._running = None

    def _answer(self, request: Request, stream: Stream) -> None:
        texts = Texts(self.tokenizer, request.stop_texts, request.keeps_special)
        last: list[Event] = []

        def check() -> None:
            with self._lock:
                if request.id in self._cancelled or self._state == "stopped":
                    raise _Ended("cancelled")
            if request.deadline is not None and time.monotonic() > request.deadline:
                raise _Ended("deadline")

        def token(number: int) -> None:
            last.append(Event(number, texts.add(number)))
            if texts.stopped is not None:
                raise _Ended("stop")
            check()
            if len(last) > 1:
                stream.put(last.pop(0))

        model = self.network.model
        wanted = [] if request.adapter is None else [request.adapter]
        reason, error = "length", None
        try:
            check()
            with surgery.adapters_off(model), surgery.adapters_on(model, wanted):
                made = complete(
                    self.network, [request.tokens], set(request.stop), request.max_new_tokens,
                    temperature=request.temperature, top_p=request.top_p, top_k=request.top_k, seed=request.seed,
                    on_token=token,
                )[0]  # fmt: skip
            if made.ended:
                reason = "stop"
                for event in last:
                    stream.put(event)
                last = [Event(made.tokens[-1])]
        except _Ended as end:
            reason = end.reason
        except Exception as raised:
            reason, error = "error", f"{type(raised).__name__}: {raised}"
        for event in last[:-1]:
            stream.put(event)
        final = last[-1] if last else Event(None)
        stop = texts.stopped or (final.token if reason == "stop" else None)
        stream.put(Event(final.token, final.text + texts.end(), None, (), reason, stop, error))  # type: ignore[arg-type]
        with self._lock:
            self._counts[f"ended_{reason}"] += 1
            self._cancelled.discard(request.id)


