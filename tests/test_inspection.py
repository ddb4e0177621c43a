"""What `luthier data inspect` shows of labelled rows, of tags, of pairs, and of answers that are liked or not."""

import json
from types import SimpleNamespace

import pytest
from conftest import write_rows
from test_page import Read

from luthier.cli import main

TEXTS = [
    {"text": "good", "label": "positive"}, {"text": "bad", "label": "negative"}, {"text": "fine", "label": "positive"},
]  # fmt: skip
SEVERAL = [{"text": "red box", "labels": ["red", "box"]}, {"text": "x", "labels": []}, {"text": "b", "labels": ["box"]}]
VALUES = [{"text": "good", "label": 0.25}, {"text": "bad", "label": -1.5}]
WORDS = [
    {"tokens": ["Jo", "in", "New", "York"], "tags": ["B-PER", "O", "B-LOC", "I-LOC"]},
    {"tokens": ["no", "one"], "tags": ["O", "O"]},
]
PAIRS = [
    {"prompt": "2+2", "chosen": "4", "rejected": "five", "margin": 1.5},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
]
LIKED = [{"prompt": f"q{n}", "completion": f"a{n}", "label": n == 0} for n in range(3)]
END = "<|im_end|>"


@pytest.fixture
def inspect(tmp_path, tiny_model, capsys):
    """(rows, what else is given) -> what is printed, what --json gives, and the page as a browser reads it."""

    def look(rows: list, *extra: str) -> SimpleNamespace:
        path, page = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "rows.html"
        arguments = ["data", "inspect", str(path), "--model", str(tiny_model), *extra]
        for n in range(len(rows)):
            arguments += ["--row", str(n)]
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert main([*arguments, "--html", str(page), "--json"]) == 0
        found, text = json.loads(capsys.readouterr().out), page.read_text()
        return SimpleNamespace(printed=printed, found=found, said=list(found["said_of_rows"].values()), page=text)

    return look


def test_one_label(inspect):
    made = inspect(TEXTS, "--method", "classify")
    assert "row 0: 4 pieces, none of them predicted, label positive" in made.printed
    assert "row 1: 3 pieces, none of them predicted, label negative" in made.printed
    assert "labels              negative 1, positive 2" in made.printed
    assert made.found["said_of_rows"] == {str(n): {"label": row["label"]} for n, row in enumerate(TEXTS)}
    assert made.found["labels"] == {"negative": 1, "positive": 2}
    assert "4 tokens, 0 learnt (0%), label positive</summary>" in made.page
    assert "<dt>positive</dt><dd>2</dd>" in made.page


def test_several_labels_and_values(inspect):
    made = inspect(SEVERAL, "--method", "classify")
    assert made.said == [{"labels": ["box", "red"]}, {"labels": []}, {"labels": ["box"]}]
    assert made.found["labels"] == {"box": 2, "red": 1}
    assert "labels box, red\n" in made.printed
    assert "labels none\n" in made.printed
    assert "labels none</summary>" in made.page
    made = inspect(VALUES, "--method", "classify")
    assert made.found["said_of_rows"] == {"0": {"value": 0.25}, "1": {"value": -1.5}}
    assert made.found["labels"] == {}
    assert "value -1.5\n" in made.printed
    assert "value 0.25</summary>" in made.page


def test_a_tag_for_each_word(inspect):
    """A byte is a token: the first of each word has its tag, in the order of the row."""
    made = inspect(WORDS, "--method", "classify_tokens")
    assert "⟦B-PER: J⟧o" in made.printed
    words = [(p["text"].strip(), p["tag"]) for p in made.found["tokens_of_rows"]["0"] if "tag" in p]
    assert [tag for _, tag in words] == WORDS[0]["tags"]
    assert made.found["labels"] == {"O": 3, "B-LOC": 1, "B-PER": 1, "I-LOC": 1}
    assert "".join(p["text"] for p in made.found["tokens_of_rows"]["0"]) == "Jo in New York"
    assert "tags before the words that they are of" in made.printed
    assert made.page.count("<b>B-LOC</b>") == made.page.count("<b>I-LOC</b>") == 1
    marked = [text.strip() for _, text, mark in Read(made.page).rows[0] if mark]
    assert len(marked) == 4


@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_both_sides_of_a_pair(inspect, method):
    made = inspect(PAIRS, "--method", method)
    assert made.found["said_of_rows"] == {"0": {"margin": 1.5}, "1": {}}
    sides = {"chosen": "", "rejected": ""}
    for piece in made.found["tokens_of_rows"]["0"]:
        sides[piece["side"]] += piece["text"]
    assert "4" + END in sides["chosen"]
    assert "five" in sides["rejected"]
    assert "five" not in sides["chosen"]
    lines = made.printed.splitlines()
    assert lines.index("chosen:") < lines.index("rejected:")
    assert "margin 1.5" in made.printed
    assert made.page.count("<p class=side>chosen</p>") == made.page.count("<p class=side>rejected</p>") == 2
    assert len(Read(made.page).rows) == 4, "each side is a region of its own"


def test_what_is_liked(inspect):
    made = inspect(LIKED, "--method", "kto")
    assert made.found["said_of_rows"] == {"0": {"liked": True}, "1": {"liked": False}, "2": {"liked": False}}
    assert made.found["labels"] == {"liked": 1, "not liked": 2}
    assert "learnt in green, liked\n" in made.printed
    assert "learnt in green, not liked\n" in made.printed
    answers: dict[str, str] = {}
    for piece in made.found["tokens_of_rows"]["0"]:
        answers[piece["side"]] = answers.get(piece["side"], "") + piece["text"]
    own, other = answers.values()
    assert "a0" + END in own
    assert "a1" + END in other or "a2" + END in other
    assert list(answers) == ["answer", "another row's answer, for the reference point"]
    assert "not liked</summary>" in made.page


def test_labels_and_tags_are_text_in_the_page_and_on_the_terminal(inspect, monkeypatch):
    hostile = "<b>\x1b[31m[red]"
    made = inspect([{"text": "x", "label": hostile}, {"text": "y", "label": "z"}], "--method", "classify")
    assert "\x1b" not in made.printed
    assert "label <b>[U+001B][31m[red]" in made.printed
    assert "&lt;b&gt;[U+001B]" in made.page
    assert hostile not in made.page
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    made = inspect([WORDS[0] | {"tags": [hostile, "O", "O", "O"]}, WORDS[1]], "--method", "classify_tokens")
    assert "<b>[U+001B][31m[red]:" in made.printed
    assert "\u27e6" not in made.printed, "in colour there are no brackets"


def test_rows_of_text_are_as_before(inspect):
    made = inspect([{"prompt": "2+2", "completion": "4"}])
    assert made.found["said_of_rows"] == {"0": {}}
    assert made.found["labels"] == {}
    assert all(set(piece) == {"text", "weight"} for piece in made.found["tokens_of_rows"]["0"])
    assert "learnt in green\n" in made.printed
    assert "labels " not in made.printed
    assert "class=side>" not in made.page
