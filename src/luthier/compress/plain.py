"""A source as a plain network: a run's best checkpoint with its adapters merged, or a model as it lies there."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import surgery
from ..assemble import quietly
from ..config import Config, read_run
from ..data.masks import Renderer
from ..errors import ModelError
from ..models import Model, load, names, network, streaming, trials
from ..opened import is_run, opened
from ..parallel import Parallel
from ..parallel.ranks import Ranks
from ..precision import QAT
from ..trainable import adapter_files
from ..trainable.adapter import Adapting

Say = Callable[[str], None]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Plain:
    """A transformers model without adapters, in evaluation, and what asks and measures it."""

    name: str
    """As the source was named."""
    model: Any
    renderer: Renderer
    ranks: Ranks
    dtype: torch.dtype
    """Of the numbers in the source's files; it computes in another on a CPU."""
    run: Config | None = None
    """Where the source is one."""
    _network: network.Network | None = None

    @property
    def tokenizer(self) -> Any:
        return self.renderer.tokenizer

    @property
    def packed(self) -> bool:
        """Whether the model has been made to run packed rows."""
        return self._network is not None

    @property
    def network(self) -> network.Network:
        """Rows packed through the model as training packs them; made where it is first asked for."""
        if self._network is None:
            self._network = _network(self.model)
        return self._network

    def with_model(self, model: Any, made: network.Network | None = None) -> Plain:
        """Another network with the same tokens; `made` where it runs packed rows already."""
        return Plain(self.name, model, self.renderer, self.ranks, self.dtype, self.run, made)


def _network(model: Any) -> network.Network:
    made = network.Network(model)
    trials.check_head(made)
    trials.prepare(made, "auto")
    return made.requires_grad_(False).eval()


def check(source: str) -> None:
    """What can be said of a source before it is loaded: ConfigError, CheckpointError or ModelError."""
    if not is_run(source):
        if text := names.problem(names.resolved(Model(name=source))):  # type: ignore[call-arg]
            raise ModelError(text)
        if found := names.ready_made(Model(name=source)):  # type: ignore[call-arg]
            raise ModelError(
                f"{source} is quantised already ({found.get('quant_method')}): give the model that it was made from"
            )
        return
    config = read_run(Path(source).expanduser())
    if config.objective.ends_in != "tokens":
        raise ModelError(f"{source} is a run of method={config.method}, whose network predicts no tokens")
    if isinstance(config.precision, QAT):
        raise ModelError(
            f"{source} is a run of method={config.method}, whose weights are trained for their rounding: compress the "
            "model that it began with, and train that for rounding"
        )
    beneath = [adapter_files.read(entry.path).settings for entry in config.model.beneath]
    if kept := [a for a in (config.trainable, *beneath) if isinstance(a, Adapting) and not a.mergeable]:
        raise ModelError(f"{source}: no plain weights compute what its {kept[0].kind} adds, so they cannot be changed")  # type: ignore[attr-defined]


def plain(source: str, say: Say = lambda text: None) -> Plain:
    """Load it on this process's device, in float32 on a CPU; see `check` for what is refused."""
    check(source)
    quietly()
    found = opened(source, say)
    ranks = Ranks(Parallel())  # type: ignore[call-arg]
    if found.made is None:
        return Plain(source, found.model, found.renderer, ranks, _stored(source, found.model))
    config = found.made.config
    return Plain(source, merged(found.network), found.renderer, ranks, found.network.dtype, config)


def merged(net: network.Network) -> Any:
    """The model of a network with its adapters merged, none left: the same one where it had none."""
    with net.natively() as model:
        if not surgery.names(model) and not any(isinstance(m, surgery.QuantisedLinear) for m in model.modules()):
            made = model
        else:
            made = built(model.config, surgery.merged_state(model), net.dtype)
            made.generation_config = model.generation_config
    made.set_attn_implementation(net.native)
    return made.requires_grad_(False).eval()


def built(config: Any, state: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """The network of a configuration with these tensors, all of them and no others; head and embeddings are one only
    where they are in `state`."""
    config = copy.deepcopy(config)  # the source's goes on with its own attention
    text = config.get_text_config()
    table, head = _ends(config, dtype)
    tied = text.tie_word_embeddings
    if tied and head in state and not torch.equal(state[table], state[head]):
        text.tie_word_embeddings = tied = False
    made = streaming.skeleton(config, dtype)
    own = {name for name, _ in made.named_parameters()}
    kept = {name: t for name, t in state.items() if not (tied and name == head and head not in own)}
    made.load_state_dict(kept, strict=False, assign=True)
    made.tie_weights()
    wanted = {name: tuple(p.shape) for name, p in made.named_parameters()}
    given = {name: tuple(t.shape) for name, t in kept.items()}
    wrong = [name for name in wanted if given.get(name) != wanted[name]]
    assert not wrong, f"{wrong[:3]} are not as the configuration has them"
    return made.requires_grad_(False).eval()


def _ends(config: Any, dtype: torch.dtype) -> tuple[str, str]:
    """The names of the embeddings and of the head, one and the same parameter where they are tied."""
    made = streaming.skeleton(config, dtype)
    named = {id(m): name for name, m in made.named_modules()}
    return tuple(f"{named[id(m)]}.weight" for m in (made.get_input_embeddings(), made.get_output_embeddings()))  # type: ignore


def _stored(source: str, model: Any) -> torch.dtype:
    """Of the files of a model; those of GGUF count as 16 bits."""
    if source.endswith(".gguf"):
        return torch.bfloat16
    from transformers import AutoConfig

    told = Model(name=source)  # type: ignore[call-arg]
    found = load.explained(told, lambda: AutoConfig.from_pretrained(source, **load.options(told)))
    dtype = getattr(found.get_text_config(), "dtype", None) or getattr(found, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else next(model.parameters()).dtype


def save(source: Plain, model: Any, folder: Path, dtype: torch.dtype) -> None:
    """A model with the tokens of a source, as transformers reads it, its tensors in `dtype`."""
    computes = model.dtype
    model.to(dtype).save_pretrained(folder)
    model.to(computes)
    source.tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
