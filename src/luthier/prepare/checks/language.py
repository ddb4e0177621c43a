"""The languages of rows: those that are meant, or, where none are named, those that a set has only here and there."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from ...settings import nearest
from ..languages import CODES, UNKNOWN, language_of, together
from ..views import View
from .check import Again, Check, Decision, Finding, Gathered, Gatherer

_NUMBER = {code: number for number, code in enumerate(CODES)}


LEARNT = ("assistant", "text")


class Language(Check):
    """Of answers, where a row has any. One whose language cannot be told, as of one word or of code, is never found."""

    whats: ClassVar = ("other_language",)

    kind: Literal["language"] = "language"
    action: Literal["drop", "keep"] = "keep"
    languages: list[str] = []
    """Codes of languages that rows may have, such as `[en, de]`; without any, those that have `rare` of the rows."""
    rare: float = Field(0.02, ge=0.0, lt=1.0)
    """Below this share of the rows whose language is known, a language is found as another one; for an audit."""

    @field_validator("languages")
    @classmethod
    def _known(cls, languages: list[str]) -> list[str]:
        for code in languages:
            if code not in _NUMBER or code == UNKNOWN:
                meant = nearest(code, CODES)
                raise ValueError(
                    f"{code!r} is no language that is told{f'; did you mean {meant!r}?' if meant else ''} "
                    f"(known: {', '.join(CODES[1:])})"
                )
        return languages

    def wanting(self) -> str | None:
        return "action=drop needs languages, such as [en]" if self.action == "drop" and not self.languages else None

    def decides(self) -> bool:
        return False

    def look(self, view: View) -> Sequence[Finding]:
        if not self.languages:
            return ()
        code = of(view)
        if code == UNKNOWN or code in self.languages:
            return ()
        return [Finding("other_language", code)]

    def gatherer(self) -> Gatherer:
        return _Languages()

    def decide(self, gathered: Sequence[Gathered], again: Again) -> Decision:
        rows = np.concatenate([g.arrays["rows"] + g.first for g in gathered])
        codes = np.concatenate([g.arrays["codes"] for g in gathered])
        counts = np.bincount(codes, minlength=len(CODES))
        known = max(1, int(counts[1:].sum()))
        order = np.argsort(-counts, kind="stable")
        summary = {
            "languages": {CODES[i]: int(counts[i]) for i in order if counts[i]},
            "frequent": [CODES[i] for i in order if i and counts[i] and counts[i] >= self.rare * known],
        }
        if self.languages:  # found row by row
            return Decision(summary=summary)
        rare = np.array([0 < n < self.rare * known for n in counts]) & (np.arange(len(CODES)) > 0)
        found = rare[codes]
        return Decision(rows[found], [("other_language", code) for code in CODES], codes[found], summary=summary)

    def proposed(self, summary: Mapping) -> Check:
        return self if self.languages else self.model_copy(update={"languages": list(summary["frequent"])})


def of(view: View) -> str:
    """The language of what is learnt of a row: of its answers, whoever asked in which; else that of all its texts."""
    if view.language is None:
        said = [text.text for text in view.texts if text.role in LEARNT] or [text.text for text in view.texts]
        whole = len(said) == len(view.texts)
        view.language = language_of(together(said), view.words() if whole else None)
        if view.language == UNKNOWN and not whole:  # an answer of one word, or of code
            view.language = language_of(together(text.text for text in view.texts), view.words())
    return view.language


class _Languages(Gatherer):
    def __init__(self) -> None:
        self.codes, self.rows = bytearray(), array("i")

    def add(self, number: int, view: View) -> None:
        self.codes.append(_NUMBER[of(view)])
        self.rows.append(number)

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "codes": np.frombuffer(bytes(self.codes), np.uint8).copy(),
            "rows": np.array(self.rows, np.int64),
        }
