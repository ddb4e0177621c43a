"""A random start: a network from its configuration alone, with the first values that its family gives itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..settings import did_you_mean
from . import Model
from .heads import TOKENS, Ending
from .sizes import SIZES

OLD_KEYS = {"rope_theta", "rope_scaling", "torch_dtype", "dtype", "architectures", "transformers_version", "auto_map"}


def random_model(
    model: Model, tokenizer: Any, dtype: torch.dtype, seed: int, context: int, ending: Ending = TOKENS
) -> nn.Module:  # fmt: skip
    """The network in `dtype` on the CPU: drawn there in float32, so that device, rank and precision change nothing."""
    config = configuration(model, tokenizer, context)
    ending.name_in(config)
    made = draw(config, seed, ending, trust_remote_code=model.trust_remote_code)
    _name_tokens(made, tokenizer)
    if dtype != torch.float32:
        cast(made, dtype, ending, trust_remote_code=model.trust_remote_code)
    return made


def configuration(model: Model, tokenizer: Any, context: int) -> Any:
    """What the network is made from, with the tokenizer's vocabulary."""
    tokens = max(tokenizer.get_vocab().values()) + 1
    if model.size is not None:
        config = _of_keys(SIZES[model.size].config(tokens, context))
    elif model.config is not None:
        config = _of_keys(model.config)
    else:
        config = _of_name(model)
    if config.is_encoder_decoder:
        raise ModelError(f"model: {config.model_type!r} is an encoder with a decoder, no causal language model")
    text = config.get_text_config()
    own = model.config.get("vocab_size") if model.config is not None else None
    if own is not None and own < tokens:
        raise ModelError(
            f"model.config.vocab_size={own}, but the tokenizer has {tokens} tokens: leave it out, or give at least that"
        )
    # The length of the embeddings is the tokenizer's, or what its own configuration was rounded up to.
    padded = own or (text.vocab_size if model.name and model.tokenizer is None else 0)
    text.vocab_size = max(tokens, padded)
    for part in {id(config): config, id(text): text}.values():
        # Named after the start: a padding token's embedding would be drawn as zeros and never move.
        part.bos_token_id = part.eos_token_id = part.pad_token_id = None
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return config


def _of_keys(keys: dict) -> Any:
    """A family's configuration with `keys` over its defaults; one that the family does not have is an error."""
    from transformers import CONFIG_MAPPING, AutoConfig

    family = keys["model_type"]
    if family not in CONFIG_MAPPING:
        meant = did_you_mean(family, CONFIG_MAPPING.keys())
        raise ModelError(f"model.config.model_type: {family!r} is no family of transformers{meant}")
    defaults = CONFIG_MAPPING[family]()
    for key in keys:
        if not hasattr(defaults, key) and key not in OLD_KEYS:
            meant = did_you_mean(key, defaults.to_dict())
            raise ModelError(f"model.config.{key}: a {family} has no such key{meant}")
    values = {k: copy.deepcopy(v) for k, v in keys.items() if k != "model_type"}
    try:
        return AutoConfig.for_model(family, **values)
    except Exception as error:  # each family checks in its own way; what it finds is about the keys
        raise ModelError(f"model.config: {family} refuses it: {error}") from None


def _of_name(model: Model) -> Any:
    from transformers import AutoConfig

    from .load import explained, options

    return explained(model, lambda: AutoConfig.from_pretrained(model.name, **options(model)))


def draw(config: Any, seed: int, ending: Ending = TOKENS, **remote: bool) -> Any:
    """The family's own first values in float32, from `seed` alone; random states elsewhere stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        try:
            made = ending.auto.from_config(config, dtype=torch.float32, **remote)
        except ValueError as error:
            text = str(error)
            if "Unrecognized configuration class" in text:
                text = f"it is no {ending.what}"
            raise ModelError(f"model: {config.model_type!r} cannot be started: {text}") from None
    return made


def _name_tokens(model: Any, tokenizer: Any) -> None:
    """Beginning, end and padding, the same in both of the model's configurations."""
    generation = getattr(model, "generation_config", None)
    for part in filter(None, (model.config, model.config.get_text_config(), generation)):
        part.bos_token_id = tokenizer.bos_token_id
        part.eos_token_id = tokenizer.eos_token_id
        part.pad_token_id = tokenizer.pad_token_id


def cast(model: Any, dtype: torch.dtype, ending: Ending = TOKENS, **remote: bool) -> None:
    """Each tensor in the dtype that it has in a model loaded in `dtype`: most in that, some in float32.

    `model.to(dtype)` would round rotary frequencies, which then turn by the wrong angle at long distances.
    """
    with torch.device("meta"):
        twin = ending.auto.from_config(copy.deepcopy(model.config), dtype=dtype, **remote)
    wanted = {name: tensor.dtype for name, tensor in (*twin.named_parameters(), *twin.named_buffers())}
    strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not strict & set(name.split(".")):
            tensor.data = tensor.data.to(wanted[name])
    for part in (model.config, model.config.get_text_config()):
        part.dtype = dtype
