"""The learning rate over the steps, drawn in the terminal or as an SVG file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

BLOCKS = " ▁▂▃▄▅▆▇█"


def sampled(rates: Sequence[float], width: int) -> list[float]:
    """At most `width` of the rates, evenly, both ends included."""
    if len(rates) <= width:
        return list(rates)
    return [rates[round(i * (len(rates) - 1) / (width - 1))] for i in range(width)]


def drawn(rates: Sequence[float], width: int = 64, height: int = 8) -> str:
    """Columns of block characters, eighths of a line exact; rates in the margin, steps below."""
    chosen, top = sampled(rates, width), max(rates)
    if len(chosen) < width:  # a short run is stretched
        chosen = [chosen[min(len(chosen) - 1, i * len(chosen) // width)] for i in range(width)]
    eighths = [round(rate / top * height * 8) for rate in chosen]
    lines = []
    for line in reversed(range(height)):
        margin = f"{top:.2e}" if line == height - 1 else f"{0:.2e}" if line == 0 else ""
        lines.append(f"{margin:>9} ┤" + "".join(BLOCKS[min(8, max(0, n - 8 * line))] for n in eighths).rstrip())
    last = str(len(rates))
    lines.append(" " * 10 + "└" + "─" * width)
    lines.append(" " * 11 + "1" + " " * max(1, width - 1 - len(last)) + last + "  step")
    return "\n".join(lines)


def svg(rates: Sequence[float], title: str, width: int = 640, height: int = 240) -> str:
    """The same as a picture; every corner of the curve is kept up to a thousand points."""
    left, below, top = 70, 30, max(rates)
    points, shown = sampled(rates, 1000), sampled(range(1, len(rates) + 1), 1000)
    across, up = width - left - 10, height - below - 30
    corners = " ".join(
        f"{left + across * (step - 1) / max(1, len(rates) - 1):.1f},{30 + up * (1 - rate / top):.1f}"
        for step, rate in zip(shown, points)
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" \
font-size="12">
<rect width="100%" height="100%" fill="white"/>
<text x="{left}" y="18">{escape(title)}</text>
<path d="M{left} 30V{30 + up}H{width - 10}" fill="none" stroke="black"/>
<polyline points="{corners}" fill="none" stroke="steelblue" stroke-width="2"/>
<text x="{left - 5}" y="34" text-anchor="end">{top:.2e}</text>
<text x="{left - 5}" y="{34 + up}" text-anchor="end">0</text>
<text x="{left}" y="{48 + up}">1</text>
<text x="{width - 10}" y="{48 + up}" text-anchor="end">{len(rates)}</text>
</svg>
"""
