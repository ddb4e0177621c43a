"""How rows are run: all together in one flat row over a shared cache, or each over a cache of its family's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models import trials, virtual
from ..models.attention import Unsupported
from ..models.network import Network
from ..surgery import cache_keyword
from . import attention
from .attention import Pass, Span
from .cache import Cache
from .choice import Choice, Mixed
from .requests import Request, Stream
from .row import Row
from .texts import Texts


@dataclass(frozen=True)
class Piece:
    """The next `count` tokens of a row that its cache does not hold."""

    row: Row
    count: int

    @property
    def whole(self) -> bool:
        """Whether what comes next is known then."""
        return self.count == self.row.left


class Runner(Protocol):
    chunks: bool  # whether a prompt can be run in parts

    @property
    def capacity(self) -> int: ...
    @property
    def used(self) -> int: ...
    @property
    def idle(self) -> int: ...
    @property
    def reused(self) -> int: ...
    def admit(self, row: Row, running: Iterable[Row]) -> bool: ...
    def follow(self, row: Row) -> bool: ...
    def room(self, row: Row, tokens: int) -> bool: ...
    def release(self, row: Row, keep: bool = True) -> None: ...
    def run(self, pieces: Sequence[Piece]) -> tuple[list[Row], Tensor | None]: ...
    def again(self, piece: Piece) -> Piece: ...
    def clear(self) -> None: ...


# ---------------------------------------------------------------------------- together


class Together:
    """Tokens of all rows in one flat row, without padding; adapters by rows, or one pass for each kind of them."""

    chunks = True

    def __init__(self, network: Network, choice: Choice, size: int, keep: int):
        self.network, self.choice = network, choice
        self.cache = Cache(size, keep)
        self.mixes = True  # whether rows with different adapters run in one pass

    @property
    def capacity(self) -> int:
        return self.cache.pool.size

    @property
    def used(self) -> int:
        return self.cache.used

    @property
    def idle(self) -> int:
        return self.cache.idle_tokens

    @property
    def reused(self) -> int:
        return self.cache.reused

    def admit(self, row: Row, running: Iterable[Row]) -> bool:
        return self.cache.admit(row, running)

    def follow(self, row: Row) -> bool:
        return self.cache.follow(row)

    def room(self, row: Row, tokens: int) -> bool:
        return self.cache.room(row, tokens)

    def release(self, row: Row, keep: bool = True) -> None:
        self.cache.release(row, keep)

    def clear(self) -> None:
        self.cache.clear()

    def again(self, piece: Piece) -> Piece:
        """What is to be run where this one failed: the cache is written over."""
        return piece

    def run(self, pieces: Sequence[Piece]) -> tuple[list[Row], Tensor | None]:
        """Rows whose next token is known now, and their logits [R, V]; the caller counts what is computed."""
        if self.mixes:
            return self._pass(pieces)
        groups: dict[frozenset[str], list[Piece]] = defaultdict(list)
        for piece in pieces:
            groups[piece.row.names].append(piece)
        made = [self._pass(group) for group in groups.values()]
        logits = [found for _, found in made if found is not None]
        return [row for rows, _ in made for row in rows], torch.cat(logits) if logits else None

    def _pass(self, pieces: Sequence[Piece]) -> tuple[list[Row], Tensor | None]:
        # In the order of the cache, as a GPU's kernel wants it; on a CPU those with the same adapters stand together.
        on_gpu = self.network.device.type == "cuda"
        pieces = sorted(pieces, key=lambda p: ([] if on_gpu else sorted(p.row.names), p.row.place.start))
        device = self.network.device
        tokens: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        spans, last, rows = [], [], []
        for piece in pieces:
            row, start = piece.row, piece.row.computed
            end, begin = start + piece.count, row.place.start
            spans.append(Span(len(tokens), len(tokens) + piece.count, begin, begin + end))
            tokens += row.tokens[start:end]
            positions += range(start, end)
            places += range(begin + start, begin + end)
            if piece.whole:
                last.append(len(tokens) - 1)
                rows.append(row)
        self.choice.begin([(piece.count, piece.row.names) for piece in pieces])
        given = torch.tensor([tokens, positions, places], device=device)
        first = self.network.first_position
        out = self.network.model.base_model(
            input_ids=given[:1], position_ids=given[1:2] + first if first else given[1:2], use_cache=False,
            serve=Pass(self.cache.store, spans, given[2]),
        )  # fmt: skip
        if not rows:
            return rows, None
        hidden = out.last_hidden_state[0]
        if len(rows) < len(tokens):
            hidden = hidden[torch.tensor(last, device=device)]
        self.choice.begin([(1, row.names) for row in rows])
        return rows, self.network.head(hidden)


# ---------------------------------------------------------------------------- apart


class Apart:
    """Each row by itself, a prompt at a time, over the cache of its family: state-space mixers, virtual tokens."""

    chunks = False

    def __init__(self, network: Network, choice: Choice, size: int):
        self.network, self.choice, self.capacity = network, choice, size
        self.used = self.idle = self.reused = 0
        self.keyword = cache_keyword(network.model)

    def admit(self, row: Row, running: Iterable[Row]) -> bool:
        if self.used + row.most > self.capacity:
            return False
        self.used += row.most
        row.place = True
        row.computed = 0
        return True

    def follow(self, row: Row) -> bool:
        return True

    def room(self, row: Row, tokens: int) -> bool:
        return tokens <= row.most

    def release(self, row: Row, keep: bool = True) -> None:
        if row.place is not None:
            self.used -= row.most
        row.place, row.computed = None, 0

    def clear(self) -> None:
        pass

    def again(self, piece: Piece) -> Piece:
        """All of its row, as nobody knows what the cache holds now."""
        piece.row.computed = 0
        return Piece(piece.row, piece.row.left)

    def run(self, pieces: Sequence[Piece]) -> tuple[list[Row], Tensor | None]:
        made = [self._one(piece) for piece in pieces]
        return [piece.row for piece in pieces], torch.cat(made)

    def _one(self, piece: Piece) -> Tensor:
        """[1, V]"""
        row, model = piece.row, self.network.model
        assert piece.whole
        self.choice.begin([(piece.count, row.names)])
        found, device = virtual.of(model), self.network.device
        tokens = torch.tensor([row.tokens[row.computed :]], device=device)
        if row.computed == 0:
            row.place = virtual.cache(model, found, 1, self.network.dtype)
        given: dict[str, Any] = {"input_ids": tokens}  # without a mask, which mixers take for one of new tokens
        if found is None:
            given["position_ids"] = torch.arange(row.computed, len(row.tokens), device=device)[None]
        elif row.computed == 0:
            given = virtual.padded(model, found, tokens, torch.ones_like(tokens), [0])
        else:
            at = found.length + row.computed
            given["position_ids"] = torch.arange(at, at + piece.count, device=device)[None]
            given["attention_mask"] = tokens.new_ones(1, at + piece.count)
        out = model.base_model(**given, use_cache=True, **{self.keyword: row.place})
        self.choice.begin([(1, row.names)])
        return self.network.head(out.last_hidden_state[:, -1])


# ---------------------------------------------------------------------------- which


@contextmanager
def running(network: Network, together: bool) -> Iterator[None]:
    """The network in evaluation, with the attention of the engine or that of its family."""
    with network.natively() as model, torch.inference_mode():
        if together:
            attention.install()
            model.set_attn_implementation(attention.NAME)
        yield


def why_apart(network: Network, choice: Choice, length: int) -> str | None:
    """Why rows of this network cannot run together; None where a trial says that they can."""
    model = network.model
    if virtual.of(model) is not None:
        return "it has virtual tokens before every prompt"
    config = network.config.get_text_config()
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - trials.LAYERS):
        return f"it has layers of the kinds {', '.join(other)}"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {r.get("rope_type") for r in (rope, *(v for v in rope.values() if isinstance(v, dict)))}
    original = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", 0)
    if kinds & {"dynamic", "longrope"} and length > original:
        return "its positions are scaled by the longest text that is run with others"
    try:
        return _trial(network, choice)
    except (Unsupported, ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _trial(network: Network, choice: Choice) -> str | None:
    """Two short texts, in parts and side by side, against the family's own attention."""
    vocabulary = network.config.get_text_config().vocab_size
    every = ((torch.arange(21) * 7919 + 11) % min(vocabulary, 1 << 15)).tolist()
    texts, steps = (every[:12], every[12:]), (1, 2)
    plain = []
    with running(network, False):
        choice.begin([(1, choice.at_start)])
        for text in texts:
            tokens = torch.tensor([text], device=network.device)
            given = {"position_ids": torch.arange(len(text), device=network.device)[None]}
            out = network.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False, **given)
            plain.append(out.logits[0])
    with running(network, True):
        runner = Together(network, choice, 64, 0)
        rows = [_nobody(text[:5], choice.at_start) for text in texts]
        if not all(runner.admit(row, ()) for row in rows):
            raise AssertionError("an empty cache has no room")
        while pieces := [Piece(row, row.left) for row in rows if row.left]:
            done, logits = runner.run(pieces)
            assert logits is not None
            for row, ours in zip(done, logits):
                which = rows.index(row)
                expected = plain[which][len(row.tokens) - 1]
                tolerance = 1e-3 if network.dtype == torch.float32 else 6e-2
                if (ours - expected).abs().max() > tolerance * expected.abs().max():
                    return "texts side by side and alone give different scores"
                row.computed = len(row.tokens)
                row.tokens = texts[which][: row.computed + steps[which]]
    return None if runner.cache.store.keys else "its layers do not use transformers' attention interface"


