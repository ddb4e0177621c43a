"""Handing over to vLLM, where it is installed: the same wishes as its own arguments.

https://docs.vllm.ai/en/stable/cli/serve.html
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

from ..config import read_run
from ..errors import ConfigError, LuthierError
from .settings import Serving

KEY_VARIABLE = "VLLM_API_KEY"


def arguments(source: str, settings: Serving, limits: bool = True) -> tuple[list[str], dict[str, str]]:
    """The arguments of `vllm`, and what the environment must have: keys are not for a command line.

    Raises ConfigError where vLLM has nothing of the kind.
    """
    path = Path(source).expanduser()
    problems = []
    if (path / "config.yaml").is_file():
        read_run(path)
        problems.append(
            f"{source} is a run, which vLLM does not read: `luthier export {source} OUT --as merged` (or --as full), "
            "and serve OUT; or serve its base with --adapter NAME=OUT of --as adapter"
        )
    if settings.base:
        problems.append("--base: with vLLM, serve the base and give the tuned model as --adapter")
    if len(settings.keys) > 1:
        problems.append("vLLM takes one key")
    if settings.rate is not None:
        problems.append("--rate: vLLM has none; put a proxy before it")
    if settings.pooling is not None:
        problems.append("--pooling: vLLM decides it from the model")
    given = [source, "--host", settings.host, "--port", str(settings.port)]
    name = settings.name or (path.resolve().name.removesuffix(".gguf") if path.exists() else None)
    if name:
        given += ["--served-model-name", name]
    if settings.max_length is not None:
        given += ["--max-model-len", str(settings.max_length)]
    if limits:
        given += ["--max-num-seqs", str(settings.slots)]
    if settings.adapters:
        ranks = []
        for adapter, folder in settings.adapters.items():
            where = Path(folder).expanduser() / "adapter_config.json"
            if not where.is_file():
                problems.append(f"--adapter {adapter}={folder}: there is no adapter_config.json")
                continue
            told = json.loads(where.read_text())
            if told.get("peft_type") != "LORA" or told.get("use_dora"):
                problems.append(f"--adapter {adapter}={folder}: vLLM takes plain LoRA only")
                continue
            ranks.append(max([int(told.get("r", 8)), *map(int, (told.get("rank_pattern") or {}).values())]))
        pairs = [f"{adapter}={Path(folder).expanduser()}" for adapter, folder in settings.adapters.items()]
        given += ["--enable-lora", "--max-lora-rank", str(_rank(max(ranks, default=8))), "--lora-modules", *pairs]
    if problems:
        raise ConfigError(problems)
    return ["serve", *given], {KEY_VARIABLE: settings.keys[0]} if settings.keys else {}


def _rank(rank: int) -> int:
    """The next that vLLM has."""
    known = (8, 16, 32, 64, 128, 256, 320, 512)
    return next((one for one in known if one >= rank), rank)


def command() -> list[str]:
    """What starts vLLM here. Raises LuthierError without it."""
    beside = Path(sys.executable).with_name("vllm")
    if beside.is_file():
        return [str(beside)]
    if found := shutil.which("vllm"):
        return [found]
    if importlib.util.find_spec("vllm") is not None:
        return [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    raise LuthierError("--engine vllm: vLLM is not installed here (pip install vllm, in an environment of its own)")
