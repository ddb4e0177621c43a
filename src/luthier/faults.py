"""What is wrong with a key or a value, in words: where it belongs, what it is called here, what was meant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .fields import Config
from .settings import hint, nearest

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
    "num_labels": "objective.labels", "id2label": "objective.labels", "label2id": "objective.labels",
    "label_list": "objective.labels", "label_names": "objective.labels", "pos_weight": "objective.class_weights",
    "loss_weights": "objective.class_weights", "class_weight": "objective.class_weights",
    "text_column_name": "data.columns", "text_column_names": "data.columns", "label_column_name": "data.columns",
    "quantizer": "precision.scheme", "quantization_aware_training": "precision.kind", "qat": "precision.kind",
    "reward_funcs": "objective.rewards", "reward_weights": "objective.rewards", "reward_model": "objective.rewards",
    "reward_model_path": "objective.rewards", "reward_processing_classes": "objective.rewards",
    "fake_quant_after_n_step": "precision.fake_quant_after_n_steps",
    "ppo_epochs": "objective.num_ppo_epochs", "init_kl_coef": "objective.kl_coef", "kl_coeff": "objective.kl_coef",
    "adap_kl_ctrl": "objective.adaptive_kl", "kl_ctrl": "objective.adaptive_kl", "clip_range": "objective.cliprange",
    "value_clip": "objective.cliprange_value", "value_clip_range": "objective.cliprange_value",
    "value_coeff": "objective.vf_coef", "ent_coef": "objective.entropy_coef", "gae_lambda": "objective.lam",
    "ppo_whiten_rewards": "objective.whiten_rewards", "whiten_adv": "objective.whiten_advantages",
    "value_model": "objective.critic", "value_model_path": "objective.critic", "critic_model": "objective.critic",
    "teacher_model": "objective.teacher", "teacher_model_name_or_path": "objective.teacher",
    "teacher_path": "objective.teacher", "teacher_checkpoint": "objective.teacher", "kd_ratio": "objective.alpha",
    "kd_temperature": "objective.temperature", "distillation_temperature": "objective.temperature",
    "teacher_model_revision": "objective.teacher.revision", "alpha_ce": "objective.alpha",
    "distillation_alpha": "objective.alpha", "ce_weight": "objective.alpha", "lambda": "objective.lmbda",
    "on_policy_lambda": "objective.lmbda", "top_k_logits": "objective.top_k",
    "pref_beta": "objective.beta", "pref_loss": "objective.loss_type", "pref_ftx": "objective.rpo_alpha",
    "dpo_label_smoothing": "objective.label_smoothing", "kto_chosen_weight": "objective.desirable_weight",
    "kto_rejected_weight": "objective.undesirable_weight", "gamma_beta_ratio": "objective.simpo_gamma",
    "precompute_ref_batch_size": "batch.micro_tokens",
    "reward_functions": "objective.rewards", "max_prompt_length": "data.max_length",
    "response_length": "objective.max_completion_length", "max_response_length": "objective.max_completion_length",
    "generation_batch_size": "objective.num_mini_batches", "steps_per_generation": "objective.num_mini_batches",
    "rollout_batch_size": "objective.num_mini_batches", "group_size": "objective.num_generations",
    "epsilon_low": "objective.epsilon", "cliprange": "objective.epsilon", "clip_eps": "objective.epsilon",
    "kl_penalty": "objective.kl_estimator", "kl_loss_coef": "objective.beta", "kl_loss_type": "objective.kl_estimator",
    "entropy_coeff": "objective.entropy_coef", "filter_groups": "objective.max_resamples",
    "num_resample_times": "objective.max_resamples", "dynamic_sample": "objective.max_resamples",
    "rloo_k": "objective.num_generations", "num_sample_generations": "evaluation.every",
    "vllm_importance_sampling_correction": "objective.rollout_correction",
    "vllm_importance_sampling_mode": "objective.rollout_correction",
    "vllm_importance_sampling_cap": "objective.rollout_correction_cap",
    "overlong_filter": "objective.mask_truncated_completions",
}  # fmt: skip
SECTIONS_ELSEWHERE = {  # what other libraries call a section
    "optimizer": "optim", "optimiser": "optim", "lora": "trainable", "peft": "trainable", "adapter": "trainable",
    "lr_scheduler": "schedule", "scheduler": "schedule", "dataset": "data", "quantization": "precision",
    "eval": "evaluation", "checkpointing": "checkpoint", "logging": "monitor", "loss": "objective",
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
    "objective.kind": {
        "sequence_classification": "classification", "seq_cls": "classification",
        "text_classification": "classification",
        "single_label_classification": "classification", "multi_label_classification": "classification",
        "regression": "classification", "token_cls": "token_classification", "ner": "token_classification",
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


def explained(errors: list) -> list[str]:
    """The faults as pydantic tells them, one line for each place: the field, the value and the remedy."""
    told: dict[str, str] = {}
    for detail in errors:
        path, owners = place(detail)
        wanted = detail["msg"].replace("Input should be ", "")
        section = "." not in path and isinstance(detail["input"], dict) and detail["input"]
        if detail["type"] == "extra_forbidden" and section:
            for inner in _dotted(detail["input"]):
                told[f"{path}.{inner}"] = f"{path}.{inner}: unknown key{_elsewhere(path, inner)}"
        elif detail["type"] == "extra_forbidden":
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
            told[path] = f"{path}={detail['input']!r}: should be {wanted}{hint(meant)}"
        else:
            told[path] = f"{path}={detail['input']!r}: should be {wanted}"
    # Of a value that can be of several types, the fault inside says more than that it is not of the others.
    return [text for path, text in told.items() if not any(p.startswith((f"{path}.", f"{path}[")) for p in told)]


def _wrong_kind(path: str, given: str, expected: str) -> str:
    known = [tag.strip(" '") for tag in expected.split(",")]
    meant = KINDS_ELSEWHERE.get(path, {}).get(given) or nearest(given, known)
    return f"{path}={given!r}: should be one of {', '.join(map(repr, known))}{hint(meant)}"


def _of_other_kinds(path: str) -> str | None:
    """A hint where a key belongs to the same section with another kind."""
    section, _, name = path.partition(".")
    owners = nested(Config.model_fields[section].annotation) if section in Config.model_fields else ()
    kinds = [str(c.model_fields["kind"].default) for c in owners if name in c.model_fields and "kind" in c.model_fields]
    return f"; it is a setting of {section}.kind={' or '.join(kinds)}" if kinds else None


def place(detail: Any) -> tuple[str, list[type[BaseModel]]]:
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
            section, owners = owners, [c for f in fields for c in nested(f.annotation)]
        elif tagged:
            owners = tagged
    if detail["type"] == "extra_forbidden":
        parts.append(str(detail["loc"][-1]))
        section = owners
    return ".".join(parts), section


def nested(annotation: Any) -> Iterator[type[BaseModel]]:
    """The config classes inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from nested(argument)


