"""luthier upload: an exported model, or a set of rows, to a hub; nothing else of Luthier sends anything there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from . import subparser

EPILOG = """\
examples:
  luthier export runs/lora out/adapter --as adapter
  luthier upload out/adapter OWNER/NAME --dry-run
  luthier upload out/adapter OWNER/NAME
  luthier upload rows/ OWNER/NAME --type dataset --public

The token is that of huggingface_hub: HF_TOKEN, or `hf auth login`. HF_ENDPOINT names another hub.
"""


def add(verbs: argparse._SubParsersAction) -> None:
    made = subparser(verbs, "upload", "upload an exported model or a set of rows to a hub, and compare what arrived")
    made.epilog = EPILOG
    made.add_argument("folder", metavar="FOLDER", help="that of `luthier export` or `luthier data split`")
    made.add_argument("name", metavar="OWNER/NAME", help="the repository; made, private, where it is not there")
    made.add_argument("--type", dest="kind", default="model", metavar="TYPE", help="model (default) or dataset")
    made.add_argument("--public", action="store_true", help="everybody may read it")
    made.add_argument("--revision", metavar="BRANCH", help="another branch than main")
    made.add_argument("--message", help="of the commit")
    made.add_argument("--dry-run", action="store_true", help="say what would go; send nothing")
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ..upload import upload

    def say(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr)

    done = upload(
        Path(options.folder), options.name, kind=options.kind, public=options.public, revision=options.revision,
        message=options.message, dry_run=options.dry_run, say=say,
    )  # fmt: skip
    if not options.json:
        for name, size in done["files"].items():
            print(f"{size:>14,}  {name}")
        who = "everybody" if done["public"] else "nobody but you and those whom you let"
        if done["uploaded"]:
            print(f"{done['address']}: {done['bytes']:,} bytes, compared there; {who} can read it")
        else:
            print(f"nothing was sent; {done['bytes']:,} bytes would go to {done['repository']}, which {who} could read")
    return done
