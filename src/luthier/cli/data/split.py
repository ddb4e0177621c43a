"""luthier data split: rows to train, validation and test, with a card of what is in each."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from .. import subparser
from .audit import sayer

EPILOG = """\
examples:
  luthier data split rows.jsonl out/ --sizes train=0.9,validation=0.05,test=0.05
  luthier data split rows.jsonl out/ --sizes train,validation=500,test=500 --stratify label
  luthier data split shards/ out/ --sizes train=0.8,test=0.2 --group user.id --compress zst
  luthier data split rows.jsonl out/ --sizes train,test --time created_at --cuts test=2026-03-01

A size is a share, a number of rows, or nothing: the rest. Rows that say the same stay together, and so do rows of one
group. A row's side follows from what it says and from the seed, not from its place.
"""


def add(actions: argparse._SubParsersAction) -> None:
    made = subparser(actions, "split", "part rows into train, validation and test")
    made.epilog = EPILOG
    made.add_argument("source", nargs="+", metavar="SOURCE", help="files, folders, patterns, or a hub name")
    made.add_argument("out", metavar="OUT", help="a folder that is not there yet")
    made.add_argument("--sizes", default="train=0.9,validation=0.1", metavar="A=0.9,B=500,C")
    made.add_argument("--stratify", metavar="KEY", help="each side has the classes of this key in equal shares")
    made.add_argument("--group", metavar="KEY", help="rows with one value of this key are on one side")
    made.add_argument("--time", metavar="KEY", help="sides follow each other in time, the first side is the oldest")
    made.add_argument("--cuts", metavar="B=TIME,C=TIME", help="when each side but the first begins, instead of sizes")
    made.add_argument("--seed", type=int, default=0, help="of which rows go where (default: 0)")
    made.add_argument("--compress", choices=("gz", "zst"), help="what is written")
    made.add_argument("--license", metavar="ID", help="for the card, such as apache-2.0")
    made.add_argument("--title", help="of the card (default: the name of OUT)")
    made.add_argument("--split", default="train", help="of a source with several splits (default: train)")
    made.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ...errors import ConfigError
    from ...prepare.card import card
    from ...prepare.split import Split, cuts_of, sizes_of, split

    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: give a number from 1 up")
    cuts = cuts_of(options.cuts) if options.cuts else None
    how = Split(sizes_of(options.sizes), options.stratify, options.group, options.time, cuts, options.seed)
    out = Path(options.out)
    suffix = f".{options.compress}" if options.compress else ""
    report = split(options.source, out, how, workers=options.workers, suffix=suffix, say=sayer(options),
                   part=options.split)  # fmt: skip
    report["card"] = str(
        card(out, report, title=options.title or out.name, licence=options.license, command=_command(options),
             told=_told(how))
    )  # fmt: skip
    if not options.json:
        show(report)
    return report


def _command(options: argparse.Namespace) -> str:
    """As it was given, with the names of files only."""
    words = ["luthier", "data", "split", *(Path(name).name for name in options.source), Path(options.out).name]
    for name in ("sizes", "stratify", "group", "time", "cuts", "seed"):
        value = getattr(options, name)
        words += [f"--{name}", str(value)] if value not in (None, "") else []
    return shlex.join(words)


def _told(how: Any) -> list[str]:
    told = ["rows that say the same are on one side"]
    if how.group:
        told = [f"rows with one {how.group} are on one side"]
    if how.stratify:
        told.append(f"each side has the classes of {how.stratify} in equal shares, as far as they part")
    if how.time:
        told = [f"sides follow each other by {how.time}"]
    return told


def show(report: dict) -> None:
    for name, side in report["sides"].items():
        print(f"{name:12} {side['rows']:>10,} rows {side['share']:>8.2%}  {report['files'][name]}")
    for name, classes in report["lacking"].items():
        print(f"{name} has no row of {', '.join(classes[:10])}{' ...' if len(classes) > 10 else ''}: too few of them")
    print(f"card         {report['card']}")
