"""What no single field is wrong about, but several together, and files that are not there."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from pydantic import ValidationError

from . import critics, rewards
from .data import Data, sources
from .errors import AdapterError
from .faults import explained
from .fields import ON_ANSWERS, PYTHON_DOCS, Config, Evaluation
from .models import Model, names
from .objectives import Distillation
from .objectives.distillation import Teacher
from .objectives.ppo import ValueModel
from .optim import (
    SGD,
    Constant,
    NormClipping,
    ReduceLROnPlateau,
    ScheduleFreeAdamW,
)
from .optim import schedule as schedules
from .precision import QAT, WHOLE_ROW, Reduced
from .trainable import Partial, Selection, adapter_files
from .trainable.adapter import Adapting, BesideLayers


def contradictions(config: Config, weights: bool = True, training: bool = True) -> list[str]:
    """What no single field is wrong about, but several together, and files that are not there.

    Without `weights`, of a run that is only reckoned with: its model may lack them, and it may have no data. Without
    `training`, of a run that is asked or exported: what it learnt from and with may have gone.
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
    found += config.objective.problems()
    if config.objective.rolls_out:
        found += _contradictions_of_rollouts(config)
    if (wanted := config.objective.ahead) and data.streaming:
        found.append(
            f"objective.{wanted} computes something for every row before the first step, and the rows of a stream "
            "(data.streaming=true) are not known then: use one of the two"
        )
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
    found += _faults_of_formats(config)
    found += _contradictions_of_scores(config)
    if training:
        found += missing_rows(config)
    if weights or config.data.sources():
        found += contradictions_of_data(config)
    found += _contradictions_of_precision(config)
    if training and isinstance(config.objective, Distillation) and config.objective.teacher:
        found += _faults_of_teacher(config, config.objective.teacher, weights)
    if training and (critic := critics.settings_of(config)):
        found += _faults_of_critic(config, critic, weights)
    return found + names.problems(config.model, weights) + _contradictions_of_the_start(config)


def missing_rows(config: Config) -> list[str]:
    """Files of rows that are not there."""
    data = config.data
    named = [("data.train", source.path) for source in data.sources()]
    named += [("data.validation", data.validation)] if isinstance(data.validation, str) else []
    paths = [(key, name) for key, path in named for name in ([path] if isinstance(path, str) else path)]
    return [f"{key}: {problem}" for key, name in paths if (problem := sources.missing(name))]


def _contradictions_of_scores(config: Config) -> list[str]:
    """What goes with a network that ends in scores of texts or tokens, and what with one that predicts tokens."""
    found, data, ends_in = [], config.data, config.objective.ends_in
    has_labels = config.objective.rows in ("labelled", "tagged")
    if has_labels and data.long_text == "split":
        found.append(
            "data.long_text=split would give the label of a text to each of its pieces: use data.long_text=cut, or "
            "data.long_text=error"
        )
    if data.long_text == "cut" and not has_labels:
        found.append("data.long_text=cut is for texts with labels; others lose what is learnt: leave it out")
    if ends_in == "tokens":
        return found
    if config.evaluation.generate:
        found.append(
            f"evaluation.generate={config.evaluation.generate}: this model gives scores, not answers: leave it out"
        )
    if config.evaluation.tasks:
        found.append("evaluation.tasks need a model that predicts tokens: leave them out")
    if data.streaming and config.objective.asks_labels:
        found.append(
            "data.streaming=true: labels cannot be told from rows that are read as they are learnt: give "
            "objective.labels, and objective.problem_type"
        )
    return found


def _faults_of_formats(config: Config) -> list[str]:
    """A format that is named must be one of the rows that the objective learns from."""
    found, kind = [], config.objective.rows
    for name in dict.fromkeys([config.data.format, *(source.format for source in config.data.sources())]):
        if name in (None, "auto"):
            continue
        from .data import formats

        if formats.FORMATS[name] not in formats.of_kind(kind):
            fitting = ", ".join(["auto", *(form.name for form in formats.of_kind(kind))])
            found.append(f"data.format={name} is not for method={config.method}: use {fitting}")
    if config.evaluation.forgetting and config.objective.ends_in != "tokens":
        found.append("evaluation.forgetting: this model does not predict tokens, so it has no such loss: leave it out")
    return found


def _contradictions_of_rollouts(config: Config) -> list[str]:
    """What does not go with answers that the network gives meanwhile."""
    o, batch, found = config.objective.sampling, config.batch, rewards.faults(getattr(config.objective, "rewards", []))
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


def _faults_of_critic(config: Config, critic: ValueModel, weights: bool) -> list[str]:
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
    found += _contradictions_of_precision(made) + adapter_files.problems(made.trainable)
    if isinstance(made.trainable, Adapting):
        found += made.trainable.problems()
    if isinstance(made.trainable, Partial) and made.trainable.unfreeze:
        found.append("trainable.unfreeze: what moves in a critic moves from the start: leave it out there")
    if isinstance(made.precision, QAT):
        found.append("precision.kind=qat rounds what is deployed, and a critic is not: use as_loaded there")
    return [f"objective.critic: {text}" for text in found]


def _faults_of_teacher(config: Config, teacher: Teacher, weights: bool) -> list[str]:
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
