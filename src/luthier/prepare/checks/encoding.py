"""Damage to characters: UTF-8 read as something else, control and invisible characters, what could not be decoded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Literal

from .. import mojibake
from ..views import View
from .check import Check, Finding, Span

_WRITTEN = bytes([9, 10, 12, 13, *range(32, 127)])  # of ASCII: tab, line feed, form feed, carriage return, printable
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f]|[\x80-\x84\x86-\x9f](?![\x80-\xbf])")
_ODD = re.compile(
    "[\x80-\x9f\xad\u200b-\u200d\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffd\ud800-\udfff\U000e0000-\U000e007f]"
)
INVISIBLE = re.compile(
    "[\u200b\u2060-\u2064\ufeff\ufff9-\ufffb]"  # zero-width space, joiners of words, byte order mark
    "|(?<=[!-~])[\xad\u200c\u200d]+(?=[!-~])"  # joiners and soft hyphens inside Latin words
    "|(?<![\U0001f3f4\U000e0000-\U000e007f])[\U000e0000-\U000e007f]+"  # tags, which spell hidden ASCII; not in a flag
)
DIRECTIONS = re.compile("[\u202a-\u202e\u2066-\u2069]")  # that change the order in which a text is shown
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")
LONE = re.compile("[\ud800-\udfff]")
UNDECODED = "\ufffd"
_OF_CP1252 = {i: bytes([i]).decode("cp1252", "ignore") for i in range(0x80, 0xA0)}


class Encoding(Check):
    """Mojibake, control and invisible characters are repaired; what was lost when it was decoded cannot be."""

    whats: ClassVar = ("mojibake", "control", "invisible", "surrogate", "replacement")
    beyond_repair: ClassVar = ("replacement",)

    kind: Literal["encoding"] = "encoding"
    action: Literal["repair", "drop", "keep"] = "repair"

    def look(self, view: View) -> Sequence[Finding]:
        found: dict[str, list[Span]] = {}
        for index, (_, _, text) in enumerate(view.texts):
            rest = text.encode("utf-8", "surrogatepass").translate(None, _WRITTEN)
            if not rest:
                continue
            rest = rest.decode(
                "utf-8", "surrogatepass"
            )  # what is not plain ASCII: few characters, to be searched first
            if mojibake.LIKELY.search(rest) and (stretches := mojibake.stretches(text)):
                found.setdefault("mojibake", []).extend(Span(index, s.start, s.stop) for s in stretches)
                text = _blanked(text, stretches)
            if CONTROL.search(rest):
                _add(found, "control", index, CONTROL.finditer(text))
            if _ODD.search(rest):
                _add(found, "invisible", index, INVISIBLE.finditer(text))
                if not _RIGHT_TO_LEFT.search(text):
                    _add(found, "invisible", index, DIRECTIONS.finditer(text))
                _add(found, "surrogate", index, LONE.finditer(text))
                _add(found, "replacement", index, re.finditer(UNDECODED, text))
        return [Finding(what, _told(what, spans, view), tuple(spans)) for what, spans in found.items()] if found else ()

    def repair(self, view: View, findings: Sequence[Finding]) -> dict[int, str]:
        whats = {finding.what for finding in findings}
        return {
            index: _repaired(view.texts[index].text, whats)
            for index in {span.text for finding in findings for span in finding.spans}
        }


def _add(found: dict[str, list[Span]], what: str, index: int, matches: object) -> None:
    spans = [Span(index, m.start(), m.end()) for m in matches]  # type: ignore[attr-defined]
    if spans:
        found.setdefault(what, []).extend(spans)


def _blanked(text: str, stretches: Sequence[mojibake.Stretch]) -> str:
    for start, stop, _ in stretches:
        text = f"{text[:start]}{' ' * (stop - start)}{text[stop:]}"
    return text


def _told(what: str, spans: Sequence[Span], view: View) -> str:
    index, start, stop = spans[0]
    text = view.texts[index].text[start:stop]
    if what == "mojibake":
        return f"{text!r} is {mojibake.repaired(text)!r}"
    return f"{len(spans)} of them, first U+{ord(text[0]):04X}"


def _repaired(text: str, whats: set[str]) -> str:
    if "mojibake" in whats:
        text = mojibake.repaired(text)
    if "control" in whats:  # of Windows-1252 read as Latin-1 what it was, the others go
        text = CONTROL.sub(lambda m: _OF_CP1252.get(ord(m[0]), ""), text)
    if "invisible" in whats:
        text = INVISIBLE.sub("", text)
        if not _RIGHT_TO_LEFT.search(text):
            text = DIRECTIONS.sub("", text)
    if "surrogate" in whats:
        text = LONE.sub("", text)
    return text
