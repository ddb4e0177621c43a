"""luthier methods: the named methods, and the point on the axes that each one is."""

from __future__ import annotations

import argparse
from typing import Any

from . import subparser


def add(verbs: argparse._SubParsersAction) -> None:
    made = subparser(verbs, "methods", "list the methods that `luthier train --method` knows")
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ..methods import METHODS

    rows = [{"name": m.name, "caption": m.caption, "paper": m.paper, "settings": m.settings} for m in METHODS.values()]
    if not options.json:
        width = max(map(len, METHODS))
        for method in METHODS.values():
            point = ", ".join(f"{axis} {kind}" for axis, kind in method.kinds.items())
            paper = f" ({method.paper})" if method.paper else ""
            print(f"{method.name:{width}} {method.caption}{paper}\n{'':{width}} {point}")
    return rows
