"""luthier merge: several models or LoRAs of one base into one, measured on the task of each run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import subparser

EPILOG = """\
examples:
  luthier merge runs/french runs/polite out/both --by ties --density 0.5
  luthier merge out/model-a out/model-b out/between --by slerp --weights 0.3 0.7
  luthier merge out/model-a out/model-b out/both --by dare_ties --base out/base --bound 0.1
"""
OF_MERGING = ("weights", "density", "rank", "seed")


def add(verbs: argparse._SubParsersAction) -> None:
    made = subparser(verbs, "merge", "make one model, or one LoRA, of several of one base")
    made.epilog = EPILOG
    made.add_argument("sources", nargs="+", metavar="SOURCE", help="runs, folders of models or adapters, hub names")
    made.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    made.add_argument("--by", required=True, choices=("linear", "slerp", "ties", "dare", "dare_ties"))
    made.add_argument("--weights", nargs="+", type=float, metavar="W", help="one for each source")
    made.add_argument("--density", type=float, help="of ties and dare: share of each change that stays")
    made.add_argument("--base", help="of ties and dare with whole models: what they began with; of runs, their own")
    made.add_argument("--rank", type=int, help="of a LoRA by ties or dare (default: the ranks added up)")
    made.add_argument("--seed", type=int, help="of what dare drops (default: 0)")
    made.add_argument("--whole", action="store_true", help="merge the models of LoRA runs, not their adapters")
    made.add_argument("--dtype", help="float32, bfloat16 or float16, of the files; by default the first source's")
    made.add_argument(
        "--bound", type=float, metavar="SHARE",
        help="fail where the held-out perplexity of a run among the sources rises by more: 0.1 is 10 %%",
    )  # fmt: skip
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from pydantic import ValidationError

    from ..compress.merge.settings import Merging
    from ..errors import ConfigError

    given = {name: getattr(options, name) for name in OF_MERGING if getattr(options, name) is not None}
    try:
        wanted = Merging(by=options.by, **given)
    except ValidationError as error:
        raise ConfigError([f"--{e['loc'][0]}: {e['msg']} (given {e['input']!r})" for e in error.errors()]) from None
    if problems := wanted.problems(len(options.sources)):
        raise ConfigError(problems)
    from ..compress.merge import merging
    from ..monitor import Console

    console = Console(options.quiet)
    done = merging.merge(
        merging.Job(
            options.sources, Path(options.out), wanted, options.base, options.dtype, options.whole, options.bound,
            console.say, console.warn,
        )
    )  # fmt: skip
    if not options.json:
        print(merging.answer(done))
    return done
