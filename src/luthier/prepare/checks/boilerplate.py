"""Answers that refuse, speak of being a model, are a template that nobody filled in, or end with a set phrase."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import model_validator

from ..views import View
from .check import Action, Check, Finding, Span

_CANNOT = (
    r"(?:can(?:no|')?t|can not|am unable to|'m unable to|am not able to|'m not able to|won't be able to|must decline|"
    r"have to decline|will not|won't)"
)
_DO = (
    r"(?:help|assist|fulfil|fulfill|comply|provide|answer|do that|do this|engage|support|create|write|generate|offer|"
    r"share|discuss|complete|respond|give|continue|participate|be able|access|browse|perform|process|condone|"
    r"encourage)"
)
# On the lower-cased text. Patterns are tried where one of the texts before them is there: so most answers cost some
# searches for a word.
_REFUSALS = (
    rf"(?:\A|\n|[.!] )(?:oh,? |well,? |unfortunately,? |thank you[^.\n]{{0,60}}[.,] (?:but )?)?"
    rf"(?:(?:i'm|i am|we are|we're) (?:so |very |really )?sorry|i (?:do )?apologi[sz]e|sorry|(?:my )?apologies)\b"
    rf"[^.\n]{{0,80}}?(?:\bi|\bwe)(?: am| {_CANNOT}|{_CANNOT}|'m| do not| don't| simply {_CANNOT})[^.\n]{{0,60}}",
    rf"\A(?:unfortunately,? )?i ?(?:simply )?{_CANNOT} (?:\w+ ){{0,3}}{_DO}\b[^.\n]{{0,60}}",
    rf"\A(?:as|since i am|because i am|being) an? [^.\n]{{0,60}}?(?:ai|model|assistant)\b[^.\n]{{0,60}}?\bi {_CANNOT}",
    r"\b(?:this|your|that) request (?:goes against|violates|is against)\b",
    r"\bi (?:cannot|can't|can not) (?:fulfil|fulfill|comply with|assist with|help with) (?:this|that|your|such)\b",
    rf"\bi(?:'m| am) not (?:able|comfortable|programmed|allowed|permitted) (?:to )?{_DO}",
    r"\A(?:i'm|i am) not (?:able|comfortable)\b",
)
_DISCLAIMERS = (
    r"\bas an? (?:large |artificial |helpful )?(?:(?:ai )?language model|ai|artificial intelligence)\b[^.\n]{0,40}",
    r"\b(?:i'm|i am) (?:just |only )?an? (?:large |virtual )?(?:ai\b|language model|artificial intelligence)"
    r"[^.\n]{0,30}",
    r"\b(?:as of )?my (?:last )?(?:knowledge|training)(?: data)?(?: cut-?off| update|'s cut-?off)[^.\n]{0,40}",
    r"\b(?:trained|developed|created|made) by (?:openai|anthropic|meta ai|google deepmind|mistral ai|alibaba cloud)\b",
    r"\bi (?:do not|don't) have (?:(?:access to )?real-?time|personal (?:opinions|experiences|feelings|beliefs))"
    r"[^.\n]{0,40}",
)
_CLOSINGS = (
    r"(?:i hope (?:this|that) (?:helps|was helpful|answers)|(?:please )?(?:let me know|feel free to "
    r"(?:ask|reach out|let me know)|don't hesitate to (?:ask|contact|reach))|is there anything else (?:i can|you)|"
    r"if you (?:have|need) any "
    r"(?:other|more|further) (?:questions|help|assistance))[^\n]{0,80}\s*\Z",
)
PATTERNS: dict[str, tuple[tuple[str, ...], tuple[re.Pattern, ...]]] = {
    "refusal": (
        (
            "sorry",
            "apolog",
            "i can't",
            "i cannot",
            "i cant ",
            " unable",
            " not able",
            "decline",
            "i won't",
            " request ",
            "not comfortable",
            "not programmed",
            "not allowed",
            "not permitted",
        ),
        tuple(map(re.compile, _REFUSALS)),
    ),
    "disclaimer": (
        (
            " an ai",
            " language model",
            "artificial intel",
            "my knowledge",
            "my last ",
            "my training",
            "by openai",
            "by anthropic",
            "by meta ai",
            "by google deep",
            "by mistral ai",
            "by alibaba",
            "t have personal",
            "t have real",
            "t have access to real",
        ),
        tuple(map(re.compile, _DISCLAIMERS)),
    ),
    "closing": (
        ("i hope th", "let me know", "feel free", "hesitate", "anything else", "if you have any", "if you need any"),
        tuple(map(re.compile, _CLOSINGS)),
    ),
}
_PLACEHOLDERS = (  # each with a byte or a word that is there
    (
        b"[",
        re.compile(
            r"\[(?:(?:your|insert|company|recipient'?s?|sender'?s?|client'?s?|add|enter)\b[^\]\n]{0,40}\]"
            r"|(?:name|date|address|city|phone number|email|title|link|url)\])"
        ),
    ),
    (b"<", re.compile(r"<(?:insert|your)[ _][^>\n]{1,40}>")),
    (b"{", re.compile(r"\{\{ ?\w+ ?\}\}")),
    (b"lorem", re.compile(r"lorem ipsum\b")),
    (b"insert", re.compile(r"insert (?:your )?\w+ here\b")),
)
_ENDS = {"closing": 240}  # characters at a text's end in which it is looked for
_FIRST = {  # words without which none of the texts can be there
    "refusal": frozenset(
        b"sorry apologize apologise apologies can't cannot cant unable able decline won't request comfortable "
        b"programmed allowed permitted".split()
    ),
    "disclaimer": frozenset(
        b"ai language artificial openai anthropic deepmind mistral alibaba meta knowledge training personal real "
        b"real-time realtime last".split()
    ),
    "closing": frozenset(b"hope know feel hesitate anything questions help assistance".split()),
}
_ANY = frozenset().union(*_FIRST.values())
LEARNT = ("assistant",)


class Boilerplate(Check):
    """Looked for in answers that would be learnt, in English; not in the worse answer of a pair."""

    whats: ClassVar = ("refusal", "disclaimer", "placeholder", "closing")

    kind: Literal["boilerplate"] = "boilerplate"
    action: Literal["drop", "keep"] = "drop"
    actions: dict[str, Action] = {"placeholder": "keep", "closing": "keep"}
    patterns: dict[str, str] = {}
    """Further things to look for in answers: a name, and a regular expression over the lower-cased text."""

    def finds(self) -> tuple[str, ...]:
        return (*self.whats, *self.patterns)

    @model_validator(mode="after")
    def _named(self) -> Boilerplate:
        for what, pattern in self.patterns.items():
            if what in self.whats:
                raise ValueError(f"patterns.{what}: this name is taken; give another")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"patterns.{what}: {pattern!r} is no regular expression: {error}") from None
        return self

    def look(self, view: View) -> Sequence[Finding]:
        found: dict[str, Finding] = {}
        words = view.words()
        likely = (
            [] if _ANY.isdisjoint(words) else [what for what, first in _FIRST.items() if not first.isdisjoint(words)]
        )
        data = view.data()
        placeholders = [pattern for one, pattern in _PLACEHOLDERS if one in (data if len(one) == 1 else words)]
        if not likely and not placeholders and not self.patterns:
            return ()
        for index, (_, role, text) in enumerate(view.texts):
            if role not in LEARNT:
                continue
            low = text.lower()
            if "\u2019" in low:
                low = low.replace("\u2019", "'")
            for what in likely:
                if what in found:
                    continue
                texts, patterns = PATTERNS[what]
                start = max(0, len(low) - _ENDS[what]) if what in _ENDS else 0
                if not any(low.find(one, start) >= 0 for one in texts):
                    continue
                for pattern in patterns:
                    if match := pattern.search(low, start):
                        found[what] = _found(what, text, index, match)
                        break
            for pattern in placeholders:
                if "placeholder" not in found and (match := pattern.search(low)):
                    found["placeholder"] = _found("placeholder", text, index, match)
            for what, pattern in self.patterns.items():
                if what not in found and (match := re.search(pattern, low)):
                    found[what] = _found(what, text, index, match)
        return list(found.values())


def _found(what: str, text: str, index: int, match: re.Match) -> Finding:
    span = Span(index, match.start(), match.end()) if len(text) == len(match.string) else None
    shown = match[0].strip()
    return Finding(what, shown if len(shown) <= 100 else shown[:100] + "...", (span,) if span else ())
