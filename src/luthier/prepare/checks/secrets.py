"""Secrets: keys and tokens by the form that their makers give them, private keys, passwords in addresses."""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Literal
from zlib import crc32

from ..views import View
from .check import Check, Finding, Span
from .personal_data import masked

_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PATTERNS: dict[str, tuple[tuple[str, ...], re.Pattern]] = {  # what -> (one of these is in the text, pattern)
    "private_key": (
        ("PRIVATE KEY",),
        re.compile(
            r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----(?:\\n|[^-]){40,}?"
            r"(?:-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----|\Z)"
        ),
    ),
    "aws_key": (("AKIA", "ASIA"), re.compile(r"(?<![A-Za-z0-9/+])A[KS]IA[A-Z2-7]{16}(?![A-Za-z0-9/+=])")),
    "github_token": (
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        re.compile(r"(?<!\w)(?:gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59})(?!\w)"),
    ),
    "gitlab_token": (("glpat-",), re.compile(r"(?<!\w)glpat-[\w-]{20,64}(?!\w)")),
    "slack_token": (
        ("xox", "hooks.slack.com"),
        re.compile(r"(?<!\w)xox[abeoprs](?:\.xox[bp])?-[\w-]{10,250}|hooks\.slack\.com/services/T\w{8,12}/B\w{8,12}/\w{20,28}"),
    ),
    "google_key": (("AIza", "GOCSPX-"), re.compile(r"(?<!\w)(?:AIza[\w-]{35}|GOCSPX-[\w-]{28})(?![\w-])")),
    "openai_key": (
        ("sk-",),
        re.compile(r"(?<![\w-])sk-(?:proj-|svcacct-|admin-|ant-(?:api|admin)\d\d-|or-v1-)?[A-Za-z0-9_-]{20,200}(?![\w])"),
    ),
    "stripe_key": (
        ("sk_live_", "rk_live_", "whsec_"),
        re.compile(r"(?<!\w)(?:[sr]k_live_|whsec_)[A-Za-z0-9]{20,250}(?!\w)"),
    ),
    "huggingface_token": (("hf_",), re.compile(r"(?<!\w)hf_[A-Za-z]{34}(?!\w)")),
    "package_token": (
        ("npm_", "pypi-AgE"), re.compile(r"(?<!\w)(?:npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{50,250})(?!\w)")
    ),
    "sendgrid_key": (("SG.",), re.compile(r"(?<!\w)SG\.[\w-]{22}\.[\w-]{43}(?![\w-])")),
    "jwt": (("eyJ",), re.compile(r"(?<![\w-])eyJ[\w-]{10,4000}\.eyJ[\w-]{10,8000}\.[\w-]{16,2000}(?![\w-])")),
    "password_in_url": (
        ("://",), re.compile(r"(?<=://)[^\s:/@\"'<>{}$\[\]]{1,64}:(?P<secret>[^\s:/@\"'<>{}$\[\]*]{3,128})(?=@[\w.-]+)")
    ),
    "assigned": (
        ("ecret", "ECRET", "oken", "OKEN", "assw", "ASSW", "_key", "-key", "_KEY", "Key"),
        re.compile(
            r"(?i:secret|token|passw(?:or)?d|api[_-]?key|access[_-]?key)(?i:[\w-]{0,20})[\"']?\s{0,3}(?::|=>?|:=)\s{0,3}"
            r"[\"']?(?:[Bb]earer )?(?P<secret>[A-Za-z0-9+/_=~!@#%^&*-]{16,256})(?![\w(.\[])"
        ),
    ),
}  # fmt: skip
_MARKS = [(mark, what) for what, (marks, _) in PATTERNS.items() for mark in marks]
MASKS = {what: f"[{what.upper()}]" if what != "assigned" else "[SECRET]" for what in PATTERNS}
BITS = 3.3  # of entropy a character that something drawn at random has, of 16 and more


class Secrets(Check):
    """A key is told by its form; what is assigned to a `token` or `password`, by having no pattern."""

    whats: ClassVar = tuple(PATTERNS)

    kind: Literal["secrets"] = "secrets"
    action: Literal["repair", "drop", "keep"] = "repair"

    def look(self, view: View) -> Sequence[Finding]:
        if not view.runs().token:
            return ()
        found: list[Finding] = []
        for index, (_, _, text) in enumerate(view.texts):
            taken: list[tuple[int, int]] = []
            for what in dict.fromkeys([what for mark, what in _MARKS if mark in text]):
                found += _found(what, PATTERNS[what][1], text, index, taken)
        return found

    def repair(self, view: View, findings: Sequence[Finding]) -> dict[int, str]:
        return masked(view, findings, MASKS)


def _found(what: str, pattern: re.Pattern, text: str, index: int, taken: list[tuple[int, int]]) -> list[Finding]:
    made = []
    for match in pattern.finditer(text):
        start, stop = match.span("secret") if "secret" in pattern.groupindex else match.span()
        if any(a < stop and start < b for a, b in taken):
            continue
        told = _holds(what, text[start:stop])
        if told is not None:
            taken.append((start, stop))
            made.append(Finding(what, told, (Span(index, start, stop),)))
    return made


def _holds(what: str, secret: str) -> str | None:
    """What may be said of a secret; None where it is an example or no secret."""
    if what == "private_key":
        return f"{secret.splitlines()[0]} and {len(secret)} characters" if len(set(secret)) > 20 else None
    if what == "jwt":
        return _jwt(secret)
    if what == "password_in_url":
        low = secret.lower()
        return (
            None
            if low in ("password", "pass", "passwd", "secret", "xxx", "xxxx", "...", "pwd")
            else f"{len(secret)} characters"
        )
    body = re.sub(r"^(?:[A-Za-z]+[_-])+", "", secret) if what != "assigned" else secret
    if what == "aws_key" and secret.endswith("EXAMPLE"):
        return None
    if len(set(body)) < 8 or "xxxx" in secret.lower() or "1234567890" in body or "abcdefgh" in body.lower():
        return None
    if what == "assigned" and (entropy(secret) < BITS or not _mixed(secret)):
        return None
    if what == "openai_key" and not any(c.isdigit() for c in secret[3:]):  # words with hyphens
        return None
    checked = what == "github_token" and _crc(secret)
    return f"{len(secret)} characters, {secret[:4]}...{', its checksum holds' if checked else ''}"


def _mixed(secret: str) -> bool:
    """Letters and digits, and no word of a program or a path."""
    kinds = sum(any(test(c) for c in secret) for test in (str.isdigit, str.islower, str.isupper))
    digits = sum(c.isdigit() for c in secret)
    least = 1 if kinds == 3 and len(secret) >= 24 else 2
    words = re.fullmatch(r"[a-z]+(?:[_/-][a-z0-9]+)*|[A-Z]+(?:_[A-Z0-9]+)*", secret)
    return kinds >= 2 and digits >= least and not words


def entropy(text: str) -> float:
    """Bits a character, of the characters' own frequencies."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def _crc(token: str) -> bool:
    """The last six characters of a GitHub token are the CRC-32 of those before, in base 62."""
    body = token.partition("_")[2]
    number, told = crc32(body[:-6].encode()), ""
    for _ in range(6):
        number, digit = divmod(number, 62)
        told = _BASE62[digit] + told
    return told == body[-6:]


def _jwt(token: str) -> str | None:
    """A token's header is JSON that names an algorithm (RFC 7519)."""
    head = token.split(".")[0]
    try:
        told = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except ValueError:
        return None
    return f"JWT, {len(token)} characters" if isinstance(told, dict) and "alg" in told else None
