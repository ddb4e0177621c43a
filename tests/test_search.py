"""Whole searches: what is best, what trials share, what goes wrong, kill and resume, several workers, storages."""

import io
import json
import math
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_train import finished

import luthier
from luthier import configure, train
from luthier.cli import main
from luthier.errors import ConfigError, MetricError, SearchError
from luthier.monitor import Console
from luthier.search import plan as plan_
from luthier.search import trials as trials_
from luthier.search.storage import opened
from luthier.shared import Shared
from luthier.train import Trainer

QUIET = Console(quiet=True)
RATE = "optim.learning_rate"
SPACE = {RATE: "log(1e-4, 1e-1)", "trainable.r": "[2, 4, 16]"}
NAMES = ("trial", "state", "settings", "values", "reason", "steps", "curve")


def search(values, space=SPACE, **settings):
    settings = {"fresh_seeds": 0, "trials": 4} | settings
    return luthier.search(values, space=space, console=QUIET, **settings)


def rows_of(report):
    """What must be the same of two searches that are the same."""
    return [{name: row[name] for name in NAMES} for row in report["trials"]]


# ---------------------------------------------------------------------------- what a search ends with


def test_a_search_ends_with_the_best_as_a_configuration(searched, tmp_path):
    found = search(searched, trials=6, sampler="random", pruner="none")
    report = found.report
    values = {row["trial"]: row["values"]["eval.loss"] for row in report["trials"]}
    assert len(values) == 6
    best = min(values, key=lambda n: (values[n], n))
    assert report["best"] == [best]
    assert report["trials"][0]["settings"] == {RATE: 1e-2, "trainable.r": 16}  # the configuration as it is
    # `luthier train` takes the file as it is, and ends with the very bytes of the trial.
    assert main(["train", str(found.best), "--quiet"]) == 0
    run = tmp_path / "run"
    assert json.loads((run / "report.json").read_text())["held_out_loss"]["tuned"] == values[best]
    assert finished(run)["weights.safetensors"] == finished(found.folder / f"trials/{best:04}")["weights.safetensors"]
    for number in values:  # those that are beaten have no weights left
        assert (found.folder / f"trials/{number:04}" / "checkpoints").exists() == (number == best)
    table = (found.folder / "trials.md").read_text()
    assert f"| {best} | **complete** | {values[best]:.4g} |" in table
    assert json.loads((found.folder / "report.json").read_text()) == report
    again = search(searched, trials=6, sampler="random", pruner="none")  # nothing is left to do
    assert again.report == report


