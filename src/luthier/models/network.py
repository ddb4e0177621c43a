"""Network: a transformers model seen as packed batch -> hidden states [T, H], with its head, or its scores, apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import ModelError
from ..logprobs import Head
from ..surgery import cache_keyword
from . import attention, heads, starts, virtual


class Network(nn.Module):
    """`hidden(batch)` runs the decoder; `packed` tells whether rows run flat or, for some families, padded.

    `ends_in` says what follows: a `head` that scores the next token, or `scores` of a text or of each token.
    """

    model: Any  # of transformers

    def __init__(self, model: Any, ends_in: str = "tokens"):
        super().__init__()
        self.model = model
        self.ends_in = ends_in
        self.causal = True  # else each token sees those after it, too
        self.takes = "last"  # which hidden states of a text its head is given: heads.TAKES
        self.first_position = 0  # RoBERTa counts from another number
        self.native = self.model.config._attn_implementation
        self.packed = False
        self.noise = 0.0  # NEFTune's alpha
        self.longest = 0  # an upper bound of document lengths that stays the same, so that graphs do
        self.compiled = False  # then rows have few shapes
        self.shares = True  # what neighbours in a row begin with is run once
        if ends_in == "tokens" and self.model.get_output_embeddings() is None:
            raise ModelError(f"{type(model).__name__} has no output layer: it is no causal language model")

    @property
    def config(self):
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def head(self) -> Head:
        config = self.config.get_text_config()
        scale = 1.0
        if getattr(config, "logits_scaling", None):  # Granite
            scale = 1.0 / config.logits_scaling
        if getattr(config, "logit_scale", None):  # Cohere
            scale = config.logit_scale
        return Head(self.model.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))

    def forward(self, batch: Batch) -> Tensor:
        return self.hidden(batch)

    def scores(self, batch: Batch) -> Tensor:
        """[D, K] of each document, or [T, K] of each token, by what the network ends in; what fills a batch up, too."""
        if self.takes == "whole":
            scores, inside = self._whole(batch)
            return scores if self.ends_in == "text" else scores[inside]
        hidden = self.hidden(batch)
        if self.ends_in == "each":
            return heads.of_hidden(self.model, hidden[None], batch.tokens[None])[0]
        tokens, inside = self._rows(batch)
        if self.takes == "all":
            padded = hidden.new_zeros(*inside.shape, hidden.shape[-1])
            padded = padded.masked_scatter(inside[..., None], hidden)
            return heads.of_hidden(self.model, padded, tokens, inside.long())
        starts = torch.tensor(batch.ends[:-1], device=self.device)
        places = starts
        if self.takes == "last":  # as transformers has it: the last that is not what texts are filled up with
            counted = torch.arange(inside.shape[1], device=self.device) * (tokens != self.padding)
            places = starts + counted.argmax(-1)
        return heads.of_hidden(self.model, hidden[places][:, None], batch.tokens[places][:, None])

    @property
    def padding(self) -> int:
        """The token that rows are filled up with."""
        found = getattr(self.config.get_text_config(), "pad_token_id", None)
        return found if isinstance(found, int) else 0

    def _rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Documents as rows [D, L], filled up at their ends, and where their own tokens are."""
        lengths = torch.tensor(batch.lengths, device=self.device)
        inside = torch.arange(max(batch.lengths), device=self.device) < lengths[:, None]
        filled = torch.full(inside.shape, 0 if self.ends_in == "tokens" else self.padding, device=self.device)
        return filled.masked_scatter(inside, batch.tokens), inside

    def _whole(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The model's own scores of padded rows, whatever its family does, and where their own tokens are."""
        tokens, inside = self._rows(batch)
        return self.model(input_ids=tokens, attention_mask=inside.long(), **self._types(batch, inside)).logits, inside

    def _types(self, batch: Batch, inside: Tensor | None = None) -> dict[str, Tensor]:
        """Which of two texts a token is of, for families that are told; flat, or in rows where `inside` is true."""
        types = batch.token_fields.get("types")
        if types is None or (getattr(self.config, "type_vocab_size", None) or 0) < 2:
            return {}
        if inside is None:
            return {"token_type_ids": types[None]}
        return {"token_type_ids": torch.zeros_like(inside, dtype=torch.int64).masked_scatter(inside, types)}

    @property
    def _disturbed(self) -> bool:
        """Whether the embeddings of this pass get noise, in training only."""
        return bool(self.noise) and self.model.training and torch.is_grad_enabled()

    def hidden(self, batch: Batch) -> Tensor:
        """[T, H] after the last norm."""
        with self._noisy(batch):
            return self._packed(batch) if self.packed else self._padded(batch)

    @contextmanager
    def _noisy(self, batch: Batch) -> Iterator[None]:
        """In training, uniform noise on the embeddings of each document: at most alpha / sqrt(length x width)."""
        if not self._disturbed:
            yield
            return
        lengths = torch.tensor(batch.lengths, device=self.device, dtype=torch.float32)  # [D]
        each = lengths.repeat_interleave(lengths.long(), output_size=len(batch)) if self.packed else lengths[:, None]

        def disturb(module: nn.Module, _: Any, embedded: Tensor) -> Tensor:  # [1, T, H] or [D, L, H]
            most = self.noise / (each * embedded.shape[-1]).sqrt()
            noise = torch.empty_like(embedded, dtype=torch.float32).uniform_(-1, 1) * most[..., None]
            return embedded + noise.to(embedded.dtype)

        handle = self.model.get_input_embeddings().register_forward_hook(disturb)
        try:
            yield
        finally:
            handle.remove()

    def predictions(self, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For the N tokens that are learnt: the hidden state that predicts each [N, H], the token, its weight."""
        return hidden[batch.trained], batch.targets[batch.trained], batch.weights[batch.trained]

    def passes(self, batch: Batch) -> tuple[int, tuple[int, ...]]:
        """How many tokens are run for a batch, and with how many each document begins that are those of the one before
        it, run once. Padded rows count as what is in them."""
        alike = batch.alike() if self.packed else ()
        once = self._once(batch, max(self.longest, *batch.lengths)) if any(alike) else None
        return (len(batch), (0,) * len(batch.lengths)) if once is None else (len(once.kept), alike)

    def _packed(self, batch: Batch) -> Tensor:
        tokens, positions, ends, keys = batch.tokens, batch.positions, batch.ends, batch.ends
        longest, found = max(self.longest, *batch.lengths), virtual.of(self.model)
        given: dict[str, Any] = {**self._types(batch)}
        once = self._once(batch, longest)
        if once is not None:
            tokens, positions, ends, keys = tokens[once.kept], positions[once.kept], once.ends, once.keys
            if attention.apart(tokens):
                given["shared_starts"] = once.copies
        if self.first_position:
            positions = positions + self.first_position
        if found is None:
            out = self.model.base_model(
                input_ids=tokens[None], position_ids=positions[None], **given, **self._no_cache,
                **attention.borders(ends, keys, longest, self.device),
            )  # fmt: skip
            hidden = out.last_hidden_state[0]
        else:
            row = virtual.row(self.model, found, tokens, positions, ends, keys, longest, self.compiled)
            hidden = self.model.base_model(**row.given, use_cache=False).last_hidden_state[0][row.tokens]
        return hidden if once is None else starts.copied(hidden, once.copies)[: len(batch)]

    def _once(self, batch: Batch, longest: int) -> starts.Once | None:
        """The row with what neighbours share run once, where all that a token becomes is known from those before it.

        On a GPU keys and values of each document are copied, so that a part of the row must be saved by it; virtual
        tokens are copied there, too, and the two have not been brought together.
        """
        if not self.shares or self._disturbed or not self.causal or "types" in batch.token_fields:
            return None
        apart = attention.apart(batch.tokens)
        if self.compiled if not apart else virtual.of(self.model) is not None:
            return None
        total = len(batch)
        documents = batch.documents if self.compiled else len(batch.ends) - 1
        return starts.once(
            batch.ends[: documents + 1], batch.alike()[:documents], self.device,
            -(-total // starts.SHARE) if apart else 1, total if self.compiled else 0, longest,
        )  # fmt: skip

    @property
    def _no_cache(self) -> dict[str, bool]:
        return {"use_cache": False} if self.causal else {}

    def _padded(self, batch: Batch) -> Tensor:
        tokens, inside = self._rows(batch)
        found = virtual.of(self.model)
        if found is not None:
            given = virtual.padded(self.model, found, tokens, inside.long(), [0] * len(inside))
            if found.prefix is not None:
                kept = virtual.cache(self.model, found, len(inside), self.dtype)
                given[cache_keyword(self.model)] = kept
            out = self.model.base_model(**given, use_cache=False)
            return out.last_hidden_state[:, found.rows :][inside]
        given = {"input_ids": tokens, "attention_mask": inside.long(), **self._types(batch, inside), **self._no_cache}
        if self.causal:  # others count in their own ways
            given["position_ids"] = torch.zeros_like(tokens).masked_scatter(inside, batch.positions)
        return self.model.base_model(**given).last_hidden_state[inside]

    @contextmanager
    def natively(self) -> Iterator[Any]:
        """The model with its own attention, eager, in evaluation mode: for generation with a cache."""
        training, before = self.model.training, self.model.config._attn_implementation
        compiled = [m for m in self.model.modules() if m._compiled_call_impl is not None]
        calls = [m._compiled_call_impl for m in compiled]
        try:
            for module in compiled:
                module._compiled_call_impl = None
            self.model.set_attn_implementation(self.native)
            self.model.eval()
            yield self.model
        finally:
            self.model.set_attn_implementation(before)
            self.model.train(training)
            for module, call in zip(compiled, calls):
                module._compiled_call_impl = call


def pack(network: Network) -> None:
    """Switch to packed attention, untried."""
    attention.install()
    network.model.set_attn_implementation(attention.NAME)
    network.packed = True


def unpack(network: Network) -> None:
    """Back to the family's own attention, over padded rows."""
    network.packed = False
    network.model.set_attn_implementation(network.native)
