"""Where a search looks: texts to distributions, conditions, what is proposed, which trials are best."""

import itertools
import math
import random

import numpy as np
import pytest

from luthier.config import configure
from luthier.errors import ConfigError
from luthier.search.metrics import Metric, front
from luthier.search.metrics import read as read_metrics
from luthier.search.sampling import distribution, propose
from luthier.search.space import Dimension, Space, is_distribution, overrides, read, refused

RATE = "optim.learning_rate"


def one(key, entry) -> Dimension:
    return read({key: entry}).dimensions[0]


@pytest.mark.parametrize(
    ("key", "entry", "expected"),
    [
        (RATE, "log(1e-5, 1e-3)", {"low": 1e-5, "high": 1e-3, "log": True, "whole": False}),
        (RATE, {"log": [1e-5, 1e-3]}, {"low": 1e-5, "high": 1e-3, "log": True}),
        ("trainable.lora_dropout", "(0, 0.1)", {"low": 0, "high": 0.1, "log": False, "whole": False}),
        ("trainable.lora_dropout", "uniform(0, 1)", {"whole": False}),  # the setting takes fractions
        ("trainable.lora_dropout", "uniform(0,0.2,0.05)", {"step": 0.05}),
        ("trainable.r", "(4, 64)", {"low": 4, "high": 64, "whole": True}),  # and this one none
        ("trainable.r", "log(4, 64)", {"log": True, "whole": True}),
        ("trainable.r", "int(4,64,4)", {"step": 4, "whole": True}),
        ("schedule.warmup", "(0.0, 0.1)", {"whole": False}),  # a share or a number of steps
        ("schedule.warmup", "(0, 10)", {"whole": True}),
        ("trainable.r", "[8,16,32]", {"choices": (8, 16, 32)}),
        ("trainable.r", {"choices": [8, 16]}, {"choices": (8, 16)}),
        ("optim", "[{kind: adamw}, {kind: lion, learning_rate: 1e-5}]",
         {"choices": ({"kind": "adamw"}, {"kind": "lion", "learning_rate": 1e-5})}),
        ("trainable.target_modules", "choice([q_proj], [q_proj, v_proj], all-linear)",
         {"choices": (["q_proj"], ["q_proj", "v_proj"], "all-linear")}),
        ("model.config.hidden_size", "[32, 64]", {"choices": (32, 64)}),  # a section of free keys
        ("batch.packing", "[true, false]", {"choices": (True, False)}),
    ],
)  # fmt: skip
def test_texts_to_distributions(key, entry, expected):
    found = one(key, entry)
    assert {name: getattr(found, name) for name in expected} == expected
    if isinstance(entry, str) and not found.when:  # what is told of it is read as the same
        assert one(key, str(found)) == found


