"""Answers that refuse, speak of being a model, are a template that nobody filled in, or end with a set phrase."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Literal

from ..views import View
from .check import Action, Check, Finding, Span

_CANNOT = r"(?:can(?:no|')?t|can not|am unable to|'m unable to|am not able to|'m not able to|won't be able to|must decline|have to decline|will not|won't)"
_DO = (
    r"(?:help|assist|fulfil|fulfill|comply|provide|answer|do that|do this|engage|support|create|write|generate|offer|"
    r"share|discuss|complete|respond|give|continue|participate|be able|access|browse|perform|process|condone|promote|"
    r"encourage|recommend)"
)
PATTERNS = {  # on the lower-cased text
    "refusal": re.compile(
        rf"(?:\A|\n|[.!] )(?:oh,? |well,? |unfortunately,? |thank you[^.\n]{{0,60}}[.,] (?:but )?)?"
        rf"(?:(?:i'm|i am|we are|we're) (?:so |very |really |truly )?sorry|i apologi[sz]e|sorry|my apologies|apologies)\b[^.\n]{{0,80}}?"
        rf"(?:\bi|\bwe)(?: am| {_CANNOT}|{_CANNOT}|'m| do not| don't| simply {_CANNOT})[^.\n]{{0,60}}"
        rf"|\Ai (?:simply )?{_CANNOT} (?:\w+ ){{0,3}}{_DO}\b[^.\n]{{0,60}}"
        rf"|\A(?:as|since i am|because i am|being) an? [^.\n]{{0,60}}?(?:ai|model|assistant)\b[^.\n]{{0,60}}?\bi {_CANNOT}"
        rf"|\b(?:this|your|that) request (?:goes against|violates|is against)\b"
        rf"|\bi (?:cannot|can't|can not) (?:fulfil|fulfill|comply with|assist with|help with) (?:this|that|your|such)\b"
        rf"|\bi(?:'m| am) not (?:able|comfortable|programmed|allowed|permitted) (?:to )?{_DO}"
        rf"|\A(?:i'm|i am) not (?:able|comfortable)\b"
    ),
    "disclaimer": re.compile(
        r"\bas an? (?:(?:large |artificial |helpful )?(?:ai|language model|ai language model|artificial intelligence)\b)[^.\n]{0,40}"
        r"|\b(?:i'm|i am) (?:just |only )?an? (?:large |artificial |virtual )?(?:ai\b|language model|artificial intelligence)[^.\n]{0,30}"
        r"|\b(?:as of )?my (?:last )?(?:knowledge|training)(?: data)?(?: cut-?off| update|'s cut-?off)[^.\n]{0,40}"
        r"|\b(?:trained|developed|created|made) by (?:openai|anthropic|meta ai|google deepmind|mistral ai|alibaba cloud)\b"
        r"|\bi (?:do not|don't) have (?:access to real-?time|personal (?:opinions|experiences|feelings|beliefs)|real-?time)[^.\n]{0,40}"
    ),
    "placeholder": re.compile(
        r"\blorem ipsum\b|\[(?:your|insert|company|recipient'?s?|sender'?s?|client'?s?|add|enter)\b[^\]\n]{0,40}\]"
        r"|\[(?:name|date|address|city|phone number|email|title|link|url)\]|<(?:insert|your)[ _][^>\n]{1,40}>"
        r"|\binsert (?:your )?\w+ here\b|\{\{ ?\w+ ?\}\}"
    ),
    "closing": re.compile(
        r"(?:i hope (?:this|that) (?:helps|was helpful|answers)|(?:please )?(?:let me know|feel free to (?:ask|reach out|let me know)|"
        r"don't hesitate to (?:ask|contact|reach))|is there anything else (?:i can|you)|if you (?:have|need) any "
        r"(?:other|more|further) (?:questions|help|assistance))[^\n]{0,80}\s*\Z"
    ),
}  # fmt: skip
# A text without these words has none of them, and where they stand: so most texts cost one look at their words.
_TRIGGERS: dict[str, tuple[slice | None, frozenset[str]]] = {
    "refusal": (slice(110), frozenset(
        "sorry apologize apologise apologies can't cant cannot unable able decline won't request not".split()
    )),
    "disclaimer": (None, frozenset(
        "ai language artificial openai anthropic deepmind mistral alibaba meta knowledge training personal real real-time "
        "realtime".split()
    )),
    "placeholder": (None, frozenset(["lorem", "insert"])),
    "closing": (slice(-45, None), frozenset("hope know feel hesitate anything questions help assistance".split())),
}  # fmt: skip
_APART = str.maketrans(".,;:!?()\"*_\n", " " * 12)
LEARNT = ("assistant",)


class Boilerplate(Check):
    """Looked for in answers that would be learnt, in English; not in the worse answer of a pair."""

    whats: ClassVar = tuple(PATTERNS)

    kind: Literal["boilerplate"] = "boilerplate"
    action: Literal["drop", "keep"] = "drop"
    actions: dict[str, Action] = {"placeholder": "keep", "closing": "keep"}
    patterns: dict[str, str] = {}
    """Further things to look for in answers: a name, and a regular expression over the lower-cased text."""

    def look(self, view: View) -> Sequence[Finding]:
        found: dict[str, Finding] = {}
        for index, (_, role, text) in enumerate(view.texts):
            if role not in LEARNT:
                continue
            low = text.lower()
            if "\u2019" in low:
                low = low.replace("\u2019", "'")
            words = low.translate(_APART).split()
            for what, (part, triggers) in _TRIGGERS.items():
                told = not triggers.isdisjoint(words if part is None else words[part])
                if (
                    (told or (what == "placeholder" and ("[" in low or "{{" in low or "<" in low)))
                    and what not in found
                    and (match := PATTERNS[what].search(low))
                ):
                    found[what] = _found(what, text, index, match)
            for what, pattern in self.patterns.items():
                if what not in found and (match := re.search(pattern, low)):
                    found[what] = _found(what, text, index, match)
        return list(found.values())


def _found(what: str, text: str, index: int, match: re.Match) -> Finding:
    span = Span(index, match.start(), match.end()) if len(text) == len(match.string) else None
    shown = match[0].strip()
    return Finding(what, shown if len(shown) <= 100 else shown[:100] + "...", (span,) if span else ())
