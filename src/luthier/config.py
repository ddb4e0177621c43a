"""Config: one typed field per decision; read from YAML and overrides, checked whole before anything heavy is loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError

from .data import Data, sources
from .errors import AdapterError, CheckpointError, ConfigError
from .methods import METHODS
from .models import Model, names
from .monitor.alarms import Alarms
from .objectives import Objective
from .optim import (
    SGD,
    AdamW,
    Averaging,
    Clipping,
    Constant,
    EarlyStopping,
    Linear,
    NoAveraging,
    NormClipping,
    Optim,
    ReduceLROnPlateau,
    Regularisation,
    Schedule,
    ScheduleFreeAdamW,
)
from .optim import schedule as schedules
from .parallel import Parallel
from .precision import QAT, WHOLE_ROW, Precision, Reduced
from .settings import Settings, merged, nearest, parse_override, read_yaml
from .trainable import Partial, Selection, Trainable, adapter_files
from .trainable.adapter import Adapting, BesideLayers


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


LESS_IS_BETTER = ("loss", "perplexity", "bits_per_byte")
PYTHON_DOCS = "python-docs"
MetricName = Literal["exact_match", "f1", "bleu", "chrf", "rouge", "json"]
ON_ANSWERS = (*get_args(MetricName), "rouge_1", "rouge_2", "rouge_l", "json_equal", "valid_json")


class Evaluation(Settings):
    """What is measured on the held-out rows, at both ends of a run and in between."""

    every: int | None = Field(None, ge=1)
    """Steps between evaluations; none but at both ends without it."""
    generate: int = Field(0, ge=0)
    """Answer so many held-out prompts at both ends and score the answers."""
    generate_every: bool = False
    """Answer them, and do the tasks, at every evaluation, not at the ends only."""
    metrics: list[MetricName] = Field(["exact_match"], min_length=1)
    """Of the answers: `exact_match`, `f1` (of words), `bleu`, `chrf`, `rouge` (1, 2, L), `json` (equal values)."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest answer; longer ones are cut and counted."""
    batch_size: int = Field(32, ge=1)
    """Prompts answered at once."""
    forgetting: str | None = None
    """Rows that are not the task's, whose loss must not rise: a file, or `python-docs`, a slice of Python's manual."""
    tasks: list[str] = []
    """Tasks of lm-evaluation-harness, done at both ends: names, YAML files, or folders of them."""
    trust_task_files: bool = False
    """Allow files and folders in `tasks`: a task file may run Python of its own."""
    metric_for_best_model: str = "loss"
    """The figure of an evaluation that tells the best checkpoint and stops a run early."""
    greater_is_better: bool | None = None
    """By default false of losses, perplexity and bits per byte, true of everything else."""

    @property
    def better(self) -> int:
        """1 where a greater figure is the better one, else -1."""
        name = self.metric_for_best_model.rpartition(".")[2]
        greater = name not in LESS_IS_BETTER if self.greater_is_better is None else self.greater_is_better
        return 1 if greater else -1


class Checkpointing(Settings):
    every: int | None = Field(None, ge=1)
    """Steps between checkpoints; the last step always leaves one."""
    keep: int = Field(2, ge=1)
    """The newest so many stay."""
    best: bool = True
    """The one with the best evaluation stays, too; it is restored at the end, and is what is exported."""


