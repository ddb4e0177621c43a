"""luthier evaluate: the held-out figures of a run, base against tuned, with the rows that were won and lost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import subparser

if TYPE_CHECKING:
    from ..config import Config

EPILOG = """\
examples:
  luthier evaluate runs/first --generate 100 --metric f1 --metric rouge --show losses 5
  luthier evaluate runs/first --metric score.py:brevity   # def brevity(reference, answer, prompt, row): return ...
  luthier evaluate runs/first --tasks tasks/mine.yaml --forgetting python-docs
"""


def add(verbs: argparse._SubParsersAction) -> None:
    made = subparser(verbs, "evaluate", "measure a run on held-out rows, base against tuned")
    made.epilog = EPILOG
    made.add_argument("run_folder", metavar="RUN")
    made.add_argument("--data", help="rows to measure on, instead of the run's held-out rows")
    made.add_argument("--generate", type=int, metavar="N", help="answer so many prompts (default: as the run did)")
    made.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: as the run had it)")
    made.add_argument("--batch-size", type=int, metavar="N", help="prompts answered at once")
    made.add_argument(
        "--metric", action="append", metavar="NAME | FILE.py:FUNCTION",
        help="what scores the answers, may be repeated; a file is run: it is your function "
        "(reference, answer, prompt, row) -> number",
    )  # fmt: skip
    made.add_argument(
        "--reward", action="append", default=[], metavar="FILE.py:FUNCTION",
        help="of a run that learnt from rewards: a function that it was given; the file is run",
    )  # fmt: skip
    made.add_argument(
        "--tasks", nargs="+", metavar="NAME | PATH",
        help="tasks of lm-evaluation-harness; a path is a YAML file or a folder of them, and may run its own Python",
    )  # fmt: skip
    made.add_argument("--forgetting", metavar="FILE", help="rows that are not the task's, or python-docs")
    made.add_argument(
        "--show", nargs=2, metavar=("wins|losses", "N"), help="show so many rows that tuning made better or worse"
    )
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ..config import read_run
    from ..contradictions.data import missing
    from ..errors import ConfigError

    show, count = _shown(options)
    config = read_run(Path(options.run_folder))
    config, functions = asked(config, options)
    if not options.data and (found := missing(config)):
        raise ConfigError([f"{text}; name rows to measure on with --data" for text in found])
    from dataclasses import replace

    from ..assemble import restore
    from ..data.dataset import Dataset, open_rows
    from ..errors import DataError
    from ..evaluate import Measurement, base_of, built_rewards, measure, score
    from ..measured import compare, comparison, write_comparison
    from ..monitor import Console
    from .figures import show_report, show_rows

    console = Console(options.quiet)
    made, chosen = restore(Path(options.run_folder), console.warn)
    made = replace(made, config=config)
    console.say(f"weights of {chosen}")
    if options.data:
        only = {"train": options.data, "validation": None, "limit": None, "streaming": False}
        training, rows = open_rows(config.data.model_copy(update=only), made.renderer, None, console.say, console.warn)
    else:
        training, rows = open_rows(config.data, made.renderer, None, console.say, console.warn)
        if rows is None:
            console.warn("the run held no rows out: these are figures of the rows that it was trained on")
    rows = rows or training
    if not isinstance(rows, Dataset):
        raise DataError("the run held no rows of its stream out: name rows to evaluate with --data")
    wanted = Measurement.of(config, rows, made.renderer, console.say, console.warn, functions)
    if config.objective.rows == "prompts":
        from ..scores import load_function

        own = dict(load_function(place, "--reward") for place in options.reward)
        wanted = replace(wanted, rewards=built_rewards(config, own, made.ranks, console.warn))
    tuned = score(made.ranks, functions, measure(made, wanted))
    with base_of(made, console.say) as before:
        base = score(before.ranks, functions, measure(before, wanted))
    report = compare(base, tuned)
    beside = comparison(base, tuned)
    if before.ranks.first:
        name = f"compare-{Path(options.data).stem}.jsonl" if options.data else "compare.jsonl"
        path = Path(options.run_folder) / "answers" / name
        write_comparison(path, beside)
        if beside:
            console.say(f"answers of both, row by row: {path}")
    chosen_rows = [row for row in beside if row["outcome"] == show][:count]
    if not options.json:
        show_report(report)
        if show:
            show_rows(chosen_rows, show)
    return report | ({"rows_shown": chosen_rows} if show else {})


def _shown(options: argparse.Namespace) -> tuple[str | None, int]:
    from ..errors import ConfigError

    if not options.show:
        return None, 0
    kind, count = options.show
    if kind not in ("wins", "losses") or not count.isdecimal() or not int(count):
        raise ConfigError(f"--show {kind} {count}: expected `wins` or `losses` and a number, such as --show losses 5")
    return {"wins": "win", "losses": "loss"}[kind], int(count)


def asked(config: Config, options: argparse.Namespace) -> tuple[Config, dict]:
    """The run's configuration with what the command line asks for in its place, checked whole, and the functions."""
    from ..config import configure
    from ..errors import ConfigError

    wanted: dict = {
        "generate": options.generate, "max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size,
        "tasks": options.tasks, "trust_task_files": True if options.tasks else None, "forgetting": options.forgetting,
    }  # fmt: skip
    functions = {}
    if options.metric:
        from ..scores import load_function

        named = [m for m in options.metric if ":" not in m]
        functions = dict(load_function(m) for m in options.metric if ":" in m)
        wanted["metrics"] = named or None
    changed = {key: value for key, value in wanted.items() if value is not None}
    generate = changed.get("generate", config.evaluation.generate)
    if (options.metric or options.show) and not generate:
        raise ConfigError("--metric and --show are about answers: give --generate N, the number of prompts to answer")
    if generate == 0:
        changed.setdefault("metrics", ["exact_match"])
    values = config.model_dump(mode="json")
    values["evaluation"] |= changed
    if values["data"]["validation"] is None and (options.data or options.tasks or options.forgetting):
        # The checks ask for held-out rows, which the command has another word for.
        checked = values | {"data": values["data"] | {"validation": 1}}
        evaluation = configure(checked, training=False).evaluation
    else:
        evaluation = configure(values, training=False).evaluation
    return config.model_copy(update={"evaluation": evaluation}), functions
