"""Merging: arithmetic by hand and beside PEFT, models and LoRAs of one base, measured on the tasks of runs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import make_model, make_tokenizer, write_rows
from safetensors.torch import load_file

from luthier import configure, train
from luthier.cli import main
from luthier.compress.merge import arithmetic, ways
from luthier.compress.merge.adapters import nearest
from luthier.compress.merge.settings import Merging
from luthier.monitor import Console

QUIET = Console(quiet=True)
A, B = torch.tensor([3.0, -1.0, 0.5, 2.0]), torch.tensor([-1.0, -2.0, 4.0, 1.0])
WEIGHTS = ["base_layer", "weight"]


def cli(*words, expect: int = 0, capsys) -> dict:
    code = main([*map(str, words), "--json", "--quiet"])
    said = json.loads(capsys.readouterr().out)
    assert code == expect, said
    return said


def by(way: str, **more) -> Merging:
    return Merging(by=way, **more)


# ---------------------------------------------------------------------------- arithmetic


def test_ties_by_hand():
    assert arithmetic.trimmed(A, 0.5).tolist() == [3, 0, 0, 2]
    assert arithmetic.trimmed(B, 0.5).tolist() == [0, -2, 4, 0]
    assert arithmetic.ties([A, B], [1, 1], 0.5).tolist() == [3, -2, 4, 2]
    # Signs of the sums are +, -, +, +: the mean over those that agree.
    assert arithmetic.ties([A, B], [1, 1], 1).tolist() == [3, -1.5, 2.25, 1.5]
    assert arithmetic.ties([A, B], [2, 1], 1).tolist() == [6, -2, 2.5, 2.5]


def test_slerp_by_hand():
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    half = math.sqrt(0.5)
    assert arithmetic.slerp(x, y, 0.5).tolist()[0] == pytest.approx([half, half])
    assert arithmetic.slerp(x, y, 1 / 3).tolist()[0] == pytest.approx([math.cos(math.pi / 6), math.sin(math.pi / 6)])
    assert torch.allclose(arithmetic.slerp(A, B, 0.0), A)
    assert torch.allclose(arithmetic.slerp(A, B, 1.0), B)
    assert torch.allclose(arithmetic.slerp(A, 3 * A, 0.5), 2 * A)  # of one direction: a line


def test_dare_by_hand_and_in_the_mean():
    draw = torch.Generator().manual_seed(5)
    kept = torch.bernoulli(torch.full((4,), 0.5), generator=torch.Generator().manual_seed(5))
    assert 0 < kept.sum() < 4
    assert torch.equal(arithmetic.dropped(A, 0.5, draw), A * kept * 2)
    many = torch.stack([arithmetic.dropped(A, 0.25, draw) for _ in range(4000)])
    assert torch.allclose(many.mean(0), A, atol=0.25)
    assert set(many[:, 0].tolist()) == {0.0, 12.0}


@pytest.mark.parametrize("density", [0.3, 0.7])
def test_all_are_those_of_peft(density):
    from peft.utils import merge_utils as peft

    torch.manual_seed(0)
    changes, weights = [torch.randn(12, 9) for _ in range(3)], [0.5, 1.0, 0.8]
    given = torch.tensor(weights)
    assert torch.allclose(arithmetic.linear(changes, weights), peft.task_arithmetic(changes, given), atol=1e-6)
    assert torch.allclose(arithmetic.ties(changes, weights, density), peft.ties(changes, given, density), atol=1e-6)
    for ours, theirs in ((arithmetic.dare, peft.dare_linear), (arithmetic.dare_ties, peft.dare_ties)):
        torch.manual_seed(11)
        wanted = theirs(changes, given, density)
        assert torch.allclose(ours(changes, weights, density, torch.Generator().manual_seed(11)), wanted, atol=1e-6)


def test_what_is_dropped_follows_from_seed_and_name():
    one = ways.changed(by("dare", seed=1), "a", [A, B])
    assert torch.equal(one, ways.changed(by("dare", seed=1), "a", [A, B]))
    long = [torch.randn(100), torch.randn(100)]
    assert not torch.equal(ways.changed(by("dare"), "a", long), ways.changed(by("dare"), "b", long))
    assert not torch.equal(ways.changed(by("dare"), "a", long), ways.changed(by("dare", seed=1), "a", long))


def test_the_nearest_of_a_rank_by_hand():
    change = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    a, b, share = nearest(change, 1)
    assert torch.allclose(b @ a, torch.tensor([[0.0, 0.0], [0.0, 4.0]]), atol=1e-6)
    assert share == pytest.approx(16 / 25)
    a, b, share = nearest(change, 3)
    assert torch.allclose(b @ a, change, atol=1e-6)
    assert (len(a), share) == (3, pytest.approx(1))


# ---------------------------------------------------------------------------- whole models


@pytest.fixture
def models(tmp_path):
    """A base and two models that began with it."""
    folders = [tmp_path / name for name in ("base", "one", "two")]
    for i, folder in enumerate(folders):
        model = make_model("llama", tie_word_embeddings=True)
        torch.manual_seed(i)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.01 * bool(i))
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return folders


@pytest.mark.parametrize("way", ["linear", "slerp", "ties", "dare", "dare_ties"])
def test_models_are_merged_tensor_by_tensor(way, models, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    base, one, two = models
    weights = ["--weights", "0.3", "0.7"]
    more = ["--base", base] if way not in ("linear", "slerp") else []
    done = cli("merge", one, two, tmp_path / "out", "--by", way, *more, *weights, capsys=capsys)
    assert done["largest_difference"] < 1e-4
    start, a, b, out = (load_file(f / "model.safetensors") for f in (base, one, two, tmp_path / "out"))
    assert out.keys() == a.keys()
    for name in a:
        if way == "linear":
            wanted = 0.3 * a[name] + 0.7 * b[name]
        elif way == "slerp":
            wanted = arithmetic.slerp(a[name], b[name], 0.7)
        else:
            wanted = start[name] + ways.changed(
                by(way, weights=[0.3, 0.7]), name, [a[name] - start[name], b[name] - start[name]]
            )
        assert torch.allclose(out[name], wanted, atol=1e-6), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_is_no_model_of_one_base(models, tmp_path, capsys):
    _, one, two = models
    out = tmp_path / "out"
    said = cli("merge", one, two, out, "--by", "ties", expect=2, capsys=capsys)
    assert "--base: required with --by ties" in said["problems"][0]
    model = make_model("llama", tie_word_embeddings=True)
    torch.manual_seed(99)
    for p in model.parameters():
        p.data = torch.randn_like(p)
    model.save_pretrained(tmp_path / "stranger")
    make_tokenizer().save_pretrained(tmp_path / "stranger")
    said = cli("merge", one, tmp_path / "stranger", out, "--by", "linear", expect=4, capsys=capsys)
    assert "were not trained from one start" in said["problems"][0]
    make_model("qwen3").save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    said = cli("merge", one, tmp_path / "other", out, "--by", "linear", expect=4, capsys=capsys)
    assert "are of different shapes" in said["problems"][0]
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--by", "slerp", "--weights", "1"], "--weights: 1 numbers for 2 sources"),
        (["--by", "slerp", "--weights", "-1", "1"], "--weights: of slerp"),
        (["--by", "linear", "--density", "0.5"], "--density: of --by ties, dare, dare_ties"),
        (["--by", "ties", "--seed", "1"], "--seed: of --by dare"),
        (["--by", "ties", "--density", "1.5"], "--density"),
        (["--by", "linear", "--dtype", "int8"], "--dtype=int8"),
        (["--by", "dare", "--rank", "3", "--base", "x"], "--rank: of adapters"),
    ],
)
def test_settings_that_are_refused(words, told, models, tmp_path, capsys):
    said = cli("merge", *models[1:], tmp_path / "out", *words, expect=2, capsys=capsys)
    assert any(told in problem for problem in said["problems"]), said
    assert not (tmp_path / "out").exists()


def test_numbers_of_sources(models, tmp_path, capsys):
    base, one, two = models
    said = cli("merge", one, tmp_path / "out", "--by", "linear", expect=2, capsys=capsys)
    assert "two sources or more" in said["problems"][0]
    said = cli("merge", base, one, two, tmp_path / "out", "--by", "slerp", expect=2, capsys=capsys)
    assert "goes between two sources" in said["problems"][0]
    said = cli("merge", one, one, tmp_path / "out", "--by", "linear", expect=2, capsys=capsys)
    assert "given twice" in said["problems"][0]


# ---------------------------------------------------------------------------- runs and adapters


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """Two LoRAs of one base that learnt different answers to the same prompts."""
    found, folder = [], tmp_path_factory.mktemp("runs")
    for name, answer in (("up", str.upper), ("twice", lambda text: text + text)):
        words = [f"{w} {n}" for n in range(6) for w in ("one", "three", "seven", "ab")]
        rows = write_rows(folder / f"{name}.jsonl", [{"prompt": w, "completion": answer(w)} for w in words])
        values = {
            "model": str(tiny_model), "data": {"train": str(rows), "validation": 4, "max_length": 64},
            "batch": {"examples": 4, "micro_tokens": 64}, "monitor": {"report_to": []}, "max_steps": 8,
            "optim": {"learning_rate": 1e-2}, "output_dir": str(folder / name),
            "trainable": {"kind": "lora", "r": 4, "lora_alpha": 8}, "evaluation": {"generate": 2, "max_new_tokens": 4},
        }  # fmt: skip
        found.append(train(configure(values, method="lora"), QUIET).folder)
    return found


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """Their adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    for run in runs:
        assert main(["export", str(run), str(folder / run.name), "--as", "adapter", "--quiet"]) == 0
    return [folder / run.name for run in runs]


