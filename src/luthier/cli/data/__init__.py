"""luthier data ACTION: rows from raw files to what is trained on; an action is a file here."""

from __future__ import annotations

import argparse
from importlib import import_module

from .. import _Parser

ACTIONS = ("inspect", "audit", "clean", "augment", "label", "split")


def add(verbs: argparse._SubParsersAction) -> None:
    caption = "prepare rows and look at them as training will see them"
    made = verbs.add_parser("data", help=caption, description=caption, allow_abbrev=False)
    actions = made.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=_Parser)
    for action in ACTIONS:
        import_module(f".{action}", __name__).add(actions)