def test_equal_seeds_give_equal_trials_and_others_do_not(searched, tmp_path):
    reports = [
        search(searched, trials=6, seed=seed, folder=str(tmp_path / name)).report
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert rows_of(reports[0]) == rows_of(reports[1])
    assert rows_of(reports[0])[1:] != rows_of(reports[2])[1:]


def test_several_metrics_give_a_front(searched):
    space = {"trainable.r": "[2, 4, 16]", RATE: "[1e-3, 1e-2]"}
    found = search(searched, space, sampler="grid", trials=None, metrics=["eval.loss", "parameters"])
    rows = found.report["trials"]
    assert len(rows) == 6
    pairs = {r["trial"]: (r["values"]["eval.loss"], r["values"]["parameters"]) for r in rows}
    by_hand = {
        n for n, (loss, count) in pairs.items()
        if not any((a <= loss and b <= count and (a, b) != (loss, count)) for a, b in pairs.values())
    }  # fmt: skip
    assert set(found.report["best"]) == by_hand
    counts = {r["settings"]["trainable.r"]: r["values"]["parameters"] for r in rows}
    assert counts[16] == 8 * counts[2] == 4 * counts[4]
    for number in by_hand:
        config = configure(found.folder / "front" / f"trial-{number:04}.yaml")
        assert config.trainable.r == rows[number]["settings"]["trainable.r"]
    first = configure(found.best)
    best = min(by_hand, key=lambda n: pairs[n])
    assert (first.trainable.r, first.optim.learning_rate) == tuple(rows[best]["settings"].values())
    assert set(found.report["importance"]["shares"]) == {"eval.loss", "parameters"}
    assert found.report["importance"]["shares"]["parameters"]["trainable.r"] > 0.9


def test_costs_of_trials(searched):
    space = {"max_steps": "[2, 6]"}
    metrics = ["eval.loss", "seconds", "memory", "tokens_per_second"]
    found = search(searched, space, sampler="grid", trials=None, metrics=metrics)
    short, long = (row["values"] for row in found.report["trials"])
    for values, row in zip((short, long), found.report["trials"]):
        report = json.loads((found.folder / "trials" / f"{row['trial']:04}" / "report.json").read_text())
        assert values["seconds"] == report["training_seconds"]
        assert values["tokens_per_second"] == pytest.approx(report["tokens"] / report["training_seconds"])
        assert 0.05 < values["memory"] < 64
    assert configure(found.best).search is None


def test_the_best_against_the_default_on_a_fresh_seed(searched, tmp_path):
    """The interval is the paired bootstrap of the rows, worked out again from the files of both runs."""
    values = searched | {"optim": {"learning_rate": 1e-4}, "max_steps": 8}
    found = search(values, {RATE: "[1e-4, 3e-2]"}, trials=2, sampler="grid", fresh_seeds=1)
    one = found.report["fresh"]["seeds"][0]
    assert one["seed"] != 0
    sides = {}
    for side in ("default", "best"):
        folder = found.folder / "fresh" / f"{side}-{one['seed']}"
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["seed"] == config["data"]["seed"] == one["seed"]
        assert config["optim"]["learning_rate"] == {"default": 1e-4, "best": 3e-2}[side]
        step = json.loads((folder / "report.json").read_text())["best_step"]
        columns = json.loads((folder / "evaluations" / f"step-{step:08}.json").read_text())["documents"]["held_out"]
        sides[side] = np.array([columns["loss"], columns["weight"]])
    loss = {side: c[0].sum() / c[1].sum() for side, c in sides.items()}
    figure = one["figures"]["loss"]
    assert figure["change"] == pytest.approx(loss["best"] - loss["default"])
    rng = np.random.default_rng(1)
    drawn = [rng.integers(0, 6, 6) for _ in range(4000)]
    differences = [
        sides["best"][0, d].sum() / sides["best"][1, d].sum()
        - sides["default"][0, d].sum() / sides["default"][1, d].sum()
        for d in drawn
    ]
    assert figure["change_interval"] == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=0.03)
    assert figure["wins"] == (sides["best"][0] / sides["best"][1] < sides["default"][0] / sides["default"][1]).sum()
    assert "better than the default beyond chance" in found.report["fresh"]["verdict"]
    assert not (found.folder / "fresh" / f"best-{one['seed']}" / "checkpoints").exists()


def test_luck_is_not_sold_as_gain(searched):
    """Two settings that do the same: one is best by the order of trials, and nothing is claimed of it."""
    found = search(searched, {"seed": "[1, 2]"}, sampler="grid", trials=None, fresh_seeds=2)
    verdict = found.report["fresh"]["verdict"]
    assert "eval.loss: no difference that could be told from chance" in verdict
    found = search(searched, {RATE: "[1e-2, 1e-9]"}, sampler="grid", trials=None, fresh_seeds=1,
                   folder=str(found.folder) + "-2")  # fmt: skip
    assert "is the configuration as it is" in found.report["fresh"]["note"]


