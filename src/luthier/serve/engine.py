"""The engine: a thread that answers many requests at once; they join and leave between steps."""

from __future__ import annotations

import copy
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from .. import surgery
from ..errors import ModelError
from ..models.network import Network
from . import runners
from .choice import Choice
from .draws import Drawn, Wish, draw
from .packed import packed
from .queue import Queue
from .requests import Busy, Event, Reason, Refused, Request, Stopping, Stream, Unknown
from .row import Row
from .runners import Piece, Runner

SERVED: WeakSet[Any] = WeakSet()  # models that an engine answers with
COPIES = 0.25  # share of free memory that copies of weights may take
MEMORY = 0.4  # share of free memory that the cache may take
ALONE = 8  # how many times as many tokens of prompts a step takes in while no answer waits for it,
SHARED = 4  # and at most, while some do


@dataclass(frozen=True)
class Limits:
    """What the engine may use."""

    slots: int = 32  # requests that are answered at a time
    cache_tokens: int | None = None  # that the cache has room for; by default what fits into a part of free memory
    chunk: int | None = None  # tokens of prompts that a step takes in beside answers; by default 64, on a GPU 1024
    waiting: int = 1024  # requests that may wait
    length: int | None = None  # of a prompt and its answer; by default what the model was made for
    kept: int = 64  # ended requests whose beginnings can be used again; 0: none
    packed: bool = True  # on a CPU, copies of weights in a layout that is quicker for few rows


