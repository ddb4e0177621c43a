"""The teacher of a distillation: a model or a run, loaded frozen beside the student, its vocabulary compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from . import surgery
from .config import Config, read_run
from .errors import ModelError
from .models import Model, load, names, network, skeleton, translation, trials
from .objectives import Distillation
from .objectives.distillation import Teacher as Settings
from .precision import AsLoaded, Precision, Reduced
from .trainable.adapter import Adapting

Say = Callable[[str], None]


@dataclass(frozen=True)
class Teacher:
    """A frozen network, and what its vocabulary has in common with the student's."""

    network: network.Network
    width: int  # tokens that both score: the first so many of both
    translation: translation.Translation | None = None  # with objective.vocabulary=align


def run_folder(teacher: Settings) -> Path | None:
    """Where the run is that the teacher is, if it is one."""
    folder = Path(teacher.name).expanduser()
    return folder if (folder / "config.yaml").is_file() else None


def precision(teacher: Settings, own: Any = None) -> Any:
    """The settings of its precision; `own` is that of the run that it is."""
    if teacher.precision is None and own is not None:
        return own if teacher.dtype == "auto" else own.model_copy(update={"dtype": teacher.dtype})
    given = {"kind": teacher.precision or AsLoaded().kind, "dtype": teacher.dtype}
    return TypeAdapter(Precision).validate_python(given)


def model_of(teacher: Settings, run: Config) -> Model:
    made = Model(name=teacher.name, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)  # type: ignore
    return names.resolved(made).model_copy(update={"attention": run.model.attention})


def load_teacher(
    run: Config, student: Any, tokenizer: Any, device: torch.device, restored: Callable, say: Say,
) -> Teacher:  # fmt: skip
    """The teacher of a run on its device. `restored(folder, precision)` opens one that is a run itself."""
    teacher = _settings(run)
    if (folder := run_folder(teacher)) is not None:
        net, theirs = _of_run(teacher, folder, device, restored, say)
    else:
        wanted, model = precision(teacher), model_of(teacher, run)
        dtype = wanted.resolve(device)
        theirs = load.load_tokenizer(model)
        made = load.load_model(model, dtype, device, wanted.storage(dtype), say)
        load.check_context(made, run.data.max_length, lambda text: say(f"the teacher: {text}"))
        net = network.Network(made)
        trials.check_causal(net)
        trials.check_head(net)
        reason = trials.prepare(net, run.model.attention if run.batch.packing else "padded")
        if reason:
            say(f"the teacher, a {type(made).__name__}, runs padded instead of packed: {reason}")
    net.longest = run.data.max_length
    net.requires_grad_(False).eval()
    return _compared(run, student, tokenizer, net, theirs, say)


def _of_run(teacher: Settings, folder: Path, device: torch.device, restored: Callable, say: Say) -> tuple[Any, Any]:
    config = read_run(folder)
    if config.objective.ends_in != "tokens":
        raise ModelError(
            f"objective.teacher={teacher.name!r} is a run of method={config.method}, whose network gives no scores of "
            "the next token: give one that predicts tokens"
        )
    wanted = precision(teacher, config.precision)
    late = isinstance(wanted, Reduced) and not isinstance(config.trainable, Adapting)  # what moved is in plain numbers
    made = restored(folder, config.precision if late else wanted)
    if late:
        dtype = wanted.resolve(device)
        store = wanted.storage(dtype)
        assert store is not None
        load.stored(made.network.model.to(dtype), store, device, say)
    return made.network, made.tokenizer


def _compared(run: Config, student: Any, tokenizer: Any, net: Any, theirs: Any, say: Say) -> Teacher:
    width = _width(student, net)
    difference = translation.difference(tokenizer, theirs)
    if run.objective.vocabulary == "align":  # type: ignore[union-attr]
        if difference is None:
            raise ModelError("objective.vocabulary=align: the teacher has the student's vocabulary: leave it out")
        made = translation.Translation.of(tokenizer, theirs, net.device)
        say(
            f"the teacher has another vocabulary: {len(made.own):,} tokens of the student's {len(tokenizer):,} are "
            f"tokens of its {len(theirs):,}, too; all others are compared as one"
        )
        return Teacher(net, width, made)
    if difference:
        name = _settings(run).name
        raise ModelError(
            f"objective.teacher={name!r} has another vocabulary: {difference}. Its distributions are not over the "
            f"student's tokens: use a teacher with the student's tokenizer, model.tokenizer={name} for a student that "
            "starts at random, or objective.vocabulary=align"
        )
    more = len(theirs) - len(tokenizer)
    if more > 0:
        say(f"the teacher has {more:,} tokens more than the student; its probabilities are taken among the student's")
    template = theirs.chat_template
    if template and tokenizer.chat_template and template != tokenizer.chat_template:
        say("the teacher has another chat template than the student: it reads rows in the student's")
    return Teacher(net, width)


def outlined(run: Config, student: Any, dtype_of: Callable, outline: Callable) -> Teacher:
    """The same on the meta device, shapes without values. `outline(config)` makes that of a run."""
    teacher = _settings(run)
    if (folder := run_folder(teacher)) is not None:
        config = read_run(folder)
        net = outline(config.model_copy(update={"precision": precision(teacher, config.precision)})).network
    else:
        wanted, model = precision(teacher), model_of(teacher, run)
        dtype = dtype_of(wanted)
        made = skeleton.outline(model, dtype, run.data.max_length)
        if store := wanted.storage(dtype):
            made = load.stored(made, store, torch.device("meta"))
        net = network.Network(made)
        if student.packed and trials.unpackable(net) is None:
            network.pack(net)
    net.longest = run.data.max_length
    net.requires_grad_(False).eval()
    width = _width(student, net)
    aligned = run.objective.vocabulary == "align"  # type: ignore[union-attr]
    return Teacher(net, width, translation.Translation.outlined(width) if aligned else None)


def _width(*networks: network.Network) -> int:
    shapes = [surgery.linear_shape(net.head.module) for net in networks]
    return min(shape[1] for shape in shapes if shape is not None)


def _settings(run: Config) -> Settings:
    assert isinstance(run.objective, Distillation)
    assert run.objective.teacher, "checked with the configuration"
    return run.objective.teacher
