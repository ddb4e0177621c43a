"""Many options in one run of two processes, killed and resumed: it ends with the bytes of one that never stopped."""

import pytest
import torch
from conftest import ROWS, write_rows
from safetensors.torch import load_file
from test_ranks import kill_after, torchrun
from test_train import finished

from luthier import checkpoint, configure
from luthier.monitor import records

TEXTS = [{"text": f"the {n} birds of {word} sing at {n} o'clock and sleep"} for n in range(12) for word in "abc"]


@pytest.fixture
def whole_day(settings, tmp_path) -> dict:
    chats = write_rows(tmp_path / "chats.jsonl", ROWS * 4)
    texts = write_rows(tmp_path / "texts.jsonl", TEXTS)
    held_out = write_rows(tmp_path / "held_out.jsonl", ROWS[:6])
    options = {
        "data": {
            "train": [{"path": str(chats), "weight": 0.7}, {"path": str(texts), "weight": 0.3}],
            "validation": str(held_out), "max_length": 64, "streaming": True, "shuffle_buffer": 32,
        },
        "batch": {"tokens": 128, "micro_tokens": 64, "examples": None},
        "optim": {"kind": "muon", "learning_rate": 3e-2, "weight_decay": 0.01},
        "schedule": {"kind": "warmup_stable_decay", "warmup": 2},
        "clipping": {"kind": "adaptive"},
        "regularisation": {"dropout": 0.1, "neftune_noise_alpha": 5.0},
        "objective": {"label_smoothing_factor": 0.05},
        "averaging": {"kind": "ema", "decay": 0.8},
        "early_stopping": {"patience": 2, "threshold": 10.0},  # no evaluation is that much better: stops at the third
        "evaluation": {"every": 4, "generate": 2, "max_new_tokens": 4, "metrics": ["exact_match", "f1"]},
        "checkpoint": {"every": 2, "keep": 2},
        "monitor": {"report_to": ["tensorboard"], "histogram_every": 4, "on_nonfinite": "skip"},
        "max_steps": 40,
    }  # fmt: skip
    settings.pop("batch"), settings.pop("data")
    return configure(settings, options, method="full").model_dump(mode="json")


def test_a_full_day_of_options_resumes_byte_for_byte(whole_day, tmp_path):
    whole = torchrun(tmp_path, whole_day, "whole")
    _, told = whole.communicate(timeout=500)
    assert whole.returncode == 0, told
    assert "stopped early after step 12" in told
    killed = torchrun(tmp_path, whole_day, "killed")
    kill_after(killed, tmp_path / "killed", 6)
    again = torchrun(tmp_path, whole_day, "killed")
    _, told = again.communicate(timeout=500)
    assert again.returncode == 0, told
    assert "resumed from" in told
    assert finished(tmp_path / "whole") == finished(tmp_path / "killed")
    told_of = [[(r["kind"], r["step"], r.get("loss")) for r in records(tmp_path / name / "metrics.jsonl")]
               for name in ("whole", "killed")]  # fmt: skip
    assert told_of[0] == told_of[1]
    last = checkpoint.listed(tmp_path / "whole" / "checkpoints")[-1]
    assert checkpoint.step_of(last) == 12
    weights, average = (load_file(last / f"{group}.safetensors") for group in ("weights", "averaging"))
    assert any(not torch.equal(weights[name], average[name]) for name in weights)
    assert any((tmp_path / "killed" / "tensorboard").iterdir())
