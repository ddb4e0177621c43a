"""luthier evaluate: the held-out figures of a run, base against tuned where the base is still inside."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import subparser


def add(verbs: argparse._SubParsersAction) -> None:
    made = subparser(verbs, "evaluate", "measure a run on held-out rows: its own, or those of a file")
    made.add_argument("run_folder", metavar="RUN")
    made.add_argument("--data", help="rows to measure on, instead of the run's held-out rows")
    made.add_argument("--generate", type=int, metavar="N", help="answer so many prompts (default: as the run did)")
    made.add_argument("--batch-size", type=int, metavar="N", help="prompts answered at once")
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ..config import read_run

    config = read_run(Path(options.run_folder))
    from ..assemble import restore
    from ..data.dataset import Dataset, open_rows
    from ..errors import DataError
    from ..evaluate import measure
    from ..monitor import Console
    from .figures import show_report

    console = Console(options.quiet)
    made, chosen = restore(Path(options.run_folder), console.warn)
    console.say(f"weights of {chosen}")
    if options.data:
        only = {"train": options.data, "validation": None, "limit": None, "streaming": False}
        training, rows = open_rows(config.data.model_copy(update=only), made.renderer, None, console.say, console.warn)
    else:
        training, rows = open_rows(config.data, made.renderer, None, console.say, console.warn)
        if rows is None:
            console.warn("the run held no rows out: these are figures of the rows that it was trained on")
    rows = rows or training
    if not isinstance(rows, Dataset):
        raise DataError("the run held no rows of its stream out: name rows to evaluate with --data")
    wanted = config.evaluation.generate if options.generate is None else options.generate
    report = measure(made, rows, wanted, options.batch_size or config.evaluation.batch_size)
    if not options.json:
        show_report(report)
    return report
