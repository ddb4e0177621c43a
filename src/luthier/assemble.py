"""Config to network, objective and tokenizer: the one place where the order of transformations matters."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import checkpoint, critics, surgery, teachers
from .assembled import Assembled
from .config import Config, read_run
from .data import cache, holdout
from .data.masks import Renderer
from .errors import LuthierError, ModelError
from .models import heads, load, network, skeleton, start, translation, trials, vocabulary
from .models.names import TRAIN
from .parallel import layers
from .parallel.ranks import Ranks
from .shared import Shared
from .trainable import Partial, Prompt, adapter_files, saved
from .trainable.adapter import Adapting


def quietly() -> None:
    """Keep transformers' own progress bars and advice out of what a run says."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


Say = Callable[[str], None]


def _lay_beneath(config: Config, model: Any, tell: Say, values: bool = True) -> dict[str, adapter_files.Saved]:
    """The saved adapters that lie frozen on the base, in the order in which they are named."""
    files: dict[str, adapter_files.Saved] = {}
    for entry in config.model.beneath:
        assert entry.name is not None
        files[entry.name] = adapter_files.read(entry.path)
        saved.load(model, files[entry.name], entry.name, entry.share, tell, values)
    return files


def _go_on(config: Config, model: Any, tell: Say) -> dict[str, adapter_files.Saved]:
    """Fill what moves from the saved adapter that the run goes on with, if it does."""
    t = config.trainable
    if not isinstance(t, Adapting) or t.init_from is None:
        return {}
    source = adapter_files.read(t.init_from)
    saved.check_base(model, source, tell)
    saved.fill(model, source)
    return {saved.TRAINED: source}


def _tell_idle(net: network.Network, names: Collection[str], tell: Say) -> None:
    with net.natively() as model:
        for name in saved.idle(model, names):
            tell(f"the adapter {name!r} changes nothing of what the model computes: was it trained?")


def tokenizer_and_renderer(
    config: Config, say: Say = lambda text: None, shared: Shared | None = None
) -> tuple[Any, Renderer]:  # fmt: skip
    """The tokenizer of the run, trained first on the training rows where that is asked for."""
    quietly()
    if shared is None or config.model.tokenizer == TRAIN:
        tokenizer = load.load_tokenizer(config.model, _trained_tokenizer(config, say))
    else:
        key = config.model.model_dump_json()
        tokenizer = shared.kept("tokenizer", key, lambda: load.load_tokenizer(config.model))
    of_text = config.objective.ends_in == "tokens"
    if of_text and tokenizer.eos_token is None and not tokenizer.chat_template:
        raise ModelError("model.chat_template: the tokenizer has neither a template nor an end-of-text token; give one")
    data = config.data
    o = config.objective
    labels = () if o.ends_in == "tokens" else o.scores
    return tokenizer, Renderer(tokenizer, data.train_on, data.max_length, data.long_text, o.rows, labels, o.problem)


def _trained_tokenizer(config: Config, say: Say) -> Path | None:
    """The folder of the run's own tokenizer. The first rank makes it, the others wait; a resumed run finds it."""
    if config.model.tokenizer != TRAIN:
        return None
    folder, run = Path(config.output_dir) / "tokenizer", Path(config.output_dir)
    ranks = Ranks(config.parallel)
    if ranks.first:
        resumed = bool(checkpoint.listed(run / "checkpoints"))
        texts = partial(holdout.training_texts, config.data, config.objective.rows)
        vocabulary.keep(folder, config.model, texts, resumed, say)
    ranks.wait()
    return folder


def _model(
    config: Config, tokenizer: Any, dtype: torch.dtype, device: torch.device, tell: Say, new: bool = True,
    shared: Shared | None = None,
) -> Any:  # fmt: skip
    """The network of a run before anything of its method; where it is `shared`, a copy of an earlier run's."""

    def make() -> Any:
        return _new_model(config, tokenizer, dtype, device, tell, new)

    if shared is None:
        model = make()
    else:
        decides = (config.model.model_dump(), config.precision.model_dump(), dtype, device, _ending(config),
                   config.seed, config.data.max_length if config.model.starts_at_random else None)  # fmt: skip
        key = hashlib.sha256(f"{decides} {cache.of_tokenizer(tokenizer)}".encode()).hexdigest()
        model = shared.model(key, make, device)
        # Making it may ask the random generators; a copy does not, and what comes after must draw the same.
        checkpoint.restore_random_state(shared.kept("random state", key, checkpoint.random_state))
    load.check_context(model, config.data.max_length, tell)
    load.check_virtual(model, config.data.max_length, _virtual(config))
    return model