@pytest.mark.parametrize(
    ("key", "entry", "words"),
    [
        ("optim.leraning_rate", "log(1e-5, 1e-3)", ["optim.leraning_rate: unknown key", "'learning_rate'"]),
        ("optimizer.lr", "log(1e-5, 1e-3)", ["optimizer.lr: unknown key", "'optim.learning_rate'"]),
        ("scheduler.kind", "[linear, cosine]", ["scheduler.kind: unknown key", "'schedule.kind'"]),
        ("trainable.rank", "[8, 16]", ["trainable.rank: unknown key", "'trainable.r'"]),
        ("optim.lr", "log(1e-5, 1e-3)", ["unknown key", "'optim.learning_rate'"]),
        ("trainabel.r", "[8]", ["unknown key", "'trainable.r'"]),
        (RATE, "log(1e-3, 1e-5)", ["interval is empty"]),
        (RATE, "log(1e-3, 1e-3)", ["interval is empty"]),
        (RATE, "log(0, 1e-3)", ["begins above 0", "1e-6"]),
        (RATE, "loguniform(1e-5, 1e-3)", ["'loguniform' is no distribution", "did you mean 'log'"]),
        (RATE, "unifrom(0, 1)", ["did you mean 'uniform'"]),
        (RATE, "log(1e-5)", ["expected two numbers"]),
        (RATE, "log(1e-5, 1e-3, 4)", ["expected two numbers"]),
        (RATE, "uniform(a, b)", ["expected two numbers"]),
        (RATE, "1e-4", ["expected where to search"]),
        (RATE, 1e-4, ["expected where to search"]),
        (RATE, {"log": [1e-5, 1e-3], "step": 2}, ["found log, step"]),
        ("trainable.r", "[]", ["nothing to choose from"]),
        ("trainable.r", "[8, 16, 8]", ["8 is there twice"]),
        ("trainable.r", "[1, true]", ["cannot be told apart"]),
        ("trainable.r", "(0.5, 8)", ["expected integers"]),
        ("trainable.r", "int(1, 10, 2)", ["no step ends at 10", "use 9"]),
        ("trainable.r", "int(1, 10, 20)", ["step should be above 0"]),
        ("trainable.kind", "(0, 1)", ["takes no numbers"]),
        ("output_dir", "[a, b]", ["each trial has a folder of its own"]),
        ("evaluation.every", "[1, 2]", ["measured alike"]),
        ("data.validation", "[4, 8]", ["the same rows"]),
        ("search.trials", "[1, 2]", ["cannot be searched"]),
        ("trainable.r", "[8] if metod=lora", ["metod, which is not searched"]),
        ("trainable.r", "[8] if", ["not YAML"]),
        ("trainable.r", "[8] if method like lora", ["is no condition"]),
        ("trainable.r", "[8, 16] if trainable.r=8", ["the condition is on itself"]),
    ],
)
def test_what_is_no_space(key, entry, words):
    with pytest.raises(ConfigError) as error:
        read({key: entry})
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optimizer.lr", "optim.learning_rate"),
        ("optimizer.kind", "optim.kind"),
        ("optimizer.learning_rat", "optim.learning_rate"),
        ("lora.rank", "trainable.r"),
        ("optm.lr", "optim.learning_rate"),
        ("trainable.rank", "trainable.r"),
        ("scheduler.warmup_ratio", "schedule.warmup"),
        ("training.epochs", "epochs"),
    ],
)
def test_a_name_of_another_library_is_told_ours(key, meant, settings):
    """In a space and in a configuration alike, and the section as well as the key."""
    with pytest.raises(ConfigError) as error:
        read({key: "[1, 2]"})
    assert error.value.problems == [f"{key}: unknown key; did you mean {meant!r}?"]
    with pytest.raises(ConfigError) as error:
        configure(settings, f"{key}=1")
    assert error.value.problems == [f"{key}: unknown key; did you mean {meant!r}?"]


def test_a_distribution_that_is_not_closed():
    key, text = "optim.learning_rate", "log(1e-5,1e-3"
    assert is_distribution(key, text)
    with pytest.raises(ConfigError, match=r"expected where to search, such as log\(1e-5, 1e-3\)"):
        read({key: text})


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        read({RATE: "log(0, 1)", "trainable.r": "[]", "epocs": "[1, 2]"})
    assert len(error.value.problems) == 3


def test_an_empty_space_is_an_error():
    with pytest.raises(ConfigError, match="nothing is searched"):
        read({})


@pytest.mark.parametrize(
    ("key", "text", "searched"),
    [
        (RATE, "1e-4", False),
        (RATE, "log(1e-5,1e-3)", True),
        ("trainable.r", "[8, 16]", True),
        ("trainable.target_modules", "[q_proj, v_proj]", False),  # takes a list: that is its value, as of `train`
        ("trainable.target_modules", "[[q_proj], [v_proj]]", True),
        ("trainable.target_modules", "choice(q_proj, [v_proj])", True),
        ("data.train", "[a.jsonl, b.jsonl]", False),
        ("trainable.r", "[8, 16] if method=lora", True),
        ("data.train", "what if.jsonl", False),
    ],
)
def test_what_on_a_command_line_is_searched(key, text, searched):
    assert is_distribution(key, text) is searched


# ---------------------------------------------------------------------------- conditions


CONDITIONAL = {
    "trainable.r": "[8, 16] if method=lora",
    "method": "[lora, full, dora]",
    "trainable.lora_alpha": "[1, 2] if method in [lora, dora] and trainable.r=16",
}


def test_conditions_by_hand():
    space = read(CONDITIONAL)
    assert [d.key for d in space.dimensions] == ["method", "trainable.r", "trainable.lora_alpha"]
    assert space.points() == [
        {"method": "lora", "trainable.r": 8},
        {"method": "lora", "trainable.r": 16, "trainable.lora_alpha": 1},
        {"method": "lora", "trainable.r": 16, "trainable.lora_alpha": 2},
        {"method": "full"},
        {"method": "dora"},  # has no r, so no alpha that depends on it
    ]
    structured = {
        "method": ["lora", "full", "dora"],
        "trainable.r": {"choices": [8, 16], "if": {"method": "lora"}},
        "trainable.lora_alpha": {"choices": [1, 2], "if": {"method": ["lora", "dora"], "trainable.r": 16}},
    }
    assert read(structured).points() == space.points()
    assert read(space.described()).points() == space.points()


