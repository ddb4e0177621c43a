"""luthier generate --batch: a file of rows answered in order, as one by one, and after a kill from where it stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_model

from luthier import cli
from luthier.errors import ConfigError
from luthier.generate import Chat
from luthier.opened import opened
from luthier.serve import batch

ROWS = [{"prompt": f"say {n} {'x' * (n % 5)}", "id": f"r{n}"} for n in range(11)]


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def made(model):
    return opened(str(model))


def test_answers_are_those_of_generate_in_order(model, made, tmp_path, capsys):
    rows = [*ROWS, {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}]}]
    file, out = write(tmp_path / "in.jsonl", rows), tmp_path / "sub" / "out.jsonl"
    line = ["generate", str(model), "--batch", str(file), "--out", str(out), "--max-new-tokens", "9", "--slots", "3"]
    assert cli.main([*line, "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == 12
    assert told["errors"] == 0
    assert told["answer_tokens"] == 12 * 9
    assert told["out"] == str(out)
    found = read(out)
    assert [row["row"] for row in found] == list(range(12))
    assert [row.get("id") for row in found] == [f"r{n}" for n in range(11)] + [None]
    chat = Chat(made.network, made.renderer)
    expected = [chat.ask(row["prompt"], max_new_tokens=9)[0] for row in ROWS]
    expected += Chat(made.network, made.renderer, "be brief").ask("ab", max_new_tokens=9)
    assert [row["answer"] for row in found] == expected
    assert {row["finish_reason"] for row in found} == {"length"}
    assert os.listdir(out.parent) == ["out.jsonl"]
    assert cli.main(line) == 2
    assert "exists" in capsys.readouterr().err


def test_rows_may_say_for_themselves(model, made, tmp_path, capsys):
    first = Chat(made.network, made.renderer).ask("ab", max_new_tokens=12)[0]
    rows = [
        {"prompt": "ab", "max_new_tokens": 3},
        {"prompt": "ab", "stop": first[4:7]},
        {"prompt": "ab", "temperature": 1.0, "seed": 3},
        {"prompt": "ab", "temperature": 1.0, "seed": 3},
        {"prompt": "ab", "temperature": 1.0},
        {"prompt": "x" * 600},
    ]
    file = write(tmp_path / "in.jsonl", rows)
    line = ["generate", str(model), "--batch", str(file), "--max-new-tokens", "12", "--seed", "5"]
    assert cli.main([*line, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["answer_tokens"] == 3
    assert found[1]["answer"] == first[: first.index(first[4:7])].strip()
    assert found[1]["finish_reason"] == "stop"
    assert found[2]["answer"] == found[3]["answer"] != found[4]["answer"]
    assert "the limit is 512" in found[5]["error"]
    assert "answer" not in found[5]
    assert cli.main(line) == 0
    captured = capsys.readouterr()
    assert [json.loads(one) for one in captured.out.splitlines()] == found
    assert "1 of 6 rows have an error" in captured.err


def test_after_a_kill_it_goes_on(model, tmp_path):
    """Killed while rows are in flight; the same command answers the rest, and the file is as if nothing had been."""
    file, out = write(tmp_path / "in.jsonl", ROWS * 8), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    line = [sys.executable, "-m", "luthier", "generate", str(model), "--batch", str(file), "--out", str(out)]
    line += ["--max-new-tokens", "12", "--slots", "4", "--temperature", "1", "--seed", "1", "--quiet"]
    script = (
        "import sys, os, signal; from luthier.serve import batch; add = batch.Kept.add; count = [0]\n"
        "def dies(self, row):\n"
        "    add(self, row); count[0] += 1\n"
        "    if count[0] == 30: os.kill(os.getpid(), signal.SIGKILL)\n"
        "batch.Kept.add = dies; from luthier import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    killed = subprocess.run([sys.executable, "-c", script, *line[3:]], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    with open(partial, "ab") as torn:
        torn.write(b'{"row": 60, "ans')  # as a kill inside of a write leaves it
    assert len(partial.read_bytes().splitlines()) == 31
    made = opened(str(model))
    asked = batch.Asked(12, 1.0, seed=1)
    said: list[str] = []
    done = batch.answer(made, file, asked, out, 4, say=said.append)
    assert said[0] == "29 of 88 rows are answered already"
    assert done["before"] == 29
    assert not partial.exists()
    whole = tmp_path / "whole.jsonl"
    batch.answer(made, file, asked, whole, 9)
    assert out.read_bytes() == whole.read_bytes()


def test_what_was_begun_otherwise_is_not_gone_on_with(made, tmp_path):
    file, out = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    kept = batch.Kept(out, batch.key_of(file, made, batch.Asked(4)))
    with pytest.raises(ConfigError, match="another process is writing it"):
        batch.answer(made, file, batch.Asked(4), out)
    kept.close()
    with pytest.raises(ConfigError, match="of another model, other rows or other settings"):
        batch.answer(made, file, batch.Asked(5), out)
    assert batch.answer(made, file, batch.Asked(4), out)["rows"] == 11


def test_a_full_disk_is_told_and_can_be_gone_on_after(made, tmp_path, monkeypatch):
    file, out = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    add, calls = batch.Kept.add, []

    def full(self, row):
        calls.append(row)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        add(self, row)

    monkeypatch.setattr(batch.Kept, "add", full)
    with pytest.raises(OSError, match="No space left"):
        batch.answer(made, file, batch.Asked(4), out)
    assert not out.exists()
    monkeypatch.undo()
    assert batch.answer(made, file, batch.Asked(4), out)["before"] == 3


@pytest.mark.parametrize(
    ("content", "more", "code", "told"),
    [
        ('{"prompt": "a"}\n{"question": "b"}\nnot json\n', [], 3, "in.jsonl:3: not JSON"),
        ('{"prompt": "a"}\n{"question": "b"}\n', [], 3, "keys [\"question\"] are of no known format"),
        ('{"prompt": "a", "temperature": "hot"}\n', [], 3, "in.jsonl:1: temperature is 'hot', not a number"),
        ('{"prompt": "a", "top_p": 3}\n', [], 3, "top_p=3: must be in (0, 1]"),
        ('{"prompt": "a", "stop": 3}\n', [], 3, "stop is 3, not a text or a list of texts"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', [], 3, "in.jsonl:1"),
        ("\n", [], 3, "no rows"),
        ('{"prompt": "a"}\n', ["--slots", "0"], 2, "--slots 0"),
        ('{"prompt": "a"}\n', ["--stop", ""], 2, "--stop ''"),
        ('{"prompt": "a"}\n', ["--top-k", "-1"], 2, "--top-k"),
        ('{"prompt": "a"}\n', ["a question"], 2, "give one of the two"),
        (None, [], 3, "there is no such file"),
    ],
)
def test_bad_files_and_options_are_told_before_anything_is_loaded(model, tmp_path, capsys, content, more, code, told):
    file = tmp_path / "in.jsonl"
    if content is not None:
        file.write_text(content)
    assert cli.main(["generate", str(model), *more, "--batch", str(file)]) == code
    assert told in capsys.readouterr().err


def test_its_options_go_with_it(model, capsys):
    assert cli.main(["generate", str(model), "hello", "--stop", "x"]) == 2
    assert "go with --batch" in capsys.readouterr().err