def test_a_function_is_a_metric(searched, tmp_path):
    """Figures of answers come from a user's function; workers get it by its place, and so does the command line."""
    path = tmp_path / "mine.py"
    path.write_text("def brevity(reference, answer, prompt, row):\n    return -len(answer)\n")
    values = searched | {"evaluation": {"generate": 3, "max_new_tokens": 4, "every": 2}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    told = main(["search", str(file), "trainable.r=[2, 4]", "--metric", f"{path}:brevity", "--fresh-seeds", "0",
                 "--quiet"])  # fmt: skip
    assert told == 0
    report = json.loads((tmp_path / "run-search" / "report.json").read_text())
    assert [m["key"] for m in report["metrics"]] == ["brevity"]
    assert not report["metrics"][0]["less"]
    assert all(-40 < row["values"]["eval.brevity"] <= 0 for row in report["trials"])
    with pytest.raises(ConfigError, match=r"FILE\.py:FUNCTION"):
        search(values, metrics=["eval.mine"], functions={"mine": lambda *a: 0}, workers=2)

    def broken(*given):
        raise ValueError("of the user's")

    with pytest.raises(MetricError, match="of the user's"):
        search(values, metrics=["eval.mine"], functions={"mine": broken}, folder=str(tmp_path / "broken"))


# ---------------------------------------------------------------------------- what trials share


SHARED = {
    "lora": {"trainable": {"r": 4, "lora_dropout": 0.1}},
    "full": {"regularisation": {"dropout": 0.1}},
    "partial": {"trainable": {"last_layers": 1}},
    "qlora": {"trainable": {"r": 4}},
    "prompt": {"trainable": {"num_virtual_tokens": 3}},
    "qat": {"precision": {"group_size": 16}},
    "dpo": {"trainable": {"r": 4}},
    "classify": {},
}


def rows_for(method, tmp_path):
    from conftest import ROWS, write_rows

    if method == "dpo":
        rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["prompt"]} for r in ROWS]
    elif method == "classify":
        rows = [{"text": r["prompt"], "label": r["prompt"].split()[0]} for r in ROWS]
    else:
        rows = ROWS
    return str(write_rows(tmp_path / f"{method}.jsonl", rows))


@pytest.mark.parametrize("method", SHARED)
def test_a_run_that_shares_ends_with_the_bytes_of_one_that_does_not(method, settings, tmp_path, monkeypatch):
    """The second run of a process has the weights and rows of the first, and is as if it had been alone."""
    from luthier.data import dataset
    from luthier.models import load

    settings["data"] |= {"train": rows_for(method, tmp_path)}
    values = settings | {"max_steps": 3}

    def config(name, **more):
        return configure(values, SHARED[method], more, {"output_dir": str(tmp_path / name)}, method=method)

    train(config("alone"), QUIET)
    shared, counts = Shared(), {"model": 0, "rows": 0}
    for module, name, what in ((load, "load_model", "model"), (dataset, "open_rows", "rows")):
        real = getattr(module, name)

        def counted(*args, real=real, what=what, **kwargs):
            counts[what] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    Trainer(config("first", optim={"learning_rate": 0.3}), QUIET, shared=shared).run()
    torch.manual_seed(1234)
    Trainer(config("second"), QUIET, shared=shared).run()
    assert counts == {"model": 1, "rows": 1}
    alone, second = finished(tmp_path / "alone"), finished(tmp_path / "second")
    assert alone.keys() == second.keys()
    for name in alone:
        if name not in ("manifest.json", "state.json"):
            assert alone[name] == second[name], name
    reports = [json.loads((tmp_path / n / "report.json").read_text())["figures"] for n in ("alone", "second")]
    assert reports[0] == reports[1]


def test_what_decides_the_base_or_the_rows_is_not_shared(settings, tmp_path, monkeypatch):
    from luthier.models import load

    made, shared = [], Shared()
    monkeypatch.setattr(load, "load_model", lambda *a, real=load.load_model, **k: made.append(1) or real(*a, **k))
    files = [rows_for("lora", tmp_path), str(tmp_path / "lora.jsonl")]
    for i, more in enumerate([{}, {"seed": 1}, {"precision": {"kind": "int8"}}, {}]):
        values = settings | {"max_steps": 1, "output_dir": str(tmp_path / f"run-{i}")} | more
        values["data"] = settings["data"] | {"train": files[0]}
        trainer = Trainer(configure(values), QUIET, shared=shared)
    assert len(made) == 4  # of each the last one is kept
    first = trainer.training
    Path(files[1]).write_text(Path(files[1]).read_text().replace("one", "two"))
    changed = Trainer(configure(values, {"output_dir": str(tmp_path / "changed")}), QUIET, shared=shared)
    assert len(made) == 4
    assert changed.training.fingerprint() != first.fingerprint()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the compiler on a CPU
