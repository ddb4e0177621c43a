"""One HTML page of a search: history, parallel coordinates, curves, front, importance, table; it loads nothing.

A Content-Security-Policy allows its own script and style alone; what settings and errors say is text in it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from ..files import write_atomically
from .plan import Plan
from .report import brief, fresh_cells, summary
from .space import Dimension


def write(plan: Plan, report: Mapping) -> None:
    """`report.html` in the search's folder."""
    write_atomically(plan.folder / "report.html", page(plan, report))


def page(plan: Plan, report: Mapping) -> str:
    metrics = ", ".join(f"{m.name} ({'less' if m.less else 'more'} is better)" for m in plan.metrics)
    several = "; the front is orange" if len(plan.metrics) > 1 else "; the best is orange"
    body = (
        f"<h1>{escape(str(plan.folder))}</h1>\n<p class=dim>{escape(metrics)}</p>\n"
        f"<p>{escape(summary(plan, report))}</p>\n"
        "<p id=told role=status aria-live=polite></p>\n"
        "<h2>History</h2>\n<p class=dim>Each trial, and the best so far; hollow ones have no value.</p>\n"
        "<svg id=history role=img aria-label='The metric of each trial'></svg>\n"
        "<h2>Settings</h2>\n<p class=dim>A line is a trial, from blue (best) to red"
        f"{several}. Drag along an axis to keep the trials that pass there; click it to let all pass. "
        "<span id=count></span></p>\n"
        "<svg id=parallel role=img aria-label='Settings and metrics on parallel axes'></svg>\n"
        "<section id=curves-section><h2>Evaluations</h2>\n"
        "<svg id=curves role=img aria-label='The metric over the steps'></svg></section>\n"
        "<section id=front-section><h2>Front</h2>\n"
        "<svg id=front role=img aria-label='One metric against the other'></svg></section>\n"
        f"{_importance(plan, report)}{_fresh(report)}{_table(plan, report)}"
    )
    return document(f"{plan.folder.name}: a search", body, _data(plan, report), _file("plots.js"))


def document(title: str, body: str, data: Mapping | None = None, script: str = "") -> str:
    """A page with the style of these, and with a script that finds `data` under that id."""
    style = _file("plots.css")
    policy = f"default-src 'none'; style-src '{_digest(style)}'; base-uri 'none'; form-action 'none'"
    if script:
        policy += f"; script-src '{_digest(script)}'"
    # A text inside of a script ends at the first of these, whatever it is part of.
    told = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c") if data is not None else ""
    return (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        f'<meta http-equiv=Content-Security-Policy content="{policy}">\n'
        '<meta name=viewport content="width=device-width, initial-scale=1">\n<meta name=referrer content=no-referrer>\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}"
        + (f"<script type=application/json id=data>{told}</script>\n" if data is not None else "")
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def _file(name: str) -> str:
    return (files(__package__ or "luthier.search") / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data(plan: Plan, report: Mapping) -> dict[str, Any]:
    shown = ("trial", "state", "settings", "values", "reason", "curve")
    return {
        "metrics": [{"name": m.name, "less": m.less} for m in plan.metrics],
        "dimensions": [_dimension(d) for d in plan.space.dimensions],
        "best": report["best"],
        "trials": [{key: row[key] for key in shown} for row in report["trials"]],
    }


def _dimension(d: Dimension) -> dict[str, Any]:
    if d.choices:
        return {"key": d.key, "choices": list(d.choices)}
    return {"key": d.key, "low": d.low, "high": d.high, "log": d.log}


def _importance(plan: Plan, report: Mapping) -> str:
    found = report["importance"]
    head = ["setting", *(m.name for m in plan.metrics)]
    rows = []
    for d in plan.space.dimensions:
        shares = [found["shares"].get(m.name, {}).get(d.key) for m in plan.metrics]
        if any(share is not None for share in shares):
            rows.append([escape(d.key), *(_meter(share) for share in shares)])
    note = f"<p class=dim>{escape(found['note'])}.</p>\n" if found["note"] else ""
    return f"<h2>Importance</h2>\n{note}{_cells(head, rows) if rows else ''}"


def _meter(share: float | None) -> str:
    return "" if share is None else f"<meter value={share:.3f}></meter> {share:.0%}"


def _fresh(report: Mapping) -> str:
    fresh = report.get("fresh")
    if fresh is None:
        return ""
    if "note" in fresh:
        inner = f"<p>{escape(fresh['note'])}</p>\n"
    else:
        head, *cells = fresh_cells(fresh)
        inner = f"<p>{escape(fresh['verdict'])}</p>\n{_cells(head, [[escape(c) for c in row] for row in cells])}"
    return f"<h2>Against the configuration as it is</h2>\n{inner}"


def _table(plan: Plan, report: Mapping) -> str:
    keys, metrics = [d.key for d in plan.space.dimensions], [m.name for m in plan.metrics]
    head = ["trial", "state", *metrics, *keys, "seconds", "why"]
    lines = []
    for row in report["trials"]:
        values = [brief(row["values"][name]) if row["values"] else "" for name in metrics]
        settings = [brief(row["settings"].get(key, "")) for key in keys]
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        cells = [str(row["trial"]), row["state"], *values, *settings, seconds, row["reason"]]
        mark = " class=best" if row["trial"] in report["best"] else ""
        inner = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr tabindex=0 data-trial={row['trial']}{mark}>{inner}</tr>\n")
    names = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    return (
        f"<h2>Trials</h2>\n<div class=scroll><table><thead><tr>{names}</tr></thead>\n<tbody>\n{''.join(lines)}"
        "</tbody></table></div>\n"
    )


def _cells(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; `rows` are markup already."""
    names = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<div class=scroll><table><thead><tr>{names}</tr></thead>\n<tbody>\n{lines}</tbody></table></div>\n"
