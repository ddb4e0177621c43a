"""Load a language model with the head that is wanted, and its tokenizer: hub, folder or GGUF; safetensors only."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..surgery import Storage
from . import Model, gguf, heads, streaming, vocabulary
from .heads import TOKENS, Ending
from .names import CHATML, TRAIN, conversion, problem, ready_made_problem, resaving


def load_tokenizer(model: Model, trained: Path | None = None) -> Any:
    """The tokenizer with the run's template and new tokens, and one to pad with; `trained`: where a trained one is."""
    tokenizer = _read_tokenizer(model, trained)
    vocabulary.add(tokenizer, model)
    if model.chat_template is not None:
        named = {"chatml": CHATML}.get(model.chat_template)
        inline = model.chat_template if "{" in model.chat_template else None
        tokenizer.chat_template = named or inline or Path(model.chat_template).expanduser().read_text()
    if isinstance(tokenizer.chat_template, dict):
        raise ModelError(
            f"model.name={model.name!r} has several chat templates ({', '.join(tokenizer.chat_template)}): "
            "save the one to use as a file and name it as model.chat_template"
        )
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_tokenizer(model: Model, trained: Path | None) -> Any:
    if model.tokenizer == TRAIN:
        from transformers import PreTrainedTokenizerFast

        assert trained is not None, "a trained tokenizer is made before it is loaded"
        return PreTrainedTokenizerFast.from_pretrained(trained)
    name = model.tokenizer or model.name
    if name.endswith(".gguf"):
        return gguf.read_tokenizer(Path(name).expanduser())
    from transformers import AutoTokenizer

    own = options(model) if model.tokenizer is None else {"trust_remote_code": model.trust_remote_code}
    named = model if model.tokenizer is None else model.model_copy(update={"name": name})
    return explained(named, lambda: AutoTokenizer.from_pretrained(name, **own))


def load_model(
    model: Model, dtype: torch.dtype, device: torch.device, store: Storage | None = None,
    tell: Callable[[str], None] = lambda text: None, ending: Ending = TOKENS, seed: int = 0,
    tell_head: Callable[[str], None] | None = None,
) -> nn.Module:  # fmt: skip
    """The network with its weights in `dtype` on `device`, every tensor read, converted and placed one by one.

    With `store`, linear layers go to fewer bits as they are read. A head that the files lack is drawn by `seed`, which
    `tell_head` is told, where it stays.
    """
    say = tell_head or (lambda text: None)
    if text := problem(model):
        raise ModelError(f"model.name: {text}")
    if model.name.endswith(".gguf"):
        made = gguf.read_model(Path(model.name).expanduser(), dtype)
        if ending is not TOKENS:
            made = heads.on_base(made, ending, seed)
            _tell_head(made, heads.parameters(made), (), seed, say)
        return made.to(device) if store is None else stored(made, store, device, tell)
    from transformers import AutoConfig

    given: dict[str, Any] = options(model)
    config = explained(model, lambda: AutoConfig.from_pretrained(model.name, **given))
    if config.is_encoder_decoder:
        raise ModelError(
            f"model.name={model.name!r} is an encoder with a decoder ({config.model_type}), no {ending.what}"
        )
    ending.name_in(config)
    ready = getattr(config, "quantization_config", None)
    ready = ready if isinstance(ready, dict | None) else ready.to_dict()
    if text := ready_made_problem(model.name, ready, store.kind if store else "as_loaded"):
        raise ModelError(text)
    if store is None:
        return _read(model, config, dtype, device, ending, seed, say)
    try:
        made = explained(model, lambda: _streamed(model, config, dtype, device, store, ending, seed, say))
    except streaming.Unfit as reason:
        if ready:
            raise ModelError(f"model.name={model.name!r}: its 4-bit weights cannot be read: {reason}") from None
        tell(
            f"weights are read whole, in {str(dtype).removeprefix('torch.')} into the host's memory, and then go to "
            f"{store.kind} layer by layer: {reason}"
        )
        whole = _read(model, config, dtype, torch.device("cpu"), ending, seed, say)
        return stored(whole, store, device, tell)
    if text := streaming.sixteen_bit_experts(made, store):
        tell(text)
    return made


