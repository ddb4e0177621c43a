"""Network: a transformers model seen as packed batch -> hidden states [T, H], with its head, or its scores, apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import ModelError
from ..logprobs import Head
from ..surgery import adapters_off, replaced
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
                given[virtual.cache_keyword(self.model)] = kept
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


def prepare(network: Network, wanted: str) -> str | None:
    """Switch to packed attention if the family allows it exactly; else the reason why it runs padded."""
    reason = None if wanted == "padded" else _try_packed(network)
    if wanted == "padded" or reason is None:
        return None
    if wanted == "packed":
        raise ModelError(f"model.attention=packed: {type(network.model).__name__} cannot run packed: {reason}")
    return reason


LAYERS = {"full_attention", "sliding_attention"}


def unpackable(network: Network) -> str | None:
    """Why a family cannot run packed, as far as its configuration says so."""
    if network.takes == "whole":
        return "its head is not known here, and runs with the whole model"
    if network.native == "eager":
        return "its layers do not use transformers' attention interface"
    other = set(getattr(network.config.get_text_config(), "layer_types", None) or ()) - LAYERS
    return f"it has layers of the kinds {', '.join(sorted(other))}" if other else None


def pack(network: Network) -> None:
    """Switch to packed attention, untried."""
    attention.install()
    network.model.set_attn_implementation(attention.NAME)
    network.packed = True


def unpack(network: Network) -> None:
    """Back to the family's own attention, over padded rows."""
    network.packed = False
    network.model.set_attn_implementation(network.native)


def _try_packed(network: Network) -> str | None:
    if reason := unpackable(network):
        return reason
    attention.install()
    training, reason = network.model.training, None
    # Some encoders count positions from the number after that of the token that texts are filled up with.
    counted = [m for m in network.model.modules() if hasattr(m, "create_position_ids_from_input_ids")]
    for first in (0, *(m.padding_idx + 1 for m in counted)):
        network.first_position = first
        try:
            reason = _probe(network)
        except (attention.Unsupported, ValueError, TypeError, RuntimeError, IndexError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        finally:
            network.model.train(training)
        if reason is None:
            break
        network.model.set_attn_implementation(network.native)
    network.packed = reason is None
    return reason


def _probe_batch(network: Network) -> Batch:
    """Two short documents of tokens far apart."""
    vocabulary = network.config.get_text_config().vocab_size
    tokens = (torch.arange(12) * 7919 + 11) % min(vocabulary, 1 << 15)
    if network.ends_in != "tokens":  # what rows are filled up with may mean something
        tokens = torch.where(tokens == network.padding, (tokens + 1) % vocabulary, tokens)
    positions = torch.cat([torch.arange(5), torch.arange(7)])
    made = Batch(tokens, positions=positions, ends=(0, 5, 12), targets=tokens, weights=torch.ones(12),
                 trained=torch.arange(12))  # fmt: skip
    return made.to(network.device)


@torch.no_grad()
def _probe(network: Network) -> str | None:
    """Two short documents packed against the model's own attention, and against other neighbours."""
    batch = _probe_batch(network)
    training = network.model.training
    network.model.eval()
    plain = network._padded(batch)
    network.model.train(training)
    calls: list[int | None] = []

    def spy(*args: object, sliding_window: int | None = None, **kwargs: object):
        calls.append(sliding_window)
        return attention.packed_attention(*args, sliding_window=sliding_window, **kwargs)  # type: ignore[arg-type]

    from transformers import AttentionInterface

    try:
        AttentionInterface.register(attention.NAME, spy)
        network.model.set_attn_implementation(attention.NAME)
        if training:
            network._packed(batch)  # refuses attention dropout where its kernel has none
        network.model.eval()
        calls.clear()
        packed = network._packed(batch)
    finally:
        attention.install()
    if not calls:
        return "its layers do not use transformers' attention interface"
    kinds = getattr(network.config.get_text_config(), "layer_types", None) or ()
    sliding = sum(kind == "sliding_attention" for kind in kinds)
    if sliding != sum(window is not None for window in calls) and sliding:
        return "its sliding windows do not reach the attention function"
    tolerance = 1e-3 if packed.dtype == torch.float32 else 6e-2
    if (packed - plain).abs().max() > tolerance * plain.abs().max():
        return "packed and padded rows give different hidden states"
    vocabulary = network.config.get_text_config().vocab_size
    moved = batch.positions.new_tensor([1] * 5 + [0] * 7)
    other = replace(batch, tokens=(batch.tokens + moved) % vocabulary)
    if not torch.equal(network._packed(other)[5:], packed[5:]):
        return "a document changes with its neighbour"
    network.shares = network.causal and _shares_exactly(network, batch)
    return None


def _shares_exactly(network: Network, batch: Batch) -> bool:
    """Whether a document that begins as the one before it does comes out as it does alone."""
    tokens = batch.tokens.clone()
    tokens[5:9] = tokens[:4]
    batch = replace(batch, tokens=tokens.cpu()).to(network.device)
    assert batch.alike() == (0, 4)
    try:
        network.shares = False
        apart = network._packed(batch)
        network.shares = True
        together = network._packed(batch)
    except RuntimeError:
        return False
    tolerance = 1e-3 if apart.dtype == torch.float32 else 6e-2
    if (together - apart).abs().max() > tolerance * apart.abs().max():
        return False
    config = network.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if isinstance(heads, int) else 64)
    return attention.aligned(width, network.dtype, network.device)


