"""What a client is told when a request is not answered: a status, and OpenAI's form of an error."""

from __future__ import annotations

from typing import Any

from ..errors import LuthierError
from .requests import Busy, Refused, Stopping, Unknown

KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 415: "invalid_request_error",
    429: "rate_limit_error", 500: "server_error", 503: "overloaded_error",
}  # fmt: skip
LONGEST = 600  # characters of a message


class Problem(Exception):
    """`status` is HTTP's; `param` is the part of the request that is at fault."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        retry_after: int | None = None, closes: bool = False,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after
        self.closes = closes  # the connection: what is left of the request is not read

    @property
    def body(self) -> dict[str, Any]:
        message = self.message if len(self.message) <= LONGEST else self.message[: LONGEST - 3] + "..."
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        made = {}
        if self.retry_after is not None:
            made["retry-after"] = str(self.retry_after)
        if self.status == 401:
            made["www-authenticate"] = "Bearer"
        if self.closes:
            made["connection"] = "close"
        return made


def of_error(error: LuthierError) -> Problem:
    """What the engine, the data path or a grammar refuses."""
    if isinstance(error, Busy):
        return Problem(429, str(error), code="queue_full", retry_after=1)
    if isinstance(error, Stopping):
        return stopping()
    if isinstance(error, Unknown):
        return Problem(404, str(error), "model", "model_not_found")
    if isinstance(error, Refused):
        length = "limit is" in str(error)
        return Problem(error.status, str(error), code="context_length_exceeded" if length else None)
    return Problem(400, str(error))


def stopping() -> Problem:
    return Problem(503, "the server is stopping", code="stopping", retry_after=5)


def failed(code: str | None = None) -> Problem:
    """Our own mistake; what it was stands in the server's log."""
    return Problem(500, "the server failed on this request; its log says how", code=code)
