"""What kind of document a file is, by its content first and its name second."""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from pathlib import Path

from ...data.readers import BINARY, ROWS, WIDE, kind_of
from . import whatsapp
from .base import HEAD, Unreadable, opened
from .docx import is_document
from .encodings import decoded
from .mail import BORDER

KINDS = ("text", "markdown", "html", "pdf", "docx", "rows", "sharegpt", "eml", "mbox", "chatgpt", "whatsapp", "slack",
         "telegram")  # fmt: skip
MORE_BINARY = (
    *BINARY, (b"\xd0\xcf\x11\xe0", "an old Office file, or one with a password; save it as DOCX without one"),
    (b"GIF8", "a picture"), (b"RIFF", "a picture, sound or film"), (b"II*\0", "a picture"), (b"MM\0*", "a picture"),
    (b"BM", "a picture"), (b"OggS", "sound"), (b"ID3", "sound"), (b"fLaC", "sound"), (b"\x1aE\xdf\xa3", "a film"),
    (b"Rar!", "an archive; unpack it"), (b"7z\xbc\xaf", "an archive; unpack it"), (b"MZ", "a program"),
    (b"\xca\xfe\xba\xbe", "a program"), (b"\xcf\xfa\xed\xfe", "a program"), (b"{\\rtf", "RTF; save it as DOCX"),
    (b"GGUF", "the weights of a model"), (b"\x00asm", "a program"), (b"wOF", "a font"),
)  # fmt: skip
NEEDS_ZERO = (b"BM", b"MZ", b"RIFF", b"ID3", b"II*\0", b"MM\0*")  # marks with which a text may begin, too
HTML = re.compile(r"\s*(?:<\?xml[^>]*\?>\s*)?(?:<!--(?:(?!-->).)*-->\s*)*<(?:!doctype\s+html|html|head|body)\b",
                  re.I | re.S)  # fmt: skip
FIELD = re.compile(r"(?:From|To|Subject|Date|Message-ID|Received|Return-Path|MIME-Version|Delivered-To|X-[\w-]+|"
                   r"Content-Type|DKIM-Signature|Reply-To):\s", re.I)  # fmt: skip
SHAREGPT = re.compile(r'"(?:conversations?|items)"\s*:\s*\[\s*\{[^{}]*"from"\s*:')
SLACK = re.compile(r'\s*\[\s*\{.*"ts"\s*:\s*"\d+\.\d+"', re.S)
NAMED = {".md": "markdown", ".markdown": "markdown", ".html": "html", ".htm": "html", ".xhtml": "html", ".eml": "eml",
         ".mbox": "mbox"}  # fmt: skip


def kind(path: Path) -> str:
    """One of `KINDS`; Unreadable, with the reason, of what is none."""
    suffix, compression = kind_of(path)
    with opened(path) as file:
        head = file.read(HEAD)
    if not head:
        raise Unreadable("empty")
    if suffix in ROWS and suffix not in (".json", ".jsonl", ".ndjson"):
        return "rows"
    if (at := head[:1024].find(b"%PDF-")) >= 0 and not head[:at].strip(b" \r\n\t\0\xef\xbb\xbf"):
        return _plain_file("pdf", compression)
    if head.startswith(b"PK\x03\x04"):
        if not compression and (what := is_document(path)):
            raise Unreadable(what)
        return _plain_file("docx", compression)
    _refuse_binary(head)
    return _of_text(head, suffix)


def forced(path: Path, wanted: str) -> str:
    """The kind that was asked for, where a file can be read so."""
    if wanted in ("rows", "sharegpt") and kind_of(path)[0] not in ROWS:
        raise Unreadable(f"--kind {wanted} needs a name that says how rows are written: {' '.join(ROWS)}")
    if wanted == "docx" and (what := is_document(path)):
        raise Unreadable(what)
    return _plain_file(wanted, kind_of(path)[1] if wanted in ("pdf", "docx") else "")


def _plain_file(name: str, compression: str) -> str:
    if compression:
        raise Unreadable(f"a {name.upper()} that is compressed once more; unpack it")
    return name


def _refuse_binary(head: bytes) -> None:
    if head.startswith(tuple(mark for mark, _ in WIDE)):
        return
    zero = b"\0" in head
    for mark, what in MORE_BINARY:
        if head.startswith(mark) and (zero or mark not in NEEDS_ZERO):
            raise Unreadable(f"binary: {what}")
    if len(head) > 262 and head[257:262] == b"ustar" and _is_tar(head):
        raise Unreadable("binary: an archive; unpack it")
    if head[4:8] == b"ftyp":
        raise Unreadable("binary: a film or sound")
    if zero:
        raise Unreadable("binary: zero bytes, which no text has (or UTF-16 without a mark; save it as UTF-8)")


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
        return True
    except (tarfile.HeaderError, zipfile.BadZipFile, io.UnsupportedOperation):
        return False


def _of_text(head: bytes, suffix: str) -> str:
    text, _ = decoded(head)
    text = text.removeprefix("\ufeff")
    start = text.lstrip()[:1]
    if suffix in (".jsonl", ".ndjson"):
        return "sharegpt" if SHAREGPT.search(text.split("\n", 1)[0]) else "rows"
    if suffix == ".json" and start in ("[", "{"):
        return _of_json(text, start)
    if suffix in NAMED:
        return NAMED[suffix]
    if BORDER.match(head[:300]) and len(text.split("\n", 2)) > 1 and FIELD.match(text.split("\n", 2)[1]):
        return "mbox"
    if HTML.match(text):
        return "html"
    lines = text.split("\n", 40)[:40]
    if sum(bool(FIELD.match(line)) for line in lines) > 2 and FIELD.match(lines[0]):
        return "eml"
    return "whatsapp" if whatsapp.looks(lines) else "text"


def _of_json(text: str, start: str) -> str:
    if '"mapping"' in text and ('"author"' in text or '"current_node"' in text or '"parent"' in text):
        return "chatgpt"
    if start == "{" and (re.search(r'"chats"\s*:\s*\{', text) or (
        re.search(r'"messages"\s*:\s*\[', text)
        and ('"text_entities"' in text or '"from_id"' in text or '"date_unixtime"' in text)
    )):  # fmt: skip
        return "telegram"
    if SHAREGPT.search(text):
        return "sharegpt"
    if SLACK.match(text) and '"type"' in text and re.search(r'"(?:user|bot_id|subtype)"', text):
        raise Unreadable("a day of a Slack export alone; give the folder of the export, which has users.json")
    return "rows"
