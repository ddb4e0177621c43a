"""Operations on a network's modules: freeze, match by name, swap, adapters and switching them off."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import ModelError


def freeze(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that move, by name, each once although it may be tied."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def matches(name: str, pattern: str) -> bool:
    """`pattern` is a whole dotted name, its end, a glob (`*.mlp.*`), or a regular expression after `re:`."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or name.endswith("." + pattern) or fnmatch.fnmatchcase(name, pattern)


def linear_shape(module: Any) -> tuple[int, int] | None:
    """(in, out) features of a linear layer, plain, quantised, wrapped or GPT-2's Conv1D; None of anything else."""
    if isinstance(module, Adapter):
        return linear_shape(module.base)
    if isinstance(module, nn.Linear | QuantisedLinear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return module.weight.shape[0], module.nf
    return None


def transposed(module: nn.Module) -> bool:
    """Whether a linear layer, or the plain one that it was made from, keeps its weight as [in, out]."""
    return type(module).__name__ == "Conv1D" or (isinstance(module, QuantisedLinear) and module.turned)


def device_of(module: nn.Module) -> torch.device:
    """Where a layer is; one in fewer bits may have no parameters."""
    return next(chain(module.parameters(), module.buffers())).device


def roles(model: Any) -> dict[str, str]:
    """Parameter -> `embedding`, `head` (also where that is tied to an embedding) or `transposed`; no other is named."""
    found = {}
    head = model.get_output_embeddings()
    for module in model.modules():
        embeds = isinstance(module, nn.Embedding) or module is model.get_input_embeddings()
        if embeds or transposed(module):
            found |= dict.fromkeys(map(id, module.parameters()), "embedding" if embeds else "transposed")
    found |= dict.fromkeys(map(id, head.parameters() if head is not None else ()), "head")
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


TASKS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}  # PEFT's names for them


def task(model: nn.Module) -> str:
    """What a transformers model is for, in PEFT's words; a model that scores texts or tokens has a head for that."""
    return next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), "CAUSAL_LM")


def heads(model: Any) -> list[str]:
    """The modules that make scores of hidden states, where the model ends in scores; also a pooler inside the base."""
    if task(model) == "CAUSAL_LM":
        return []
    base = model.base_model_prefix
    found = [(name, child) for name, child in model.named_children() if name != base]
    pooler = getattr(model.base_model, "pooler", None)
    if isinstance(pooler, nn.Module):
        found.insert(0, (f"{base}.pooler", pooler))
    return [n for n, m in found if next(m.parameters(), None) is not None and not isinstance(m, VirtualTokens)]


def cache_keyword(model: Any) -> str:
    """What a decoder calls its cache: `past_key_values` until transformers 5.23."""
    return "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of the network's layers and its name: the longest `ModuleList` whose members are of one class."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of layers")
    return max(found, key=lambda item: (sum(p.numel() for p in item[1].parameters()), len(item[1])))


@contextmanager
def watched(layers: nn.ModuleList, wanted: Collection[int], found: dict[int, Tensor]) -> Iterator[None]:
    """While it lasts, the output of each of the layers `wanted` goes into `found`, compiled ones' too."""

    def keep(at: int, out: Any) -> Any:
        found[at] = out[0] if isinstance(out, tuple) else out
        return out

    handles, calls = [], {}
    for at in wanted:
        layer: Any = layers[at]
        if (call := layer._compiled_call_impl) is None:
            handles.append(layer.register_forward_hook(lambda _, given, out, at=at: keep(at, out)))
        else:  # hooks would be parts of its graph
            calls[at] = call
            layer._compiled_call_impl = lambda *a, call=call, at=at, **k: keep(at, call(*a, **k))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for at, call in calls.items():
            layers[at]._compiled_call_impl = call


class QuantisedLinear(nn.Module):
    """A frozen linear layer whose weight is kept in fewer bits than it computes in; its parts are buffers."""

    kind: str = ""
    """Of its numbers, as precision.kind has it."""
    in_features: int
    out_features: int
    dtype: torch.dtype
    """In which the weight is multiplied."""
    bias: Tensor | None
    turned: bool = False
    """Whether the plain layer that it was made from keeps its weight as [in, out]."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that the layer multiplies with."""
        raise NotImplementedError


class Storage(Protocol):
    """How frozen layers are kept in fewer bits, for those who load them."""

    kind: str

    def names(self, model: nn.Module) -> list[str]:
        """The layers of a plain model that are kept so."""
        ...

    def layer(self, plain: nn.Module) -> QuantisedLinear:
        """In place of a plain layer, on the device that this is on."""
        ...

    def ready(self, plain: nn.Module, stored: Mapping[str, Tensor]) -> QuantisedLinear:
        """In place of a plain layer whose weight a checkpoint keeps so: its tensors by the ends of their names."""
        ...


