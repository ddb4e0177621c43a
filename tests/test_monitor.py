"""Monitoring: trackers read back, profiles, alarms worked out by hand, and steps that are not finite."""

import contextlib
import io
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROWS, make_model, make_tokenizer, write_rows
from safetensors.torch import load_file
from test_ranks import TRAIN, started
from torch import nn

from luthier import checkpoint, configure, steps, train
from luthier.errors import ConfigError, NonFiniteError
from luthier.monitor import Console, alarms, console, histograms, nonfinite, records, trackers
from luthier.monitor.alarms import Alarms, Watch
from luthier.train import Trainer

QUIET = Console(quiet=True)


class Heard(Console):
    """A console that keeps its warnings."""

    def __init__(self):
        super().__init__(quiet=True)
        self.warnings: list[str] = []

    def warn(self, text):
        self.warnings.append(text)


def config_of(settings, *extra, method="lora"):
    return configure(settings, {"trainable": {"r": 4, "lora_dropout": 0.1}} if method == "lora" else {}, *extra,
                     method=method)  # fmt: skip


def finished(folder: Path) -> dict[str, bytes]:
    last = checkpoint.listed(folder / "checkpoints")[-1]
    return {p.name: p.read_bytes() for p in sorted(last.iterdir())}


def stop_at(config, step: int, heard: Console = QUIET) -> None:
    """What a kill leaves behind, in one process: the loop is left after `step`."""
    for taken in steps(config, heard):
        if taken.step == step:
            break


# ---------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"report_to": ["wandbb"]}, "monitor.report_to"),
        ({"report_to": "wandb"}, "valid list"),
        ({"report_to": ["mlflow", "mlflow"]}, "name each tracker once"),
        ({"tensorboard": True}, "did you mean 'monitor.report_to'"),
        ({"histogram_every": 0}, "monitor.histogram_every=0"),
        ({"histogram_every": 2}, "nowhere to go"),
        ({"profile_steps": [3]}, "monitor.profile_steps"),
        ({"profile_steps": [3, 3]}, "1 <= start < stop"),
        ({"profile_steps": [0, 2]}, "1 <= start < stop"),
        ({"on_nonfinite": "ignore"}, "'stop' or 'skip'"),
        ({"max_skips": 0}, "monitor.max_skips=0"),
        ({"run_name": ""}, "monitor.run_name=''"),
        ({"project": ""}, "monitor.project=''"),
        ({"alarms": {"spike": -1}}, "monitor.alarms.spike"),
        ({"alarms": {"window": 5}}, "monitor.alarms.window=5"),
        ({"alarms": {"stuck": 1}}, "monitor.alarms.stuck=1"),
        ({"alarms": {"vanishing": 1.0}}, "monitor.alarms.vanishing"),
        ({"alarms": {"exploding": 1.0}}, "monitor.alarms.exploding"),
        ({"alarms": {"slowdown": 0.0}}, "monitor.alarms.slowdown"),
        ({"alarms": {"spikes": 3}}, "did you mean 'spike'"),
    ],
)
def test_bad_settings_are_refused(settings, given, told):
    with pytest.raises(ConfigError) as caught:
        configure(settings, {"monitor": given})
    assert told in str(caught.value)


def test_settings_are_in_the_resolved_config(settings, tmp_path):
    given = {"report_to": [], "project": "p", "run_name": "n", "profile_steps": [2, 3], "on_nonfinite": "skip",
             "max_skips": 3, "alarms": {"window": 30, "spike": None}}  # fmt: skip
    folder = train(config_of(settings, {"monitor": given, "max_steps": 3}), QUIET).folder
    read = configure(folder / "config.yaml").monitor
    assert read.model_dump(exclude={"alarms"}).items() >= {k: v for k, v in given.items() if k != "alarms"}.items()
    assert (read.alarms.window, read.alarms.spike) == (30, None)


@pytest.mark.parametrize("name", trackers.PACKAGES)
def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(settings, monkeypatch, name):
    real = trackers.importlib.util.find_spec
    package = trackers.PACKAGES[name][0]
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda n: None if n == package else real(n))
    config = configure(settings, {"monitor": {"report_to": [name]}, "model": str(Path(settings["model"]))})
    monkeypatch.setattr(sys.modules["luthier.train"], "tokenizer_and_renderer", None)  # would be the next thing
    with pytest.raises(ConfigError, match=f"pip install {trackers.PACKAGES[name][1]}"):
        Trainer(config, QUIET)


