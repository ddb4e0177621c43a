"""Groups: which parameters are stepped together, at what rate, with what decay, by which rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from ..errors import ConfigError
from ..settings import did_you_mean
from ..surgery import base_name, matches
from . import Muon, Optim, Optimisation


@dataclass
class Bucket:
    """Parameters of one rule, rate and decay."""

    rate: float  # the peak
    decay: float
    hidden: bool  # matrices inside the network, where the optimiser tells them from the rest
    because: tuple[str, ...]  # what of the configuration set them apart
    names: list[str] = field(default_factory=list)


def buckets(parameters: Mapping[str, nn.Parameter], config: Optim, roles: Mapping[str, str]) -> list[Bucket]:
    """All parameters, each in one bucket; a pattern that matches none of them is an error."""
    chosen = _chosen(parameters, config)
    made: dict[tuple, Bucket] = {}
    for name, p in parameters.items():
        hidden = p.ndim >= 2 and min(p.shape[-2:]) > 1 and roles.get(name) not in ("embedding", "head")
        rate, decay, because = config.learning_rate, config.weight_decay, []
        if isinstance(config, Muon):
            because.append("hidden matrices by Muon" if hidden else "the rest by AdamW")
            if not hidden and config.adamw_learning_rate is not None:
                rate = config.adamw_learning_rate
        if name in chosen:
            group = config.groups[chosen[name]]
            rate = group.learning_rate or rate * (group.lr_scale or 1.0)
            decay = decay if group.weight_decay is None else group.weight_decay
            because.append(f"optim.groups[{chosen[name]}]")
        if config.loraplus_lr_ratio is not None and is_b(name):
            rate *= config.loraplus_lr_ratio
            because.append("LoRA+")
        decay = decay if p.ndim >= 2 else 0.0
        bucket = Bucket(rate, decay, hidden and isinstance(config, Muon), tuple(because))
        made.setdefault((rate, decay, bucket.hidden, bucket.because), bucket).names.append(name)
    if config.loraplus_lr_ratio is not None and not any(is_b(name) for name in parameters):
        raise ConfigError(
            f"optim.loraplus_lr_ratio={config.loraplus_lr_ratio}: no matrix B of a LoRA moves here; leave it out"
        )
    return list(made.values())


def _chosen(parameters: Mapping[str, nn.Parameter], config: Optimisation) -> dict[str, int]:
    """Parameter -> the first group that names it."""
    chosen: dict[str, int] = {}
    for number, group in enumerate(config.groups):
        key = f"optim.groups[{number}]"
        mine: set[str] = set()
        for pattern in [group.patterns] if isinstance(group.patterns, str) else group.patterns:
            found = {name for name in parameters if any(matches(part, pattern) for part in prefixes(name))}
            if not found:
                parts = {part for name in parameters for part in (*prefixes(name), *name.split("."))}
                meant = did_you_mean(pattern, parts, f"; {next(iter(parameters))!r} is one that does")
                raise ConfigError(f"{key}.patterns: {pattern!r} matches no parameter that moves{meant}")
            mine |= found
        left = [name for name in parameters if name in mine and name not in chosen]
        if not left:
            raise ConfigError(f"{key}.patterns: all that it names belongs to groups before it; put it before them")
        if group.weight_decay and all(parameters[name].ndim < 2 for name in left):
            raise ConfigError(
                f"{key}.weight_decay={group.weight_decay}: norms and biases never decay, and the group holds nothing "
                "else; leave it out"
            )
        chosen |= dict.fromkeys(left, number)
    return chosen


def prefixes(name: str) -> list[str]:
    """The parameter's name and the names of the modules around it, also as they were before layers were wrapped."""
    names = dict.fromkeys((name, base_name(name))).keys()
    return [".".join(parts[:i]) for parts in (n.split(".") for n in names) for i in range(1, len(parts) + 1)]


def is_b(name: str) -> bool:
    """Whether a parameter is the matrix B of a LoRA, zero at the start."""
    return "lora_B" in name.split(".")


def described(made: list[Bucket], parameters: Mapping[str, nn.Parameter], config: Optim) -> list[str]:
    """A line for each bucket, for people."""
    lines = []
    for bucket in made:
        weights = sum(parameters[name].numel() for name in bucket.names)
        why = f" ({', '.join(bucket.because)})" if bucket.because else ""
        lines.append(
            f"{config.kind}: {len(bucket.names)} tensors, {weights:,} weights at rate {bucket.rate:.3g}, "
            f"decay {bucket.decay:.3g}{why}"
        )
    return lines
