"""One HTML page of what training will see: totals, lengths, packing, bad rows, and rows token by token.

It loads nothing and runs nothing: no script, and a Content-Security-Policy that allows its own style sheet only. What
the data says is text in it, never markup.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby, islice

from .dataset import REMEDIES, Dataset, Fault
from .inspection import Piece, factor, labels, members_of, said_of, told, visible
from .packing import best_fit, order

LONGEST = 4096  # tokens of a row that are shown
LISTED = 1000  # bad rows that are listed
PACKED = 16  # packed rows that are drawn

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1b1b1f; --dim: #5a5a63; --line: #d5d5dc; --panel: #f4f4f7;
  --learnt: #0b4020; --learnt-back: #d3f2dc; --learnt-even: #bfe8cb; --rule: #1a7a3c; --even: #ececf1; --bar: #2a6fb0;
  --bad: #a3201a; --focus: #1a56d6; }
@media (prefers-color-scheme: dark) { :root { --back: #141417; --text: #ececf0; --dim: #a6a6b0; --line: #3a3a42;
  --panel: #1e1e23; --learnt: #d8fbe3; --learnt-back: #14482a; --learnt-even: #1b5a36; --rule: #5fd389; --even: #232329;
  --bar: #6cabe6; --bad: #ff9c94; --focus: #8ab4ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.25rem 4rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p { margin: .25rem 0 .75rem; max-width: 62rem; } .dim { color: var(--dim); }
a { color: inherit; } nav a { margin-right: 1.25rem; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
dl.totals { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1rem 0; }
dl.totals div { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
dl.totals dt { color: var(--dim); font-size: .85rem; } dl.totals dd { margin: 0; font-size: 1.25rem; }
dd.bad, .bad { color: var(--bad); font-weight: 600; }
table { border-collapse: collapse; } caption { text-align: left; color: var(--dim); padding-bottom: .4rem; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; vertical-align: top; font-variant-numeric: tabular-nums; }
th { font-weight: 600; } td.number, th.number { text-align: right; white-space: nowrap; }
.scroll { overflow: auto; max-height: 26rem; border: 1px solid var(--line); border-radius: .5rem;
  padding: .5rem .8rem; }
.scroll { margin-top: 1rem; } .scroll table { width: 100%; }
.scroll td { border-top: 1px solid var(--line); overflow-wrap: break-word; }
.scroll td:last-child { overflow-wrap: anywhere; min-width: 16rem; }
table.charts { width: 100%; max-width: 52rem; }
.charts td:last-child { width: 100%; padding: 0; min-width: 5rem; }
svg { display: block; width: 100%; height: 1.1rem; margin-top: .2rem; } .bar { fill: var(--bar); }
.box { fill: none; stroke: var(--line); } .piece { fill: var(--bar); stroke: var(--back); } .piece.even { opacity: .7; }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .6rem 0; }
summary { padding: .45rem .8rem; cursor: pointer; background: var(--panel); border-radius: .5rem; }
.tokens { font: .9rem/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; color: var(--dim);
  padding: .6rem .8rem; margin: 0; max-height: 40rem; overflow: auto; }
.tokens span { unicode-bidi: isolate; } .tokens > span:nth-of-type(even) { background: var(--even); }
mark { background: var(--learnt-back); color: var(--learnt); border-bottom: 2px solid var(--rule); padding: .1rem 0;
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
mark > span:nth-of-type(even) { background: var(--learnt-even); }
mark b { border: 1px solid var(--rule); border-radius: .3rem; padding: 0 .25rem; margin-right: .15rem;
  font-size: .8em; }
.side { padding: .4rem .8rem 0; margin: 0; font-weight: 600; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
@media print { .tokens, .scroll { max-height: none; } }
"""


def page(dataset: Dataset, totals: dict, row_tokens: int, seed: int, indices: Sequence[int]) -> str:
    """The page of a data set, with the documents `indices` in full; `totals` are those of `inspection`."""
    policy = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    title = f"{_text(dataset.source)}: what training will see"
    parts = [
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n",
        f"<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'sha256-{policy}'; "
        "base-uri 'none'; form-action 'none'\">\n",
        '<meta name=viewport content="width=device-width, initial-scale=1">\n',
        "<meta name=referrer content=no-referrer>\n",
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n",
        f"<header>\n<h1>{_text(dataset.source)}</h1>\n<p class=dim>{_text(dataset.found)}</p>\n",
        '<nav aria-label="Sections"><a href="#lengths">Lengths</a><a href="#packing">Packing</a>'
        f'<a href="#bad">Bad rows ({len(dataset.faults):,})</a><a href="#rows">Rows token by token</a></nav>\n',
        "</header>\n<main>\n",
        _totals(totals, row_tokens),
        _lengths(totals),
        _packing(dataset, row_tokens, seed),
        _bad(dataset.faults),
        _rows(dataset, indices),
        "</main>\n</body>\n</html>\n",
    ]
    return "".join(parts)


