"""Personal data: mail, telephone, card, account, network address, national number; masked with what it was."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from .. import identifiers as ids
from ..views import View
from .check import Check, Finding, Span

Found = tuple[str, int, int, str]  # what, start, stop, detail
EMAIL = re.compile(
    r"(?<![\w.%+-])[A-Za-z0-9](?:[\w.%+'-]{0,62}[\w%+-])?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
    r"[A-Za-z]{2,24}(?![\w@]|[.-][A-Za-z0-9])"
)
_NOBODY = re.compile(  # names that RFC 2606 and RFC 6761 keep for examples, and what looks like mail and is none
    r"@(?:[\w-]+\.)*(?:example\.(?:com|org|net|edu)|[\w-]*\.?(?:example|test|invalid|localhost|local))\Z"
    r"|\.(?:png|jpe?g|gif|svg|webp|css|js|py|html?|json|xml|txt|md|so|whl|deb|rpm)\Z|\Agit@",
    re.I,
)
_DIGITS = bytes(i for i in range(256) if not 48 <= i <= 57)  # what is deleted to count digits
_PASSWORD = re.compile(r"://[^\s/]*:\Z")  # of an address of a server, which has a name and a password before its @
BEFORE, AFTER = 8, 24  # characters around a run of digits that a pattern may take in or look at
MASKS = {
    "email": "[EMAIL]", "phone": "[PHONE]", "credit_card": "[CREDIT_CARD]", "iban": "[IBAN]", "ip": "[IP_ADDRESS]",
    "national_id": "[NATIONAL_ID]",
}  # fmt: skip


class PersonalData(Check):
    """By form and, where there is one, by checksum: an account's IBAN, a card's Luhn digit, a country's own sum."""

    whats: ClassVar = tuple(MASKS)

    kind: Literal["personal_data"] = "personal_data"
    action: Literal["repair", "drop", "keep"] = "repair"

    def look(self, view: View) -> Sequence[Finding]:
        found: dict[str, list[Span]] = {}
        details: dict[str, str] = {}
        runs = view.runs()
        for index, (_, _, text) in enumerate(view.texts):
            if not (runs.digits or runs.address or runs.token or "@" in text):
                continue
            for what, start, stop, detail in personal(text):
                found.setdefault(what, []).append(Span(index, start, stop))
                details.setdefault(what, detail)
        return [Finding(what, details[what], tuple(spans)) for what, spans in found.items()] if found else ()

    def repair(self, view: View, findings: Sequence[Finding]) -> dict[int, str]:
        return masked(view, findings, MASKS)


def masked(view: View, findings: Sequence[Finding], masks: dict[str, str]) -> dict[int, str]:
    """The texts with their findings replaced by what they are called."""
    spans = sorted((span, masks[finding.what]) for finding in findings for span in finding.spans)
    made: dict[int, str] = {}
    for (index, start, stop), mask in reversed(spans):
        text = made.get(index, view.texts[index].text)
        made[index] = text[:start] + mask + text[stop:]
    return made


def personal(text: str) -> list[Found]:
    """All that is found in a text; nothing in two ways."""
    at = "@" in text
    digits = len((text.encode() if text.isascii() else text.encode("utf-8", "replace")).translate(None, _DIGITS))
    if not at and digits < 4:
        return []
    found: list[Found] = []
    if at:
        found += [
            ("email", m.start(), m.end(), _shortened(m[0])) for m in EMAIL.finditer(text)
            if not _NOBODY.search(m[0]) and not _PASSWORD.search(text, max(0, m.start() - 80), m.start())
        ]  # fmt: skip
    if digits >= 4:
        taken = bytearray(len(text))
        for _, start, stop, _ in found:
            taken[start:stop] = b"\1" * (stop - start)
        for one in _numbers(text, digits):
            if not any(taken[one[1] : one[2]]):
                taken[one[1] : one[2]] = b"\1" * (one[2] - one[1])
                found.append(one)
    return found


def _numbers(text: str, digits: int) -> Iterator[Found]:
    """What is made of digits, the surest first."""
    if digits >= 10:
        for m in ids.IBAN.finditer(text):
            if told := ids.iban(m[0]):
                yield "iban", m.start(), m.start() + len(told), f"IBAN of {told[:2]}"
    if text.count(".") >= 3:
        for m in ids.IP4.finditer(text):
            if ids.ip(m[0], text[max(0, m.start() - 12) : m.start()]):
                yield "ip", m.start(), m.end(), "IPv4"
    if text.count(":") >= 3:
        for m in ids.IP6.finditer(text):
            if ids.ip(m[0], ""):
                yield "ip", m.start(), m.end(), "IPv6"
    if digits >= 7:
        for m in ids.FISCALE.finditer(text):
            if ids.fiscale(m[0]):
                yield "national_id", m.start(), m.end(), "IT"
        for m in ids.CANDIDATE.finditer(text):
            yield from _run(text, max(0, m.start() - BEFORE), m.end() + AFTER)


def _run(text: str, start: int, stop: int) -> Iterator[Found]:
    """What a run of digits is part of."""
    for pattern in ids.CARDS:
        for m in pattern.finditer(text, start, stop):
            if ids.card(m[0]):
                yield "credit_card", m.start(), m.end(), f"card, {sum(map(str.isdigit, m[0]))} digits"
    for country, pattern, holds in ids.NATIONAL:
        for m in pattern.finditer(text, start, stop):
            if holds(m[0]):
                yield "national_id", m.start(), m.end(), country
    for m in ids.PHONE.finditer(text, start, stop):
        if told := ids.phone(m[0]):
            yield "phone", m.start(), m.start() + len(told), f"{len(told)} characters"
    for m in ids.CALLED.finditer(text, start, stop):
        if ids.called(m[0], text[max(0, m.start() - 40) : m.start()]):
            yield "phone", m.start(), m.end(), f"{len(m[0])} characters"


def _shortened(address: str) -> str:
    """An address as it may be shown: its first letter and its domain."""
    name, _, domain = address.partition("@")
    return f"{name[0]}...@{domain}"