def _new_model(
    config: Config, tokenizer: Any, dtype: torch.dtype, device: torch.device, tell: Say, new: bool
) -> Any:  # fmt: skip
    """Loaded, or drawn; with a vocabulary that fits the tokenizer. `new`: a head that is drawn stays as it is."""
    name, store, ending = config.model, config.precision.storage(dtype), _ending(config)
    if name.starts_at_random:
        model = start.random_model(name, tokenizer, dtype, config.seed, config.data.max_length, ending)
        model = model.to(device) if store is None else load.stored(model, store, device, tell)
        if name.name:
            tell(
                f"a random start from the configuration of {name.name}: none of its weights are used "
                "(to go on from them, method=continued_pretraining)"
            )
    else:
        model = load.load_model(name, dtype, device, store, tell, ending, config.seed, tell if new else None)
    vocabulary.fit(model, tokenizer, name.new_tokens)
    if ending.ends_in != "tokens":
        heads.name_padding(model, tokenizer)
    return model


def _ending(config: Config) -> heads.Ending:
    o = config.objective
    return heads.TOKENS if o.ends_in == "tokens" else heads.Ending(o.ends_in, o.scores, o.problem)


def _virtual(config: Config) -> int:
    """Positions before each document that hold no token."""
    beneath = [adapter_files.read(entry.path).settings for entry in config.model.beneath]
    return sum(getattr(settings, "num_virtual_tokens", 0) for settings in (*beneath, config.trainable))


def _move(config: Config, model: Any, tokenizer: Any, tell: Say) -> None:
    """Choose what moves. A prompt that begins as a text is told its tokens, but where there are no values."""
    t = config.trainable
    if isinstance(t, Prompt):
        t.install(model, tokenize=lambda text: tokenizer(text)["input_ids"])
    elif isinstance(t, Adapting):
        t.install(model)
    else:
        t.apply(model)
    for line in config.trainable.remarks(model) if isinstance(config.trainable, Adapting) else ():
        tell(line)


def assemble(
    config: Config, tell: Say = lambda text: None, training: bool = True,
    opened: tuple[Any, Renderer] | None = None, ranks: Ranks | None = None, shared: Shared | None = None,
) -> Assembled:  # fmt: skip
    """Weights in their precision -> what moves -> packed attention, recomputation, compilation."""
    tokenizer, renderer = opened or tokenizer_and_renderer(config)
    seed_everything(config.seed)
    ranks = ranks or Ranks(config.parallel)
    dtype = config.precision.resolve(ranks.device)
    model = _model(config, tokenizer, dtype, ranks.device, tell, training, shared)
    if training:
        model.train()
        config.regularisation.apply(model)
    net = network.Network(model, config.objective.ends_in)
    net.longest = config.data.max_length
    net.noise = config.regularisation.neftune_noise_alpha or 0.0
    if net.ends_in == "tokens":
        trials.check_causal(net)
        trials.check_head(net)
    else:
        trials.find_scores(net)
    reason = trials.prepare(net, config.model.attention if config.batch.packing else "padded")
    if reason:
        tell(f"{type(model).__name__} runs padded instead of packed: {reason}")
    if net.packed and net.causal and not net.shares:
        tell(f"{type(model).__name__}: what documents begin with alike is run for each, as run once it is not the same")
    files = _lay_beneath(config, model, tell)
    _move(config, model, tokenizer, tell)
    trials.check_direction(net)
    files |= _go_on(config, model, tell)
    if training:
        _tell_idle(net, files, tell)
    begins = _apply_precision(config, model)
    trials.check_virtual(net, bool(training and config.parallel.activation_checkpointing))
    vocabulary.check_moving(model, config.model.new_tokens)
    objective = config.objective.build(net).to(ranks.device)
    if training:
        layers.choose_kernels(config.parallel, ranks.device)
        layers.checkpoint_activations(config.parallel, model)
        layers.compile_layers(config.parallel, model, ranks.device)
        net.compiled = layers.compiled(config.parallel, ranks.device)
    made = Assembled(config, net, objective, tokenizer, renderer, ranks, begins)
    made.sources = saved.Sources(files) if files else None
    _keep_start(made, saved.TRAINED in files, training)
    _give_teacher(made, tell, training)
    if training:
        _give_critic(made, tell)
    return made