class Monitoring(Settings):
    """What a run says while it runs, and what it does about a number that is not finite."""

    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = ["tensorboard"]
    """Trackers beside metrics.jsonl; all write to this machine only, unless their own variables send them elsewhere."""
    project: str = Field("luthier", min_length=1)
    """Of the run in its trackers."""
    run_name: str | None = Field(None, min_length=1)
    """In its trackers; the last part of output_dir without it."""
    log_every: int = Field(1, ge=1)
    """Steps between records in metrics.jsonl."""
    histogram_every: int | None = Field(None, ge=1)
    """Steps between histograms of the weights that move and of their gradients; for trackers only."""
    profile_steps: list[int] | None = Field(None, min_length=2, max_length=2)
    """[start, stop): profile these steps, counted from 1, into profile/ of the run's folder."""
    alarms: Alarms = Alarms()  # type: ignore[call-arg]
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite ends the run, or its step is not applied; both name its origin."""
    max_skips: int = Field(10, ge=1)
    """More steps than this skipped in a row end the run."""


class Config(Settings):
    """A whole run."""

    method: str = "lora"
    """The row of the method table to start from."""
    model: Model
    data: Data
    trainable: Trainable
    precision: Precision
    objective: Objective
    optim: Optim = AdamW()  # type: ignore[call-arg]
    schedule: Schedule = Linear()  # type: ignore[call-arg]
    clipping: Clipping = NormClipping()  # type: ignore[call-arg]
    regularisation: Regularisation = Regularisation()  # type: ignore[call-arg]
    averaging: Averaging = NoAveraging()
    early_stopping: EarlyStopping | None = None
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


SHORT = {
    "model": "name", "data": "train", "trainable": "kind", "objective": "kind", "precision": "kind", "optim": "kind",
    "schedule": "kind", "clipping": "kind", "averaging": "kind",
}  # fmt: skip
DEFAULT_KINDS = {  # of sections that name no kind
    "optim": "adamw", "schedule": "linear", "clipping": "norm", "precision": "as_loaded",
}  # fmt: skip


def _expanded(values: Mapping) -> dict:
    """`model: NAME` and the like stand for the section's main key."""
    return {k: {SHORT[k]: v} if k in SHORT and isinstance(v, str | list) else v for k, v in values.items()}


def _with_kinds(values: dict) -> dict:
    """Sections that may leave their kind out, with it; a schedule-free optimiser's schedule is constant."""
    out = dict(values)
    for section, kind in DEFAULT_KINDS.items():
        given = values.get(section)
        if section == "schedule" and (values.get("optim") or {}).get("kind") == "schedule_free_adamw":
            kind, given = "constant", given or {}
        if isinstance(given, Mapping) and "kind" not in given:
            out[section] = {"kind": kind, **given}
    return out


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
        if kind == "as_loaded":  # what any method is without a word about precision
            continue
        if isinstance(given, Mapping) and given.get("kind", kind) != kind:
            fitting = _named(METHODS[name].kinds, values, axis)
            if axis == "precision" and not fitting:
                continue  # any method over any precision, where that has no name of its own
            remedy = (
                f"use method={fitting[0]}"
                if fitting
                else f"known are {sorted({m.kinds[axis] for m in METHODS.values()})}"
            )
            problems.append(
                f"{axis}.kind: {given['kind']!r} does not go with method={name}, which is {kind!r}; {remedy}"
            )
            values[axis] = {"kind": kind}
    values = _with_kinds(merged(METHODS[name].settings, values))
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        faults = error.errors()
        raise ConfigError(problems + _explained(faults) + _contradictions_of_the_rest(values, faults)) from None
    if config.batch.examples is None and config.batch.tokens is None:
        config = config.model_copy(update={"batch": config.batch.model_copy(update={"examples": 16})})
    followed = {"model": names.resolved(config.model), "trainable": adapter_files.resolved(config.trainable)}
    config = config.model_copy(update=followed)
    problems += contradictions(config, weights)
    if problems:
        raise ConfigError(problems)
    return config


