"""luthier train: run a configuration to its end, or go on where its folder stands."""

from __future__ import annotations

import argparse
import json
from typing import Any

from . import first_process, subparser

EPILOG = """\
examples:
  luthier train --method lora model=HuggingFaceTB/SmolLM2-135M-Instruct data=rows.jsonl output_dir=runs/first
  luthier train run.yaml optim.learning_rate=1e-4 epochs=3
  luthier train --schema > luthier.schema.json     # completion and checks in an editor
"""


def add(verbs: argparse._SubParsersAction) -> None:
    made = subparser(verbs, "train", "fine-tune a model, or resume where the run's folder stands")
    made.epilog = EPILOG
    made.add_argument(
        "settings", nargs="*", metavar="FILE | a.b=c", help="YAML files and overrides, later over earlier"
    )
    made.add_argument("--method", help="the row of `luthier methods` to start from")
    made.add_argument(
        "--metric", action="append", default=[], metavar="FILE.py:FUNCTION",
        help="a function of yours that scores answers; the file is run",
    )  # fmt: skip
    made.add_argument(
        "--reward", action="append", default=[], metavar="FILE.py:FUNCTION",
        help="a function of yours, (prompt, completion, **columns) -> number, that rewards answers; the file is run",
    )  # fmt: skip
    made.add_argument("--show-config", action="store_true", help="print the resolved configuration, train nothing")
    made.add_argument("--schema", action="store_true", help="print the JSON schema of the configuration")
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ..config import configure, schema

    if options.schema:
        print(json.dumps(schema(), indent=1))
        return None
    config = configure(*options.settings, method=options.method)
    if options.show_config:
        if options.json:
            return config.model_dump(mode="json")
        print(config.dump(), end="")
        return None
    from ..monitor import Console
    from ..scores import load_function
    from ..train import train
    from ..trainable.adapter import Adapting
    from .figures import show_report

    console = Console(options.quiet)
    metrics = dict(load_function(place) for place in options.metric)
    result = train(config, console, metrics, dict(load_function(place, "--reward") for place in options.reward))
    if not first_process():
        return None
    if not options.json:
        show_report(result.report)
        kind = "adapter" if isinstance(config.trainable, Adapting) else "full"
        print(f"\nrun   {result.folder}\nnext  luthier generate {result.folder}")
        print(f"      luthier export {result.folder} OUT --as {kind}")
    return {"output_dir": str(result.folder), **result.report}
