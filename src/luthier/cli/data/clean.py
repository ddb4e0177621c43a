"""luthier data clean: do what a recipe says about rows; what goes or changes is kept beside, with its reason."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import subparser
from .audit import common, recipe_of, sayer

EPILOG = """\
examples:
  luthier data audit rows.jsonl --out audit/
  luthier data clean rows.jsonl clean.jsonl --recipe audit/recipe.yaml
  luthier data clean shards/ clean/ --set checks.language.languages=[en] --set checks.language.action=drop
  luthier data clean rows.csv clean.jsonl.zst --set 'columns={text: review, label: stars}'

Beside clean.jsonl come clean.removed.jsonl and clean.changed.jsonl: rows as they were, with why. They hold what was
masked. Cleaning what came out by the same recipe changes nothing.
"""


def add(actions: argparse._SubParsersAction) -> None:
    made = subparser(actions, "clean", "drop and repair rows by a recipe")
    made.epilog = EPILOG
    made.add_argument("source", nargs="+", metavar="SOURCE", help="files, folders, patterns, or a hub name")
    made.add_argument("out", metavar="OUT", help="a .jsonl file, perhaps .gz or .zst, or a folder for a shard each")
    common(made)
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ...errors import ConfigError

    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: give a number from 1 up")
    recipe = recipe_of(options)
    from ...prepare.clean import clean

    done = clean(options.source, Path(options.out), recipe, workers=options.workers, say=sayer(options),
                 split=options.split)  # fmt: skip
    if not options.json:
        show(done)
    if not done["kept"]:
        print(f"error: no row is kept; why stands in {done['removed_rows']}", file=sys.stderr)
    return done


def show(done: dict) -> None:
    print(f"rows     {done['rows']:,}")
    print(f"kept     {done['kept']:,}, of these {done['changed']:,} changed")
    print(f"removed  {done['removed']:,}")
    for title, key in (("removed", "why_removed"), ("changed", "why_changed")):
        for check, whats in done[key].items():
            print(f"  {title}: {check}: {', '.join(f'{what} {count:,}' for what, count in whats.items())}")
    print(f"written to {done['out']}")
    for name in ("removed_rows", "changed_rows"):
        if name in done:
            print(f"{name.replace('_', ' ')} in {done[name]}")
