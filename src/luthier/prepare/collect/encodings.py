"""Bytes to text: byte order mark, UTF-8, the charset that is declared, else Windows-1252 with a warning."""

from __future__ import annotations

import codecs

MARKS = (  # the longer first: UTF-32's mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
SEVEN_BITS = ("iso2022", "iso-2022", "hz", "utf-7", "utf7")  # encodings whose bytes are valid UTF-8, of other letters


def decoded(data: bytes, declared: str | None = None) -> tuple[str, str | None]:
    """(text, what to warn of)."""
    for mark, name in MARKS:
        if data.startswith(mark):
            text = data[len(mark) :].decode(name, "replace")
            return text, f"{name} with damaged characters" if "\ufffd" in text else None
    if declared and declared.lower().startswith(SEVEN_BITS) and (text := _by(data, declared)) is not None:
        return text, None
    try:
        return data.decode(), None
    except UnicodeDecodeError:
        pass
    if declared and (text := _by(data, declared)) is not None:
        return text, None
    lost = "" if (text := _by(data, "cp1252")) is not None else ", with damaged characters"
    text = data.decode("cp1252", "replace") if text is None else text
    return text, f"neither UTF-8 nor declared: read as cp1252{lost}"


def _by(data: bytes, name: str) -> str | None:
    """None of unknown names, of codecs that make no text, and of bytes that are not of this one."""
    try:
        if not codecs.lookup(name)._is_text_encoding or codecs.lookup(name).name in ("idna", "punycode", "undefined"):
            return None
        return data.decode(name)
    except (LookupError, ValueError):
        return None
