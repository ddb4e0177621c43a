"""luthier data label by rules and by a model, tasks, spans, Label Studio's files: by hand, from files to files."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.cli import main
from luthier.data import formats, sources
from luthier.errors import ConfigError, DataError
from luthier.prepare.label import labelling
from luthier.prepare.label.judge import questions, understood
from luthier.prepare.label.plan import plan
from luthier.prepare.label.rules import Ruler
from luthier.prepare.label.tasks import Classes, Edit, Preference, Spans
from luthier.prepare.label.words import Span, Words, snapped, spans_of, tags, words_of


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path) -> list[dict]:
    return [row.values for row in sources.read(str(path))] if path.exists() and path.stat().st_size else []


def run(capsys, *arguments: object, code: int = 0) -> dict:
    """A command's answer in JSON."""
    assert main(["data", "label", *map(str, arguments), "--json", "--quiet"]) == code
    return json.loads(capsys.readouterr().out)


def trained_from(row: dict, kind: str) -> str:
    """The format in which training reads the row, converted without a fault."""
    found = formats.recognise(row, "here", {}, kind)
    formats.converted(sources.Row(0, row, "here"), found, {})
    return found.name


# ---------------------------------------------------------------------------- words and tasks


def test_words_of_a_text_and_of_tokens():
    assert words_of({"text": "Don't go to St. Gallen-West, 5€!"}).all() == [
        "Don't", "go", "to", "St", ".", "Gallen-West", ",", "5", "€", "!",
    ]  # fmt: skip
    assert words_of({"tokens": ["New", "York", "!"]}) == Words("New York !", [(0, 3), (4, 8), (9, 10)])
    assert words_of({"text": "👩 in 東京"}).borders == [(0, 1), (2, 4), (5, 7)]


def test_spans_become_tags_by_hand():
    words = words_of({"text": "Ann Lee met Bo in Rome."})
    spans = [Span(0, 7, "PER"), Span(12, 14, "PER"), Span(18, 22, "LOC")]
    assert tags(words, spans) == ["B-PER", "I-PER", "O", "B-PER", "O", "B-LOC", "O"]
    assert snapped(words, [Span(1, 5, "PER")]) == [Span(0, 7, "PER")]  # "nn L" touches two words
    assert snapped(words, [Span(3, 4, "PER")]) == []  # a blank
    with pytest.raises(ValueError, match="spans overlap: 'Ann Lee' and 'Lee'"):
        snapped(words, [Span(0, 7, "PER"), Span(4, 7, "LOC")])
    assert spans_of(words, ["I-PER", "I-PER", "O", "I-PER", "I-LOC", "B-LOC", "O"]) == [
        Span(0, 7, "PER"), Span(12, 14, "PER"), Span(15, 17, "LOC"), Span(18, 22, "LOC"),
    ]  # fmt: skip


@given(st.data())
def test_tags_and_spans_turn_into_each_other(data):
    count = data.draw(st.integers(1, 8))
    words = words_of({"tokens": data.draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=count, max_size=count))})
    found, open_label = [], None
    for _ in range(count):
        choices = ["O", "B-A", "B-B", *([f"I-{open_label}"] if open_label else [])]
        found.append(data.draw(st.sampled_from(choices)))
        open_label = None if found[-1] == "O" else found[-1][2:]
    assert tags(words, spans_of(words, found)) == found


CLASSES = Classes(labels=["good", "bad", "mixed"])
SEVERAL = Classes(labels=["cheap", "quick", "kind"], several=True)
SPANS = Spans(labels=["PER", "LOC"])


