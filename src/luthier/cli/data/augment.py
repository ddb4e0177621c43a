"""luthier data augment: new rows of given ones, by noise, synonyms or a model; labels stay."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import subparser
from .audit import sayer

EPILOG = """\
examples:
  luthier data augment rows.jsonl more.jsonl --way characters --way words --validation held-out.jsonl
  luthier data augment rows.jsonl more.jsonl --way characters --set ways.characters.rate=0.1
  luthier data augment rows.jsonl more.jsonl --way synonyms --set ways.synonyms.table=synonyms.tsv
  luthier data augment rows.jsonl more.jsonl --way paraphrase --base-url http://localhost:8000/v1 --model NAME
  luthier data augment seeds.jsonl more.jsonl --way self_instruct --model runs/chat
  luthier data augment prompts.jsonl pairs.jsonl --way preferences --model runs/chat \\
      --set 'ways.preferences.rewards=[exact_match]'
  luthier data augment rows.jsonl more.jsonl --recipe augment.yaml

ways: characters, words, synonyms (they change the user's side only); paraphrase, self_instruct, preferences (a model).
Every new row has its parent under `_parent`. Beside more.jsonl comes more.refused.jsonl: what was not made, and why.
A key for --base-url is read from the environment variable model.api_key_env (OPENAI_API_KEY), and written nowhere.
"""


def add(actions: argparse._SubParsersAction) -> None:
    made = subparser(actions, "augment", "make new rows of given ones")
    made.epilog = EPILOG
    made.add_argument("source", nargs="+", metavar="SOURCE", help="files, folders, patterns, or a hub name")
    made.add_argument("out", metavar="OUT", help="a .jsonl file, perhaps .gz or .zst, or a folder")
    made.add_argument("--way", action="append", default=[], metavar="WAY", help="a way with its default settings")
    made.add_argument("--recipe", metavar="FILE.yaml", help="ways with their settings")
    made.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a key of the recipe")
    made.add_argument("--model", help="who is asked: a run's folder, a model, or with --base-url its name there")
    made.add_argument("--base-url", metavar="ADDRESS", help="of an OpenAI-compatible server")
    made.add_argument("--validation", action="append", default=[], metavar="FILE", help="rows that are held out")
    made.add_argument("--seed", type=int, metavar="N", help="another one makes other rows (default: 0)")
    made.add_argument("--new-only", action="store_true", help="write the new rows without the given ones")
    made.add_argument("--split", default="train", help="of a folder with several splits (default: train)")
    made.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core; with a model one)")
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ...errors import ConfigError

    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: give a number from 1 up")
    from ...prepare.augment.recipe import augmentation

    recipe = augmentation(*([options.recipe] if options.recipe else []), given_by(options), *options.set)
    from ...prepare.augment.writing import augment

    done = augment(options.source, Path(options.out), recipe, workers=options.workers, say=sayer(options),
                   split=options.split)  # fmt: skip
    if not options.json:
        show(done)
    return done


def given_by(options: argparse.Namespace) -> dict:
    """What the flags say, over the recipe's file."""
    from ...errors import ConfigError

    made: dict[str, Any] = {"ways": {kind: {} for kind in options.way}} if options.way else {}
    if options.base_url and not options.model:
        raise ConfigError("--base-url: give --model, too: the name of the model there")
    if options.base_url:
        made["model"] = {"kind": "openai", "base_url": options.base_url, "name": options.model}
    elif options.model:
        made["model"] = {"kind": "luthier", "name": options.model}
    if options.validation:
        made["validation"] = options.validation
    if options.seed is not None:
        made["seed"] = options.seed
    return made | ({"given": False} if options.new_only else {})


def show(done: dict) -> None:
    print(f"given    {done['given']:,}" + (f", of these {done['held_out']:,} held out" if done["held_out"] else ""))
    if done["new_before"]:
        print(f"         {done['new_before']:,} were new rows before, and had none made of them")
    print(f"new      {done['new']:,}")
    for way, count in done["ways"].items():
        print(f"  {way}: {count:,}")
    for way, reasons in done["refused"].items():
        for reason, count in reasons.items():
            print(f"  not made{f' by {way}' if way else ''}: {count:,}: {reason}")
    print(f"written to {done['out']}")
    if "refused_rows" in done:
        print(f"refused rows in {done['refused_rows']}")
