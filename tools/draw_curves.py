"""Curves of runs as an SVG picture: `python tools/draw_curves.py OUT.svg KEY NAME=RUN ... [--mean N]`."""

from __future__ import annotations

import argparse
import json
import math
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 320, 64, 40, 24, 16
COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b")


def points(run: Path, key: str, kind: str, window: int) -> list[tuple[int, float]]:
    """(step, figure) of a run's records of this kind; each the mean of the last `window`."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(r["step"], r[key]) for r in records if r["kind"] == kind and r.get(key) is not None]
    if not found:
        raise SystemExit(f"{run}: no {key!r} among its records of kind {kind!r}")
    values = [value for _, value in found]
    last = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [(step, sum(part) / len(part)) for (step, _), part in zip(found, last)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span the range."""
    rough = (high - low) / count or 1.0
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= rough)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def drawn(title: str, curves: dict[str, list[tuple[int, float]]]) -> str:
    """The picture; step along, figure upwards."""
    every = [p for curve in curves.values() for p in curve]
    marks_x = ticks(min(s for s, _ in every), max(s for s, _ in every))
    marks_y = ticks(min(v for _, v in every), max(v for _, v in every))

    def x(step: float) -> float:
        return LEFT + (step - marks_x[0]) / (marks_x[-1] - marks_x[0]) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - marks_y[0]) / (marks_y[-1] - marks_y[0]) * (HEIGHT - BOTTOM - TOP)

    def text(at_x: float, at_y: float, what: str, anchor: str, colour: str = "#333") -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(what)}</text>'

    def line(x1: float, y1: float, x2: float, y2: float) -> str:
        return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="#ddd"/>'

    font = 'font-family="sans-serif" font-size="12"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {font}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', text(LEFT, 16, title, "start"),
        text(WIDTH - RIGHT, HEIGHT - 6, "step", "end"),
    ]  # fmt: skip
    for mark in marks_y:
        out += [line(LEFT, y(mark), WIDTH - RIGHT, y(mark)), text(LEFT - 6, y(mark) + 4, f"{mark:.4g}", "end")]
    out += [text(x(mark), HEIGHT - BOTTOM + 16, f"{mark:.4g}", "middle") for mark in marks_x]
    place = WIDTH - RIGHT  # names above the picture, from the right
    for i, (name, curve) in reversed(list(enumerate(curves.items()))):
        colour = COLOURS[i % len(COLOURS)]
        path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in curve)
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        out.append(text(place, 16, name, "end", colour))
        place -= 7 * len(name) + 12
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("key", help="a key of the records, such as loss or rewards/accuracies")
    parser.add_argument("runs", nargs="+", help="NAME=RUN")
    parser.add_argument("--evaluation", action="store_true", help="figures of the evaluations, not of the steps")
    parser.add_argument("--mean", type=int, default=1, help="of the last so many records")
    asked = parser.parse_args()
    kind = "evaluation" if asked.evaluation else "train"
    named = dict(entry.split("=", 1) for entry in asked.runs)
    curves = {name: points(Path(run), asked.key, kind, asked.mean) for name, run in named.items()}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(drawn(asked.key, curves))


if __name__ == "__main__":
    main()