def test_a_folder_with_a_package_s_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(trackers.PACKAGES, "wandb", ("no_such_tracker", "wandb"))
    with pytest.raises(ConfigError, match="pip install wandb"):
        trackers.check(["wandb"])


# ---------------------------------------------------------------------------- trackers, read back


def read_tensorboard(folder: Path) -> dict:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0})
    found.Reload()
    scalars = [(tag, e.step, e.value) for tag in found.Tags()["scalars"] for e in found.Scalars(tag)]
    hist = {(tag, e.step): e.histogram_value for tag in found.Tags()["histograms"] for e in found.Histograms(tag)}
    texts = {e.step: e.tensor_proto.string_val[0].decode() for e in found.Tensors("answers/text_summary")}
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    table = HParamsPluginData.FromString(content).session_start_info.hparams
    settings = {k: v.string_value or v.number_value or v.bool_value for k, v in table.items()}
    return {
        "scalars": scalars, "samples": texts, "settings": settings,
        "counts": {key: [int(c) for c in h.bucket] for key, h in hist.items()},
    }  # fmt: skip


def read_wandb(folder: Path) -> dict:
    """The offline files are LevelDB logs of protobuf records: blocks of 32 KiB, each record with a 7-byte header."""
    from wandb.proto.wandb_internal_pb2 import Record

    scalars, counts, samples, settings, ids = [], {}, {}, {}, set()
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        data, position, parts = path.read_bytes(), 7, b""
        while position + 7 <= len(data):
            left = 32768 - position % 32768
            if left < 7:
                position += left
                continue
            _, length, kind = struct.unpack("<IHB", data[position : position + 7])
            if kind == 0:
                break
            parts += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind not in (1, 4):  # whole, or the last part
                continue
            record, parts = Record.FromString(parts), b""
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                given = record.run.config.update
                settings |= {u.key or ".".join(u.nested_key): json.loads(u.value_json) for u in given}
            if record.WhichOneof("record_type") == "history":
                items: dict = {}
                for item in record.history.item:
                    *outer, last = item.nested_key or [item.key]
                    place = items
                    for key in outer:
                        place = place.setdefault(key, {})
                    place[last] = json.loads(item.value_json)
                step = items.pop("_step")
                for key, value in items.items():
                    if isinstance(value, float | int) and not key.startswith("_"):
                        scalars.append((key, step, value))
                    elif isinstance(value, dict) and value["_type"] == "histogram":
                        counts[key, step] = value["values"]
                    elif isinstance(value, dict):
                        samples[step] = (path.parent / "files" / value["path"]).read_text()
    assert len(ids) == 1
    return {"scalars": scalars, "samples": samples, "settings": settings, "counts": counts}


def read_mlflow(folder: Path) -> dict:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("shelf")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("third", "FINISHED")
    scalars = [(k, m.step, m.value) for k in run.data.metrics for m in client.get_metric_history(run.info.run_id, k)]
    kept = Path(run.info.artifact_uri.removeprefix("file://"))
    samples = {int(p.stem[5:]): p.read_text() for p in (kept / "answers").iterdir()}
    counts = {
        (key, int(p.stem[5:])): value["counts"]
        for p in (kept / "histograms").iterdir()
        for key, value in json.loads(p.read_text()).items()
    }
    return {"scalars": scalars, "samples": samples, "settings": run.data.params, "counts": counts}


def read_trackio(folder: Path) -> dict:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    name = json.loads((folder / "trackers.json").read_text())["trackio"]
    (run,) = [r for r in trackio.Api().runs("shelf") if r.name == name]
    scalars, counts, samples = [], {}, {}
    for log in SQLiteStorage.get_logs("shelf", run.name):
        for key, value in log.items():
            if isinstance(value, dict) and "bins" in value:
                counts[key, log["step"]] = value["values"]
            elif isinstance(value, dict):
                samples[log["step"]] = json.dumps(value)
            elif isinstance(value, float | int) and key != "step":
                scalars.append((key, log["step"], value))
    return {"scalars": scalars, "samples": samples, "settings": run.config, "counts": counts}


