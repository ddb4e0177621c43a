"""Config: one typed field per decision; read from YAML and overrides, checked whole before anything heavy is loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from .data import Data, sources
from .errors import CheckpointError, ConfigError
from .methods import METHODS
from .models import Model, names
from .objectives import Objective
from .optim import AdamW, Schedule
from .parallel import Parallel
from .precision import Precision
from .settings import Settings, merged, nearest, parse_override, read_yaml
from .trainable import Partial, Selection, Trainable


class BatchSize(Settings):
    """How much is learnt from in one optimiser step, and in one pass of the network."""

    examples: int | None = Field(None, ge=1)
    """Documents in a step; 16 if neither this nor `tokens` is given."""
    tokens: int | None = Field(None, ge=1)
    """Or slots of tokens in a step: a multiple of `micro_tokens`."""
    micro_tokens: int = Field(4096, ge=1)
    """Longest row that passes through the network at once; changes memory and speed, never the gradient."""
    packing: bool = True
    """Lay documents end to end in rows, with no leak between them; false pads them to rectangles."""


class Evaluation(Settings):
    """What is measured on the held-out rows, at both ends of a run and in between."""

    every: int | None = Field(None, ge=1)
    """Steps between evaluations; none but at both ends without it."""
    generate: int = Field(0, ge=0)
    """Answer so many held-out prompts at both ends and count exact matches."""
    generate_every: bool = False
    """Answer them at every evaluation, not at the ends only."""
    max_new_tokens: int = Field(128, ge=1)
    batch_size: int = Field(32, ge=1)
    """Prompts answered at once."""


class Checkpointing(Settings):
    every: int | None = Field(None, ge=1)
    """Steps between checkpoints; the last step always leaves one."""
    keep: int = Field(2, ge=1)
    """The newest so many stay."""
    best: bool = True
    """The one with the lowest held-out loss stays, too, and is what is exported."""


class Monitoring(Settings):
    tensorboard: bool = True
    log_every: int = Field(1, ge=1)
    """Steps between records in metrics.jsonl."""


class Config(Settings):
    """A whole run."""

    method: str = "lora"
    """The row of the method table to start from."""
    model: Model
    data: Data
    trainable: Trainable
    precision: Precision
    objective: Objective
    optim: AdamW = AdamW()  # type: ignore[call-arg]
    schedule: Schedule = Schedule()  # type: ignore[call-arg]
    batch: BatchSize = BatchSize()  # type: ignore[call-arg]
    evaluation: Evaluation = Evaluation()  # type: ignore[call-arg]
    checkpoint: Checkpointing = Checkpointing()  # type: ignore[call-arg]
    monitor: Monitoring = Monitoring()  # type: ignore[call-arg]
    parallel: Parallel = Parallel()  # type: ignore[call-arg]
    epochs: int = Field(1, ge=1)
    """Times that every row is learnt."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many steps, however many epochs that takes."""
    seed: int = 0
    """Of adapters' first values and dropout; the order of rows has data.seed."""
    output_dir: str = "runs/luthier"
    """The run's folder: a second start with it resumes."""

    def dump(self) -> str:
        """YAML that starts the same run again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------------------- reading


SHORT = {"model": "name", "data": "train", "trainable": "kind", "objective": "kind", "precision": "kind"}


def _expanded(values: Mapping) -> dict:
    """`model: NAME` and the like stand for the section's main key."""
    return {k: {SHORT[k]: v} if k in SHORT and isinstance(v, str | list) else v for k, v in values.items()}


def configure(*sources: str | Path | Mapping, method: str | None = None, weights: bool = True) -> Config:
    """A checked Config from YAML files, mappings and `a.b=c` overrides, later ones over earlier ones.

    Everything that is wrong is told at once, in a ConfigError. Without `weights`, a model's folder may lack them, as
    for `luthier explain`.
    """
    values: dict = {}
    problems: list[str] = []
    for source in sources:
        try:
            if isinstance(source, Mapping):
                read = dict(source)
            elif isinstance(source, str) and "=" in source:
                read = parse_override(source)
            else:
                read = read_yaml(source)
            values = merged(values, _expanded(read))
        except ConfigError as error:
            problems += error.problems
    name = method or values.get("method") or "lora"
    values["method"] = name
    if not isinstance(name, str) or name not in METHODS:
        meant = nearest(str(name), METHODS)
        hint = f"; did you mean {meant!r}?" if meant else ""
        problems.append(f"method: {name!r} is unknown{hint} (known: {', '.join(METHODS)})")
        values["method"] = name = "lora"
    for axis, kind in METHODS[name].kinds.items():
        given = values.get(axis)
        if isinstance(given, Mapping) and given.get("kind", kind) != kind:
            fitting = [m.name for m in METHODS.values() if m.kinds.get(axis) == given["kind"]]
            remedy = (
                f"use method={fitting[0]}"
                if fitting
                else f"known are {sorted({m.kinds[axis] for m in METHODS.values()})}"
            )
            problems.append(
                f"{axis}.kind: {given['kind']!r} does not go with method={name}, which is {kind!r}; {remedy}"
            )
            values[axis] = {"kind": kind}
    values = merged(METHODS[name].settings, values)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        faults = error.errors()
        raise ConfigError(problems + _explained(faults) + _contradictions_of_the_rest(values, faults)) from None
    if config.batch.examples is None and config.batch.tokens is None:
        config = config.model_copy(update={"batch": config.batch.model_copy(update={"examples": 16})})
    problems += contradictions(config, weights)
    if problems:
        raise ConfigError(problems)
    return config


