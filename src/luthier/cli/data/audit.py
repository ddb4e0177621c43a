"""luthier data audit: what is wrong with rows, as a verdict, a page, every finding, and a recipe that would mend it."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from .. import subparser

EPILOG = """\
examples:
  luthier data audit rows.jsonl
  luthier data audit folder/ --out audit/ --model Qwen/Qwen3-0.6B
  luthier data audit rows.csv --set 'columns={text: review, label: stars}' --set checks.personal_data.allowed=0.01
  luthier data audit folder/ --recipe recipe.yaml --json || echo "not fit for training"

Changes nothing. The exit code is 0 where no check finds more than its recipe allows, else 8.
"""


def add(actions: argparse._SubParsersAction) -> None:
    made = subparser(actions, "audit", "find what is wrong with rows, and change nothing")
    made.epilog = EPILOG
    made.add_argument("source", nargs="+", metavar="SOURCE", help="files, folders, patterns, or a hub name")
    made.add_argument("--out", metavar="FOLDER", help="write the page, the verdict, every finding, and a recipe here")
    common(made)
    made.set_defaults(run=run)


def common(made: argparse.ArgumentParser) -> None:
    """What an audit and a cleaning are both told."""
    made.add_argument("--recipe", metavar="FILE.yaml", help="the checks to make (default: all of them)")
    made.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a key of the recipe")
    made.add_argument("--against", action="append", default=[], metavar="NAME=PATH",
                      help="an evaluation set or benchmark whose rows must not be there; once for each")  # fmt: skip
    made.add_argument("--model", help="whose tokens lengths are counted in")
    made.add_argument("--split", default="train", help="of a folder with several splits (default: train)")
    made.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")


def recipe_of(options: argparse.Namespace) -> Any:
    from ...prepare.recipe import recipe

    given: list = [options.recipe] if options.recipe else []
    return recipe(*given, *([{"model": options.model}] if options.model else []), *options.set, *_against(options))


def _against(options: argparse.Namespace) -> list[str]:
    """Evaluation sets, as an override of the recipe."""
    from ...errors import ConfigError

    named = dict(text.partition("=")[::2] for text in options.against)
    if wrong := [name for name, path in named.items() if not (name and path)]:
        raise ConfigError(f"--against {wrong[0]}: expected NAME=PATH, such as gsm8k=gsm8k/test.jsonl")
    return [f"checks.overlap.against={json.dumps(named)}"] if named else []


def sayer(options: argparse.Namespace) -> Any:
    """Progress on the standard error."""
    return (lambda text: None) if options.quiet else (lambda text: print(text, file=sys.stderr, flush=True))


def run(options: argparse.Namespace) -> Any:
    from ...errors import ConfigError

    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: give a number from 1 up")
    recipe = recipe_of(options)
    from ...prepare.audit import audit

    def made(folder: Path) -> Any:
        return audit(options.source, folder, recipe, workers=options.workers, say=sayer(options), split=options.split)

    if options.out:
        verdict = made(Path(options.out))
    else:
        with tempfile.TemporaryDirectory(prefix=".luthier-audit-") as folder:
            verdict = made(Path(folder))
        for key in ("findings", "page", "recipe"):
            verdict[key] = None
        for one in verdict["checks"].values():
            one.get("summary", {}).pop("files", None)
    if not options.json:
        show(verdict)
    return verdict


def show(verdict: Any) -> None:
    print(f"rows        {verdict['rows']:,} in {verdict['files']:,} files, {verdict['unreadable']:,} unreadable")
    print(f"formats     {', '.join(f'{name} {count:,}' for name, count in verdict['formats'].items()) or 'none'}")
    lengths = verdict["checks"].get("length", {}).get("summary", {})
    for unit in ("characters", "words", "tokens"):
        if unit in lengths:
            print(f"{unit:<12}" + ", ".join(f"{name} {value:,}" for name, value in lengths[unit].items()))
    classes = verdict["checks"].get("balance", {}).get("summary", {}).get("counts", {})
    if classes:
        more = f", and {len(classes) - 12:,} more" if len(classes) > 12 else ""
        print("classes     " + ", ".join(f"{name} {n:,}" for name, n in list(classes.items())[:12]) + more)
    likely = verdict["checks"].get("perplexity", {}).get("summary", {}).get("perplexity", {})
    if likely:
        print("perplexity  " + ", ".join(f"{name} {value:,}" for name, value in likely.items()))
    languages = verdict["checks"].get("language", {}).get("summary", {}).get("languages", {})
    if languages:
        print("languages   " + ", ".join(f"{code} {count:,}" for code, count in list(languages.items())[:12]))
    print(f"\n{'check':<18}{'rows':>10}{'share':>10}{'allowed':>9}  {'action':<8}what")
    for kind, one in verdict["checks"].items():
        what = ", ".join(f"{name} {count:,}" for name, count in one["what"].items())
        mark = " " if one["sound"] else "!"
        print(
            f"{mark}{kind:<17}{one['rows']:>10,}{one['share']:>10.3%}{one['allowed']:>9.1%}  {one['action']:<8}{what}"
        )
    for kind in verdict["faults"]:
        for found in verdict["checks"][kind]["examples"][:3]:
            print(f"  {kind}: row {found['row']:,} ({found['place']}): {found['what']}: {printable(found['detail'])}")
    print(f"\nverdict   {verdict['verdict']}")
    if verdict["page"]:
        print(f"page      {verdict['page']}\nfindings  {verdict['findings']}\nrecipe    {verdict['recipe']}")


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
