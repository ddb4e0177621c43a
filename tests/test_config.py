"""Configuration and command line: everything wrong is told at once, with the remedy, at once, and by exit code."""

import json
import subprocess
import sys
import time

import pytest
import yaml

from luthier.cli import main
from luthier.config import Config, configure, schema
from luthier.errors import ConfigError
from luthier.faults import keys
from luthier.methods import METHODS

HERE = {"model": "owner/name", "data": "owner/rows"}


def problems(*sources, method=None):
    with pytest.raises(ConfigError) as caught:
        configure(*sources, method=method)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("trainable.rank=4", "trainable.rank: unknown key; did you mean 'trainable.r'?"),
        ("optim.learning_rat=1", "did you mean 'learning_rate'?"),
        ("lr=1", "lr: unknown key; did you mean 'optim.learning_rate'?"),
        ("batch.exmples=1", "did you mean 'examples'?"),
        ("optm.learning_rate=1", "optm.learning_rate: unknown key; did you mean 'optim.learning_rate'?"),
        ("warmup_ratio=0.1", "did you mean 'schedule.warmup'?"),
        ("schedule.kind=cosin", "did you mean 'cosine'?"),
        ("epochs=1.5", "epochs=1.5: should be a valid integer"),
        ("epochs=two", "epochs='two': should be a valid integer"),
        ("seed=true", "seed=True: should be a valid integer"),
        ("trainable.lora_dropout=1", "less than 1"),
        ("method=lorra", "method: 'lorra' is unknown; did you mean 'lora'?"),
        ("trainable.kind=full", "does not go with method=lora, which is 'lora'; use method=full"),
        ("batch.tokens=100", "no multiple of batch.micro_tokens"),
        ("batch={examples: 4, tokens: 8192}", "give one of the two"),
        ("data.max_length=8192", "batch.micro_tokens=4096 is less than data.max_length=8192"),
        ("evaluation.every=5", "give data.validation"),
        ("data=./nowhere.jsonl", "data.train: './nowhere.jsonl' does not exist"),
        ("model=./nowhere", "model.name: './nowhere' does not exist"),
        ("model.chat_template=nowhere.jinja", "neither `chatml` nor a file"),
    ],
)  # fmt: skip
def test_a_mistake_is_explained(override, told):
    assert told in problems(HERE, override)


def test_all_mistakes_at_once():
    told = problems(HERE, "trainable.rank=4", "epochs=x", "data=./nowhere.jsonl", "batch.tokens=100", "model=./none")
    for part in ("trainable.rank", "epochs", "nowhere.jsonl", "batch.tokens", "./none"):
        assert part in told


def test_partial_with_nothing_to_move():
    assert "nothing would move" in problems(HERE, "trainable.last_layers=0", method="partial")


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    told = problems(HERE, {"model": str(tmp_path)})
    assert "pickle" in told
    assert "save_pretrained" in told


def test_yaml_numbers_and_double_keys(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: a/b\ndata: c/d\noptim:\n  learning_rate: 1e-4\n")
    assert configure(path).optim.learning_rate == 1e-4
    assert configure(path, "optim.learning_rate=3e-5").optim.learning_rate == 3e-5
    path.write_text("epochs: 1\nepochs: 2\n")
    assert "line 2: 'epochs' is given twice" in problems(path)
    path.write_text("a: [1\n")
    assert "not YAML" in problems(path)


@pytest.mark.parametrize("method", METHODS)
def test_the_resolved_configuration_resolves_to_itself(method, tmp_path):
    needed = ["objective.teacher=owner/teacher"] if method == "distill" else []
    config = configure(HERE, "data.validation=0.1", *needed, method=method)
    path = tmp_path / "config.yaml"
    path.write_text(config.dump())
    assert configure(path) == config
    assert config.trainable.kind == METHODS[method].settings["trainable"]["kind"]


def test_a_row_of_the_table_gives_way_to_the_user():
    assert configure(HERE).optim.learning_rate == 2e-4
    assert configure(HERE, "optim.learning_rate=0.5").optim.learning_rate == 0.5


def test_schema_and_keys_cover_every_setting():
    assert schema()["properties"]["optim"]
    assert {"model.name", "trainable.r", "trainable.last_layers", "batch.micro_tokens", "epochs"} <= set(keys())
    assert set(schema()["required"]) == {"model", "data"}
    assert schema()["additionalProperties"] is False
    assert yaml.safe_load(configure(HERE).dump())["method"] in schema()["properties"]["method"]["enum"]


def test_every_setting_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        configure(HERE).seed = 3  # type: ignore[misc]
    assert isinstance(configure(HERE), Config)


# ---------------------------------------------------------------------------- command line


def luthier(*arguments):
    began = time.monotonic()
    ran = subprocess.run([sys.executable, "-m", "luthier", *arguments], capture_output=True, text=True)
    return ran, time.monotonic() - began


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["train", "--help"], 0), (["train", "modle=x"], 2), (["trian"], 2), (["methods"], 0),
     (["generate", "nowhere"], 5), (["export", "nowhere", "out", "--as", "merged"], 5), (["train", "--bogus"], 2),
     (["data", "inspect", "x.jsonl"], 2)],
)  # fmt: skip
def test_help_and_errors_are_quick_and_have_their_codes(arguments, code):
    ran, seconds = luthier(*arguments)
    assert ran.returncode == code, ran.stderr
    assert "Traceback" not in ran.stderr
    assert (ran.stderr.startswith("error: ")) == (code != 0)
    assert seconds < 5  # measured at 0.1 to 0.4 s; this bound only catches a heavy import


def test_errors_as_json(capsys):
    assert main(["train", "modle=x", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == 2
    assert any("did you mean 'model'" in p for p in told["problems"])


def test_methods_as_json(capsys):
    assert main(["methods", "--json"]) == 0
    assert [m["name"] for m in json.loads(capsys.readouterr().out)] == list(METHODS)


def test_show_config_and_schema(capsys):
    assert main(["train", "model=a/b", "data=c/d", "--show-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["name"] == "a/b"
    assert main(["train", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Config"
