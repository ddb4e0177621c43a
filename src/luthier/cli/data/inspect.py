"""luthier data inspect: the tokens of any row, coloured by what is learnt, and what a whole file amounts to."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import subparser

EPILOG = """\
examples:
  luthier data inspect rows.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct
  luthier data inspect rows.jsonl --model ./model --html rows.html --rows 100
  luthier data inspect rows.csv --model ./model --row 7 data.columns='{prompt: question, completion: answer}'
  luthier data inspect pairs.jsonl --model ./model --method dpo    # rows as that method reads them: both sides, labels
"""


def add(actions: argparse._SubParsersAction) -> None:
    made = subparser(actions, "inspect", "look at data as training will see it")
    made.epilog = EPILOG
    made.add_argument("file", metavar="FILE", help="a file, a folder or a hub name")
    made.add_argument("settings", nargs="*", metavar="a.b=c", help="overrides, such as data.max_length=4096")
    made.add_argument("--model", help="whose tokenizer and chat template to use")
    made.add_argument("--method", help="the row of `luthier methods` whose rows these are (default: lora)")
    made.add_argument("--row", type=int, action="append", help="show the row of this number (default: the first)")
    made.add_argument("--html", metavar="OUT.html", help="write a page with totals, bad rows, and rows token by token")
    made.add_argument("--rows", type=int, default=50, help="how many documents the page shows (default: the first 50)")
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ...config import configure
    from ...errors import ConfigError

    if options.html and not options.html.lower().endswith((".html", ".htm")):
        raise ConfigError(f"--html {options.html}: its name should end in .html, so that no data is written over")
    if options.rows < 0:
        raise ConfigError(f"--rows {options.rows}: give a number from 0 up")
    given = [{"data": {"train": options.file}}]
    if options.model:
        given.append({"model": {"name": options.model}})
    elif not any(s.startswith(("model.name=", "model=")) for s in options.settings):
        raise ConfigError("--model: required, as tokens and masks depend on it (for example --model Qwen/Qwen3-0.6B)")
    config = configure(*given, *options.settings, method=options.method)
    from ...assemble import tokenizer_and_renderer
    from ...data import dataset, inspection
    from ...resolution import by_rows

    config = by_rows(config)
    _, renderer = tokenizer_and_renderer(config)
    found = dataset.load(config.data, config.data.sources()[0], renderer)
    totals = inspection.totals(found, config.batch.micro_tokens, config.data.seed)
    chosen = _chosen(found, options.row)
    if options.html:
        _write(options, config, found, totals, range(min(options.rows, len(found))) if options.row is None else chosen)
    names = dict(zip(inspection.labels(found, chosen), chosen))
    if options.json:
        shown = {name: _listed(inspection.members_of(found, i)) for name, i in names.items()}
        said = {name: inspection.said_of(found, found.documents[i]) for name, i in names.items()}
        faults = [vars(fault) for fault in found.faults]
        page = {"html": options.html} if options.html else {}
        return {**totals, "faults": faults, "tokens_of_rows": shown, "said_of_rows": said, **page}
    _show(found, totals, names, config.batch.micro_tokens)
    if options.html:
        print(f"\nwritten to {options.html}")
    return None


def _listed(members: Sequence[tuple[str, list]]) -> list[dict[str, Any]]:
    """Every token, with the side that it is of and its tag, where there are such."""
    return [
        {"text": p.text, "weight": p.weight} | ({"side": side} if side else {}) | ({"tag": p.tag} if p.tag else {})
        for side, pieces in members
        for p in pieces
    ]


def _write(options: argparse.Namespace, config: Any, found: Any, totals: dict, indices: Sequence[int]) -> None:
    from ...data.page import page
    from ...files import write_atomically

    write_atomically(Path(options.html), page(found, totals, config.batch.micro_tokens, config.data.seed, indices))


def _chosen(found: Any, wanted: list[int] | None) -> list[int]:
    """The places of the wanted rows among the documents; a long text is several."""
    from ...errors import DataError

    if wanted is None:
        return [0] if len(found) else []
    places: dict[int, list[int]] = {}
    for index, document in enumerate(found.documents):
        places.setdefault(document.row, []).append(index)
    for number in wanted:
        fault = next((f for f in found.faults if f.row == number), None)
        if fault is not None:
            raise DataError(f"row {number} ({fault.place}) is bad: {fault.kind}: {fault.detail}")
        if number not in places:
            raise DataError(f"--row {number}: the file has rows 0 to {found.rows - 1}")
    return [index for number in wanted for index in places[number]]


def _show(found: Any, totals: dict, names: dict[str, int], row_tokens: int) -> None:
    from rich.console import Console

    from ...data import dataset, inspection

    console = Console(highlight=False, soft_wrap=True)
    for name, index in names.items():
        members, said = inspection.members_of(found, index), inspection.said_of(found, found.documents[index])
        told = [f"{sum(len(pieces) for _, pieces in members)} pieces", inspection.how_learnt(found)]
        told += [inspection.told(said)] if said else []
        console.print(f"row {name}: {', '.join(told)}", style="bold", markup=False)
        for side, pieces in members:
            if side:
                console.print(f"{side}:", style="bold")
            if console.is_terminal and not console.no_color:
                console.print(inspection.coloured(pieces))
            else:
                print(inspection.bracketed(pieces))
        console.print()
    lengths, labels = totals["lengths"], totals["labels"]
    print(f"format              {totals['format']}")
    print(f"rows                {totals['rows']:,} ({totals['usable']:,} usable, {totals['documents']:,} documents)")
    print(f"tokens              {totals['tokens']:,}")
    print(
        f"trained tokens      {totals['trained_tokens']:,} ({totals['trained_tokens'] / max(1, totals['tokens']):.1%})"
    )
    print(f"truncated           {totals['truncated']:,}")
    print(f"packing efficiency  {totals['packing_efficiency']:.1%} in rows of {row_tokens}")
    print("lengths             " + ", ".join(f"{name} {value}" for name, value in lengths.items()))
    if labels:
        print("labels              " + ", ".join(f"{inspection.visible(n)} {count:,}" for n, count in labels.items()))
    most = max((count for *_, count in totals["histogram"]), default=1)
    for low, high, count in totals["histogram"]:
        print(f"  {low:>6} to {high - 1:<6} {count:>7,} {'#' * round(40 * count / most)}")
    if found.faults:
        sys.stdout.flush()
        print(f"\n{len(found.faults)} bad rows\n{dataset.report(found.faults)}")
