"""What does not go together with weights in fewer bits, or rounded ones."""

from __future__ import annotations

from ..fields import Config
from ..models import names
from ..precision import QAT, WHOLE_ROW, Reduced
from ..trainable.adapter import Adapting


def problems(config: Config) -> list[str]:
    rounding = _of_qat(config, config.precision) if isinstance(config.precision, QAT) else []
    return [*rounding, *of_storage(config)]


def _of_qat(config: Config, qat: QAT) -> list[str]:
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


def of_storage(config: Config) -> list[str]:
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
