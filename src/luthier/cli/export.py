"""luthier export: write a model for other tools, checked by loading it again in a fresh process."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..export.formats import KINDS, TABLE
from . import subparser


def add(verbs: argparse._SubParsersAction) -> None:
    made = subparser(verbs, "export", "write a model where transformers, peft, llama.cpp and servers read it")
    made.add_argument("source", metavar="SOURCE", help="a run; or a model: a folder, a name on the hub, a GGUF file")
    made.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    made.add_argument(
        "--as", dest="kind", required=True, choices=KINDS,
        help="; ".join(f"{form.name}: {form.caption}" for form in TABLE),
    )  # fmt: skip
    typed = "; ".join(f"{form.name}: {', '.join(form.dtypes)}" for form in TABLE if form.dtypes)
    made.add_argument("--dtype", help=f"of the tensors, by default that they compute in ({typed})")
    made.add_argument(
        "--bound", type=float, metavar="SHARE",
        help="by how much of itself perplexity may grow where a format rounds (0.03: 3 %%), else nothing is written; "
             "by default as much as is usual for the dtype",
    )  # fmt: skip
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ..export import export

    say = (lambda text: None) if options.quiet or options.json else (lambda text: print(text, file=sys.stderr))
    done = export(options.source, Path(options.out), options.kind, options.dtype, say, options.bound)
    if not options.json:
        print(f"{done['out']}: {', '.join(done['files'])}\n{_told(done)}")
        if not options.quiet:
            for remark in done.get("remarks", []):
                print(f"note: {remark}", file=sys.stderr)
    return done


def _told(done: dict[str, Any]) -> str:
    """What was compared, and how far it was apart."""
    allowed = f" (allowed {done['tolerance']:g})" if done.get("tolerance") is not None else ""
    lines = [
        f"loaded again in a fresh process: {done['compared']} differ by at most {done['largest_difference']:.2e} from "
        f"the trained model's{allowed}"
    ]
    if "difference_to_base" in done:
        lines[0] += f"; the base model differs by {done['difference_to_base']:.2f}"
    if done.get("bound") is not None:
        before, after = done["perplexity_before"], done["perplexity_after"]
        grew = f"{after / before - 1:+.2%} (allowed {done['bound']:+.2%})"
        lines.append(f"perplexity {before:.4g} -> {after:.4g}, {grew}")
    if "bytes" in done:
        lines.append(f"{done['bytes'] / 1e6:,.1f} MB")
    return "\n".join(lines)
