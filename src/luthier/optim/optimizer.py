"""The optimiser of a run: groups, masters, rounding, scaled gradients and state around one rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..checkpoint import load_into
from ..errors import ConfigError
from . import Optim, groups
from .rounding import round_, seed_of
from .rule import Item, Now, Rule, Slots

Clip = Callable[[str, Tensor, Tensor], None]


class Optimizer:
    """Steps named parameters; gradients are multiplied by a scale on the way, never rewritten.

    `roles` says which parameters are embeddings and heads (`surgery.roles`); `clip` changes a copy of a parameter's
    mean gradient in place, given its name, that gradient and the weight.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: Optim,
        *, roles: Mapping[str, str] | None = None, clip: Clip | None = None, seed: int = 0,
    ):  # fmt: skip
        self.parameters, self.config, self.clip, self.seed = dict(parameters), config, clip, seed
        self.buckets = groups.buckets(self.parameters, config, roles or {})
        self.rules: dict[bool, Rule] = {h: config.rule(h) for h in sorted({b.hidden for b in self.buckets})}
        self.counts = dict.fromkeys(self.parameters, 0)  # steps of each parameter: not all move from the first one on
        self.slots: dict[str, Slots] = {}
        self.masters: dict[str, Tensor] = {}
        for bucket in self.buckets:
            for name in bucket.names:
                p = self.parameters[name]
                self.slots[name] = self.rules[bucket.hidden].slots(p.detach())
                if p.dtype != torch.float32 and config.rounding == "master":
                    self.masters[name] = p.detach().float().contiguous()
        if config.rounding != "master":
            _check_rounding(self.parameters, config)
        self.home = {name: bucket for bucket in self.buckets for name in bucket.names}
        self._armed: tuple[float, Tensor] | None = None
        self._norms: list[Tensor] = []  # of gradients that are gone
        if config.fused_backward:
            for name, p in self.parameters.items():
                p.register_post_accumulate_grad_hook(partial(self._in_backward, name))

    def describe(self) -> list[str]:
        return groups.described(self.buckets, self.parameters, self.config)

    # ------------------------------------------------------------------ stepping
    def norm(self) -> Tensor:
        """The norm [] float32 of all gradients, also of those that a fused step has used and freed."""
        norms = self._norms or norms_of([p.grad for p in self.parameters.values() if p.grad is not None])
        self._norms = []
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    @torch.no_grad()
    def step(self, factor: float, scale: Tensor) -> None:
        """One step at `factor` times the peak rates, with gradients times `scale` [] on the device."""
        for rule in self.rules.values():
            rule.begin(factor)
        for bucket in self.buckets:
            names = [name for name in bucket.names if self.parameters[name].grad is not None]
            if names:
                self._move(bucket, names, factor, scale)

    def arm(self, factor: float, scale: Tensor) -> None:
        """Let the next backward pass step each parameter as soon as its gradient is there."""
        assert self.config.fused_backward
        for rule in self.rules.values():
            rule.begin(factor)
        self._armed = (factor, scale)

    @torch.no_grad()
    def _in_backward(self, name: str, p: nn.Parameter) -> None:
        assert self._armed is not None, "arm the optimiser before the backward pass"
        assert p.grad is not None
        self._norms += norms_of([p.grad])
        self._move(self.home[name], [name], *self._armed)
        p.grad = None

    def _move(self, bucket: groups.Bucket, names: Sequence[str], factor: float, scale: Tensor) -> None:
        rule, now = self.rules[bucket.hidden], Now(bucket.rate * factor, bucket.decay, scale, self.clip)
        for item in rule.fast([self._item(name) for name in names], now):
            self._one(rule, item, now)

    def _item(self, name: str) -> Item:
        p = self.parameters[name]
        self.counts[name] += 1
        count = self.counts[name]
        stochastic = self.config.rounding == "stochastic" and p.dtype != torch.float32
        seed = seed_of(self.seed, name, count) if stochastic else None
        return Item(name, p, self.masters.get(name), self.slots[name], count, seed)

    @staticmethod
    def _one(rule: Rule, item: Item, now: Now) -> None:
        p = item.parameter.detach()
        weight = p if item.plain else item.master if item.master is not None else p.float()
        rule.update(weight, now.gradient(item), item.slots, now.learning_rate, now.decay, item.count)
        if not item.plain:
            round_(p, weight, item.seed)

    def zero_grad(self) -> None:
        self._armed = None
        for p in self.parameters.values():
            p.grad = None

    # ------------------------------------------------------------------ the weights that count
    @torch.no_grad()
    def averaged(self) -> dict[str, Tensor]:
        """The weights to evaluate and to export, in the parameters' dtypes; empty where they are those trained."""
        out = {}
        for name, p in self.parameters.items():
            weight = self.masters.get(name, p.detach()).float()
            made = self.rules[self.home[name].hidden].averaged(weight, self.slots[name])
            if made is not None:
                out[name] = made.to(p.dtype)
        return out

    def weights(self) -> dict[str, Tensor]:
        """The weights as they are stepped: float32 masters where there are any."""
        return {name: self.masters.get(name, p) for name, p in self.parameters.items()}

    # ------------------------------------------------------------------ a part of the checkpoint
    def tensors(self) -> dict[str, Tensor]:
        out = {f"master.{name}": t for name, t in self.masters.items()}
        return out | {f"{slot}.{name}": t for name, slots in self.slots.items() for slot, t in slots.items()}

    def numbers(self) -> dict:
        return {"counts": self.counts, "rules": [rule.numbers() for rule in self.rules.values()]}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping) -> None:
        load_into(self.tensors(), tensors, "optimiser")
        self.counts = dict(numbers["counts"])
        for rule, kept in zip(self.rules.values(), numbers["rules"], strict=True):
            rule.restore(kept)


def norms_of(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The norm [] of each, accumulated and kept in float32 whatever the gradients' dtype."""
    alike: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        alike.setdefault(gradient.dtype, []).append(gradient)
    return [n for same in alike.values() for n in torch._foreach_norm(same, 2, torch.float32)]


def _check_rounding(parameters: Mapping[str, nn.Parameter], config: Optim) -> None:
    dtypes = {p.dtype for p in parameters.values()} - {torch.float32}
    if not dtypes:
        raise ConfigError(
            f"optim.rounding={config.rounding}: all that moves is kept in float32 and never rounded; leave it out, or "
            "train weights that precision.dtype=bfloat16 keeps in 16 bits"
        )
    if config.rounding == "stochastic" and dtypes != {torch.bfloat16}:
        raise ConfigError(f"optim.rounding=stochastic is for bfloat16; here are {sorted(map(str, dtypes))}")