READERS = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}
TRACKED = """
import json, os, sys, torch
torch.set_num_threads(1)
from luthier import configure, steps, train
from luthier.monitor import Console
config, last = configure(json.loads(sys.argv[1])), int(sys.argv[2])
for step in steps(config, Console(quiet=True)):
    if step.step == last:
        os.kill(os.getpid(), 9)
"""


@pytest.fixture(scope="module")
def tracked(tiny_model, tmp_path_factory):
    """A run told to all trackers that are here: killed after step 3, left after step 7, finished.

    Both starts after the first make a step again that was told before, 3 and 7.
    """
    names = [name for name in trackers.PACKAGES if not trackers.missing([name])]
    folder = tmp_path_factory.mktemp("tracked")
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")  # read when trackio is imported
    config = configure({
        "model": str(tiny_model), "output_dir": str(folder / "run"), "max_steps": 8, "checkpoint": {"every": 2},
        "data": {"train": str(write_rows(folder / "rows.jsonl")), "validation": 6, "max_length": 64},
        "batch": {"examples": 4, "micro_tokens": 64}, "optim": {"learning_rate": 1e-2},
        "trainable": {"r": 4}, "evaluation": {"every": 4, "generate": 3, "generate_every": True, "max_new_tokens": 6},
        "monitor": {"report_to": names, "project": "shelf", "run_name": "third", "histogram_every": 7},
    })  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-c", TRACKED, json.dumps(config.model_dump(mode="json")), "3"], capture_output=True, text=True
    )
    assert process.returncode == -9, process.stderr
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for step in (2, 6):
            assert checkpoint.step_of(checkpoint.listed(folder / "run" / "checkpoints")[-1]) == step
            stop_at(config, 7) if step == 2 else train(config, QUIET)
    assert said.getvalue() + process.stdout == "", "the standard output belongs to the command"
    return config, folder / "run"


@pytest.mark.parametrize("name", READERS)
def test_a_tracker_has_every_figure_once_after_a_kill_and_a_resume(tracked, name):
    """What was told of a step that is made again is not told twice. A SIGKILL costs what waited in a thread's queue."""
    if problem := trackers.missing([name]):
        pytest.skip(problem[0])
    _, folder = tracked
    found = READERS[name](folder)
    history = records(folder / "metrics.jsonl")
    wanted = {
        (f"{r['kind']}/{key}", r["step"]): float(value)
        for r in history for key, value in r.items()
        if isinstance(value, float | int) and key != "step"
    }  # fmt: skip
    told = [(key, step, value) for key, step, value in found["scalars"] if not key.startswith("final/")]
    assert len({(key, step) for key, step, _ in told}) == len(told)
    exact = {(key, step): value for key, step, value in told}
    clocks = ("seconds", "seconds_left", "tokens_per_second", "memory_gb")  # of the process that was killed
    queued = 3 if name in ("wandb", "trackio") else -1
    assert {step for _, step in set(wanted) - set(exact)} <= set(range(queued + 1))
    assert set(exact) <= set(wanted)
    for place, value in exact.items():
        if place[0].split("/")[1] not in clocks:
            assert value == pytest.approx(wanted[place], rel=1e-6), place
    assert {4, 8} <= set(found["samples"]) <= {0, 4, 8}
    assert queued > 0 or 0 in found["samples"]
    for step, text in found["samples"].items():
        for line in (folder / "answers" / f"step-{step:08}.jsonl").read_text().splitlines():
            assert json.loads(line)["reference"] in text
    assert {key.split("/")[0] for key, _ in found["counts"]} == {"weights", "gradients"}
    assert len(found["counts"]) == 2 * 2 * 7 * 2  # of A and B, 7 products in 2 layers
    assert {step for _, step in found["counts"]} == {7}
    assert {sum(counts) for counts in found["counts"].values()} == {4 * 16, 4 * 32, 4 * 48}
    assert str(found["settings"]["optim.learning_rate"]) == "0.01"
    assert found["settings"]["method"] == "lora"
    if name != "wandb":  # its summary is made of the history when it is uploaded
        final = {key: value for key, _, value in found["scalars"] if key.startswith("final/")}
        report = json.loads((folder / "report.json").read_text())
        assert final["final/held_out_loss.tuned"] == pytest.approx(report["held_out_loss"]["tuned"], rel=1e-6)


