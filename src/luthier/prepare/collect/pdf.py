"""PDF: the text of its pages, by pypdf."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from ...data.readers import shown
from ...errors import DataError
from .base import Document, File, How, Part, Unreadable, problem_of


def needed() -> None:
    """DataError where the library is missing."""
    if find_spec("pypdf") is None:
        raise DataError("PDF files are read by pypdf, which is not installed: `pip install luthier[collect]`")


def read(file: File, how: How) -> Iterator[Document]:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of what it mends
    with open(file.path, "rb") as raw:
        try:
            opened = pypdf.PdfReader(raw)
        except Exception as error:
            raise Unreadable(f"a damaged PDF ({shown(str(error))}); write or print it to PDF again") from None
        if opened.is_encrypted and not opened.decrypt(""):
            raise Unreadable("the PDF has a password; save it without one")
        title = _title(opened)
        pages = _pages(opened, file)
        if how.per == "page":
            yield from (Document([page], title) for page in pages)
        else:
            yield Document(list(pages), title)


def _pages(opened: Any, file: File) -> Iterator[Part]:
    for number in range(len(opened.pages)):
        try:
            text = opened.pages[number].extract_text().replace("\0", "")
        except Exception as error:
            file.problems[f"a page cannot be read: {problem_of(error)}"] += 1
            continue
        if text.strip():
            yield Part(text, {"page": number + 1})
        else:
            file.left["a page without text, perhaps a picture of it"] += 1


def _title(opened: Any) -> dict:
    try:
        title = opened.metadata.title if opened.metadata else None
    except Exception:  # only the title is lost
        return {}
    return {"title": str(title).strip()} if title and str(title).strip() else {}
