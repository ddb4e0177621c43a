"""The listening part: uvicorn with a limit on slow headers, a hold on each connection, and an end in good order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import LuthierError
from .app import make_app
from .guard import Guard
from .served import Served
from .settings import Serving

BACKLOG = 2048
IDLE = 15  # seconds that a connection is kept for the next request


def protocol(patience: float) -> type[H11Protocol]:
    """HTTP/1.1 whose clients have `patience` seconds from a request's first byte to the end of its headers."""

    class Patient(H11Protocol):
        _waits: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._waits is None:
                self._wait()

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            if self.cycle is not None and self.cycle is not before:
                self._stop()
                self.cycle.scope["luthier.abort"] = self.transport.abort  # type: ignore[typeddict-unknown-key]

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.trailing_data[0] and self._waits is None:  # the beginning of the next request is there
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _wait(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self._stop()
                self._waits = self.loop.call_later(patience, self._too_slow)

        def _stop(self) -> None:
            if self._waits is not None:
                self._waits.cancel()
                self._waits = None

        def _too_slow(self) -> None:
            self._waits = None
            if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
                body = b'{"error": {"message": "the headers did not come in time", "type": "timeout_error", ' \
                       b'"param": null, "code": "slow_headers"}}'  # fmt: skip
                self.transport.write(
                    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: application/json\r\n"
                    b"content-length: %d\r\n\r\n%s" % (len(body), body)
                )
                self.transport.close()

    return Patient


class Server(uvicorn.Server):
    """Stops at a signal: no new requests, those at hand are given their time, then the rest is ended."""

    def __init__(self, config: uvicorn.Config, served: Served, guard: Guard, ready: Callable[[str], None]):
        super().__init__(config)
        self.served, self.guard, self.ready = served, guard, ready
        self._stopper: threading.Thread | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.stop(now=self._stopper is not None)

    def stop(self, now: bool = False) -> None:
        """In good order; the second time, `now`."""
        self.guard.stopping = True
        if now:
            self.force_exit = True
        elif self._stopper is None:
            drain = self.served.settings.drain
            self._stopper = threading.Thread(target=self.served.stop, args=(drain,), daemon=True)
            self._stopper.start()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready(self.address)

    @property
    def address(self) -> str:
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://{'[' + host + ']' if ':' in host else host}:{port}"


def make_server(
    served: Served, ready: Callable[[str], None] = lambda url: None, log: Callable[[str], None] = lambda text: None
) -> Server:
    settings = served.settings
    guard = make_app(served, log)
    config = uvicorn.Config(
        guard, host=settings.host, port=settings.port, http=protocol(settings.header_timeout), ws="none",
        lifespan="on", log_config=None, access_log=False, server_header=False, backlog=BACKLOG,
        timeout_keep_alive=IDLE, timeout_graceful_shutdown=int(settings.drain) + 5, proxy_headers=False,
    )  # fmt: skip
    return Server(config, served, guard, ready)


def listen(
    served: Served, ready: Callable[[str], None] = lambda url: None, log: Callable[[str], None] = lambda text: None
) -> None:
    """Answer until a signal says to stop. Raises LuthierError where the address is taken."""
    settings = served.settings
    _check_address(settings)
    served.start()
    server = make_server(served, ready, log)
    try:
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            server.run()
    finally:
        served.stop(0.0)
    if not server.started:
        raise LuthierError(f"--host {settings.host} --port {settings.port}: cannot listen there")


def _check_address(settings: Serving) -> None:
    """Before anything is made ready: whether the address can be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((settings.host, settings.port))
        except OSError as error:
            raise LuthierError(
                f"--host {settings.host} --port {settings.port}: {error.strerror or error}; give another"
            ) from None


__all__ = ["Server", "listen", "make_server"]