def read_run(folder: Path) -> Config:
    """The configuration that a run's folder was made with."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no folder of a run: it has no config.yaml")
    return configure(path, {"output_dir": str(folder)})


def _contradictions_of_the_rest(values: Mapping, faults: list) -> list[str]:
    """What else is wrong with a configuration once its faulty keys are left out, if that can be told."""
    rest = copy.deepcopy(dict(values))
    for path in {_place(fault)[0] for fault in faults}:
        *parents, last = path.split(".")
        section: Any = rest
        for part in parents:
            section = section.get(part, {}) if isinstance(section, Mapping) else {}
        if isinstance(section, dict):
            section.pop(last, None)
    try:
        return contradictions(Config.model_validate(rest))
    except ValidationError:
        return []


# ---------------------------------------------------------------------------- explaining

ELSEWHERE = {  # what other libraries call it
    "lr": "optim.learning_rate", "rank": "trainable.r", "lora_r": "trainable.r", "lora_rank": "trainable.r",
    "alpha": "trainable.lora_alpha", "dropout": "trainable.lora_dropout", "lora_target": "trainable.target_modules",
    "num_train_epochs": "epochs", "num_epochs": "epochs", "per_device_train_batch_size": "batch.examples",
    "train_batch_size": "batch.examples", "gradient_accumulation_steps": "batch.micro_tokens",
    "cutoff_len": "data.max_length", "max_seq_length": "data.max_length", "max_seq_len": "data.max_length",
    "lr_scheduler_type": "schedule.kind", "warmup_ratio": "schedule.warmup", "warmup_steps": "schedule.warmup",
    "model_name_or_path": "model.name", "dataset": "data.train", "train_file": "data.train",
    "validation_file": "data.validation", "val_size": "data.validation", "eval_steps": "evaluation.every",
    "save_steps": "checkpoint.every", "save_total_limit": "checkpoint.keep", "bf16": "precision.dtype",
    "gradient_checkpointing": "parallel.activation_checkpointing", "torch_compile": "parallel.compile",
    "packing": "batch.packing", "output": "output_dir", "finetuning_type": "method",
    "freeze_trainable_layers": "trainable.last_layers", "max_norm": "optim.max_grad_norm",
}  # fmt: skip


def _explained(errors: list) -> list[str]:
    """The faults as pydantic tells them, one line for each place: the field, the value and the remedy."""
    told: dict[str, str] = {}
    for detail in errors:
        path, owners = _place(detail)
        wanted = detail["msg"].replace("Input should be ", "")
        if detail["type"] == "extra_forbidden":
            told[path] = f"{path}: unknown key" + suggestion(path.rpartition(".")[2], owners)
        elif detail["type"] == "missing":
            told[path] = f"{path}: required, and not given (for example {path}=...)"
        elif detail["type"].startswith("union_tag"):
            told[path] = f"{path}.kind: {detail['msg']}"
        elif path in told:
            told[path] += f" or {wanted}"
        else:
            told[path] = f"{path}={detail['input']!r}: should be {wanted}"
    return list(told.values())


def _place(detail: Any) -> tuple[str, list[type[BaseModel]]]:
    """The dotted path of a fault, without the tags of unions, and the classes that its section can be."""
    owners: list[type[BaseModel]] = [Config]
    parts: list[str] = []
    section = owners
    for part in detail["loc"]:
        fields = [o.model_fields[part] for o in owners if part in o.model_fields]
        tagged = [o for o in owners if "kind" in o.model_fields and o.model_fields["kind"].default == part]
        if fields:
            parts.append(part)
            section, owners = owners, [c for f in fields for c in _nested(f.annotation)]
        elif tagged:
            owners = tagged
    if detail["type"] == "extra_forbidden":
        parts.append(str(detail["loc"][-1]))
        section = owners
    return ".".join(parts), section


def _nested(annotation: Any) -> Iterator[type[BaseModel]]:
    """The config classes inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _nested(argument)