def _read(
    model: Model, config: Any, dtype: torch.dtype, device: torch.device, ending: Ending, seed: int,
    tell: Callable[[str], None],
) -> nn.Module:  # fmt: skip
    """Through transformers, plain."""
    given: dict[str, Any] = options(model)
    if device.type != "cpu" and importlib.util.find_spec("accelerate"):
        given["device_map"] = {"": device}  # straight there; without accelerate, by way of the host's memory
    if ending.ends_in != "tokens":
        given |= {"config": config, "ignore_mismatched_sizes": True}  # checked below

    def read() -> tuple[nn.Module, dict]:
        return heads.attending(lambda **kind: ending.auto.from_pretrained(
            model.name, dtype=dtype, use_safetensors=True, output_loading_info=True, **kind, **given
        ))  # fmt: skip

    made, info = explained(model, read)
    if ending.ends_in == "tokens":
        _check_keys(model, made, info)
    else:
        _make_head(model, made, info, seed, tell)
    return made.to(device)


def _make_head(model: Model, made: Any, info: dict, seed: int, tell: Callable[[str], None]) -> None:
    """What of a head the files lack, or have in another size, is drawn; of all else they must have everything."""
    prefix = made.base_model_prefix
    other = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    new = [name for name in {*info["missing_keys"], *other} if heads.is_head(name, prefix)]
    strangers = [name for name in info["unexpected_keys"] if heads.is_head(name, prefix)]
    if wrong := sorted(name for name in other if name not in new):
        raise ModelError(f"model.name={model.name!r}: {wrong[0]} is in another size there than config.json says")
    left = {"missing_keys": new, "unexpected_keys": strangers}
    _check_keys(model, made, {key: {*info[key]} - {*known} for key, known in left.items()})
    ordered = [name for name, _ in made.named_parameters() if name in set(new)]
    heads.draw(made, ordered, seed)
    _tell_head(made, ordered, strangers, seed, tell)


def _tell_head(made: Any, new: Any, dropped: Any, seed: int, tell: Callable[[str], None]) -> None:
    if text := heads.told(made, new, dropped, seed):
        tell(text)


def _streamed(
    model: Model, config: Any, dtype: torch.dtype, device: torch.device, store: Storage, ending: Ending, seed: int,
    tell: Callable[[str], None],
) -> nn.Module:  # fmt: skip
    """Tensor by tensor, so that hardly more is ever in memory than the result."""
    from transformers import GenerationConfig

    if model.trust_remote_code:
        raise streaming.Unfit("the model brings its own code")
    found = streaming.entries(_files(model))
    vars(config).pop("quantization_config", None)  # nothing downstream may read its layers as another library's
    made = streaming.skeleton(config, dtype, ending)
    streaming.check_straight(made, dtype)
    new, dropped = streaming.fit_heads(made, found, ending)
    streaming.fill(made, found, device, store, new)
    heads.draw(made, new, seed)
    _tell_head(made, new, dropped, seed, tell)
    if ending.ends_in == "tokens":
        with contextlib.suppress(OSError):
            made.generation_config = GenerationConfig.from_pretrained(model.name, revision=options(model)["revision"])
    return made.eval()


def _files(model: Model) -> list[Path]:
    """The safetensors files of a model, fetched if it is on the hub."""
    from transformers.utils.hub import cached_file

    def file(name: str) -> Path | None:
        found = cached_file(
            model.name, name, revision=options(model)["revision"], _raise_exceptions_for_missing_entries=False
        )
        return Path(found) if found else None

    if single := file("model.safetensors"):
        return [single]
    index = file("model.safetensors.index.json")
    if index is None:
        raise streaming.Unfit("there is neither a model.safetensors nor an index of several")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    found = [file(name) for name in names]
    if None in found:
        raise OSError(f"{names[found.index(None)]} is in the index and is missing")
    return [path for path in found if path]


