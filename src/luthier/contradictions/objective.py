"""What does not go together with an objective: its rollouts, its teacher, its critic."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from pydantic import ValidationError

from .. import critics, rewards
from ..faults import explained
from ..fields import Config
from ..models import Model, names
from ..objectives import Distillation
from ..objectives.distillation import Teacher
from ..objectives.ppo import ValueModel
from ..optim import ReduceLROnPlateau
from ..precision import QAT
from ..trainable import Partial, adapter_files
from ..trainable.adapter import Adapting
from . import precision


def problems(config: Config, weights: bool = True, training: bool = True) -> list[str]:
    objective = config.objective
    found = [*objective.problems(), *(_of_rollouts(config) if objective.rolls_out else [])]
    if objective.ahead and config.data.streaming:
        found.append(
            f"objective.{objective.ahead} computes something for every row before the first step, and the rows of a "
            "stream (data.streaming=true) are not known then: use one of the two"
        )
    if training and isinstance(objective, Distillation) and objective.teacher:
        found += _of_teacher(config, objective.teacher, weights)
    if training and objective.own_critic:
        found += _of_critic(config, objective.own_critic, weights)
    return found


def _of_rollouts(config: Config) -> list[str]:
    """What does not go with answers that the network gives meanwhile."""
    o, batch, found = config.objective.sampling, config.batch, rewards.faults(config.objective.rewarded or [])
    room = config.data.max_length - o.max_completion_length
    if room < 1:
        found.append(
            f"{o.section}.max_completion_length={o.max_completion_length} leaves no room for a prompt in "
            f"data.max_length={config.data.max_length}, which is of both: raise data.max_length"
        )
    if batch.tokens is not None:
        found.append(
            f"batch.tokens={batch.tokens}: how long answers will be is not known, so a step has so many of them: use "
            "batch.examples"
        )
    elif ((batch.examples or 16) * o.num_mini_batches) % o.num_generations:
        found.append(
            f"batch.examples={batch.examples or 16} x {o.section}.num_mini_batches={o.num_mini_batches} answers are no "
            f"whole number of groups of {o.section}.num_generations={o.num_generations}: use a multiple of that"
        )
    if config.data.streaming:
        found.append(f"data.streaming=true with method={config.method}: prompts are few and short; read them whole")
    if config.optim.fused_backward:
        found.append(
            "optim.fused_backward allows one row a step, and how many rows answers will fill is not known: leave it out"
        )
    if config.data.format == "text":
        found.append(f"data.format=text: {o.section} answers prompts, and plain text has none: give rows with them")
    if config.objective.rows != "prompts":
        return found
    e = config.evaluation
    if e.generate:
        found.append(
            f"evaluation.generate={e.generate}: method={config.method} answers every held-out prompt at each "
            "evaluation, and rewards score the answers: leave it out; a reward of weight 0 is measured only"
        )
    if config.data.validation is not None and e.metric_for_best_model == "loss":
        found.append("evaluation.metric_for_best_model=loss: answers have rewards and no loss: use reward")
    if isinstance(config.schedule, ReduceLROnPlateau) and config.schedule.metric == "loss":
        found.append("schedule.metric=loss: held-out answers have rewards and no loss: use reward")
    return found


def _of_teacher(config: Config, teacher: Teacher, weights: bool) -> list[str]:
    found, folder = [], Path(teacher.name).expanduser()
    if teacher.precision == "nf4" and not find_spec("bitsandbytes"):
        found.append("objective.teacher.precision=nf4: pip install 'luthier[quant]' (4-bit weights are bitsandbytes')")
    if not (folder / "config.yaml").is_file():
        model = Model(name=teacher.name, revision=teacher.revision)  # type: ignore[call-arg]
        kept = Path(config.output_dir).expanduser() / "ahead" / "training" / "manifest.json"  # all that it says
        if (text := names.problem(names.resolved(model), weights)) and not (config.objective.ahead and kept.is_file()):
            found.append(f"objective.teacher: {text}; training needs it: put it there, or name another for a new run")
        ready = names.ready_made(names.resolved(model))
        if text := names.ready_made_problem(teacher.name, ready, teacher.precision or "as_loaded"):
            found.append(f"objective.teacher: {text}")
        if classes := names.no_causal_model(teacher.name):
            found.append(
                f"objective.teacher={teacher.name!r} is a {classes}, which gives no scores of the next token: give a "
                "causal language model"
            )
    elif folder.resolve() == Path(config.output_dir).expanduser().resolve():
        found.append(f"objective.teacher={teacher.name!r} is the folder of this run: give another output_dir")
    elif teacher.revision:
        found.append(f"objective.teacher.revision={teacher.revision!r}, but {teacher.name!r} is a run: leave it out")
    return found


def _of_critic(config: Config, critic: ValueModel, weights: bool) -> list[str]:
    """What is wrong with a critic that is a network of its own."""
    folder, given = critics.run_folder(critic), [n for n in ("trainable", "precision") if getattr(critic, n)]
    if folder is not None:
        found = []
        if given or critic.revision:
            named = [*given, *(["revision"] if critic.revision else [])][0]
            found.append(
                f"objective.critic.{named}, but {critic.name!r} is a run, which goes on as it was: leave it out"
            )
        if folder.resolve() == Path(config.output_dir).expanduser().resolve():
            found.append(f"objective.critic={critic.name!r} is the folder of this run: give another output_dir")
        return found
    try:
        made = critics.config_of(config, critic)
    except ValidationError as error:
        return [f"objective.critic.{text}" for text in explained(error.errors())]
    found = [text.replace("model.name: ", "", 1) for text in names.problems(made.model, weights)]
    found += precision.of_storage(made) + adapter_files.problems(made.trainable)
    if isinstance(made.trainable, Adapting):
        found += made.trainable.problems()
    if isinstance(made.trainable, Partial) and made.trainable.unfreeze:
        found.append("trainable.unfreeze: what moves in a critic moves from the start: leave it out there")
    if isinstance(made.precision, QAT):
        found.append("precision.kind=qat rounds what is deployed, and a critic is not: use as_loaded there")
    return [f"objective.critic: {text}" for text in found]
