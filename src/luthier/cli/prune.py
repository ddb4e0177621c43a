"""luthier prune: a model made smaller, healed where asked, measured before and after."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import subparser

EPILOG = """\
examples:
  luthier prune out/model out/half --by depth --target 0.5 --data rows.jsonl --heal distill --steps 300
  luthier prune runs/lora out/narrow --by width --target 0.7 --dimensions heads channels hidden
  luthier prune out/model out/narrow --by width --shape intermediate_size=1024 hidden_size=512 --data rows.jsonl
  luthier prune out/model out/sparse --by wanda --pattern 2:4 --calibration rows.jsonl
"""
OF_PRUNING = ("target", "pattern", "importance", "dimensions", "multiple", "samples", "sample_tokens")


def add(verbs: argparse._SubParsersAction) -> None:
    made = subparser(verbs, "prune", "take layers, heads, channels or single weights out of a model, and heal it")
    made.epilog = EPILOG
    made.add_argument("source", metavar="SOURCE", help="a run, a model's folder, a hub name or a GGUF file")
    made.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    made.add_argument("settings", nargs="*", metavar="a.b=c", help="settings of healing, as luthier train takes them")
    made.add_argument("--by", required=True, choices=("depth", "width", "wanda", "magnitude"))
    made.add_argument(
        "--target", type=float,
        help="share that stays: of the parameters outside of embeddings and head, or of single weights",
    )  # fmt: skip
    made.add_argument("--shape", nargs="+", metavar="KEY=N", help="or exact sizes, by their keys in config.json")
    made.add_argument("--pattern", choices=("unstructured", "2:4"), help="of wanda and magnitude")
    made.add_argument("--importance", choices=("block_influence", "perplexity"), help="of layers, with --by depth")
    made.add_argument(
        "--dimensions", nargs="+", choices=("heads", "channels", "hidden"),
        help="what may shrink with --by width (default: channels hidden)",
    )  # fmt: skip
    made.add_argument("--multiple", type=int, help="channels and hidden are multiples of it (default: 8)")
    made.add_argument("--data", metavar="ROWS", help="to measure on and to heal with; of a run its own without it")
    made.add_argument(
        "--held-out", metavar="ROWS|N|SHARE", help="rows that perplexity is measured on (default: a tenth of --data)"
    )
    made.add_argument("--calibration", metavar="ROWS", help="that importance is measured on (default: of --data)")
    made.add_argument("--samples", type=int, help="rows of calibration (default: 128)")
    made.add_argument("--sample-tokens", type=int, help="of each of them, at most (default: 512)")
    made.add_argument(
        "--heal", choices=("distill", "next_token"), help="train what is left, with the source as teacher"
    )
    made.add_argument("--steps", type=int, help="of healing")
    made.add_argument("--dtype", help="float32, bfloat16 or float16, of the files; by default the source's")
    made.add_argument(
        "--bound", type=float, metavar="SHARE", help="fail where held-out perplexity rises by more: 0.1 is 10 %%"
    )
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from pydantic import ValidationError

    from ..compress.prune.settings import Pruning
    from ..errors import ConfigError

    given = {name: getattr(options, name) for name in OF_PRUNING if getattr(options, name) is not None}
    if options.shape:
        given["shape"] = _shape(options.shape)
    try:
        wanted = Pruning(by=options.by, **given)
    except ValidationError as error:
        raise ConfigError(
            [f"--{str(e['loc'][0]).replace('_', '-')}: {e['msg']} (given {e['input']!r})" for e in error.errors()]
        ) from None
    if problems := wanted.problems():
        raise ConfigError(problems)
    from ..compress.prune import pruning
    from ..monitor import Console

    console = Console(options.quiet)
    done = pruning.prune(
        pruning.Job(
            options.source, Path(options.out), wanted, options.data, options.held_out, options.calibration,
            options.dtype, options.bound, options.heal, options.steps, options.settings, console.say, console.warn,
            options.quiet,
        )
    )  # fmt: skip
    done.pop("plan", None)
    if not options.json:
        print(pruning.answer(done))
    return done


def _shape(words: list[str]) -> dict[str, int]:
    from ..errors import ConfigError

    found = {}
    for word in words:
        key, equals, number = word.partition("=")
        if not equals or not number.isdigit():
            raise ConfigError(f"--shape {word}: KEY=N, such as num_hidden_layers=12")
        found[key] = int(number)
    return found