def keys(cls: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings."""
    for name, field in cls.model_fields.items():
        inner = list(_nested(field.annotation))
        if not inner:
            yield prefix + name
        for one in inner:
            yield from keys(one, f"{prefix}{name}.")


def suggestion(name: str, owners: list[type[BaseModel]]) -> str:
    """The nearest name in the same section, else anywhere."""
    here = {field for owner in owners for field in owner.model_fields}
    if meant := nearest(name, here):
        return f"; did you mean {meant!r}?"
    if name in ELSEWHERE:
        return f"; did you mean {ELSEWHERE[name]!r}?"
    everywhere = {key.rpartition(".")[2]: key for key in reversed(list(keys()))}
    if meant := nearest(name, everywhere):
        return f"; did you mean {everywhere[meant]!r}?"
    return f"; known here: {', '.join(sorted(here))}"


def contradictions(config: Config, weights: bool = True) -> list[str]:
    """What no single field is wrong about, but several together, and files that are not there."""
    batch, data, found = config.batch, config.data, []
    if batch.examples is not None and batch.tokens is not None:
        found.append(f"batch.examples={batch.examples} and batch.tokens={batch.tokens}: give one of the two")
    if batch.micro_tokens < data.max_length:
        found.append(
            f"batch.micro_tokens={batch.micro_tokens} is less than data.max_length={data.max_length}, so the longest "
            f"document fits no row: use batch.micro_tokens={data.max_length} or a smaller data.max_length"
        )
    if batch.tokens is not None and batch.tokens % batch.micro_tokens:
        nearest_fit = max(1, batch.tokens // batch.micro_tokens) * batch.micro_tokens
        found.append(
            f"batch.tokens={batch.tokens} is no multiple of batch.micro_tokens={batch.micro_tokens}: "
            f"use batch.tokens={nearest_fit}"
        )
    if config.max_steps is not None and 1 <= config.schedule.warmup >= config.max_steps:
        found.append(f"schedule.warmup={config.schedule.warmup} leaves none of max_steps={config.max_steps} after it")
    if data.validation is None and (config.evaluation.every or config.evaluation.generate):
        found.append("evaluation needs held-out rows: give data.validation, for example data.validation=0.05")
    t = config.trainable
    if isinstance(t, Partial):
        found += _faults_of_unfreezing(t, config.max_steps)
    for name in [data.train] if isinstance(data.train, str) else data.train:
        if problem := sources.missing(name):
            found.append(f"data.train: {problem}")
    if isinstance(data.validation, str) and (problem := sources.missing(data.validation)):
        found.append(f"data.validation: {problem}")
    if problem := problem_of_model(config.model, weights):
        found.append(problem)
    return found


def _faults_of_unfreezing(trainable: Partial, max_steps: int | None) -> list[str]:
    kinds = ", ".join(Selection.model_fields)
    found = [f"trainable: nothing would move in the first step; give one of {kinds}"] if trainable.empty else []
    before = 0
    for i, entry in enumerate(trainable.unfreeze):
        place = f"trainable.unfreeze[{i}]"
        if entry.empty:
            found.append(f"{place}: nothing is named to move from step {entry.step} on; give one of {kinds}")
        if entry.step <= before:
            found.append(f"{place}.step={entry.step} does not come after {before}: list the entries by rising steps")
        if max_steps is not None and entry.step >= max_steps:
            found.append(f"{place}.step={entry.step} is never reached in max_steps={max_steps}: use a smaller step")
        before = entry.step
    return found


def problem_of_model(model: Model, weights: bool = True) -> str | None:
    if problem := names.problem(model, weights):
        return f"model.name: {problem}"
    if problem := names.template_problem(model):
        return f"model.chat_template: {problem}"
    return None


def schema() -> dict:
    """JSON schema of the YAML file, for editors. What a method's row gives need not be written."""
    made = Config.model_json_schema()
    made["required"] = ["model", "data"]
    made["properties"]["method"]["enum"] = sorted(METHODS)
    for section, main in SHORT.items():
        made["properties"][section] = {"anyOf": [made["properties"][section], {"type": "string", "description": main}]}
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return made