def check_direction(network: Network) -> None:
    """Virtual tokens stand before a document: where tokens see what follows, they are no start that all have alike."""
    if not network.causal and virtual.of(network.model) is not None:
        raise ModelError(
            f"{type(network.model).__name__} is an encoder, whose tokens see those after them, and virtual tokens are "
            "for decoders: use trainable.kind=lora"
        )


@torch.no_grad()
def check_virtual(network: Network, checkpointed: bool = False) -> None:
    """Virtual tokens must reach every layer: packed rows against the model's own attention, and against none at all."""
    found = virtual.of(network.model)
    if found is None:
        return
    what = f"{type(network.model).__name__} with virtual tokens"
    if found.prefix is not None and checkpointed and not network.packed:
        raise ModelError(
            f"{what}: in padded rows a prefix lies in the cache, which layers that are recomputed do without: use "
            "parallel.activation_checkpointing=0"
        )
    tokens = torch.arange(12) + 5
    rest = {"positions": torch.cat([torch.arange(5), torch.arange(7)]), "ends": (0, 5, 12), "targets": tokens,
            "weights": torch.ones(12), "trained": torch.arange(12)}  # fmt: skip
    batch = Batch(tokens, **rest).to(network.device)
    training = network.model.training
    try:
        with network.natively():
            plain = network._padded(batch)
            with adapters_off(network.model):
                without = network._padded(batch)
        network.model.eval()
        hidden = network._packed(batch) if network.packed else plain
    except (attention.Unsupported, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ModelError(f"{what} does not run: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    finally:
        network.model.train(training)
    if torch.equal(plain, without):
        raise ModelError(f"{what} computes what it computes without them")
    apart, size = (hidden - plain).float().norm(), plain.float().norm()
    allowed = 1e-3 * size
    if hidden.dtype != torch.float32:  # through many layers, 16 bits drift the further, the stranger the tokens are
        allowed = torch.maximum(6e-2 * size, 0.25 * (plain - without).float().norm())
    if apart > allowed:
        raise ModelError(
            f"{what}: packed and padded rows give different hidden states: use model.attention=padded, and please "
            "report the family"
        )


@torch.no_grad()
def check_head(network: Network) -> None:
    """Our head on the decoder's output must give the model's own logits, whatever its family does to them."""
    with network.natively() as model:
        tokens = torch.arange(4, device=network.device)[None] + 5
        theirs = model(input_ids=tokens, use_cache=False).logits[0].float()
        ours = network.head(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]).float()
    if ours.shape != theirs.shape or (ours - theirs).abs().max() > 2e-2 * theirs.abs().max().clamp(min=1e-3):
        raise ModelError(
            f"{type(network.model).__name__} changes its logits in a way that is not known here "
            f"(largest difference {(ours - theirs).abs().max():.3g}); please report the family"
        )


@torch.no_grad()
def is_causal(network: Network) -> bool:
    """Whether no token sees those after it."""
    with network.natively() as model:
        tokens = torch.arange(6, device=network.device).repeat(2, 1) + 2
        tokens[1, -1] += 1
        hidden = model.base_model(input_ids=tokens).last_hidden_state[:, :-1]
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 1e-2  # at a random start, a token moves others but little
    return bool((hidden[0] - hidden[1]).abs().max() <= tolerance * hidden.abs().max())


def check_causal(network: Network) -> None:
    """A network that sees the token it is to predict learns nothing: some encoders load as if they were decoders."""
    if not is_causal(network):
        raise ModelError(
            f"{type(network.model).__name__} sees the tokens after each one: it is no causal language model"
        )


def guess_scores(network: Network) -> None:
    """The same from the layers alone, where nothing can be computed: of an encoder a text's first token counts."""
    network.causal = all(getattr(m, "is_causal", True) is not False for m in network.model.modules())
    network.takes = "last" if network.causal else "first"


def find_scores(network: Network) -> None:
    """How the model makes its scores, told from two short texts, a long and a short one: whether it sees what follows,
    and of which hidden states its head makes the scores. Where that is not found, its own forward pass makes them."""
    network.causal = is_causal(network)
    batch = _probe_batch(network)
    kept = heads.parameters(network.model)
    generator = torch.Generator().manual_seed(0)  # a new head may be so small, or so even, that nothing can be told
    drawn = {n: torch.randn(p.shape, generator=generator).to(p) * 0.2 for n, p in kept.items()}
    with network.natively(), torch.no_grad(), replaced(kept, drawn):
        scores, inside = network._whole(batch)
        wanted = (scores if network.ends_in == "text" else scores[inside]).float()
        before = network.packed
        network.packed = False
        try:
            network.takes = next((takes for takes in heads.TAKES if _gives(network, takes, batch, wanted)), "whole")
        finally:
            network.packed = before


def _gives(network: Network, takes: str, batch: Batch, wanted: Tensor) -> bool:
    """Whether the head makes the model's own scores of these hidden states."""
    network.takes = takes
    try:
        found = network.scores(batch).float()
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
        return False
    tolerance = 1e-3 if network.dtype == torch.float32 else 2e-2
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())