def test_trackers_write_to_this_machine_only(tracked):
    """WandB's run is an offline one, MLflow's lies in the run's folder; nothing that was written is a pickle."""
    _, folder = tracked
    ids = json.loads((folder / "trackers.json").read_text())
    assert set(ids) == {name for name in trackers.PACKAGES if not trackers.missing([name])}
    if "wandb" in ids:
        kept = [p.name for p in (folder / "wandb").glob("*run-*")]
        assert kept
        assert all(n.startswith("offline-run-") and n.endswith(ids["wandb"]) for n in kept if n != "latest-run")
    assert not [p for p in folder.rglob("*") if p.suffix in (".pkl", ".pickle", ".pt", ".bin")]


class Broken(trackers.importlib.import_module("luthier.monitor.tensorboard").TensorBoard):
    def scalars(self, step, values):
        if step >= 3:
            raise OSError("no space left")


def test_a_tracker_that_fails_is_named_once_and_stops_nothing(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["luthier.monitor.tensorboard"], "TRACKER", Broken)
    heard = Heard()
    train(config_of(settings, {"monitor": {"report_to": ["tensorboard"]}}), heard)
    assert [text for text in heard.warnings if "tensorboard" in text] == [
        "tensorboard failed and is told no more (OSError: no space left); metrics.jsonl goes on"
    ]
    history = records(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in history if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_trackers_change_no_byte_of_a_run(settings, tmp_path):
    train(config_of(settings), QUIET)
    told = {"monitor": {"report_to": ["tensorboard"], "histogram_every": 1}, "output_dir": str(tmp_path / "told")}
    train(config_of(settings, told), QUIET)
    assert finished(tmp_path / "run") == finished(tmp_path / "told")


def test_histograms_are_numpy_s():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    found = histograms.histogram(values, torch.tensor(2.0))
    counts, edges = np.histogram(values.numpy() * 2, bins=64)
    assert sum(found.counts) == 5000
    assert np.abs(np.array(found.counts) - counts).sum() <= 4  # a value on an edge, to rounding
    np.testing.assert_allclose(found.edges, edges, atol=1e-5)
    assert found.total == pytest.approx(float(values.double().sum() * 2), abs=1e-3)
    assert found.squares == pytest.approx(float((values.double() * 2).square().sum()), rel=1e-6)
    assert sum(histograms.histogram(torch.zeros(7)).counts) == 7


def test_the_console_shows_what_a_step_is_about():
    record = {"step": 3, "loss": 1.5, "learning_rate": 1e-3, "grad_norm": 7.25, "tokens_per_second": 1234.5,
              "memory_gb": 1.5, "clipped": True, "skipped_steps": 2}  # fmt: skip
    assert console.line(record) == "loss 1.5000  lr 1.00e-03  grad 7.250 clipped  tok/s 1,234  GB 1.50  skipped 2"
    assert "clipped" not in console.line(record | {"clipped": False})


# ---------------------------------------------------------------------------- profiles


def test_a_profile_of_chosen_steps_changes_no_byte(settings, tmp_path):
    train(config_of(settings), QUIET)
    profiled = config_of(settings, {"monitor": {"profile_steps": [2, 4]}, "output_dir": str(tmp_path / "profiled")})
    train(profiled, QUIET)
    assert finished(tmp_path / "run") == finished(tmp_path / "profiled")
    (made,) = (tmp_path / "profiled" / "profile").iterdir()
    assert made.name == "step-00000002"
    names = [e.get("name") for e in json.loads((made / "trace.json").read_text())["traceEvents"]]
    per_step = names.count("aten::_fused_adamw_")
    assert per_step == 2  # two steps with one group of weights that decay the same
    text = (made / "summary.txt").read_text()
    assert "aten::mm" in text or "aten::addmm" in text
    assert {p.suffix for p in made.iterdir()} == {".json", ".txt"}


def test_a_resumed_run_profiles_the_rest_and_a_stopped_one_writes_what_it_saw(settings, tmp_path):
    config = config_of(settings, {"monitor": {"profile_steps": [2, 6]}, "checkpoint": {"every": 2}})
    stop_at(config, 3)
    train(config, QUIET)
    assert sorted(p.name for p in (tmp_path / "run" / "profile").iterdir()) == ["step-00000002", "step-00000003"]
    with pytest.raises(ConfigError, match="begins after the last of 6 steps"):
        Trainer(config_of(settings, {"monitor": {"profile_steps": [7, 8]}, "output_dir": str(tmp_path / "x")}), QUIET)


# ---------------------------------------------------------------------------- alarms


def test_a_spike_is_ten_robust_deviations():
    """Before: 10 times 2.0 and 10 times 2.2: the median is 2.1, the MAD 0.1, its sigma 0.14826, the limit 3.5826."""
    before = [2.0, 2.2] * 10
    assert alarms.spike([*before, 3.58], 10) is None
    assert "loss 3.6, 10 deviations above the median 2.1" in alarms.spike([*before, 3.6], 10)
    assert alarms.spike([*before[1:], 99.0], 10) is None  # too short a history
    assert alarms.spike([], 10) is None


def test_the_rows_of_a_loss_near_zero_are_no_spikes():
    """Spread counts at least 0.05 nats: 0.3 above a floor of 0.001 is a hard row, 0.6 above it is not."""
    assert alarms.spike([0.001] * 30 + [0.3], 10) is None
    assert alarms.spike([0.001] * 30 + [0.6], 10)


def test_a_dead_loss_is_the_same_number():
    assert "0.6931 for 5 steps" in alarms.dead([3.0] + [0.6931] * 5, 5)
    assert "has been 0 for 5 steps" in alarms.dead([0.0] * 5, 5)
    assert alarms.dead([0.6931] * 4, 5) is None
    assert alarms.dead([0.6931, 0.6931, 0.6931, 0.6931, 0.6930], 5) is None
    assert alarms.dead([1.0, 1.0, 1.0, 1.0, 1.0 + 1e-7], 5)  # one unit of float32's last place


def test_an_idle_learning_rate():
    assert alarms.idle([1e-3, 0.0, 0.0, 0.0], 3)
    assert alarms.idle([0.0, 0.0], 3) is None
    assert alarms.idle([0.0, 1e-9, 0.0], 3) is None


def test_a_vanishing_gradient():
    """20 norms of 2: a thousandth is 0.002, and it takes five steps below it."""
    assert alarms.vanishing([2.0] * 20 + [0.0019] * 5, 1e-3)
    assert alarms.vanishing([2.0] * 20 + [0.0019] * 4 + [0.002], 1e-3) is None
    assert alarms.vanishing([2.0] * 19 + [0.0019] * 5, 1e-3) is None  # too short a history
    assert "gradient is 0" in alarms.vanishing([0.0] * 5, 1e-3)


def test_an_exploding_gradient():
    """Median 1, largest 40: the limits are 100 and 120."""
    before = [1.0] * 20 + [40.0]
    assert alarms.exploding([*before, 121.0], 100)
    assert alarms.exploding([*before, 119.0], 100) is None
    assert alarms.exploding([1.0] * 20 + [99.0], 100) is None
    assert alarms.exploding([1.0] * 20 + [101.0], 100)


def test_a_slow_machine():
    """A quarter of 1,000 tokens a second, for ten steps that took ten seconds."""
    assert alarms.slow([1000.0] * 20 + [249.0] * 10, [1.0] * 30, 0.25)
    assert alarms.slow([1000.0] * 20 + [249.0] * 9 + [251.0], [1.0] * 30, 0.25) is None
    assert alarms.slow([1000.0] * 20 + [249.0] * 10, [0.9] * 30, 0.25) is None


def seen(watch: Watch, losses, start: int = 1) -> list[tuple[str, int]]:
    values = {"grad_norm": 1.0, "learning_rate": 1e-3, "speed": 10.0, "seconds": 0.1}
    return [(a.name, a.step) for i, loss in enumerate(losses, start) for a in watch.look(i, values | {"loss": loss})]


def test_an_episode_is_said_once_and_over_after_ten_steps():
    calm = [2.0, 2.2] * 15
    watch = Watch(Alarms())
    assert seen(watch, [*calm, 9.0, 9.0, *calm[:9], 9.0, *calm[:10], 9.0]) == [("loss_spike", 31), ("loss_spike", 53)]
    assert seen(Watch(Alarms(spike=None)), [*calm, 9.0]) == []
    assert seen(Watch(Alarms(stuck=4)), [1.0] * 30) == [("dead_loss", 4)]
    assert seen(Watch(Alarms(stuck=None)), [1.0] * 30) == []


def test_a_watch_goes_on_where_its_checkpoint_was():
    curve = [2.0, 2.2] * 15 + [9.0, 9.0] + [2.1, 2.0] * 4 + [9.0] + [2.0, 2.1] * 6 + [9.0]
    whole = seen(Watch(Alarms()), curve)
    assert len(whole) == 2
    for cut in range(len(curve)):
        first, second = Watch(Alarms()), Watch(Alarms())
        before = seen(first, curve[:cut])
        second.restore({}, json.loads(json.dumps(first.numbers())))
        assert before + seen(second, curve[cut:], cut + 1) == whole, cut


def test_ordinary_curves_raise_no_alarm():
    """A loss that falls from 4 to 0.05 with the noise of small batches, and now and then a hard row."""
    rng = np.random.default_rng(0)
    watch, found = Watch(Alarms()), []
    for i in range(2000):
        middle = 0.05 + 4 * math.exp(-i / 200)
        loss = middle * float(rng.lognormal(0, 0.3))
        norm = 0.5 * middle * float(rng.lognormal(0, 0.8))
        speed = 1000 * float(rng.lognormal(0, 0.2))
        found += watch.look(i, {"loss": loss, "grad_norm": norm, "learning_rate": 1e-3, "speed": speed, "seconds": 2.0})
    assert found == []


def test_alarms_are_said_recorded_reported_and_resumed(settings, tmp_path):
    """With a rate of next to nothing, the same rows each step and no dropout, the loss stands still."""
    still = {"optim": {"learning_rate": 1e-30}, "batch": {"examples": 26}, "monitor": {"alarms": {"stuck": 4}},
             "checkpoint": {"every": 1}, "epochs": 99, "max_steps": 8}  # fmt: skip
    heard = Heard()
    report = train(configure(settings, still), heard).report
    assert [(a["alarm"], a["step"]) for a in report["alarms"]] == [("dead_loss", 4)]
    assert [text for text in heard.warnings if "for 4 steps, exactly" in text] == heard.warnings
    (record,) = [r for r in records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "alarm"]
    assert (record["step"], record["alarm"]) == (4, "dead_loss")
    for last in (3, 6):
        again = configure(settings, still, {"output_dir": str(tmp_path / f"cut{last}")})
        stop_at(again, last)
        assert train(again, QUIET).report["alarms"] == report["alarms"]
        assert finished(tmp_path / "run") == finished(tmp_path / f"cut{last}")


# ---------------------------------------------------------------------------- numbers that are not finite


class Net(nn.Module):
    """Two layers with a function between them that a test chooses."""

    def __init__(self, between):
        super().__init__()
        self.first, self.block = nn.Linear(2, 2, bias=False), nn.ModuleDict({"last": nn.Linear(2, 1, bias=False)})
        self.between = between
        for p in self.parameters():
            nn.init.ones_(p)

    def forward(self, x):
        return self.block["last"](self.between(self.first(x)))


class Layer(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.net = Net(between)

    def forward(self, x):
        return self.net(x).sum()


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


def named(model, x):
    return nonfinite.first_module(model, nn.Identity(), [lambda: model(x)])


def test_the_first_module_is_named_forward():
    model = Layer(torch.relu)
    with torch.no_grad():
        model.net.first.weight.fill_(3e38)
    assert named(model, torch.ones(1, 2)) == ("net.first", "output of its forward")  # 6e38 is inf in float32
    model = Layer(lambda x: x / 0)
    assert named(model, torch.ones(1, 2))[0] == "net"
    assert "taken by net.block.last" in named(model, torch.ones(1, 2))[1]
    assert named(Layer(torch.relu), torch.ones(1, 2)) == (None, "")


def test_the_first_module_is_named_backward():
    """The derivative of a square root at 0 is infinite: the forward is finite, the gradient is not."""
    model = Layer(Root())
    assert named(model, torch.zeros(1, 2)) == ("net.between", "gradient of its input, made in its backward")
    model = Layer(torch.sqrt)
    assert named(model, torch.zeros(1, 2)) == ("net.first", "gradient of its output, made after it")


def test_a_loss_that_is_not_finite_by_itself_is_the_objective_s():
    model = Layer(torch.relu)
    found = nonfinite.first_module(model, nn.Identity(), [lambda: model(torch.ones(1, 2)).log().log() * math.nan])
    assert found == ("Identity, on the output layer", "loss")


BAD = "Z"  # a letter whose embedding is not a number


@pytest.fixture
def poisoned(settings, tmp_path):
    """A model that knows no Z, and rows of which the 11th has one: its step, and no other, is not finite."""
    model, tokenizer = make_model(), make_tokenizer()
    (token,) = tokenizer.encode(BAD, add_special_tokens=False)
    assert token not in {(i * 7919 + 11) % 320 for i in range(12)} | {5, 6, 7, 8}  # what `Network` tries itself on
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = math.nan
    model.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")
    rows = [*ROWS[:10], {"prompt": f"one {BAD}", "completion": "7 eno"}, *ROWS[11:24]]
    write_rows(tmp_path / "rows.jsonl", rows)
    held_out = write_rows(tmp_path / "held_out.jsonl", ROWS[26:])
    other = {"data": {"validation": str(held_out), "seed": 1}, "checkpoint": {"every": 1, "keep": 9},
             "model": str(tmp_path / "poisoned")}  # fmt: skip
    return configure(settings, other).model_dump(mode="json")


def step_of_the_bad_row(config) -> int:
    trainer = Trainer(config_of(config, {"output_dir": config["output_dir"] + "-plan"}), QUIET)
    (at,) = [i for i, rows in enumerate(trainer.steps, 1) if any(10 in row for row in rows)]
    assert 2 <= at <= 5, "a step in the middle"
    return at


def weights_after(folder: Path, step: int, group: str) -> dict:
    return load_file(folder / "checkpoints" / f"step-{step:08}" / f"{group}.safetensors")


def test_a_step_that_is_not_finite_is_not_applied_and_its_module_is_named(poisoned, tmp_path):
    at = step_of_the_bad_row(poisoned)
    trainer = Trainer(config_of(poisoned), QUIET)
    with pytest.raises(NonFiniteError) as caught:
        trainer.run()
    text = str(caught.value)
    assert f"step {at}: loss nan, gradient norm nan; first in model.embed_tokens (output of its forward)" in text
    assert "the weights were not finite before this step: model.embed_tokens.weight" in text
    assert "(rows " in text
    assert "on_nonfinite=skip" in text
    assert f"step-{at - 1:08}" in text
    kept = tmp_path / "run" / "nonfinite" / f"step-{at:08}-rank0.json"
    found = json.loads(kept.read_text())
    assert found["module"] == "model.embed_tokens"
    assert found["weights"] == ["model.embed_tokens.weight"]
    assert len(found["gradients"]) > 5
    assert 10 in [json.loads(line)["row"] for line in kept.with_suffix(".jsonl").read_text().splitlines()]
    for name, weight in weights_after(tmp_path / "run", at - 1, "weights").items():
        assert torch.equal(trainer.parameters[name], weight), name  # as before it, bit for bit
    for name, moment in weights_after(tmp_path / "run", at - 1, "optimizer").items():
        assert torch.equal(trainer.optimizer.tensors()[name], moment), name


def test_a_skipped_step_leaves_everything_and_is_resumed(poisoned, tmp_path):
    at = step_of_the_bad_row(poisoned)
    skip = {"monitor": {"on_nonfinite": "skip", "report_to": ["tensorboard"]}}
    heard = Heard()
    report = train(config_of(poisoned, skip), heard).report
    assert report["skipped_steps"] == [at]
    assert report["held_out_loss"]["tuned"] < report["held_out_loss"]["base"]
    (warned,) = [text for text in heard.warnings if "skipped" in text]
    assert "first in model.embed_tokens" in warned
    folder = tmp_path / "run"
    for group in ("weights", "optimizer"):
        before, after = (weights_after(folder, step, group) for step in (at - 1, at))
        assert all(torch.equal(before[name], after[name]) for name in before), group
        assert any(not torch.equal(after[n], t) for n, t in weights_after(folder, at + 1, group).items())
    state = checkpoint.read_state(folder / "checkpoints" / f"step-{at:08}")
    assert set(state["parts"]["optimizer"]["counts"].values()) == {at - 1}
    assert state["parts"]["nonfinite"] == {"total": 1, "in_a_row": 1}
    history = records(folder / "metrics.jsonl")
    (record,) = [r for r in history if r["kind"] == "nonfinite"]
    assert (record["step"], record["loss"], record["skipped_steps"]) == (at, "nan", 1)
    assert "model.embed_tokens" in record["origin"]
    assert [r["step"] for r in history if r["kind"] == "train"] == [s for s in range(1, 7) if s != at]
    json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)
    for last in (at - 1, at, at + 1):
        parted = config_of(poisoned, skip, {"output_dir": str(tmp_path / f"parted{last}")})
        stop_at(parted, last)
        torch.manual_seed(99)
        train(parted, QUIET)
        assert finished(folder) == finished(tmp_path / f"parted{last}")


def test_random_numbers_go_on_as_if_nothing_had_been_looked_for(poisoned, tmp_path, monkeypatch):
    """Making a step again draws dropout once more; the run must not notice."""
    skip = {"monitor": {"on_nonfinite": "skip"}}
    train(config_of(poisoned, skip), QUIET)
    monkeypatch.setattr(nonfinite, "first_module", lambda *rest: (None, ""))
    train(config_of(poisoned, skip, {"output_dir": str(tmp_path / "unseen")}), QUIET)
    assert finished(tmp_path / "run") == finished(tmp_path / "unseen")


def test_a_step_made_again_drops_what_it_dropped():
    cpu = torch.device("cpu")
    states = nonfinite.generators(cpu)
    first, second = torch.rand(3), torch.rand(3)
    nonfinite.restore_generators(states, cpu)
    torch.rand(3)
    with nonfinite.drawn_again(states, cpu):
        assert torch.equal(torch.rand(3), first)
        np.random.rand()
    assert torch.equal(torch.rand(3), second)


def test_too_many_skips_in_a_row_end_the_run(settings, tmp_path):
    config = config_of(settings, {"monitor": {"on_nonfinite": "skip", "max_skips": 2}})
    trainer = Trainer(config, QUIET)
    loop = trainer.loop()
    assert not next(loop).skipped
    with torch.no_grad():
        trainer.made.network.model.model.norm.weight.fill_(math.nan)
    assert [next(loop).skipped, next(loop).skipped] == [True, True]
    with pytest.raises(NonFiniteError, match="3 steps in a row: more than"):
        next(loop)


def test_a_stopped_run_goes_on_with_skip(poisoned, tmp_path):
    """The settings of `monitor` may change under a checkpoint: that is the way on after a stop."""
    with pytest.raises(NonFiniteError):
        train(config_of(poisoned), QUIET)
    train(config_of(poisoned, {"monitor": {"on_nonfinite": "skip"}}), QUIET)
    straight = config_of(poisoned, {"monitor": {"on_nonfinite": "skip"}, "output_dir": str(tmp_path / "straight")})
    train(straight, QUIET)
    assert finished(tmp_path / "run") == finished(tmp_path / "straight")


def test_all_ranks_skip_alike_and_the_one_that_has_it_names_the_module(poisoned, tmp_path):
    extra = {"trainable": {"lora_dropout": 0.0}, "monitor": {"on_nonfinite": "skip"}, "batch": {"examples": 4}}
    one = config_of(poisoned, extra)
    report = train(one, QUIET).report
    both = config_of(poisoned, extra, {"output_dir": str(tmp_path / "two")}).model_dump(mode="json")
    processes = started(TRAIN.replace("quiet=True", ""), both, stderr=subprocess.PIPE, text=True)
    errors = [p.communicate(timeout=300)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors
    at = report["skipped_steps"][0]
    found = [json.loads((tmp_path / "two" / "nonfinite" / f"step-{at:08}-rank{r}.json").read_text()) for r in range(2)]
    has_it = [f["module"] for f in found].index("model.embed_tokens")
    assert found[1 - has_it]["module"] is None
    assert f"rank {has_it}: first in model.embed_tokens" in errors[0].replace("\n", " ")  # one speaks for all
    assert "first in" not in errors[1]
    assert json.loads((tmp_path / "two" / "report.json").read_text())["skipped_steps"] == [at]
    last = (checkpoint.listed(tmp_path / name / "checkpoints")[-1] for name in ("run", "two"))
    one, two = (load_file(folder / "weights.safetensors") for folder in last)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def test_the_check_costs_one_wait_for_the_device_a_step(settings, monkeypatch):
    """Reading a number of the device is waiting for it: once a step, before the update."""
    waits = []
    for name in ("item", "tolist"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, real=real: (waits.append(t), real(t))[1])
    trainer = Trainer(config_of(settings), QUIET)
    loop = trainer.loop()
    next(loop)
    waits.clear()
    trainer._take()
    assert [len(t) for t in waits if t.is_floating_point()] == [3]  # loss, norm, tokens; lengths are on the host