def test_votes_are_decided_by_hand():
    assert CLASSES.decided(["good", "bad", "good"], {}) == ("good", 2 / 3)
    assert CLASSES.decided(["good", "bad"], {}) == (None, 0.5)
    # cheap 3 of 3, quick 1 of 3: agreement (1 + 2/3) / 2
    assert SEVERAL.decided([["cheap"], ["cheap", "quick"], ["cheap"]], {}) == (["cheap"], pytest.approx(5 / 6))
    assert SEVERAL.decided([[], []], {}) == ([], 1.0)
    assert SEVERAL.decided([["kind"], []], {}).label is None
    row = {"text": "Ann saw Rome"}
    # Ann: 3 of 3 say PER; Rome: 2 of 3 say LOC
    votes = [[[0, 3, "PER"], [8, 12, "LOC"]], [[0, 3, "PER"], [8, 12, "LOC"]], [[0, 3, "PER"]]]
    assert SPANS.decided(votes, row) == ([[0, 3, "PER"], [8, 12, "LOC"]], pytest.approx(5 / 6))
    assert SPANS.decided([[], [], [[0, 3, "PER"]]], row) == ([], pytest.approx(2 / 3))


@pytest.mark.parametrize(("task", "label", "row", "message"), [
    (CLASSES, "fine", {}, "'fine' is not among the labels"), (CLASSES, ["good"], {}, "is not among"),
    (SEVERAL, "cheap", {}, "is no list of labels"), (SEVERAL, ["cheap", "dear"], {}, "is no list of labels"),
    (SPANS, [[0, 99, "PER"]], {"text": "Ann"}, "not inside the text of 3"), (SPANS, "PER", {"text": "Ann"}, "expected a list"),
    (SPANS, [[0, 3, "ORG"]], {"text": "Ann"}, "'ORG' is not among"), (SPANS, [[0, True, "PER"]], {"text": "Ann"}, "is no \\[start"),
    (Preference(), "c", {}, "'c' is none of a, b, tie"), (Preference(ties=False), "tie", {}, "is none of a, b"),
    (Edit(), "  ", {}, "empty"), (Edit(), 3, {}, "expected a text"),
])  # fmt: skip
def test_labels_that_are_none(task, label, row, message):
    with pytest.raises(ValueError, match=message):
        task.checked(label, row)


def test_labelled_rows_are_what_training_reads():
    assert trained_from(CLASSES.row({"text": "x"}, "good"), "labelled") == "labelled"
    assert trained_from(SEVERAL.row({"text": "x"}, ["kind"]), "labelled") == "several_labels"
    chat = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    assert trained_from(CLASSES.row(chat, "good"), "labelled") == "labelled_messages"
    assert trained_from(SPANS.row({"text": "Ann ran"}, [[0, 3, "PER"]]), "tagged") == "tags"
    pair = {"prompt": "x", "a": "y", "b": "z"}
    assert Preference().row(pair, "b") == {"prompt": "x", "chosen": "z", "rejected": "y"}
    assert Preference().row(pair, "tie") is None
    assert trained_from(Preference().row(pair, "a"), "pairs") == "preference"
    assert Edit().row({"prompt": "x", "completion": "y"}, "z") == {"prompt": "x", "completion": "z"}
    assert trained_from(Edit().row({"prompt": "x"}, "z"), "text") == "prompt_completion"
    assert Edit().row(chat, "z")["messages"][-1] == {"role": "assistant", "content": "z"}
    asked = {"messages": chat["messages"][:1]}
    assert Edit().row(asked, "z")["messages"] == [*asked["messages"], {"role": "assistant", "content": "z"}]
    empty = {"messages": [*asked["messages"], {"role": "assistant", "content": ""}]}
    assert Edit().row(empty, "z") == Edit().row(asked, "z")


