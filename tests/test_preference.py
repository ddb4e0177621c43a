"""Preference pairs: each loss by hand, DPO at the reference, what changes no number, kill and resume, bad rows."""

from __future__ import annotations

import json
import math
from typing import get_args

import pytest
import torch
from conftest import make_model, write_rows
from test_train import QUIET, finished, in_two_parts

from luthier import configure, explain, steps, train
from luthier.assemble import assemble, restore
from luthier.batch import Batch
from luthier.cli import main
from luthier.data import dataset
from luthier.errors import ConfigError, DataError
from luthier.monitor import Console, records
from luthier.objectives import CPO, DPO, ORPO, SimPO
from luthier.objectives import preference_losses as losses
from luthier.objectives.pairs import Sides, judged
from luthier.trainable import Trainable

PAIRS = [
    {"prompt": f"{word} {n}", "chosen": f"{n} {word[::-1]}", "rejected": f"{word} {n} {n}"}
    for n in range(8)
    for word in ("one", "three", "seven", "ab")
]


UNPAIRED = [
    {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
    for row in PAIRS
    for key in ("chosen", "rejected")
]


@pytest.fixture
def unpaired(settings, tmp_path) -> dict:
    path = write_rows(tmp_path / "unpaired.jsonl", UNPAIRED)
    return settings | {"data": settings["data"] | {"train": str(path)}, "batch": {"examples": 4, "micro_tokens": 256}}


@pytest.fixture
def pairs(settings, tmp_path) -> dict:
    """A run on pairs of a few seconds."""
    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    return settings | {"data": settings["data"] | {"train": str(path)}, "batch": {"examples": 4, "micro_tokens": 256}}


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


LOGPS = Sides(torch.tensor([-4.0, -9.0]), torch.tensor([-6.0, -8.0]))
REFERENCE = Sides(torch.tensor([-5.0, -8.0]), torch.tensor([-5.0, -8.5]))
TOKENS = Sides(torch.tensor([2.0, 4.0]), torch.tensor([3.0, 2.0]))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (DPO(beta=0.5), [-log_sigmoid(1.0), -log_sigmoid(-0.75)]),
        (DPO(beta=0.5, label_smoothing=0.1),
         [-0.9 * log_sigmoid(1.0) - 0.1 * log_sigmoid(-1.0), -0.9 * log_sigmoid(-0.75) - 0.1 * log_sigmoid(0.75)]),
        (DPO(beta=0.25, loss_type="hinge"), [0.5, 1.375]),
        (DPO(beta=0.5, loss_type="ipo"), [(0.5 + 1 / 3 - 1) ** 2, (-0.25 - 0.25 - 1) ** 2]),
        (DPO(beta=0.5, loss_type="robust", label_smoothing=0.2),
         [(-0.8 * log_sigmoid(1.0) + 0.2 * log_sigmoid(-1.0)) / 0.6,
          (-0.8 * log_sigmoid(-0.75) + 0.2 * log_sigmoid(0.75)) / 0.6]),
        (DPO(beta=0.5, rpo_alpha=2.0), [-log_sigmoid(1.0) + 2 * 2.0, -log_sigmoid(-0.75) + 2 * 2.25]),
        (CPO(beta=0.5), [-log_sigmoid(1.0) + 2.0, -log_sigmoid(-0.5) + 2.25]),
        (CPO(beta=0.25, loss_type="hinge", cpo_alpha=0.0), [0.5, 1.25]),
        (CPO(beta=0.5, loss_type="ipo", cpo_alpha=0.0), [1.0, (1.75 - 1) ** 2]),
        (SimPO(beta=2.0, simpo_gamma=0.5), [-log_sigmoid(-0.5), -log_sigmoid(2 * 1.75 - 0.5)]),
        (ORPO(beta=0.5), [2.0 - 0.5 * log_sigmoid(0.0), 2.25 - 0.5 * log_sigmoid(
            math.log(math.exp(-2.25) / (1 - math.exp(-2.25))) - math.log(math.exp(-4) / (1 - math.exp(-4))))]),
    ],
    ids=lambda v: type(v).__name__ + "-" + str(getattr(v, "loss_type", "")) if not isinstance(v, list) else "",
)  # fmt: skip
def test_losses_by_hand(config, wanted):
    """Two pairs: sums -4 and -9 against -6 and -8, where the reference has -5 and -8 against -5 and -8.5.

    Log-ratios are 1 and -1 of the better, -1 and 0.5 of the worse answers: margins 2 and -1.5. Answers have 2 and 4,
    3 and 2 tokens: means -2 and -2.25 against -2 and -4, margins 0 and 1.75; of log-ratios 0.5 + 1/3 and -0.25 - 0.25.
    """
    found = judged(config, LOGPS, TOKENS, REFERENCE if isinstance(config, DPO) else None)
    torch.testing.assert_close(found.loss, torch.tensor(wanted))