def _named(kinds: dict[str, str], values: Mapping, axis: str) -> list[str]:
    """The methods that are what `values` ask for instead of `kinds`; of a precision those of this very point only."""
    point = {a: (values.get(a) or {}).get("kind", kind) for a, kind in kinds.items()}
    if axis == "precision":
        return [m.name for m in METHODS.values() if m.kinds == point]
    return [m.name for m in METHODS.values() if m.kinds.get(axis) == point[axis]]


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
    "bnb_4bit_compute_dtype": "precision.dtype", "bnb_4bit_use_double_quant": "precision.double_quant",
    "double_quantization": "precision.double_quant", "bnb_4bit_blocksize": "precision.block_size",
    "bnb_4bit_quant_type": "precision.kind", "load_in_4bit": "precision.kind", "load_in_8bit": "precision.kind",
    "quantization_bit": "precision.kind", "quantization": "precision.kind",
    "gradient_checkpointing": "parallel.activation_checkpointing", "torch_compile": "parallel.compile",
    "packing": "batch.packing", "output": "output_dir", "finetuning_type": "method",
    "additional_target": "trainable.modules_to_save", "lora_modules_to_save": "trainable.modules_to_save",
    "use_dora": "method", "pissa_init": "trainable.init_lora_weights", "init_weights": "trainable.init_lora_weights",
    "lora_target_parameters": "trainable.target_parameters", "apply_lora_to_output": "trainable.target_modules",
    "apply_lora_to_mlp": "trainable.target_modules", "lora_attn_modules": "trainable.target_modules",
    "additional_special_tokens": "model.new_tokens", "new_special_tokens": "model.new_tokens",
    "add_tokens": "model.new_tokens", "add_special_tokens": "model.new_tokens", "config_name": "model.name",
    "tokenizer_name": "model.tokenizer", "tokenizer_name_or_path": "model.tokenizer",
    "train_from_scratch": "model.init",
    "tensorboard": "monitor.report_to", "logging_steps": "monitor.log_every", "use_wandb": "monitor.report_to",
    "preprocessing_num_workers": "data.num_proc", "dataset_num_proc": "data.num_proc",
    "buffer_size": "data.shuffle_buffer", "dataset_prepared_path": "data.cache_dir", "interleave_probs": "data.train",
    "datasets": "data.train",
    "early_stopping_patience": "early_stopping.patience", "early_stopping_threshold": "early_stopping.threshold",
    "label_smoothing": "objective.label_smoothing_factor", "ema_decay": "averaging.decay",
    "load_best_model_at_end": "checkpoint.best", "resid_pdrop": "regularisation.dropout",
    "freeze_trainable_layers": "trainable.last_layers", "max_norm": "clipping.max_grad_norm",
    "max_grad_norm": "clipping.max_grad_norm", "gradient_clip_val": "clipping.max_grad_norm",
    "clip_grad_norm": "clipping.max_grad_norm", "optimizer": "optim.kind", "lr_scheduler": "schedule.kind",
    "lr_scheduler_kwargs": "schedule", "num_warmup_steps": "schedule.warmup", "num_decay_steps": "schedule.decay",
    "num_stable_steps": "schedule.decay", "min_lr": "schedule.min_ratio", "min_lr_ratio": "schedule.min_ratio",
    "min_lr_rate": "schedule.min_ratio", "lr_end": "schedule.min_ratio", "loraplus_lr_embedding": "optim.groups",
    "adapter_name_or_path": "model.adapters", "adapters": "model.adapters", "lora_model_dir": "trainable.init_from",
    "create_new_adapter": "trainable.init_from", "resume_from_adapter": "trainable.init_from",
    "optimizer_in_bwd": "optim.fused_backward", "stochastic_rounding": "optim.rounding",
    "num_prompt_tokens": "trainable.num_virtual_tokens", "prefix_length": "trainable.num_virtual_tokens",
    "pre_seq_len": "trainable.num_virtual_tokens", "prompt_length": "trainable.num_virtual_tokens",
    "num_prefix": "trainable.num_virtual_tokens", "prefix_projection": "trainable.prefix_projection",
    "prompt_init_text": "trainable.prompt_tuning_init_text", "prompt_init": "trainable.prompt_tuning_init",
    "lr_reduce_factor": "schedule.factor", "param_groups": "optim.groups",
    "groupsize": "precision.group_size", "weight_dtype": "precision.scheme", "activation_dtype": "precision.scheme",
    "quantizer": "precision.scheme", "quantization_aware_training": "precision.kind", "qat": "precision.kind",
    "fake_quant_after_n_step": "precision.fake_quant_after_n_steps",
}  # fmt: skip
KINDS_ELSEWHERE = {  # what other libraries call a kind
    "optim.kind": {
        "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_apex_fused": "adamw",
        "adamw_anyprecision": "adamw", "paged_adamw": "adamw", "paged_adamw_32bit": "adamw", "adam": "adamw",
        "lomo": "adamw", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "adamw_8bit",
        "adamw_torch_8bit": "adamw_8bit", "adam8bit": "adamw_8bit", "adamw8bit": "adamw_8bit", "lion_32bit": "lion",
        "lion_8bit": "lion", "paged_lion_32bit": "lion", "paged_lion_8bit": "lion",
        "schedule_free": "schedule_free_adamw", "schedule_free_sgd": "schedule_free_adamw",
        "schedule_free_radam": "schedule_free_adamw", "adamw_schedule_free": "schedule_free_adamw",
    },
    "schedule.kind": {
        "constant_with_warmup": "constant", "cosine_with_min_lr": "cosine", "cosine_warmup_with_min_lr": "cosine",
        "wsd": "warmup_stable_decay", "plateau": "reduce_lr_on_plateau", "reduce_on_plateau": "reduce_lr_on_plateau",
        "cosine_with_hard_restarts": "cosine_with_restarts",
    },
    "trainable.kind": {
        "prefix_tuning": "prefix", "prompt_tuning": "prompt", "ptuning": "p_tuning", "prompt_encoder": "p_tuning",
    },
    "precision.kind": {
        "4bit": "nf4", "int4": "nf4", "bnb": "nf4", "bitsandbytes": "nf4", "fp4": "nf4", "8bit": "int8",
        "llm_int8": "int8", "float8": "fp8", "float8_e4m3fn": "fp8", "e4m3": "fp8", "bf16": "as_loaded",
        "bfloat16": "as_loaded", "float32": "as_loaded", "none": "as_loaded",
    },
    "clipping.kind": {"agc": "adaptive", "max_grad_norm": "norm", "clip_value": "value"},
    "precision.scheme": {
        "int8_dynamic_activation_int4_weight": "int8-dynamic-act-int4-weight", "8da4w": "int8-dynamic-act-int4-weight",
        "int8dynamicactivationint4weightconfig": "int8-dynamic-act-int4-weight",
        "int8_dynamic_activation_int8_weight": "int8-dynamic-act-int8-weight", "w8a8": "int8-dynamic-act-int8-weight",
        "int4_weight_only": "int4-weight-only", "int4": "int4-weight-only", "4w": "int4-weight-only",
        "float8": "fp8", "float8_dynamic_activation_float8_weight": "fp8",
    },
}  # fmt: skip


