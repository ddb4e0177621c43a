"""luthier serve: an OpenAI-compatible server of a run, a model or a GGUF file."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from ..errors import ConfigError, LuthierError, ModelError
from . import subparser


def add(verbs: argparse._SubParsersAction) -> None:
    made = subparser(verbs, "serve", "answer in OpenAI's API: chat, completions, embeddings, labels, scores")
    made.add_argument("source", metavar="SOURCE", help="a run, a model's folder, a hub name, or a GGUF file")
    made.add_argument("--host", default="127.0.0.1", help="this machine only, by default; beyond it a key is required")
    made.add_argument("--port", type=int, default=8000, help="0 takes one that is free")
    made.add_argument(
        "--api-key-file", metavar="FILE", help="keys, one a line, of which each request must bring one; or "
        "LUTHIER_API_KEY in the environment",
    )  # fmt: skip
    made.add_argument("--name", help="of the model in requests; by default the folder's")
    made.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=FOLDER", dest="adapters",
        help="one more model: the base with this adapter; may be given several times",
    )  # fmt: skip
    made.add_argument(
        "--base", action="store_true", help="serve the base too, as NAME-base, where the run moved its weights "
        "(where it trained an adapter the base is there anyway)",
    )  # fmt: skip
    made.add_argument("--pooling", metavar="HOW", help="of embeddings: mean, last or first")
    made.add_argument("--max-new-tokens", type=int, default=4096, metavar="N", help="the most for one answer (4096)")
    made.add_argument("--max-length", type=int, metavar="N", help="tokens of a prompt and its answer")
    made.add_argument("--slots", type=int, default=32, metavar="N", help="requests answered at a time (32)")
    made.add_argument("--waiting", type=int, default=1024, metavar="N", help="requests that may wait (1024)")
    made.add_argument("--cache-tokens", type=int, metavar="N", help="that the cache has room for")
    made.add_argument("--rate", type=float, metavar="N", help="requests a minute of each client")
    made.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for an answer (600)")
    made.add_argument("--max-body", type=int, default=4 << 20, metavar="BYTES", help="of a request (4 MiB)")
    made.add_argument("--connections", type=int, default=1000, metavar="N", help="requests at hand at a time (1000)")
    made.add_argument("--header-timeout", type=float, default=10.0, metavar="SECONDS", help="for headers to come (10)")
    made.add_argument("--body-timeout", type=float, default=30.0, metavar="SECONDS", help="for a body to come (30)")
    made.add_argument(
        "--write-timeout", type=float, default=30.0, metavar="SECONDS", help="for a piece of an answer to be taken (30)"
    )
    made.add_argument(
        "--drain", type=float, default=30.0, metavar="SECONDS", help="for requests at hand, after SIGTERM (30)"
    )
    made.add_argument("--no-page", action="store_true", help="without the chat page")
    made.add_argument("--engine", choices=("luthier", "vllm"), default="luthier", help="vllm hands over to vLLM")
    made.epilog = "SIGTERM or Ctrl-C: no new requests, those at hand are answered; a second one ends it at once."
    made.set_defaults(run=run)


def settings_of(options: argparse.Namespace) -> Any:
    """Raises ConfigError, with all that is wrong."""
    from ..serve.settings import Serving, keys_of

    adapters: dict[str, str] = {}
    for given in options.adapters:
        name, equals, folder = given.partition("=")
        if not equals or not name or not folder or name in adapters:
            raise ConfigError(f"--adapter {given}: expected NAME=FOLDER, each name once")
        adapters[name] = folder
    made = Serving(
        options.host, options.port, keys_of(options.api_key_file), options.name, adapters, options.base,
        options.pooling, options.max_new_tokens, options.max_length, options.slots, options.waiting,
        options.cache_tokens, options.rate, options.timeout, options.max_body, options.connections,
        options.header_timeout, options.body_timeout, options.write_timeout, options.drain, not options.no_page,
    )  # fmt: skip
    made.check()
    return made


def run(options: argparse.Namespace) -> Any:
    settings = settings_of(options)
    if options.engine == "vllm":
        return _hand_over(options, settings)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise LuthierError(f"serving needs {error.name}: pip install 'luthier[serve]'") from None
    from ..opened import problem

    if text := problem(options.source):
        raise ModelError(text)
    from ..monitor import Console

    tell = Console(options.quiet).warn
    from ..serve.listening import listen
    from ..serve.served import served

    made = served(options.source, settings, tell)

    def ready(url: str) -> None:
        if options.json:
            import json

            print(json.dumps({"url": url, "models": list(made.entries)}), flush=True)
        elif not options.quiet:
            print(f"{url}  serving {', '.join(made.entries)}; Ctrl-C stops", file=sys.stderr, flush=True)
            if settings.page:
                print(f"{url}/  a page to chat", file=sys.stderr, flush=True)

    listen(made, ready, lambda text: print(text, file=sys.stderr, flush=True))
    return None


def _hand_over(options: argparse.Namespace, settings: Any) -> None:
    """This process becomes vLLM."""
    from ..serve.vllm import arguments, command

    given, environment = arguments(options.source, settings)
    program = command()
    os.execvpe(program[0], [*program, *given], {**os.environ, **environment})
