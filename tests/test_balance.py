"""Class balance: rare, missing, undeclared and dominant classes, by hand; each finding at its rows."""

from __future__ import annotations

import json

import pytest

from luthier.errors import ConfigError
from luthier.prepare.audit import audit
from luthier.prepare.recipe import recipe


def told(tmp_path, labels, workers=1, **settings):
    """(findings as (row, what, detail), the summary)"""
    source = tmp_path / "rows"
    source.mkdir()
    for number, part in enumerate((labels[: len(labels) // 2], labels[len(labels) // 2 :])):
        rows = [{"text": f"{number} {n}"} | ({} if label is None else {"label": label}) for n, label in enumerate(part)]
        (source / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = audit(str(source), tmp_path / "audit", recipe({"checks": {"balance": settings}}), workers=workers)
    lines = [json.loads(line) for line in (tmp_path / "audit/findings.jsonl").read_text().splitlines()]
    return [(line["row"], line["what"], line["detail"]) for line in lines], made["checks"]["balance"]


def test_even_classes(tmp_path):
    found, one = told(tmp_path, ["a", "b"] * 10)
    assert found == []
    assert one["summary"] == {
        "rows": 20, "classes": 2, "counts": {"a": 10, "b": 10}, "largest": {"class": "a", "share": 0.5},
        "rarest": {"class": "a", "rows": 10, "share": 0.5}, "missing": [],
    }  # fmt: skip
    assert "Rows of each class" in (tmp_path / "audit/audit.html").read_text()


@pytest.mark.parametrize("workers", [1, 2])
def test_rare_and_missing_over_pieces(tmp_path, workers):
    """40 a, 20 b, 2 c, no d: 62 / 4 = 15.5 on average; c has fewer than 5."""
    labels = [None, *["a", "b", "a"] * 20, "c", "c"]
    labels[10], labels[62] = labels[62], labels[10]  # one c in each piece
    found, one = told(tmp_path, labels, workers, classes=["a", "b", "c", "d"])
    rare = "one of 2 rows labelled 'c'; a class has 16 on average"
    assert found == [(1, "missing", "no row is labelled 'd'"), (10, "rare", rare), (61, "rare", rare)]
    assert one["summary"]["missing"] == ["d"]
    assert one["summary"]["rarest"] == {"class": "d", "rows": 0, "share": 0.0}


def test_what_is_missing_is_told_where_nothing_else_is(tmp_path):
    """The first row is of a rare class, the second the first of one that has nearly everything."""
    found, one = told(tmp_path, ["c", *["a"] * 30], classes=["a", "b", "c", "d"])
    assert [(row, what) for row, what, _ in found] == [(0, "rare"), (1, "dominant"), (2, "missing")]
    assert found[2][2] == "no row is labelled 'b', 'd'"
    assert one["summary"]["missing"] == ["b", "d"]
    (tmp_path / "next").mkdir()
    found, _ = told(tmp_path / "next", ["a"], classes=["a", "b"])  # one row has to do for both
    assert found == [(0, "single", "all 1 rows are labelled 'a'; no row is labelled 'b'")]


def test_rare_by_share(tmp_path):
    """96 a, 4 b: rare below 10 % of 50."""
    found, _ = told(tmp_path, ["a"] * 96 + ["b"] * 4, fewest=0, largest=1.0)
    assert found == [(row, "rare", "one of 4 rows labelled 'b'; a class has 50 on average") for row in range(96, 100)]
    (tmp_path / "next").mkdir()
    assert told(tmp_path / "next", ["a"] * 95 + ["b"] * 5, fewest=0, largest=1.0)[0] == []


def test_dominant_and_single(tmp_path):
    found, _ = told(tmp_path, ["b{0}", *["a"] * 10], fewest=0, rarest=0.0)
    assert found == [(1, "dominant", "10 of 11 rows (90.9%) are labelled 'a'")]
    (tmp_path / "next").mkdir()
    found, one = told(tmp_path / "next", [None, "a", "a"], allowed=0.0)
    assert found == [(1, "single", "all 2 rows are labelled 'a'")]
    assert not one["sound"]


def test_undeclared_with_the_nearest(tmp_path):
    found, _ = told(tmp_path, ["good", "bad", "goood"] * 2, classes=["good", "bad"], fewest=0)
    detail = "'goood' is none of the 2 classes; did you mean 'good'?"
    assert found == [(2, "undeclared", detail), (5, "undeclared", detail)]


def test_rows_without_labels(tmp_path):
    assert told(tmp_path, [None, None])[1]["summary"] == {"rows": 0}


def test_bad_settings():
    with pytest.raises(ConfigError, match="'a' is named twice"):
        recipe({"checks": {"balance": {"classes": ["a", "a"]}}})
    with pytest.raises(ConfigError, match="action"):
        recipe({"checks": {"balance": {"action": "drop"}}})
