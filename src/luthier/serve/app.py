"""The server's routes, in OpenAI's API: what comes in is checked, asked of the engine, and said back."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from .. import __version__
from ..errors import LuthierError
from . import answers, asking, page, saying, schemas
from .gauges import Gauges
from .guard import Guard
from .pooled import check, of_network, shortened
from .problems import Problem, failed, of_error
from .served import Answering, Entry, Scoring, Served
from .settings import Serving

FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": answers.Failure, "description": told}
    for status, told in {
        400: "Something in the request is wrong", 401: "No key, or a wrong one", 403: "Not from where it may come",
        404: "No model of that name", 408: "The request or its answer took too long", 413: "The body is too large",
        415: "The body is no JSON", 429: "Too many requests", 500: "The server failed",
        503: "The server is busy or stopping",
    }.items()
}  # fmt: skip


class Json(JSONResponse):
    """JSON that can always be written."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def make_app(served: Served, log: Callable[[str], None] = lambda text: None) -> Guard:
    """The whole server as an ASGI application; its engines are started and stopped by who runs it."""
    settings = served.settings
    gauges = Gauges(served.stats)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = 8
        yield

    app = FastAPI(
        title="Luthier", version=__version__, description="Answers of a fine-tuned model, in OpenAI's API.",
        docs_url=None, redoc_url=None, openapi_url="/openapi.json", lifespan=lifespan, default_response_class=Json,
        responses=FAILURES, redirect_slashes=False,
        openapi_tags=None, swagger_ui_oauth2_redirect_url=None,
    )  # fmt: skip
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(LuthierError, _luthier)
    _answers(app, served, settings, gauges, log)
    _numbers(app, served, log)
    _about(app, served, gauges, settings)
    return Guard(app, settings, gauges, log)


def _entry(served: Served, name: str) -> Entry:
    found = served.get(name)
    if found is None:
        known = ", ".join(sorted(served.entries))
        raise Problem(404, f"there is no model {name[:80]!r}; there are: {known}", "model", "model_not_found")
    return found


# ---------------------------------------------------------------------------- routes


