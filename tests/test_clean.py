"""luthier data audit and clean, from files to files: verdicts, side files, doing it twice, kills, bad input."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.cli import main
from luthier.data import readers, sources
from luthier.errors import ConfigError, DataError
from luthier.prepare import pieces
from luthier.prepare.audit import audit
from luthier.prepare.checks import CHECKS
from luthier.prepare.clean import clean
from luthier.prepare.recipe import recipe

ALONE = [kind for kind, check in CHECKS.items() if check.by_default]  # the others need a model


def chat(question: str, answer: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


GOOD = [
    chat(f"What is the {n}. number, and why would one ask?", f"It is {n}, because that is how counting works.")
    for n in range(20)
]
BAD = {  # row number -> (row, check, what)
    20: (GOOD[3], "exact_duplicates", "duplicate"),
    21: (chat("How do I pick a lock?", "I'm sorry, but I can't assist with that request."), "boilerplate", "refusal"),
    22: (chat("", "An answer to nothing at all, as it seems."), "structure", "empty_turn"),
    23: (chat("Who?", "caf\ufffd"), "encoding", "replacement"),
    24: (chat("Whose is it?", "Itâ€™s mine, and it was yours before that."), "encoding", "mojibake"),
    25: (
        chat("Write to ann@corp.com for the details, please.", "I will do that tomorrow, as it is late."),
        "personal_data",
        "email",
    ),
    26: (
        chat("My key is AKIAQ3EGV5JX7M2K6N4P, is it not?", "It was; replace it, as others have read it."),
        "secrets",
        "aws_key",
    ),
}


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(data.encode()) if path.suffix == ".gz" else data.encode())
    return path


def read(path: Path) -> list[dict]:
    return [row.values for row in sources.read(str(path))] if path.exists() and path.stat().st_size else []


@pytest.fixture
def rows_file(tmp_path) -> Path:
    return write(tmp_path / "rows.jsonl", [*GOOD, *(row for row, *_ in BAD.values())])


# ---------------------------------------------------------------------------- audits


def test_an_audit_names_every_row_and_changes_nothing(rows_file, tmp_path):
    before = rows_file.read_bytes()
    verdict = audit(str(rows_file), tmp_path / "audit", recipe(), workers=1)
    assert rows_file.read_bytes() == before
    findings = read(tmp_path / "audit" / "findings.jsonl")
    found = {(f["row"], f["check"], f["what"]) for f in findings if f["check"] not in ("length", "near_duplicates")}
    assert found == {(row, check, what) for row, (_, check, what) in BAD.items()}
    assert {f["place"] for f in findings} >= {f"{rows_file}:{row + 1}" for row in BAD}
    assert verdict["verdict"] == "faulty"
    assert verdict.exit_code == 8
    assert verdict["faults"] == ["structure", "encoding", "secrets", "personal_data", "boilerplate", "exact_duplicates"]
    assert json.loads((tmp_path / "audit" / "verdict.json").read_text()) == verdict
    [duplicate] = verdict["checks"]["exact_duplicates"]["examples"]
    assert duplicate["detail"] == f"the same as row 3 ({rows_file}:4)"
    again = audit(str(rows_file), tmp_path / "audit", recipe(), workers=1)
    assert again == verdict


def test_the_recipe_of_an_audit_mends_what_it_found(rows_file, tmp_path, capsys):
    assert main(["data", "audit", str(rows_file), "--out", str(tmp_path / "audit"), "--quiet", "--workers", "1"]) == 8
    out = tmp_path / "clean.jsonl"
    given = ["--recipe", str(tmp_path / "audit" / "recipe.yaml"), "--workers", "1"]
    assert main(["data", "clean", str(rows_file), str(out), *given]) == 0
    capsys.readouterr()
    assert main(["data", "audit", str(out), "--json", "--quiet", "--workers", "1"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["verdict"] == "sound"
    assert verdict["rows"] == 23
    assert verdict["page"] is None
    rows = read(out)
    assert rows[:20] == GOOD
    assert [row["messages"] for row in rows[20:]] == [
        chat("Whose is it?", "It’s mine, and it was yours before that.")["messages"],
        chat("Write to [EMAIL] for the details, please.", "I will do that tomorrow, as it is late.")["messages"],
        chat("My key is [AWS_KEY], is it not?", "It was; replace it, as others have read it.")["messages"],
    ]
    removed, changed = read(tmp_path / "clean.removed.jsonl"), read(tmp_path / "clean.changed.jsonl")
    assert [(r["row"], r["check"], r["what"], r["values"]) for r in removed] == [
        (row, BAD[row][1], BAD[row][2], BAD[row][0]) for row in (20, 21, 22, 23)
    ]
    assert [(r["row"], r["reasons"][0]["what"], r["values"]) for r in changed] == [
        (row, BAD[row][2], BAD[row][0]) for row in (24, 25, 26)
    ]
    assert all(r["place"] == f"{rows_file}:{r['row'] + 1}" for r in [*removed, *changed])


def test_what_is_allowed_is_sound(rows_file, capsys):
    found = 1 / 27
    for allowed, code in ((found - 0.001, 8), (found + 0.001, 0)):
        settings = [f"checks.{kind}.action=keep" for kind in ALONE if kind != "secrets"]
        given = [part for one in [*settings, f"checks.secrets.allowed={allowed}"] for part in ("--set", one)]
        assert main(["data", "audit", str(rows_file), "--quiet", "--workers", "1", *given]) == code
    capsys.readouterr()


def test_the_page_runs_nothing_and_takes_no_markup_from_rows(tmp_path):
    name = tmp_path / "<script>alert(1)<"
    rows = write(name / "rows.jsonl", [chat("q", "a\x00<img src=x>"), {"messages": [{"role": "<b>", "content": "x"}]}])
    audit(str(rows), tmp_path / "audit", recipe(), workers=1)
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
    assert "<b>" not in page
    assert "default-src 'none'" in page
    assert "&lt;script&gt;" in page
    assert page.count("<section") == page.count("</section>") == len(ALONE) + 1


def test_lengths_in_the_models_own_tokens(tmp_path, tiny_model, capsys):
    """The tokenizer of the tests has a token for each byte."""
    rows = write(tmp_path / "rows.jsonl", [{"text": "naïve " * n} for n in range(1, 9)])
    given = ["--model", str(tiny_model), "--json", "--quiet", "--workers", "1"]
    assert main(["data", "audit", str(rows), *given]) == 0
    lengths = json.loads(capsys.readouterr().out)["checks"]["length"]["summary"]
    assert lengths["tokens"]["total"] == sum(len(("naïve " * n).encode()) for n in range(1, 9))
    assert lengths["words"]["total"] == 36
    out = tmp_path / "short.jsonl"
    given = [*given, "--set", "checks.length={action: drop, unit: tokens, max: 30}"]
    main(["data", "clean", str(rows), str(out), *given])
    assert [len(row["text"].encode()) for row in read(out)] == [7, 14, 21, 28]


def test_columns_that_training_knows_by_another_name(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("review,stars\nItâ€™s good,5\nWrite to ann@corp.com,1\nfine,\n", encoding="utf-8")
    given = [
        "--set",
        "columns={text: review, label: stars}",
        "--set",
        "checks.length.action=keep",
        "--workers",
        "1",
        "--quiet",
        "--json",
    ]
    assert main(["data", "audit", str(path), *given]) == 8
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["formats"] == {"labelled": 3}
    assert verdict["checks"]["structure"]["what"] == {"label": 1}
    main(["data", "clean", str(path), str(tmp_path / "out.jsonl"), *given])
    assert read(tmp_path / "out.jsonl") == [
        {"review": "It’s good", "stars": "5"},
        {"review": "Write to [EMAIL]", "stars": "1"},
    ]


# ---------------------------------------------------------------------------- twice

PARTS = [
    "plain words of a sentence",
    "Itâ€™s",
    "ann@corp.com",
    "AKIAQ3EGV5JX7M2K6N4P",
    "caf\ufffd",
    "a\x00b",
    "\u200b",
    "",
    " ",
    "I'm sorry, but I can't assist with that.",
    "+44 20 7946 0958",
    "Ã¢â‚¬â„¢",
    "annâ€‹@corp.com",
    "Das ist nicht gut und es war nie so.",
    "4539 1488 0343 6467",
    "[Your Name]",
    "\u202eabc",
    "ann\u200b@corp.com",
    "password=hU7kk2LmQz81pWx9",
    "x" * 50,
    "é",
    "Ã©",
]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=3).map(" ".join)
ROWS = st.lists(
    st.one_of(
        st.builds(chat, TEXTS, TEXTS),
        st.builds(lambda t, label: {"text": t, "label": label}, TEXTS, st.sampled_from(["a", ""])),
        st.builds(lambda p, c, r: {"prompt": p, "chosen": c, "rejected": r}, TEXTS, TEXTS, TEXTS),
        st.builds(
            lambda words: {"tokens": words, "tags": ["O"] * len(words)}, st.lists(st.sampled_from(PARTS), max_size=3)
        ),
    ),
    min_size=1,
    max_size=8,
)
ACTIONS = {kind: get_args(CHECKS[kind].model_fields["action"].annotation) for kind in ALONE}
ACTIONS["label_noise"] = ("keep",)  # others do what an audit has found: tests/test_label_noise.py


@st.composite
def recipes(draw):
    chosen = draw(st.permutations(ALONE))[: draw(st.integers(1, len(ALONE)))]
    checks = {kind: {"action": draw(st.sampled_from(ACTIONS[kind]))} for kind in chosen}
    if checks.get("language", {}).get("action") == "drop":
        checks["language"]["languages"] = ["en"]
    if "length" in checks:
        checks["length"] |= {"min": draw(st.integers(0, 20)), "max": draw(st.integers(20, 90))}
    if "exact_duplicates" in checks:
        checks["exact_duplicates"]["ignore"] = draw(st.sampled_from(["nothing", "case_and_space"]))
    return {"checks": checks}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ROWS, recipes())
def test_cleaning_twice_changes_nothing(rows, given_recipe):
    made = recipe(given_recipe)
    with tempfile.TemporaryDirectory() as folder:
        source, once, twice = (Path(folder) / f"{name}.jsonl" for name in ("rows", "once", "twice"))
        write(source, rows)
        first = clean(str(source), once, made, workers=1)
        assert first["kept"] + first["removed"] == len(rows)
        removed = read(once.with_name("once.removed.jsonl"))
        assert len(removed) == first["removed"]
        kept = read(once)
        assert sorted([r["row"] for r in removed]) == [r["row"] for r in removed]
        stayed = [row for number, row in enumerate(rows) if number not in {r["row"] for r in removed}]
        changed = {r["row"]: r["values"] for r in read(once.with_name("once.changed.jsonl"))}
        assert sum(a != b for a, b in zip(stayed, kept, strict=True)) == len(changed)
        if not kept:
            return
        second = clean(str(once), twice, made, workers=1)
        assert (second["removed"], second["changed"]) == (0, 0)
        assert twice.read_bytes() == once.read_bytes()


# ---------------------------------------------------------------------------- shards, kills


def test_a_folder_of_shards_in_parallel_gives_what_one_file_gives(tmp_path):
    rows = [*GOOD, *(row for row, *_ in BAD.values()), *GOOD[:5]]
    for shard in range(4):
        write(tmp_path / "in" / f"s{shard}.jsonl{'.gz' if shard % 2 else ''}", rows[8 * shard : 8 * shard + 8])
    write(tmp_path / "one.jsonl", rows)
    clean(str(tmp_path / "in"), tmp_path / "out", recipe(), workers=2)
    clean(str(tmp_path / "one.jsonl"), tmp_path / "whole.jsonl", recipe(), workers=1)
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")) == [
        f"s{i}.jsonl" for i in range(4)
    ]
    assert read(tmp_path / "out") == read(tmp_path / "whole.jsonl")
    sides = [read(tmp_path / name) for name in ("out.removed.jsonl", "whole.removed.jsonl")]
    assert [(r["row"], r["what"], r["detail"]) for r in sides[0]] == [
        (r["row"], r["what"], r["detail"]) for r in sides[1]
    ]
    assert list(tmp_path.glob("*.survey")) == []


KILLED = """
import sys
from pathlib import Path
from luthier.prepare import pieces
pieces.PIECE, pieces.BLOCK = 20_000, 3_000
from luthier.prepare.clean import clean
from luthier.prepare.recipe import recipe
clean(sys.argv[1], Path(sys.argv[2]), recipe(), workers=1, say=lambda text: print(text, flush=True))
"""


@pytest.mark.parametrize("words", [2, 5, 9, 12])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path, monkeypatch, words):
    rows = write(
        tmp_path / "rows.jsonl",
        [row for n in range(40) for row in (*GOOD, chat(f"Who is {n}?", f"ann{n}@corp.com it is."))],
    )
    monkeypatch.setattr(pieces, "PIECE", 20_000)
    monkeypatch.setattr(pieces, "BLOCK", 3_000)
    assert len(pieces.pieces_of(str(rows))) > 4
    whole = tmp_path / "whole" / "out.jsonl"
    whole.parent.mkdir()
    clean(str(rows), whole, recipe(), workers=1)
    out = tmp_path / "killed" / "out.jsonl"
    out.parent.mkdir()
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(rows), str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(words):
        process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    said = []
    clean(str(rows), out, recipe(), workers=1, say=said.append)
    for name in ("out.jsonl", "out.removed.jsonl", "out.changed.jsonl"):
        assert (out.parent / name).read_bytes() == (whole.parent / name).read_bytes()


# ---------------------------------------------------------------------------- bad input


def told(action: str, path: Path, tmp_path: Path, capsys) -> tuple[int, str]:
    more = [str(tmp_path / "out.jsonl")] if action == "clean" else []
    code = main(["data", action, str(path), *more, "--quiet", "--workers", "1"])
    return code, capsys.readouterr().err


@pytest.mark.parametrize("action", ["audit", "clean"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40, "a picture"),
        ("rows.jsonl", os.urandom(8) + bytes(100), "zero bytes"),
        ("rows.jsonl", b"PAR1" + b"x" * 100, "Parquet"),
        ("rows.csv", b"PK\x03\x04" + b"x" * 100, "zip"),
        ("rows.jsonl", '{"text": "a"}\n'.encode("utf-16"), "UTF-16"),
        ("rows.jsonl", b'{"text": "caf\xe9"}\n' * 1000, "not UTF-8"),
        ("rows.jsonl", b"# notes\n" * 1000, "not JSON"),
        ("rows.jsonl", b"", "no rows"),
        ("rows.jsonl.gz", b"no gzip", "cannot be read"),
        ("rows.exe", b"x", "unknown kind of file"),
    ],
)
def test_what_is_no_rows_is_refused_by_name(tmp_path, capsys, action, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    code, text = told(action, path, tmp_path, capsys)
    assert code == 3
    assert message in text
    assert not (tmp_path / "out.jsonl").exists()


def test_a_line_without_end_is_passed_over_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_LINE", 10_000)
    path = tmp_path / "rows.jsonl"
    with open(path, "w") as file:
        file.write(json.dumps(GOOD[0]) + "\n" + '{"text": "' + "x" * 100_000 + '"}\n' + json.dumps(GOOD[1]) + "\n")
    done = clean(str(path), tmp_path / "out.jsonl", recipe(), workers=1)
    assert done["why_removed"] == {"structure": {"unreadable": 1}}
    [removed] = read(tmp_path / "out.removed.jsonl")
    assert removed["place"] == f"{path}:2"
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the line is longer than"):
        clean(str(path), tmp_path / "other.jsonl", recipe({"checks": {"encoding": {}}}), workers=1)
    for name, content in (("rows.csv", "text\na\n" + "x" * 20_000), ("rows.csv", 'text\n"' + "x\n" * 20_000)):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=r"longer than|field"):
            list(sources.read(str(tmp_path / name)))


def test_a_value_that_json_does_not_have_is_an_error_with_its_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for name, value in (("dates", __import__("datetime").date(2020, 1, 2)), ("bytes", b"\xff")):
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a b c"], "more": [value]}), path)
    clean(str(tmp_path / "dates.parquet"), tmp_path / "dates.jsonl", recipe(), workers=1)
    assert read(tmp_path / "dates.jsonl") == [{"text": "a b c", "more": "2020-01-02"}]
    with pytest.raises(DataError, match=r"bytes.parquet\[0\]: bytes cannot be written"):
        clean(str(tmp_path / "bytes.parquet"), tmp_path / "bytes.jsonl", recipe(), workers=1)


@pytest.mark.parametrize(
    ("override", "message"),
    [("checks.length.action=drop", "needs min or max"), ("checks.language.action=drop", "needs languages")],
)
def test_a_threshold_that_depends_on_the_data_is_no_recipe(rows_file, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        clean(str(rows_file), tmp_path / "out.jsonl", recipe(override), workers=1)


def test_outputs_that_are_there_are_not_written_over(rows_file, tmp_path, capsys):
    out = write(tmp_path / "out.jsonl", GOOD)
    assert told("clean", rows_file, tmp_path, capsys)[0] == 2
    assert read(out) == GOOD
    shutil.rmtree(tmp_path / ".out.jsonl.luthier", ignore_errors=True)
    assert main(["data", "audit", str(rows_file), "--workers", "0"]) == 2
    assert "--workers 0" in capsys.readouterr().err