def test_kto_by_hand():
    """beta (r - z) is 0.75, -0.75 and 0: 1 - s(0.75) of an answer that is liked, s(-0.75) of one that is not."""
    ratios, liked = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([True, False, True])
    found = losses.kto(ratios, liked, torch.tensor(0.5), 0.5, 1.0, 2.0)
    low = 1 / (1 + math.exp(0.75))
    torch.testing.assert_close(found, torch.tensor([low, 2 * low, 0.5]))


def test_log_odds_of_certain_and_of_hopeless_answers():
    """Of -1e-3: log(p / (1 - p)) = -1e-3 - log(1 - e^-0.001) = -0.001 + 6.908255 - 0.0005 ...; both ends have
    gradients."""
    means = torch.tensor([0.0, -1e-6, -1e-3, -0.6931, -5.0, -60.0], requires_grad=True)
    odds = losses.log_odds(means)
    for mean, found in zip(means[1:].tolist(), odds[1:].tolist()):
        assert found == pytest.approx(mean - math.log(-math.expm1(mean)), rel=1e-5, abs=1e-6)
    assert odds.isfinite().all()
    odds.sum().backward()
    assert means.grad.isfinite().all()
    assert means.grad[-1] == pytest.approx(1.0)


def test_equal_rewards_are_half_an_accuracy():
    assert losses.ahead_of(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])).tolist() == [1.0, 0.5, 0.0]


def test_a_run_learns_what_is_preferred(pairs):
    result = train(configure(pairs, {"max_steps": 20, "objective": {"beta": 0.5}}, method="dpo"), QUIET)
    figures = result.report["figures"]
    assert figures["loss"]["base"] == pytest.approx(math.log(2), abs=1e-6)
    assert figures["rewards/accuracies"]["base"] == 0.5
    assert figures["rewards/margins"]["tuned"] > 0.5
    history = [r for r in records(result.folder / "metrics.jsonl") if r["kind"] == "train"]
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[-1]["rewards/margins"] == pytest.approx(
        history[-1]["rewards/chosen"] - history[-1]["rewards/rejected"], abs=1e-5
    )


# ---------------------------------------------------------------------------- what changes no number


def batches_of(made, micro_tokens: int) -> list[Batch]:
    """Twelve training rows as a step would lay them out."""
    rows, _ = dataset.open_rows(made.config.data, made.renderer, None, print, print)
    chosen = list(rows.documents[:12])
    return Batch.pack(chosen).split(micro_tokens)


def told(made, batches: list[Batch]) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Loss, metrics and gradients of a step cut into these batches."""
    objective, network = made.objective, made.network
    for p in made.parameters().values():
        p.grad = None
    if hasattr(objective, "survey"):
        objective.survey(network, batches, lambda sums: sums)
    losses = []
    for batch in batches:
        losses.append(objective(network, objective.prepare(network, batch)))
        losses[-1].total.backward()
    count = float(sum(loss.count for loss in losses))
    metrics = {name: float(sum(loss.metrics[name] for loss in losses)) / count for name in objective.metrics}
    metrics = objective.shown(metrics) if hasattr(objective, "shown") else metrics
    gradients = {name: p.grad / count for name, p in made.parameters().items() if p.grad is not None}
    return float(sum(loss.total.detach() for loss in losses)) / count, metrics, gradients


def moved(made) -> None:
    """Away from the reference."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in made.parameters().values():
            p.add_(torch.randn_like(p), alpha=0.05)


