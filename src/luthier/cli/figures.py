"""How figures are shown: base against tuned, answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..scores import Answer

CAPTIONS = {  # of a figure's key, with its digits
    "loss": ("loss", 4), "perplexity": ("perplexity", 2), "bits_per_byte": ("bits per byte", 3),
    "token_accuracy": ("token accuracy", 3), "exact_match": ("exact match", 3), "f1": ("F1 of words", 3),
    "bleu": ("BLEU", 1), "chrf": ("chrF", 1), "rouge_1": ("ROUGE-1", 3), "rouge_2": ("ROUGE-2", 3),
    "rouge_l": ("ROUGE-L", 3), "json_equal": ("equal JSON", 3), "valid_json": ("valid JSON", 3),
}  # fmt: skip


def show_report(report: dict) -> None:
    """Base against tuned, as a table on the standard output."""
    import sys

    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    wide = console.width >= 100  # else the interval of tuned alone is left to the JSON
    table = Table(box=None, pad_edge=False, header_style="bold")
    captions = ("held out", "base", "tuned", *(["95% interval"] if wide else []), "change", "95% interval", "won/lost")
    for i, caption in enumerate(captions):
        table.add_column(caption, justify="right" if i else "left", no_wrap=True)
    for key, figure in report.get("figures", {}).items():
        caption, digits = _caption(key)
        alone = [_interval(figure["tuned_interval"], digits)] if wide else []
        table.add_row(
            caption, _number(figure.get("base"), digits), _number(figure["tuned"], digits), *alone,
            _number(figure.get("change"), digits, "+"), _interval(figure.get("change_interval"), digits, "+"),
            f"{figure['wins']}/{figure['losses']}" if "wins" in figure else "",
        )  # fmt: skip
    if table.row_count:
        console.print(table)
    if answers := report.get("answers"):
        base, tuned = answers.get("base", {}), answers["tuned"]
        cut = tuned.get("truncated", 0), base.get("truncated", 0)
        text = f"{tuned['rows']} prompts answered"
        if any(cut):
            text += f"; cut at evaluation.max_new_tokens: {cut[0]} answers of tuned, {cut[1]} of base"
        console.print(text)
    if "steps" in report:
        console.print(
            f"trained {report['steps']} steps, {report['tokens']:,} tokens in {report['training_seconds']:.0f} s "
            f"({report['trained_parameters']:,} parameters move)"
        )


def _caption(key: str) -> tuple[str, int]:
    set_name, dot, figure = key.rpartition(".")
    if key.startswith("tasks."):
        return key.removeprefix("tasks."), 3
    caption, digits = CAPTIONS.get(figure, (figure, 3))
    return (f"{set_name}: {caption}" if dot else caption), digits


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def _interval(bounds: Sequence[float] | None, digits: int, sign: str = "") -> str:
    return "-" if bounds is None else f"{bounds[0]:{sign}.{digits}f} to {bounds[1]:{sign}.{digits}f}"


def show_answers(base: Sequence[Answer], tuned: Sequence[Answer], count: int) -> None:
    """The same questions answered by both, one below the other."""
    rows = [
        {"prompt": t.prompt, "base": b.answer, "tuned": t.answer, "reference": t.reference, "right": t.exact}
        for b, t in list(zip(base, tuned))[:count]
    ]
    for row in rows:
        _show_row(row, "green" if row["right"] else "red")


def show_rows(rows: Sequence[dict], outcome: str) -> None:
    """Rows of a comparison, wins or losses."""
    for row in rows:
        _show_row(row, "green" if outcome == "win" else "red")
    if not rows:
        print("no row was made " + ("better" if outcome == "win" else "worse"))


def _show_row(row: dict, style: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(f"\n{row['prompt']}", style="bold"))
    console.print(Text(f"  base      {_short(row['base'])}"))
    console.print(Text(f"  tuned     {_short(row['tuned'])}", style=style))
    console.print(Text(f"  reference {_short(row['reference'])}"))


def _short(text: str, width: int = 110) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
