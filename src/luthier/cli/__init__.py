"""The command line: verbs, options and exit codes; a verb is imported only when it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import EXIT_CODES, ConfigError, LuthierError

VERBS = (
    "train", "explain", "evaluate", "generate", "export", "quantise", "prune", "merge", "upload", "serve",
    "adapters", "methods", "data", "search", "demo",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Options are written in full; what is wrong with a command line is one of our errors."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def parser() -> argparse.ArgumentParser:
    codes = "\n".join(f"  {code:>3}  {text}" for code, text in EXIT_CODES.items())
    made = _Parser(
        prog="luthier", description="Fine-tune language models.", epilog=f"exit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    made.add_argument("--version", action="version", version=f"luthier {__version__}")
    verbs = made.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for verb in VERBS:
        import_module(f".{verb}", __name__).add(verbs)
    return made


def subparser(verbs: argparse._SubParsersAction, name: str, caption: str) -> argparse.ArgumentParser:
    """A verb's parser, with the options that all verbs have."""
    made = verbs.add_parser(
        name,
        help=caption,
        description=caption,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", action="store_true", help="print the answer as JSON on the standard output")
    made.add_argument("--quiet", action="store_true", help="say nothing but the answer")
    return made


def first_process() -> bool:
    """Of those that torchrun started; one speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. What a user can mend is one message, never a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    try:
        options = _parsed(arguments)
        answer = options.run(options)
        if as_json and answer is not None:
            print(json.dumps(answer, indent=1, ensure_ascii=False))
        sys.stdout.flush()
        return getattr(answer, "exit_code", 0)
    except LuthierError as error:
        return _tell(error, str(error), error.exit_code, as_json)
    except KeyboardInterrupt as error:
        return _tell(error, "stopped by Ctrl-C", 130, as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _tell(error, f"{error.filename or 'file system'}: {error.strerror or error}", 1, as_json)
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        remedy = "use a smaller batch.micro_tokens, or parallel.activation_checkpointing=1"
        return _tell(error, f"the GPU's memory is used up: {remedy}\n({str(error).splitlines()[0]})", 1, as_json)


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; overrides such as a.b=c may stand after options, too, which argparse alone does not have."""
    made = parser()
    options, rest = made.parse_known_args(arguments)
    if rest and (not hasattr(options, "settings") or any(r.startswith("-") or "=" not in r for r in rest)):
        made.parse_args(arguments)  # raises, naming what is wrong
    if rest:
        options.settings = [*options.settings, *rest]
    return options


def _tell(error: BaseException, message: str, code: int, as_json: bool) -> int:
    where = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
    print(f"error{where}: {message}", file=sys.stderr)
    if as_json and first_process():
        problems = error.problems if isinstance(error, ConfigError) else [message]
        print(json.dumps({"error": type(error).__name__, "problems": problems, "exit_code": code}, indent=1))
    return code
