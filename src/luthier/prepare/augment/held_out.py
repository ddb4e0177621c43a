"""What must not be met in training: the inputs of held-out rows, by hashes that small differences do not change."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from ...data import formats
from ...data.sources import read
from ...errors import DataError
from ..views import View, view
from .way import ASKING

BYTES = 16  # of a hash


def asked(seen: View) -> str:
    """The model's input in a row: what the user says, or all of a row without roles."""
    return "\x1e".join(text.text for text in seen.texts if text.role in ASKING) or seen.joined()


def loose(text: str) -> bytes:
    """The hash of a text's words: capitals, accents written in two ways, marks and blanks do not count."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = " ".join(re.findall(r"\w+", plain)) or plain
    return blake2b(words.encode("utf-8", "surrogatepass"), digest_size=BYTES).digest()


def exact(text: str) -> bytes:
    """The hash of a text but for how its words are parted."""
    plain = " ".join(unicodedata.normalize("NFC", text).split())
    return blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=BYTES).digest()


def write(sources: Sequence[str], columns: Mapping[str, str], out: Path) -> str:
    """The hashes of held-out inputs, sorted, into a file; what they are known by."""
    found = set()
    for row in read(list(sources), split="validation"):
        if row.fault is not None:
            raise DataError(f"--validation: {row.place}: {row.fault}")
        found.add(loose(asked(view(formats.renamed(row.values, columns)))))
    data = b"".join(sorted(found))
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    aside.write_bytes(data)
    os.replace(aside, out)
    return blake2b(data, digest_size=BYTES).hexdigest()


@lru_cache(maxsize=1)
def hashes(path: Path) -> frozenset[bytes]:
    data = path.read_bytes()
    return frozenset(data[at : at + BYTES] for at in range(0, len(data), BYTES))
