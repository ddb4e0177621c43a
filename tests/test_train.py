"""Whole runs: kill and resume byte for byte, damage, alarms, exports that others load, generation."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, save_model, write_rows
from safetensors.torch import load_file

from luthier import checkpoint, configure, open_run, steps, surgery, train
from luthier.cli import main
from luthier.errors import CheckpointError, ConfigError, DataError, ExportError, Interrupted, NonFiniteError
from luthier.export import compare, plain
from luthier.monitor import Console, records
from luthier.train import Trainer

QUIET = Console(quiet=True)
METHODS = {
    "lora": {"trainable": {"r": 4, "lora_dropout": 0.1}},
    "full": {},
    "partial": {"trainable": {"last_layers": 1}},
    "qlora": {"trainable": {"r": 4}},
}


def config_of(settings, method="lora", **extra):
    return configure(settings, METHODS[method], extra, method=method)


def finished(folder: Path) -> dict[str, bytes]:
    """The bytes of the last checkpoint, all of it."""
    last = checkpoint.listed(folder / "checkpoints")[-1]
    return {p.name: p.read_bytes() for p in sorted(last.iterdir())}


def in_two_parts(config, after: int, rewards=None) -> None:
    """A run that is stopped after so many steps and goes on as in a new process, which has other random states."""
    for step in steps(config, QUIET, rewards):
        if step.step >= after:
            break
    torch.manual_seed(99)
    np.random.seed(99)
    train(config, QUIET, rewards=rewards)


def forking(work: Callable[[], object], env: dict[str, str] | None = None) -> int:
    """The id of a process that does this work; a fork, which need not import everything again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking, from Python 3.12 on
        child = os.fork()
    if child == 0:
        try:
            os.environ |= env or {}
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return child


def killed(work) -> None:
    """A process that does this work and is killed in it by SIGKILL."""
    _, status = os.waitpid(forking(work), 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_and_reports(settings, method):
    config = config_of(settings, method, max_steps=30, evaluation={"generate": 6, "max_new_tokens": 12, "every": 10})
    result = train(config, QUIET)
    report = result.report
    assert report["held_out_loss"]["tuned"] < report["held_out_loss"]["base"] - 0.2
    assert report["answers"]["tuned"]["rows"] == 6
    history = records(result.folder / "metrics.jsonl")
    assert [r["step"] for r in history if r["kind"] == "train"] == list(range(1, 31))
    assert [r["step"] for r in history if r["kind"] == "evaluation"] == [0, 10, 20, 30]
    losses = [r["loss"] for r in history if r["kind"] == "evaluation"]
    assert losses[-1] < losses[0]
    assert configure(result.folder / "config.yaml") == config
    assert open_run(result.folder).report == report


@pytest.mark.parametrize("method", ["lora", "full"])
def test_stopped_and_resumed_ends_with_the_same_bytes(settings, method, tmp_path):
    whole = config_of(settings, method, checkpoint={"every": 2})
    train(whole, QUIET)
    parted = config_of(settings, method, checkpoint={"every": 2}, output_dir=str(tmp_path / "parted"))
    in_two_parts(parted, 3)  # after the checkpoint of step 2
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")


RUN = """
import sys, json, torch
from luthier import configure, train
torch.set_num_threads(1)
train(configure(json.loads(sys.argv[1]), method=sys.argv[2]))
"""


def start(config, method):
    values = json.dumps(config.model_dump(mode="json"))
    return subprocess.Popen([sys.executable, "-c", RUN, values, method], stderr=subprocess.PIPE)


class Forked:
    """The same in a fork, with what is used here of a process; what it says is on the standard error of the tests."""

    def __init__(self, config):
        self.pid, self.code = forking(lambda: train(configure(config.model_dump(mode="json")), QUIET)), None

    def poll(self, flags=os.WNOHANG):
        if self.code is None:
            pid, status = os.waitpid(self.pid, flags)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self):
        return self.poll(0)

    def send_signal(self, number):
        os.kill(self.pid, number)


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_killed_at_random_moments_ends_with_the_same_bytes(settings, method, tmp_path):
    extra = {"checkpoint": {"every": 1}, "max_steps": 60}
    train(config_of(settings, method, **extra), QUIET)
    config = config_of(settings, method, **extra, output_dir=str(tmp_path / "killed"))
    folder = tmp_path / "killed" / "checkpoints"
    rng = random.Random(method)
    kills, reached = 0, 0

    def started(config, method):
        return start(config, method) if method == "lora" else Forked(config)

    for wanted in (rng.randint(2, 12), rng.randint(20, 30), rng.randint(35, 45)):
        process = started(config, method)
        while process.poll() is None:
            found = checkpoint.listed(folder)
            if found and checkpoint.step_of(found[-1]) >= wanted:
                time.sleep(rng.random() * 0.02)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
        if method == "lora":
            process.stderr.close()
        newest, _ = checkpoint.newest(folder)
        assert checkpoint.step_of(newest) >= max(wanted, reached)
        reached = checkpoint.step_of(newest)
    assert kills >= 2
    process = started(config, method)
    if method == "lora":
        error = process.stderr.read().decode()
        process.stderr.close()
        assert "resumed from" in error
    assert process.wait() == 0
    assert finished(tmp_path / "run") == finished(tmp_path / "killed")
    one, other = (records(tmp_path / name / "metrics.jsonl") for name in ("run", "killed"))
    assert [(r["kind"], r["step"], r["loss"]) for r in one] == [(r["kind"], r["step"], r["loss"]) for r in other]


