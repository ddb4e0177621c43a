"""Learning rates: closed forms against transformers and by hand, the plateau against PyTorch; refused, resumed."""

import math
import sys

import pytest
import torch
from pydantic import TypeAdapter

from luthier import configure, steps, train
from luthier.errors import ConfigError
from luthier.figures import greater_is_better
from luthier.monitor import Console, records
from luthier.optim import Schedule, schedule
from luthier.train import Trainer

QUIET = Console(quiet=True)
HERE = {"model": "owner/name", "data": "owner/rows"}


def made(kind, **fields):
    return TypeAdapter(Schedule).validate_python({"kind": kind, **fields})


def theirs(name, warmup, total, **extra):
    """The factors of transformers' schedule; its warm-up starts at 0, one step before ours."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    found = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=extra)
    out = []
    for _ in range(total):
        out.append(found.get_last_lr()[0])
        optimizer.step()
        found.step()
    return out


CASES = [
    ("constant", {}, "constant_with_warmup", {}),
    ("linear", {}, "linear", {}),
    ("cosine", {}, "cosine", {}),
    ("cosine", {"min_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_restarts", {"num_cycles": 3}, "cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {"power": 2.0, "min_ratio": 0.2}, "polynomial", {"power": 2.0, "lr_end": 0.2}),
    ("inverse_sqrt", {}, "inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 7}, "inverse_sqrt", {"timescale": 7}),
    *[
        ("warmup_stable_decay", {"decay": 8, "decay_type": t, "min_ratio": 0.1}, "warmup_stable_decay",
         {"num_decay_steps": 8, "decay_type": t, "min_lr_ratio": 0.1})
        for t in ("linear", "cosine", "1-sqrt")
    ],
]  # fmt: skip


@pytest.mark.parametrize("warmup", [0, 6])
@pytest.mark.parametrize(("kind", "fields", "name", "extra"), CASES)
def test_schedules_equal_those_of_transformers(kind, fields, name, extra, warmup):
    ours = schedule.curve(made(kind, warmup=warmup, **fields), 30)
    assert ours[warmup:] == pytest.approx(theirs(name, warmup, 30, **extra)[warmup:], abs=1e-12)
    assert ours[:warmup] == pytest.approx([(i + 1) / 6 for i in range(warmup)])


def test_schedules_by_hand():
    """Ten steps: quarters and halves that can be told without a computer."""
    curve = schedule.curve
    assert curve(made("linear"), 4) == [1, 0.75, 0.5, 0.25]
    assert curve(made("linear", min_ratio=0.5), 4) == [1, 0.875, 0.75, 0.625]
    assert curve(made("polynomial", power=2.0), 4) == [1, 0.5625, 0.25, 0.0625]
    assert curve(made("cosine"), 4) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    assert curve(made("cosine_with_restarts", num_cycles=2), 4) == pytest.approx([1, 0.5, 1, 0.5])
    assert curve(made("inverse_sqrt", warmup=1), 5) == pytest.approx([1, 1, 0.5**0.5, 3**-0.5, 0.5])
    wsd = made("warmup_stable_decay", warmup=0.2, decay=0.4, decay_type="linear")
    assert curve(wsd, 10) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert curve(made("reduce_lr_on_plateau", warmup=2), 4) == [0.5, 1, 1, 1]


def test_warm_up_in_steps_and_as_a_share():
    for warmup in (5, 0.25):
        factors = schedule.curve(made("linear", warmup=warmup), 20)
        assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert factors[5] == 1.0
        assert factors[-1] == pytest.approx(1 / 15)
    assert schedule.factor(made("cosine", min_ratio=0.1), 20, 20) == pytest.approx(0.1)


# ---------------------------------------------------------------------------- plateau


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize(("patience", "cooldown"), [(0, 0), (2, 0), (1, 3)])
def test_the_plateau_equals_that_of_pytorch_also_when_it_is_resumed(mode, threshold_mode, patience, cooldown):
    fields = {"factor": 0.5, "patience": patience, "threshold": 0.05, "threshold_mode": threshold_mode,
              "cooldown": cooldown}  # fmt: skip
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode, min_lr=0.05, eps=0.0, **fields)
    config = made("reduce_lr_on_plateau", mode=mode, min_ratio=0.05, **fields)
    ours = schedule.Scheduler(config, 100)
    generator = torch.Generator().manual_seed(patience)
    ratios = set()
    for i, value in enumerate((3 + torch.randn(40, generator=generator)).abs().tolist()):
        reference.step(value)
        ours.observe({"loss": value})
        assert ours.factor(i) == pytest.approx(optimizer.param_groups[0]["lr"])
        ratios.add(ours.ratio)
        kept, ours = ours.numbers(), schedule.Scheduler(config, 100)
        ours.restore({}, kept)
    assert len(ratios) > 2


def test_the_name_of_a_metric_tells_which_way_is_better():
    for metric in ("loss", "perplexity", "bits_per_byte", "forgetting.loss", "mae", "kl", "tasks.wiki.word_perplexity"):
        assert not greater_is_better(metric)
    for metric in ("token_accuracy", "exact_match", "bleu", "rouge_l", "f1", "mcc", "auroc", "rewards/margins"):
        assert greater_is_better(metric)
    falling = schedule.Scheduler(made("reduce_lr_on_plateau", metric="f1", mode="min", patience=0), 10)
    assert not falling.observe({"f1": 0.5})
    assert not falling.observe({"f1": 0.4})
    assert falling.observe({"f1": 0.45})
    ours = schedule.Scheduler(made("reduce_lr_on_plateau", metric="token_accuracy", patience=0), 10)
    assert not ours.observe({"token_accuracy": 0.5})
    assert not ours.observe({"token_accuracy": 0.6})
    assert ours.observe({"token_accuracy": 0.6})
    with pytest.raises(ConfigError, match="these are: loss"):
        ours.observe({"loss": 1.0, "exact_match_interval": [0, 1]})


PLATEAU = {"schedule": {"kind": "reduce_lr_on_plateau", "patience": 0, "factor": 0.5, "threshold": 0.9},
           "evaluation": {"every": 2}, "max_steps": 8}  # fmt: skip


def test_the_rate_of_a_run_falls_on_a_plateau_and_is_resumed(settings, tmp_path):
    train(configure(settings, PLATEAU), QUIET)
    rates = [r["learning_rate"] for r in records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert rates == pytest.approx([1e-2] * 2 + [5e-3] * 2 + [2.5e-3] * 2 + [1.25e-3] * 2)  # nothing gains 90 %
    parted = configure(settings, PLATEAU, {"output_dir": str(tmp_path / "parted")})
    for step in steps(parted, QUIET):
        if step.step == 5:
            break
    train(parted, QUIET)
    ends = [
        (tmp_path / name / "checkpoints" / "step-00000008" / file).read_bytes()
        for file in ("weights.safetensors", "optimizer.safetensors", "state.json")
        for name in ("run", "parted")
    ]
    assert ends[::2] == ends[1::2]


def test_every_schedule_acts_in_a_run(settings, tmp_path):
    config = configure(settings, {"schedule": {"kind": "cosine_with_restarts", "num_cycles": 2, "warmup": 2}})
    train(config, QUIET)
    rates = [r["learning_rate"] for r in records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert rates == pytest.approx([5e-3, 1e-2, 1e-2, 5e-3, 1e-2, 5e-3])


# ---------------------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ({"schedule": {"warmup": 10}}, "schedule.warmup=10 take 10 steps and leave too few of the run's 10"),
        ({"schedule": {"kind": "warmup_stable_decay", "warmup": 6, "decay": 5}}, "take 11 steps and leave too few"),
        ({"schedule": {"kind": "warmup_stable_decay", "warmup": 0.5, "decay": 0.6}, "max_steps": None},
         "more than the whole run together"),
        ({"schedule": {"warmup": 2.5}}, "a share of the steps is below 1, a number of them an integer"),
        ({"schedule": {"kind": "cosine_with_restarts", "num_cycles": 11}}, "num_cycles=11 are more than the 10 steps"),
        ({"schedule": {"kind": "reduce_lr_on_plateau"}}, "give evaluation.every"),
        ({"schedule": {"kind": "reduce_lr_on_plateau", "metric": "exact_match"}, "evaluation": {"every": 2}},
         "evaluation.generate_every=true"),
        ({"schedule": {"kind": "reduce_lr_on_plateau", "factor": 1.0}}, "schedule.factor=1.0: should be less than 1"),
        ({"schedule": {"kind": "linear", "min_ratio": 2}}, "schedule.min_ratio=2: should be less than or equal to 1"),
        ({"schedule": {"kind": "polynomial", "power": 0}}, "schedule.power=0: should be greater than 0"),
        ({"schedule": {"kind": "constant", "min_ratio": 0.1}}, "a setting of schedule.kind=linear or cosine"),
        ({"schedule": "constant_with_warmup"}, "did you mean 'constant'?"),
        ({"schedule": "cosin"}, "did you mean 'cosine'?"),
        ({"schedule": {"num_warmup_steps": 3}}, "did you mean 'schedule.warmup'?"),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused(override, told):
    with pytest.raises(ConfigError) as caught:
        configure(HERE, {"max_steps": 10}, override)
    assert told in "\n".join(caught.value.problems)


def test_a_warm_up_longer_than_the_epochs_is_refused_before_the_model_is_loaded(settings, monkeypatch):
    monkeypatch.setattr(sys.modules["luthier.train"], "assemble", None)
    config = configure(settings, {"schedule": {"warmup": 7}, "max_steps": None})  # 26 rows, 4 a step
    with pytest.raises(ConfigError, match="leave too few of the run's 7"):
        Trainer(config, QUIET)


def test_a_metric_that_is_not_measured_stops_before_the_first_step(settings):
    config = configure(settings, PLATEAU, {"schedule": {"metric": "nonsense"}})
    with pytest.raises(ConfigError, match=r"schedule\.metric='nonsense' is not a figure of this evaluation"):
        next(steps(config, QUIET))


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial",
                                  "inverse_sqrt", "warmup_stable_decay", "reduce_lr_on_plateau"])  # fmt: skip
def test_each_kind_survives_its_own_yaml(kind, tmp_path):
    config = configure(HERE, {"schedule": kind, "evaluation": {"every": 5}}, "data.validation=0.1")
    (tmp_path / "config.yaml").write_text(config.dump())
    assert configure(tmp_path / "config.yaml") == config
    assert config.schedule.kind == kind