class Switched(nn.Module):
    """A part that was added to a network and can be switched off; its `name` tells several adapters apart."""

    enabled: bool = True
    name: str = "default"
    source: Any = None
    """The saved adapter that it was loaded from, if it was."""


class VirtualTokens(Switched):
    """Learnt positions before every document, a child of the transformers model; `Network` puts them there.

    They are kept in float32. A kind gives embeddings or a prefix.
    """

    length: int
    """P."""

    def embeddings(self) -> Tensor | None:
        """[P, H] what the first layer takes in at these positions."""
        return None

    def prefix(self) -> Tensor | None:
        """[layers, 2, K, P, d] keys and values of these positions in each layer, for K heads of width d."""
        return None


def attach(model: nn.Module, tokens: VirtualTokens, name: str) -> None:
    """Put virtual tokens into a model, after those that are there."""
    place = "virtual_tokens" if name == "default" else f"virtual_tokens_{name.replace('.', '_')}"
    if hasattr(model, place):
        raise ModelError(f"two adapters of the name {name!r}: give one of them another")
    tokens.name = name
    model.add_module(place, tokens)


class Rule(Protocol):
    """What one kind of adapter is: its parameters beside a layer, and its arithmetic."""

    mergeable: bool

    def start(self, layer: Adapter) -> None:
        """Give the layer its parameters, with values that leave the output of `layer.base` as it is."""
        ...

    def forward(self, layer: Adapter, *inputs: Any, **more: Any) -> Any: ...

    def merge(self, layer: Adapter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a plain layer that computes the same as `tensors` (from `dense`) with this adapter does."""
        ...

    def saved(self, layer: Adapter) -> dict[str, Tensor]:
        """The layer's parameters under the names that they have in an adapter file."""
        ...

    # Where there are any: `constants`, the names of buffers that a checkpoint needs beside what moves; and
    # `stand_in(layer)`, a plain layer that computes the same.


class Adapter(Switched):
    """What wraps a layer `base`, plain, quantised or wrapped itself, and changes what it gives as its `rule` says."""

    base: Any
    share: float = 1.0
    """Factor of its change, where adapters are combined with weights."""
    choice: Callable[..., Any] | None = None
    """Where rows have adapters of their own: what computes them all, of the outermost adapter of a layer."""

    def __init__(self, base: Any, rule: Rule, name: str = "default"):
        super().__init__()
        self.base, self.rule, self.name = base, rule, name
        rule.start(self)

    @property
    def weight(self) -> Any:
        """Of the layer beneath, as other libraries ask an embedding and a head for it."""
        return self.base.weight

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def plain(self) -> nn.Module | None:
        """The layer that computes the same by itself, where there is one: beneath a switched off adapter, a copy."""
        if not self.enabled:
            return self.base.plain if isinstance(self.base, Adapter) else self.base
        return getattr(self.rule, "stand_in", lambda layer: None)(self)

    def forward(self, *inputs: Any, **more: Any) -> Any:
        if self.choice is not None:
            return self.choice(self, *inputs, **more)
        return self.rule.forward(self, *inputs, **more) if self.enabled else self.base(*inputs, **more)


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            yield name, module


def added(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that adapters and virtual tokens brought, also those inside of other adapters."""
    found = [module for module in model.modules() if isinstance(module, Switched)]
    return [p for m in found for n, p in m.named_parameters() if not (isinstance(m, Adapter) and n.startswith("base."))]


def outer(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by name but those inside adapters: of a wrapped layer, its outermost adapter alone."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name.startswith(inside or "\0"):
            yield name, module
            if isinstance(module, Adapter):
                inside += (name + ".",)


def constants(model: nn.Module) -> dict[str, Tensor]:
    """What adapters drew from their base at the start and need ever after, though it does not move."""
    return {
        f"{name}.{leaf}": getattr(adapter, leaf)
        for name, adapter in adapters(model)
        for leaf in getattr(adapter.rule, "constants", ())
        if getattr(adapter, leaf) is not None
    }


def switched(model: nn.Module, name: str | None = None) -> list[Switched]:
    """The parts of the adapter of this name, or of all."""
    return [m for m in model.modules() if isinstance(m, Switched) and name in (None, m.name)]


def names(model: nn.Module) -> list[str]:
    """The names of the adapters of a model, sorted."""
    return sorted({module.name for module in switched(model)})


@contextmanager
def _enabled(wanted: Mapping[Switched, bool]) -> Iterator[None]:
    before = {module: module.enabled for module in wanted}
    try:
        for module, state in wanted.items():
            module.enabled = state
        yield
    finally:
        for module, state in before.items():
            module.enabled = state


def adapters_off(model: nn.Module, names: Collection[str] | None = None) -> AbstractContextManager[None]:
    """The model as it was before its adapters, or before those of these names."""
    return _enabled({m: False for m in switched(model) if names is None or m.name in names})


def adapters_on(model: nn.Module, names: Collection[str]) -> AbstractContextManager[None]:
    """The model with the adapters of these names on, and the others as they are."""
    return _enabled({m: True for m in switched(model) if m.name in names})


def remove(model: nn.Module, name: str) -> None:
    """Take the adapters of this name out again: wrapped layers come back, other parts go from where they were put."""
    for place, module in reversed(list(model.named_modules())):  # inner ones first: names of outer ones stay true
        if isinstance(module, Switched) and module.name == name:
            if isinstance(module, Adapter):
                swap(model, place, module.base)
            else:
                parent, _, leaf = place.rpartition(".")
                delattr(model.get_submodule(parent), leaf)


def dense(module: Any) -> dict[str, Tensor]:
    """A layer's tensors by name in float32, weights as [out, in], whatever its precision, with its adapters merged."""
    if isinstance(module, Adapter):
        tensors = dense(module.base)
        return module.rule.merge(module, tensors) if module.enabled else tensors
    if isinstance(module, QuantisedLinear):
        bias = {} if module.bias is None else {"bias": module.bias.float()}
        return {"weight": module.dequantize(torch.float32), **bias}
    tensors = {name: parameter.float() for name, parameter in module.named_parameters()}
    return tensors | {"weight": tensors["weight"].t()} if transposed(module) else tensors


def innermost(module: Any) -> Any:
    """The layer that adapters wrap."""
    return innermost(module.base) if isinstance(module, Adapter) else module


@contextmanager
def replaced(named: Mapping[str, Tensor], values: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Other values in named tensors for a while; None leaves them alone."""
    if values is None:
        yield
        return
    before = {name: tensor.detach().clone() for name, tensor in named.items()}
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(values[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in named.items():
                tensor.copy_(before[name])


@contextmanager
def swapped(named: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values in some of the named tensors for a while, exchanged with theirs without a copy."""

    def exchange() -> None:
        for name, value in values.items():
            named[name].data, value.data = value.data, named[name].data

    exchange()
    try:
        yield
    finally:
        exchange()


@contextmanager
@torch.no_grad()
def merged(model: nn.Module) -> Iterator[None]:
    """The network with plain copies of its linear layers, adapters merged in, in the place of those for a while."""
    wrapped = [
        (name, module) for name, module in outer(model)
        if isinstance(module, Adapter) and linear_shape(module) and _all_merge(module)
    ]  # fmt: skip
    try:
        for name, module in wrapped:
            swap(model, name, _merged_layer(module))
        yield
    finally:
        for name, module in wrapped:
            swap(model, name, module)


def _merged_layer(module: Any) -> nn.Linear:
    tensors, layer = _plain(module, None), innermost(module)
    weight = tensors["weight"].t() if transposed(layer) else tensors["weight"]
    copy = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors, device="meta")
    copy.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if "bias" in tensors:
        copy.bias = nn.Parameter(tensors["bias"], requires_grad=False)
    return copy


def _all_merge(module: Any) -> bool:
    if not isinstance(module, Adapter):
        return True
    return (module.rule.mergeable or not module.enabled) and _all_merge(module.base)


def base_name(name: str) -> str:
    """The name that a parameter had before adapters wrapped its layer."""
    return re.sub(r"\.base(?=\.|$)", "", name)


@torch.no_grad()
def merged_state(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state of the network with its adapters merged into copies; the live weights stay as they are.

    Floating point comes out in `dtype`; without one in that of each tensor, and weights that are kept in fewer bits in
    the dtype that they compute in.
    """
    changed = {n + ".": m for n, m in outer(model) if isinstance(m, Adapter | QuantisedLinear)}
    added = tuple(name + "." for name, module in model.named_children() if isinstance(module, Switched))
    skipped = tuple(changed) + added
    state = {n: t.detach() for n, t in model.state_dict(keep_vars=True).items() if not n.startswith(skipped or "\0")}
    for name, module in changed.items():
        state |= {name + leaf: tensor for leaf, tensor in _plain(module, dtype).items()}
    if dtype is None:
        return state
    rounded: dict[tuple, Tensor] = {}  # tied tensors stay one
    for name, tensor in state.items():
        if tensor.is_floating_point():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride())
            state[name] = rounded[key] if key in rounded else rounded.setdefault(key, tensor.to(dtype))
    return state


def _plain(module: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state of a plain layer in place of one that is wrapped or kept in fewer bits."""
    layer, tensors = innermost(module), dense(module)
    if transposed(layer):
        tensors["weight"] = tensors["weight"].t()
    if isinstance(layer, QuantisedLinear):
        return {leaf: t.to(dtype or layer.dtype).contiguous() for leaf, t in tensors.items()}
    return {
        leaf: tensors[leaf].to(dtype or t.dtype) if leaf in tensors else t for leaf, t in layer.state_dict().items()
    }