@pytest.mark.parametrize(("given", "message"), [
    ({}, "task: required"),
    ({"task": {"kind": "clases", "labels": ["a", "b"]}}, "task.kind: should be one of .*did you mean 'classes'"),
    ({"task": {"labels": ["a", "b"]}}, "task.kind: should be one of"),
    ({"task": {"kind": "classes"}}, "task.labels: required"),
    ({"task": {"kind": "classes", "labels": ["a"]}}, "task.labels: .*at least 2"),
    ({"task": {"kind": "classes", "labels": ["a", "A"]}}, "same name, but for capitals"),
    ({"task": {"kind": "classes", "lables": ["a", "b"], "labels": ["a", "b"]}}, "task.lables: unknown key; did you mean 'labels'"),
    ({"task": {"kind": "spans", "labels": ["O"]}}, "'O' is the tag of words that are of no entity"),
    ({"task": {"kind": "preference", "answers": ["a", "a"]}}, "the same column"),
    ({"task": {"kind": "edit"}, "judgee": {}}, "judgee: unknown key; did you mean 'judge'"),
    ({"task": {"kind": "edit"}, "rules": {"rules": [{"label": "a"}]}}, r"rules.rules\[0\]: give at least one of regex"),
    ({"task": {"kind": "edit"}, "rules": {"rules": [{"label": "a", "regex": "("}]}}, "regex: .*unterminated"),
    ({"task": {"kind": "edit"}, "rules": {"rules": [{"label": "a", "regex": "x*"}]}}, "found in every text"),
    ({"task": {"kind": "edit"}, "rules": {"rules": [{"label": "a", "regex": "x", "roles": ["usr"]}]}}, "did you mean 'user'"),
    ({"task": {"kind": "edit"}, "rules": {"rules": [{"label": "a", "length": {"min": 3, "max": 2}}]}}, "max=2 is below min=3"),
    ({"task": {"kind": "edit"}, "judge": {"model": {"kind": "openai", "base_url": "ftp://x", "name": "m"}}}, "judge.model.base_url"),
    ({"task": {"kind": "edit"}, "judge": {"votes": 0, "model": {"kind": "luthier", "name": "m"}}}, "judge.votes"),
])  # fmt: skip
def test_plans_that_are_wrong(given, message):
    with pytest.raises(ConfigError, match=message):
        plan(given)


# ---------------------------------------------------------------------------- rules

MAIL = {
    "task": {"kind": "classes", "labels": ["spam", "ham"]},
    "rules": {"rules": [
        {"name": "link", "label": "spam", "regex": "https?://"}, {"label": "spam", "keywords": ["free money", "win"], "at_least": 2},
        {"label": "ham", "keywords": ["meeting", "invoice"]}, {"name": "long", "label": "ham", "length": {"min": 8, "unit": "words"}},
    ]},
}  # fmt: skip
MAILS = [
    {"text": "Win! FREE  money at http://x.example"},  # two rules for spam
    {"text": "The meeting is at ten"},  # ham
    {"text": "Hello"},  # nothing
    {"text": "Invoice at https://x.example"},  # link against ham
    {"text": "Winter is free of money worries, said the old man at last"},  # long: no keyword is a whole word
]


