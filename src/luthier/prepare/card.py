"""The card of a set: README.md with a head that the hub reads, hashes of every file, sources, how it was made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ..files import write_atomically

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
         (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"))  # fmt: skip


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def card(folder: Path, report: Mapping, *, title: str, licence: str | None, command: str, told: Sequence[str]) -> Path:
    """Write it. `report` is that of a split; `told` are lines on how it was made."""
    sides = report["sides"]
    files = {name: Path(path) for name, path in report["files"].items()}
    head = {
        "license": licence or "unknown",
        "size_categories": [next((text for most, text in SIZES if report["rows"] < most), "n>100M")],
        "configs": [{
            "config_name": "default",
            "data_files": [{"split": name, "path": path.name} for name, path in files.items()],
        }],
    }  # fmt: skip
    classes = list(dict.fromkeys(label for side in sides.values() for label in side.get("classes", ())))
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", f"# {title}", ""]
    lines += [f"{report['rows']:,} rows. Licence: {licence or 'unknown; say it with --license'}.", ""]
    lines += ["| side | rows | share | file | bytes | sha256 |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {sides[name]['rows']:,} | {sides[name]['share']:.2%} | {path.name} | {path.stat().st_size:,} | "
        f"`{sha256(path)}` |" for name, path in files.items()
    ]  # fmt: skip
    if classes:
        lines += ["", f"| class | {' | '.join(sides)} |", f"| --- |{' --- |' * len(sides)}"]
        lines += [
            f"| {_cell(label)} | {' | '.join(str(side['classes'].get(label, 0)) for side in sides.values())} |"
            for label in classes
        ]
    lines += ["", "## Made", "", "```", command, "```", "", *(f"- {text}" for text in told)]
    lines += ["", "## Sources", "", "| file | rows | bytes | sha256 |", "| --- | --- | --- | --- |"]
    for piece in report["pieces"]:
        path = Path(piece["file"])
        known = (f"{path.stat().st_size:,}", f"`{sha256(path)}`") if path.is_file() else ("", "")
        name = path.name if path.is_file() else piece["file"]
        lines.append(f"| {_cell(name)} | {piece['rows']:,} | {' | '.join(known)} |")
    made = folder / "README.md"
    write_atomically(made, "\n".join(lines) + "\n")
    return made


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
