"""luthier quantise: a model in fewer bits, loaded again by the library that reads it, and compared."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import subparser

EPILOG = """\
examples:
  luthier quantise runs/lora out/int8 --scheme int8
  luthier quantise out/model out/int4 --scheme int4 --rounding gptq --calibration rows.jsonl
  luthier quantise out/model out/mixed --scheme int4 --bits 4.5 --rounding gptq --calibration rows.jsonl
  luthier quantise out/model out/nf4 --scheme nf4
"""
OF_QUANTISING = (
    "scheme", "rounding", "group_size", "ranges", "per_tensor", "format", "bits", "samples", "sample_tokens", "damping",
)  # fmt: skip


def add(verbs: argparse._SubParsersAction) -> None:
    for name, caption in (("quantise", "give the weights of a model fewer bits"), ("quantize", "quantise")):
        _add(subparser(verbs, name, caption))


def _add(made: argparse.ArgumentParser) -> None:
    from ..compress.quantise.schemes import FORMATS, TABLE

    made.epilog = EPILOG
    made.add_argument("source", metavar="SOURCE", help="a run, a model's folder, a hub name or a GGUF file")
    made.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    made.add_argument(
        "--scheme", required=True, choices=[s.name for s in TABLE],
        help="; ".join(f"{s.name}: {s.caption}" for s in TABLE),
    )  # fmt: skip
    made.add_argument("--rounding", choices=("nearest", "gptq", "awq"), help="how (default: nearest)")
    made.add_argument(
        "--group-size", type=int,
        help="weights of a row that share a scale, -1 for a row (default of int4: 128, 64 or 32, as it divides)",
    )  # fmt: skip
    made.add_argument("--ranges", choices=("min_max", "mse"), help="of a group (default: mse, searched for)")
    made.add_argument("--per-tensor", action="store_true", default=None, help="of fp8: one scale for a whole weight")
    made.add_argument("--format", choices=FORMATS, help="of the files (default: the scheme's first)")
    made.add_argument("--bits", type=float, help="with int4: a budget; layers that matter most get 8 bits")
    made.add_argument("--calibration", metavar="ROWS", help="that gptq, awq and --bits look at; of a run its own")
    made.add_argument("--samples", type=int, help="rows of calibration (default: 32)")
    made.add_argument("--sample-tokens", type=int, help="of each of them, at most (default: 512)")
    made.add_argument("--damping", type=float, help="of gptq (default: 0.01)")
    made.add_argument(
        "--held-out", metavar="ROWS|N|SHARE",
        help="rows that perplexity is measured on (default: a tenth of --calibration, or English text)",
    )  # fmt: skip
    made.add_argument("--dtype", help="float32, bfloat16 or float16, of scales and all else; by default the source's")
    made.add_argument(
        "--bound", type=float, metavar="SHARE",
        help="fail where held-out perplexity rises by more (default: "
        + ", ".join(f"{s.name} {s.bound:g}" for s in TABLE) + ")",
    )  # fmt: skip
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from pydantic import ValidationError

    from ..compress.quantise.schemes import Quantising
    from ..errors import ConfigError

    given = {name: getattr(options, name) for name in OF_QUANTISING if getattr(options, name) is not None}
    try:
        wanted = Quantising(**given)
    except ValidationError as error:
        raise ConfigError(
            [f"--{str(e['loc'][0]).replace('_', '-')}: {e['msg']} (given {e['input']!r})" for e in error.errors()]
        ) from None
    if problems := wanted.problems():
        raise ConfigError(problems)
    from ..compress.quantise import quantising
    from ..monitor import Console

    console = Console(options.quiet)
    done = quantising.quantise(
        quantising.Job(
            options.source, Path(options.out), wanted, options.calibration, options.held_out, options.dtype,
            options.bound, console.say, console.warn,
        )
    )  # fmt: skip
    if not options.json:
        print(quantising.answer(done))
    return done
