"""Clipping: by norm and value against PyTorch, unit by unit by hand; counted, resumed, refused."""

import json

import pytest
import torch
from conftest import make_model
from pydantic import TypeAdapter
from test_ranks import run_on_two

from luthier import configure, steps, train
from luthier.errors import ConfigError
from luthier.monitor import Console, records
from luthier.optim import SGD, Clipping
from luthier.optim.clipping import Clipper, unit_norms
from luthier.optim.optimizer import Optimizer
from luthier.surgery import roles

QUIET = Console(quiet=True)
HERE = {"model": "owner/name", "data": "owner/rows"}


def made(kind, **fields):
    return TypeAdapter(Clipping).validate_python({"kind": kind, **fields})


def stepped(clipping, gradients, dtype=torch.float32, count=4.0, named=None):
    """The mean gradients that a clipped step of SGD at rate 1 took: the change of weights that begin at one."""
    parameters = {n: torch.nn.Parameter(torch.ones_like(g, dtype=dtype)) for n, g in gradients.items()}
    clipper = Clipper(clipping, named)
    optimizer = Optimizer(parameters, SGD(learning_rate=1.0), clip=clipper.each)
    for name, p in parameters.items():
        p.grad = (gradients[name] * count).to(dtype)
    norm = optimizer.norm() / count
    optimizer.step(1.0, clipper.scale(norm) / count)
    kept = {n: optimizer.masters.get(n, p.detach()) for n, p in parameters.items()}
    for name, p in parameters.items():
        assert torch.equal(p.grad, (gradients[name] * count).to(dtype)), "gradients are never rewritten"
    return {n: 1 - p for n, p in kept.items()}, clipper, norm


def some_gradients():
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator) for n, s in {"a": (5, 3), "b": (7,), "c": (2, 2, 2)}.items()}


@pytest.mark.parametrize("bound", [0.5, 100.0])
@pytest.mark.parametrize("kind", ["norm", "value"])
def test_clipped_gradients_equal_those_of_pytorch(kind, bound):
    gradients = some_gradients()
    field = {"norm": "max_grad_norm", "value": "clip_value"}[kind]
    taken, clipper, norm = stepped(made(kind, **{field: bound}), gradients)
    theirs = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients.values()]
    for p, g in zip(theirs, gradients.values()):
        p.grad = g.clone()
    total = torch.nn.utils.get_total_norm([p.grad for p in theirs])
    if kind == "norm":
        torch.nn.utils.clip_grad_norm_(theirs, bound)
    else:
        torch.nn.utils.clip_grad_value_(theirs, bound)
    for p, found in zip(theirs, taken.values()):
        torch.testing.assert_close(found, p.grad)
    torch.testing.assert_close(norm, total)
    assert clipper.record(norm.item()) == (bound < 1)