def _answers(app: FastAPI, served: Served, settings: Serving, gauges: Gauges, log: Callable) -> None:
    async def answered(body: Any, request: Request, read: Callable, whole: Callable, chat: bool) -> Response:
        entry = _entry(served, body.model)
        if body.stream_options is not None and not body.stream:
            raise Problem(400, "stream_options needs stream=true", "stream_options")
        client = request.state.client
        wanted = await anyio.to_thread.run_sync(lambda: read(body, entry, settings, client))
        asked = saying.Answers.ask(wanted, settings.timeout, gauges, log)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = saying.streamed(asked, chat, usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        try:
            told = await saying.until_gone(whole(asked), request.receive)
        finally:
            asked.end()
        return Response(status_code=499) if told is None else Json(told)

    both = {"description": "The answer; with `stream`, server-sent events", "content": {"text/event-stream": {}}}

    @app.post("/v1/chat/completions", response_model=answers.ChatCompletion, responses={200: both})
    async def chat_completions(body: schemas.ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await answered(body, request, asking.chat, saying.whole_chat, True)

    @app.post("/v1/completions", response_model=answers.Completion, responses={200: both})
    async def completions(body: schemas.CompletionRequest, request: Request) -> Response:
        """Go on with texts."""
        return await answered(body, request, asking.completions, saying.whole_text, False)


def _numbers(app: FastAPI, served: Served, log: Callable) -> None:
    async def asked(source: Answering | Scoring, function: Callable[[], Any]) -> Any:
        """On the thread that the network belongs to."""
        future = source.engine.between(function) if isinstance(source, Answering) else source.between(function)
        return await asyncio.wrap_future(future)

    def doing(name: str, what: str) -> tuple[Entry, Any]:
        entry = _entry(served, name)
        if what not in entry.does:
            raise Problem(400, f"the model {entry.name!r} gives {', '.join(entry.does)}, no {what}", "model")
        assert entry.source is not None
        return entry, entry.source

    @app.post("/v1/embeddings", response_model=answers.Embeddings)
    async def embeddings(body: schemas.EmbeddingRequest) -> Response:
        """Vectors of length 1."""
        entry, source = doing(body.model, "embeddings")
        tokenizer = source.tokenizer if isinstance(source, Answering) else entry.encoder.tokenizer
        rows = await anyio.to_thread.run_sync(lambda: asking.texts_or_tokens(body.input, tokenizer))
        if not rows:
            raise Problem(400, "there is no input", "input")
        if isinstance(source, Answering):
            engine = source.engine
            check(rows, engine.length, engine.vocabulary)
            on, how = engine.variants[entry.adapter or ""], served.settings.pooling or "last"
            vectors = await asked(source, lambda: of_network(engine.network, rows, on, how))
        else:
            vectors = await asked(source, lambda: entry.encoder.embed(rows))
        vectors = shortened(vectors, body.dimensions).numpy().astype("<f4")
        as_text = body.encoding_format == "base64"
        data = [
            {"object": "embedding", "index": i, "embedding": _base64(vector) if as_text else vector.tolist()}
            for i, vector in enumerate(vectors)
        ]
        count = sum(map(len, rows))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return Json({"object": "list", "data": data, "model": entry.name, "usage": usage})

    @app.post("/v1/classify", response_model=answers.Judged)
    async def classify(body: schemas.ClassifyRequest) -> Response:
        """Labels of texts, with their probabilities."""
        entry, source = doing(body.model, "classify")
        texts = [body.input] if isinstance(body.input, str) else body.input
        found = await asked(source, lambda: entry.judge(*texts))
        return Json({"object": "list", "data": [_listed(i, one) for i, one in enumerate(found)], "model": entry.name})

    @app.post("/v1/score", response_model=answers.Judged)
    async def score(body: schemas.ScoreRequest) -> Response:
        """Scores of conversations."""
        entry, source = doing(body.model, "score")
        given: list[Any] = [
            one if isinstance(one, str) else [message.model_dump(exclude_none=True) for message in one]
            for one in body.input
        ]
        found = await asked(source, lambda: entry.judge(*given))
        return Json({"object": "list", "data": [_listed(i, one) for i, one in enumerate(found)], "model": entry.name})


def _about(app: FastAPI, served: Served, gauges: Gauges, settings: Serving) -> None:
    @app.get("/v1/models", response_model=answers.Models)
    async def models() -> Response:
        """What can be asked."""
        return Json({"object": "list", "data": [entry.told() for entry in served.entries.values()]})

    @app.get("/v1/models/{model:path}", response_model=answers.Model)
    async def model(model: str) -> Response:
        return Json(_entry(served, model).told())

    @app.get("/health", response_model=answers.Health)
    async def health() -> Response:
        """Whether the engines run."""
        if not all(engine.running for engine in served.engines.values()):
            raise Problem(503, "an engine has stopped", code="stopped")
        return Json({"status": "ok"})

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(gauges.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    if settings.page:

        @app.get("/", response_class=HTMLResponse, include_in_schema=False)
        async def chat_page() -> Response:
            text, policy = page.page()
            return HTMLResponse(text, headers={"content-security-policy": policy})


def _listed(index: int, told: dict) -> dict:
    return {"index": index, **told}


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.tobytes()).decode()


# ---------------------------------------------------------------------------- what goes wrong


def _fault(problem: Problem) -> Response:
    return Json(problem.body, status_code=problem.status, headers=problem.headers)


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return _fault(error)


async def _luthier(request: Request, error: Exception) -> Response:
    assert isinstance(error, LuthierError)
    return _fault(of_error(error))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code >= 500:
        return _fault(failed())
    told = {404: "there is nothing at this path", 405: "this path takes another method", 400: "the body is no JSON"}
    made = _fault(Problem(error.status_code, told.get(error.status_code, "the request cannot be read")))
    for name, value in (error.headers or {}).items():
        made.headers[name] = value
    return made


async def _invalid(request: Request, error: Exception) -> Response:
    """The first thing that is wrong, without what was sent."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return _fault(Problem(400, "the body is no JSON", code="invalid_json"))
    param = ".".join(place)[:200] or None
    if first["type"] == "extra_forbidden":
        return _fault(Problem(400, f"{param}: there is no such parameter here", param, "unknown_parameter"))
    return _fault(Problem(400, f"{param or 'the body'}: {first['msg']}", param, "invalid_value"))
