"""The critic of PPO that is a network of its own: the configuration that it is assembled by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .fields import Config
from .objectives.ppo import ValueModel
from .precision import QAT
from .settings import Settings


def run_folder(critic: ValueModel) -> Path | None:
    """Where the run is that the critic begins as, if it is one."""
    folder = Path(critic.name).expanduser()
    return folder if (folder / "config.yaml").is_file() else None


def config_of(config: Config, critic: ValueModel, scores: bool = False) -> Config:
    """What the critic is assembled by; with `scores`, as a model that scores texts. ValidationError of its sections."""
    own = config.model_dump(include={"data", "batch", "parallel", "seed", "output_dir", "trainable", "precision"})
    if "init_from" in own["trainable"]:
        own["trainable"]["init_from"] = None
    if isinstance(config.precision, QAT):  # what is rounded is what is deployed
        own["precision"] = {"kind": "as_loaded", "dtype": config.precision.dtype}
    model = {"name": critic.name, "revision": critic.revision, "trust_remote_code": critic.trust_remote_code,
             "init": "loaded", "attention": config.model.attention}  # fmt: skip
    given = {name: section for name in ("trainable", "precision") if (section := getattr(critic, name)) is not None}
    objective = {"kind": "reward" if scores else "next_token"}
    return Config.model_validate({**own, **given, "model": model, "objective": objective})


def resolved(config: Config) -> Any:
    """The objective, its critic's sections with all that they leave to defaults; unchanged where they are wrong."""
    critic = config.objective.own_critic
    if critic is None or run_folder(critic) is not None:
        return config.objective
    try:
        made = config_of(config, critic)
    except ValueError:  # told as a contradiction
        return config.objective
    sections: dict[str, Settings] = {"trainable": made.trainable, "precision": made.precision}
    whole = critic.model_copy(update={name: section.model_dump(mode="json") for name, section in sections.items()})
    return config.objective.model_copy(update={"critic": whole})
