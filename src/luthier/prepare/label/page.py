"""The labelling page: one HTML document with its own style and script, which loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

from ...data.page import STYLE

HERE = Path(__file__).parent
BODY = """<form id=name><h1>Label rows</h1><p><label>Your name <input id=by maxlength=64 required autocomplete=off></label>
<button>Begin</button></p></form>
<div id=work class=hidden>
<header><h1>Label rows</h1><span id=told role=status></span><progress id=progress value=0 max=1></progress>
<span class=dim id=who></span></header>
<main><p id=instructions class=dim></p><p id=problem role=alert></p>
<div id=texts></div><div id=words></div><div id=answers></div><textarea id=edited class=hidden aria-label=Answer></textarea>
<div id=choices class=choices></div>
<div id=actions class="choices hidden"><button type=button id=save>Save <kbd>enter</kbd></button>
<button type=button id=skip>Skip <kbd>s</kbd></button><button type=button id=undo>Undo <kbd>u</kbd></button></div>
<div id=end class=hidden><p><strong>Nothing is left to label.</strong></p>
<p><button type=button id=undo2>Undo <kbd>u</kbd></button></p></div>
<p><button type=button id=again class=hidden>Go through what was skipped</button>
<button type=button id=write>Write the labelled rows</button> <span id=written role=status></span></p></main>
<footer><p id=help></p><p id=place></p></footer>
</div>"""


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


@cache
def page() -> tuple[str, str]:
    """(the document, its Content-Security-Policy)."""
    style = STYLE + (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    assert "</script" not in script and "</style" not in style
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    document = (
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n<meta name=referrer content=no-referrer>\n'
        '<link rel=icon href="data:,">\n'
        f"<title>Label rows</title>\n<style>{style}</style>\n</head>\n<body>\n{BODY}\n<script>{script}</script>\n</body>\n</html>\n"
    )
    return document, policy
