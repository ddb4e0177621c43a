"""luthier explain: what a configuration will do, before it does it and with no weights loaded."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from . import subparser

if TYPE_CHECKING:
    from ..explain import Explanation

EPILOG = """\
examples:
  luthier explain run.yaml
  luthier explain --method full model=FOLDER data.max_length=1024 batch.examples=8 max_steps=500 --plot
  luthier explain run.yaml parallel.device=cuda --json      # for a GPU, from a machine without one

Needs the model's config.json (or .gguf file), no weights. Without data, every document has data.max_length tokens.
"""


def add(verbs: argparse._SubParsersAction) -> None:
    made = subparser(verbs, "explain", "say what a configuration will do: what moves, memory, work, time; run nothing")
    made.epilog = EPILOG
    made.add_argument(
        "settings", nargs="*", metavar="FILE | a.b=c", help="YAML files and overrides, later over earlier"
    )
    made.add_argument("--method", help="the row of `luthier methods` to start from")
    made.add_argument("--plot", nargs="?", const="-", metavar="OUT.svg", help="draw the learning rate")
    made.add_argument("--measure", action="store_true", help="measure this machine's products, for the time")
    made.add_argument("--assume", action="store_true", help="do not read the data: assume the longest documents")
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ..config import configure

    settings, plot = list(options.settings), options.plot
    if plot not in (None, "-") and not plot.endswith((".svg", ".png")):
        settings.append(plot)  # `--plot run.yaml`: the file of the run, not of the picture
        plot = "-"
    if plot is not None and plot.endswith(".png"):
        raise ConfigError(f"--plot {plot}: only SVG is written; use --plot {Path(plot).with_suffix('.svg')}")
    config = configure({"data": {"train": []}}, *settings, method=options.method, weights=False)
    from ..explain import explain

    found = explain(config, count=not options.assume, measure=options.measure)
    if not options.json:
        show(found)
    if plot is not None:
        _plot(found, plot, options.json)
    return found.to_json()


def show(found: Explanation) -> None:
    """Everything, on the standard output."""
    from rich.console import Console
    from rich.table import Table

    from ..explain import table
    from ..optim.schedule import steps_of

    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    console.print(table(found.made.network.model, found.made.begins))
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
    grid = Table(title=f"\nmemory on {found.device}, a process", title_justify="left", box=None, pad_edge=False)
    grid.add_column("what")
    grid.add_column("GB", justify="right")
    for what, size in _parts(found):
        grid.add_row(what, f"{size / 1e9:.3f}")
    console.print(grid)
    beside = "with its libraries" if found.device == "cpu" else "while a checkpoint is written"
    console.print(f"host memory of the process {beside}: {found.host / 1e9:.2f} GB")
    of_token, plan = found.per_token(), found.plan
    console.print(
        f"\nwork  {of_token['forward']:.3g} operations forward and {of_token['backward']:.3g} backward for each token, "
        f"{of_token['attention']:.2g} of them attention; {found.flops_per_step:.3g} for each step"
    )
    if found.seconds_per_step:
        total = f", {_clock(found.seconds_per_step * plan.steps)} in all" if plan.steps else ""
        console.print(f"time  about {found.seconds_per_step:.3g} s for each step{total}")
    console.print(f"      at {found.rate_source}", markup=False)
    console.print(f"data  {plan.source}", markup=False)
    steps = f"{plan.steps:,} steps" if plan.steps else "steps unknown without data or max_steps,"
    warmup = f", {steps_of(found.config.schedule.warmup, plan.steps)} of them warm-up" if plan.steps else ""
    once = f", of which {plan.run_per_step:,.0f} are run, as neighbours begin alike," if plan.saves else ""
    console.print(
        f"steps {steps} of {plan.tokens_per_step:,.0f} tokens{once} in {plan.rows_per_step:.1f} rows{warmup}; "
        f"{found.config.schedule.kind} schedule from {found.config.optim.learning_rate:g}"
    )
    console.print("\nfiles that run")
    for axis, names in found.files.items():
        console.print(f"  {axis:10} {'  '.join(names)}")


def _parts(found: Explanation) -> list[tuple[str, int]]:
    m = found.memory
    rows = [
        ("weights", m.weights), ("adapters and heads of the objective", m.adapters), ("buffers", m.buffers),
        ("gradients", m.gradients), (f"optimiser ({found.config.optim.kind})", m.optimizer),
        (f"activations of a row of {found.plan.largest.tokens:,} tokens", m.activations),
        ("loss: logits of a chunk and their gradients", m.head), ("passing values", m.working),
        ("gaps in the heap", m.gaps), ("peak", found.peak),
    ]  # fmt: skip
    kept = [row for row in rows if row[1]]
    label = f"peak of a step, in its {m.peak_at}" if m.peak_at.startswith("forward") else f"peak, in the {m.peak_at}"
    return [*kept[:-1], (label, found.peak)]


def _plot(found: Explanation, where: str, quiet: bool) -> None:
    from ..explain.curve import drawn, svg
    from ..explain.plan import rates

    if not found.plan.steps:
        raise ConfigError("--plot: the number of steps is unknown; give max_steps, or data that can be counted")
    values = rates(found.config, found.plan.steps)
    if where == "-":
        if not quiet:
            print("\nlearning rate\n" + drawn(values))
        return
    Path(where).write_text(svg(values, f"learning rate: {found.config.schedule.kind}"), encoding="utf-8")


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