def test_a_compiled_step_is_compiled_once(settings, tmp_path, monkeypatch):
    """A later trial of the same shapes runs the code that the first was compiled to."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **k: compile_(self, backend="eager", **k))
    torch._dynamo.reset()
    settings |= {"max_steps": 1, "batch": {"examples": 1, "micro_tokens": 64}}
    settings["data"] |= {"validation": None}
    counts, shared = [], Shared()
    for i in range(2):
        own = {"output_dir": str(tmp_path / f"run-{i}"), "optim": {"learning_rate": 0.01 * (i + 1)}}
        torch._dynamo.utils.counters.clear()
        Trainer(configure(settings, {"parallel": {"compile": True}}, own), QUIET, shared=shared).run()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert counts[0] > 0
    assert counts[1] == 0


# ---------------------------------------------------------------------------- bad trials


def test_bad_trials_end_early(searched):
    """Rates that hardly move anything are worse than the median at the first evaluation after three that do."""
    space = {RATE: "[3e-2, 2e-2, 1e-2, 1e-7, 1e-8]"}
    found = search(searched | {"max_steps": 6}, space, sampler="grid", trials=None, pruner="median")
    rows = found.report["trials"]
    assert [r["state"] for r in rows] == ["complete"] * 3 + ["pruned"] * 2
    assert [r["steps"] for r in rows] == [6, 6, 6, 2, 2]
    assert [len(r["curve"]) for r in rows] == [3, 3, 3, 1, 1]
    assert rows[3]["values"] is None
    assert not (found.folder / "trials" / "0003" / "checkpoints").exists()
    # what Optuna's own view has of it
    study = opened(found.folder, None, found.folder.name)
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 3 + ["PRUNED"] * 2
    curve = [[r["step"], r["loss"]] for r in _evaluations(found.folder / "trials" / "0000")]
    assert rows[0]["curve"] == curve[1:]  # all but the base's


def _evaluations(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in records if r["kind"] == "evaluation"]


def test_hyperband_ends_trials(searched):
    values = searched | {"max_steps": 9, "evaluation": {"every": 1}}
    found = search(values, trials=9, pruner="hyperband", sampler="random")
    steps = [r["steps"] for r in found.report["trials"]]
    states = [r["state"] for r in found.report["trials"]]
    assert "pruned" in states
    assert all((s == 9) == (state == "complete") for s, state in zip(steps, states))
    assert {s for s, state in zip(steps, states) if state == "pruned"} <= {1, 3, 9}  # its rungs


def test_what_goes_wrong_in_a_trial_is_its_result(searched, monkeypatch):
    """Diverged, out of memory, a combination that is refused: reasons in the table, and the search goes on."""
    take = Trainer._take

    def taken(self):
        if getattr(self.config.trainable, "r", 0) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return take(self)

    monkeypatch.setattr(Trainer, "_take", taken)
    values = searched | {"clipping": "none"}
    space = {RATE: "[1e-2, 1e38]", "method": "[lora, full]", "trainable.r": "[2, 4] if method=lora",
             "optim.loraplus_lr_ratio": "[null, 16]"}  # fmt: skip
    found = search(values, space, sampler="grid", trials=None, pruner="none")
    told = [(row["state"], row["reason"]) for row in found.report["trials"]]
    states = [state for state, _ in told]
    assert len(states) == 12
    assert states.count("out of memory") == 4
    assert states.count("refused") == 2
    assert states.count("diverged") == 3
    assert states.count("complete") == 3
    words = {"out of memory": "20.00 GiB", "refused": "needs a LoRA", "diverged": "not finite", "complete": ""}
    for state, reason in told:
        assert words[state] in reason
    assert "20.00 GiB" in (found.folder / "trials.md").read_text()
    study = opened(found.folder, None, found.folder.name)
    assert sum(t.state.name == "FAIL" for t in study.trials) == 9


def test_trials_leave_nothing_in_memory(searched, monkeypatch):
    """Neither those that end nor those that fail: the network of each is gone when the next begins."""
    import weakref

    take, seen = Trainer._take, []

    def taken(self):
        network = self.made.network
        if not seen or seen[-1]() is not network:
            assert not [one for one in seen if one() is not None]
            seen.append(weakref.ref(network))
        if self.config.trainable.r == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return take(self)

    monkeypatch.setattr(Trainer, "_take", taken)
    monkeypatch.setattr(trials_, "MUCH", 0)
    search(searched, {"trainable.r": "[2, 4, 8]"}, sampler="grid", trials=None)
    assert len(seen) == 3
    assert seen[-1]() is None


def test_a_base_is_kept_where_there_is_room(settings, tmp_path, monkeypatch):
    from luthier import shared as shared_

    for free, kept in ((0, False), (1 << 40, True)):
        monkeypatch.setattr(shared_, "_free_memory", lambda free=free: free)
        one = Shared()
        values = settings | {"max_steps": 1, "output_dir": str(tmp_path / f"run-{kept}")}
        Trainer(configure(values), QUIET, shared=one)
        assert ("model" in one._kept) is kept


def test_the_example_of_a_search(tiny_model, tmp_path, monkeypatch):
    """The file that the page shows, on a small model: `train` takes it in `test_examples.py`."""
    from test_examples import ALWAYS, ROOT, read, smaller, write_data

    monkeypatch.chdir(tmp_path)
    path = ROOT / "examples" / "search.yaml"
    example = read(path)
    write_data(example, tmp_path)
    found = luthier.search(path, ALWAYS, smaller(example, tiny_model), trials=3, console=QUIET)
    assert len(found.report["trials"]) == 3
    assert len(found.report["fresh"]["seeds"]) == 2
    assert set(found.report["space"]) == set(example["search"]["space"])


def test_memory_errors_are_told_from_others():
    assert trials_.out_of_memory(MemoryError())
    assert trials_.out_of_memory(torch.OutOfMemoryError("x"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert trials_.out_of_memory(error.value)
    assert not trials_.out_of_memory(RuntimeError("shape mismatch"))
    assert not trials_.out_of_memory(ValueError("out of memory"))


def test_a_fault_of_our_own_is_no_result(searched, monkeypatch):
    monkeypatch.setattr(Trainer, "_take", lambda self: {}["key"])
    with pytest.raises(KeyError):
        search(searched)
    study = opened(Path(searched["output_dir"] + "-search"), None, "run-search")
    assert study.trials[0].user_attrs["reason"] == "KeyError: 'key'"


def test_no_successful_trial(searched, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(searched | {"clipping": "none"}))
    command = ["search", str(file), f"{RATE}=[1e38, 2e38]", "--sampler", "random"]
    assert main(command) == 1
    told = capsys.readouterr().err
    assert "no trial" in told
    assert "2 x diverged" in told or "1 x diverged" in told
    assert not (tmp_path / "run-search" / "best.yaml").exists()
    assert main([*command[:2], f"{RATE}=log(1e37, 1e38)", "--folder", str(tmp_path / "more")]) == 1


def test_a_metric_that_is_never_measured(searched):
    with pytest.raises(ConfigError) as error:
        search(searched, metrics=["eval.los"])
    text = str(error.value)
    assert "--metric eval.los is never measured; did you mean 'eval.loss'?" in text
    assert "eval.perplexity" in text
    assert "evaluation.generate" in text
    with pytest.raises(ConfigError, match=r"eval\.f2 is never measured\. Measured are eval\.bits_per_byte"):
        search(searched, metrics=["eval.f2"], folder=searched["output_dir"] + "-f2")
    ran = list((Path(searched["output_dir"] + "-search") / "trials").iterdir())
    assert len(ran) == 1  # the first trial, and that not to its end
    assert not (ran[0] / "report.json").exists()


@pytest.mark.parametrize(
    ("settings_", "space", "words"),
    [
        ({"pruner": "medain"}, SPACE, "search.pruner='medain'"),
        ({"sampler": "cmaes"}, SPACE, "search.sampler='cmaes'"),
        ({"sampler": "grid"}, SPACE, "no end of values: give choices, such as"),
        ({"trials": 0}, SPACE, "search.trials=0"),
        ({"hours": -1}, SPACE, "search.hours=-1"),
        ({"trails": 5}, SPACE, "did you mean 'trials'"),
        ({"pruner": "median", "metrics": ["eval.loss", "seconds"]}, SPACE, "ends trials by one metric"),
        ({"storage": "sqlite:////no/such/folder/x.db"}, SPACE, "cannot be opened"),
        ({"storage": "nonsense"}, SPACE, "cannot be opened"),
        ({"launcher": "ray"}, SPACE, "Ray is not installed"),
        ({}, {"optim.learnign_rate": "log(1e-5, 1e-3)"}, "learning_rate"),
        ({}, {}, "nothing is searched"),
        ({}, {"data.seed": "[1, 2]"}, "which rows are held out"),
    ],
)
def test_searches_that_cannot_begin(searched, settings_, space, words):
    if settings_.get("launcher") == "ray" and find_spec("ray"):
        pytest.skip("Ray is installed")
    with pytest.raises(ConfigError) as error:
        search(searched, space, **settings_)
    assert words in str(error.value)
    assert not (Path(searched["output_dir"] + "-search") / "trials").exists()


def test_pruning_needs_evaluations(settings):
    with pytest.raises(ConfigError, match=r"evaluation\.every"):
        search(settings, pruner="hyperband")
    assert plan_.plan(settings, space=SPACE).pruner == "none"


def test_optuna_is_an_extra(searched, monkeypatch, capsys):
    from luthier.search import storage as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'luthier\[search\]'"):
        search(searched)


# ---------------------------------------------------------------------------- storages


def test_another_search_in_the_same_folder_is_refused(searched):
    search(searched, trials=2)
    for space, more, metrics, changed in (
        ({RATE: "log(1e-5, 1e-1)"}, {}, None, "log(1e-05, 0.1)"),
        (SPACE, {"max_steps": 5}, None, "max_steps: 4 there, 5 here"),
        (SPACE, {}, ["perplexity"], "perplexity"),
    ):
        with pytest.raises(ConfigError, match="holds a search") as error:
            search(searched | more, space, trials=2, metrics=metrics)
        assert changed in str(error.value)
    with pytest.raises(ConfigError, match="minimises or maximises otherwise"):
        search(searched, trials=2, metrics=["token_accuracy"])


def test_more_trials_go_on(searched, tmp_path):
    """A search of two and then of five is one of five."""
    search(searched, trials=2, sampler="random")
    report = search(searched, trials=5, sampler="random").report
    whole = search(searched, trials=5, sampler="random", folder=str(tmp_path / "whole")).report
    assert rows_of(report) == rows_of(whole)


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_optuna_reads_our_storage(searched, tmp_path, kind):
    """By its own functions, as its dashboard does: states, settings, values, curves, the best trial."""
    import optuna

    url = f"sqlite:///{tmp_path / 'search.db'}" if kind == "sqlite" else None
    space = {RATE: "log(1e-4, 1e-1)", "method": "[lora, full]", "trainable.r": "[2, 4] if method=lora"}
    found = search(searched, space, trials=5, storage=url)
    if url:
        storage = url
    else:
        backend = optuna.storages.journal.JournalFileBackend(str(found.folder / "journal.log"))
        storage = optuna.storages.JournalStorage(backend)
    study = optuna.load_study(study_name="run-search", storage=storage)
    assert len(study.trials) == 5
    assert study.best_trial.number == found.report["best"][0]
    for trial, row in zip(study.trials, found.report["trials"]):
        assert trial.params == row["settings"]
        assert [[s, v] for s, v in trial.intermediate_values.items()] == row["curve"]
        assert trial.state.is_finished()
    assert study.best_value == found.report["trials"][study.best_trial.number]["values"]["eval.loss"]


@pytest.mark.parametrize("url", [None, "sqlite"])
def test_the_dashboard_shows_a_search(searched, tmp_path, url):
    """optuna-dashboard's own answers, of a journal and of a database."""
    dashboard = pytest.importorskip("optuna_dashboard", reason="no optuna-dashboard here")
    if url == "sqlite":
        url = f"sqlite:///{tmp_path / 'search.db'}"
    made = search(searched, trials=2, fresh_seeds=0, storage=url)
    app = dashboard.wsgi(opened(made.folder, url, made.folder.name)._storage)

    def get(path: str) -> dict:
        answered = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "SERVER_NAME": "x", "SERVER_PORT": "80",
                    "SERVER_PROTOCOL": "HTTP/1.1", "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(),
                    "wsgi.errors": sys.stderr}  # fmt: skip
        return json.loads(b"".join(app(answered, lambda *_: None)))

    [study] = get("/api/studies")["study_summaries"]
    assert study["study_name"] == made.folder.name
    shown = get(f"/api/studies/{study['study_id']}")
    assert [t["state"] for t in shown["trials"]] == ["Complete", "Complete"]
    assert [t["values"] for t in shown["trials"]] == [list(r["values"].values()) for r in made.report["trials"]]