class Engine:
    """`submit` from any thread; answers come through the stream that it returns.

    `variants` are the adapters that are on, by the names that requests choose them by; without it, each adapter of the
    network alone. Requests that choose none get the network as it is at the start.
    """

    def __init__(
        self, network: Network, tokenizer: Any, limits: Limits | None = None,
        variants: Mapping[str, Collection[str]] | None = None, say: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        self.network, self.limits, self.say = network, limits or Limits(), say
        self.tokenizer = copy.deepcopy(tokenizer)  # others may use theirs in other threads meanwhile
        self._choice = Choice(network.model)
        known = surgery.names(network.model)
        given = {name: (name,) for name in known} if variants is None else variants
        if missing := sorted({name for names in given.values() for name in names} - set(known)):
            raise ModelError(f"no adapter {missing[0]!r}; the model has: {', '.join(known) or 'none'}")
        self.variants = {name: frozenset(names) for name, names in given.items()}
        config = network.config.get_text_config()
        self.vocabulary: int = config.vocab_size
        self.length = min(self.limits.length or 1 << 30, getattr(config, "max_position_embeddings", None) or 1 << 30)
        self.apart: str | None = None
        """Why each request is run by itself, if it is."""
        on_cpu = network.device.type == "cpu"
        self.chunk = self.limits.chunk or (64 if on_cpu else 1024)
        self._lock = threading.Condition()
        self._inbox: deque[Row] = deque()
        self._queue = Queue()  # from here on, of the engine's thread alone, but for `_live` and `_cancelled`
        self._tasks: deque[tuple[Callable, Future]] = deque()
        self._live: dict[str, Row] = {}
        self._cancelled: set[str] = set()
        self._running: list[Row] = []
        self._state = "new"
        self._thread: threading.Thread | None = None
        self._counts: Counter[str] = Counter()
        self._submitted = self._refused = 0
        self._room = {"cache_tokens": 0, "cache_idle_tokens": 0, "cache_capacity": 0, "reused_tokens": 0}
        self._runner: Runner

    # ------------------------------------------------------------------ from any thread
    def start(self) -> Engine:
        """Try the network, make the cache, and be ready. Raises ModelError where it cannot answer."""
        assert self._state == "new", "an engine is started once"
        if self.network.ends_in != "tokens":
            raise ModelError(f"{type(self.network.model).__name__} gives scores, no answers")
        if self.network.model in SERVED:
            raise ModelError("an engine answers with this network already: stop that one first")
        SERVED.add(self.network.model)
        ready: Future = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="luthier-engine", daemon=True)
        self._thread.start()
        ready.result()
        return self

    def stop(self, drain: float = 0.0) -> None:
        """Take no more requests, give those at hand `drain` seconds, end the rest as `cancelled`, and return."""
        with self._lock:
            if self._state == "new":
                self._state = "stopped"
            elif self._state == "running":
                self._state = "draining"
            self._lock.notify_all()
        if self._thread is None:
            return
        self._thread.join(drain)
        with self._lock:
            self._state = "stopped"
            self._lock.notify_all()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def submit(self, request: Request) -> Stream:
        """Raises Refused, with HTTP's status."""
        self.check(request)
        stream = Stream(request, self.cancel)
        row = Row.of(request, stream, self.tokenizer, self._names(request.adapter))
        with self._lock:
            if self._state != "running":
                raise Stopping("the engine is not running")
            if request.id in self._live:
                raise Refused(f"there is a request {request.id!r} already")
            waiting = len(self._live) - len(self._running)
            if waiting >= self.limits.waiting:
                self._refused += 1
                raise Busy(f"{waiting} requests are waiting already; try again later")
            self._live[request.id] = row
            self._inbox.append(row)
            self._submitted += 1
            self._lock.notify()
        return stream

    def check(self, request: Request) -> None:
        """Raises Refused where it can never be answered."""
        if problems := request.problems():
            raise Refused("; ".join(problems))
        self._names(request.adapter)
        if not all(isinstance(token, int) and 0 <= token < self.vocabulary for token in request.tokens):
            raise Refused(f"the prompt has a token outside of the model's vocabulary of {self.vocabulary}")
        if (wanted := len(request.tokens) + request.max_new_tokens) > self.length:
            raise Refused(
                f"the prompt has {len(request.tokens)} tokens and max_new_tokens={request.max_new_tokens}: {wanted} "
                f"in all, and the limit is {self.length}"
            )

    def _names(self, adapter: str | None) -> frozenset[str]:
        if adapter is None:
            return self._choice.at_start
        if adapter not in self.variants:
            raise Unknown(f"no adapter {adapter!r}; there are: {', '.join(sorted(self.variants)) or 'none'}")
        return self.variants[adapter]

    def cancel(self, id: str) -> None:
        """End a request as soon as the step at hand is done; one that is not known has ended already."""
        with self._lock:
            if id in self._live:
                self._cancelled.add(id)
                self._lock.notify()

    def between(self, function: Callable[[], Any]) -> Future:
        """Run a function on the engine's thread between two steps, where nobody else uses the network.

        It finds the network as it was before the start, in evaluation and without gradients.
        """
        future: Future = Future()
        with self._lock:
            if self._state != "running":
                raise Stopping("the engine is not running")
            self._tasks.append((function, future))
            self._lock.notify()
        return future

    @property
    def running(self) -> bool:
        """Whether it takes requests."""
        return self._state == "running"

    def stats(self) -> dict[str, float]:
        """Numbers for a monitor: what is in use now, and counts since the start."""
        with self._lock:
            running, live = len(self._running), len(self._live)
            counts = {name: self._counts[name] for name in COUNTS}
            counts |= {"submitted": self._submitted, "refused": self._refused}
        now = {"running": running, "waiting": max(live - running, 0), "slots": self.limits.slots, **self._room}
        return {name: float(n) for name, n in (now | counts).items()}

    # ------------------------------------------------------------------ the engine's thread
    def _run(self, ready: Future) -> None:
        try:
            self._runner = self._made_runner()
        except BaseException as error:
            with self._lock:
                self._state = "stopped"
            SERVED.discard(self.network.model)
            ready.set_exception(error)
            return
        together = self.apart is None
        before = self.network.model.config._attn_implementation
        room = int(COPIES * _free_memory(self.network.device)) if self.limits.packed else 0
        with runners.running(self.network, together), packed(self.network.model, room):
            with self._lock:
                self._state = "running" if self._state == "new" else self._state
            self._measure()
            ready.set_result(None)
            try:
                while self._turn(before):
                    pass
            finally:
                self._choice.end()
                self._all_end()
        SERVED.discard(self.network.model)

    def _made_runner(self) -> Runner:
        try:
            self.apart = runners.why_apart(self.network, self._choice, self.length)
            if self.apart is not None:
                self.say(f"requests are answered one by one: {self.apart}")
                capacity = self.limits.cache_tokens or self.limits.slots * min(self.length, 4096)
                self.length = min(self.length, capacity)
                return runners.Apart(self.network, self._choice, capacity)
            capacity = self.limits.cache_tokens or self._fitting()
            self.length = min(self.length, capacity)
            made = runners.Together(self.network, self._choice, capacity, self.limits.kept)
            made.mixes = runners.mixes(self.network, self._choice, [self._choice.at_start, *self.variants.values()])
            runners.warm(self.network, self._choice, made)
            return made
        finally:
            self._choice.end()

    def _fitting(self) -> int:
        """How many tokens the cache has room for: all slots at their longest, if a part of free memory holds that."""
        each = runners.bytes_per_token(self.network, self._choice)
        free = _free_memory(self.network.device)
        return max(min(self.limits.slots * self.length, int(MEMORY * free) // max(each, 1)), 256)

    def _turn(self, before: str) -> bool:
        """One step, or a wait for something to do; False at the end."""
        with self._lock:
            while not (self._live or self._tasks) and self._state == "running":
                self._lock.wait()
            if self._state == "stopped" or (self._state == "draining" and not self._live):
                return False
            tasks = list(self._tasks)
            self._tasks.clear()
            while self._inbox:
                self._queue.put(self._inbox.popleft())
            cancelled = set(self._cancelled)
        for function, future in tasks:
            self._task(function, future, before)
        try:
            self._leave(cancelled)
            self._admit()
            self._step()
        except Exception as error:  # no request is known to be to blame
            for row in list(self._running):
                self._end(row, "error", error=_told(error))
        self._measure()
        return True

    def _measure(self) -> None:
        runner = self._runner
        self._room = {
            "cache_tokens": runner.used, "cache_idle_tokens": runner.idle, "cache_capacity": runner.capacity,
            "reused_tokens": runner.reused,
        }  # fmt: skip

    def _leave(self, cancelled: Collection[str]) -> None:
        """Those that were cancelled, or have no time left."""
        now = time.monotonic()
        for row in [*self._running, *self._queue]:
            deadline = row.request.deadline
            if row.request.id in cancelled:
                self._end(row, "cancelled")
            elif deadline is not None and now > deadline:
                self._end(row, "deadline")

    def _admit(self) -> None:
        """Those that wait, as long as there is room."""
        while len(self._running) < self.limits.slots and (row := self._queue.next()) is not None:
            try:
                found = self._runner.admit(row, self._running)
            except Exception as error:
                self._end(row, "error", error=_told(error))
                continue
            if not found:
                if not self._running:
                    self._end(row, "error", error="the cache has no room for it")  # cannot be: `length` says so
                return
            self._queue.taken()
            self._running.append(row)
            if row.stream.started is None:
                row.stream.started = time.monotonic()
                self._counts["prompt_tokens"] += row.prompt

    def _step(self) -> None:
        pieces = self._pieces(self._running)
        if not pieces:
            return
        self._counts["steps"] += 1
        try:
            known, logits = self._runner.run(pieces)
        except Exception:
            self._counts["failed_steps"] += 1
            self._one_by_one(pieces)
            return
        self._took(pieces, known, logits)

    def _one_by_one(self, pieces: Sequence[Piece]) -> None:
        """Pieces of a pass that failed, each again by itself: one of them may be to blame."""
        for piece in map(self._runner.again, pieces):
            try:
                known, logits = self._runner.run([piece])
            except Exception as error:
                self._end(piece.row, "error", error=_told(error))
            else:
                self._took([piece], known, logits)

    def _took(self, pieces: Sequence[Piece], known: Sequence[Row], logits: Tensor | None) -> None:
        for piece in pieces:
            piece.row.computed += piece.count
        if logits is not None:
            self._next(known, logits)

    def _pieces(self, rows: Sequence[Row]) -> list[Piece]:
        """What this step runs: the next token of each answer, and a part of the prompts that have come."""
        ready = [row for row in rows if self._runner.follow(row)]
        pieces = [Piece(row, 1) for row in ready if row.left == 1]
        prompts = [row for row in ready if row.left > 1]
        # The more wait for their first token, beside those that wait for their next, the more of prompts.
        budget = self.chunk * (min(SHARED, max(1, len(prompts) // len(pieces))) if pieces else ALONE)
        if not self._runner.chunks:
            pieces += [Piece(row, row.left) for row in prompts[:1]]
        elif prompts:
            # Half for the one that came first, so that it is done some time; then the shortest, which soon are.
            shares = {prompts[0]: min(prompts[0].left, max(1, budget // 2))}
            budget -= shares[prompts[0]]
            for row in sorted(prompts, key=lambda row: row.left - shares.get(row, 0)):
                more = min(row.left - shares.get(row, 0), budget)
                shares[row] = shares.get(row, 0) + more
                budget -= more
            pieces += [Piece(row, count) for row, count in shares.items() if count]
        return self._with_room(pieces)

    def _with_room(self, pieces: list[Piece]) -> list[Piece]:
        """Those whose stretch of the cache is long enough, the youngest being put back where it is not."""
        gone: set[Row] = set()
        for piece in pieces:
            row = piece.row
            while row not in gone and not self._runner.room(row, row.computed + piece.count):
                youngest = self._running[-1]
                gone.add(youngest)
                self._running.remove(youngest)
                self._runner.release(youngest, keep=False)
                self._queue.put_back(youngest)
                self._counts["put_back"] += 1
        return [piece for piece in pieces if piece.row not in gone]

    def _next(self, rows: Sequence[Row], logits: Tensor) -> None:
        """A token for each of these rows, from its logits [R, V]."""
        wishes: list[Wish] = []
        asked: list[int] = []
        for at, row in enumerate(rows):
            try:
                wishes.append(row.wish(logits.shape[-1]))
                asked.append(at)
            except Exception as error:
                self._end(row, "error", error=_told(error))
        if not asked:
            return
        for at, drawn in zip(asked, draw(logits if len(asked) == len(rows) else logits[asked], wishes)):
            try:
                self._say(rows[at], drawn)
            except Exception as error:
                self._end(rows[at], "error", error=_told(error))

    def _say(self, row: Row, drawn: Drawn) -> None:
        """One token into its answer and out to whoever reads it."""
        if drawn.error is not None:
            self._end(row, "error", error=drawn.error)
            return
        token, request = drawn.token, row.request
        row.tokens.append(token)
        stops = token in request.stop
        text = "" if stops else row.texts.add(token)
        stop = token if stops else row.texts.stopped
        reason: Reason | None = "stop" if stop is not None else None
        if reason is None and len(row.tokens) - row.prompt >= request.max_new_tokens:
            reason = "length"
        self._counts["answer_tokens"] += 1
        if reason is None:
            row.stream.put(Event(token, text, drawn.logprob, drawn.top))
            return
        self._end(row, reason, drawn, text, stop)

    def _end(
        self, row: Row, reason: Reason, drawn: Drawn | None = None, text: str = "", stop: int | str | None = None,
        error: str | None = None,
    ) -> None:  # fmt: skip
        """Its last event; its place is for others."""
        if row in self._running:
            for other in self._running:
                if other.source is row:
                    self._runner.follow(other)
            self._running.remove(row)
        else:
            self._queue.remove(row)
        self._runner.release(row, keep=reason != "error")
        if stop is None or isinstance(stop, int):
            text += row.texts.end()
            if row.texts.stopped is not None and reason == "length":
                reason, stop = "stop", row.texts.stopped
        self._measure()
        token = None if drawn is None else drawn.token
        logprob, top = (None, ()) if drawn is None else (drawn.logprob, drawn.top)
        with self._lock:
            del self._live[row.request.id]
            self._cancelled.discard(row.request.id)
            self._counts[f"ended_{reason}"] += 1
        row.stream.put(Event(token, text, logprob, top, reason, stop, error))

    def _task(self, function: Callable[[], Any], future: Future, before: str) -> None:
        if not future.set_running_or_notify_cancel():
            return
        now = self.network.model.config._attn_implementation
        try:
            self._choice.end()
            self.network.model.set_attn_implementation(before)
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
        finally:
            self.network.model.set_attn_implementation(now)

    def _all_end(self) -> None:
        with self._lock:
            self._state = "stopped"
            while self._inbox:
                self._queue.put(self._inbox.popleft())
            tasks = list(self._tasks)
            self._tasks.clear()
        for row in [*self._running, *self._queue]:
            self._end(row, "cancelled")
        for _, future in tasks:
            if future.set_running_or_notify_cancel():
                future.set_exception(Stopping("the engine has stopped"))
        self._runner.clear()
        self._measure()


COUNTS = (
    "submitted", "refused", "steps", "failed_steps", "put_back", "prompt_tokens", "answer_tokens",
    "ended_stop", "ended_length", "ended_cancelled", "ended_deadline", "ended_error",
)  # fmt: skip
"""What `stats` counts since the start."""


def _told(error: Exception) -> str:
    """An error in words, without the lines of code that it came from."""
    return traceback.format_exception_only(error)[-1].strip()


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            told = dict(line.split(":", 1) for line in file)
        return int(told["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 << 30
