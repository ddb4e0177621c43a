"""Splits: sizes to the row, equal rows and groups together, classes in shares, times in order; kills, bad input."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter

import numpy as np
import pytest
import yaml
from test_train import killed

from luthier.cli import main
from luthier.errors import ConfigError, DataError
from luthier.prepare import split as splits
from luthier.prepare.card import sha256
from luthier.prepare.split import Split, placed, quotas, seconds, sizes_of, split


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(count, **more):
    return [{"text": f"row {i}", **{key: of(i) for key, of in more.items()}} for i in range(count)]


def parted(tmp_path, rows, text="train=0.8,test=0.2", **more):
    source = write(tmp_path / "rows.jsonl", rows)
    report = split(source, tmp_path / "out", Split(sizes_of(text), **more), workers=1)
    return report, {name: read(tmp_path / "out" / f"{name}.jsonl") for name in report["files"]}


@pytest.mark.parametrize(
    ("text", "count", "wanted"),
    [
        ("a=0.9,b=0.1", 10, [9, 1]),
        ("a=0.5,b=0.25,c=0.25", 10, [5, 3, 2]),  # 5, 2.5, 2.5: the remainder goes to the first of equals
        ("a=0.6,b=0.2,c=0.2", 11, [7, 2, 2]),  # 6.6, 2.2, 2.2
        ("a,b=3,c=0.25", 10, [5, 3, 2]),
        ("a=4,b", 10, [4, 6]),
    ],
)
def test_sizes_are_these_numbers_of_rows(text, count, wanted):
    assert quotas(sizes_of(text), count).tolist() == wanted


def test_rows_made_of_others_go_with_their_parents(tmp_path):
    """Copies by `luthier data augment`, without the given rows, too; a parent is told by its own line of JSON."""
    from luthier.prepare.augment.recipe import augmentation
    from luthier.prepare.augment.writing import augment

    rows = [{"prompt": f"what is number {i} of them all", "completion": str(i), "_source": {"row": i}}
            for i in range(60)]  # fmt: skip
    for given in (True, False):
        source = write(tmp_path / f"in-{given}.jsonl", rows)
        made = augmentation({"ways": {"characters": {"copies": 3}}, "given": given})
        augment(source, tmp_path / f"more-{given}.jsonl", made, workers=1)
        report = split(str(tmp_path / f"more-{given}.jsonl"), tmp_path / f"out-{given}",
                       Split(sizes_of("train=0.75,test=0.25"), stratify="completion"), workers=1)  # fmt: skip
        sides = [read(tmp_path / f"out-{given}" / f"{name}.jsonl") for name in report["files"]]
        assert all(sides)
        assert {row["completion"] for row in sides[0]}.isdisjoint({row["completion"] for row in sides[1]})
    rows = [{"text": "a", "_parent": "me"}, {"text": "b"}]
    with pytest.raises(DataError, match=r"rows.jsonl:1: _parent names no parent by its sha256"):
        parted(tmp_path, rows, "a=0.5,b=0.5")


def test_every_row_is_on_one_side_and_sizes_are_exact(tmp_path):
    rows = texts(1000)
    report, sides = parted(tmp_path, rows, "train,validation=57,test=0.1")
    assert [len(side) for side in sides.values()] == [843, 57, 100]
    assert [report["sides"][name]["rows"] for name in sides] == [843, 57, 100]
    assert sorted(row["text"] for side in sides.values() for row in side) == sorted(row["text"] for row in rows)
    order = [row["text"] for row in sides["train"]]
    assert order == [row["text"] for row in rows if row["text"] in set(order)]  # as they stood
    how = Split(sizes_of("train,test=100"), seed=1)
    other = split(str(tmp_path / "rows.jsonl"), tmp_path / "other", how, workers=1)
    assert other["sides"]["test"]["rows"] == 100
    assert read(tmp_path / "other" / "test.jsonl") != sides["test"]


def test_rows_that_say_the_same_stay_together_wherever_they_come_from(tmp_path):
    rows = [{"text": f"row {i % 200}", "_source": {"row": i}} for i in range(1000)]
    _, sides = parted(tmp_path, rows)
    said = [{row["text"] for row in side} for side in sides.values()]
    assert not said[0] & said[1]
    assert len(sides["test"]) == 200


def test_rows_that_are_added_move_few_others(tmp_path):
    units, how = np.array([splits.hashed(i) for i in range(10_500)], np.uint64), Split(sizes_of("a=0.9,b=0.1"))
    before, after = placed({"unit": units[:10_000]}, how), placed({"unit": units}, how)
    assert (before != after[:10_000]).mean() < 0.01  # by a new split at random it would be 0.18


def test_groups_are_on_one_side(tmp_path):
    rows = texts(3000, user=lambda i: {"id": i * i % 211})
    _, sides = parted(tmp_path, rows, "train=0.8,validation=0.1,test=0.1", group="user.id")
    users = [{row["user"]["id"] for row in side} for side in sides.values()]
    assert sum(map(len, users)) == len(set.union(*users))
    assert [len(side) for side in sides.values()] == pytest.approx([2400, 300, 300], abs=30)  # a group has up to 29


def test_classes_have_the_shares_that_scikit_learn_gives_them(tmp_path):
    from sklearn.model_selection import train_test_split

    rows = texts(1003, label=lambda i: "abbcccc"[i % 7] if i % 50 else "rare")
    report, sides = parted(tmp_path, rows, stratify="label")
    labels = [row["label"] for row in rows]
    train, test = train_test_split(rows, test_size=len(sides["test"]), stratify=labels, random_state=0)
    for theirs, (name, ours) in zip((train, test), sides.items()):
        counted = Counter(row["label"] for row in ours)
        for label, count in Counter(row["label"] for row in theirs).items():
            assert abs(counted[label] - count) <= 1
        assert report["sides"][name]["classes"] == counted
    assert report["lacking"] == {}


def test_groups_of_several_classes_keep_both(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"text": f"{g} {i}", "doc": int(g), "label": "ab"[int(rng.random() < 0.1 + 0.2 * (g % 3))]}
            for g in range(150) for i in range(int(rng.integers(1, 30)))]  # fmt: skip
    report, sides = parted(tmp_path, rows, "train=0.7,validation=0.15,test=0.15", group="doc", stratify="label")
    docs = [{row["doc"] for row in side} for side in sides.values()]
    assert sum(map(len, docs)) == len(set.union(*docs))
    share = np.mean([row["label"] == "b" for row in rows])
    for name, wanted in zip(sides, (0.7, 0.15, 0.15)):
        assert report["sides"][name]["share"] == pytest.approx(wanted, abs=0.01)
        assert np.mean([row["label"] == "b" for row in sides[name]]) == pytest.approx(share, abs=0.02)


def test_by_time_a_side_is_older_than_the_next(tmp_path):
    rows = texts(200, at=lambda i: f"2026-01-{1 + i * 7 % 28:02}T12:00:00Z")
    _, sides = parted(tmp_path, rows, "train=0.5,validation=0.25,test=0.25", time="at")
    times = [[row["at"] for row in side] for side in sides.values()]
    assert max(times[0]) < min(times[1])  # one moment is on one side
    assert max(times[1]) < min(times[2])
    assert [len(t) for t in times] == pytest.approx([100, 50, 50], abs=8)


def test_cuts_are_first_times(tmp_path):
    rows = texts(5, at=lambda i: ["2025-12-31T23:59:59Z", "2026-01-01T00:00:00Z", 1767225600, "2026-02-01", "2027"][i])
    cuts = splits.cuts_of("validation=2026-01-01,test=2026-02-01")
    _, sides = parted(tmp_path, rows, "train,validation,test", time="at", cuts=cuts)
    found = [[row["text"][4:] for row in side] for side in sides.values()]
    assert found == [["0"], ["1", "2"], ["3", "4"]]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(1767225600, 1767225600.0), (1767225600000, 1767225600.0), ("1767225600", 1767225600.0), ("2026", 1767225600.0),
     ("2026-01-01", 1767225600.0), ("2026-01-01T01:00:00+01:00", 1767225600.0), ("20260101", 1767225600.0)],
)  # fmt: skip
def test_times(value, wanted):
    assert seconds(value) == wanted


def test_a_killed_split_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    for shard in range(3):
        write(tmp_path / f"{shard}.jsonl", texts(100, shard=lambda i, s=shard: s))
    source, how = [str(tmp_path / f"{shard}.jsonl") for shard in range(3)], Split(sizes_of("train=0.9,test=0.1"))
    split(source, tmp_path / "whole", how, workers=1)
    rename, told = os.replace, []

    def counted(*given):
        told.append(1)
        rename(*given)

    monkeypatch.setattr(os, "replace", counted)
    split(source, tmp_path / "counted", how, workers=1)
    for at in range(len(told)):
        left = iter(range(at))

        def dying(*given, left=left):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*given)

        def work(at=at, dying=dying):
            monkeypatch.setattr(os, "replace", dying)
            split(source, tmp_path / str(at), how, workers=1)

        killed(work)
        monkeypatch.setattr(os, "replace", rename)
        split(source, tmp_path / str(at), how, workers=1)
        for name in ("train.jsonl", "test.jsonl"):
            assert (tmp_path / str(at) / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_card_says_what_is_there_and_how_it_was_made(tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", texts(50, label=lambda i: "a|b"[i % 3]))
    out = tmp_path / "out"
    told = ["--sizes", "train=0.8,test=0.2", "--stratify", "label", "--license", "cc-by-4.0", "--workers", "2"]
    assert main(["data", "split", source, str(out), *told, "--quiet"]) == 0
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["license"] == "cc-by-4.0"
    assert head["configs"][0]["data_files"] == [
        {"split": "train", "path": "train.jsonl"}, {"split": "test", "path": "test.jsonl"}
    ]
    assert sha256(out / "train.jsonl") in card
    assert sha256(tmp_path / "rows.jsonl") in card
    assert "luthier data split rows.jsonl out --sizes train=0.8,test=0.2 --stratify label" in card
    assert "| \\| |" in card
    assert "40 rows" in capsys.readouterr().out


def test_what_is_written_is_what_the_hub_s_library_reads(tmp_path):
    import datasets

    source = write(tmp_path / "rows.jsonl", texts(50))
    assert main(["data", "split", source, str(tmp_path / "out"), "--sizes", "train,validation=5", "--quiet"]) == 0
    found = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(side) for name, side in found.items()} == {"train": 45, "validation": 5}


@pytest.mark.parametrize(
    ("text", "more", "problem"),
    [
        ("train=0.9", {}, "two sides or more"),
        ("train=0.9,test=0.2", {}, "add up to 1.1"),
        ("train=0.5,test=0.2", {}, "rows are left; name a side without a size"),
        ("train,test", {}, "only one side can have the rest"),
        ("train,../test=0.1", {}, "is no name of a side"),
        ("train,test=0", {}, "test=0"),
        ("train,test=0.1", {"time": "at", "group": "x"}, "use one"),
        ("train,test", {"cuts": {"test": 1.0}}, "say with --time KEY"),
        ("train,a,b", {"time": "at", "cuts": {"a": 2.0, "b": 1.0}}, "not in order"),
        ("train,a,b", {"time": "at", "cuts": {"a": 2.0}}, "first time of each side but the first: a, b"),
    ],
)
def test_what_cannot_be_asked_for(tmp_path, text, more, problem):
    with pytest.raises(ConfigError, match=problem):
        parted(tmp_path, texts(10), text, **more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "more", "problem"),
    [
        ("train=0.9,test=0.1", {"stratify": "lable"}, "no 'lable'; the row has 'text', 'label'"),
        ("train=0.9,test=0.1", {"time": "text"}, "is no time"),
        ("train,test=30", {}, "asks for 30 rows, and there are 10"),
        ("train=0.99,test=0.01", {}, "test: no rows of 10 would be there"),
    ],
)
def test_rows_that_cannot_be_parted(tmp_path, text, more, problem):
    with pytest.raises(DataError, match=problem):
        parted(tmp_path, texts(10, label=lambda i: i % 2), text, **more)
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_a_class_with_too_few_rows_is_told(tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", texts(40, label=lambda i: "once" if i == 7 else "often"))
    out = str(tmp_path / "out")
    assert main(["data", "split", source, out, "--sizes", "train=0.9,test=0.1", "--stratify", "label", "--quiet"]) == 0
    assert "test has no row of once: too few of them" in capsys.readouterr().out


def test_another_split_into_the_same_folder_is_refused(tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", texts(20))
    command = ["data", "split", source, str(tmp_path / "out"), "--quiet", "--sizes"]
    assert main([*command, "train=0.5,test=0.5"]) == 0
    assert main([*command, "train=0.5,test=0.5"]) == 0
    assert main([*command, "train=0.9,test=0.1"]) != 0
    assert "was begun otherwise" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["train=x,test", "train=1.5,test", "train=0.5,train=0.5"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="--sizes"):
        sizes_of(text)
