"""What can be said of a model's name before anything heavy is loaded."""

from __future__ import annotations

from pathlib import Path

from . import Model

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


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
    if path.suffix == ".gguf" or model.name.startswith((".", "/", "~")) or model.name.count("/") > 1:
        return f"{model.name!r} does not exist"
    return None


def template_problem(model: Model) -> str | None:
    template = model.chat_template
    if template in (None, "chatml") or "{" in str(template) or Path(str(template)).expanduser().is_file():
        return None
    return f"{template!r} is neither `chatml` nor a file"
