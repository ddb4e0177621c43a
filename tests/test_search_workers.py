"""Searches that are killed, stopped or out of time, and those of several workers: exactly the asked trials."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_search import QUIET, RATE, SPACE, rows_of, search

from luthier import configure
from luthier.errors import ConfigError, Interrupted
from luthier.search import plan as plan_
from luthier.search import run as run_search
from luthier.search.storage import opened
from luthier.search.study import Clock, open_storage, work
from luthier.train import Trainer

# ---------------------------------------------------------------------------- killed, stopped, out of time


KILLED = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import luthier
from luthier.monitor import Console
from luthier.train import Trainer

values, space, settings, trial, step = json.loads(sys.argv[1])
take = Trainer._take

def taken(self):
    if self.folder.name == trial and self.step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self)

Trainer._take = taken
luthier.search(values, space=space, console=Console(quiet=True), **settings)
"""


def kill_in(values, space, settings, trial, step):
    given = json.dumps([configure(values).model_dump(mode="json"), space, settings, trial, step])
    dead = subprocess.run([sys.executable, "-c", KILLED, given], capture_output=True)
    assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()[-2000:]


def test_killed_in_the_middle_and_resumed(searched, tmp_path):
    """SIGKILL in the third trial, after its checkpoint: the same command ends with the trials of a search that was
    never killed, and with no more of them."""
    values = searched | {"checkpoint": {"every": 1}}
    values = configure(values).model_dump(mode="json")
    settings = {"trials": 5, "fresh_seeds": 0, "sampler": "tpe"}
    kill_in(values, SPACE, settings, "0002", 3)
    folder = tmp_path / "run-search"
    before = opened(folder, None, "run-search").trials
    assert [t.state.name for t in before] == ["COMPLETE", "COMPLETE", "RUNNING", "WAITING", "WAITING"]
    report = search(values, **settings).report
    whole = search(values, **settings, folder=str(tmp_path / "whole")).report
    assert rows_of(report) == rows_of(whole)
    assert [row["attempts"] for row in report["trials"]] == [1, 1, 2, 1, 1]
    assert len(opened(folder, None, "run-search").trials) == 5


def test_a_trial_that_kills_its_process_is_marked_in_the_end(searched, tmp_path, monkeypatch):
    """As one that the system kills for its memory: after three processes the search goes on without it."""
    plan = plan_.plan(searched, space=SPACE, trials=2, fresh_seeds=0)
    storage = open_storage(plan)
    for attempt in (1, 2, 3):
        claimed = storage.claim(2, lambda n, others: {RATE: 1e-3, "trainable.r": 2}, _spread(plan))
        assert (claimed.number, claimed.attempt) == (0, attempt)
        storage.tell(claimed.id, owner={"host": "elsewhere", "pid": 1, "born": "1", "beat": 0.0})  # long silent
    report = run_search(plan, QUIET).report
    assert [r["state"] for r in report["trials"]] == ["died", "complete"]
    assert "died 3 times" in report["trials"][0]["reason"]


def _spread(plan):
    from luthier.search.sampling import distribution

    return lambda key: distribution(plan.space.by_key[key])


def test_a_trial_of_a_living_process_is_left_alone(searched):
    plan = plan_.plan(searched, space=SPACE, trials=2, fresh_seeds=0)
    storage = open_storage(plan)
    first = storage.claim(2, lambda n, others: {RATE: 1e-3, "trainable.r": 2}, _spread(plan))
    assert first.number == 0
    found = run_search(plan, QUIET)  # this very process has it, and lives
    assert found.report is None
    states = [t.state.name for t in storage.trials()]
    assert states == ["RUNNING", "COMPLETE"]
    assert not (plan.folder / "best.yaml").exists()
    storage.release(first)
    assert [r["state"] for r in run_search(plan, QUIET).report["trials"]] == ["complete", "complete"]


def test_a_process_that_lost_its_trial_stops(searched, monkeypatch):
    """One that was silent for long finds another owner, and tells nothing."""
    from luthier.search import storage as module

    monkeypatch.setattr(module, "BEAT", 0.01)
    plan = plan_.plan(searched, space=SPACE, trials=1, fresh_seeds=0)
    storage = open_storage(plan)
    claimed = storage.claim(1, lambda n, others: {RATE: 1e-3, "trainable.r": 2}, _spread(plan))
    with storage.owning(claimed) as check:
        check()
        storage.tell(claimed.id, owner={"host": "elsewhere", "pid": 1, "born": None, "beat": 1e12})
        import threading

        beats = [t for t in threading.enumerate() if t.name == f"trial {claimed.number}"]
        beats[0].join(5)  # it ends when it finds out
        with pytest.raises(module.Lost):
            check()
    assert storage.trials()[0].user_attrs["owner"]["host"] == "elsewhere"


