"""luthier generate: talk with a trained model, or have it answer what is given."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from . import subparser


def add(verbs: argparse._SubParsersAction) -> None:
    made = subparser(verbs, "generate", "talk with a run's model; prompts may be given, or come line by line")
    made.add_argument("run_folder", metavar="RUN")
    made.add_argument("prompts", nargs="*", metavar="PROMPT", help="answered together; without any, a conversation")
    made.add_argument("--system", help="a system turn to begin with")
    made.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    made.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    made.add_argument("--top-p", type=float, default=1.0)
    made.add_argument("--seed", type=int)
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ..config import read_run
    from ..errors import ConfigError

    read_run(Path(options.run_folder))
    if options.temperature < 0 or not 0 < options.top_p <= 1 or options.max_new_tokens < 1:
        raise ConfigError("--temperature must be at least 0, --top-p in (0, 1], --max-new-tokens at least 1")
    from ..assemble import restore
    from ..generate import Chat
    from ..monitor import Console

    made, _ = restore(Path(options.run_folder), Console(options.quiet).warn)
    chat = Chat(made.network, made.renderer, options.system)
    settings = {
        "max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "top_p": options.top_p,
        "seed": options.seed,
    }  # fmt: skip
    prompts = options.prompts
    if not prompts and not sys.stdin.isatty():
        prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if prompts:
        answers = chat.ask(*prompts, **settings)
        if not options.json:
            print("\n".join(answers))
        return [{"prompt": p, "answer": a} for p, a in zip(prompts, answers)]
    return _converse(chat, settings)


def _converse(chat: Any, settings: dict) -> None:
    print("Ctrl-D ends the conversation.", file=sys.stderr)
    while True:
        try:
            message = input("> ")
        except EOFError:
            print()
            return
        if message.strip():
            chat.say(message, lambda text: print(text, end="", flush=True), **settings)
            print()