def _explained(errors: list) -> list[str]:
    """The faults as pydantic tells them, one line for each place: the field, the value and the remedy."""
    told: dict[str, str] = {}
    for detail in errors:
        path, owners = _place(detail)
        wanted = detail["msg"].replace("Input should be ", "")
        if detail["type"] == "extra_forbidden":
            told[path] = f"{path}: unknown key" + (_of_other_kinds(path) or suggestion(path.rpartition(".")[2], owners))
        elif detail["type"] == "missing":
            told[path] = f"{path}: required, and not given (for example {path}=...)"
        elif detail["type"] == "union_tag_invalid":
            told[path] = _wrong_kind(f"{path}.kind", str(detail["ctx"]["tag"]), detail["ctx"]["expected_tags"])
        elif detail["type"].startswith("union_tag"):
            told[path] = f"{path}.kind: {detail['msg']}"
        elif path in told:
            told[path] += f" or {wanted}"
        elif meant := KINDS_ELSEWHERE.get(path, {}).get(str(detail["input"]).lower()):
            told[path] = f"{path}={detail['input']!r}: should be {wanted}; did you mean {meant!r}?"
        else:
            told[path] = f"{path}={detail['input']!r}: should be {wanted}"
    # Of a value that can be of several types, the fault inside says more than that it is not of the others.
    return [text for path, text in told.items() if not any(p.startswith((f"{path}.", f"{path}[")) for p in told)]


def _wrong_kind(path: str, given: str, expected: str) -> str:
    known = [tag.strip(" '") for tag in expected.split(",")]
    meant = KINDS_ELSEWHERE.get(path, {}).get(given) or nearest(given, known)
    hint = f"; did you mean {meant!r}?" if meant else ""
    return f"{path}={given!r}: should be one of {', '.join(map(repr, known))}{hint}"


