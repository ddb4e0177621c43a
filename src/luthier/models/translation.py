"""Two vocabularies: whether they are one, and texts of one read in the tokens of the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..errors import ModelError


def difference(own: Any, theirs: Any) -> str | None:
    """What tells the vocabulary of tokenizer `own` from that of `theirs`; None where all of its tokens are there,
    with the same numbers."""
    known = theirs.get_vocab()
    tokens = own.get_vocab()
    apart = sorted((i, token) for token, i in tokens.items() if known.get(token) != i)
    if not apart:
        return None
    number, token = apart[0]
    there = f"is {known[token]} there" if token in known else "is not there"
    return f"{token!r}, {number} of the student, {there} ({len(apart):,} of {len(tokens):,} tokens differ)"


# ---------------------------------------------------------------------------- tokens as bytes


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in a byte-level vocabulary (GPT-2's): printable ones for themselves, the
    others, in their order, for those from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@dataclass(frozen=True)
class Pieces:
    """The tokens of a tokenizer as the bytes that they stand for."""

    of: dict[int, bytes]  # plain tokens
    added: dict[int, str]  # those with a meaning of their own, such as <|im_end|>
    single: frozenset[int]  # of `of`, the bytes that stand in for characters without a token

    @classmethod
    def read(cls, tokenizer: Any) -> Pieces:
        added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
        vocabulary = [(token, i) for token, i in tokenizer.get_vocab().items() if i not in added]
        if '"ByteLevel"' in decoder:
            alphabet = _byte_alphabet()
            return cls({i: bytes(alphabet[c] for c in token) for token, i in vocabulary}, added, frozenset())
        if "\\u2581" in decoder or '"Metaspace"' in decoder:  # SentencePiece
            of, single = {}, set()
            for token, i in vocabulary:
                if len(token) == 6 and token.startswith("<0x"):
                    of[i] = bytes([int(token[3:5], 16)])
                    single.add(i)
                else:
                    of[i] = token.replace("\u2581", " ").encode()
            return cls(of, added, frozenset(single))
        raise ModelError(
            f"objective.vocabulary=align: the tokens of {type(tokenizer).__name__} are neither byte-level nor "
            "SentencePiece's, so it is not known which text each stands for: use a teacher with the same vocabulary"
        )

    @cached_property
    def numbers(self) -> dict[bytes | str, int]:
        """Bytes of plain tokens, and texts of added ones, with their numbers."""
        plain = sorted(self.of, key=lambda i: (i in self.single, i))
        return {self.of[i]: i for i in reversed(plain)} | {text: i for i, text in self.added.items()}


# ---------------------------------------------------------------------------- reading in other tokens


@dataclass(frozen=True)
class Translation:
    """From the student's tokens to the teacher's."""

    own: Tensor  # [M] tokens of the student that the teacher has, too
    theirs: Tensor  # [M] the same of the teacher
    pieces: Pieces | None = None
    tokenizer: Any = None  # the teacher's
    specials: dict[int, int | None] | None = None  # of the student -> of the teacher; None: it reads nothing there
    first: int | None = None  # with which the teacher's texts begin

    @classmethod
    def of(cls, own: Any, theirs: Any, device: torch.device) -> Translation:
        mine, other = Pieces.read(own), Pieces.read(theirs)
        pairs = {i: other.numbers[key] for key, i in mine.numbers.items() if key in other.numbers}
        specials: dict[int, int | None] = {i: other.numbers[t] for i, t in mine.added.items() if t in other.numbers}
        if own.bos_token_id is not None:
            specials.setdefault(own.bos_token_id, theirs.bos_token_id)
        if own.eos_token_id is not None and own.eos_token_id not in pairs and theirs.eos_token_id is not None:
            specials.setdefault(own.eos_token_id, theirs.eos_token_id)
            if theirs.eos_token_id not in pairs.values():
                pairs[own.eos_token_id] = theirs.eos_token_id
        starts = theirs("a").input_ids
        first = theirs.bos_token_id if starts and starts[0] == theirs.bos_token_id else None
        numbers = torch.tensor(sorted(pairs.items()), device=device).reshape(-1, 2)
        return cls(numbers[:, 0], numbers[:, 1], mine, theirs, specials, first)

    @classmethod
    def outlined(cls, width: int) -> Translation:
        tokens = torch.empty(width // 2, dtype=torch.int64, device="meta")
        return cls(tokens, tokens)

    def read(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The same documents in the teacher's tokens, and for each position of `batch` [T] the one of the teacher's
        that has read the same text, or -1."""
        if batch.tokens.is_meta:  # no text: as many tokens as the student's
            return batch, batch.tokens
        tokens = batch.tokens.tolist()
        documents, at, end = [], [], 0
        for a, b in zip(batch.ends[: batch.documents], batch.ends[1:]):
            read, places = self._document(tokens[a:b])
            documents.append(read)
            at += [-1 if place < 0 else place + end for place in places]
            end += len(read)
        at += [-1] * (len(tokens) - len(at))  # what fills up is not read
        return _batch_of(documents, batch.tokens.device), torch.tensor(at, device=batch.tokens.device)

    def _document(self, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
        """A document in the teacher's tokens; for each of `tokens` the last of these when both have read as much."""
        read: list[int] = [] if self.first is None else [self.first]
        places: list[int] = []
        for special, run in self._runs(tokens):
            if special is not None:
                read += [] if special < 0 else [special]
                places.append(len(read) - 1)
                continue
            text, whole = _decoded(b"".join(run))
            made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            sizes = [0, *accumulate(len(c.encode()) for c in text)]
            ends = {sizes[stop]: len(read) + i for i, (_, stop) in enumerate(made["offset_mapping"])}
            places += [ends.get(size, -1) for size in accumulate(map(len, run))]
            read += made["input_ids"]
            if not whole:  # bytes that are no text: nothing after them can be read
                break
        if not read:
            read = [self.tokenizer.eos_token_id or 0]
        return read, places + [-1] * (len(tokens) - len(places))

    def _runs(self, tokens: Sequence[int]) -> Iterator[tuple[int | None, list[bytes]]]:
        """(the teacher's number, nothing) of special tokens it has, -1 where it reads nothing; (None, the bytes of
        each token) of a stretch of text."""
        assert self.pieces is not None
        specials, text = self.specials or {}, []
        for i, token in enumerate(tokens):
            if token in specials:
                if text:
                    yield None, text
                    text = []
                number = specials[token]
                there = i == 0 and number == self.first  # what the teacher's texts begin with anyway
                yield (-1 if number is None or there else number), []
            else:
                added = self.pieces.added.get(token)
                text.append(self.pieces.of.get(token, b"") if added is None else added.encode())
        if text:
            yield None, text


def _decoded(data: bytes) -> tuple[str, bool]:
    """The text of UTF-8, up to the first byte that is none; whether that is all of it."""
    try:
        return data.decode(), True
    except UnicodeDecodeError as error:
        return data[: error.start].decode(), False


def _batch_of(documents: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """To be read only: nothing is predicted."""
    tokens = torch.tensor([token for document in documents for token in document])
    none = torch.zeros_like(tokens)
    return Batch(
        tokens=tokens, positions=torch.cat([torch.arange(len(d)) for d in documents]),
        ends=(0, *accumulate(map(len, documents))), targets=none, weights=none.float(), trained=none[:0],
    ).to(device)  # fmt: skip
