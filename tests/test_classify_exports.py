"""Exports of runs that classify, as transformers and PEFT load them; the command that labels texts."""

from __future__ import annotations

import io
import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from test_classification import TEXTS, classify, encoder  # noqa: F401
from test_train import QUIET

from luthier import surgery, train
from luthier.assemble import restore
from luthier.cli import main
from luthier.errors import ExportError, ModelError
from luthier.export.readers import transformers_reader
from luthier.train import Trainer

TAGS = [{"tokens": t.split(), "tags": ["B-X" if len(w) > 3 else "O" for w in t.split()]} for t, _ in TEXTS * 4]
PAIRS = [{"text": t, "text_pair": "the film", "label": label} for t, label in TEXTS * 4]


@pytest.fixture
def here(monkeypatch):
    """The check of an export in this process: a new one takes ten seconds to import everything."""

    def run(command, input, **_):
        monkeypatch.setattr("sys.stdin", io.StringIO(input))
        transformers_reader.main()
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr("subprocess.run", run)


def scores(made, ids: list[int], types=None) -> torch.Tensor:
    given = {} if types is None else {"token_type_ids": torch.tensor([types])}
    made.eval()
    with torch.no_grad():
        return made(input_ids=torch.tensor([ids]), **given).logits[0]


def ours(run, ids: list[int], types=None) -> torch.Tensor:
    made, _ = restore(run)
    with made.network.natively() as model:
        return scores(model, ids, types)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "prompt", "prefix", "p_tuning", "bottleneck"])
@pytest.mark.parametrize("rows", [None, TAGS], ids=["texts", "tags"])
def test_an_adapter_has_its_head(classify, tiny_model, family, kind, rows, tmp_path, here):  # noqa: F811
    """PEFT loads it on the base, which has no such head; what PEFT does not know, Luthier's own loader does."""
    virtual = kind in ("prompt", "prefix", "p_tuning")
    if family == "bert" and virtual:
        pytest.skip("refused by name, which has a test of its own")
    model = {} if family == "bert" else {"model": str(tiny_model)}
    config = classify(
        rows, "classify" if rows is None else "classify_tokens", trainable={"kind": kind}, max_steps=3, **model
    )
    result = train(config, QUIET)
    done = result.export(tmp_path / "out")
    assert done["largest_difference"] < 1e-5
    assert done["difference_to_base"] > 1e-3
    values = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert values["task_type"] == ("SEQ_CLS" if rows is None else "TOKEN_CLS")
    if kind == "bottleneck":
        return
    import transformers
    from peft import PeftModel

    auto = getattr(
        transformers, "AutoModelForSequenceClassification" if rows is None else "AutoModelForTokenClassification"
    )
    torch.manual_seed(4)  # its own new head is another
    base = auto.from_pretrained(config.model.name, num_labels=3 if rows is None else 2)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    ids = [2, 5, 6, 9, 3]
    wanted = ours(result.folder, ids) if not virtual else None
    if wanted is not None:
        torch.testing.assert_close(scores(loaded, ids), wanted, rtol=1e-4, atol=1e-5)
    assert values["modules_to_save"] == (
        ["classifier", "pooler"]
        if family == "bert" and rows is None
        else ["classifier"]
        if family == "bert"
        else ["score"]
    )


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p_tuning"])
def test_virtual_tokens_before_an_encoder_are_refused(classify, kind):  # noqa: F811
    trainable = {"kind": kind, "num_virtual_tokens": 4}
    with pytest.raises(ModelError, match="virtual tokens are for decoders"):
        Trainer(classify(trainable=trainable, data={"max_length": 32}), QUIET)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("kind", "out"), [("full", "full"), ("partial", "full"), ("lora", "merged")])
