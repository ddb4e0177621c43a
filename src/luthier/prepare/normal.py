"""Texts without case, marks and spacing: the words by which rows are compared."""

from __future__ import annotations

import unicodedata

# Scripts that put no blank between words: each of their characters counts as a word.
UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x2E80, 0x2FDF), (0x3040, 0x30FF), (0x31F0, 0x31FF),
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip
_ASCII = bytes(i + 32 if 65 <= i <= 90 else i if chr(i).isalnum() else 32 for i in range(128)) + b" " * 128


class _Characters(dict):
    """What a character becomes, worked out when it first comes."""

    def __missing__(self, code: int) -> str:
        made = ""
        for c in unicodedata.normalize("NFKC", chr(code)).lower().replace("ς", "σ"):  # no case tells the two apart
            if not (c.isalnum() or unicodedata.category(c)[0] == "M"):
                c = " "
            elif any(low <= ord(c) <= high for low, high in UNSPACED) and c.isalpha():
                c = f" {c} "
            made += c
        self[code] = made
        return made


_CHARACTERS = _Characters()


def normal(text: str) -> str:
    """Words in small letters and digits, one blank between two.

    Compatibility forms are those that they stand for (NFKC), marks are blanks, and where a script writes no blanks each
    character is a word.
    """
    if text.isascii():
        return b" ".join(text.encode().translate(_ASCII).split()).decode()
    return " ".join(unicodedata.normalize("NFC", text).translate(_CHARACTERS).split())
