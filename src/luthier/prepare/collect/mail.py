"""Mail: messages of .eml and .mbox files; the plain part, else the HTML part as text; subject and date beside it."""

from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Iterator
from email.message import EmailMessage, Message
from email.utils import parsedate_to_datetime

from . import html
from .base import LONGEST_LINE, Document, File, How, Part, Unreadable, contents, opened, problem_of

BORDER = re.compile(rb"From \S*.*\d{1,2}:\d{2}.*\d{4}")  # the line between messages: sender and time
LONGEST = 64 << 20  # bytes of a message with what is attached
SAID = re.compile(  # a line before a quotation, in some languages; it may break once
    r"^[ \t]*(?:On|Am|Le|El|Il|Em|Op|Den)\b[^\n]{0,200}(?:\n[^\n]{0,100})?(?:wrote|schrieb|écrit|escribió|scritto|"
    r"escreveu|schreef|skrev)[^\n]{0,60}:[ \t\xa0]*\n(?=\s*>|\s*\Z)", re.M
)  # fmt: skip
BELOW = re.compile(  # what programs put over a whole message that is answered
    r"^[ \t]*-{2,}[ \t]*(?:Original Message|Forwarded message|Ursprüngliche Nachricht|Message d'origine|"
    r"Mensaje original)[ \t]*-{2,}[ \t]*$|^_{20,}[ \t]*\n(?:From|Von|De): ", re.M | re.I
)  # fmt: skip


def read(file: File, how: How) -> Iterator[Document]:
    if file.kind == "eml":
        yield _document(contents(file.path), {}, file, how)
        return
    for number, (line, data) in enumerate(_messages(file)):
        at = {"message": str(number), "line": line}
        try:
            if data is None:
                raise Unreadable(f"a message is longer than {LONGEST >> 20} MiB")
            yield _document(data, at, file, how)
        except Exception as error:
            file.problems[f"a message cannot be read: {problem_of(error)}"] += 1


def _messages(file: File) -> Iterator[tuple[int, bytes | None]]:
    """(line, message) of an mbox, one held at a time; None of one that is too long."""
    lines: list[bytes] | None = None
    first, size, blank = 0, 0, True
    with opened(file.path) as source:
        number = 0
        while line := source.readline(LONGEST_LINE):
            number += 1
            if blank and BORDER.match(line[:300]):
                if first:
                    yield first, None if lines is None else b"".join(lines)
                lines, first, size = [], number, 0
            elif first:
                size += len(line)
                if lines is not None and size <= LONGEST:
                    lines.append(line[1:] if re.match(rb">+From ", line) else line)
                else:
                    lines = None
            blank = not line.strip(b"\r\n")
    if not first:
        raise Unreadable("no message: an mbox begins with a line `From SENDER TIME`")
    yield first, None if lines is None else b"".join(lines)


def _document(data: bytes, at: dict, file: File, how: How) -> Document:
    message = email.message_from_bytes(data, policy=email.policy.default)
    if not isinstance(message, EmailMessage) or not message.keys():
        raise Unreadable("no mail: it has no head")
    text = _text(message, file)
    if not how.quotes:
        text = without_quotes(text)
    more = {"subject": _head(message, "subject"), "date": _date(message)}
    name = _head(message, "message-id")
    place = {**at, "message": name} if name else at
    if not text.strip():
        file.left["a message without text"] += 1
    return Document([Part(text.strip("\n"), place)], {key: value for key, value in more.items() if value})


def _text(part: Message, file: File) -> str:
    """What a part says: of alternatives the plain one, else the first with a text; of other parts all, in order."""
    if part.is_multipart():
        inner = [one for one in part.get_payload() if isinstance(one, Message)]
        if part.get_content_type() != "multipart/alternative":
            return "\n\n".join(text for one in inner if (text := _text(one, file)).strip())
        inner.sort(key=lambda one: one.get_content_type() != "text/plain")
        return next((text for one in inner if (text := _text(one, file)).strip()), "")
    kind = part.get_content_type()
    if part.get_content_disposition() == "attachment" or kind not in ("text/plain", "text/html"):
        file.left["an attachment"] += 1
        return ""
    data = part.get_payload(decode=True)
    text = file.decoded(data if isinstance(data, bytes) else b"", part.get_content_charset())
    return text if kind == "text/plain" else html.text_of(text, file.warnings)[0]


def _head(message: EmailMessage, name: str) -> str:
    """A line of the head; "" of a damaged one."""
    try:
        return " ".join(str(message.get(name, "")).split())
    except Exception:  # the parser of structured lines fails in many ways on damaged ones
        return ""


def _date(message: EmailMessage) -> str:
    text = _head(message, "date")
    try:
        return parsedate_to_datetime(text).isoformat()
    except (ValueError, TypeError, IndexError, OverflowError):
        return text


def without_quotes(text: str) -> str:
    """The text without what it answers: lines with >, the line before them, and a whole message below."""
    if found := BELOW.search(text):
        text = text[: found.start()]
    text = SAID.sub("", text)
    kept = [line for line in text.split("\n") if not line.startswith(">")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")
