"""luthier generate: talk with a trained model, have it answer what is given, label it, or score it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
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
    made.add_argument(
        "--batch", metavar="FILE",
        help="answer the rows of a JSONL file, many at once: prompt or messages, and for itself max_new_tokens, "
             "temperature, top_p, top_k, seed, stop. RUN may be a model's folder, hub name or GGUF file then",
    )  # fmt: skip
    made.add_argument("--out", metavar="FILE", help="of --batch: answers as JSONL, in order; the same command goes on")
    made.add_argument("--slots", type=int, default=32, metavar="N", help="of --batch: rows answered at a time")
    made.add_argument("--top-k", type=int, default=0, help="of --batch; 0 is all (default)")
    made.add_argument("--stop", action="append", default=[], metavar="TEXT", help="of --batch: where answers end")
    made.epilog = (
        "A run that classifies gives each text its labels; the two texts of a pair have a tab between them. A reward "
        "model scores conversations: a prompt and its answer with a tab between, messages as a JSON list, or a row as "
        "a JSON object, whose chosen and rejected get a score each."
    )
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ..config import read_run
    from ..errors import ConfigError

    if options.batch is not None:
        return _batch(options)
    if options.out or options.top_k or options.stop or options.slots != 32:
        raise ConfigError("--out, --slots, --top-k and --stop go with --batch FILE")
    config = read_run(Path(options.run_folder))
    if options.temperature < 0 or not 0 < options.top_p <= 1 or options.max_new_tokens < 1:
        raise ConfigError("--temperature must be at least 0, --top-p in (0, 1], --max-new-tokens at least 1")
    from ..assemble import restore
    from ..generate import Chat
    from ..monitor import Console

    if config.objective.rows in ("labelled", "tagged"):
        return _classify(options, config)
    if config.objective.rows == "whole_pairs":
        return _rate(options)
    if config.objective.ends_in != "tokens":
        raise ConfigError(f"{options.run_folder} is a run of method={config.method}, which gives scores, no answers")
    made, _ = restore(Path(options.run_folder), Console(options.quiet).warn)
    chat = Chat(made.network, made.renderer, options.system)
    settings = {
        "max_new_tokens": options.max_new_tokens, "temperature": options.temperature, "top_p": options.top_p,
        "seed": options.seed,
    }  # fmt: skip
    prompts = _prompts(options)
    if prompts:
        answers = chat.ask(*prompts, **settings)
        if not options.json:
            print("\n".join(answers))
        return [{"prompt": p, "answer": a} for p, a in zip(prompts, answers)]
    return _converse(chat, settings)


def _batch(options: argparse.Namespace) -> Any:
    """The rows of a file."""
    import json

    from ..config import read_run
    from ..errors import ConfigError, DataError

    problems = []
    if options.prompts:
        problems.append("--batch FILE and prompts on the command line: give one of the two")
    if options.slots < 1:
        problems.append(f"--slots {options.slots}: at least 1")
    if options.temperature < 0 or not 0 < options.top_p <= 1 or options.max_new_tokens < 1 or options.top_k < 0:
        problems.append("--temperature and --top-k must be at least 0, --top-p in (0, 1], --max-new-tokens at least 1")
    if "" in options.stop:
        problems.append("--stop '': an empty text would end every answer at once")
    out = Path(options.out).expanduser() if options.out else None
    if out is not None and out.exists():
        problems.append(f"--out {out} exists: give another name, or remove it")
    if (Path(options.run_folder) / "config.yaml").is_file():
        config = read_run(Path(options.run_folder))
        if config.objective.ends_in != "tokens":
            problems.append(f"{options.run_folder} is a run of method={config.method}, which gives scores, no answers")
    if problems:
        raise ConfigError(problems)
    file = Path(options.batch).expanduser()
    if not file.is_file():
        raise DataError(f"--batch {file}: there is no such file")
    from ..monitor import Console
    from ..opened import opened
    from ..serve import batch

    batch.check(file)
    console = Console(options.quiet)
    asked = batch.Asked(
        options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.seed, tuple(options.stop),
        options.system,
    )  # fmt: skip
    rows: list[dict] = []
    tell = rows.append if options.json else lambda row: print(json.dumps(row, ensure_ascii=False), flush=True)
    made = opened(options.run_folder, console.warn)
    done = batch.answer(made, file, asked, out, options.slots, tell, console.say)
    if done["errors"]:
        console.warn(f"{done['errors']} of {done['rows']} rows have an error in the place of an answer")
    if out is None:
        return rows if options.json else None
    if not options.json:
        print(
            f"{out}: {done['rows']} answers, {done['answer_tokens']} tokens in {done['seconds']:.1f} s "
            f"({done['tokens_per_second']:g} a second)"
        )
    return done


def _prompts(options: argparse.Namespace) -> list[str]:
    """Those of the command line, else lines of the standard input, unless somebody types there."""
    if not options.prompts and not sys.stdin.isatty():
        return [line.rstrip("\n") for line in sys.stdin if line.strip()]
    return options.prompts


def _classify(options: argparse.Namespace, config: Any) -> Any:
    """Labels of texts."""
    from ..assemble import restore
    from ..classify import Classifier
    from ..errors import ConfigError
    from ..monitor import Console

    if options.system or options.temperature or options.top_p != 1.0:
        raise ConfigError("--system, --temperature and --top-p are of answers, and this run gives texts their labels")
    made, _ = restore(Path(options.run_folder), Console(options.quiet).warn)
    classifier = Classifier(
        made.network, made.renderer, config.data.format == "labelled_messages", config.batch.micro_tokens
    )  # fmt: skip
    return _said(options, classifier)


def _rate(options: argparse.Namespace) -> Any:
    """Scores of conversations."""
    from ..assemble import restore
    from ..errors import ConfigError
    from ..monitor import Console
    from ..rating import Rater, read

    if options.temperature or options.top_p != 1.0:
        raise ConfigError("--temperature and --top-p are of answers, and this run scores those that it is given")
    made, _ = restore(Path(options.run_folder), Console(options.quiet).warn)
    config = made.config
    rater = Rater(made.network, made.renderer, config.data.columns, config.batch.micro_tokens, options.system)
    return _said(options, lambda *lines: rater(*map(read, lines)))


def _said(options: argparse.Namespace, judge: Callable[..., list[dict]]) -> Any:
    """What is said of each text that is given, or typed."""
    texts = _prompts(options)
    if texts:
        found = judge(*texts)
        if not options.json:
            print("\n".join(_line(one) for one in found))
        return found
    print("Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return None
        if text.strip():
            print(_line(judge(text)[0]))


def _line(found: dict) -> str:
    """What is said of a text, in a line."""
    if "score" in found:
        return f"{found['score']:.6g}"
    if "chosen" in found:
        return "  ".join(f"{name} {found[name]:.6g}" for name in ("chosen", "rejected", "margin"))
    if "value" in found:
        return f"{found['value']:.6g}"
    if "tags" in found:
        return " ".join(f"{word}/{tag}" for word, tag, _ in found["tags"])
    likely = sorted(found["probabilities"].items(), key=lambda item: -item[1])[:5]
    told = ", ".join(f"{name} {p:.3f}" for name, p in likely)
    chosen = found["label"] if "label" in found else ", ".join(found["labels"]) or "none"
    return f"{chosen}  ({told})"


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