def _of_other_kinds(path: str) -> str | None:
    """A hint where a key belongs to the same section with another kind."""
    section, _, name = path.partition(".")
    owners = _nested(Config.model_fields[section].annotation) if section in Config.model_fields else ()
    kinds = [str(c.model_fields["kind"].default) for c in owners if name in c.model_fields and "kind" in c.model_fields]
    return f"; it is a setting of {section}.kind={' or '.join(kinds)}" if kinds else None


def _place(detail: Any) -> tuple[str, list[type[BaseModel]]]:
    """The dotted path of a fault, without the tags of unions, and the classes that its section can be."""
    owners: list[type[BaseModel]] = [Config]
    parts: list[str] = []
    section = owners
    for part in detail["loc"]:
        if isinstance(part, int) and parts:  # of a list
            parts[-1] += f"[{part}]"
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


def is_section(annotation: Any) -> bool:
    """Whether a field is settings and nothing else; `data.train` can be a name, `optim.groups` are several."""
    if get_origin(annotation) is list:
        return False
    arguments = getattr(annotation, "__args__", ())
    if not arguments:
        return isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return all(is_section(argument) for argument in arguments if argument is not type(None))


def keys(cls: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings."""
    for name, field in cls.model_fields.items():
        inner = list(_nested(field.annotation))
        if not inner or not is_section(field.annotation):
            yield prefix + name
        for one in inner:
            yield from keys(one, f"{prefix}{name}." if is_section(field.annotation) else f"{prefix}{name}[].")


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
    """What no single field is wrong about, but several together, and files that are not there.

    Without `weights`, of a run that is only reckoned with: its model may lack them, and it may have no data.
    """
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
    found += _contradictions_of_optim(config)
    if data.validation is None and (config.evaluation.every or config.evaluation.generate):
        found.append("evaluation needs held-out rows: give data.validation, for example data.validation=0.05")
    if config.early_stopping and not config.evaluation.every:
        found.append("early_stopping goes by evaluations: give evaluation.every, a number of steps")
    if config.averaging.kind != "none" and isinstance(config.optim, ScheduleFreeAdamW):
        found.append(
            f"averaging.kind={config.averaging.kind!r} beside optim.kind='schedule_free_adamw', which averages itself: "
            "leave one out"
        )
    if config.early_stopping and config.averaging.kind == "last":
        found.append(
            "averaging.kind='last' averages the last steps of a run whose end early_stopping leaves open: use "
            "averaging.kind=ema"
        )
    found += _contradictions_of_monitoring(config)
    found += _contradictions_of_evaluation(config)
    if isinstance(config.precision, QAT):
        found += _contradictions_of_qat(config, config.precision)
    t = config.trainable
    if isinstance(t, Partial):
        found += _faults_of_unfreezing(t, config.max_steps)
    if isinstance(t, Adapting):
        found += t.problems()
    if t.kind == "prefix" and config.parallel.activation_checkpointing and not batch.packing:
        found.append(
            f"parallel.activation_checkpointing={config.parallel.activation_checkpointing}: with batch.packing=false a "
            "prefix lies in the cache, which layers that are recomputed do without: use one of the two"
        )
    found += _faults_of_adapters(config)
    for columns in [data.columns, *(source.columns or {} for source in data.sources())]:
        if columns:
            from .data import formats

            if problem := formats.wrong_columns(columns):
                found.append(problem)
    for source in data.sources():
        for name in [source.path] if isinstance(source.path, str) else source.path:
            if problem := sources.missing(name):
                found.append(f"data.train: {problem}")
    if weights or config.data.sources():
        found += contradictions_of_data(config)
    if isinstance(data.validation, str) and (problem := sources.missing(data.validation)):
        found.append(f"data.validation: {problem}")
    found += _contradictions_of_precision(config)
    return found + names.problems(config.model, weights) + _contradictions_of_the_start(config)


def _contradictions_of_precision(config: Config) -> list[str]:
    """Weights in fewer bits cannot move, need their library, and may be so in the model's files already."""
    precision, trainable, found = config.precision, config.trainable, []
    if isinstance(precision, Reduced) and not isinstance(trainable, Adapting):
        found.append(
            f"precision.kind={precision.kind} keeps the weights in {'4' if precision.kind == 'nf4' else '8'} bits, "
            f"where they cannot move, and trainable.kind={trainable.kind} moves them: use method=qlora, or "
            "precision.kind=as_loaded"
        )
    if text := precision.lacking():
        found.append(f"precision.kind={precision.kind}: {text}")
    model = names.resolved(config.model)
    if text := names.ready_made_problem(model.name, names.ready_made(model), precision.kind):
        found.append(text)
    return found


def _contradictions_of_the_start(config: Config) -> list[str]:
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


def _contradictions_of_qat(config: Config, qat: QAT) -> list[str]:
    group, late, found = qat.group_size, qat.fake_quant_after_n_steps, []
    if group != WHOLE_ROW and (group < 2 or qat.scheme == "fp8"):
        wanted = "-1, as float8 weights have a scale for each output" if qat.scheme == "fp8" else "2 or more, or -1"
        found.append(f"precision.group_size={group} with precision.scheme={qat.scheme}: should be {wanted}")
    if config.max_steps is not None and late >= config.max_steps:
        found.append(
            f"precision.fake_quant_after_n_steps={late} is never reached in max_steps={config.max_steps}: nothing "
            "would be trained for the rounding; use a smaller number"
        )
    if isinstance(config.trainable, Adapting) and not config.trainable.mergeable:
        found.append(
            f"precision.kind=qat ends in a quantised model that has no place for what trainable.kind="
            f"{config.trainable.kind} adds beside its layers: use method=qat-lora, or precision.kind=as_loaded"  # type: ignore
        )
    if dropout := getattr(config.trainable, "lora_dropout", 0.0):
        found.append(
            f"trainable.lora_dropout={dropout} drops inputs of the adapter alone, and precision.kind=qat rounds it "
            "together with the weight that it is merged into: use trainable.lora_dropout=0"
        )
    return found


def _contradictions_of_optim(config: Config) -> list[str]:
    optim, schedule, clipping, batch = config.optim, config.schedule, config.clipping, config.batch
    found = schedules.problems(schedule, config.max_steps)
    for i, group in enumerate(optim.groups):
        if group.learning_rate is not None and group.lr_scale is not None:
            found.append(f"optim.groups[{i}]: learning_rate and lr_scale: give one of the two")
        if group.learning_rate is None and group.lr_scale is None and group.weight_decay is None:
            found.append(f"optim.groups[{i}] changes nothing: give learning_rate, lr_scale or weight_decay")
        if not group.patterns:
            found.append(f"optim.groups[{i}].patterns: names nothing")
    if isinstance(optim, SGD) and optim.nesterov and not optim.momentum:
        found.append("optim.nesterov=true needs optim.momentum, for example optim.momentum=0.9")
    if optim.loraplus_lr_ratio is not None and not hasattr(config.trainable, "lora_alpha"):
        found.append(
            f"optim.loraplus_lr_ratio={optim.loraplus_lr_ratio} needs a LoRA, and trainable.kind is "
            f"{config.trainable.kind}: leave it out, or use method=lora"
        )
    if isinstance(optim, ScheduleFreeAdamW) and not isinstance(schedule, Constant):
        found.append(
            f"schedule.kind={schedule.kind} does not go with optim.kind=schedule_free_adamw, whose average takes the "
            "place of a falling rate: use schedule.kind=constant, with schedule.warmup if wanted"
        )
    if optim.rounding != "master" and config.precision.dtype == "float32":
        found.append(
            f"optim.rounding={optim.rounding} is for weights in 16 bits, and precision.dtype is float32: use "
            "precision.dtype=bfloat16, or leave it out"
        )
    if optim.fused_backward and isinstance(clipping, NormClipping):
        found.append(
            "optim.fused_backward steps each weight before the norm of the whole gradient is known, which "
            "clipping.kind=norm needs: use clipping=none, clipping.kind=value or clipping.kind=adaptive"
        )
    if optim.fused_backward and batch.tokens is not None and batch.tokens > batch.micro_tokens:
        found.append(
            f"optim.fused_backward allows one row a step, and batch.tokens={batch.tokens} makes "
            f"{batch.tokens // batch.micro_tokens}: use batch.micro_tokens={batch.tokens}"
        )
    if isinstance(schedule, ReduceLROnPlateau):
        found += _contradictions_of_plateau(schedule, config.evaluation)
    if optim.fused_backward and config.monitor.on_nonfinite == "skip":
        found.append(
            "monitor.on_nonfinite=skip: optim.fused_backward steps weights before the gradient is known to be finite; "
            "use one of the two"
        )
    return found


def _contradictions_of_plateau(schedule: ReduceLROnPlateau, evaluation: Evaluation) -> list[str]:
    if evaluation.every is None:
        return ["schedule.kind=reduce_lr_on_plateau looks at evaluations: give evaluation.every, and data.validation"]
    if schedule.metric in ON_ANSWERS and not (evaluation.generate and evaluation.generate_every):
        return [
            f"schedule.metric={schedule.metric} is counted on answers: give evaluation.generate, for example "
            "evaluation.generate=100, and evaluation.generate_every=true"
        ]
    return []


def _contradictions_of_monitoring(config: Config) -> list[str]:
    monitor, found = config.monitor, []
    if len(set(monitor.report_to)) < len(monitor.report_to):
        found.append(f"monitor.report_to={monitor.report_to}: name each tracker once")
    if monitor.histogram_every and not monitor.report_to:
        found.append(
            f"monitor.histogram_every={monitor.histogram_every} has nowhere to go: name a tracker in monitor.report_to"
        )
    if monitor.profile_steps and not 1 <= monitor.profile_steps[0] < monitor.profile_steps[1]:
        found.append(
            f"monitor.profile_steps={monitor.profile_steps}: should be [start, stop) with 1 <= start < stop, "
            "for example [3, 5] for steps 3 and 4"
        )
    return found


def contradictions_of_data(config: Config) -> list[str]:
    """What does not go together in how rows reach the loop."""
    data, found = config.data, []
    entries = data.sources()
    if not entries:
        found.append("data.train=[]: name at least one source")
    weighted = [entry for entry in entries if entry.weight is not None]
    if weighted and len(weighted) < len(entries):
        without = next(entry for entry in entries if entry.weight is None)
        found.append(f"data.train: {without.path!r} has no weight and others have: give all sources one, or none")
    elif weighted and min(e.weight or 0 for e in entries) < 1e-6 * sum(e.weight or 0 for e in entries):
        found.append("data.train: a weight is less than a millionth of all: leave that source out, or give it more")
    if weighted and data.limit is not None:
        found.append(f"data.limit={data.limit} with weights would cut the first sources only: give each its own limit")
    if data.cache is False and data.cache_dir is not None:
        found.append(f"data.cache=false keeps nothing in data.cache_dir={data.cache_dir!r}: leave one of them out")
    if not data.streaming:
        if data.shuffle_buffer != Data.model_fields["shuffle_buffer"].default:
            found.append(
                f"data.shuffle_buffer={data.shuffle_buffer} is of streams, and without one all rows are shuffled: "
                "leave it out, or set data.streaming=true"
            )
        return found
    if config.model.tokenizer == "train" and isinstance(data.validation, int | float):
        found.append(
            f"data.validation={data.validation} of a stream, and model.tokenizer=train: held-out text must not be seen "
            "by the tokenizer; give the held-out rows as a file"
        )
    if config.max_steps is None:
        found.append("data.streaming=true has no end that is known beforehand: give max_steps")
    if data.cache is True:
        found.append("data.cache=true with data.streaming=true: a stream keeps no tokens; leave one of them out")
    if data.limit is not None or any(entry.limit is not None for entry in entries):
        found.append("data.limit with data.streaming=true: use max_steps to learn less of a stream")
    if config.batch.examples is not None and data.shuffle_buffer < config.batch.examples:
        found.append(
            f"data.shuffle_buffer={data.shuffle_buffer} is less than batch.examples={config.batch.examples}, so no "
            "step would be full: use a larger buffer"
        )
    return found


def _contradictions_of_evaluation(config: Config) -> list[str]:
    e, found = config.evaluation, []
    if config.data.validation is None and (e.forgetting or e.tasks):
        named = "forgetting" if e.forgetting else "tasks"
        found.append(
            f"evaluation.{named} is measured with the held-out rows: give data.validation, for example 0.05"
        )
    if not e.generate and e.metrics != ["exact_match"]:
        found.append(f"evaluation.metrics={e.metrics} scores answers: give evaluation.generate, the number of prompts")
    if twice := sorted({m for m in e.metrics if e.metrics.count(m) > 1}):
        found.append(f"evaluation.metrics: {', '.join(twice)} is named twice")
    if "bleu" in e.metrics and not find_spec("sacrebleu"):
        found.append("evaluation.metrics: bleu is counted by sacrebleu: pip install 'luthier[eval]'")
    if e.every and e.metric_for_best_model in ON_ANSWERS and not (e.generate and e.generate_every):
        found.append(
            f"evaluation.metric_for_best_model={e.metric_for_best_model!r} is counted on answers, so every evaluation "
            "has to answer: give evaluation.generate, and evaluation.generate_every=true"
        )
    if e.forgetting not in (None, PYTHON_DOCS) and (problem := sources.missing(e.forgetting)):
        found.append(f"evaluation.forgetting: {problem}; give a file of rows, or {PYTHON_DOCS}")
    if e.tasks and not find_spec("lm_eval"):
        found.append("evaluation.tasks are done with lm-evaluation-harness: pip install 'luthier[eval]'")
    for task in e.tasks:
        path = Path(task).expanduser()
        if (path.suffix in (".yaml", ".yml") or len(path.parts) > 1) and not path.exists():
            found.append(f"evaluation.tasks: there is no {path}; give a task's name, its YAML file or a folder of them")
        elif path.exists() and not e.trust_task_files:
            found.append(
                f"evaluation.tasks: {path} is a file or folder of task files, which may run Python of their own: read "
                "them, then set evaluation.trust_task_files=true"
            )
    return found


def _faults_of_adapters(config: Config) -> list[str]:
    """What is wrong with saved adapters: those beneath what is trained, and the one that a run goes on with."""
    found = adapter_files.problems(config.trainable)
    entries = config.model.beneath
    for entry in entries:
        try:
            saved = adapter_files.read(entry.path)
        except AdapterError as error:
            found.append(f"model.adapters: {error}")
            continue
        if not entry.share:
            found.append(f"model.adapters: share=0 of {entry.path!r} leaves nothing of it: leave the adapter out")
        elif entry.share != 1 and not isinstance(saved.settings, BesideLayers):
            found.append(
                f"model.adapters: share={entry.share:g} of {entry.path!r}, but virtual tokens are there or not: leave "
                "share out"
            )
    called = [entry.name for entry in entries]
    if twice := sorted({str(name) for name in called if called.count(name) > 1}):
        found.append(f"model.adapters: two adapters of the name {twice[0]!r}: give one of them another `name`")
    if "default" in called:
        found.append("model.adapters: the name 'default' is that of the adapter that is trained: give another `name`")
    if entries and not isinstance(config.trainable, Adapting):
        found.append(
            f"model.adapters lie frozen beneath a new adapter, and method={config.method} trains the model itself: "
            "merge them into it first (luthier.adapters.merge), or use method=lora"
        )
    if entries and config.model.starts_at_random:
        found.append("model.adapters of a random start: an adapter belongs to loaded weights; leave one of them out")
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


def schema() -> dict:
    """JSON schema of the YAML file, for editors. What a method's row gives need not be written."""
    made = Config.model_json_schema()
    made["required"] = ["model", "data"]
    made["properties"]["method"]["enum"] = sorted(METHODS)
    for section, kind in DEFAULT_KINDS.items():  # a section without a kind is the default's
        for other, reference in made["properties"][section]["discriminator"]["mapping"].items():
            if other != kind:
                cls = made["$defs"][reference.rpartition("/")[2]]
                cls["required"] = sorted({*cls.get("required", []), "kind"})
    for section, main in SHORT.items():
        made["properties"][section] = {"anyOf": [made["properties"][section], {"type": "string", "description": main}]}
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return made
