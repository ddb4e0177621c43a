"""A run, a model in a folder or on the hub, or a GGUF file: whatever it was, a network that can be asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import read_run
from .errors import ModelError
from .models import Model, names
from .parallel import Parallel
from .precision import AsLoaded

if TYPE_CHECKING:
    import torch

    from .assembled import Assembled
    from .data.masks import Renderer
    from .models import network

Say = Callable[[str], None]


@dataclass
class Opened:
    """What was opened, in evaluation and without gradients."""

    name: str
    """As it was named."""
    network: network.Network
    renderer: Renderer
    made: Assembled | None = None
    """Of a run: its configuration, its objective, its base."""

    @property
    def tokenizer(self) -> Any:
        return self.renderer.tokenizer

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.network.model


def is_run(name: str | Path) -> bool:
    return (Path(name).expanduser() / "config.yaml").is_file()


def problem(name: str) -> str | None:
    """Why it cannot be opened, as far as its files say without being loaded. A broken run raises ConfigError."""
    if is_run(name):
        read_run(Path(name).expanduser())
        return None
    return names.problem(names.resolved(Model(name=name)))  # type: ignore[call-arg]


def opened(name: str, tell: Say = lambda text: None, dtype: torch.dtype | None = None) -> Opened:
    """Load it, on this process's device.

    Of a run its best checkpoint, in the precision that it was trained in. Of a plain model the weights in `dtype`, by
    default float32 on a CPU and bfloat16 on a GPU. Raises ConfigError or ModelError, naming what is wrong.
    """
    if text := None if is_run(name) else problem(name):
        raise ModelError(text)
    from .assemble import restore
    from .data.masks import Renderer
    from .models import load, network, trials
    from .parallel.ranks import Ranks

    if is_run(name):
        made, _ = restore(Path(name).expanduser(), tell)
        made.network.requires_grad_(False).eval()
        return Opened(name, made.network, made.renderer, made)
    resolved = names.resolved(Model(name=name))  # type: ignore[call-arg]
    tokenizer = load.load_tokenizer(resolved)
    device = Ranks(Parallel()).device  # type: ignore[call-arg]
    made = load.load_model(resolved, dtype or AsLoaded().resolve(device), device, tell=tell)
    net = network.Network(made)
    trials.check_head(net)
    net.requires_grad_(False).eval()
    return Opened(name, net, Renderer(tokenizer, "all", 1 << 30))
