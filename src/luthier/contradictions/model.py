"""What of a model, and of how it starts, does not go with the method or with what moves."""

from __future__ import annotations

from ..fields import Config
from ..models import names
from ..trainable import Partial


def problems(config: Config, weights: bool = True) -> list[str]:
    return [*names.problems(config.model, weights), *_of_the_start(config)]


def _of_the_start(config: Config) -> list[str]:
    """What of the model's start does not go with the method or with what moves."""
    model, t, found = names.resolved(config.model), config.trainable, []
    needed = {"pretrain": "random", "continued_pretraining": "loaded"}
    if needed.get(config.method, model.init) != model.init:
        other = next(name for name, init in needed.items() if init == model.init)
        found.append(f"model.init={model.init} does not go with method={config.method}: use method={other}")
    if model.init == "random" and t.kind != "full":
        found.append(
            f"model.init=random, but method={config.method} freezes weights, which would stay random: "
            "use method=pretrain, or method=full"
        )
    moves = (isinstance(t, Partial) and (t.embeddings or t.patterns)) or getattr(t, "modules_to_save", [])
    if model.new_tokens and t.kind != "full" and not moves:
        found.append(
            f"model.new_tokens: {model.new_tokens[0]!r} has to be learnt, but method={config.method} freezes the "
            "embeddings: use method=full, method=partial with trainable.embeddings=true, or method=lora with the "
            "embeddings and the head in trainable.modules_to_save"
        )
    return found
