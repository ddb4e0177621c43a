"""Synonyms: words give way to others of a table, or of WordNet where its files are on this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from ...errors import ConfigError
from ...settings import read_yaml
from .noise import INNER, Edit, Noise
from .way import Draw

WORDNET = "wordnet"


class Synonyms(Noise):
    """Each word that has a synonym is, with the chance `rate`, replaced by one of them, with its capitals."""

    kind: Literal["synonyms"] = "synonyms"
    rate: float = Field(0.2, gt=0.0, le=1.0)
    """Of the words that have a synonym, the share that is replaced; at least one in each new row."""
    table: str = WORDNET
    """A file with synonyms of words, or `wordnet`: NLTK's corpus, as it is on this machine; it is never downloaded.

    YAML or JSON is `word: [synonym, ...]`; TSV, CSV or TXT has a word and its synonyms on each line.
    """
    senses: int = Field(1, ge=1)
    """Of WordNet's senses of a word, the most frequent so many."""

    _words: Mapping[str, Sequence[str]] | None = PrivateAttr(None)

    def prepared(self) -> Synonyms:
        self._words = None if self.table == WORDNET else table_of(self.table)
        if self.table == WORDNET:
            wordnet()
        return self

    def problem(self) -> str | None:
        try:
            self.prepared()
        except ConfigError as error:
            return str(error)
        return None

    def told(self) -> dict:
        if self.table == WORDNET:
            return super().told()
        return super().told() | {"read": sha256(Path(self.table).expanduser().read_bytes()).hexdigest()}

    def edits(self, text: str, free: Sequence[bool], words: Sequence[re.Match], draw: Draw, tagged: bool) -> list[Edit]:
        made, left = [], []
        for word, may in zip(words, free):
            inner = INNER.search(word[0]) if may else None
            others = self._others(inner[0], tagged) if inner is not None else ()
            if inner is None or not others:
                continue
            start = word.start() + inner.start()
            place = (start, start + len(inner[0]), inner[0], others)
            if draw.number() < self.rate:
                made.append(_edit(place, draw))
            else:
                left.append(place)
        return made or ([_edit(draw.one(left), draw)] if left else [])

    def _others(self, word: str, tagged: bool) -> list[str]:
        """Of a word that has its tag, words only: as many after as before."""
        plain = word.casefold()
        found = of_wordnet(plain, self.senses) if self._words is None else self._words.get(plain, ())
        return [other for other in found if other.casefold() != plain and not (tagged and " " in other)]


def _edit(place: tuple[int, int, str, list[str]], draw: Draw) -> Edit:
    start, stop, word, others = place
    other = draw.one(others)
    if len(word) > 1 and word.isupper():
        other = other.upper()
    elif word[:1].isupper():
        other = other[:1].upper() + other[1:]
    return Edit(start, stop, other)


# ---------------------------------------------------------------------------- where synonyms come from


@lru_cache
def table_of(path: str) -> dict[str, list[str]]:
    """Synonyms by words in small letters. ConfigError, naming the place, where the file is no such table."""
    file = Path(path).expanduser()
    suffix = file.suffix.lower()
    try:
        if suffix in (".yaml", ".yml"):
            entries: Any = list(read_yaml(file).items())
        elif suffix == ".json":
            found = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("expected words with lists of synonyms")
            entries = list(found.items())
        elif suffix in (".tsv", ".csv", ".txt"):
            entries = list(_lines(file))
        else:
            raise ConfigError(f"ways.synonyms.table: {path}: known are .yaml .json .tsv .csv .txt, or {WORDNET!r}")
    except OSError as error:
        raise ConfigError(f"ways.synonyms.table: {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"ways.synonyms.table: {path}: {error}") from None
    made: dict[str, list[str]] = {}
    for word, others in entries:
        others = [others] if isinstance(others, str) else others
        listed = isinstance(others, list) and others and all(isinstance(o, str) and o.strip() for o in others)
        if not listed or not isinstance(word, str) or len(word.split()) != 1:
            expected = f"{word!r}: expected one word and its synonyms, found {others!r}"
            raise ConfigError(f"ways.synonyms.table: {path}: {expected}")
        known = made.setdefault(word.strip().casefold(), [])
        known += [other for o in others if (other := " ".join(o.split())) not in known]
    if not made:
        raise ConfigError(f"ways.synonyms.table: {path}: it is empty")
    return made


def _lines(file: Path) -> list[tuple[str, list[str]]]:
    import csv

    with open(file, encoding="utf-8", newline="") as opened:
        parted = csv.reader(opened, delimiter="," if file.suffix.lower() == ".csv" else "\t")
        return [(line[0], [cell for cell in line[1:] if cell.strip()]) for line in parted if line and line[0].strip()]


@lru_cache
def wordnet() -> Any:
    """NLTK's WordNet; ConfigError where it is not there."""
    try:
        from nltk.corpus import wordnet as found
    except ImportError:
        raise ConfigError(
            "ways.synonyms.table: WordNet is read by nltk, which is not installed: pip install nltk, or give a table"
        ) from None
    try:
        found.ensure_loaded()
    except LookupError:
        raise ConfigError(
            "ways.synonyms.table: WordNet is not on this machine, and is not downloaded by itself: "
            "python -m nltk.downloader wordnet, or give a table"
        ) from None
    return found


@lru_cache(maxsize=100_000)
def of_wordnet(word: str, senses: int) -> tuple[str, ...]:
    """Of a word in its plain form, what else its senses are called; a word that is bent has none."""
    made: dict[str, None] = {}
    for sense in wordnet().synsets(word)[:senses]:
        names = [name.replace("_", " ") for name in sense.lemma_names()]
        if word in (name.casefold() for name in names):
            made |= dict.fromkeys(name for name in names if name.casefold() != word)
    return tuple(made)
