"""luthier data collect: raw documents, mail and chats to rows, each with its source."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import subparser
from .audit import printable, sayer

EPILOG = """\
examples:
  luthier data collect handbook/ notes.md rows.jsonl --max-chars 8000
  luthier data collect papers/ pages/ --per page
  luthier data collect Archive.mbox mail.jsonl.zst --no-quotes
  luthier data collect conversations.json chats.jsonl
  luthier data collect slack-export/ chat.jsonl --me "Support Desk"

Kinds are told by content. Every row says where it is from under `_source`; every file that gave no row, or not all,
stands in the report beside OUT with its reason. The exit code is 3 where nothing was collected, and with --strict
where a file was refused or damaged.
"""


def add(actions: argparse._SubParsersAction) -> None:
    made = subparser(actions, "collect", "make rows of raw documents, mail and chats")
    made.epilog = EPILOG
    made.add_argument("paths", nargs="+", metavar="PATH", help="files and folders")
    made.add_argument("out", metavar="OUT", help="a .jsonl file, perhaps .gz or .zst, or a folder of shards")
    made.add_argument("--kind", metavar="KIND", help="of all files, where content does not tell it: text, markdown, "
                      "html, pdf, docx, rows, sharegpt, eml, mbox, chatgpt, whatsapp, slack, telegram")  # fmt: skip
    made.add_argument("--per", metavar="PART", help="page: a row for each page of PDFs; whole: one for each chat "
                      "(default: PDFs whole, chats by day and thread)")  # fmt: skip
    made.add_argument("--max-chars", type=int, metavar="N", help="part longer texts at headings and paragraphs")
    made.add_argument("--no-quotes", action="store_true", help="leave out of mail what it answers")
    made.add_argument("--me", metavar="NAME", help="who is the assistant in chats between people")
    made.add_argument("--strict", action="store_true", help="exit code 3 where a file was refused or damaged")
    made.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ...errors import ConfigError
    from ...prepare.collect.base import How
    from ...prepare.collect.collecting import collect

    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: give a number from 1 up")
    how = How(options.kind, options.per, options.max_chars, not options.no_quotes, options.me)
    report = collect(options.paths, Path(options.out), how, workers=options.workers, strict=options.strict,
                     say=sayer(options))  # fmt: skip
    if not options.json:
        show(report)
    return report


def show(report: Any) -> None:
    for name, counted in report["kinds"].items():
        print(f"{name:<12}{counted['files']:>9,} files {counted['rows']:>11,} rows")
    for title, name in (("left", "reasons"), ("left", "left"), ("damaged", "problems"), ("warning", "warnings")):
        for reason, count in list(report[name].items())[:10]:
            print(f"{title:<12}{count:>9,} x {printable(reason)}")
    print(f"rows        {report['rows']:,} of {report['collected']:,} files in {report['out']}")
    print(f"report      {report['report']}")
