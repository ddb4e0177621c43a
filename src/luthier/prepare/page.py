"""One HTML page of an audit: the verdict, what each check found and where, lengths and languages; it runs nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..data.inspection import visible
from ..data.page import STYLE

OWN = """
.sound { color: var(--learnt); background: var(--learnt-back); }
.sound, .faulty { padding: .1rem .5rem; border-radius: .4rem; }
.faulty { color: var(--bad); border: 1px solid var(--bad); } section > p code { overflow-wrap: anywhere; }
td { overflow-wrap: anywhere; }
.charts tbody th.number { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
.across { overflow-x: auto; } .across th, .across td { white-space: nowrap; }
"""
WHATS = {
    "structure": "Rows that training refuses, empty turns",
    "encoding": "Damage to characters",
    "secrets": "Keys, tokens, passwords",
    "personal_data": "Personal data",
    "boilerplate": "Refusals and set phrases",
    "language": "Languages",
    "length": "Lengths",
    "label_noise": "Wrong labels",
    "balance": "Rows of each class",
    "perplexity": "Rows that the model finds unlikely",
    "overlap": "Rows of evaluation sets",
    "exact_duplicates": "Equal rows",
    "near_duplicates": "Rows that say nearly the same",
}


def page(verdict: Mapping[str, Any]) -> str:
    """The page of a verdict; what the data says is text in it, never markup."""
    style = STYLE + OWN
    policy = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    source = verdict["source"]
    title = _text(source if isinstance(source, str) else ", ".join(source))
    checks = verdict["checks"]
    links = "".join(f'<a href="#{kind}">{_text(kind)} ({one["rows"]:,})</a>' for kind, one in checks.items())
    return "".join(
        [
            "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n",
            f"<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'sha256-{policy}'; "
            "base-uri 'none'; form-action 'none'\">\n",
            '<meta name=viewport content="width=device-width, initial-scale=1">\n',
            "<meta name=referrer content=no-referrer>\n",
            f"<title>Audit of {title}</title>\n<style>{style}</style>\n</head>\n<body>\n<header>\n<h1>{title}</h1>\n",
            f"<p>{_mark(verdict['verdict'])} <span class=dim>{_faults(verdict)}</span></p>\n",
            f'<nav aria-label="Checks">{links}</nav>\n</header>\n<main>\n',
            _totals(verdict),
            _overview(checks),
            *(_check(kind, one) for kind, one in checks.items()),
            "</main>\n</body>\n</html>\n",
        ]
    )


def _text(value: object) -> str:
    return escape(visible(str(value)))


def _mark(verdict: str) -> str:
    return f"<strong class={verdict}>{verdict}</strong>"


def _faults(verdict: Mapping) -> str:
    faults = verdict["faults"]
    return (
        f"more than the recipe allows of: {_text(', '.join(faults))}"
        if faults
        else "no check found more than is allowed"
    )


def _totals(verdict: Mapping) -> str:
    formats = ", ".join(f"{name} {count:,}" for name, count in verdict["formats"].items()) or "none"
    tiles = [
        ("rows", f"{verdict['rows']:,}"),
        ("files", f"{verdict['files']:,}"),
        ("unreadable rows", f"{verdict['unreadable']:,}"),
        ("formats", formats),
    ]
    inner = "".join(f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>\n" for name, value in tiles)
    told = (
        f"<p class=dim>All findings stand in <code>{_text(verdict['findings'])}</code>; "
        f"<code>luthier data clean</code> with <code>{_text(verdict['recipe'])}</code> would mend them.</p>\n"
    )
    return f"<dl class=totals>\n{inner}</dl>\n{told}"


def _overview(checks: Mapping[str, Mapping]) -> str:
    rows = "".join(
        f'<tr><th scope=row><a href="#{kind}">{_text(kind)}</a></th><td class=number>{one["rows"]:,}</td>'
        f"<td class=number>{one['share']:.3%}</td><td class=number>{one['allowed']:.1%}</td>"
        f"<td>{_text(one['action'])}</td><td>{_mark('sound' if one['sound'] else 'faulty')}</td></tr>\n"
        for kind, one in checks.items()
    )
    head = "".join(
        f"<th scope=col{' class=number' if number else ''}>{name}</th>"
        for name, number in (("check", 0), ("rows", 1), ("share", 1), ("allowed", 1), ("action", 0), ("verdict", 0))
    )
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table>"
    region = f"<div class=across role=region tabindex=0 aria-label='All checks'>{table}</div>"
    return f"<section id=checks>\n<h2>Checks</h2>\n{region}\n</section>\n"


def _check(kind: str, one: Mapping) -> str:
    summary = one.get("summary", {})
    parts = [f"<section id={kind}>\n<h2>{_text(WHATS.get(kind, kind))}</h2>\n"]
    if one["what"]:
        parts.append(_bars("found", one["what"]))
    if languages := summary.get("languages"):
        parts.append(_bars("language", languages))
    if classes := summary.get("counts"):
        parts.append(_bars("class", classes))
    if mistaken := summary.get("mistaken"):
        pairs = {f"{one['label']} looks like {one['looks_like']}": one["rows"] for one in mistaken}
        parts.append(_bars("estimated", pairs))
    if lengths := summary.get("histogram"):
        parts.append(_lengths(summary, lengths))
    parts.append(_examples(one["examples"], one["rows"]) if one["examples"] else "<p>Nothing found.</p>\n")
    return "".join([*parts, "</section>\n"])


def _bars(name: str, counts: Mapping[str, int]) -> str:
    most = max(counts.values(), default=1)
    return _chart(name, [(_text(what), count, count / most) for what, count in counts.items()], "rows")


def _lengths(summary: Mapping, lengths: Mapping) -> str:
    bins = lengths["bins"]
    most = max((count for *_, count in bins), default=1)
    told = "; ".join(
        f"{unit}: {', '.join(f'{name} {value:,}' for name, value in summary[unit].items())}"
        for unit in ("characters", "words", "tokens")
        if unit in summary
    )
    chart = _chart(lengths["unit"], [(f"{a:,} to {b - 1:,}", n, n / most) for a, b, n in bins], "rows")
    return f"<p class=dim>{_text(told)}</p>\n{chart}"


def _chart(name: str, bars: Sequence[tuple[str, int, float]], unit: str) -> str:
    rows = "".join(
        f"<tr><th class=number scope=row>{label}</th><td class=number>{count:,}</td>"
        f'<td><svg viewBox="0 0 400 16" preserveAspectRatio=none aria-hidden=true>'
        f'<rect class=bar width="{400 * share:.1f}" height=16 /></svg></td></tr>\n'
        for label, count, share in bars
    )
    return (
        f"<table class=charts><thead><tr><th class=number scope=col>{_text(name)}</th>"
        f"<th class=number scope=col>{unit}</th><td></td></tr></thead>\n<tbody>\n{rows}</tbody></table>\n"
    )


def _examples(examples: Sequence[Mapping], rows: int) -> str:
    lines = "".join(
        f"<tr><td class=number>{one['row']:,}</td><td>{_text(one['place'])}</td><td>{_text(one['what'])}</td>"
        f"<td>{_text(one['detail'])}</td></tr>\n"
        for one in examples
    )
    head = "<th class=number scope=col>row</th><th scope=col>place</th><th scope=col>what</th><th scope=col>detail</th>"
    return (
        f"<p class=dim>The first {len(examples):,} findings, of {rows:,} rows.</p>\n"
        "<div class=scroll role=region tabindex=0 aria-label='Findings'><table>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody></table></div>\n"
    )
