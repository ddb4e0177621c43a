"""How figures are shown: base against tuned, answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..evaluate import Answer


def show_report(report: dict) -> None:
    """Base against tuned, as a table on the standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for caption, justify in (("held out", "left"), ("base", "right"), ("tuned", "right"), ("95% interval", "right")):
        table.add_column(caption, justify=justify)  # type: ignore[arg-type]
    answers = report.get("answers")
    if answers:
        base, tuned = answers.get("base", {}), answers["tuned"]
        low, high = tuned["exact_match_interval"]
        table.add_row(
            f"exact match ({tuned['rows']} rows)", _number(base.get("exact_match"), 3),
            _number(tuned["exact_match"], 3), f"{low:.3f} to {high:.3f}",
        )  # fmt: skip
        if "gain_interval" in answers:
            low, high = answers["gain_interval"]
            table.add_row("  gain, same rows", "", f"{answers['gain']:+.3f}", f"{low:+.3f} to {high:+.3f}")
        if "valid_json" in tuned:
            table.add_row("valid JSON", _number(base.get("valid_json"), 3), _number(tuned["valid_json"], 3))
    for key, caption in (("held_out_loss", "loss"), ("token_accuracy", "token accuracy")):
        if key in report:
            table.add_row(caption, _number(report[key].get("base"), 4), _number(report[key]["tuned"], 4))
    console = Console(highlight=False)
    if table.row_count:
        console.print(table)
    if "steps" in report:
        console.print(
            f"trained {report['steps']} steps, {report['tokens']:,} tokens in {report['training_seconds']:.0f} s "
            f"({report['trained_parameters']:,} parameters move)"
        )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def show_answers(base: Sequence[Answer], tuned: Sequence[Answer], count: int) -> None:
    """The same questions answered by both, one below the other."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for before, after in list(zip(base, tuned))[:count]:
        console.print(Text(f"\n{after.prompt}", style="bold"))
        console.print(Text(f"  base      {_short(before.answer)}"))
        console.print(Text(f"  tuned     {_short(after.answer)}", style="green" if after.exact else "red"))
        console.print(Text(f"  reference {_short(after.reference)}"))


def _short(text: str, width: int = 110) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