def test_kto_learns_what_is_liked(unpaired):
    result = train(configure(unpaired, {"max_steps": 25, "objective": {"beta": 0.5}}, method="kto"), QUIET)
    figures = result.report["figures"]
    assert figures["loss"]["base"] == pytest.approx(0.5, abs=1e-6)
    assert figures["kl"]["base"] == 0
    assert figures["rewards/accuracies"]["base"] == 0.5
    assert figures["loss"]["tuned"] < 0.45
    history = [r for r in records(result.folder / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["rewards/margins"] for r in history if "rewards/margins" in r][-1] > 0.3  # of a step with both sides
    assert any(r["kl"] > 0 for r in history)


def test_kto_has_no_mean_over_rows_that_are_not_there(unpaired):
    """Steps of one row each: a side's means stand in the log where it has the row, and never as 0 where it has none."""
    extra = {"max_steps": 12, "batch": {"examples": 1}, "objective": {"beta": 0.5}}
    result = train(configure(unpaired, extra, method="kto"), QUIET)
    history = [r for r in records(result.folder / "metrics.jsonl") if r["kind"] == "train"]
    assert {r["liked"] for r in history} == {0.0, 1.0}
    for record in history:
        side = "chosen" if record["liked"] else "rejected"
        assert {n.partition("/")[2] for n in record if n.startswith("logps/")} == {side}
        assert {n.partition("/")[2] for n in record if n.startswith("rewards/")} == {side}
        assert record[f"logps/{side}"] < -1


def test_kto_means_are_over_the_rows_of_a_side(unpaired):
    """Against log-probabilities of each row by itself, whatever share of the step is liked; intervals, too."""
    from luthier.evaluate import held_out
    from luthier.objectives.sequences import sums, token_logprobs

    made = assemble(configure(unpaired, {"objective": {"beta": 0.5}}, method="kto"))
    moved(made)
    rows, _ = dataset.open_rows(made.config.data, made.renderer, None, print, print)
    liked = [d for d in rows.documents if d.labels[0]]
    others = [d for d in rows.documents if not d.labels[0]]

    def logps(documents: list) -> list[float]:
        batch = Batch.pack(documents).members(0)
        return sums(batch, token_logprobs(made.network, batch)).tolist()

    chosen = [*liked[:7], *others[:2]]
    _, metrics, _ = told(made, Batch.pack(chosen).split(100))
    assert metrics["logps/chosen"] == pytest.approx(sum(logps(liked[:7])) / 7, rel=1e-5)
    assert metrics["logps/rejected"] == pytest.approx(sum(logps(others[:2])) / 2, rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])
    assert metrics["liked"] == pytest.approx(7 / 9)
    at = [i for i, d in enumerate(rows.documents) if d.labels[0]]
    documents = held_out(made, rows, 1024)
    figures = documents.figures()
    assert figures["logps/chosen"].value == pytest.approx(sum(logps(liked)) / len(liked), rel=1e-5)
    assert figures["rewards/margins"].value == pytest.approx(
        figures["rewards/chosen"].value - figures["rewards/rejected"].value
    )
    low, high = figures["logps/chosen"].interval()
    assert low < figures["logps/chosen"].value < high
    assert "liked" not in figures
    alone = documents.subset(at).figures()
    assert alone["logps/chosen"].value == pytest.approx(figures["logps/chosen"].value)
    for name in ("logps/rejected", "rewards/rejected", "rewards/margins"):
        assert (alone[name].value, alone[name].interval()) == (None, None), name


METHODS = ["dpo", "simpo", "orpo", "cpo", "kto"]


def data_of(method: str, pairs: dict, unpaired: dict) -> dict:
    return unpaired if method == "kto" else pairs


@pytest.mark.parametrize("method", METHODS)
def test_the_cut_of_a_step_changes_nothing(pairs, unpaired, method):
    """Micro-batches, the order of rows, a filler, packed or padded rows: the same loss, metrics and gradients."""
    made = assemble(configure(data_of(method, pairs, unpaired), method=method))
    moved(made)
    (whole,) = batches_of(made, 1 << 20)
    wanted = told(made, [whole])
    padded = assemble(configure(data_of(method, pairs, unpaired), {"batch": {"packing": False}}, method=method))
    moved(padded)
    cut = batches_of(made, 150)
    assert len(cut) > 3
    for other, batches in (
        (made, cut), (made, cut[::-1]), (made, [whole.padded_to(len(whole) + 40)]), (padded, cut),
    ):  # fmt: skip
        found = told(other, batches)
        assert found[0] == pytest.approx(wanted[0], abs=2e-5)
        assert found[1] == pytest.approx(wanted[1], abs=2e-4)
        for name, gradient in found[2].items():
            torch.testing.assert_close(gradient, wanted[2][name], atol=2e-5, rtol=2e-3)


TRAINABLES = [answer.model_fields["kind"].default for answer in get_args(get_args(Trainable)[0])]


MOVING = ("full", "partial")  # the base's own weights, which cannot lie in 4 bits


