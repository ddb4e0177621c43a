"""Answers of a model behind an OpenAI-compatible address: retried, several at a time, and the key never told."""

from __future__ import annotations

import ipaddress
import json
import os
import random
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, NamedTuple

from ..errors import LuthierError

LARGEST = 16 << 20  # bytes of an answer that are read
MALFORMED = 3  # answers that are no chat completion, after which the server is not asked again: it may be another one
LONGEST_WAIT = 60.0  # seconds between two tries
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # states after which a request is sent again


class ServerError(LuthierError):
    """The server could not be reached, refused, or answered with something that is no chat completion."""


class NoCompletion(ServerError):
    """The server answered with something else: a page of a gateway, say, or half of an answer."""


class Question(NamedTuple):
    """What a model is asked, and how its answer is drawn."""

    messages: tuple[tuple[str, str], ...]  # (role, content)
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0  # another one draws another answer
    to: str = "model"  # which is asked, where there are several

    def told(self) -> list:
        """As JSON, for what answers are kept under."""
        return [[list(m) for m in self.messages], self.temperature, self.top_p, self.max_new_tokens, self.seed]


class Answer(NamedTuple):
    text: str
    cut: bool = False  # it did not come to its end

    def said(self) -> Answer:
        """Without the thoughts that a reasoning model wrote before it; nothing, and cut, where it only thought."""
        _, mark, rest = self.text.rpartition("</think>")
        if mark:
            return Answer(rest.strip(), self.cut)
        return Answer("", True) if rest.startswith("<think>") else self


def fence(*texts: str) -> str:
    """A line of dashes that stands in none of the texts, so that none can end what it is in."""
    runs = [len(run) for text in texts for run in re.findall("-{5,}", text)]
    return "-" * (max(runs, default=4) + 1)


@dataclass(frozen=True)
class ChatClient:
    """`/chat/completions` under a base address such as `http://localhost:8000/v1`."""

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"  # the variable that holds the key; sent only if it is set
    parallel: int = 8  # requests at a time
    timeout: float = 120.0  # seconds for each
    retries: int = 6
    body: Mapping[str, Any] = field(default_factory=dict)  # more keys of each request; None leaves one of ours out
    sleep: Callable[[float], Any] | None = None  # between tries; without it, until another request fails for good

    def answers(
        self, questions: Sequence[Question], keep: Callable[[int, Answer], None] = lambda place, answer: None
    ) -> list[Answer]:
        """One for each, in order; `keep` is called with each as it comes, from the thread that asked."""
        made: list[Answer | None] = [None] * len(questions)
        if not questions:
            return []
        stopped = threading.Event()

        def one(place: int) -> None:
            made[place] = answer = self._asked(questions[place], stopped)
            keep(place, answer)

        with ThreadPoolExecutor(min(self.parallel, len(questions))) as threads:
            waiting = [threads.submit(one, place) for place in range(len(questions))]
            try:
                for done in as_completed(waiting):
                    done.result()
            except BaseException:
                stopped.set()
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return [answer for answer in made if answer is not None]

    def answer(self, question: Question) -> Answer:
        return self._asked(question, threading.Event())

    # ------------------------------------------------------------------------ one request

    def _asked(self, question: Question, stopped: threading.Event) -> Answer:
        request, key = self._request(question)
        waited = random.Random(question.seed)  # of how long is waited, so that many do not come back at once
        for attempt in range(self.retries + 1):
            if stopped.is_set():
                raise ServerError(f"{self.base_url}: given up, as another request failed")
            try:
                with _opener(self.base_url).open(request, timeout=self.timeout) as response:
                    return self._read(response.read(LARGEST + 1), key)
            except NoCompletion:
                if attempt + 1 >= min(self.retries + 1, MALFORMED):
                    raise
                pause = 0.0
            except urllib.error.HTTPError as error:
                with error:
                    said = _hidden(error.read(2000).decode("utf-8", "replace"), key)
                if error.code not in AGAIN or attempt == self.retries:
                    told = f"{error.code} {error.reason}: {' '.join(said.split())[:500]}"
                    raise ServerError(f"{self.base_url}: {told}") from None
                after = error.headers.get("Retry-After", "")
                pause = float(after) if after.isdecimal() else 0.0
            except (OSError, HTTPException) as error:  # refused, reset, too slow
                if attempt == self.retries:
                    reason = getattr(error, "reason", None) or error
                    raise ServerError(
                        f"{self.base_url} cannot be reached: {_hidden(str(reason) or type(error).__name__, key)}; what "
                        "was answered is kept, the same command goes on"
                    ) from None
                pause = 0.0
            (self.sleep or stopped.wait)(min(LONGEST_WAIT, max(pause, 2.0**attempt * (0.5 + waited.random() / 2))))
        raise AssertionError("the last try returns or raises")

    def _request(self, question: Question) -> tuple[urllib.request.Request, str]:
        key = os.environ.get(self.api_key_env, "").strip()
        body = {
            "model": self.model, "messages": [{"role": role, "content": text} for role, text in question.messages],
            "temperature": question.temperature, "top_p": question.top_p, "max_tokens": question.max_new_tokens,
            "seed": question.seed, "stream": False,
        } | dict(self.body)  # fmt: skip
        data = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "luthier"}
        if key:
            if problem := unsafe(self.base_url):
                raise ServerError(problem)
            headers["Authorization"] = f"Bearer {key}"
        return urllib.request.Request(f"{self.base_url.rstrip('/')}/chat/completions", data, headers), key

    def _read(self, data: bytes, key: str) -> Answer:
        try:
            if len(data) > LARGEST:
                raise ValueError(f"more than {LARGEST:,} bytes")
            choice = json.loads(data)["choices"][0]
            text = choice["message"]["content"]
            if text is not None and not isinstance(text, str):
                raise TypeError("the content is no text")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            said = _hidden(data[:200].decode("utf-8", "replace"), key)
            why = f"{type(error).__name__}: {error}"
            raise NoCompletion(
                f"{self.base_url}: no chat completion ({why}): {said}; is it the address of an OpenAI-compatible "
                "server, such as http://localhost:8000/v1? What was answered is kept, the same command goes on"
            ) from None
        return Answer((text or "").strip(), choice.get("finish_reason") == "length")


def wrong_address(url: str) -> str | None:
    """What is wrong with a base address, as far as that can be said without calling it."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        return f"{url!r} is no address: {error}"
    if parts.scheme not in ("http", "https") or not host:
        return f"{url!r} is no address such as http://localhost:8000/v1"
    if parts.username or parts.password:
        return "the address holds a name or a password: a key belongs in an environment variable"
    if parts.query or parts.fragment:
        return f"{url!r}: give the address without '?' and '#'"
    return None


def unsafe(url: str) -> str | None:
    """A key is never sent in the clear over the open net."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "https" or _near(parts.hostname or ""):
        return None
    return f"{url}: the key would be sent unencrypted: use https, or unset its variable"


def _near(host: str) -> bool:
    """This machine, or one of its own network: a name without dots, or a private address."""
    try:
        told = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".localhost"))
    return told.is_private or told.is_loopback


def _hidden(text: str, key: str) -> str:
    """Servers may repeat the key that they refuse."""
    return text.replace(key, "***") if key else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key must not travel to where a server points."""

    def redirect_request(self, *_: Any) -> None:  # type: ignore[override]
        return None


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Proxies of the environment are for what is far."""
    host = urllib.parse.urlsplit(url).hostname or ""
    direct = [urllib.request.ProxyHandler({})] if _near(host) else []
    return urllib.request.build_opener(_NoRedirect, *direct)