def test_a_condition_on_a_key_of_a_chosen_section():
    space = read({"optim": "[{kind: adamw}, {kind: sgd}]", "optim.momentum": "[0.5, 0.9] if optim.kind=sgd"})
    values = [space.values(point) for point in space.points()]
    assert values == [
        {"optim": {"kind": "adamw"}},
        {"optim": {"kind": "sgd"}, "optim.momentum": 0.5},
        {"optim": {"kind": "sgd"}, "optim.momentum": 0.9},
    ]
    assert overrides(values[1]) == [{"optim": {"kind": "sgd"}}, {"optim": {"momentum": 0.5}}]


def test_conditions_in_a_circle_and_on_values_that_are_no_choices():
    with pytest.raises(ConfigError, match="in a circle"):
        read({"trainable.r": "[8] if trainable.lora_alpha=1", "trainable.lora_alpha": "[1] if trainable.r=8"})
    with pytest.raises(ConfigError, match="method='qlora' is not among"):
        read({"method": "[lora, full]", "trainable.r": "[8, 16] if method=qlora"})


def test_values_that_can_never_be_and_choices_that_do_not_go_together(settings):
    with pytest.raises(ConfigError, match=r"trainable.lora_dropout=2.* less than") as error:
        refused(read({"trainable.lora_dropout": "[0, 2]"}), [settings])
    assert "searched" in str(error.value)
    told = refused(read({"method": "[lora, full]", "trainable.r": "[8, 16]"}), [settings])
    assert len(told) == 1
    assert "combinations" in told[0]
    assert "trainable.r" in told[0]
    assert not refused(read({"method": "[lora, full]", "trainable.r": "[8, 16] if method=lora"}), [settings])
    with pytest.raises(ConfigError, match=r"search the method instead, such as method='\[\"lora\", \"full\"\]'"):
        refused(read({"trainable.kind": "[lora, full]"}), [settings])
    with pytest.raises(ConfigError, match="unknown"):
        refused(read({"method": "[lorra, ful]"}), [settings])


# ---------------------------------------------------------------------------- proposals


def trial(number, labels, space, values, state="COMPLETE"):
    from optuna.trial import FrozenTrial, TrialState, create_trial

    spread = {key: distribution(space.by_key[key]) for key in labels}
    made = create_trial(state=TrialState[state], values=values, params=labels, distributions=spread)
    assert isinstance(made, FrozenTrial)
    made.number = number
    return made


def searched(space, sampler, count, value, seed=0, default=None, fail=lambda values: False):
    """So many trials one after the other, on a function in a training's place."""
    tried, labels = [], []
    for n in range(count):
        found = propose(space, tried, n, seed, sampler, ["minimize"], count, default)
        labels.append(found)
        lost = fail(found)
        tried.append(trial(n, found, space, None if lost else [value(found)], "FAIL" if lost else "COMPLETE"))
    return labels


BOWL = {RATE: "log(1e-6, 1)", "trainable.r": "[2, 4, 8]"}


