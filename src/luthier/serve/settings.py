"""What a server may do: where it listens, who may ask, and how much."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError

KEY_VARIABLE = "LUTHIER_API_KEY"
SHORTEST_KEY = 16
POOLINGS = ("mean", "last", "first")
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Serving:
    """Settings of `luthier serve`; times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    """One of these must come with each request; without any, whoever reaches the address may ask."""
    name: str | None = None
    """Of the model in requests; by default the folder's."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Folders of further adapters, by the names that requests choose them by."""
    base: bool = False
    """Whether the base of a run that moved its weights is loaded beside it, to be compared with."""
    pooling: str | None = None
    """How hidden states become an embedding: mean, last or first."""
    max_new_tokens: int = 4096
    """The most that a request may ask for, and what it gets where it says nothing."""
    max_length: int | None = None
    """Of a prompt and its answer; by default what the model was made for."""
    slots: int = 32
    """Requests that are answered at a time."""
    waiting: int = 1024
    """Requests that may wait; more are refused (429)."""
    cache_tokens: int | None = None
    rate: float | None = None
    """Requests a minute of each client; more are refused (429)."""
    timeout: float = 600.0
    """For an answer as a whole; then 408."""
    max_body: int = 4 << 20
    connections: int = 1000
    """Requests at hand at a time, waiting ones included; more are refused (503)."""
    header_timeout: float = 10.0
    """For the lines before a body to come."""
    body_timeout: float = 30.0
    """For a body to come."""
    write_timeout: float = 30.0
    """For a piece of an answer to be taken by who asked."""
    drain: float = 30.0
    """That requests at hand have, once the server is to stop."""
    page: bool = True
    """Whether the chat page is there."""

    @property
    def local(self) -> bool:
        """Whether only this machine reaches it."""
        if self.host in LOCAL_NAMES:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def problems(self) -> list[str]:
        """What is wrong with these settings, as the command line names them."""
        found = []
        if not self.local and not self.keys:
            found.append(
                f"--host {self.host}: beyond this machine a key is required: put one into {KEY_VARIABLE}, or into a "
                "file and name it with --api-key-file (`python -c 'import secrets; print(secrets.token_urlsafe(32))'` "
                "makes one)"
            )
        for key in self.keys:
            if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                found.append(
                    f"a key is at least {SHORTEST_KEY} printable ASCII characters without spaces; one has {len(key)}"
                )
        if not 0 <= self.port < 65536:
            found.append(f"--port {self.port}: must be from 0 to 65535")
        if self.pooling is not None and self.pooling not in POOLINGS:
            found.append(f"--pooling {self.pooling}: must be one of {', '.join(POOLINGS)}")
        for name in self.adapters:
            if not name or len(name) > 128 or not name.isprintable() or name != name.strip():
                found.append(f"--adapter {name!r}: a name is 1 to 128 printable characters")
        for flag, value, least in (
            ("max-new-tokens", self.max_new_tokens, 1), ("max-length", self.max_length, 2), ("slots", self.slots, 1),
            ("waiting", self.waiting, 0), ("cache-tokens", self.cache_tokens, 2), ("max-body", self.max_body, 1024),
            ("connections", self.connections, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                found.append(f"--{flag} {value}: must be at least {least}")
        for flag, seconds in (
            ("timeout", self.timeout), ("header-timeout", self.header_timeout), ("body-timeout", self.body_timeout),
            ("write-timeout", self.write_timeout), ("rate", self.rate),
        ):  # fmt: skip
            if seconds is not None and not 0 < seconds < float("inf"):
                found.append(f"--{flag} {seconds:g}: must be more than 0")
        if not 0 <= self.drain < float("inf"):
            found.append(f"--drain {self.drain:g}: must be at least 0")
        return found

    def check(self) -> None:
        if found := self.problems():
            raise ConfigError(found)


def keys_of(file: str | None) -> tuple[str, ...]:
    """Keys from a file, one a line, or from the environment; never from a command line, which others can see."""
    if file is None:
        given = os.environ.get(KEY_VARIABLE, "").strip()
        return (given,) if given else ()
    path = Path(file).expanduser()
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {file}: {getattr(error, 'strerror', None) or 'is no text'}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"--api-key-file {file}: there is no key in it, one a line")
    return keys
