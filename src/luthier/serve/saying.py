"""What the engine says as answers of OpenAI's API: whole, or as server-sent events while it comes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from .asking import Asked, Wanted
from .gauges import Gauges
from .problems import Problem, failed, stopping
from .requests import Event, Stream

DONE = b"data: [DONE]\n\n"
Item = tuple[int, Event]


def problem_of(event: Event, timeout: float, log: Callable[[str], None]) -> Problem | None:
    """What is wrong with an answer that ended otherwise than by itself."""
    if event.finish_reason == "deadline":
        return Problem(408, f"the answer was not there after {timeout:g} s; ask for fewer tokens", code="timeout")
    if event.finish_reason == "cancelled":
        return stopping()
    if event.finish_reason == "error":
        log(f"an answer failed: {event.error}")
        return failed("answer_failed")
    return None


class Choice:
    """One answer on its way."""

    def __init__(self, index: int, asked: Asked, stream: Stream, wanted: Wanted):
        self.index, self.asked, self.stream, self.wanted = index, asked, stream, wanted
        self.tokens: list[int] = []
        self.text = ""
        self.shown = ""
        self.entries: list[dict[str, Any]] = []  # log-probabilities
        self.offsets: list[int] = []
        self.calls: list[Any] = []
        self.reason: str | None = None

    def take(self, event: Event) -> tuple[str, list[dict[str, Any]]]:
        """The text that can be shown now, and log-probabilities of the tokens that are new."""
        new: list[dict[str, Any]] = []
        if event.token is not None:
            self.tokens.append(event.token)
            ended = event.finish_reason == "stop" and isinstance(event.stop, int)
            if event.logprob is not None and not ended:
                new.append(self._logprob(event))
                self.offsets.append(len(self.text))
                self.entries += new
        self.text += event.text
        shown = event.text
        sifted = self.asked.sifted
        if sifted is not None:
            shown = sifted.add(event.text)
        if event.finish_reason is not None:
            if sifted is not None:
                rest, self.calls = sifted.end()
                shown += rest
            self.reason = self._reason(event)
        self.shown += shown
        return shown, new

    def _reason(self, event: Event) -> str:
        if self.calls:
            return "tool_calls"
        if event.finish_reason == "length" and self.asked.guide is not None and self.asked.guide.complete(self.tokens):
            return "stop"  # its form is whole: there was nothing left to say
        return "length" if event.finish_reason == "length" else "stop"

    def _logprob(self, event: Event) -> dict[str, Any]:
        token = self.wanted.answering.token
        text, data = token(event.token or 0)
        top = [{"token": t, "logprob": p, "bytes": b} for n, p in event.top for t, b in [token(n)]]
        return {"token": text, "logprob": event.logprob, "bytes": data, "top_logprobs": top}


class Answers:
    """All answers to one body."""

    def __init__(self, wanted: Wanted, choices: Sequence[Choice], timeout: float, gauges: Gauges, log: Callable):
        self.wanted, self.choices, self.timeout, self.gauges, self.log = wanted, list(choices), timeout, gauges, log
        self.id = uuid.uuid4().hex
        self.created = int(time.time())
        self._queue: asyncio.Queue[Item] = asyncio.Queue()
        self._readers: list[asyncio.Task] = []
        self.started = time.monotonic()

    @classmethod
    def ask(cls, wanted: Wanted, timeout: float, gauges: Gauges, log: Callable) -> Answers:
        """Hand all requests to the engine, or none. Raises Refused."""
        engine = wanted.answering.engine
        for asked in wanted.asked:
            engine.check(asked.request)
        choices: list[Choice] = []
        try:
            for index, asked in enumerate(wanted.asked):
                choices.append(Choice(index, asked, engine.submit(asked.request), wanted))
        except BaseException:
            for choice in choices:
                choice.stream.cancel()
            raise
        return cls(wanted, choices, timeout, gauges, log)

    def end(self) -> None:
        """Whoever asked needs no more of them; their slots are free for others."""
        for reader in self._readers:
            reader.cancel()
        for choice in self.choices:
            if not choice.stream.done:
                choice.stream.cancel()
        first = min((c.stream.first for c in self.choices if c.stream.first is not None), default=None)
        said = sum(len(choice.tokens) for choice in self.choices)
        self.gauges.used(
            self.wanted.entry.name, self.wanted.prompt_tokens, said, None if first is None else first - self.started
        )

    async def events(self) -> AsyncIterator[tuple[Choice, Event]]:
        """Of all choices, as they come. Raises Problem."""
        if len(self.choices) == 1:
            async for event in self.choices[0].stream:
                yield self.choices[0], self._checked(event)
            return

        async def read(choice: Choice) -> None:
            async for event in choice.stream:
                self._queue.put_nowait((choice.index, event))

        self._readers = [asyncio.create_task(read(choice)) for choice in self.choices]
        left = len(self.choices)
        while left:
            index, event = await self._queue.get()
            left -= event.finish_reason is not None
            yield self.choices[index], self._checked(event)

    def _checked(self, event: Event) -> Event:
        if problem := problem_of(event, self.timeout, self.log):
            raise problem
        return event

    def usage(self) -> dict[str, Any]:
        said = sum(len(choice.tokens) for choice in self.choices)
        prompt = self.wanted.prompt_tokens
        reused = min(prompt, max((choice.stream.reused for choice in self.choices), default=0))
        return {
            "prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said,
            "prompt_tokens_details": {"cached_tokens": reused},
        }  # fmt: skip

    def head(self, kind: str) -> dict[str, Any]:
        prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
        return {
            "id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.wanted.entry.name,
            "system_fingerprint": "luthier",
        }  # fmt: skip


# ---------------------------------------------------------------------------- whole


async def whole_chat(answers: Answers) -> dict[str, Any]:
    async for choice, event in answers.events():
        choice.take(event)
    choices = []
    for choice in answers.choices:
        message: dict[str, Any] = {"role": "assistant", "content": choice.shown or (None if choice.calls else "")}
        message["refusal"] = None
        if choice.calls:
            message["tool_calls"] = [call.told() for call in choice.calls]
        choices.append({
            "index": choice.index, "message": message, "logprobs": _of_chat(choice, choice.entries),
            "finish_reason": choice.reason,
        })  # fmt: skip
    return answers.head("chat.completion") | {"choices": choices, "usage": answers.usage()}


async def whole_text(answers: Answers) -> dict[str, Any]:
    async for choice, event in answers.events():
        choice.take(event)
    choices = [
        {
            "index": choice.index, "text": choice.shown, "logprobs": _of_text(choice, choice.entries, choice.offsets),
            "finish_reason": choice.reason,
        }
        for choice in answers.choices
    ]  # fmt: skip
    return answers.head("text_completion") | {"choices": choices, "usage": answers.usage()}


def _of_chat(choice: Choice, entries: Sequence[dict]) -> dict | None:
    return None if choice.asked.request.logprobs is None else {"content": list(entries), "refusal": None}


def _of_text(choice: Choice, entries: Sequence[dict], offsets: Sequence[int]) -> dict | None:
    asked = choice.asked.request.logprobs
    if asked is None:
        return None
    top = [{one["token"]: one["logprob"] for one in entry["top_logprobs"]} for entry in entries]
    return {
        "tokens": [entry["token"] for entry in entries], "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": top if asked else None, "text_offset": list(offsets),
    }  # fmt: skip


# ---------------------------------------------------------------------------- as it comes


def sent(value: dict) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


async def streamed(answers: Answers, chat: bool, usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events; what goes wrong in the middle is the last of them."""
    kind = "chat.completion.chunk" if chat else "text_completion"
    head = answers.head(kind)
    if usage:
        head["usage"] = None

    def chunk(choice: Choice, said: dict, logprobs: dict | None, reason: str | None) -> bytes:
        one = {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": reason}
        return sent(head | {"choices": [one]})

    try:
        if chat:
            for choice in answers.choices:
                yield chunk(choice, {"delta": {"role": "assistant", "content": ""}}, None, None)
        async for choice, event in answers.events():
            before = len(choice.offsets)
            text, new = choice.take(event)
            ended = choice.reason is not None
            if not (text or new or ended):
                continue
            if chat:
                delta: dict[str, Any] = {"content": text} if text else {}
                if choice.calls:
                    delta["tool_calls"] = [{"index": i, **call.told()} for i, call in enumerate(choice.calls)]
                if delta or new:
                    yield chunk(choice, {"delta": delta}, _of_chat(choice, new) if new else None, None)
                if ended:
                    yield chunk(choice, {"delta": {}}, None, choice.reason)
            else:
                logprobs = _of_text(choice, new, choice.offsets[before:]) if new else None
                yield chunk(choice, {"text": text}, logprobs, choice.reason)
        if usage:
            yield sent(head | {"choices": [], "usage": answers.usage()})
        yield DONE
    except Problem as problem:
        yield sent(problem.body)
        yield DONE
    finally:
        answers.end()


async def until_gone(made: Any, receive: Callable) -> Any:
    """What a coroutine gives, unless who asked goes away before; then it is cancelled, and the answer is None."""
    work = asyncio.ensure_future(made)

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        for task in (work, watch):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