def test_rules_by_hand(tmp_path, capsys):
    source, out = write(tmp_path / "mail.jsonl", MAILS), tmp_path / "labelled.jsonl"
    task = tmp_path / "task.yaml"
    task.write_text(json.dumps(MAIL))
    told = run(capsys, "rules", source, out, "--task", task, "--workers", 1)
    assert read(out) == [{**MAILS[i], "label": label} for i, label in ((0, "spam"), (1, "ham"), (4, "ham"))]
    assert [(r["row"], r["place"], r["why"], r["rules"], r["values"]) for r in read(tmp_path / "labelled.aside.jsonl")] == [
        (2, f"{source}:3", "abstained", [], MAILS[2]), (3, f"{source}:4", "conflict", ["link", "3. ham"], MAILS[3]),
    ]  # fmt: skip
    assert told["rows"] == 5
    assert told["labelled"] == 3
    assert told["labels"] == {"ham": 2, "spam": 1}
    assert told["aside"] == {"abstained": 1, "conflict": 1}
    assert [(r["name"], r["rows"], r["overlaps"], r["conflicts"]) for r in told["rules"]] == [
        ("link", 2, 2, 1), ("2. spam", 1, 1, 0), ("3. ham", 2, 1, 1), ("long", 1, 0, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(("conflicts", "expected"), [("first", "spam"), ("majority", "spam"), ("aside", None)])
def test_conflicts_are_settled_as_asked(conflicts, expected):
    """Two rules for spam against one for ham."""
    made = plan(MAIL, f"rules.conflicts={conflicts}")
    ruled = Ruler(made.task, made.rules)({"text": "Free money! Win: https://x.example meeting"})
    assert ruled.label == expected
    assert ruled.against == [0, 1, 2]
    even = Ruler(made.task, made.rules)({"text": "Invoice at https://x.example"})
    assert even.label == ("spam" if conflicts == "first" else None)


def test_conditions_must_all_hold():
    def holds(rule: dict, values: dict) -> bool:
        made = plan({"task": {"kind": "classes", "labels": ["x", "y"]}, "rules": {"rules": [{"label": "x", **rule}]}})
        return Ruler(made.task, made.rules)(values).label == "x"

    chat = {"messages": [{"role": "user", "content": "Give JSON"}, {"role": "assistant", "content": '{"a": 1}'}]}
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    assert holds({"json_schema": schema}, chat)
    assert not holds({"json_schema": schema, "roles": ["user"]}, chat)
    assert not holds({"json_schema": schema | {"required": ["b"]}}, chat)
    assert holds({"regex": "give", "roles": ["user"], "json_schema": schema} | {"roles": []}, chat)
    assert not holds({"regex": "give", "ignore_case": False}, chat)
    assert holds({"regex": "give", "ignore_case": False, "never": True}, chat)
    assert holds({"length": {"max": 17}}, chat)  # 9 + 8 characters
    assert not holds({"length": {"max": 16}}, chat)


def test_spans_by_rules(tmp_path, capsys):
    made = {
        "task": {"kind": "spans", "labels": ["DATE", "LOC"]},
        "rules": {"rules": [{"label": "DATE", "regex": r"\d{4}-\d\d-\d\d"}, {"label": "LOC", "keywords": ["New York", "York"]},
                            {"name": "may", "label": "LOC", "regex": r"2026-05"}]},
    }  # fmt: skip
    rows = [{"text": "In New York on 2026-01-02."}, {"text": "2026-05-01"}, {"text": "nothing"}, {"tokens": ["York", ":", "x"]}]
    source, task, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "task.yaml", tmp_path / "out.jsonl"
    task.write_text(json.dumps(made))
    told = run(capsys, "rules", source, out, "--task", task, "--workers", 1)
    assert read(out) == [
        {"tokens": ["In", "New", "York", "on", "2026-01-02", "."], "tags": ["O", "B-LOC", "I-LOC", "O", "B-DATE", "O"]},
        {"tokens": ["York", ":", "x"], "tags": ["B-LOC", "O", "O"]},
    ]
    assert told["aside"] == {"conflict": 1, "abstained": 1}
    assert told["labels"] == {"LOC": 2, "DATE": 1}


def test_rows_that_are_labelled_already(tmp_path, capsys):
    rows = [{"text": "The meeting", "label": "ham"}, {"text": "an invoice", "label": "spam"}, {"text": "a meeting"}]
    source, task = write(tmp_path / "rows.jsonl", rows), tmp_path / "task.yaml"
    task.write_text(json.dumps(MAIL))
    common = ("rules", source, tmp_path / "out.jsonl", "--task", task, "--workers", 1)
    refused = run(capsys, *common, code=3)
    assert "rows.jsonl:1: the row has label already" in refused["problems"][0]
    assert not (tmp_path / "out.jsonl").exists()
    replaced = run(capsys, "rules", source, tmp_path / "replaced.jsonl", *common[3:], "--set", "existing=replace")
    assert [row["label"] for row in read(tmp_path / "replaced.jsonl")] == ["ham", "ham", "ham"]
    assert (replaced["known"], replaced["same_as_known"]) == (2, 0.5)
    assert replaced["rules"][2]["same_as_known"] == 0.5
    kept = run(capsys, "rules", source, tmp_path / "kept.jsonl", *common[3:], "--set", "existing=keep")
    assert [row["label"] for row in read(tmp_path / "kept.jsonl")] == ["ham", "spam", "ham"]
    assert (kept["kept"], kept["labelled"], kept["same_as_known"]) == (2, 1, 0.5)


def test_shards_in_processes_are_as_one_file(tmp_path, capsys):
    rows = [{"body": f"{'meeting' if i % 3 else 'win, win'} {i}", "id": i} for i in range(30)]
    write(tmp_path / "in" / "a.jsonl", rows[:10])
    write(tmp_path / "in" / "b.jsonl.gz", rows[10:])
    whole = write(tmp_path / "whole.jsonl", rows)
    given = ("--set", "task.columns={text: body}")
    task = tmp_path / "task.yaml"
    task.write_text(json.dumps(MAIL))
    one = run(capsys, "rules", whole, tmp_path / "one.jsonl", "--task", task, *given, "--workers", 1)
    two = run(capsys, "rules", tmp_path / "in", tmp_path / "out", "--task", task, *given, "--workers", 2)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert read(tmp_path / "one.jsonl") == [row for name in "ab" for row in read(tmp_path / "out" / f"{name}.jsonl")]
    assert read(tmp_path / "one.jsonl")[1] == {"text": "meeting 1", "id": 1, "label": "ham"}
    assert {k: v for k, v in one.items() if k != "out"} == {k: v for k, v in two.items() if k != "out"}


@pytest.mark.parametrize(("change", "message"), [
    (["task.kind=preference", "task.labels=null"], "labels"),
    (["rules.rules=[{label: spm, regex: x}]"], "rules.rules.0..label='spm': the labels are spam, ham; did you mean 'spam'"),
    (["rules.otherwise=other"], "rules.otherwise='other'"),
    (["rules.rules=[{label: spam, json_schema: {type: objekt}}]"], "json_schema: no schema"),
    (["rules.rules=[{label: spam, json_schema: {$ref: 'http://x.example/s'}}]"], "nothing is fetched"),
    (["rules=null"], "rules: required"),
])  # fmt: skip
def test_rules_that_are_wrong(tmp_path, capsys, change, message):
    source, task = write(tmp_path / "rows.jsonl", MAILS), tmp_path / "task.yaml"
    task.write_text(json.dumps(MAIL))
    settings = [part for one in change for part in ("--set", one)]
    told = run(capsys, "rules", source, tmp_path / "out.jsonl", "--task", task, *settings, code=2)
    assert re.search(message, "\n".join(told["problems"])), told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "task.yaml"]


def test_bad_input_is_told(tmp_path, capsys):
    task = tmp_path / "task.yaml"
    task.write_text(json.dumps(MAIL))
    common = ("--task", task, "--workers", 1)
    (tmp_path / "binary.jsonl").write_bytes(b"\x00\x01" * 50)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for name, message in (("binary", "zero bytes"), ("empty", "no rows"), ("absent", "does not exist")):
        told = run(capsys, "rules", tmp_path / f"{name}.jsonl", tmp_path / f"{name}.out.jsonl", *common, code=3)
        assert message in told["problems"][0]
        assert not (tmp_path / f"{name}.out.jsonl").exists()
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9 meeting"}\n{"text": "meeting"}\n{"no": 1}\n')
    run(capsys, "rules", tmp_path / "latin.jsonl", tmp_path / "out.jsonl", *common)
    assert [r["why"].partition(":")[0] for r in read(tmp_path / "out.aside.jsonl")] == ["unreadable", "unfit"]