def mixes(network: Network, choice: Choice, variants: Sequence[frozenset[str]]) -> bool:
    """Whether rows with different adapters can run in one pass, and come out as they do in one for each."""
    if len(set(variants)) < 2 or not choice.layers:
        return True
    found = []
    with running(network, True):
        for together in (False, True):
            runner = Together(network, choice, 32 * len(variants), 0)
            runner.mixes = together
            pieces = [Piece(_nobody([7, 5 + i, 3], names), 3) for i, names in enumerate(variants)]
            assert all(runner.admit(piece.row, ()) for piece in pieces)
            try:
                rows, logits = runner.run(pieces)
            except (Mixed, RuntimeError, ValueError, TypeError, IndexError):
                return False
            assert logits is not None
            order = [rows.index(piece.row) for piece in pieces]
            found.append(logits[order])
    tolerance = 1e-3 if network.dtype == torch.float32 else 6e-2
    return bool((found[0] - found[1]).abs().max() <= tolerance * found[0].abs().max())


def warm(network: Network, choice: Choice, runner: Together) -> None:
    """Run a text, so that the cache's memory is taken, or found missing, before the first request."""
    with running(network, True):
        row = _nobody([0, 1], choice.at_start)
        if runner.admit(row, ()):
            runner.run([Piece(row, 2)])
        runner.release(row, keep=False)


def bytes_per_token(network: Network, choice: Choice) -> int:
    """What the shared cache takes for a token."""
    with running(network, True):
        runner = Together(network, choice, 8, 0)
        row = _nobody([0, 1], choice.at_start)
        assert runner.admit(row, ())
        runner.run([Piece(row, 2)])
    return runner.cache.store.bytes_per_token


def _nobody(tokens: list[int], names: frozenset[str]) -> Row:
    """A row that is asked for by the engine itself."""
    request = Request(tokens, 16)
    return Row(request, Stream(request), Texts(None), names, list(tokens))
