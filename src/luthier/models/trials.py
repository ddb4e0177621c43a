"""What a network is tried for when it is loaded: packed rows, what it sees, its head, its scores, virtual tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..batch import Batch
from ..errors import ModelError
from ..surgery import adapters_off, replaced
from . import attention, heads, virtual
from .network import Network


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