def _give_critic(made: Assembled, tell: Say) -> None:
    """A critic that is a network of its own is assembled as a run's network is; it serves training alone."""
    critic = made.config.objective.own_critic
    if critic is None:
        return

    def say(text: str) -> None:
        tell(f"the critic: {text}")

    state = checkpoint.random_state()
    if (folder := critics.run_folder(critic)) is not None:
        theirs = _critic_run(made.config, folder)
        found = assemble(theirs, say, ranks=made.ranks)
        chosen, _ = checkpoint.best_or_newest(folder)
        found.load_weights(chosen, checkpoint.read_state(chosen)["deployed"])
        tokenizer = found.tokenizer
    else:
        model = critics.config_of(made.config, critic).model
        tokenizer = load.load_tokenizer(model)
        theirs = critics.config_of(made.config, critic, load.scores_texts(model))
        found = assemble(theirs, say, opened=(made.tokenizer, made.renderer), ranks=made.ranks)
    checkpoint.restore_random_state(state)
    if apart := translation.difference(made.tokenizer, tokenizer):
        raise ModelError(
            f"objective.critic={critic.name!r} has other tokens than the policy, whose tokens it is to judge: {apart}; "
            "use a model with the same tokenizer"
        )
    if found.network.ends_in != "tokens":
        trials.check_causal(found.network)
    made.objective.take_critic(found.network)


def _critic_run(config: Config, folder: Path) -> Config:
    """The run of a reward model, in rows and on the device of the run that it serves."""
    theirs = read_run(folder)
    if theirs.objective.kind != "reward":
        raise ModelError(
            f"objective.critic={str(folder)!r} is a run of method={theirs.method}: give one of method=reward, or the "
            "folder of a model"
        )
    own = {"batch": config.batch, "parallel": config.parallel}
    longest = {"data": theirs.data.model_copy(update={"max_length": config.data.max_length})}
    return theirs.model_copy(update=own | longest)


def _give_teacher(made: Assembled, tell: Say, training: bool) -> None:
    """The teacher is loaded when it is first needed: before training, unless its outputs are kept on disk.

    A run that is measured does without a teacher that cannot be loaded, and says so.
    """
    if not made.config.objective.taught:
        return

    def restored(folder: Path, precision: Any) -> Assembled:
        return restore(folder, tell, made.ranks, precision)[0]

    gone = False

    def taught() -> teachers.Teacher | None:
        nonlocal gone
        if made.teacher is None and not gone:
            state = checkpoint.random_state()
            try:
                made.teacher = teachers.load_teacher(
                    made.config, made.network, made.tokenizer, made.ranks.device, restored, tell
                )
            except LuthierError as error:
                if training:
                    raise
                gone = True
                tell(f"objective.teacher cannot be loaded, so there are no figures beside it: {error}")
            checkpoint.restore_random_state(state)
        return made.teacher

    made.objective.teacher = taught
    if training and not made.config.objective.ahead:
        teacher = taught()
        assert teacher is not None
        made.objective.meet(made.network, teacher.network)


def _keep_start(made: Assembled, loaded: bool = False, training: bool = True) -> None:
    """Copies of what moves in the network, where it must be known as it was; adapters can be switched off, but for
    `loaded` ones. What is compared with in training may be computed ahead of it."""
    objective = made.config.objective
    compares = objective.compares and not (training and objective.ahead)
    if loaded or compares:
        off = set() if loaded else {id(p) for p in surgery.added(made.network.model)}
        named = made.parameters().items()
        moving = {n: p for n, p in named if id(p) not in off and not n.startswith("objective.")}
        made.start.update({name: p.detach().clone() for name, p in moving.items()})
    if compares:
        made.objective.reference = made.reference


