"""luthier search: find the settings of a configuration that are best, or go on where the search stands."""

from __future__ import annotations

import argparse
import re
from typing import Any

from . import subparser

EPILOG = """\
examples:
  luthier search run.yaml optim.learning_rate='log(1e-5,1e-3)' trainable.r='[8,16,32]' --trials 20 --hours 2
  luthier search run.yaml method='[lora,full]' trainable.r='[8,16] if method=lora' --metric eval.loss --metric seconds
  luthier search run.yaml optim.learning_rate='log(1e-5,1e-3)' --workers 2 --sampler random --pruner hyperband
  luthier search run.yaml --lr-range

where to search: log(low,high)  uniform(low,high[,step]) or (low,high)  int(low,high[,step])  [a,b,c] or choice(a,b,c),
each with ` if other.key=value` behind it where it applies to some trials only. Other a.b=c are those of luthier train.
"""
FUNCTION = re.compile(r"(.+\.py:(\w+))(:min|:max)?")

KEYS = ("trials", "hours", "sampler", "pruner", "seed", "folder", "storage", "workers", "launcher", "fresh_seeds")


def add(verbs: argparse._SubParsersAction) -> None:
    made = subparser(verbs, "search", "find the best settings of a configuration, or resume where the search stands")
    made.epilog = EPILOG
    made.add_argument(
        "settings", nargs="*", metavar="FILE | a.b=c", help="YAML files and overrides, and where to search"
    )
    made.add_argument("--method", help="the row of `luthier methods` to start from")
    made.add_argument(
        "--metric", action="append", default=[], metavar="NAME[:min|:max] | FILE.py:FUNCTION",
        help="what is best: eval.loss, eval.f1, seconds, memory, parameters, tokens_per_second; several give a front; "
        "a file is run: it is your function that scores answers",
    )  # fmt: skip
    made.add_argument(
        "--reward", action="append", default=[], metavar="FILE.py:FUNCTION",
        help="a function of yours that rewards answers, as of `luthier train`; the file is run",
    )  # fmt: skip
    made.add_argument("--trials", type=int, metavar="N", help="20 without it; of a grid all points")
    made.add_argument("--hours", type=float, metavar="H", help="end after so long; the same command goes on")
    made.add_argument("--sampler", help="tpe (default), gp, random or grid")
    made.add_argument("--pruner", help="median, hyperband or none; by default the median where there is one metric")
    made.add_argument("--seed", type=int, help="of what is tried")
    made.add_argument("--folder", help="of the search (default: output_dir with -search behind it)")
    made.add_argument("--storage", metavar="URL", help="an Optuna storage instead of a journal in the folder")
    made.add_argument("--workers", type=int, metavar="N", help="processes on this machine, one GPU each")
    made.add_argument("--launcher", help="local (default) or ray")
    made.add_argument("--fresh-seeds", type=int, metavar="N", help="seeds for the comparison at the end (default: 1)")
    made.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--lr-range", action="store_true", help="find a learning rate in one short run instead")
    made.add_argument("--lr-from", type=float, metavar="RATE", help="where that begins (default: 1e-7)")
    made.add_argument("--lr-to", type=float, metavar="RATE", help="where it ends, if not before (default: 1)")
    made.add_argument("--lr-steps", type=int, metavar="N", help="in so many steps (default: 100)")
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ..errors import ConfigError

    sources, space = parted(options.settings)
    if options.lr_range:
        others = ("metric", "reward", *KEYS)
        named = [n for n in others if getattr(options, n) is not None and getattr(options, n) != [] and n != "folder"]
        given = [*space, *(f"--{name.replace('_', '-')}" for name in named)]
        if given:
            raise ConfigError(f"--lr-range finds a learning rate and nothing else: leave out {', '.join(given)}")
        return _lr_range(options, sources)
    if given := [n for n in ("lr_from", "lr_to", "lr_steps") if getattr(options, n) is not None]:
        raise ConfigError(f"--{given[0].replace('_', '-')} is of --lr-range: give that, too, or leave it out")
    return _search(options, sources, space)


def parted(settings: list[str]) -> tuple[list[str], dict[str, str]]:
    """Sources of a configuration, and where to search."""
    from ..search.space import is_distribution

    sources: list[str] = []
    space: dict[str, str] = {}
    for text in settings:
        key, sign, value = text.partition("=")
        if sign and re.fullmatch(r"[\w-]+(\.[\w-]+)*", key) and is_distribution(key, value):
            space[key] = value
        else:
            sources.append(text)
    return sources, space


def _search(options: argparse.Namespace, sources: list[str], space: dict[str, str]) -> Any:
    from ..search.plan import plan

    names, functions, places = _metrics(options.metric)
    rewards = _functions(options.reward, "--reward")
    places += [part for place in options.reward for part in ("--reward", place)]
    settings = {key: getattr(options, key) for key in KEYS}
    if options.worker:
        from ..search.storage import told_address

        settings["storage"] = told_address()
    made = plan(
        *sources, space=space, method=options.method, functions=functions, rewards=rewards, places=places,
        metrics=names or None, **settings,
    )  # fmt: skip
    from ..monitor import Console
    from ..search import run as run_search
    from ..search.report import summary

    console = Console(options.quiet)
    if options.worker:
        from ..search.study import Clock, open_storage, work

        work(made, open_storage(made), console, Clock.of(made))
        return None
    found = run_search(made, console)
    if found.report is None:
        return None
    if not options.json:
        print(f"\n{summary(made, found.report)}")
        fresh = found.report.get("fresh") or {}
        if told := fresh.get("verdict") or fresh.get("note"):
            print(told)
        if note := found.report["importance"]["note"]:
            print(f"importance: {note}")
        print(f"\ntable {found.folder / 'trials.md'}\nplots {found.folder / 'report.html'}")
        print(f"next  luthier train {found.best}")
    return {"folder": str(found.folder), "best_config": str(found.best), **found.report}


def _metrics(given: list[str]) -> tuple[list[str], dict, list[str]]:
    """Names of metrics, the user's functions among them, and the options that workers are given."""
    names, functions, places = [], {}, []
    for text in given:
        if one := FUNCTION.fullmatch(text):
            functions |= _functions([one[1]], "--metric")
            names.append(f"eval.{one[2]}{one[3] or ''}")
            places += ["--metric", text]
        else:
            names.append(text)
    if places:  # workers are given all, as they would take those alone for all
        places = [part for text in given for part in ("--metric", text)]
    return names, functions, places


def _functions(places: list[str], option: str) -> dict:
    if not places:
        return {}
    from ..scores import load_function

    return dict(load_function(place, option) for place in places)


def _lr_range(options: argparse.Namespace, sources: list[str]) -> Any:
    from ..config import configure
    from ..monitor import Console

    config = configure(*sources, method=options.method)
    given = {"low": options.lr_from, "high": options.lr_to, "steps": options.lr_steps}
    from ..search.lr_range import lr_range

    given = {name: value for name, value in given.items() if value is not None}
    found = lr_range(config, Console(options.quiet), folder=options.folder, **given)
    if not options.json:
        print(found.told())
    return found.report