def test_adapters_of_runs_are_merged_and_measured_on_both_tasks(runs, tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    done = cli("merge", *runs, out, "--by", "linear", capsys=capsys)
    assert (done["kind"], done["r"], done["kept"]) == ("adapter", 8, 1.0)
    assert done["largest_difference"] < 1e-3
    assert list(done["tasks"]) == [str(run) for run in runs]
    for run in runs:
        report = json.loads((run / "report.json").read_text())["figures"]
        figure = done["tasks"][str(run)]["perplexity"]
        assert figure["base"] == pytest.approx(report["perplexity"]["tuned"], rel=1e-3)
        assert figure["base"] < figure["tuned"] < report["perplexity"]["base"]  # half of each change
        assert "exact_match" in done["tasks"][str(run)]
    said = cli("merge", *runs, tmp_path / "bad", "--by", "linear", "--bound", "0.0001", expect=7, capsys=capsys)
    assert "perplexity rose from" in said["problems"][0]
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("way", "theirs", "more"),
    [
        ("linear", "cat", {}), ("ties", "ties_svd", {"density": 0.4}),
        ("dare", "dare_linear_svd", {"density": 0.999999}), ("dare_ties", "dare_ties_svd", {"density": 0.999999}),
    ],
)  # fmt: skip
def test_merged_adapters_are_those_of_peft(way, theirs, more, exported, tiny_model, tmp_path, capsys):
    """`add_weighted_adapter` on the changes of the weights, of full rank. What DARE drops is compared above."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folders = exported
    words = ["--weights", "0.6", "0.9"]
    words += ["--density", str(more["density"]), "--rank", "64"] if more else []
    done = cli("merge", *folders, tmp_path / "out", "--by", way, *words, capsys=capsys)
    assert done["kept"] == pytest.approx(1)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folders[0], adapter_name="a")
    model.load_adapter(folders[1], "b")
    svd = {"svd_rank": 64, "svd_full_matrices": False} if theirs.endswith("svd") else {}
    model.add_weighted_adapter(["a", "b"], [0.6, 0.9], "both", combination_type=theirs, **svd, **more)
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "out")
    compared, others = 0, dict(model.named_modules())
    for name, own in ours.named_modules():
        if hasattr(own, "get_delta_weight"):
            other = others[name]
            assert torch.allclose(own.get_delta_weight("default"), other.get_delta_weight("both"), atol=2e-5), name
            compared += 1
    assert compared == 14


def test_slerp_of_adapters_is_that_of_their_changes(exported, tmp_path, capsys):
    from luthier.trainable import adapter_files, joined

    folders = exported
    cli("merge", *folders, tmp_path / "out", "--by", "slerp", "--weights", "1", "3", capsys=capsys)
    read = [adapter_files.read(folder) for folder in (*folders, tmp_path / "out")]
    tensors = [load_file(one.tensors) for one in read]
    for layer in joined.checked(read[:2]):
        a, b, both = (joined.change(one, layer, own) for one, own in zip(read, tensors))
        assert torch.allclose(both, arithmetic.slerp(a, b, 0.75), atol=1e-6)


def test_models_of_runs_are_merged_whole(runs, tmp_path, capsys):
    """Task vectors are taken from the runs' own base."""
    done = cli("merge", *runs, tmp_path / "out", "--by", "ties", "--density", "0.5", "--whole", capsys=capsys)
    assert done["kind"] == "model"
    assert len(done["tasks"]) == 2
    assert done["largest_difference"] < 1e-3


def test_adapters_that_do_not_go_together(runs, exported, models, tmp_path, capsys):
    said = cli("merge", runs[0], models[0], tmp_path / "out", "--by", "linear", "--rank", "2", expect=2, capsys=capsys)
    assert any("--rank" in problem for problem in said["problems"])
    said = cli("merge", exported[0], models[0], tmp_path / "out", "--by", "linear", expect=2, capsys=capsys)
    assert "merge the same kind" in said["problems"][0]
    said = cli("merge", exported[0], runs[1], tmp_path / "out", "--by", "ties", "--base", "x", expect=2, capsys=capsys)
    assert "--base: of whole models" in said["problems"][0]
