"""The chat page: one text with its style and script inside, and the policy that lets a browser run nothing else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files


@cache
def page() -> tuple[str, str]:
    """The page, and its Content-Security-Policy."""
    here = files("luthier.serve")
    inside = {name: here.joinpath(f"page.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    text = inside["html"].replace("/*css*/", inside["css"]).replace("/*js*/", inside["js"])
    policy = (
        f"default-src 'none'; script-src '{_hash(inside['js'])}'; style-src '{_hash(inside['css'])}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