def test_adaptive_clipping_by_hand():
    """Weights of ones: a row of four has norm 2, a vector of nine 3; a tenth of it is allowed.

    Row 0 has gradient norm 5 and is scaled by 0.2 / 5; row 1 has norm 0.1 and stays. The vector has norm 3 and is
    scaled by 0.3 / 3. The head's stay.
    """
    gradients = {
        "matrix": torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.06, 0.08]]),
        "vector": torch.ones(9),
        "head": torch.full((2, 4), 10.0),
    }
    taken, clipper, _ = stepped(made("adaptive", clip_factor=0.1), gradients, named={"head": "head"})
    expected = torch.tensor([[0.12, 0.16, 0.0, 0.0], [0.0, 0.0, 0.06, 0.08]])
    torch.testing.assert_close(taken["matrix"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(taken["vector"], torch.full((9,), 0.1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(taken["head"], gradients["head"])
    assert clipper.record(1.0)
    _, clipper, _ = stepped(made("adaptive", clip_factor=0.1), {"vector": torch.full((9,), 0.01)})
    assert not clipper.record(1.0)


def test_weights_of_zero_count_as_epsilon():
    weight = torch.nn.Parameter(torch.zeros(2, 4))
    clipper = Clipper(made("adaptive", clip_factor=0.5, clip_epsilon=0.01))
    optimizer = Optimizer({"w": weight}, SGD(learning_rate=1.0), clip=clipper.each)
    weight.grad = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0] * 4])
    optimizer.step(1.0, torch.tensor(1.0))
    torch.testing.assert_close(weight.detach(), torch.tensor([[-0.003, -0.004, 0, 0], [0.0] * 4]))


def test_units_are_outputs_also_of_transposed_layers():
    """GPT-2 keeps [in, out]; its tied embedding is the head."""
    found = roles(make_model("gpt2"))
    assert found["transformer.h.0.mlp.c_fc.weight"] == "transposed"
    assert found["transformer.wte.weight"] == "head"
    assert found["transformer.wpe.weight"] == "embedding"
    matrix = torch.tensor([[3.0, 1.0], [4.0, 0.0]])
    assert unit_norms(matrix, transposed=True).tolist() == [[5.0, 1.0]]
    assert unit_norms(matrix)[:, 0].tolist() == pytest.approx([10**0.5, 4.0])
    taken, _, _ = stepped(made("adaptive", clip_factor=0.1), {"t": matrix}, named={"t": "transposed"})
    bound = 0.1 * 2**0.5
    torch.testing.assert_close(taken["t"], matrix * bound / torch.tensor([[5.0, 1.0]]))
    llama = roles(make_model("llama"))
    assert llama == {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}


@pytest.mark.parametrize("kind", ["norm", "value", "adaptive", "none"])
def test_gradients_in_16_bits(kind):
    """The norm is that of the bfloat16 gradients, summed and kept in float32."""
    fields = {"norm": {"max_grad_norm": 0.5}, "value": {"clip_value": 0.1}}.get(kind, {})
    gradients = {n: g.bfloat16().float() for n, g in some_gradients().items()}
    short, _, norm = stepped(made(kind, **fields), gradients, torch.bfloat16)
    exact, _, expected = stepped(made(kind, **fields), gradients)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, expected)
    for name in gradients:
        torch.testing.assert_close(short[name], exact[name], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------- in a run

CLIPPINGS = {
    "norm": {"kind": "norm", "max_grad_norm": 3.0},
    "value": {"kind": "value", "clip_value": 0.05},
    "adaptive": {"kind": "adaptive", "clip_factor": 0.05},
    "none": {"kind": "none"},
}


@pytest.mark.parametrize("kind", CLIPPINGS)
def test_it_acts_is_counted_and_is_resumed(settings, kind, tmp_path):
    def config(name):
        return configure(
            settings, {"clipping": CLIPPINGS[kind], "output_dir": str(tmp_path / name), "checkpoint": {"every": 2}},
            {"max_steps": 10}, method="full",
        )  # fmt: skip

    result = train(config("whole"), QUIET)
    for step in steps(config("parted"), QUIET):
        if step.step == 7:
            break
    assert train(config("parted"), QUIET).report["clipped_share"] == result.report["clipped_share"]
    one, other = (records(tmp_path / name / "metrics.jsonl") for name in ("whole", "parted"))
    keys = ("step", "loss", "grad_norm", "clipped", "clipped_share", "largest_grad_norm")
    taken = [[r[k] for k in keys] for r in one if r["kind"] == "train"]
    assert taken == [[r[k] for k in keys] for r in other if r["kind"] == "train"]
    flags, norms = [r[3] for r in taken], [r[2] for r in taken]
    for i, record in enumerate(taken):
        assert record[4] == pytest.approx(sum(flags[: i + 1]) / (i + 1))
        assert record[5] == max(norms[: i + 1])
        if kind == "norm":
            assert record[3] == (record[2] > 3.0)
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert report["largest_grad_norm"] == max(norms)
    assert report["clipped_share"] == sum(flags) / 10
    assert any(flags) == (kind != "none")
    assert not all(flags) or kind != "norm"


@pytest.mark.parametrize("kind", ["norm", "value", "adaptive"])
def test_micro_batches_are_clipped_as_one(settings, kind, tmp_path):
    """What is clipped is the mean over the whole step: rows of 64 or of 512 tokens end at the same weights."""
    ends = []
    for micro in (64, 512):
        extra = {"clipping": CLIPPINGS[kind], "batch": {"examples": 8, "micro_tokens": micro}, "max_steps": 3}
        config = configure(settings, extra, {"optim": {"kind": "sgd"}, "output_dir": str(tmp_path / str(micro))},
                           method="full")  # fmt: skip
        ends.append([(s.grad_norm, s.clipped) for s in steps(config, QUIET)])
    assert [c for _, c in ends[0]] == [c for _, c in ends[1]]
    assert [n for n, _ in ends[0]] == pytest.approx([n for n, _ in ends[1]], rel=1e-3)


def test_two_ranks_clip_what_one_clips(settings, tmp_path):
    extra = {"clipping": CLIPPINGS["adaptive"], "evaluation": {"every": 2}, "max_steps": 4, "optim": {"kind": "muon"},
             "schedule": {"kind": "reduce_lr_on_plateau", "patience": 0, "threshold": 0.9}}  # fmt: skip
    train(configure(settings, extra, method="full"), QUIET)
    both = configure(settings, extra, {"output_dir": str(tmp_path / "two")}, method="full").model_dump(mode="json")
    assert run_on_two(both) == [0, 0]
    one, two = (
        [r for r in records(tmp_path / name / "metrics.jsonl") if r["kind"] == "train"] for name in ("run", "two")
    )
    for a, b in zip(one, two, strict=True):
        assert (a["clipped"], a["learning_rate"]) == (b["clipped"], b["learning_rate"])
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.max_grad_norm=1.0", "optim.max_grad_norm: unknown key; did you mean 'clipping.max_grad_norm'?"),
        ("max_grad_norm=1.0", "did you mean 'clipping.max_grad_norm'?"),
        ("clipping.max_grad_norm=0", "clipping.max_grad_norm=0: should be greater than 0"),
        ("clipping.clip_value=1", "clipping.clip_value: unknown key; it is a setting of clipping.kind=value"),
        ("clipping=value", "clipping.clip_value: required"),
        ("clipping=agc", "did you mean 'adaptive'?"),
        ("clipping={kind: adaptive, clip_factor: -1}", "clipping.clip_factor=-1: should be greater than 0"),
    ],
)
def test_bad_values_are_refused(override, told):
    with pytest.raises(ConfigError) as caught:
        configure(HERE, override)
    assert told in "\n".join(caught.value.problems)


def test_the_default_is_a_norm_of_one():
    assert configure(HERE).clipping == made("norm", max_grad_norm=1.0)
    assert configure(HERE, "clipping=none").clipping.kind == "none"
