"""What can be said of a model's name before anything heavy is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from . import Model
from .sizes import vocabulary_of

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
TRAIN = "train"  # as the name of a tokenizer


def resaving(name: str) -> str:
    """The command that writes a model's weights anew, without those that its class does not use."""
    out = name.rstrip("/").split("/")[-1] + "-clean"
    return (
        f'python -c "import transformers as t; t.AutoModelForCausalLM.from_pretrained(\'{name}\')'
        f".save_pretrained('{out}'); t.AutoTokenizer.from_pretrained('{name}').save_pretrained('{out}')\""
    )


def resolved(model: Model) -> Model:
    """With what follows from the rest filled in: how it starts, and whose tokenizer it has."""
    unnamed = model.size is not None or model.config is not None
    init = model.init or ("random" if unnamed else "loaded")
    tokenizer = model.tokenizer or (TRAIN if unnamed and init == "random" else None)
    wanted = model.vocab_size
    if wanted is None and tokenizer == TRAIN:
        wanted = vocabulary_of(model.size, model.config)
    return model.model_copy(update={"init": init, "tokenizer": tokenizer, "vocab_size": wanted})


def problems(model: Model, weights: bool = True) -> list[str]:
    """All that is wrong with the section, as far as can be said from itself and the disk alone; see `problem`."""
    model = resolved(model)
    found = [f"model.{place}: {text}" for place, text in _contradictions(model)]
    if model.name and (text := problem(model, weights)):
        found.append(f"model.name: {text}")
    if text := template_problem(model):
        found.append(f"model.chat_template: {text}")
    return found


def _contradictions(model: Model):
    """(key, what is wrong) of keys that do not go together."""
    given = [key for key in ("name", "size", "config") if getattr(model, key)]
    if not given:
        also = ", model.size=15m" if model.init == "random" else ""
        yield "name", f"required, and not given (for example model.name=...{also})"
    if len(given) > 1:
        yield given[1], f"given beside model.{given[0]}; a model starts from one of name, size and config"
    if model.config is not None and not isinstance(model.config.get("model_type"), str):
        yield "config", "has no model_type, which names the family (for example model.config.model_type=llama)"
    if model.init == "loaded" and given and "name" not in given:
        yield "init", f"loaded, but model.{given[0]} has no weights: use model.init=random, or model.name"
    if model.init == "random" and model.name.endswith(".gguf"):
        yield "init", "random, but a GGUF file has no config.json: use model.size, or model.config"
    if model.tokenizer == TRAIN and model.init == "loaded":
        yield "tokenizer", "train, but loaded weights know the tokens that they were made with: use model.init=random"
    if model.vocab_size is not None and model.tokenizer != TRAIN:
        yield "vocab_size", f"{model.vocab_size}, but no tokenizer is trained: use model.tokenizer=train, or none"
    named = model.tokenizer if model.tokenizer != TRAIN else None
    if named is not None and _is_path(named) and not Path(named).expanduser().exists():
        yield "tokenizer", f"{named!r} does not exist (a hub name, a folder, or `train`)"
    if model.revision is not None and not model.name:
        yield "revision", f"{model.revision!r}, but there is no model.name that it could be of"
    for token in model.new_tokens:
        if not token.strip() or token != token.strip() or model.new_tokens.count(token) > 1:
            yield "new_tokens", f"{token!r} is empty, twice there, or has spaces around it"
            return
    if not model.new_tokens and not model.new_tokens_special:
        yield "new_tokens_special", "false, but there are no model.new_tokens"


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def conversion(name: str) -> str:
    """The command that turns a pickle checkpoint into safetensors, without running what else is in the pickle."""
    out = name.rstrip("/").split("/")[-1] + "-safetensors"
    return (
        'python -c "import transformers as t; '
        f"t.AutoModelForCausalLM.from_pretrained('{name}', use_safetensors=False).save_pretrained('{out}'); "
        f"t.AutoTokenizer.from_pretrained('{name}').save_pretrained('{out}')\""
    )


def problem(model: Model, weights: bool = True) -> str | None:
    """What is wrong with the name of a model, as far as can be said from the disk alone; without `weights`, those of a
    folder may be missing."""
    path = Path(model.name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            return f"{model.name!r} is a folder without config.json: it holds no model"
        if model.starts_at_random:
            if model.tokenizer is None and not any((path / file).is_file() for file in TOKENIZER_FILES):
                return f"{model.name!r} holds no tokenizer: use model.tokenizer=train, or name one"
            return None
        if weights and not any(path.glob("*.safetensors")):
            if any(p for pattern in PICKLES for p in path.glob(pattern)):
                return (
                    f"{model.name!r} holds its weights as a pickle, which can run any code when it is opened; "
                    f"convert it once with\n    {conversion(model.name)}"
                )
            return f"{model.name!r} holds no .safetensors file"
        return None
    if path.is_file():
        return None if path.suffix == ".gguf" else f"{model.name!r} is a file, but not a .gguf one"
    if path.suffix == ".gguf" or _is_path(model.name):
        return f"{model.name!r} does not exist"
    return None


def ready_made(model: Model) -> dict | None:
    """What a folder's configuration says of weights that are kept in fewer bits; None where they are plain."""
    path = Path(model.name).expanduser() / "config.json"
    if model.starts_at_random or not model.name or not path.is_file():
        return None
    try:
        found = json.loads(path.read_text()).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None  # told by what reads it
    return found if isinstance(found, dict) else None


def no_causal_model(name: str) -> str | None:
    """The class that a folder's weights are of, where that is a classifier or the like."""
    try:
        found = json.loads((Path(name).expanduser() / "config.json").read_text()).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        return None  # told by what reads it
    other = ("Classification", "MaskedLM", "QuestionAnswering", "MultipleChoice")
    return ", ".join(found) if found and all(str(one).endswith(other) for one in found) else None


def ready_made_problem(name: str, found: dict | None, kind: str) -> str | None:
    """Why weights that are kept as `found` says cannot be used as precision.kind=`kind`."""
    if found is None:
        return None
    given = str(found.get("quant_method", "an unnamed method"))
    four = found.get("load_in_4bit") or found.get("_load_in_4bit")
    if given != "bitsandbytes" or not four or found.get("bnb_4bit_quant_type") != "nf4":
        if given == "bitsandbytes":
            given += " " + (f"4-bit {found.get('bnb_4bit_quant_type')}" if four else "8-bit")
        return (
            f"model.name={name!r} is quantised already ({given}), and only bitsandbytes' 4-bit NF4 is read so: give "
            "the model that it was made from"
        )
    if kind == "nf4":
        return None
    return (
        f"model.name={name!r} is in 4 bits already (bitsandbytes NF4), and precision.kind is {kind}: use method=qlora, "
        "or give the model that it was made from"
    )


def template_problem(model: Model) -> str | None:
    template = model.chat_template
    if template in (None, "chatml") or "{" in str(template) or Path(str(template)).expanduser().is_file():
        return None
    return f"{template!r} is neither `chatml` nor a file"