def test_a_trial_that_another_machine_has_ended_is_left_to_it(searched, tmp_path, monkeypatch):
    """Machines that share a database and no folder have no lock in common: what is taken twice counts once."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    here, there = (
        plan_.plan(searched, space=SPACE, trials=2, fresh_seeds=0, storage=url, folder=str(tmp_path / name / "search"))
        for name in ("here", "there")
    )
    elsewhere = open_storage(there)
    take = Trainer._take

    def taken(self):  # the other machine is quicker with the first trial
        if self.folder.name == "0000" and self.step == 2:
            [first, _] = elsewhere.trials()
            elsewhere.finish(first._trial_id, "complete", elsewhere.states.COMPLETE, [1.0], steps=4, seconds=1.0)
        return take(self)

    monkeypatch.setattr(Trainer, "_take", taken)
    rows = run_search(here, QUIET).report["trials"]
    assert [row["state"] for row in rows] == ["complete", "complete"]
    assert rows[0]["values"] == {"eval.loss": 1.0}
    assert rows[1]["values"]["eval.loss"] != 1.0


def test_hours_end_a_search_and_the_same_command_goes_on(searched, tmp_path, monkeypatch):
    """The time is over in the second trial: it is saved and given back, and the whole is as if it had not been."""
    values = searched | {"checkpoint": {"every": 1}}
    clock = [0.0]
    take = Trainer._take

    def taken(self):
        clock[0] += 1.0
        return take(self)

    monkeypatch.setattr(Trainer, "_take", taken)
    real = Clock.until
    from luthier.search import study, trials

    class Time:
        monotonic = staticmethod(lambda: clock[0])

    monkeypatch.setattr(study, "time", Time)
    monkeypatch.setattr(trials, "time", Time)
    assert real is Clock.until
    report = search(values, trials=4, hours=5.5 / 3600, sampler="random").report
    assert [r["state"] for r in report["trials"]] == ["complete", "stopped", "waiting", "waiting"]
    assert (tmp_path / "run-search" / "trials" / "0001" / "checkpoints" / "step-00000002").exists()
    report = search(values, trials=4, sampler="random").report
    monkeypatch.undo()
    whole = search(values, trials=4, sampler="random", folder=str(tmp_path / "whole")).report
    assert rows_of(report) == rows_of(whole)
    assert [r["attempts"] for r in report["trials"]] == [1, 1, 1, 1]  # given back, not died


def test_a_signal_gives_the_trial_back(searched, tmp_path, monkeypatch):
    take = Trainer._take

    def taken(self):
        if self.folder.name == "0001" and self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self)

    monkeypatch.setattr(Trainer, "_take", taken)
    with pytest.raises(Interrupted) as error:
        search(searched, sampler="random")
    assert error.value.exit_code == 143
    monkeypatch.undo()
    report = search(searched, sampler="random").report
    whole = search(searched, sampler="random", folder=str(tmp_path / "whole")).report
    assert rows_of(report) == rows_of(whole)


# ---------------------------------------------------------------------------- several workers


TOGETHER = """
import json, sys
import torch
torch.set_num_threads(1)
from luthier.monitor import Console
from luthier.search import plan, trials, run as run_search
from luthier.search.plan import plan

values, space, settings, mine, other = json.loads(sys.argv[1])
run = trials.run

def ran(*args, **kwargs):
    if mine:
        global_ = globals()
        if not global_.get("met"):
            global_["met"] = True
            if mine < other:
                open(mine, "w").close(); open(other).close()
            else:
                open(other).close(); open(mine, "w").close()
    return run(*args, **kwargs)

