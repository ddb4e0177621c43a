"""What does not go together in how steps are taken: their size, optimiser, schedule, clipping, averaging."""

from __future__ import annotations

from ..fields import ON_ANSWERS, Config, Evaluation
from ..optim import SGD, Constant, NormClipping, ReduceLROnPlateau, ScheduleFreeAdamW
from ..optim import schedule as schedules


def problems(config: Config) -> list[str]:
    return [*_of_size(config), *_of_optim(config), *_of_averaging(config)]


def _of_size(config: Config) -> list[str]:
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
    return found


def _of_optim(config: Config) -> list[str]:
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
        found += _of_plateau(schedule, config.evaluation)
    if optim.fused_backward and config.monitor.on_nonfinite == "skip":
        found.append(
            "monitor.on_nonfinite=skip: optim.fused_backward steps weights before the gradient is known to be finite; "
            "use one of the two"
        )
    return found


def _of_plateau(schedule: ReduceLROnPlateau, evaluation: Evaluation) -> list[str]:
    if evaluation.every is None:
        return ["schedule.kind=reduce_lr_on_plateau looks at evaluations: give evaluation.every, and data.validation"]
    if schedule.metric in ON_ANSWERS and not (evaluation.generate and evaluation.generate_every):
        return [
            f"schedule.metric={schedule.metric} is counted on answers: give evaluation.generate, for example "
            "evaluation.generate=100, and evaluation.generate_every=true"
        ]
    return []


def _of_averaging(config: Config) -> list[str]:
    found = []
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
    return found