def _text(value: object) -> str:
    return escape(visible(str(value)))


def _totals(totals: dict, row_tokens: int) -> str:
    bad = sum(totals["bad_rows"].values())
    share = totals["trained_tokens"] / max(1, totals["tokens"])
    tiles = [
        ("rows", f"{totals['rows']:,}", ""),
        ("bad rows", f"{bad:,}", " class=bad" if bad else ""),
        ("documents", f"{totals['documents']:,}", ""),
        ("tokens", f"{totals['tokens']:,}", ""),
        ("learnt tokens", f"{totals['trained_tokens']:,} ({share:.1%})", ""),
        (f"packing, rows of {row_tokens:,}", f"{totals['packing_efficiency']:.1%}", ""),
    ]
    tiles += [(_text(name), f"{count:,}", "") for name, count in totals["labels"].items()]
    inner = "".join(f"<div><dt>{name}</dt><dd{mark}>{value}</dd></div>\n" for name, value, mark in tiles)
    return f"<dl class=totals>\n{inner}</dl>\n"


def _lengths(totals: dict) -> str:
    bins, told = totals["histogram"], ", ".join(f"{name} {value:,}" for name, value in totals["lengths"].items())
    most = max((count for *_, count in bins), default=1)
    rows = "".join(
        f"<tr><th class=number scope=row>{low:,} to {high - 1:,}</th><td class=number>{count:,}</td>"
        f'<td><svg viewBox="0 0 400 16" preserveAspectRatio=none aria-hidden=true>'
        f'<rect class=bar width="{400 * count / most:.1f}" height=16 /></svg></td></tr>\n'
        for low, high, count in bins
    )
    head = (
        "<thead><tr><th class=number scope=col>tokens</th><th class=number scope=col>documents</th><td></td></tr>"
        "</thead>"
    )
    return (
        "<section id=lengths>\n<h2>Lengths</h2>\n"
        f"<table class=charts><caption>In tokens: {told or 'none'}</caption>\n{head}\n"
        f"<tbody>\n{rows}</tbody></table>\n</section>\n"
    )


def _packing(dataset: Dataset, row_tokens: int, seed: int) -> str:
    """The first rows of the first epoch, as boxes of documents."""
    lengths = dataset.lengths
    packed = list(islice(best_fit(order(len(dataset), seed, 0), lengths, row_tokens), PACKED)) if len(dataset) else []
    names = dict(zip(chosen := [d for row in packed for d in row], labels(dataset, chosen)))
    lines = []
    for number, row in enumerate(packed):
        width, at, boxes = 640 / max(row_tokens, sum(lengths[d] for d in row)), 0, []
        for place, document in enumerate(row):
            length = lengths[document]
            boxes.append(
                f'<rect class="piece{" even" * (place % 2)}" x="{at * width:.2f}" width="{length * width:.2f}" '
                f"height=18><title>row {names[document]}: {length:,} tokens</title></rect>"
            )
            at += length
        lines.append(
            f"<tr><th class=number scope=row>{number}</th><td class=number>{len(row):,}</td>"
            f"<td class=number>{at / row_tokens:.1%}</td>"
            "<td><svg viewBox='0 0 640 18' preserveAspectRatio=none aria-hidden=true>"
            f"{''.join(boxes)}<rect class=box width=640 height=18 /></svg></td></tr>\n"
        )
    head = (
        "<thead><tr><th class=number scope=col>row</th><th class=number scope=col>documents</th>"
        "<th class=number scope=col>full</th><td></td></tr></thead>"
    )
    told = f"The first {len(packed)} packed rows of the first epoch, {row_tokens:,} slots each; a box is a document."
    return (
        "<section id=packing>\n<h2>Packing</h2>\n"
        f"<table class=charts><caption>{told}</caption>\n{head}\n<tbody>\n{''.join(lines)}"
        "</tbody></table>\n</section>\n"
    )