def bowl(labels):
    return (math.log10(labels[RATE]) + 3) ** 2 + (labels["trainable.r"] != 4)


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_equal_seeds_propose_equally_and_others_do_not(sampler):
    space = read(BOWL)
    first, again, other = (searched(space, sampler, 14, bowl, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len({tuple(one.items()) for one in first}) == 14


@pytest.mark.parametrize(("sampler", "seeds"), [("tpe", 4), ("gp", 1)])
def test_samplers_that_learn_come_nearer(sampler, seeds):
    """The median of the last third is far below that of as many at random: 2.25 of the square of a uniform on [-3, 3]
    alone, and two of three ranks cost 1 more."""
    last = [bowl(one) for seed in range(seeds) for one in searched(read(BOWL), sampler, 24, bowl, seed)[-8:]]
    assert np.median(last) < 1.1


def test_a_sampler_learns_from_failures():
    """What has failed is no blank: rates above 0.1 diverge here, and are hardly tried after the start."""
    space = read({RATE: "log(1e-6, 1)"})
    labels = searched(space, "tpe", 30, lambda one: -math.log10(one[RATE]), fail=lambda one: one[RATE] > 0.1)
    late = [one[RATE] > 0.1 for one in labels[15:]]
    assert sum(late) <= 7


def test_at_random_is_uniform_in_the_logarithm():
    from scipy import stats

    labels = searched(read({RATE: "log(1e-6, 1)"}), "random", 200, lambda one: 0.0)
    logs = [math.log10(one[RATE]) for one in labels]
    assert stats.kstest(logs, stats.uniform(-6, 6).cdf).pvalue > 0.01


def test_a_grid_has_every_point_once_and_others_none_twice():
    space = read(CONDITIONAL)
    for sampler in ("grid", "random", "tpe"):
        labels = searched(space, sampler, 5, lambda one: float(len(one)))
        assert sorted(map(repr, labels)) == sorted(map(repr, space.points()))
    assert searched(space, "grid", 5, lambda one: 0.0) == space.points()


def test_the_first_trial_is_the_configuration_as_it_is(settings):
    space = read(BOWL | {"trainable.r": "[2, 4, 16]"})
    default = space.of(configure(settings).model_dump(mode="json"))
    assert default == {RATE: 1e-2, "trainable.r": 16}
    assert searched(space, "tpe", 2, bowl, default=default)[0] == default
    outside = read({RATE: "log(1e-6, 1e-3)"})
    assert outside.of(configure(settings).model_dump(mode="json")) is None


def test_conditional_spaces_go_through_all_samplers():
    space = read({"method": "[lora, full]", "trainable.r": "log(2, 64) if method=lora", RATE: "log(1e-5, 1e-1)"})
    for sampler in ("tpe", "gp", "random"):
        for one in searched(space, sampler, 16, lambda one: one[RATE]):
            assert ("trainable.r" in one) == (one["method"] == "lora")


def test_labels_of_choices_come_back_as_values():
    d = one("optim", "[{kind: adamw}, {kind: lion}]")
    for choice, label in zip(d.choices, d.labels):
        assert isinstance(label, str)
        assert d.value(label) == choice
        assert d.label(choice) == label
    flags = one("batch.packing", "[true, false]")
    assert [flags.value(label) for label in flags.labels] == [True, False]
    rank = one("trainable.r", "int(4,64,4)")
    assert rank.label(8) == 8
    for wrong in (9, 8.5, 128, True, "8"):
        with pytest.raises(KeyError):
            rank.label(wrong)
    assert isinstance(read({"trainable.r": "(4, 64)"}), Space)


# ---------------------------------------------------------------------------- metrics


def test_the_front_is_optunas():
    """Pareto's front of random values, equal ones among them, beside Optuna's own."""
    import optuna

    rng = random.Random(0)
    for ways in itertools.product(("minimize", "maximize"), repeat=2):
        study = optuna.create_study(directions=list(ways))
        values = {n: [rng.randint(0, 6), rng.randint(0, 6)] for n in range(25)}
        for pair in values.values():
            study.add_trial(optuna.trial.create_trial(values=pair))
        metrics = [Metric(f"m{i}", f"m{i}", way == "minimize") for i, way in enumerate(ways)]
        ours = front(metrics, values)
        assert {tuple(values[n]) for n in ours} == {tuple(t.values) for t in study.best_trials}
        assert len({tuple(values[n]) for n in ours}) == len(ours)
        assert [values[n][0] for n in ours] == sorted((values[n][0] for n in ours), reverse=ways[0] == "maximize")


def test_which_way_is_better_is_told_by_the_name(settings):
    config = configure(settings)
    names = ["eval.loss", "eval.perplexity", "eval.exact_match", "eval.forgetting.loss", "eval.f1.loss", "seconds",
             "parameters", "tokens_per_second", "eval.kl", "eval.accuracy:min"]  # fmt: skip
    ways = {m.name: m.less for m in read_metrics(names, config)}
    assert ways == {
        "eval.loss": True, "eval.perplexity": True, "eval.exact_match": False, "eval.forgetting.loss": True,
        "eval.f1.loss": False, "seconds": True, "parameters": True, "tokens_per_second": False, "eval.kl": True,
        "eval.accuracy": True,
    }  # fmt: skip
    assert read_metrics([], config)[0] == Metric("eval.loss", "loss", True)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["eval.loss:down"], "'down' is no direction"),
        (["seconds"], "says nothing of quality"),
        (["secnds", "eval.loss"], "did you mean 'seconds'"),
        (["loss", "eval.loss"], "given twice"),
        (["eval."], "expected a name"),
    ],
)
def test_metrics_that_are_none(settings, names, words):
    with pytest.raises(ConfigError, match=words):
        read_metrics(names, configure(settings))
    if names == ["loss", "eval.loss"]:
        settings["data"] = {**settings["data"], "validation": None}
        with pytest.raises(ConfigError, match=r"data\.validation"):
            read_metrics(["eval.loss"], configure(settings))
