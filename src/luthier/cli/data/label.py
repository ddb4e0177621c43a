"""luthier data label WAY: labels by rules, by a model that votes, by people on a page; Label Studio's files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .. import _Parser, subparser
from .audit import printable, sayer

EPILOG = """\
examples:
  luthier data label rules rows.jsonl labelled.jsonl --task task.yaml
  luthier data label model rows.jsonl labelled.jsonl --task task.yaml --set judge.votes=5
  luthier data label page rows.jsonl labelled.jsonl --task task.yaml
  luthier data label page rows.jsonl labelled.jsonl --set task.kind=classes --set 'task.labels=[good, bad]'
  luthier data label import project.json labelled.jsonl --task task.yaml
  luthier data label export labelled.jsonl project.json --task task.yaml
  luthier data label agreement ann.jsonl bo.jsonl --task task.yaml

A task, in YAML: `task: {kind: classes, labels: [spam, ham], columns: {text: body}, instructions: ...}`; its kinds are
classes, spans, preference and edit.
"""
WAYS = {
    "rules": "by rules: regular expressions, keywords, JSON schemas, lengths",
    "model": "by a model that is asked several times",
    "page": "by people, on a page in the browser of this machine",
    "import": "read Label Studio's JSON as labelled rows",
    "export": "write labelled rows as Label Studio's JSON",
    "agreement": "how far files that label the same rows agree",
}


FIGURES = (
    "rows", "labelled", "kept", "asked", "votes", "not_understood", "mean_agreement", "krippendorff", "known",
    "same_as_known", "tasks", "annotations",
)  # fmt: skip


def add(actions: argparse._SubParsersAction) -> None:
    caption = "label rows by rules, by a model, or by people"
    made = actions.add_parser("label", help=caption, description=caption, allow_abbrev=False, epilog=EPILOG,
                              formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    ways = made.add_subparsers(dest="way", metavar="WAY", required=True, parser_class=_Parser)
    for name, caption in WAYS.items():
        way = subparser(ways, name, caption)
        if name == "agreement":
            way.add_argument("source", nargs="+", metavar="FILE", help="labelled rows, a file for each annotator")
        else:
            way.add_argument("source", nargs="+", metavar="SOURCE", help="files, folders, patterns, or a hub name")
            way.add_argument(
                "out", metavar="OUT", help="a .json file" if name == "export" else "a .jsonl file, perhaps .gz or .zst"
            )
        way.add_argument("--task", metavar="FILE.yaml", help="what is asked, and of whom")
        way.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a key of the task")
        if name in ("rules", "model", "page"):
            way.add_argument("--split", default="train", help="of a folder with several splits (default: train)")
        if name in ("rules", "model"):
            way.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
        if name == "page":
            _of_page(way)
        if name == "import":
            way.add_argument(
                "--control", metavar="NAME", help="the control (from_name) that labels, where there are several"
            )
            way.add_argument("--predictions", action="store_true", help="take predictions of tasks without annotations")
        way.set_defaults(run=run)


def _of_page(way: argparse.ArgumentParser) -> None:
    way.add_argument("--port", type=int, default=0, metavar="N", help="of the page (default: any that is free)")
    way.add_argument("--by", metavar="NAME", help="the annotator's name that the page suggests (default: yours here)")
    way.add_argument("--per-row", type=int, metavar="N", help="annotators for each row (default: everybody labels all)")
    way.add_argument("--open", action="store_true", help="open the page in the browser")
    way.add_argument("--write", action="store_true", help="write what was labelled so far, without the page")
    way.add_argument(
        "--label-studio", metavar="OUT.json", help="also write what every annotator said, for Label Studio"
    )


def run(options: argparse.Namespace) -> Any:
    from ...errors import ConfigError

    if getattr(options, "workers", None) is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: give a number from 1 up")
    from ...prepare.label.plan import plan

    made = plan(*([options.task] if options.task else []), *options.set)
    if options.way in ("rules", "model"):
        from ...prepare.label import labelling

        way = labelling.by_rules if options.way == "rules" else labelling.by_model
        told = way(
            options.source, Path(options.out), made, workers=options.workers, say=sayer(options), split=options.split
        )
    else:
        told = {"page": _page, "import": _import, "export": _export, "agreement": _agreement}[options.way](
            options, made
        )
    if not options.json:
        show(told)
    return told


def _page(options: argparse.Namespace, plan: Any) -> dict:
    from ...errors import ConfigError
    from ...prepare.label.project import Project

    if options.per_row is not None and options.per_row < 1:
        raise ConfigError(f"--per-row {options.per_row}: give a number from 1 up")
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"--port {options.port}: give a number from 0 to 65535")
    unused = [f"--{name.replace('_', '-')}" for name in ("port", "open", "per_row", "by") if getattr(options, name)]
    if options.write and unused:
        raise ConfigError(f"--write opens no page: leave out {', '.join(unused)}")
    with Project(options.source, Path(options.out), plan, sayer(options), options.split) as project:
        if not options.write:
            _serve(options, project)
        told = project.write()
        if options.label_studio:
            from ...prepare.label import label_studio

            told["label_studio"] = label_studio.write(project.for_label_studio(), Path(options.label_studio), plan.task)
        return told


def _serve(options: argparse.Namespace, project: Any) -> None:
    """Until Ctrl-C or SIGTERM."""
    import getpass
    import signal

    from ...prepare.label.server import Desk, Server

    try:
        name = options.by or getpass.getuser()
    except (OSError, KeyError):
        name = "annotator"
    with Server(Desk(project, name, options.per_row), options.port) as server:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            print(f"label here: {server.url}\nCtrl-C ends, and writes what was labelled", file=sys.stderr, flush=True)
            if options.open:
                import webbrowser

                webbrowser.open(server.url)
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)
            server.desk.guard.acquire()  # a label that is on its way is kept first


def _import(options: argparse.Namespace, plan: Any) -> dict:
    from ...prepare.label import label_studio

    return label_studio.read(
        options.source, Path(options.out), plan.task, control=options.control, predictions=options.predictions
    )


def _export(options: argparse.Namespace, plan: Any) -> dict:
    from ...errors import ConfigError
    from ...prepare.label import label_studio

    if Path(options.out).suffix.lower() != ".json":
        raise ConfigError(f"{options.out}: Label Studio's tasks are written as .json")
    return label_studio.write(label_studio.from_rows(options.source, plan.task), Path(options.out), plan.task)


def _agreement(options: argparse.Namespace, plan: Any) -> dict:
    from ...prepare.label.compared import compared

    return compared(options.source, plan.task)


def show(told: dict) -> None:
    for key in FIGURES:
        if key in told and told[key] is not None:
            print(
                f"{key.replace('_', ' '):<16}{told[key]:,}"
                if isinstance(told[key], int)
                else f"{key.replace('_', ' '):<16}{told[key]}"
            )
    for key in ("labels", "aside"):
        if told.get(key):
            print(f"{key:<16}" + ", ".join(f"{printable(str(name))} {count:,}" for name, count in told[key].items()))
    for one in told.get("rules", []):
        right = f", same as known {one['same_as_known']:.3f} of {one['known']:,}" if "known" in one else ""
        print(f"  rule {printable(one['name'])}: {one['rows']:,} rows, {one['overlaps']:,} with another rule, "
              f"{one['conflicts']:,} in conflict{right}")  # fmt: skip
    if told.get("agreement"):
        _show_agreement(told["agreement"])
    for key in ("out", "aside_rows", "votes_rows", "interface"):
        if told.get(key):
            print(f"{key.replace('_', ' '):<16}{told[key]}")


def _show_agreement(told: dict) -> None:
    if told["annotators"]:
        print("annotators      " + ", ".join(f"{printable(by)} {count:,}" for by, count in told["annotators"].items()))
    for key in ("same", "fleiss", "krippendorff"):
        if told[key] is not None:
            print(
                f"  {key:<14}{told[key]:.3f} over {told['compared']:,} {told.get('of', 'rows')} that several labelled"
            )
    for pair, one in told["pairs"].items():
        kappa = "" if one["cohen"] is None else f", Cohen's kappa {one['cohen']:.3f}"
        print(f"  {printable(pair)}: {one['same']:.3f} the same of {one['rows']:,}{kappa}")
