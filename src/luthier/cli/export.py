"""luthier export: write a model for other tools, checked by loading it again in a fresh process."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..export.formats import KINDS, TABLE
from . import subparser


def add(verbs: argparse._SubParsersAction) -> None:
    made = subparser(verbs, "export", "write a model where transformers, peft, llama.cpp and servers read it")
    made.add_argument("source", metavar="SOURCE", help="a run; or a model: a folder, a name on the hub, a GGUF file")
    made.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    made.add_argument(
        "--as", dest="kind", required=True, choices=KINDS,
        help="; ".join(f"{form.name}: {form.caption}" for form in TABLE),
    )  # fmt: skip
    typed = "; ".join(f"{form.name}: {', '.join(form.dtypes)}" for form in TABLE if form.dtypes)
    made.add_argument("--dtype", help=f"of the tensors, by default that they compute in ({typed})")
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ..export import export

    say = (lambda text: None) if options.quiet or options.json else (lambda text: print(text, file=sys.stderr))
    done = export(options.source, Path(options.out), options.kind, options.dtype, say)
    if not options.json:
        print(
            f"{done['out']}: {', '.join(done['files'])}\nloaded again in a fresh process: {done['compared']} "
            f"differ by at most {done['largest_difference']:.2e} from the trained "
            f"model's (allowed {done['tolerance']:g})"
            + (f"; the base model differs by {done['difference_to_base']:.2f}" if "difference_to_base" in done else "")
        )
    return done