@pytest.mark.parametrize(
    ("trainable", "precision"),
    [(t, p) for t in TRAINABLES for p in ("as_loaded", "nf4") if p == "as_loaded" or t not in MOVING],
)
def test_dpo_at_the_reference_is_log_2(pairs, trainable, precision, tmp_path):
    """And after something has moved, the reference is still what it was; the loss then has a gradient."""
    chosen = {"kind": trainable} | ({"last_layers": 1} if trainable == "partial" else {})
    made = assemble(configure(pairs, {"trainable": chosen, "precision": {"kind": precision}}, method="dpo"))
    (batch,) = batches_of(made, 1 << 20)
    first = made.objective.prepare(made.network, batch).fields["reference"]
    with made.reference() as start:
        at_start = made.objective(start, made.objective.prepare(start, batch))
        assert float(at_start.total) == pytest.approx(float(at_start.count) * math.log(2), abs=1e-5)
        assert float(at_start.metrics["rewards/accuracies"]) == 6.0
    moved(made)
    assert torch.equal(made.objective.prepare(made.network, batch).fields["reference"], first)
    loss, metrics, gradients = told(made, [batch])
    assert loss != pytest.approx(math.log(2), abs=1e-5)
    assert metrics["rewards/chosen"] != 0
    assert any(g.abs().max() > 0 for g in gradients.values())


BOTH = pytest.mark.parametrize("precompute", [False, True])