trials.run = ran
found = run_search(plan(values, space=space, **settings), Console(quiet=True))
print(json.dumps(found.report is not None))
"""


def test_two_processes_give_exactly_the_asked_trials(searched, tmp_path):
    """The same command twice at once; neither begins its first trial before the other has one. Each trial is run once,
    and one of the two writes the report."""
    a, b = (str(tmp_path / name) for name in ("a.fifo", "b.fifo"))
    os.mkfifo(a)
    os.mkfifo(b)
    values = configure(searched).model_dump(mode="json")
    settings = {"trials": 7, "fresh_seeds": 0, "sampler": "random", "pruner": "none"}
    processes = [
        subprocess.Popen([sys.executable, "-c", TOGETHER, json.dumps([values, SPACE, settings, *pair])],
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for pair in ((a, b), (b, a))
    ]  # fmt: skip
    told = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], told
    trials = opened(tmp_path / "run-search", None, "run-search").trials
    assert len(trials) == 7
    assert {t.state.name for t in trials} == {"COMPLETE"}
    assert len({t.user_attrs["owner"]["pid"] for t in trials}) == 2
    assert {t.user_attrs["attempt"] for t in trials} == {1}
    assert sorted(json.loads(out) for out, _ in told)[-1] is True
    report = json.loads((tmp_path / "run-search" / "report.json").read_text())
    whole = search(values, **settings, folder=str(tmp_path / "whole")).report
    assert rows_of(report) == rows_of(whole)  # at random, trials do not depend on one another


def test_workers_of_one_command(searched, tmp_path):
    """Processes that the command starts: exactly the asked trials, one report, and a worker that dies is replaced."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(searched))
    ran = subprocess.run(
        [sys.executable, "-m", "luthier", "search", str(file), f"{RATE}=log(1e-4,1e-1)", "--trials", "5", "--workers",
         "2", "--sampler", "random", "--pruner", "none", "--fresh-seeds", "0", "--json", "--quiet"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    report = json.loads(ran.stdout)
    assert [r["state"] for r in report["trials"]] == ["complete"] * 5
    assert Path(report["best_config"]).is_file()
    assert len(opened(tmp_path / "run-search", None, "run-search").trials) == 5


def test_what_workers_are_started_with(searched, monkeypatch, tmp_path):
    """A GPU each, a share of the cores, the time that is left; one that was killed is started again."""
    from luthier.search import launch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    started, codes = [], [-9, 0, 0, 0]

    class Process:
        def __init__(self, command, env):
            started.append((command, env))
            self.code = codes.pop(0)

        def wait(self):
            return self.code

    monkeypatch.setattr(launch.subprocess, "Popen", Process)
    plan = plan_.plan(searched, space=SPACE, trials=3, workers=2, hours=1)
    storage = open_storage(plan)
    launch.launch(plan, storage, QUIET, Clock.of(plan))
    assert len(started) == 4  # both again, as trials are left
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in started] == ["0", "1"] * 2
    assert {env["OMP_NUM_THREADS"] for _, env in started} == {"4"}
    command = started[0][0]
    assert command[command.index("--hours") + 1].startswith("0.99") or command[command.index("--hours") + 1] == "1.0"
    theirs = plan_.plan(tmp_path / "run-search" / "search.yaml")
    assert theirs.told() == plan.told()
    assert (theirs.folder, theirs.trials, theirs.settings.workers) == (plan.folder, 3, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with pytest.raises(ConfigError, match="here are 1 GPUs"):
        launch.launch(plan, storage, QUIET, Clock.of(plan))
    codes[:] = [2, 0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    with pytest.raises(launch.WorkerError) as error:
        launch.launch(plan, storage, QUIET, Clock.of(plan))
    assert error.value.exit_code == 2
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in started[-2:]] == ["5", "7"]


def test_a_password_in_the_storage_is_shown_and_written_nowhere(searched, monkeypatch, tmp_path, capsys):
    from luthier.cli import main
    from luthier.search import launch, storage

    secret, started = "s3cret", []
    url = f"postgresql://me:{secret}@nowhere.invalid/db"
    assert storage.hidden(url) == "postgresql://me:***@nowhere.invalid/db"
    assert storage.hidden("sqlite:///a@b.db") == "sqlite:///a@b.db"
    path = tmp_path / "searched.yaml"
    path.write_text(yaml.safe_dump(searched))
    assert main(["search", str(path), "optim.learning_rate=log(1e-3,1e-2)", "--storage", url]) == 2
    said = capsys.readouterr()
    assert secret not in said.out + said.err
    assert "search.storage='postgresql://me:***@nowhere.invalid/db'" in said.err

    class Process:
        def __init__(self, command, env):
            started.append((command, env))

        def wait(self):
            return 0

    monkeypatch.setattr(launch.subprocess, "Popen", Process)
    plan = plan_.plan(searched, space=SPACE, trials=2, workers=2, storage=url)
    here = open_storage(plan_.plan(searched, space=SPACE, trials=2))
    launch.launch(plan, here, QUIET, Clock.of(plan))
    [(command, environment), _] = started
    assert secret not in " ".join(command) + (plan.folder / "search.yaml").read_text()
    monkeypatch.setattr(os, "environ", environment)
    assert storage.told_address() == url


def test_ray_gets_one_task_for_each_worker(searched, monkeypatch):
    """A stand-in with Ray's four functions that we call: what it is asked for, and that the trials are run."""
    import types

    from luthier.search import launch

    asked = {}

    def remote(**resources):
        asked.update(resources)
        return lambda function: types.SimpleNamespace(remote=function)

    ray = types.SimpleNamespace(
        init=lambda **k: None, cluster_resources=lambda: {"CPU": 4, "GPU": 2.0}, remote=remote, get=list
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(plan_, "find_spec", lambda name: True)
    plan = plan_.plan(searched, space=SPACE, trials=3, workers=2, launcher="ray", fresh_seeds=0)
    ran = []

    def run_here(command, cwd, env):
        theirs = plan_.plan(command[command.index("search") + 1])
        ran.append(work(theirs, open_storage(theirs), QUIET, Clock.of(theirs)))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(launch.subprocess, "run", run_here)
    report = run_search(plan, QUIET).report
    assert asked == {"num_cpus": 1, "num_gpus": 1, "max_retries": 0}
    assert ran == [True, True]
    assert [r["state"] for r in report["trials"]] == ["complete"] * 3


def test_a_folder_that_is_a_file(searched, tmp_path):
    file = tmp_path / "there"
    file.write_text("")
    with pytest.raises(ConfigError, match="is a file: name a folder"):
        open_storage(plan_.plan(searched, space=SPACE, trials=2, folder=str(file)))


def test_not_under_torchrun(searched, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--workers"):
        search(searched)
