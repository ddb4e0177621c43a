"""The bytes that each token of a vocabulary stands for, and a tree of them in flat arrays."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .expressions import Unsupported

FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"  # what SentencePiece writes for it


def _alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write for bytes (GPT-2's)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(other)}


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes of each token, by its number; None of special ones, which are no text. Raises Unsupported where the
    tokenizer does not say them, as with WordPiece."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    kinds = _kinds(described.get("decoder") or {})
    known: dict[str, int] = tokenizer.get_vocab()
    added = dict(tokenizer.added_tokens_decoder)
    made: list[bytes | None] = [None] * (1 + max(known.values(), default=-1))
    alphabet = _alphabet()
    if "ByteLevel" not in kinds and not ({"ByteFallback", "Replace"} & kinds):
        raise Unsupported(f"answers of a form need a tokenizer of bytes; this one decodes by {', '.join(kinds) or '?'}")
    for text, number in known.items():
        if number in added:
            made[number] = None if added[number].special else added[number].content.encode()
        elif "ByteLevel" in kinds:
            made[number] = bytes(alphabet[c] for c in text) if all(c in alphabet for c in text) else None
        elif found := FALLBACK.fullmatch(text):
            made[number] = bytes([int(found[1], 16)])
        else:
            made[number] = text.replace(SPACE, " ").encode()
    return made


def _kinds(decoder: dict) -> set[str]:
    parts = decoder.get("decoders") or []
    return {str(decoder.get("type"))} | set().union(*map(_kinds, parts)) if decoder else set()


@dataclass(frozen=True)
class Vocabulary:
    """Tokens as paths of a tree. Nodes stand level by level, node 0 being the empty text."""

    texts: list[bytes | None]
    node: np.ndarray  # [V] where a token ends; -1: nowhere
    parent: np.ndarray  # [N]
    byte: np.ndarray  # [N]
    levels: list[tuple[int, int]]  # from, to
    alone: frozenset[int]  # bytes that a token of their own stands for

    @classmethod
    def of(cls, tokenizer: Any, size: int | None = None) -> Vocabulary:
        texts = token_bytes(tokenizer)
        if size is not None:  # of the model, whose table may have rows that are no token
            texts = (texts + [None] * (size - len(texts)))[:size]
        return cls.of_texts(texts)

    @classmethod
    def of_texts(cls, texts: Sequence[bytes | None]) -> Vocabulary:
        ordered = sorted({text for text in texts if text})
        places: dict[bytes, int] = {b"": 0}
        parent, byte, levels = [0], [0], []
        here = ordered
        length = 0
        while here:
            length += 1
            start = len(parent)
            for text in here:
                prefix = text[:length]
                if prefix not in places:
                    places[prefix] = len(parent)
                    parent.append(places[prefix[:-1]])
                    byte.append(prefix[-1])
            levels.append((start, len(parent)))
            here = [text for text in here if len(text) > length]
        node = np.array([places[text] if text else -1 for text in texts], np.int64)
        alone = frozenset(text[0] for text in ordered if len(text) == 1)
        return cls(list(texts), node, np.array(parent, np.int64), np.array(byte, np.int64), levels, alone)

    def __len__(self) -> int:
        return len(self.texts)
