"""What runs and plain models are served as: base and tuned, labels, scores, embeddings; vLLM's arguments; the verb."""

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import write_rows
from serving import in_thread, write_adapter
from test_classification import classify, encoder, make_wordpiece, shaken  # noqa: F401
from test_reward_model import PAIRS
from test_train import QUIET

from luthier import configure, train
from luthier.cli import main
from luthier.errors import AdapterError, ConfigError, LuthierError, ModelError
from luthier.serve import vllm
from luthier.serve.served import served
from luthier.serve.settings import Serving

pytest.importorskip("fastapi", reason="no fastapi here (the serve extra has it)")


def ask(url, path, body=None):
    request = urllib.request.Request(url + path, None if body is None else json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return json.load(error) | {"status": error.code}


def said(url, model, text="one 3", **more):
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0} | more
    return ask(url, "/v1/chat/completions", body)["choices"][0]["message"]["content"]


@pytest.fixture
def run(settings, tmp_path):
    def make(method="lora", **extra):
        config = configure(settings, {"max_steps": 3, "optim": {"learning_rate": 5e-2}}, extra, method=method)
        train(config, QUIET)
        return Path(config.output_dir)

    return make


def generated(capsys, source, text="one 3"):
    capsys.readouterr()
    assert main(["generate", str(source), text, "--max-new-tokens", "12", "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)[0]["answer"]


@pytest.mark.filterwarnings("ignore")
def test_a_run_of_an_adapter_has_its_base_beside_it(run, capsys, tiny_model):
    folder = run(trainable={"kind": "lora", "r": 4})
    with in_thread(folder) as (url, _):
        models = ask(url, "/v1/models")["data"]
        assert [(m["id"], m["base"]) for m in models] == [("run", "run-base"), ("run-base", None)]
        tuned, base = said(url, "run").strip(), said(url, "run-base").strip()
    assert tuned == generated(capsys, folder)
    assert tuned != base
    with in_thread(tiny_model) as (url, _):
        assert said(url, tiny_model.name).strip() == base


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_moved_its_weights_is_compared_with_its_base_when_asked(run, capsys, tiny_model):
    folder = run("full")
    with in_thread(folder, base=True, name="mine") as (url, server):
        assert [m["base"] for m in ask(url, "/v1/models")["data"]] == ["mine-base", None]
        tuned, base = said(url, "mine").strip(), said(url, "mine-base").strip()
        assert len(server.served.engines) == 2
    assert tuned == generated(capsys, folder)
    assert tuned != base
    with in_thread(tiny_model) as (url, _):
        assert said(url, tiny_model.name).strip() == base
    with in_thread(folder) as (url, _):
        assert [m["id"] for m in ask(url, "/v1/models")["data"]] == ["run"]


@pytest.mark.filterwarnings("ignore")
def test_a_classifier_labels_and_embeds(classify):  # noqa: F811
    from luthier.assemble import restore
    from luthier.classify import Classifier

    config = classify(max_steps=3)
    result = train(config, QUIET)
    texts = ["the film was good", "bad film"]
    made, _ = restore(Path(result.folder) if hasattr(result, "folder") else Path(config.output_dir))
    expected = Classifier(made.network, made.renderer)(*texts)
    with in_thread(Path(config.output_dir), name="labels") as (url, _):
        assert ask(url, "/v1/models")["data"][0]["does"] == ["classify", "embeddings"]
        got = ask(url, "/v1/classify", {"model": "labels", "input": texts})["data"]
        assert [one["label"] for one in got] == [one["label"] for one in expected]
        for one, theirs in zip(got, expected):
            assert one["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)
        one = ask(url, "/v1/classify", {"model": "labels", "input": texts[0]})["data"]
        assert one[0]["label"] == got[0]["label"]
        assert ask(url, "/v1/embeddings", {"model": "labels", "input": texts})["data"][1]["index"] == 1
        told = ask(url, "/v1/score", {"model": "labels", "input": ["a\tb"]})
        assert (told["status"], told["error"]["param"]) == (400, "model")
        asked = {"model": "labels", "messages": [{"role": "user", "content": "x"}]}
        assert ask(url, "/v1/chat/completions", asked)["status"] == 400


@pytest.mark.filterwarnings("ignore")
def test_a_reward_model_scores(settings, tmp_path):
    from luthier.assemble import restore
    from luthier.rating import Rater

    path = write_rows(tmp_path / "pairs.jsonl", PAIRS)
    data = settings["data"] | {"train": str(path)}
    config = configure(settings | {"data": data, "batch": {"examples": 4, "micro_tokens": 256}},
                       {"max_steps": 2}, method="reward")  # fmt: skip
    train(config, QUIET)
    made, _ = restore(Path(config.output_dir))
    rater = Rater(made.network, made.renderer, config.data.columns)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}]
    expected = rater("hi\tgood", "hi\tno", turns)
    with in_thread(Path(config.output_dir), name="judge") as (url, _):
        got = ask(url, "/v1/score", {"model": "judge", "input": ["hi\tgood", "hi\tno", turns]})["data"]
        assert [one["score"] for one in got] == pytest.approx([one["score"] for one in expected], abs=1e-5)
        told = ask(url, "/v1/score", {"model": "judge", "input": ["no answer"]})
        assert (told["status"], "no answer to score" in told["error"]["message"]) == (400, True)


@pytest.mark.parametrize("pooling", [None, "last", "first"])
def test_an_encoder_embeds_as_transformers_does(tmp_path, pooling):
    from transformers import BertConfig, BertModel

    tokenizer = make_wordpiece()
    model = shaken(BertModel(BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32,
    ))).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    texts = ["the film was good", "bad", "ann and bob went to rome"]
    with in_thread(tmp_path / "bert", pooling=pooling) as (url, _):
        got = ask(url, "/v1/embeddings", {"model": "bert", "input": texts})
        long = ask(url, "/v1/embeddings", {"model": "bert", "input": "film " * 40})
        assert (long["status"], "limit is 32" in long["error"]["message"]) == (400, True)
    assert got["usage"]["prompt_tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    for text, found in zip(texts, got["data"]):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = {None: states.mean(0), "last": states[-1], "first": states[0]}[pooling]
        assert found["embedding"] == pytest.approx(torch.nn.functional.normalize(expected, dim=-1).tolist(), abs=1e-5)


# ---------------------------------------------------------------------------- what cannot be served


def test_what_cannot_be_served_is_told(tmp_path, tiny_model, monkeypatch):
    adapter = write_adapter(tmp_path / "adapter", tiny_model)
    with pytest.raises(ConfigError, match="already"):
        served(str(tiny_model), Serving(adapters={tiny_model.name: str(adapter)}))
    with pytest.raises(ConfigError, match="no run"):
        served(str(tiny_model), Serving(base=True))
    with pytest.raises(AdapterError):
        served(str(tiny_model), Serving(adapters={"a": str(tmp_path / "gone")}))
    other = write_adapter(tmp_path / "other", tiny_model)
    (other / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(LuthierError):
        served(str(tiny_model), Serving(adapters={"a": str(other)}))
    with pytest.raises(LuthierError):
        served(str(tmp_path / "nowhere"), Serving())
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"architectures": ["BertForSequenceClassification"]}))
    monkeypatch.setattr("luthier.serve.served.opened.problem", lambda name: None)
    with pytest.raises(ModelError, match="serve the run"):
        served(str(tmp_path / "bert"), Serving())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "0.0.0.0"], "a key is required"),
        (["--port", "99999"], "--port"),
        (["--slots", "0"], "--slots"),
        (["--timeout", "0"], "--timeout"),
        (["--rate", "nan"], "--rate"),
        (["--adapter", "x"], "NAME=FOLDER"),
        (["--adapter", "x=a", "--adapter", "x=b"], "each name once"),
        (["--pooling", "max"], "--pooling"),
        (["--api-key-file", "/nowhere"], "--api-key-file"),
        (["--max-body", "1"], "--max-body"),
        (["--drain", "-1"], "--drain"),
    ],
)
def test_the_verb_refuses_wrong_settings(arguments, told, tiny_model, capsys, monkeypatch):
    monkeypatch.delenv("LUTHIER_API_KEY", raising=False)
    assert main(["serve", str(tiny_model), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_the_verb_refuses_what_is_not_there(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "gone")]) == 4
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("method: nothing\n")
    assert main(["serve", str(tmp_path / "run")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_told(settings, capsys):
    config = configure(settings, {"max_steps": 2})
    train(config, QUIET)
    import shutil

    shutil.rmtree(Path(config.output_dir) / "checkpoints")
    assert main(["serve", config.output_dir, "--port", "0", "--quiet"]) == 5
    assert "checkpoint" in capsys.readouterr().err


# ---------------------------------------------------------------------------- vLLM


def test_arguments_for_vllm(tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    adapter = write_adapter(tmp_path / "adapter", base, rank=12)
    key = "a-key-of-sufficient-length"
    named = {"tuned": str(adapter)}
    settings = Serving(host="0.0.0.0", port=9000, keys=(key,), adapters=named, max_length=2048, slots=64)
    given, environment = vllm.arguments(str(base), settings)
    assert given == [
        "serve", str(base), "--host", "0.0.0.0", "--port", "9000", "--served-model-name", "base",
        "--max-model-len", "2048",
        "--max-num-seqs", "64", "--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"tuned={adapter}",
    ]  # fmt: skip
    assert environment == {"VLLM_API_KEY": key}
    assert key not in " ".join(given)
    told = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(told | {"use_dora": True}))
    for source, wrong, match in (
        (base, {"adapters": {"tuned": str(adapter)}}, "plain LoRA"),
        (base, {"adapters": {"x": str(base)}}, "no adapter_config"),
        (base, {"rate": 3.0}, "--rate"), (base, {"base": True}, "--base"), (base, {"pooling": "mean"}, "--pooling"),
        (base, {"keys": (key, key + "2")}, "one key"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            vllm.arguments(str(source), Serving(**wrong))


def test_a_run_is_not_handed_to_vllm(run):
    with pytest.raises(ConfigError, match="luthier export"):
        vllm.arguments(str(run()), Serving())


def test_the_process_becomes_vllm(tmp_path, tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(vllm.shutil, "which", lambda name: None)
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(vllm.sys, "executable", str(tmp_path / "python"))
    assert main(["serve", str(tiny_model), "--engine", "vllm"]) == 1
    assert "not installed" in capsys.readouterr().err
    (tmp_path / "vllm").write_text("")
    became = []
    monkeypatch.setattr("luthier.cli.serve.os.execvpe", lambda *given: became.append(given))
    main(["serve", str(tiny_model), "--engine", "vllm", "--name", "n"])
    program, arguments, environment = became[0]
    assert (program, arguments[1:3]) == (str(tmp_path / "vllm"), ["serve", str(tiny_model)])
    assert "--served-model-name" in arguments
    assert "PATH" in environment