def test_a_function_of_the_space_is_kept_whole(searched):
    """Choices that a storage cannot hold, sections and nothing at all, come back as they were."""
    space = {"optim": "[{kind: adamw, learning_rate: 0.02}, {kind: lion, learning_rate: 0.001}]",
             "optim.loraplus_lr_ratio": "[null, 4]"}  # fmt: skip
    found = search(searched, space, sampler="grid", trials=None)
    kinds = [(r["settings"]["optim"]["kind"], r["settings"]["optim.loraplus_lr_ratio"]) for r in found.report["trials"]]
    assert kinds == [("adamw", None), ("adamw", 4), ("lion", None), ("lion", 4)]
    best = found.report["trials"][found.report["best"][0]]["settings"]
    config = configure(found.best)
    assert config.optim.kind == best["optim"]["kind"]
    assert config.optim.loraplus_lr_ratio == best["optim.loraplus_lr_ratio"]


# ---------------------------------------------------------------------------- a section of the file


def test_the_section_of_a_file(searched, tmp_path):
    """The same in the configuration's own file; options stand over it, and a run takes no notice."""
    space = {
        RATE: "log(1e-4, 1e-1)", "trainable.r": {"choices": [2, 4], "if": {"method": "lora"}},
        "method": ["lora", "full"],
    }  # fmt: skip
    section = {"space": space, "trials": 3, "fresh_seeds": 0, "metrics": ["eval.perplexity"]}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(searched | {"search": section}))
    plan = plan_.plan(file, trials=4)
    assert (plan.trials, plan.metrics[0].key, plan.config.search) == (4, "perplexity", None)
    plan = plan_.plan(file, "search.trials=5", space={"trainable.r": "[8, 16] if method=lora"})
    assert plan.trials == 5
    assert plan.space.by_key["trainable.r"].choices == (8, 16)
    assert plan.space.by_key[RATE].log
    result = train(configure(file), QUIET)
    plain = configure(searched, {"output_dir": str(tmp_path / "plain")})
    assert finished(result.folder)["weights.safetensors"] == finished(train(plain, QUIET).folder)["weights.safetensors"]
    train(configure(file, {"search": {"trials": 9}}), QUIET)  # nor does one that goes on
    with pytest.raises(ConfigError, match="did you mean 'sampler'"):
        configure(file, {"search": {"samplr": "tpe"}})


def test_tensorboard_has_every_trial(searched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    found = search(searched, trials=3, sampler="random")
    for row in found.report["trials"]:
        events = EventAccumulator(str(found.folder / "tensorboard" / f"{row['trial']:04}"))
        events.Reload()
        (value,) = events.Scalars("search/eval.loss")
        assert value.value == pytest.approx(row["values"]["eval.loss"], rel=1e-6)
        curve = [[s.step, s.value] for s in events.Scalars("evaluation/eval.loss")]
        assert [c[0] for c in curve] == [c[0] for c in row["curve"]]
        content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
        assert start.hparams[RATE].number_value == row["settings"][RATE]
        assert start.hparams["trainable.r"].number_value == row["settings"]["trainable.r"]


def test_a_report_without_a_successful_trial_names_why(searched):
    from luthier.search import report

    plan = plan_.plan(searched, space=SPACE)
    rows = [{"trial": 0, "state": "diverged", "reason": "loss nan", "values": None}] * 2
    with pytest.raises(SearchError, match="2 x diverged: loss nan"):
        report.best_of(plan, rows)
    assert math.isnan(float("nan"))
    shutil.rmtree(plan.folder, ignore_errors=True)
