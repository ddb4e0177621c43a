"""Every way to choose what moves on every way to store what does not: each cell works, or is refused by name.

The cells are read from the unions of the two axes: a new answer on either is tried without a line here.
"""

from __future__ import annotations

from typing import Annotated, get_args, get_origin

import numpy as np
import pytest
import torch
from conftest import LLAMA, make_tokenizer
from test_train import QUIET, finished, in_two_parts

from luthier import checkpoint, configure, surgery, train
from luthier.assemble import assemble
from luthier.batch import Batch
from luthier.config import Config
from luthier.document import Document
from luthier.errors import ConfigError
from luthier.generate import generate
from luthier.methods import METHODS
from luthier.parallel import Parallel
from luthier.parallel.layers import checkpoint_activations
from luthier.precision import Precision
from luthier.trainable import Trainable
from luthier.trainable.saved import TRAINED


def members(union) -> list:
    """The classes of an axis."""
    if get_origin(union) is Annotated:
        return members(get_args(union)[0])
    return list(get_args(union)) or [union]


def kind(answer) -> str:
    return answer.model_fields["kind"].default


TRAINABLES = [kind(answer) for answer in members(Trainable)]
PRECISIONS = [kind(answer) for answer in members(Precision)]
CELLS = [(t, p) for t in TRAINABLES for p in PRECISIONS]
EVERY_CELL = pytest.mark.parametrize(("trainable", "precision"), CELLS)


def row(trainable: str) -> str:
    """The plainest method with this answer: its row gives what the answer has no default for."""
    found = [m for m in METHODS.values() if m.kinds["trainable"] == trainable and m.kinds["precision"] == "as_loaded"]
    return next(m.name for m in found if m.settings.get("model", {}).get("init") is None)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A small Llama whose widths go into groups and blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA | {"intermediate_size": 64, "hidden_size": 64}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.05 if p.ndim < 2 else 0.02))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def cell(settings, base):
    """The configuration of a cell; skips where it is refused, which has a test of its own."""

    def made(trainable, precision, **extra) -> Config:
        try:
            return configure(
                settings, {"model": str(base), "precision": {"kind": precision}, "max_steps": 4}, extra,
                method=row(trainable),
            )  # fmt: skip
        except ConfigError:
            return pytest.skip("refused by name")

    return made