def test_a_whole_model_is_loaded_by_its_class(classify, tiny_model, family, kind, out, tmp_path, here):  # noqa: F811
    from transformers import AutoModelForSequenceClassification

    model = {} if family == "bert" else {"model": str(tiny_model)}
    trainable = {"kind": kind} | ({"last_layers": 1} if kind == "partial" else {})
    pairs = PAIRS if family == "bert" else None
    result = train(classify(pairs, trainable=trainable, max_steps=3, **model), QUIET)
    done = result.export(tmp_path / "out", out)
    assert done["largest_difference"] < 1e-5
    made, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert made.config.id2label == {0: "bad", 1: "good", 2: "long"}
    assert made.config.problem_type == "single_label_classification"
    ids, types = [2, 5, 6, 3, 9, 3], [0, 0, 0, 0, 1, 1] if family == "bert" else None
    torch.testing.assert_close(scores(made, ids, types), ours(result.folder, ids, types), rtol=1e-4, atol=1e-6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_the_pipeline_of_transformers_says_the_same(classify, tmp_path, here):  # noqa: F811
    from transformers import pipeline

    result = train(classify(max_steps=20, optim={"learning_rate": 5e-3}), QUIET)
    result.export(tmp_path / "out", "full")
    pipe = pipeline("text-classification", str(tmp_path / "out"), device="cpu")
    for text, found in zip(("very bad", "the film was good"), result.classifier()("very bad", "the film was good")):
        (told,) = pipe([text])
        assert (told["label"], told["score"]) == (found["label"], pytest.approx(found["probability"], rel=1e-5))


def test_an_export_that_differs_is_refused(classify, tmp_path, here, monkeypatch):  # noqa: F811
    result = train(classify(max_steps=2), QUIET)
    true = transformers_reader.by_transformers
    monkeypatch.setattr(transformers_reader, "by_transformers", lambda model, request: true(model, request) + 0.1)
    with pytest.raises(ExportError, match="scores differ by up to 0"):
        result.export(tmp_path / "out", "full")
    assert not (tmp_path / "out").exists()


def test_an_export_is_checked_in_a_fresh_process(classify, tmp_path, monkeypatch):  # noqa: F811
    """With PEFT, and nothing of this one's state."""
    ran = []
    true = subprocess.run
    monkeypatch.setattr("subprocess.run", lambda *a, **k: ran.append(a) or true(*a, **k))
    result = train(classify(PAIRS, trainable={"kind": "lora"}, max_steps=2), QUIET)
    done = result.export(tmp_path / "out")
    assert len(ran) == 1
    assert done["largest_difference"] < 1e-5
    assert "scores of" in done["compared"]


def test_a_saved_adapter_is_gone_on_with_and_laid_beneath(classify, tiny_model, tmp_path, here):  # noqa: F811
    """The head goes on, too; beneath another adapter, one of a causal language model has none."""
    first = train(classify(trainable={"kind": "lora", "r": 4}, max_steps=3), QUIET)
    first.export(tmp_path / "adapter")
    config = classify(
        trainable={"kind": "lora", "init_from": str(tmp_path / "adapter")}, output_dir=str(tmp_path / "on")
    )
    from luthier.assemble import assemble
    from luthier.resolution import by_rows

    made = assemble(by_rows(config))
    ids = [2, 5, 6, 9, 3]
    with made.network.natively() as model:
        torch.testing.assert_close(scores(model, ids), ours(first.folder, ids))
    from conftest import make_model

    from luthier.errors import AdapterError
    from luthier.trainable import adapter_files, saved

    with pytest.raises(AdapterError, match="task_type='SEQ_CLS'"):
        saved.load(make_model(), adapter_files.read(tmp_path / "adapter"), "other")


def test_loaded_by_the_library_on_a_plain_model(classify, encoder, tmp_path, here):  # noqa: F811
    """Whose own head was drawn otherwise, and does not matter."""
    from transformers import AutoModelForSequenceClassification

    from luthier import adapters

    result = train(classify(trainable={"kind": "lora"}, max_steps=3), QUIET)
    result.export(tmp_path / "adapter")
    torch.manual_seed(8)
    plain = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
    adapters.load(plain, tmp_path / "adapter")
    ids = [2, 5, 6, 9, 3]
    torch.testing.assert_close(scores(plain, ids), ours(result.folder, ids), rtol=1e-5, atol=1e-6)


def test_the_command_labels_texts(classify, tmp_path, capsys, monkeypatch):  # noqa: F811
    result = train(classify(PAIRS, max_steps=90, optim={"learning_rate": 3e-3}), QUIET)
    run = str(result.folder)
    assert main(["generate", run, "very bad\tthe film", "the film was good\tthe film"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["bad", "good"]
    assert main(["generate", run, "very bad\tthe film", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["label"] == "bad"
    assert set(told["probabilities"]) == {"bad", "good", "long"}
    monkeypatch.setattr("sys.stdin", io.StringIO("very bad\tthe film\n\nlonger\tthe film\n"))
    assert main(["generate", run]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["bad", "long"]
    assert main(["generate", run, "x", "--temperature", "1"]) != 0
    assert "are of answers" in capsys.readouterr().err
    assert main(["generate", run, " "]) != 0
    assert "empty" in capsys.readouterr().err


def test_evaluating_a_run_again_gives_its_figures(classify, capsys):  # noqa: F811
    result = train(classify(max_steps=3), QUIET)
    assert main(["evaluate", str(result.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["figures"]
    for key in ("loss", "accuracy", "f1_macro"):
        assert found[key]["tuned"] == pytest.approx(result.report["figures"][key]["tuned"])
        assert found[key]["base"] == pytest.approx(result.report["figures"][key]["base"])


def test_the_confusion_matrix_is_drawn(classify):  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(classify(max_steps=2, monitor={"report_to": ["tensorboard"]}), QUIET)
    found = EventAccumulator(str(result.folder / "tensorboard"), {"images": 0}).Reload()
    images = found.Images("evaluation/confusion")
    assert [image.step for image in images] == [0, 2]
    assert images[0].encoded_image_string.startswith(b"\x89PNG")


def test_a_picture_of_counts():
    from PIL import Image

    from luthier.monitor import picture

    counts = [[90, 10], [0, 7]]
    drawn = picture.confusion(counts)
    again = Image.open(io.BytesIO(picture.png(drawn)))
    assert (again.size, again.mode) == ((drawn.shape[1], drawn.shape[0]), "RGB")
    assert bytes(again.tobytes()) == drawn.tobytes()
    cell = picture.CELL
    corner = lambda i, j: int(drawn[(i + 1) * cell + 3, (j + 1) * cell + 3, 0])  # noqa: E731
    assert corner(1, 1) < corner(0, 0) < corner(0, 1) < corner(1, 0) == 255, "darker by the share of the row"
    large = picture.confusion([[1] * 300] * 300)
    assert max(large.shape) <= picture.LARGEST


@pytest.mark.parametrize("method", ["classify", "classify_tokens"])
def test_explained_beforehand(classify, method):  # noqa: F811
    from luthier.explain import explain

    rows = TAGS if method == "classify_tokens" else None
    config = classify(rows, method)
    for count in (True, False):
        told = explain(config, count)
        assert told.memory.peak > 0
        assert told.memory.gradients > 0
        moving = sum(row.trainable for row in told.moving)
        made, _ = restore(train(classify(rows, method, max_steps=1), QUIET).folder) if count else (None, None)
        if made:
            assert moving == sum(p.numel() for p in made.parameters().values())
    assert surgery.heads(told.made.network.model)
