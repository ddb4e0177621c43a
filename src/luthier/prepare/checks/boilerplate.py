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
# On the lower-cased text. Each pattern is tried where one of the texts before it is there, or, as it begins with
# letters that are rare, always: so most answers cost some searches for a word.
_REFUSALS = (
    rf"(?:\A|\n|[.!] )(?:oh,? |well,? |unfortunately,? |thank you[^.\n]{{0,60}}[.,] (?:but )?)?"
    rf"(?:(?:i'm|i am|we are|we're) (?:so |very |really |truly )?sorry|i apologi[sz]e|sorry|my apologies|apologies)\b"
    rf"[^.\n]{{0,80}}?(?:\bi|\bwe)(?: am| {_CANNOT}|{_CANNOT}|'m| do not| don't| simply {_CANNOT})[^.\n]{{0,60}}",
    rf"\A(?:unfortunately,? )?i (?:simply )?{_CANNOT} (?:\w+ ){{0,3}}{_DO}\b[^.\n]{{0,60}}",
    rf"\A(?:as|since i am|because i am|being) an? [^.\n]{{0,60}}?(?:ai|model|assistant)\b[^.\n]{{0,60}}?\bi {_CANNOT}",
    rf"\b(?:this|your|that) request (?:goes against|violates|is against)\b",
    rf"\bi (?:cannot|can't|can not) (?:fulfil|fulfill|comply with|assist with|help with) (?:this|that|your|such)\b",
    rf"\bi(?:'m| am) not (?:able|comfortable|programmed|allowed|permitted) (?:to )?{_DO}",
    r"\A(?:i'm|i am) not (?:able|comfortable)\b",
)  # fmt: skip
_DISCLAIMERS = (
    r"\bas an? (?:(?:large |artificial |helpful )?(?:ai|language model|ai language model|artificial intelligence)\b)[^.\n]{0,40}",
    r"\b(?:i'm|i am) (?:just |only )?an? (?:large |artificial |virtual )?(?:ai\b|language model|artificial intelligence)[^.\n]{0,30}",
    r"\b(?:as of )?my (?:last )?(?:knowledge|training)(?: data)?(?: cut-?off| update|'s cut-?off)[^.\n]{0,40}",
    r"\b(?:trained|developed|created|made) by (?:openai|anthropic|meta ai|google deepmind|mistral ai|alibaba cloud)\b",
    r"\bi (?:do not|don't) have (?:access to real-?time|personal (?:opinions|experiences|feelings|beliefs)|real-?time)[^.\n]{0,40}",
)  # fmt: skip
_CLOSINGS = (
    r"(?:i hope (?:this|that) (?:helps|was helpful|answers)|(?:please )?(?:let me know|feel free to (?:ask|reach out|let me "
    r"know)|don't hesitate to (?:ask|contact|reach))|is there anything else (?:i can|you)|if you (?:have|need) any "
    r"(?:other|more|further) (?:questions|help|assistance))[^\n]{0,80}\s*\Z",
)  # fmt: skip
PATTERNS: dict[str, tuple[tuple[str, ...], tuple[re.Pattern, ...]]] = {
    "refusal": (
        ("sorry", "apolog", "i can't", "i cannot", "i cant ", "i can not", " unable", " not able", "decline", "i will not",
         "i won't", " request ", "not comfortable", "not programmed", "not allowed", "not permitted"),
        tuple(map(re.compile, _REFUSALS)),
    ),
    "disclaimer": (
        (" an ai", " language model", "artificial intel", "my knowledge", "my last ", "my training", "by openai",
         "by anthropic", "by meta ai", "by google deep", "by mistral ai", "by alibaba", "t have personal", "t have real",
         "t have access to real"),
        tuple(map(re.compile, _DISCLAIMERS)),
    ),
    "placeholder": (
        (),
        (
            re.compile(
                r"\[(?:(?:your|insert|company|recipient'?s?|sender'?s?|client'?s?|add|enter)\b[^\]\n]{0,40}\]"
                r"|(?:name|date|address|city|phone number|email|title|link|url)\])"
            ),
            re.compile(r"<(?:insert|your)[ _][^>\n]{1,40}>"),
            re.compile(r"\{\{ ?\w+ ?\}\}"),
            re.compile(r"lorem ipsum\b"),
            re.compile(r"insert (?:your )?\w+ here\b"),
        ),
    ),
    "closing": (
        ("i hope th", "let me know", "feel free", "hesitate", "anything else", "if you have any", "if you need any"),
        tuple(map(re.compile, _CLOSINGS)),
    ),
}  # fmt: skip
_ENDS = {"closing": 240}  # characters at a text's end in which it is looked for
_FIRST = {  # words without which none of the texts can be there
    "refusal": frozenset(
        "sorry apologize apologise apologies can't cannot cant can unable able decline won't will request not".split()
    ),
    "disclaimer": frozenset(
        "ai language artificial openai anthropic deepmind mistral alibaba meta knowledge training personal real real-time "
        "realtime last".split()
    ),
    "closing": frozenset("hope know feel hesitate anything questions help assistance".split()),
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
            for what, (texts, patterns) in PATTERNS.items():
                if what in found or (texts and _FIRST[what].isdisjoint(words)):
                    continue
                start = max(0, len(low) - _ENDS[what]) if what in _ENDS else 0
                if texts and not any([low.find(one, start) >= 0 for one in texts]):
                    continue
                for pattern in patterns:
                    if match := pattern.search(low, start):
                        found[what] = _found(what, text, index, match)
                        break
            for what, pattern in self.patterns.items():
                if what not in found and (match := re.search(pattern, low)):
                    found[what] = _found(what, text, index, match)
        return list(found.values())


def _found(what: str, text: str, index: int, match: re.Match) -> Finding:
    span = Span(index, match.start(), match.end()) if len(text) == len(match.string) else None
    shown = match[0].strip()
    return Finding(what, shown if len(shown) <= 100 else shown[:100] + "...", (span,) if span else ())
