"""luthier adapters: what a saved adapter is, and several LoRAs joined into one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import subparser

EPILOG = """\
examples:
  luthier adapters show out/french out/polite
  luthier adapters combine out/french out/polite --weights 1.0 0.5 --out out/polite-french
"""


def add(verbs: argparse._SubParsersAction) -> None:
    made = subparser(verbs, "adapters", "look at saved adapters, or join LoRAs of one base into one")
    made.epilog = EPILOG
    made.add_argument("action", choices=("show", "combine"))
    made.add_argument("folders", nargs="+", metavar="FOLDER")
    made.add_argument("--weights", nargs="+", type=float, metavar="W", help="one for each folder (default: 1)")
    made.add_argument("--out", help="of combine: a folder that does not exist yet")
    made.set_defaults(run=run)


def run(options: argparse.Namespace) -> Any:
    from ..errors import ConfigError

    if options.action == "combine":
        return combine(options)
    if options.weights or options.out:
        raise ConfigError("--weights and --out are of `luthier adapters combine`; `show` only looks")
    return show(options)


def show(options: argparse.Namespace) -> Any:
    from ..trainable import adapter_files

    found = [_about(adapter_files.read(folder)) for folder in options.folders]
    if not options.json:
        for about in found:
            size = f"{about['parameters']:,} parameters in {about['tensors']} tensors"
            print(f"{about['folder']}: {about['kind']}, {size}")
            for key, value in about["settings"].items():
                print(f"  {key}: {value}")
            print(f"  base: {about['base'] or 'not named'}")
            for below in about["beneath"]:
                print(f"  on top of: {below['name']} (share {below['share']:g}, sha256 {below['sha256'][:12]})")
            if not about["fingerprint"]:
                print("  written by another tool: whether a model is its base can be told from shapes alone")
    return found


def _about(saved: Any) -> dict:
    settings = saved.settings.model_dump(mode="json", exclude_defaults=True, exclude={"kind", "init_from"})
    settings = {"target_modules": getattr(saved.settings, "target_modules", None), **settings}
    return {
        "folder": str(saved.path), "kind": saved.settings.kind, "peft_type": saved.settings.peft_type,
        "settings": {key: value for key, value in settings.items() if value is not None},
        "parameters": saved.parameters, "tensors": len(saved.shapes),
        "base": saved.values.get("base_model_name_or_path"),
        "beneath": saved.base["beneath"] if saved.base else [], "fingerprint": saved.base is not None,
    }  # fmt: skip


def combine(options: argparse.Namespace) -> Any:
    from ..errors import ConfigError

    if not options.out:
        raise ConfigError("--out: required, the folder to write (for example --out out/both)")
    weights = options.weights or [1.0] * len(options.folders)
    if len(weights) != len(options.folders):
        raise ConfigError(f"--weights: {len(weights)} numbers for {len(options.folders)} folders; give each folder one")
    if len(set(options.folders)) < len(options.folders):
        raise ConfigError("a folder is given twice: give it once, with the sum of its weights")
    from ..adapters import concatenate

    done = concatenate(dict(zip(options.folders, weights)), Path(options.out))
    if not options.json:
        size = f"rank {done['r']} beside {done['layers']} layers, {done['parameters']:,} parameters"
        print(f"{options.out}: a LoRA of {size}")
    return {"out": options.out, **done}