def stored(
    made: nn.Module, store: Storage, device: torch.device, tell: Callable[[str], None] = lambda text: None
) -> nn.Module:
    """A plain network on `device`, its layers in the precision of `store`."""
    streaming.convert(made, store, device)
    if text := streaming.sixteen_bit_experts(made, store):
        tell(text)
    return made


def _check_keys(model: Model, made: Any, info: dict) -> None:
    """Where a file and the network differ in their tensors, transformers only warns, and draws what is missing."""
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    told = []
    if missing:
        told.append(f"lacks {len(missing)} tensors that a {type(made).__name__} has ({', '.join(missing[:5])})")
    if unexpected:
        told.append(f"has {len(unexpected)} tensors that a {type(made).__name__} has not ({', '.join(unexpected[:5])})")
    if told:
        remedy = (
            "its weights would start at random: give the whole model"
            if missing
            else "they would be lost; if that is meant, load and save it once with\n    " + resaving(model.name)
        )
        raise ModelError(f"model.name={model.name!r} {' and '.join(told)}: {remedy}")


def check_context(model: Any, max_length: int, tell: Callable[[str], None]) -> None:
    """Documents longer than the positions that the model knows: learnt ones do not exist, rotary ones are new to it."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    counted = [m for m in model.modules() if hasattr(m, "create_position_ids_from_input_ids")]
    if isinstance(limit, int) and counted:  # RoBERTa's first position comes after that of its padding
        limit -= counted[0].padding_idx + 1
    if not isinstance(limit, int) or limit >= max_length:
        return
    words = model.get_input_embeddings()
    learnt = any(
        isinstance(module, nn.Embedding) and module is not words and ("position" in name or "wpe" in name)
        for name, module in model.named_modules()
    )
    what = f"data.max_length={max_length}, but {type(model).__name__} has {limit} positions"
    if learnt:
        raise ModelError(f"{what}: use data.max_length={limit}")
    tell(f"{what}: what stands after those is new to it; use data.max_length={limit}, or a rope_scaling")


def check_virtual(model: Any, max_length: int, count: int) -> None:
    """Virtual tokens take positions of the context, before those of a document."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not count or not isinstance(limit, int) or count + max_length <= limit:
        return
    remedy = f"data.max_length={limit - count}" if count < limit else f"fewer than {limit} virtual tokens"
    raise ModelError(
        f"trainable.num_virtual_tokens={count} and data.max_length={max_length} take {count + max_length} positions, "
        f"but {type(model).__name__} has {limit}: use {remedy}"
    )


def options(model: Model) -> dict:
    return {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}


def scores_texts(model: Model) -> bool:
    """Whether the files of a model are of one that scores texts, as reward models do."""
    from transformers import AutoConfig

    if model.name.endswith(".gguf"):
        return False
    config = explained(model, lambda: AutoConfig.from_pretrained(model.name, **options(model)))
    return any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ())


def explained(model: Model, read: Any) -> Any:
    """Run a loader of transformers; its errors become ours, with the remedy."""
    try:
        return read()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        text = str(error)
        if "trust_remote_code" in text or "custom code" in text:
            remedy = "it brings its own code; read it, then set model.trust_remote_code=true to run it"
        elif "safetensors" in text and not Path(model.name).exists():
            remedy = f"it has no safetensors; convert it once with\n    {conversion(model.name)}"
        elif os.environ.get("HF_HUB_OFFLINE") and not Path(model.name).expanduser().exists():
            remedy = "it is no folder here, and HF_HUB_OFFLINE keeps the hub away"
        else:
            remedy = "give a hub name, a folder or a .gguf file of a language model"
        raise ModelError(f"model.name={model.name!r} cannot be loaded: {remedy}\n({text.strip()[:600]})") from None
