"""One process = n processes: the same weights from two gloo ranks."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from luthier import checkpoint, configure, train
from luthier.monitor import Console, records

MEASURED = {
    "every": 3, "generate": 5, "batch_size": 2, "max_new_tokens": 8, "metrics": ["f1", "chrf"],
    "forgetting": "python-docs",
}  # fmt: skip
CODE = """
import json, sys, torch
torch.set_num_threads(1)
from luthier import configure, train
from luthier.monitor import Console
train(configure(json.loads(sys.argv[1])), Console(quiet=True), {"mine": lambda r, a, p, row: len(a) + row["row"]})
"""


@pytest.mark.parametrize("examples", [8, 1])  # with one row, a rank has none
def test_two_ranks_learn_what_one_learns(settings, tmp_path, examples):
    settings |= {"batch": {"examples": examples, "micro_tokens": 64}, "evaluation": MEASURED}
    train(configure(settings), Console(quiet=True), {"mine": lambda r, a, p, row: len(a) + row["row"]})
    both = configure(settings, {"output_dir": str(tmp_path / "two")}).model_dump(mode="json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, json.dumps(both)],
            env=os.environ | {"RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for r in range(2)
    ]
    assert [p.wait(timeout=300) for p in processes] == [0, 0]
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