@BOTH
@pytest.mark.parametrize(("method", "trainable"), [("dpo", "lora"), ("dpo", "full"), ("kto", "lora"), ("kto", "full")])
def test_stopped_and_resumed_ends_with_the_same_bytes(pairs, unpaired, tmp_path, method, trainable, precompute):
    pairs = data_of(method, pairs, unpaired)
    extra = {
        "trainable": {"kind": trainable}, "checkpoint": {"every": 2}, "evaluation": {"every": 3},
        "objective": {"precompute_ref_log_probs": precompute},
    }  # fmt: skip
    train(configure(pairs, extra, method=method), QUIET)
    parted = configure(pairs, extra, {"output_dir": str(tmp_path / "parted")}, method=method)
    in_two_parts(parted, 3)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")
    assert (tmp_path / "run" / "ahead").exists() == precompute


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_the_reference_computed_ahead_gives_the_same_losses(pairs, tmp_path, trainable):
    told = {}
    for precompute in (False, True):
        extra = {"objective": {"precompute_ref_log_probs": precompute}, "trainable": {"kind": trainable}}
        out = {"output_dir": str(tmp_path / str(precompute)), "max_steps": 8}
        result = train(configure(pairs, extra, out, method="dpo"), QUIET)
        told[precompute] = list(records(result.folder / "metrics.jsonl"))
    for now, before in zip(told[False], told[True]):
        assert now["kind"] == before["kind"]
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert now[name] == pytest.approx(before[name], abs=2e-4), (now["step"], name)
    assert told[True][-1]["rewards/margins"] > 0.01


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_held_out_rows_of_a_run_are_measured_again(pairs, unpaired, method, capsys):
    """`luthier evaluate`, where no values were kept of the rows, and the weights themselves have moved."""
    extra = {"trainable": "full", "max_steps": None, "epochs": 1, "objective": {"beta": 0.5}}
    config = configure(data_of(method, pairs, unpaired), extra, method=method)
    assert config.objective.precompute_ref_log_probs is True
    result = train(config, QUIET)
    assert main(["evaluate", str(result.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["figures"]
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert found[name]["tuned"] == pytest.approx(result.report["figures"][name]["tuned"], abs=2e-4), name
        assert found[name]["base"] == pytest.approx(result.report["figures"][name]["base"], abs=2e-4), name


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_stream_is_learnt_and_resumed(pairs, unpaired, method, tmp_path):
    """The reference is asked as rows come; strange answers are those of the block's stretch."""
    chosen = data_of(method, pairs, unpaired)
    data = chosen["data"] | {"streaming": True, "shuffle_buffer": 24}
    extra = {"data": data, "checkpoint": {"every": 2}, "trainable": "full"}
    config = configure(chosen, extra, method=method)
    assert config.objective.precompute_ref_log_probs is False
    train(config, QUIET)
    parted = configure(chosen, extra, {"output_dir": str(tmp_path / "parted")}, method=method)
    for step in steps(parted, QUIET):
        if step.step == 3:
            break
    train(parted, QUIET)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_what_was_trained_answers_and_is_exported(pairs, unpaired, method, tmp_path):
    from transformers import AutoModelForCausalLM

    extra = {"trainable": "full", "evaluation": {"generate": 2, "max_new_tokens": 4}}
    result = train(configure(data_of(method, pairs, unpaired), extra, method=method), QUIET)
    assert result.report["answers"]["tuned"]["rows"] == 2
    result.export(tmp_path / "out", "full")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    made, _ = restore(result.folder)
    for name, weight in made.network.model.state_dict().items():
        assert torch.equal(exported[name], weight), name


@pytest.mark.parametrize("extra", [{}, {"trainable": "full", "epochs": 2}, {"trainable": "full", "max_steps": 2}])
@pytest.mark.parametrize("method", METHODS)
def test_explain_reckons_a_run(pairs, unpaired, method, extra):
    config = configure(data_of(method, pairs, unpaired) | {"max_steps": None}, extra, method=method)
    found = explain(config)
    assert found.memory.peak > found.memory.weights > 0
    copies = config.trainable.kind == "full" and getattr(config.objective, "precompute_ref_log_probs", None) is False
    alone = sum(p.numel() * 4 for p in make_model().parameters())
    assert found.memory.weights == (2 * alone if copies else alone), "first values are kept"


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("method", "extra", "wanted"),
    [
        ("dpo", {"objective": {"beta": 0.0}}, "objective.beta=0.0: should be greater than 0"),
        ("dpo", {"objective": {"loss_type": "sigmiod"}}, "objective.loss_type='sigmiod'"),
        ("dpo", {"objective": {"label_smoothing": 0.5}}, "objective.label_smoothing=0.5"),
        ("dpo", {"objective": {"loss_type": "ipo", "label_smoothing": 0.1}},
         "does nothing with objective.loss_type=ipo"),
        ("dpo", {"objective": {"loss_type": "robust"}}, "is sigmoid"),
        ("dpo", {"objective": {"simpo_gamma": 1.0}}, "it is a setting of objective.kind=simpo"),
        ("dpo", {"objective": {"pref_beta": 0.1}}, "beta'?"),
        ("dpo", {"objective": {"pref_ftx": 0.1}}, "did you mean 'objective.rpo_alpha'"),
        ("cpo", {"objective": {"loss_type": "hinge", "label_smoothing": 0.1}}, "does nothing with"),
        ("kto", {"objective": {"desirable_weight": 0.0, "undesirable_weight": 0.0}}, "nothing would be learnt"),
        ("kto", {"objective": {"kto_chosen_weight": 2.0}}, "did you mean 'objective.desirable_weight'"),
        ("dpo", {"objective": {"precompute_ref_log_probs": True}, "data": {"streaming": True, "validation": None}},
         "objective.precompute_ref_log_probs=true computes something for every row"),
        ("dpo", {"data": {"format": "messages"}}, "data.format=messages is not for method=dpo: use auto, preference_"),
        ("lora", {"objective": {"kind": "dpo"}}, "use method=dpo"),
    ],
)  # fmt: skip
def test_settings_that_are_wrong_are_told(pairs, method, extra, wanted):
    with pytest.raises(ConfigError) as caught:
        configure(pairs, extra, method=method)
    assert wanted in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([{"prompt": f"a {n}", "completion": f"b {n}", "label": True} for n in range(12)],
         "all 12 rows are labelled true"),
        ([{"prompt": f"a {n}", "completion": f"b {n}", "label": n > 1} for n in range(12)],
         "10 rows are liked and 2 are not: desirable_weight x liked is 5.00 times"),
    ],
)  # fmt: skip
def test_labels_that_teach_little_are_told(unpaired, tmp_path, rows, wanted):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = configure(unpaired | {"data": {"train": str(path), "max_length": 64}}, {"max_steps": 1}, method="kto")
    console = Console(quiet=True)
    said = []
    console.warn = said.append
    train(config, console)
    assert any(wanted in line for line in said), said


def test_a_stream_of_one_side_is_told(unpaired, tmp_path):
    rows = [{"prompt": f"a {n}", "completion": f"b {n}", "label": n < 12} for n in range(24)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = {"train": str(path), "max_length": 64, "streaming": True, "shuffle_buffer": 12}
    console, said = Console(quiet=True), []
    console.warn = said.append
    train(configure(unpaired | {"data": data}, {"max_steps": 6, "batch": {"examples": 4}}, method="kto"), console)
    found = [line for line in said if "labelled" in line]
    assert "block 1 of the stream: all 12 rows are labelled true" in found[0]
    assert "block 2 of the stream: all 12 rows are labelled false" in found[1]
    data["shuffle_buffer"] = 24
    said.clear()
    config = configure(unpaired | {"data": data, "output_dir": str(tmp_path / "other")}, {"max_steps": 6}, method="kto")
    train(config, console)
    assert not [line for line in said if "labelled" in line]


def test_answers_without_a_stranger_are_refused(unpaired, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b", "label": True}] * 12)
    config = configure(unpaired | {"data": {"train": str(path), "max_length": 64}}, method="kto")
    with pytest.raises(DataError, match="reference point cannot be estimated"):
        train(config, QUIET)