def _bad(faults: Sequence[Fault]) -> str:
    if not faults:
        return "<section id=bad>\n<h2>Bad rows</h2>\n<p>None.</p>\n</section>\n"
    kinds = Counter(fault.kind for fault in faults)
    summary = "".join(
        f"<tr><th scope=row>{_text(kind)}</th><td class=number>{count:,}</td><td>{_text(REMEDIES[kind])}</td></tr>\n"
        for kind, count in kinds.most_common()
    )
    lines = "".join(
        f"<tr><td class=number>{fault.row:,}</td><td>{_text(fault.place)}</td><td>{_text(fault.kind)}</td>"
        f"<td>{_text(fault.detail)}</td></tr>\n"
        for fault in faults[:LISTED]
    )
    more = f"<p class=dim>The first {LISTED:,} of {len(faults):,} are listed.</p>\n" if len(faults) > LISTED else ""
    return (
        f"<section id=bad>\n<h2>Bad rows</h2>\n<table><thead><tr><th scope=col>kind</th><th class=number scope=col>rows"
        f"</th><th scope=col>remedy</th></tr></thead>\n<tbody>\n{summary}</tbody></table>\n{more}"
        "<div class=scroll role=region tabindex=0 aria-label='List of bad rows'><table>\n<thead><tr>"
        "<th class=number scope=col>row</th><th scope=col>place</th><th scope=col>kind</th>"
        f"<th scope=col>what is wrong</th></tr></thead>\n<tbody>\n{lines}</tbody></table></div>\n</section>\n"
    )


def _rows(dataset: Dataset, indices: Sequence[int]) -> str:
    legend = (
        "<p>Learnt tokens are <mark><span>green and underlined</span></mark>; from the others nothing is learnt. "
        "Neighbours differ in shade, so that borders of tokens show. A weight other than 1 stands before what "
        "it weighs: <mark><b>\u00d70.5</b><span>so</span></mark>, and a tag before its word. Resting on a "
        "token names its place, id and weight.</p>\n"
    )
    shown = (
        f"<p class=dim>{len(indices):,} of {len(dataset):,} documents are shown; <code>--rows</code> and "
        "<code>--row</code> choose.</p>\n"
    )
    inner = "".join(_row(dataset, index, name) for index, name in zip(indices, labels(dataset, indices)))
    return f"<section id=rows>\n<h2>Rows token by token</h2>\n{legend}{shown}{inner}</section>\n"


def _row(dataset: Dataset, index: int, name: str) -> str:
    members, said = members_of(dataset, index), said_of(dataset, dataset.documents[index])
    pieces = [piece for _, of_member in members for piece in of_member]
    total = sum(len(piece.ids) for piece in pieces)
    learnt = sum(len(piece.ids) for piece in pieces if piece.weight)
    heading = f"row {_text(name)}: {total:,} tokens, {learnt:,} learnt ({learnt / max(1, total):.0%})"
    heading += f", {_text(told(said))}" if said else ""
    inner = "".join(_member(side, of_member, name) for side, of_member in members)
    return f"<details open id=row-{index}><summary>{heading}</summary>\n{inner}</details>\n"


def _member(side: str, pieces: Sequence[Piece], name: str) -> str:
    cut = f"\n<p class=dim>The first {LONGEST:,} of {len(pieces):,} pieces.</p>" if len(pieces) > LONGEST else ""
    heading, of_side = (f"<p class=side>{_text(side)}</p>\n", f", {_text(side)}") if side else ("", "")
    return (
        f"{heading}<div class=tokens role=region tabindex=0 "
        f'aria-label="Tokens of row {_text(name)}{of_side}">{_tokens(pieces[:LONGEST])}</div>{cut}'
    )


def _tokens(pieces: Sequence[Piece]) -> str:
    out, place = [], 0
    for weight, tag, members in _marked(pieces):
        inner, place = _stretch(members, place)
        if weight or tag:
            before = _text(tag) if tag else escape(factor(weight).strip())
            sign = f"<b>{before}</b>" if before else ""
            inner = f"<mark><i class=hidden>learnt: </i>{sign}{inner}<i class=hidden> end of learnt </i></mark>"
        out.append(inner)
    return "".join(out)


def _marked(pieces: Sequence[Piece]) -> Iterator[tuple[float, str, Iterable[Piece]]]:
    """Stretches that are learnt alike; each word with a tag by itself."""
    for (weight, tag), members in groupby(pieces, key=lambda piece: (piece.weight, piece.tag)):
        if tag:
            yield from ((weight, tag, [piece]) for piece in members)
        else:
            yield weight, "", members


def _stretch(pieces: Iterable[Piece], place: int) -> tuple[str, int]:
    out = []
    for piece in pieces:
        which = f"token {place}" if len(piece.ids) == 1 else f"tokens {place} to {place + len(piece.ids) - 1}"
        told = f"{which}, id {' '.join(map(str, piece.ids))}, weight {piece.weight:g}"
        text = _text(piece.text).replace("\n", "\u21b5\n")
        out.append(f'<span title="{told}">{text}</span>')
        place += len(piece.ids)
    return "".join(out), place
