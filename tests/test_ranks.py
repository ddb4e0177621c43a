"""One process = n processes: the same weights from two gloo ranks."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_train import finished, forking

from luthier import checkpoint, configure, train
from luthier.monitor import Console, records

MEASURED = {
    "every": 3, "generate": 5, "batch_size": 2, "max_new_tokens": 8, "metrics": ["f1", "chrf"],
    "forgetting": "python-docs",
}  # fmt: skip
TRAIN = """
import json, sys, torch
torch.set_num_threads(1)
from luthier import configure, train
from luthier.monitor import Console
train(configure(json.loads(sys.argv[1])), Console(quiet=True))
"""
CODE = TRAIN.replace("quiet=True)", 'quiet=True), {"mine": lambda r, a, p, row: len(a) + row["row"]}')


def started(code: str, values: dict, *more: str, **streams: Any) -> list[subprocess.Popen]:
    """Two processes that run this code together, on the settings as JSON in its first argument, `more` in the next."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(values), *more],
            env=os.environ | {"RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            **streams,
        )
        for r in range(2)
    ]


def forked(work: Callable[[], None], world: int = 2) -> list[int]:
    """The exit codes of processes that do this work together; forks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    places = [{"RANK": str(rank), "WORLD_SIZE": str(world)} for rank in range(world)]
    children = [forking(work, place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for place in places]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def two_ranks(code: str, values: dict, *more: str, fresh: bool = False) -> list[int]:
    """The exit codes of two such processes; only `fresh` ones start Python anew."""
    if fresh:
        return [p.wait(timeout=300) for p in started(code, values, *more)]

    def work() -> None:
        sys.argv = ["-c", json.dumps(values), *more]
        exec(code, {"__name__": "__main__"})

    return forked(work)


def run_on_two(values: dict) -> list[int]:
    """The exit codes of two processes that train together."""
    return two_ranks(TRAIN, values)


@pytest.mark.parametrize("examples", [8, 1])  # with one row, a rank has none
def test_two_ranks_learn_what_one_learns(settings, tmp_path, examples):
    settings |= {"batch": {"examples": examples, "micro_tokens": 64}, "evaluation": MEASURED}
    train(configure(settings), Console(quiet=True), {"mine": lambda r, a, p, row: len(a) + row["row"]})
    both = configure(settings, {"output_dir": str(tmp_path / "two")}).model_dump(mode="json")
    assert two_ranks(CODE, both, fresh=examples == 8) == [0, 0]
    one, two = (
        load_file(checkpoint.listed(tmp_path / name / "checkpoints")[-1] / "weights.safetensors")
        for name in ("run", "two")
    )
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4, msg=name)
    losses = [
        [(r["kind"], r["step"], round(r["loss"], 4)) for r in records(tmp_path / n / "metrics.jsonl")]
        for n in ("run", "two")
    ]
    assert losses[0] == losses[1]
    one, two = (json.loads((tmp_path / n / "report.json").read_text())["figures"] for n in ("run", "two"))
    assert "mine" in one
    for key, figure in one.items():
        for part, value in figure.items():
            assert two[key][part] == pytest.approx(value, rel=1e-3, abs=1e-3), (key, part)


def test_two_ranks_are_taught_what_one_is(settings, tmp_path):
    """Half of the answers are the student's, drawn by the rank whose row it is: the same rows, the same answers."""
    settings |= {
        "method": "distill", "batch": {"examples": 8, "micro_tokens": 64}, "optim": {"learning_rate": 1e-3},
        "objective": {"teacher": settings["model"], "on_policy": {"max_completion_length": 8}, "divergence": "jsd"},
    }  # fmt: skip
    train(configure(settings), Console(quiet=True))
    both = configure(settings, {"output_dir": str(tmp_path / "two")}).model_dump(mode="json")
    assert run_on_two(both) == [0, 0]
    histories = [records(tmp_path / name / "metrics.jsonl") for name in ("run", "two")]
    for one, two in zip(*histories):
        for key in one.keys() & {"loss", "soft_loss", "hard_loss", "kl", "on_policy", "completion_length", "tokens"}:
            assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), (one["step"], key)
    assert {r["on_policy"] for r in histories[0] if r["kind"] == "train"} - {0.0, 1.0}, "there are both"


MANY_OPTIONS = {
    "trainable": {"lora_dropout": 0.2}, "regularisation": {"dropout": 0.1, "neftune_noise_alpha": 3.0},
    "averaging": "ema", "evaluation": {"every": 4, "generate": 2, "max_new_tokens": 4}, "checkpoint": {"every": 2},
    "monitor": {"report_to": ["tensorboard"]}, "max_steps": 12,
}  # fmt: skip


def torchrun(folder, settings, name) -> subprocess.Popen:
    """Two processes of the command line, as `torchrun -m luthier train FILE` starts them."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings | {"output_dir": str(folder / name)}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*command, "-m", "luthier", "train", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def kill_after(process: subprocess.Popen, run: Path, step: int) -> None:
    """SIGKILL of torchrun and its workers once a checkpoint of that step or a later one is there."""
    while process.poll() is None:
        found = checkpoint.listed(run / "checkpoints")
        if found and checkpoint.step_of(found[-1]) >= step:
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in [process.pid, *map(int, workers)]:
                os.kill(pid, signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_torchrun_killed_and_resumed_ends_with_the_same_bytes(settings, tmp_path):
    """Dropout and noise are other ones on each process, and go on where they were on each."""
    settings = configure(settings, MANY_OPTIONS).model_dump(mode="json")
    whole = torchrun(tmp_path, settings, "whole")
    said, told = whole.communicate(timeout=300)
    assert whole.returncode == 0, told
    assert said.count("held out") == 1
    assert told.count("step 12/12") == 1
    killed = torchrun(tmp_path, settings, "killed")
    kill_after(killed, tmp_path / "killed", 4)
    again = torchrun(tmp_path, settings, "killed")
    _, told = again.communicate(timeout=300)
    assert again.returncode == 0, told
    assert "resumed from" in told
    assert finished(tmp_path / "whole") == finished(tmp_path / "killed")
    states = load_file(checkpoint.listed(tmp_path / "whole" / "checkpoints")[-1] / "random.safetensors")
    assert not torch.equal(states["rank0"], states["rank1"])
    history = [[(r["kind"], r["step"], r.get("loss")) for r in records(tmp_path / n / "metrics.jsonl")]
               for n in ("whole", "killed")]  # fmt: skip
    assert history[0] == history[1]
    assert len(history[0]) == 12 + 4


def test_another_number_of_processes_goes_on_and_says_so(settings, tmp_path):
    settings = configure(settings, MANY_OPTIONS, "max_steps=4").model_dump(mode="json")
    process = torchrun(tmp_path, settings, "run")
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    (tmp_path / "run" / "report.json").unlink()
    said: list[str] = []
    console = Console(quiet=True)
    console.warn = said.append
    train(configure(settings, {"output_dir": str(tmp_path / "run")}), console)
    assert "written by 2 processes" in said[0]
