"""Plain text and Markdown: as it stands, with the line where it begins."""

from __future__ import annotations

from collections.abc import Iterator

from .base import Document, File, How, Part


def read(file: File, how: How) -> Iterator[Document]:
    yield Document([Part(file.text(), {"line": 1})])
