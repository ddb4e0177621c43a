"""HTML: its text without scripts, styles and what stands around it on every page; the title is kept."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser

from .base import Document, File, How, Part, contents

AROUND = {"nav", "header", "footer"}
SILENT = {"script", "style", "noscript", "template", "svg", "math", "iframe", "object", "canvas", "select", "head"}
PARAGRAPHS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "table", "blockquote", "pre", "section",
              "article", "figure", "form", "fieldset", "details", "main", "aside", "body", "address"}  # fmt: skip
LINES = {"div", "li", "tr", "dt", "dd", "hr", "figcaption", "caption", "summary", "legend", "option"}
CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([A-Za-z0-9_:.-]{1,40})""", re.I)


class _Text(HTMLParser):
    """Gathers text; `around` keeps what is else left out, for pages that never close it."""

    def __init__(self, around: bool = False):
        super().__init__(convert_charrefs=True)
        self.dropped = SILENT if around else SILENT | AROUND
        self.pieces: list[str] = []
        self.title: list[str] = []
        self.silent: list[str] = []  # elements inside which nothing is kept
        self.in_title, self.pre = False, 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "title" and "svg" not in self.silent:
            self.in_title = True
        elif tag == "body":
            self.silent.clear()  # a head need not be closed
        elif tag in self.dropped:
            self.silent.append(tag)
        if self.silent:
            return
        self._break(tag)
        if tag == "br":
            self.pieces.append("\n")
        elif tag == "li":
            self.pieces.append("- ")
        elif tag == "pre":
            self.pre += 1

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        if tag not in self.dropped:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self.in_title = False
        elif tag in self.dropped:
            if tag in self.silent:
                del self.silent[len(self.silent) - 1 - self.silent[::-1].index(tag) :]
            return
        if self.silent:
            return
        if tag == "pre":
            self.pre = max(0, self.pre - 1)
        self._break(tag)
        if tag in ("td", "th"):
            self.pieces.append("\t")

    def _break(self, tag: str) -> None:
        if tag in PARAGRAPHS:
            self.pieces.append("\n\n")
        elif tag in LINES:
            self.pieces.append("\ue003")  # a line ends here, if it has not ended yet

    def handle_data(self, data: str) -> None:
        if self.in_title:
            self.title.append(data)
        elif not self.silent:
            # Blanks of the source mean one blank; those of `pre` stay, as characters that are no blanks until the end.
            self.pieces.append(data.replace("\n", "\ue000").replace(" ", "\ue001").replace("\t", "\ue002")
                               if self.pre else re.sub(r"[ \t\n\r\f]+", " ", data))  # fmt: skip

    def text(self) -> str:
        lines = re.split(r"([\n\ue003])", "".join(self.pieces))
        text = "".join(line.rstrip(" \t").replace("\t", " | ") if line not in "\n\ue003" else line for line in lines)
        text = re.sub(r" {2,}", " ", text)
        text = re.sub(r"[ \n\ue003]*[\n\ue003][ \n\ue003]*", _border, text)
        text = re.sub(r"(?m)^- *\n+", "- ", text)  # a paragraph in an item
        return text.strip(" \n").replace("\ue000", "\n").replace("\ue001", " ").replace("\ue002", "\t")


def _border(found: re.Match) -> str:
    return "\n\n" if found[0].count("\n") > 1 else "\n"


def text_of(source: str, warnings: Counter[str] | None = None) -> tuple[str, str]:
    """(text, title) of a page; `warnings` counts what was odd."""
    made = _parsed(source, False)
    if made.rawdata and warnings is not None:
        warnings["a tag or a comment without an end, and what stands behind it left out"] += 1
    if AROUND & set(made.silent):  # a nav without an end would take the rest of the page along
        made = _parsed(source, True)
    return made.text(), " ".join("".join(made.title).split())


def _parsed(source: str, around: bool) -> _Text:
    made = _Text(around)
    made.feed(re.sub("[\ue000-\ue003]", "", source))
    if not made.rawdata.startswith("<"):
        # What is left else is a comment or a tag without an end, which takes the rest of the page along, as in
        # browsers; the parser would look through that rest once for every `<` in it.
        made.close()
    return made


def read(file: File, how: How) -> Iterator[Document]:
    data = contents(file.path)
    declared = CHARSET.search(data[:4096])
    text, title = text_of(file.decoded(data, declared[1].decode() if declared else None), file.warnings)
    yield Document([Part(text, {})], {"title": title} if title else {})