def _apply_precision(config: Config, model: Any) -> dict[str, int]:
    """In which numbers layers compute; returns each parameter that begins to move later, and when."""
    begins = config.trainable.begins(model) if isinstance(config.trainable, Partial) else {}
    late = {id(model.get_parameter(name)): step for name, step in begins.items()}
    config.precision.apply(model)  # layers that are wrapped have other names
    return {name: late[id(p)] for name, p in model.named_parameters() if id(p) in late}


def outline(config: Config, device: str, tell: Callable[[str], None] = lambda text: None) -> Assembled:
    """The same network and objective on the meta device, shapes without values: nothing is loaded, nothing computed.

    Whether a family runs packed is told from its layers alone, without the comparison that `assemble` makes.
    """
    meta = torch.device("meta")
    dtype = _dtype(config.precision, device)
    model = skeleton.outline(config.model, dtype, config.data.max_length, _ending(config))
    if store := config.precision.storage(dtype):
        model = load.stored(model, store, meta, tell)
    model.train()
    if config.objective.ends_in != "tokens":
        heads.assume_padding(model)
    net = network.Network(model, config.objective.ends_in)
    net.longest = config.data.max_length
    net.noise = config.regularisation.neftune_noise_alpha or 0.0
    if net.ends_in != "tokens":
        trials.guess_scores(net)
    reason = "model.attention=padded" if config.model.attention == "padded" else trials.unpackable(net)
    reason = reason if config.batch.packing else "batch.packing=false"
    if reason:
        tell(f"rows run padded: {reason}")
    else:
        network.pack(net)
    load.check_virtual(model, config.data.max_length, _virtual(config))
    _lay_beneath(config, model, tell, values=False)
    _move(config, model, None, tell)
    trials.check_direction(net)
    begins = _apply_precision(config, model)
    objective = config.objective.build(net).to(meta)
    layers.checkpoint_activations(config.parallel, model)
    net.compiled = device == "cuda" and layers.compiled(config.parallel, torch.device(device))
    made = Assembled(config, net, objective, None, None, None, begins)  # type: ignore[arg-type]
    _keep_start(made)
    if config.objective.taught:
        teacher = teachers.outlined(config, net, partial(_dtype, device=device), partial(outline, device=device))
        made.objective.teacher = lambda: teacher
        made.objective.meet(net, teacher.network)
        made.teacher = None if config.objective.ahead else teacher  # by then it is gone
    if critic := config.objective.own_critic:
        folder = critics.run_folder(critic)
        if folder is None:
            scores = load.scores_texts(critics.config_of(config, critic).model)
            theirs = critics.config_of(config, critic, scores)
        else:
            theirs = _critic_run(config, folder)
        made.objective.take_critic(outline(theirs, device, tell).network)
    return made


def _dtype(precision: Any, device: str) -> torch.dtype:
    """In which a network computes on a device that may not be here."""
    available = device == "cpu" or torch.cuda.is_available()
    return precision.resolve(torch.device(device)) if available else _of_absent_gpu(precision.dtype)


def _of_absent_gpu(dtype: str) -> torch.dtype:
    return torch.float32 if dtype == "float32" else torch.bfloat16


def restore(
    folder: Path, tell: Say = lambda text: None, ranks: Ranks | None = None, precision: Any = None,
) -> tuple[Assembled, Path]:  # fmt: skip
    """A run's network with the weights of its best checkpoint, for evaluation, generation and export; as a teacher on
    the device of `ranks`, and in another `precision` where one is given."""
    chosen, refused = checkpoint.best_or_newest(folder)
    for line in refused:
        tell(line)
    config = read_run(folder)
    config = config if precision is None else config.model_copy(update={"precision": precision})
    made = assemble(config, tell, training=False, ranks=ranks)
    state = checkpoint.read_state(chosen)
    if made.sources:
        made.sources.restore({}, state["parts"]["adapters"])
    made.load_weights(chosen, state["deployed"])
    made.network.eval()
    return made, chosen
