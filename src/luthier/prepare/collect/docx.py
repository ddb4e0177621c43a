"""DOCX: paragraphs, headings, lists and tables as text, read as a stream within limits."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.parsers import expat

from .base import Document, File, How, Part, Unreadable

WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
STRICT = "http://purl.oclc.org/ooxml/wordprocessingml/main}"
CORE = "http://purl.org/dc/elements/1.1/}title"
FALLBACK = "http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"  # says again what stands beside it
LONGEST = 256 << 20  # bytes of the XML of a document
RATIO = 250  # more is no text that was written: XML of Word is packed 10 to 40 times
BLOCK = 1 << 16


def read(file: File, how: How) -> Iterator[Document]:
    with zipfile.ZipFile(file.path) as archive:
        headings = _Styles()
        if "word/styles.xml" in archive.namelist():
            _walk(archive, "word/styles.xml", headings)
        title = _Title()
        if "docProps/core.xml" in archive.namelist():
            _walk(archive, "docProps/core.xml", title)
        body = _Body(headings.levels)
        _walk(archive, "word/document.xml", body)
    said = "".join(title.pieces).strip()
    yield Document([Part(body.text(), {})], {"title": said} if said else {})


def _walk(archive: zipfile.ZipFile, name: str, to: Any) -> None:
    """Hand the elements of one file of the archive to `to`; nothing is held, no entity is expanded."""
    told = archive.getinfo(name)
    if told.flag_bits & 1:
        raise Unreadable("the document has a password; save it without one")
    parser = expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = to.start, to.end
    parser.CharacterDataHandler = to.data
    parser.StartDoctypeDeclHandler = _no_types
    size = 0
    try:
        with archive.open(name) as stream:
            while block := stream.read(BLOCK):
                size += len(block)
                if size > LONGEST or (size > 1 << 20 and size > RATIO * max(1, told.compress_size)):
                    raise Unreadable(f"{name} unpacks to over {size >> 20} MiB from {told.compress_size:,} bytes")
                parser.Parse(block)
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise Unreadable(f"{name} is no XML: {error}") from None


def _no_types(*_: object) -> None:
    raise Unreadable("a document type declaration, which Word never writes and entity bombs need: refused")


def _name(tag: str) -> str:
    for space in (WORD, STRICT):
        if tag.startswith(space):
            return tag[len(space) :]
    return ""


def _value(attrs: dict, key: str = "val") -> str:
    return attrs.get(WORD + key) or attrs.get(STRICT + key) or ""


class _Handler:
    def start(self, tag: str, attrs: dict) -> None: ...

    def end(self, tag: str) -> None: ...

    def data(self, text: str) -> None: ...


class _Styles(_Handler):
    """Levels of headings by a style's id: ids are of the author's language, names of built-in styles are not."""

    def __init__(self) -> None:
        self.levels: dict[str, int] = {}
        self.style = ""

    def start(self, tag: str, attrs: dict) -> None:
        name = _name(tag)
        if name == "style":
            self.style = _value(attrs, "styleId")
        elif name == "name" and (level := _level(_value(attrs))):
            self.levels[self.style] = level


def _level(name: str) -> int:
    found = re.fullmatch(r"heading ?([1-9])", name.lower())
    return min(6, int(found[1])) if found else int(name.lower() == "title")


class _Title(_Handler):
    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.inside = False

    def start(self, tag: str, attrs: dict) -> None:
        self.inside = tag == CORE

    def end(self, tag: str) -> None:
        self.inside = False

    def data(self, text: str) -> None:
        if self.inside:
            self.pieces.append(text)


class _Body(_Handler):
    """Lines of text: headings with #, items with -, rows of tables with | between cells."""

    def __init__(self, levels: dict[str, int]):
        self.levels = levels
        self.blocks: list[tuple[str, str]] = []  # (kind, text)
        self.said: list[str] = []
        self.cells: list[list[str]] = []  # of the rows of tables that are open, the innermost last
        self.heading, self.depth, self.ignored = 0, -1, 0
        self.in_text = False
        self.starts: dict[str, Callable[[dict], None]] = {
            "p": self._paragraph, "pStyle": self._style, "numPr": lambda a: self._item("0"),
            "ilvl": lambda a: self._item(_value(a)), "outlineLvl": self._outline, "t": lambda a: self._texts(True),
            "tab": lambda a: self._tab(a), "br": lambda a: self.said.append("\n"),
            "cr": lambda a: self.said.append("\n"), "noBreakHyphen": lambda a: self.said.append("-"),
            "tr": lambda a: self.cells.append([]), "tc": self._cell,
        }  # fmt: skip

    def start(self, tag: str, attrs: dict) -> None:
        if self.ignored or tag == FALLBACK:
            self.ignored += 1
        elif act := self.starts.get(_name(tag)):
            act(attrs)

    def end(self, tag: str) -> None:
        if self.ignored:
            self.ignored -= 1
            return
        name = _name(tag)
        if name == "t":
            self.in_text = False
        elif name == "p":
            self._ended()
        elif name == "tr" and self.cells:
            self._add("row", " | ".join(self.cells.pop()))

    def data(self, text: str) -> None:
        if self.in_text and not self.ignored:
            self.said.append(text)

    def _paragraph(self, attrs: dict) -> None:
        if "".join(self.said).strip():  # the text of a box inside a paragraph
            self._ended()
        self.said, self.heading, self.depth = [], 0, -1

    def _style(self, attrs: dict) -> None:
        style = _value(attrs)
        self.heading = self.levels.get(style) or _level(re.sub(r"(?<=\D)(?=\d$)", " ", style))
        if not self.heading and style.lower().startswith("list") and self.depth < 0:
            self.depth = 0

    def _outline(self, attrs: dict) -> None:
        if _value(attrs).isdigit() and int(_value(attrs)) < 9:
            self.heading = min(6, int(_value(attrs)) + 1)

    def _item(self, level: str) -> None:
        self.depth = min(8, int(level)) if level.isdigit() else 0

    def _cell(self, attrs: dict) -> None:
        if self.cells:
            self.cells[-1].append("")

    def _texts(self, inside: bool) -> None:
        self.in_text = inside

    def _tab(self, attrs: dict) -> None:
        if not attrs:  # with attributes it is the definition of a stop
            self.said.append("\t")

    def _ended(self) -> None:
        text, self.said = "".join(self.said).strip(), []
        if not text:
            return
        if self.cells and self.cells[-1]:
            cell = self.cells[-1]
            cell[-1] = f"{cell[-1]} {text}".strip().replace("\n", " ")
        elif self.heading:
            self._add("heading", "#" * self.heading + " " + text)
        elif self.depth >= 0:
            self._add("item", "  " * self.depth + "- " + text)
        else:
            self._add("paragraph", text)

    def _add(self, kind: str, text: str) -> None:
        if kind == "row" and self.cells and self.cells[-1]:  # a table inside a cell
            self.cells[-1][-1] = f"{self.cells[-1][-1]} {text}".strip()
        elif text.strip(" |"):
            self.blocks.append((kind, text))

    def text(self) -> str:
        made, before = [], ""
        for kind, text in self.blocks:
            made.append(("\n" if kind == before and kind in ("item", "row") else "\n\n") + text)
            before = kind
        return "".join(made).strip()


def is_document(path: Path) -> str | None:
    """What a zip archive is not a DOCX for; None of one that is."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        return f"a damaged zip archive: {error}"
    if "word/document.xml" in names:
        return None
    for part, name in (("xl/workbook.xml", "a workbook (xlsx); save its sheets as CSV"),
                       ("ppt/presentation.xml", "slides (pptx); save them as PDF"),
                       ("META-INF/container.xml", "a book (epub); unpack it and give its HTML"),
                       ("content.xml", "an OpenDocument file; save it as DOCX")):  # fmt: skip
        if part in names:
            return name
    return "a zip archive; unpack it and give the folder"