def documents(lengths=(7, 12, 5, 9)) -> list[Document]:
    """The first half of each teaches nothing."""
    rng = np.random.default_rng(3)
    learnt = [np.r_[np.zeros(n // 2), np.ones(n - n // 2)].astype(np.float32) for n in lengths]
    return [Document(rng.integers(3, 300, n).astype(np.int32), w, i) for i, (n, w) in enumerate(zip(lengths, learnt))]


@torch.no_grad()
def hidden(made) -> torch.Tensor:
    made.network.eval()
    return made.network.hidden(Batch.pack(documents()).to(made.ranks.device))


def disturb(made, size: float = 0.05) -> None:
    """What moves is somewhere else, as after training."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters().values():
            parameter.add_(torch.randn_like(parameter) * size)


def added(made) -> list:
    """What was put into the network to be trained; the rounding of quantisation-aware training is not."""
    return [m for m in made.network.model.modules() if isinstance(m, surgery.Switched) and m.name == TRAINED]


def off(made):
    return surgery.adapters_off(made.network.model, {TRAINED})


def test_every_cell_is_there_or_refused_by_name(settings, base):
    """Refused, from the configuration alone: weights that would have to move in numbers that cannot, and what stays
    beside the layers of a model that is to be quantised as a whole."""
    refused = {}
    for trainable, precision in CELLS:
        try:
            configure(settings, {"model": str(base), "precision": {"kind": precision}}, method=row(trainable))
        except ConfigError as error:
            refused[trainable, precision] = str(error)
    beside = [kind(answer) for answer in members(Trainable) if not getattr(answer, "mergeable", True)]
    expected = {(t, p) for t in ("full", "partial") for p in ("nf4", "int8", "fp8")} | {(t, "qat") for t in beside}
    assert refused.keys() == expected
    for names, text in refused.items():
        assert all(name in text for name in names), text
        assert "use " in text, "a refusal names the remedy"


@EVERY_CELL
def test_identity_at_the_start(cell, trainable, precision):
    """A fresh adapter changes no number, whatever the weights beneath are kept in; virtual tokens cannot promise it."""
    made = assemble(cell(trainable, precision), training=False)
    if not added(made) or not all(isinstance(module, surgery.Adapter) for module in added(made)):
        pytest.skip("no adapter beside a layer")
    fresh = hidden(made)
    with off(made):
        torch.testing.assert_close(hidden(made), fresh, rtol=1e-5, atol=1e-5)


@EVERY_CELL
def test_off_is_the_base(cell, trainable, precision):
    made = assemble(cell(trainable, precision), training=False)
    if not added(made):
        pytest.skip("no adapter")
    with off(made):
        base = hidden(made)
    disturb(made)
    assert (hidden(made) - base).abs().max() > 1e-3, "what moves has to matter"
    with off(made):
        assert torch.equal(hidden(made), base)


@EVERY_CELL
def test_merged_is_unmerged(cell, trainable, precision):
    """Plain weights of the merged state, in a plain model, give what the adapted network gives."""
    config = cell(trainable, precision)
    if not getattr(config.trainable, "mergeable", True) or precision == "qat":
        pytest.skip("cannot be merged, which exports say; what is trained for integers is converted to them")
    made = assemble(config, training=False)
    disturb(made)
    plain = assemble(cell("full", "as_loaded"), training=False)
    state = surgery.merged_state(made.network.model)
    missing, extra = plain.network.model.load_state_dict(state, strict=False)
    assert not extra
    assert set(missing) <= {"lm_head.weight"}
    torch.testing.assert_close(hidden(plain), hidden(made), rtol=1e-4, atol=1e-4)


def gradients(made, limit: int = 1000) -> tuple[dict[str, torch.Tensor], float]:
    """Of all documents, in micro-batches of so many tokens; and what they are to be divided by."""
    counted = 0.0
    for part in Batch.pack(documents()).to(made.ranks.device).split(limit):
        loss = made.objective(made.network, made.objective.prepare(made.network, part))
        loss.total.backward()
        counted += float(loss.count)
    found = {name: p.grad.clone() for name, p in made.parameters().items() if p.grad is not None}
    for parameter in made.parameters().values():
        parameter.grad = None
    return found, counted


def assert_alike(found, expected) -> None:
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@EVERY_CELL
def test_the_gradient_depends_on_neither_micro_batch_nor_recomputation(cell, trainable, precision):
    made = assemble(cell(trainable, precision))
    disturb(made)
    made.network.eval()
    whole, count = gradients(made)
    parts, count_of_parts = gradients(made, 13)
    assert count == count_of_parts
    assert whole.keys() == made.parameters().keys(), "all that moves has a gradient"
    assert any(gradient.abs().max() > 1e-6 for gradient in whole.values())
    assert_alike(parts, whole)
    made.network.train()  # layers are recomputed in training only; nothing is dropped here
    checkpoint_activations(Parallel(activation_checkpointing=1), made.network.model)
    assert_alike(gradients(made)[0], whole)


@EVERY_CELL
def test_answers_with_the_cache_are_those_without(cell, trainable, precision):
    """Three prompts of different lengths, decoded together, against the whole text run again for every token."""
    made = assemble(cell(trainable, precision), training=False)
    disturb(made)
    made.network.eval()
    prompts = [document.tokens.tolist() for document in documents()[:3]]
    for prompt, answer in zip(prompts, generate(made.network, prompts, set(), 4)):
        text = list(prompt)
        for token in answer:
            weights = np.r_[np.zeros(len(text)), 1].astype(np.float32)
            batch = Batch.pack([Document(np.asarray([*text, 0], np.int32), weights, 0)])
            with torch.no_grad():
                logits = made.network.head(made.network.hidden(batch)[-1])
            best = logits.max()
            assert logits[token] > best - 1e-3 * best.abs(), "a greedy answer, but for what rounding decides"
            text.append(token)


@EVERY_CELL
def test_stopped_and_resumed_ends_with_the_same_bytes(cell, trainable, precision, tmp_path):
    """And what moves has moved, what is frozen has not."""
    extra = {"checkpoint": {"every": 2}, "data": {"validation": None}}
    whole = cell(trainable, precision, **extra)
    train(whole, QUIET)
    parted = cell(trainable, precision, **extra, output_dir=str(tmp_path / "parted"))
    in_two_parts(parted, 3)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")
    first, last = checkpoint.listed(tmp_path / "run" / "checkpoints")
    one, other = (checkpoint.read_tensors(folder, "weights") for folder in (first, last))
    assert one.keys() == other.keys()
    assert all(not torch.equal(one[name], other[name]) for name in one), "all that moves has moved"