def test_sigterm_saves_and_says_so(settings, tmp_path):
    config = config_of(settings, max_steps=5000)
    process = start(config, "lora")
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(records(tmp_path / "run" / "metrics.jsonl")) < 4:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 1  # the uncaught exception of a script; the command line returns 143
    assert "saved" in error
    newest, refused = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert not refused


@pytest.mark.parametrize("at", [0, 2, 6])
def test_a_signal_ends_an_evaluation_which_is_made_again(settings, tmp_path, monkeypatch, at):
    extra = {"evaluation": {"every": 2, "generate": 2, "max_new_tokens": 4}}
    train(config_of(settings, **extra), QUIET)
    config = config_of(settings, **extra, output_dir=str(tmp_path / "stopped"))
    evaluation = sys.modules["luthier.evaluate"]
    measured = evaluation.held_out

    def signalled(made, *rest):
        if trainer.step == at:
            torch.rand(3)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        return measured(made, *rest)

    monkeypatch.setattr(evaluation, "held_out", signalled)
    trainer = Trainer(config, QUIET)
    with pytest.raises(Interrupted, match=f"after step {at} of 6"):
        trainer.run()
    monkeypatch.setattr(evaluation, "held_out", measured)
    train(config, QUIET)
    assert finished(tmp_path / "run") == finished(tmp_path / "stopped")
    one, other = (records(tmp_path / name / "metrics.jsonl") for name in ("run", "stopped"))
    assert [(r["kind"], r["step"], r["loss"]) for r in one] == [(r["kind"], r["step"], r["loss"]) for r in other]


