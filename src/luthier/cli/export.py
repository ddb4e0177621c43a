"""luthier export: write a run's model for other tools, checked by loading it again in a fresh process."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import subparser


def add(verbs: argparse._SubParsersAction) -> None:
    made = subparser(verbs, "export", "write a run's model where transformers, peft and servers read it")
    made.add_argument("run_folder", metavar="RUN")
    made.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    made.add_argument(
        "--as", dest="kind", required=True, choices=("adapter", "merged", "full", "quantised"),
        help="adapter: in PEFT's layout; merged: base and adapter in one; full: a model trained whole or in part; "
             "quantised: of a run with precision.kind=qat, in 4 or 8 bits",
    )  # fmt: skip
    made.add_argument(
        "--dtype", help="float32 or bfloat16, of the tensors of merged and full; by default those they compute in"
    )
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ..config import read_run

    read_run(Path(options.run_folder))
    from ..export import export

    done = export(Path(options.run_folder), Path(options.out), options.kind, options.dtype)
    if not options.json:
        print(
            f"{done['out']}: {', '.join(done['files'])}\nloaded again in a fresh process: {done['compared']} "
            f"differ by at most {done['largest_difference']:.2e} from the trained "
            f"model's (allowed {done['tolerance']:g})"
            + (f"; the base model differs by {done['difference_to_base']:.2f}" if "difference_to_base" in done else "")
        )
    return done
