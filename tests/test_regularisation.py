"""Dropout, label smoothing, NEFTune, averaged weights, early stopping, the best weights at the end."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, make_model
from safetensors.torch import load_file
from test_parity import documents
from test_train import finished
from torch import nn

from luthier import checkpoint, configure, steps, train
from luthier.assemble import restore
from luthier.batch import Batch
from luthier.errors import ConfigError, ModelError
from luthier.logprobs import Head, nll_sum
from luthier.measured import Measured
from luthier.models import network, trials
from luthier.monitor import Console, records
from luthier.objectives import NextToken
from luthier.optim import EMA, EarlyStopping, LastAverage, Regularisation
from luthier.optim.averaging import LastMean, MovingAverage
from luthier.optim.stopping import Patience

QUIET = Console(quiet=True)


def batch_of(*lengths: int) -> Batch:
    return Batch.pack(documents(lengths))


# ---------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_acts_in_training_only_and_keeps_the_mean(family):
    model = make_model(family)
    net = network.Network(model)
    batch = batch_of(9, 14)
    plain = net.hidden(batch)
    Regularisation(dropout=0.3).apply(model)
    assert torch.equal(net.eval().hidden(batch), plain)
    net.train()
    first, second = net.hidden(batch), net.hidden(batch)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    again = net.hidden(batch)
    torch.manual_seed(5)
    assert torch.equal(net.hidden(batch), again)


def test_dropout_stands_after_embeddings_attention_and_mlp():
    model = make_model("llama")
    Regularisation(dropout=0.5).apply(model)
    model.train()
    layer = model.model.layers[0]
    out = layer.mlp(torch.ones(1, 400, 32))
    assert 0.4 < (out == 0).float().mean() < 0.6
    embedded = model.get_input_embeddings()(torch.arange(300)[None])
    assert 0.4 < (embedded == 0).float().mean() < 0.6
    kept = embedded != 0
    torch.testing.assert_close(embedded[kept], 2 * model.get_input_embeddings().weight[:300][None][kept])


def test_a_family_with_dropouts_of_its_own_uses_those():
    model = make_model("gpt2")
    Regularisation(dropout=0.25, attention_dropout=0.5).apply(model)
    found = {n.rpartition(".")[2]: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert found == {"drop": 0.25, "resid_dropout": 0.25, "dropout": 0.25, "attn_dropout": 0.5}


def test_attention_dropout_is_refused_where_there_is_none():
    class Bare(nn.Module):
        pass

    with pytest.raises(ModelError, match=r"attention_dropout=0\.1"):
        Regularisation(attention_dropout=0.1).apply(Bare())


def test_attention_dropout_reaches_packed_attention():
    model = make_model("llama")
    Regularisation(attention_dropout=0.4).apply(model)
    net = network.Network(model).train()
    assert trials.prepare(net, "auto") is None
    batch = batch_of(9, 14)
    assert not torch.equal(net.hidden(batch), net.hidden(batch))


# ---------------------------------------------------------------------------- label smoothing


@pytest.mark.parametrize("shaped", [{}, {"scale": 0.5}, {"softcap": 3.0}])
@pytest.mark.parametrize("wrapped", [False, True])
def test_label_smoothing_equals_pytorch(shaped, wrapped):
    torch.manual_seed(0)
    linear = nn.Linear(8, 50, bias=False)
    head = Head(nn.Sequential(linear) if wrapped else linear, **shaped)
    hidden = torch.randn(7, 8, requires_grad=True)
    targets, weights = torch.randint(50, (7,)), torch.rand(7)
    total = nll_sum(hidden, head, targets, weights, 0.1)
    mine = torch.autograd.grad(total, [hidden, linear.weight])
    expected = (F.cross_entropy(head(hidden), targets, label_smoothing=0.1, reduction="none") * weights).sum()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(mine, torch.autograd.grad(expected, [hidden, linear.weight]))


def test_label_smoothing_by_hand():
    """Logits (0, 0) give log p = -ln 2 whatever the target; logits (ln 3, 0) with e = 0.5 and target 0 give
    -(0.5 ln 3/4 + 0.5 (ln 3/4 + ln 1/4) / 2) = 0.5623 + ..."""
    head = Head(nn.Identity())
    logits = torch.tensor([[3.0, 1.0]]).log()
    loss = nll_sum(logits, head, torch.tensor([0]), torch.ones(1), 0.5)
    p = torch.tensor([0.75, 0.25]).log()
    torch.testing.assert_close(loss, -(0.5 * p[0] + 0.5 * (p[0] + p[1]) / 2))


def test_evaluation_is_not_smoothed():
    net = network.Network(make_model("llama"))
    batch = batch_of(9, 14)
    plain, smoothed = (NextToken(label_smoothing_factor=e).build() for e in (0.0, 0.2))
    assert torch.equal(plain.evaluate(net, batch).total, smoothed.evaluate(net, batch).total)
    assert smoothed(net, batch).total != plain(net, batch).total


# ---------------------------------------------------------------------------- NEFTune


@pytest.mark.parametrize("packed", [True, False])
def test_noise_is_bounded_by_each_document_own_length(packed):
    model = make_model("llama")
    net = network.Network(model).train()
    if packed:
        assert trials.prepare(net, "packed") is None
    net.noise = 5.0
    batch = batch_of(4, 30)
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net.hidden(batch)
    handle.remove()
    embedded = seen[0][0] if packed else seen[0][torch.arange(29) < torch.tensor(batch.lengths)[:, None]]
    noise = embedded - model.get_input_embeddings().weight[batch.tokens]
    for (start, stop), length in zip(((0, batch.ends[1]), (batch.ends[1], batch.ends[2])), batch.lengths):
        most = 5.0 / (length * 32) ** 0.5
        found = noise[start:stop].abs().max().item()
        assert 0.9 * most < found <= most * 1.0001
        torch.testing.assert_close(noise[start:stop].std().item(), most / 3**0.5, rtol=0.15, atol=0)


def test_noise_is_in_training_only():
    net = network.Network(make_model("llama"))
    net.noise = 5.0
    batch = batch_of(9, 14)
    assert torch.equal(net.hidden(batch), net.hidden(batch))
    net.train()
    with torch.no_grad():
        assert torch.equal(net.hidden(batch), net.hidden(batch))
    assert not torch.equal(net.hidden(batch), net.hidden(batch))


# ---------------------------------------------------------------------------- averaging


def test_moving_average_by_hand():
    """Decay 0.5, but at most 1/10, 2/11, 3/12 in the first updates; weights 1, 2, 3 after a start at 0."""
    w = torch.zeros(1)
    average = MovingAverage(EMA(decay=0.5), {"w": w})
    mean = 0.0
    for step, decay in ((1, 1 / 10), (2, 2 / 11), (3, 3 / 12)):
        w.fill_(step)
        average.update(step, {"w": w})
        mean = decay * mean + (1 - decay) * step
    torch.testing.assert_close(average.weights()["w"], torch.tensor([mean]))


def test_moving_average_equals_that_of_pytorch():
    """torch.optim.swa_utils averages with a constant decay, which ours reaches after the first updates."""
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    w = torch.zeros(3)
    average = MovingAverage(EMA(decay=0.2), {"w": w})
    theirs, update = [torch.zeros(3)], get_ema_multi_avg_fn(0.2)
    for step in range(1, 30):
        w.copy_(torch.randn(3))
        if average.count == 2:  # (1 + 2) / (10 + 2) > 0.2 from here on
            theirs = [average.mean["w"].clone()]
        average.update(step, {"w": w})
        if average.count > 2:
            update(theirs, [w.clone()], average.count)
            torch.testing.assert_close(average.mean["w"], theirs[0])


def test_mean_of_the_last_steps_by_hand():
    w = torch.zeros(1)
    average = LastMean(LastAverage(steps=4, every=2), {"w": w}, 10)
    for step in range(1, 11):
        w.fill_(step)
        average.update(step, {"w": w})
        assert (average.weights() is None) == (step < 7)
    assert average.weights()["w"].item() == (7 + 9) / 2
    share = LastMean(LastAverage(steps=0.3), {"w": w}, 10)
    assert share.first == 8


@pytest.mark.parametrize("kind", ["ema", "last"])
def test_the_average_is_evaluated_and_exported_while_training_goes_on_from_the_weights(settings, tmp_path, kind):
    averaged = configure(settings, {"averaging": {"kind": kind}, "checkpoint": {"best": False}, "max_steps": 8})
    train(averaged, QUIET)
    train(configure(settings, {"output_dir": str(tmp_path / "plain"), "max_steps": 8}), QUIET)
    last = checkpoint.listed(tmp_path / "run" / "checkpoints")[-1]
    weights, mean = (load_file(last / f"{g}.safetensors") for g in ("weights", "averaging"))
    plain = load_file(checkpoint.listed(tmp_path / "plain" / "checkpoints")[-1] / "weights.safetensors")
    assert all(torch.equal(weights[n], plain[n]) for n in plain)
    assert any(not torch.equal(weights[n], mean[n]) for n in plain)
    made, _ = restore(tmp_path / "run")
    assert all(torch.equal(p, mean[n]) for n, p in made.parameters().items())
    from luthier import evaluate, open_run
    from luthier.data import dataset

    _, validation = dataset.open_rows(averaged.data, made.renderer, None, lambda t: None, lambda t: None)
    found = Measured({"held_out": evaluate.held_out(made, validation, 64)}).values()["loss"]
    assert open_run(tmp_path / "run").report["held_out_loss"]["tuned"] == pytest.approx(found, rel=1e-5)


# ---------------------------------------------------------------------------- early stopping, best weights


def test_patience_by_hand():
    patience = Patience(EarlyStopping(patience=2, threshold=0.1), better=-1)
    told = []
    for value in (1.0, 0.95, 0.8, 0.75, 0.71, 0.5):
        patience.observe(value)
        told.append(patience.exhausted)
    assert told == [False, False, False, False, True, False]
    assert patience.best == 0.5
    rising = Patience(EarlyStopping(patience=1), better=1)
    for value in (0.1, 0.2, float("nan")):
        rising.observe(value)
    assert rising.exhausted
    assert rising.best == 0.2


OVERFIT = {"max_steps": 60, "evaluation": {"every": 2, "generate": 3, "max_new_tokens": 4},
           "early_stopping": {"patience": 2}, "checkpoint": {"keep": 1}, "optim": {"learning_rate": 5e-2}}  # fmt: skip


def test_a_run_stops_early_and_ends_with_its_best_weights(settings, tmp_path):
    result = train(configure(settings, OVERFIT), QUIET)
    losses = {r["step"]: r["loss"] for r in records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "evaluation"}
    assert result.report["steps"] == max(losses) < 60
    best = min((s for s in losses if s), key=losses.__getitem__)
    assert result.report["best_step"] == best == result.report["steps"] - 4
    assert result.report["held_out_loss"]["tuned"] == losses[best]
    assert (tmp_path / "run" / "answers" / f"step-{best:08}.jsonl").exists()
    assert result.report["answers"]["tuned"]["rows"] == 3
    assert checkpoint.step_of(restore(tmp_path / "run")[1]) == best


def test_early_stopping_resumes_byte_for_byte(settings, tmp_path):
    train(configure(settings, OVERFIT), QUIET)
    parted = configure(settings, OVERFIT, {"output_dir": str(tmp_path / "parted")})
    for stop in (3, 5):
        for step in steps(parted, QUIET):
            if step.step == stop:
                break
    train(parted, QUIET)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")
    reports = [json.loads((tmp_path / n / "report.json").read_text()) for n in ("run", "parted")]
    assert reports[0]["best_step"] == reports[1]["best_step"]


def test_a_finished_early_stop_goes_no_further(settings, tmp_path):
    train(configure(settings, OVERFIT), QUIET)
    before = finished(tmp_path / "run")
    assert list(steps(configure(settings, OVERFIT), QUIET)) == []
    assert finished(tmp_path / "run") == before


FULL_OF_OPTIONS = {
    "regularisation": {"dropout": 0.1, "attention_dropout": 0.1, "neftune_noise_alpha": 5.0},
    "objective": {"label_smoothing_factor": 0.1}, "averaging": {"kind": "ema", "decay": 0.9},
    "evaluation": {"every": 2}, "checkpoint": {"every": 2},
}  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "full"])
def test_all_of_it_resumes_byte_for_byte(settings, tmp_path, method):
    train(configure(settings, FULL_OF_OPTIONS, method=method), QUIET)
    parted = configure(settings, FULL_OF_OPTIONS, {"output_dir": str(tmp_path / "parted")}, method=method)
    for step in steps(parted, QUIET):
        if step.step == 3:
            break
    torch.manual_seed(7)
    train(parted, QUIET)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"regularisation": {"dropout": 1.0}}, "regularisation.dropout=1.0"),
        ({"regularisation": {"neftune_noise_alpha": 0.0}}, "regularisation.neftune_noise_alpha=0.0"),
        ({"objective": {"label_smoothing_factor": 1.0}}, "label_smoothing_factor=1.0"),
        ({"averaging": {"kind": "ema", "decay": 1.0}}, "averaging.decay=1.0"),
        ({"averaging": {"kind": "ema", "steps": 3}}, "averaging.steps: unknown key"),
        ({"averaging": {"kind": "last", "steps": 0}}, "averaging.steps=0"),
        ({"averaging": {"kind": "swa"}}, "averaging"),
        ({"early_stopping": {"patience": 0}, "evaluation": {"every": 1}}, "early_stopping.patience=0"),
        ({"early_stopping": {}}, "give evaluation.every"),
        ({"early_stopping": {}, "evaluation": {"every": 1}, "averaging": "last"}, "use averaging.kind=ema"),
        ({"evaluation": {"metric_for_best_model": "exact_match", "every": 1, "generate": 2}}, "generate_every=true"),
        ({"early_stopping": {"patiense": 1}}, "did you mean 'patience'"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_the_remedy(settings, values, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        configure(settings, values)


def test_an_unknown_metric_is_named_with_what_there_is(settings):
    config = configure(settings, {"evaluation": {"metric_for_best_model": "lose", "every": 2}})
    with pytest.raises(ConfigError, match=r"'lose' is not among .*loss.*token_accuracy"):
        train(config, QUIET)