def fields_of(key: str) -> tuple[list[FieldInfo], str | None]:
    """The fields that a dotted name can mean, one for each kind of its section, and what is wrong with it, if anything.

    Below a field of free keys, such as model.config, every name is right.
    """
    owners: list[type[BaseModel]] = [Config]
    found: list[FieldInfo] = []
    parts = key.split(".")
    for i, part in enumerate(parts):
        if found and not owners and any(is_free(field.annotation) for field in found):
            return [], None
        found = [owner.model_fields[part] for owner in owners if part in owner.model_fields]
        if not found:
            inner = ".".join(parts[1:])
            return [], f"{key}: unknown key{suggestion(part, owners) if i or not inner else _elsewhere(part, inner)}"
        owners = [cls for field in found if is_section(field.annotation) for cls in nested(field.annotation)]
    return found, None


def is_free(annotation: Any) -> bool:
    """Whether a field takes keys that nobody has declared."""
    return get_origin(annotation) is dict or any(map(is_free, getattr(annotation, "__args__", ())))


def _dotted(values: dict) -> Iterator[str]:
    """The dotted names of the values in keys of keys; the key itself where it has none."""
    for key, value in values.items():
        inner = list(_dotted(value)) if isinstance(value, dict) else []
        yield from (f"{key}.{name}" for name in inner) if inner else (str(key),)


def _elsewhere(section: str, inner: str) -> str:
    """The nearest name of a key in a section that there is not: in the section that was meant, else anywhere."""
    meant = SECTIONS_ELSEWHERE.get(section) or nearest(section, Config.model_fields)
    if meant and fields_of(f"{meant}.{inner}")[1] is None:
        return hint(f"{meant}.{inner}")
    owners = list(nested(Config.model_fields[meant].annotation)) if meant else [Config]
    name = inner.rpartition(".")[2]
    here = {field for owner in owners for field in owner.model_fields}
    if meant and name not in ELSEWHERE and (found := nearest(name, here)):
        return hint(f"{meant}.{found}")
    return suggestion(name, owners)


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
        inner = list(nested(field.annotation))
        if not inner or not is_section(field.annotation):
            yield prefix + name
        for one in inner:
            yield from keys(one, f"{prefix}{name}." if is_section(field.annotation) else f"{prefix}{name}[].")


def suggestion(name: str, owners: list[type[BaseModel]]) -> str:
    """The nearest name in the same section, else anywhere."""
    here = {field for owner in owners for field in owner.model_fields}
    if name in ELSEWHERE:
        return hint(ELSEWHERE[name])
    if meant := nearest(name, here):
        return hint(meant)
    everywhere = {key.rpartition(".")[2]: key for key in reversed(list(keys()))}
    if meant := nearest(name, everywhere):
        return hint(everywhere[meant])
    return f"; known here: {', '.join(sorted(here))}"