def test_interrupted_has_its_exit_code(settings):
    trainer = Trainer(config_of(settings), QUIET)
    trainer.signals.caught = int(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        trainer.run()
    assert caught.value.exit_code == 143


@pytest.mark.parametrize("harm", ["torn", "changed", "missing", "manifest"])
def test_a_damaged_checkpoint_is_never_chosen(settings, harm, tmp_path):
    config = config_of(settings, checkpoint={"every": 2, "keep": 5, "best": False})
    for step in steps(config, QUIET):
        if step.step == 5:
            break
    folder = tmp_path / "run" / "checkpoints"
    last = checkpoint.listed(folder)[-1]
    weights = last / "weights.safetensors"
    if harm == "torn":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif harm == "changed":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif harm == "missing":
        weights.unlink()
    else:
        (last / "manifest.json").unlink()
    newest, refused = checkpoint.newest(folder)
    assert checkpoint.step_of(newest) == 2
    assert len(refused) == 1
    assert str(last) in refused[0]
    assert Trainer(config, QUIET).step == 2


def test_checkpoints_kept_are_the_newest_and_the_best(settings, tmp_path):
    config = config_of(settings, max_steps=8, checkpoint={"every": 1, "keep": 2}, evaluation={"every": 1})
    train(config, QUIET)
    left = [checkpoint.step_of(p) for p in checkpoint.listed(tmp_path / "run" / "checkpoints")]
    best = checkpoint.read_state(tmp_path / "run" / "checkpoints" / f"step-{left[-1]:08}")["best"]
    assert set(left) == {7, 8, best["step"]}
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_no_pickle_anywhere(settings, tmp_path):
    train(config_of(settings), QUIET)
    kinds = {p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".yaml"}


def test_tensorboard_reads_what_is_in_the_metrics_file(settings, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of(settings, monitor={"report_to": ["tensorboard"]}, checkpoint={"every": 2})
    for step in steps(config, QUIET):
        if step.step == 5:
            break
    train(config, QUIET)  # resumed after step 4
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    train_records = [r for r in records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    for key in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
        scalars = {e.step: e.value for e in found.Scalars(f"train/{key}")}
        assert scalars == pytest.approx({r["step"]: r[key] for r in train_records}, rel=1e-6), key


def test_a_folder_holds_one_run(settings):
    train(config_of(settings), QUIET)
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        Trainer(config_of(settings, seed=5), QUIET)


def test_changed_data_is_noticed(settings, rows_file):
    for step in steps(config_of(settings, checkpoint={"every": 1}), QUIET):
        if step.step == 2:
            break
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    write_rows(rows_file, [*rows[:-1], {"prompt": "new", "completion": "row"}])
    with pytest.raises(CheckpointError, match="rows that"):
        Trainer(config_of(settings, checkpoint={"every": 1}), QUIET)


def test_a_finished_run_says_so(settings, tmp_path):
    first = train(config_of(settings), QUIET)
    before = (tmp_path / "run" / "report.json").stat().st_mtime_ns
    assert train(config_of(settings), QUIET).report == first.report
    assert (tmp_path / "run" / "report.json").stat().st_mtime_ns == before


def test_a_non_finite_gradient_stops_the_run_and_keeps_the_batch(settings, tmp_path):
    trainer = Trainer(config_of(settings, checkpoint={"every": 1}), QUIET)
    loop = trainer.loop()
    next(loop)
    next(loop)
    with torch.no_grad():
        next(iter(trainer.parameters.values())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="step 3: loss nan") as caught:
        list(loop)
    assert "step-00000002" in str(caught.value) or "step-00000001" in str(caught.value)
    kept = list((tmp_path / "run" / "nonfinite").glob("*.jsonl"))
    assert len(kept) == 1
    assert json.loads(kept[0].read_text().splitlines()[0])["tokens"]


def test_bad_rows_stop_before_the_model_is_loaded_or_are_skipped_and_listed(settings, rows_file, tmp_path):
    with open(rows_file, "a") as file:
        file.write(json.dumps({"prompt": "x", "completion": ""}) + "\n")
    with pytest.raises(DataError, match="empty_answer: 1 rows"):
        train(config_of(settings), QUIET)
    config = config_of(settings)
    config = configure(config.model_dump(), {"data": {"on_bad_row": "skip"}})
    train(config, QUIET)
    assert [json.loads(x)["kind"] for x in (tmp_path / "run" / "skipped_rows.jsonl").read_text().splitlines()] == [
        "empty_answer"
    ]


def test_rows_and_micro_batches_do_not_change_the_weights(settings, tmp_path):
    """Accumulation, packing on and off, and recomputed activations end at the same weights, to rounding."""
    weights = []
    for i, extra in enumerate([
        {"batch": {"examples": 8, "micro_tokens": 512}},
        {"batch": {"examples": 8, "micro_tokens": 64}},
        {"batch": {"examples": 8, "micro_tokens": 128, "packing": False}},
        {"batch": {"examples": 8, "micro_tokens": 128}, "parallel": {"activation_checkpointing": 1}},
    ]):  # fmt: skip
        trainer = Trainer(configure(settings, extra, {"output_dir": str(tmp_path / f"r{i}")}, method="full"), QUIET)
        assert trainer.made.network.packed == (i != 2)
        trainer.run()
        weights.append({n: p.detach().clone() for n, p in trainer.parameters.items()})
    for other in weights[1:]:
        for name, p in weights[0].items():
            torch.testing.assert_close(other[name], p, rtol=1e-3, atol=2e-3, msg=name)


# ---------------------------------------------------------------------------- exports


def plain_logprobs(model, documents):
    out = []
    with torch.no_grad():
        for d in documents:
            tokens = torch.tensor([d])
            out.append(model(input_ids=tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0])
    return torch.cat(out)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_adapter_and_merged_exports_load_with_peft_and_transformers(settings, family, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = save_model(tmp_path / "base", family)
    folder = train(configure(settings, {"model": str(model)}, METHODS["lora"]), QUIET).folder
    documents = json.loads((folder / "probe.json").read_text())
    answers = []
    for kind in ("adapter", "merged"):
        done = open_run(folder).export(tmp_path / kind, kind)
        assert done["largest_difference"] < 1e-4 < done["difference_to_base"]
        if kind == "adapter":
            loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / kind)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        answers.append(plain_logprobs(loaded.eval(), documents))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert tokenizer.chat_template
        assert "held-out loss" in (tmp_path / kind / "README.md").read_text()
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-3, atol=1e-4)
    with pytest.raises(ExportError, match="use as=merged"):
        open_run(folder).export(tmp_path / "full", "full")
    with pytest.raises(ExportError, match="exists"):
        open_run(folder).export(tmp_path / "merged", "merged")


def test_an_adapted_head_that_was_tied_is_untied_when_merged(settings, tmp_path):
    from conftest import _llama
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    _llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    make_tokenizer().save_pretrained(tmp_path / "tied")
    config = configure(
        settings, {"model": str(tmp_path / "tied"), "trainable": {"target_modules": ["lm_head"]}}, method="lora"
    )
    folder = train(config, QUIET).folder
    done = open_run(folder).export(tmp_path / "out", "merged")
    assert done["largest_difference"] < 1e-4 < done["difference_to_base"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_an_adapter_that_loads_and_does_nothing_is_no_export(settings, tmp_path, monkeypatch):
    """Whatever the tolerance of the precision: as far away as the base is not what was trained."""
    folder = train(config_of(settings, optim={"learning_rate": 1e-4}), QUIET).folder

    def idle(made, out, base):
        found = [adapter for _, adapter in surgery.adapters(made.network.model)]
        trained = [adapter.lora_B.data for adapter in found]
        for adapter in found:
            adapter.lora_B.data = torch.zeros_like(adapter.lora_B)
        plain._write_adapter(made, out, base)
        for adapter, data in zip(found, trained):
            adapter.lora_B.data = data

    monkeypatch.setitem(plain.WRITERS, "adapter", idle)
    monkeypatch.setitem(compare.TOLERANCE, torch.float32, compare.TOLERANCE[torch.bfloat16])
    with pytest.raises(ExportError, match="answers differently"):
        open_run(folder).export(tmp_path / "out", "adapter")


def test_a_full_export_is_the_trained_model(settings, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = train(config_of(settings, "full"), QUIET).folder
    done = open_run(folder).export(tmp_path / "out", "full")
    assert done["largest_difference"] < 1e-4
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    saved = load_file(checkpoint.listed(folder / "checkpoints")[-1] / "weights.safetensors")
    for name, p in loaded.named_parameters():
        if name in saved:
            assert torch.equal(p, saved[name]), name
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 258]


def test_an_export_that_answers_differently_fails_and_leaves_nothing(settings, tmp_path, monkeypatch):
    folder = train(config_of(settings), QUIET).folder

    def wrong(made, out, base):
        plain.write_model(made, out, make_model("llama").state_dict())

    monkeypatch.setitem(plain.WRITERS, "merged", wrong)
    with pytest.raises(ExportError, match="answers differently"):
        open_run(folder).export(tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


# ---------------------------------------------------------------------------- the command line


def test_command_line_from_training_to_export(settings, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings | {"evaluation": {"generate": 2, "max_new_tokens": 8}}))
    run = str(tmp_path / "run")
    assert main(["train", str(path), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6
    assert main(["evaluate", run, "--json", "--quiet"]) == 0
    assert set(json.loads(capsys.readouterr().out)["held_out_loss"]) == {"base", "tuned"}
    assert main(["generate", run, "one 1", "ab 2", "--max-new-tokens", "5", "--json", "--quiet"]) == 0
    assert [a["prompt"] for a in json.loads(capsys.readouterr().out)] == ["one 1", "ab 2"]
    assert main(["export", run, str(tmp_path / "out"), "--as", "merged"]) == 0
    assert "differ by at most" in capsys.readouterr().out
    assert main(["data", "inspect", settings["data"]["train"], "--model", settings["model"], "--row", "3"]) == 0
    shown = capsys.readouterr().out
    assert "⟦0 ba<|im_end|>⟧" in shown
    assert "packing efficiency" in shown


def test_a_run_resumes_from_the_command_line(settings, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings))
    assert main(["train", str(path), "--quiet"]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    os.remove(tmp_path / "run" / "report.json")
    assert main(["train", str(path), "--quiet"]) == 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_drifts_in_sixteen_bits_is_compared_in_thirty_two(settings, tmp_path, monkeypatch, method):
    folder = train(config_of(settings, method, precision={"dtype": "bfloat16"}), QUIET).folder
    monkeypatch.setitem(compare.TOLERANCE, torch.bfloat16, (0.0, 0.0))
    kind = "adapter" if method == "lora" else "full"
    found = open_run(folder).export(tmp_path / "out", kind)
    assert found["tolerance"] == compare.TOLERANCE[torch.float32][0]
    assert found["largest_difference"] < 1e-3
