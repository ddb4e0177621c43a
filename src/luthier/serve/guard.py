"""What stands before every route: who may ask, how much, how fast; plain ASGI, so that nothing large is ever held."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import math
import time
import traceback
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from .gauges import Gauges
from .problems import Problem, failed, stopping
from .settings import LOCAL_NAMES, Serving

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN = frozenset({"/health", "/", "/page.js", "/page.css"})  # that no key is needed for
HEADERS = (
    (b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"), (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"), (b"x-frame-options", b"DENY"),
)  # fmt: skip
MOST_CLIENTS = 10_000  # whose rates are known


class Rate:
    """A bucket for each client that `each_minute` tokens flow into, as many as that at most."""

    def __init__(self, each_minute: float, now: Callable[[], float] = time.monotonic):
        self.full, self.flow, self.now = max(each_minute, 1.0), each_minute / 60, now
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> int:
        """0, or the seconds after which to try again."""
        now = self.now()
        left, at = self._left.pop(client, (self.full, now))
        left = min(self.full, left + (now - at) * self.flow)
        wait = 0 if left >= 1 else math.ceil((1 - left) / self.flow)
        self._left[client] = (left if wait else left - 1, now)
        if len(self._left) > MOST_CLIENTS:
            self._left.popitem(last=False)
        return wait


class Guard:
    """Checks a request, reads its body as far as it may go, hands both on, and lets nothing out but answers."""

    def __init__(self, app: Any, settings: Serving, gauges: Gauges, log: Callable[[str], None] = lambda text: None):
        self.app, self.settings, self.gauges, self.log = app, settings, gauges, log
        self.rate = Rate(settings.rate) if settings.rate else None
        self.at_hand = 0
        self.stopping = False
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        reply = _Reply(send, self.settings.write_timeout, scope)
        scope.setdefault("state", {})["id"] = reply.id
        started = time.perf_counter()
        self.at_hand += 1
        try:
            await self._answered(scope, receive, reply)
        except Problem as problem:
            await reply.problem(problem)
        except Gone:
            pass
        except Exception:
            self.log(f"request {reply.id}: {scope['method']} {scope['path']!r}\n{traceback.format_exc()}")
            await reply.problem(failed())
        finally:
            self.at_hand -= 1
            route = getattr(scope.get("route"), "path", "other")
            self.gauges.answered(route, reply.status, time.perf_counter() - started)

    async def _answered(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        headers = _headers(scope)
        self._check_host(headers)
        if self.stopping and scope["path"] != "/metrics":
            raise stopping()
        if self.at_hand > self.settings.connections:
            raise Problem(503, "too many requests at hand; try again later", code="overloaded", retry_after=1)
        client = self._client(scope, headers)
        scope["state"]["client"] = client
        if scope["method"] == "POST":
            self._check_origin(headers)
            if self.rate is not None and (wait := self.rate.take(client)):
                raise Problem(
                    429, f"more than {self.settings.rate:g} requests a minute; try again in {wait} s",
                    code="rate_limit_exceeded", retry_after=wait,
                )  # fmt: skip
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise Problem(415, "the body has to be application/json, and its header Content-Type to say so")
        body = await self._body(headers, receive)
        given = False

        async def hand_on() -> MutableMapping[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()  # the end of the connection

        await self.app(scope, hand_on, reply)

    # ------------------------------------------------------------------ who
    def _check_host(self, headers: dict[str, str]) -> None:
        """Without a key, another site's name that was pointed to this machine must not reach the server."""
        if self._keys:
            return
        name = _host_name(headers.get("host", ""))
        if name not in LOCAL_NAMES and name != self.settings.host:
            raise Problem(403, "this server is for this machine only: ask for localhost", code="host_not_allowed")

    def _check_origin(self, headers: dict[str, str]) -> None:
        """A page of another site must not ask in its visitor's name."""
        origin = headers.get("origin")
        foreign = origin is not None and urlsplit(origin).netloc != headers.get("host")
        if foreign or headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise Problem(403, "a page of another site asked", code="origin_not_allowed")

    def _client(self, scope: Scope, headers: dict[str, str]) -> str:
        """A name for who asks, by key or by address; never the key itself."""
        address = (scope.get("client") or ("unknown",))[0]
        if not self._keys or (scope["path"] in OPEN and scope["method"] in ("GET", "HEAD")):
            return address
        kind, _, given = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "replace")).digest()
        known = [hmac.compare_digest(digest, key) for key in self._keys]  # all of them, whatever is found
        if kind.lower() != "bearer" or not any(known):
            told = "a wrong key" if given else "no key: send the header Authorization: Bearer KEY"
            raise Problem(401, f"the request has {told}", code="invalid_api_key", closes=scope["method"] == "POST")
        return digest.hex()[:16]

    # ------------------------------------------------------------------ the body
    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        most = self.settings.max_body
        told = headers.get("content-length", "")
        too_large = Problem(413, f"the body has more than {most} bytes", code="body_too_large", closes=True)
        if told.isdecimal() and int(told) > most:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    part = message.get("body", b"")
                    size += len(part)
                    if size > most:
                        raise too_large
                    parts.append(part)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Problem(
                408, f"the body did not come within {self.settings.body_timeout:g} s", code="slow_body", closes=True
            ) from None


class Gone(Exception):
    """Who asked went away."""


class _Reply:
    """`send`, which adds headers, remembers whether an answer has begun, and does not wait for ever."""

    def __init__(self, send: Send, patience: float, scope: Scope):
        self._send, self.patience, self.scope = send, patience, scope
        self.status = 0
        self.id = uuid.uuid4().hex

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(b"x-request-id", self.id.encode()), *HEADERS]
            message["headers"] = [*message.get("headers", ()), *own]
        try:
            async with asyncio.timeout(self.patience):
                await self._send(message)
        except TimeoutError:
            abort = self.scope.get("luthier.abort")
            if abort is not None:
                abort()
            raise Gone from None

    async def problem(self, problem: Problem) -> None:
        if self.status:  # an answer has begun: what is wrong can no longer be told
            abort = self.scope.get("luthier.abort")
            if abort is not None:
                abort()
            return
        data = json.dumps(problem.body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        headers += [(name.encode(), value.encode()) for name, value in problem.headers.items()]
        try:
            await self({"type": "http.response.start", "status": problem.status, "headers": headers})
            await self({"type": "http.response.body", "body": b"" if self.scope["method"] == "HEAD" else data})
        except Gone:
            pass


def _headers(scope: Scope) -> dict[str, str]:
    """The first of each name."""
    made: dict[str, str] = {}
    for name, value in scope["headers"]:
        made.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    return made


def _host_name(host: str) -> str:
    """Without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host
