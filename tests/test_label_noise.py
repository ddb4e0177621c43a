"""Wrong labels: confident learning by hand and beside cleanlab, its classifier beside scikit-learn, and end to end."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
import torch

from luthier.cli import main
from luthier.errors import ConfigError, DataError
from luthier.prepare import noise_model
from luthier.prepare.audit import audit
from luthier.prepare.bag_of_words import LETTERS, Features, Words, chosen
from luthier.prepare.checks.label_noise import FILE, label_of
from luthier.prepare.clean import clean
from luthier.prepare.confident import issues, joint
from luthier.prepare.held_out import AT_LEAST, Learning, drawn, folds_of, held_out
from luthier.prepare.logistic import Matrix, fitted, vocabulary
from luthier.prepare.recipe import recipe
from luthier.prepare.views import view

FILTERS = ("prune_by_noise_rate", "prune_by_class", "both", "confident_learning", "predicted_neq_given")
# Labels a a a a b b b b. Thresholds: a (.9+.8+.7+.2)/4 = .65, b (.9+.8+.6+.3)/4 = .65.
# Row 3 (a) is confidently of b, row 7 (b) of a; row 6 (b, .6) of none.
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1])
OF_A = np.array([0.9, 0.8, 0.7, 0.2, 0.1, 0.2, 0.4, 0.7])
BY_HAND = np.stack([OF_A, 1 - OF_A], axis=1)


def test_joint_by_hand():
    """Counts [[3, 1], [1, 2]]; four a line: 4 x [3/4, 1/4] = [3, 1], and 4 x [1/3, 2/3] = [1.33, 2.67] -> [1, 3]."""
    found = joint(LABELS, BY_HAND)
    np.testing.assert_allclose(found.thresholds, [0.65, 0.65])
    assert found.classes.tolist() == [0, 0, 0, 1, 1, 1, -1, 0]
    assert found.counts.tolist() == [[3, 1], [1, 2]]
    assert found.estimated.tolist() == [[3, 1], [1, 3]]
    assert found.noise == 0.25
    for way in FILTERS:
        assert np.flatnonzero(issues(LABELS, BY_HAND, found, way)).tolist() == [3, 7], way


def test_ways_to_choose_differ_by_hand():
    """Three classes, five rows of a: by noise rate the largest margin for each other class, by class the least p(a)."""
    labels = np.array([0, 0, 0, 0, 0, 1, 2])
    given = np.array([
        [0.8, 0.1, 0.1], [0.8, 0.1, 0.1],
        [0.1, 0.85, 0.05],  # confidently b
        [0.05, 0.1, 0.85],  # confidently c
        [0.02, 0.49, 0.49],  # the least of a, and of nothing surely
        [0.1, 0.8, 0.1], [0.1, 0.1, 0.8],
    ])  # fmt: skip
    found = joint(labels, given)
    assert found.counts.tolist() == [[2, 1, 1], [0, 1, 0], [0, 0, 1]]
    assert found.estimated.tolist() == [[3, 1, 1], [0, 1, 0], [0, 0, 1]]  # 2.5, 1.25, 1.25
    chosen = {way: np.flatnonzero(issues(labels, given, found, way)).tolist() for way in FILTERS}
    assert chosen == {
        "prune_by_noise_rate": [2, 3], "prune_by_class": [3, 4], "both": [3], "confident_learning": [2, 3],
        "predicted_neq_given": [2, 3, 4],
    }  # fmt: skip


def test_one_that_reaches_several_thresholds_is_of_the_likeliest_of_these():
    """As the paper has it: a third class that is likelier but does not reach its own threshold is left out."""
    labels = np.array([0, 1, 2, 0])
    given = np.array([[0.3, 0.3, 0.4], [0.3, 0.3, 0.4], [0.0, 0.1, 0.9], [0.2, 0.35, 0.45]])
    found = joint(labels, given)
    np.testing.assert_allclose(found.thresholds, [0.25, 0.3, 0.9])
    assert found.classes.tolist() == [0, 0, 2, 1]


def test_a_class_without_rows_or_without_sure_ones():
    labels = np.array([0, 0, 2])
    given = np.array([[0.9, 0.0, 0.1], [0.8, 0.1, 0.1], [0.85, 0.05, 0.1]])
    found = joint(labels, given)
    assert found.thresholds[1] == np.inf
    assert found.counts[2].tolist() == [1, 0, 0]
    assert found.estimated.sum(axis=1).tolist() == [2, 0, 1]
    assert not issues(labels, given, found, "prune_by_noise_rate")[:2].any()


@pytest.mark.parametrize("way", FILTERS)
def test_the_same_rows_as_cleanlab(way):
    cleanlab = pytest.importorskip("cleanlab.filter")
    rng = np.random.default_rng(3)
    for count in (2, 4):
        labels = rng.integers(0, count, 600)
        true = np.where(rng.random(600) < 0.1, rng.integers(0, count, 600), labels)
        given = rng.dirichlet(np.ones(count), 600) + 1.5 * np.eye(count)[true] * rng.random((600, 1))
        given /= given.sum(axis=1, keepdims=True)
        found = joint(labels, given)
        # cleanlab takes the likeliest class of all where several thresholds are reached: rows where that differs go.
        reached = given >= found.thresholds - 1e-6
        same = (reached.sum(axis=1) < 2) | reached[np.arange(600), given.argmax(axis=1)]
        assert same.mean() > 0.9
        wrong = issues(labels, given, found, way)
        theirs = cleanlab.find_label_issues(labels, given, filter_by=way, n_jobs=1)
        assert wrong.sum() > 20
        assert (wrong != theirs).sum() <= (0 if same.all() else 0.02 * 600)
        if count == 2:
            assert same.all()


# ---------------------------------------------------------------------------- the classifier


def features(texts):
    words = Words()
    parts = [words.of(text.encode().split()) for text in texts]
    ends = np.cumsum([0, *(len(ids) for ids, _ in parts)])
    return Features(ends, np.concatenate([ids for ids, _ in parts]), np.concatenate([times for _, times in parts]))


def test_features_are_words_pairs_and_runs_of_letters():
    ids, times = Words().of([b"ab", b"cd", b"ab"])
    # Two words, two pairs; of " ab cd ab " seven runs of four, of which " ab " is there twice, as the word is.
    assert len(ids) == 2 + 2 + len(" ab cd ab ") - LETTERS
    assert sorted(times.tolist()) == [1] * 8 + [2] * 2
    assert (np.diff(ids) > 0).all()
    assert len(Words(letters=False).of([b"ab", b"cd", b"ab"])[0]) == 4
    assert len(Words().of([])[0]) == 0
    again, _ = Words().of([b"ab", b"cd", b"ab"])
    assert (ids == again).all()


def texts_of(count, noise=0.0, seed=0):
    """Texts of three kinds with words of their own and many in common."""
    rng = random.Random(seed)
    kinds = {
        "sea": "ship wave sailor harbour tide",
        "farm": "cow barn wheat plough hay",
        "sky": "star moon comet orbit sun",
    }
    common = re.findall("[a-z]+", "the a of over under near big small old new one two saw went came was")
    rows, bad = [], []
    for number in range(count):
        kind = rng.choice(list(kinds))
        words = [rng.choice(kinds[kind].split()) for _ in range(3)] + [rng.choice(common) for _ in range(6)]
        rng.shuffle(words)
        label = kind
        if rng.random() < noise:
            label = rng.choice([k for k in kinds if k != kind])
            bad.append(number)
        rows.append({"text": f"{' '.join(words)} {number}", "label": label, "kind": kind})
    return rows, bad


def test_logistic_regression_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.linear_model")
    rows, _ = texts_of(150, 0.1)
    matrix = Matrix(features([row["text"] for row in rows]))
    labels = np.array([["farm", "sea", "sky"].index(row["label"]) for row in rows])
    share = np.where(np.arange(150) % 3 == 0, 0.25, 1.0).astype(np.float32)
    weights, bias = fitted(matrix, torch.from_numpy(labels), torch.from_numpy(share), 3, 2.0, 200)
    ours = (matrix.times(weights) + bias).softmax(-1).numpy()
    dense = matrix.times(torch.eye(matrix.width)).numpy()
    np.testing.assert_allclose((dense**2).sum(axis=1), 1, rtol=1e-5)
    made = sklearn.LogisticRegression(C=2.0, tol=1e-8, max_iter=2000).fit(dense, labels, sample_weight=share)
    theirs = made.predict_proba(dense)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    back = matrix.back(torch.from_numpy(ours))
    torch.testing.assert_close(back, torch.from_numpy(dense.T @ ours), atol=1e-4, rtol=1e-4)


def test_no_row_is_predicted_by_a_classifier_that_learnt_it():
    """A row's label decides nothing of its own prediction: all labels of a fold changed, its predictions stay."""
    rows, _ = texts_of(60)
    matrix = Matrix(features([row["text"] for row in rows]))
    labels = np.arange(60) % 3
    folds = folds_of(labels, 4, 0)
    assert np.bincount(folds).tolist() == [15, 15, 15, 15]
    assert np.bincount(labels[folds == 0]).tolist() == [5, 5, 5]
    right = np.ones(60, bool)
    before = held_out(matrix, labels, right, 3, 4, 0, 1.0, 30)
    again = held_out(matrix, labels, right, 3, 4, 0, 1.0, 30)
    assert (before == again).all()
    out = folds == 0
    share, hidden = torch.from_numpy(~out).float(), torch.from_numpy(np.where(out, 0, labels))
    weights, bias = fitted(matrix, hidden, share, 3, 1.0, 30)
    assert (before[out] == (matrix.times(weights) + bias).softmax(-1).numpy()[out]).all()


def test_copies_stand_in_one_fold_and_count_as_one():
    alike = np.array([0, 1, 2, 0, 3, 0, 4, 5, 1, 6, 7])
    labels = np.array([0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1])  # row 3 is a copy of row 0 with another label
    folds = folds_of(labels, 4, 0, alike)
    for number in range(8):
        assert len(set(folds[alike == number])) == 1
    first = [0, 1, 2, 4, 6, 7, 9, 10]
    assert np.bincount(folds[first]).tolist() == [2, 2, 2, 2]
    rows, _ = texts_of(60)
    texts, labels = [row["text"] for row in rows], np.arange(60) % 3
    one = held_out(Matrix(features(texts)), labels, np.ones(60, bool), 3, 4, 0, 1.0, 200, np.arange(60))
    thrice = np.r_[np.arange(60), [7] * 20]
    matrix = Matrix(features(texts))
    ids, starts, values = (t.numpy() for t in matrix.by_row)  # its own, as copies change how frequent words are
    ends = np.r_[starts, len(ids)]
    pieces = [(ids[ends[i] : ends[i + 1]], values[ends[i] : ends[i + 1]]) for i in thrice]
    copied = Matrix.__new__(Matrix)
    copied.rows, copied.width = len(thrice), matrix.width
    lines = np.repeat(np.arange(len(thrice)), [len(p[0]) for p in pieces])
    all_ids, all_values = np.concatenate([p[0] for p in pieces]), np.concatenate([p[1] for p in pieces])
    copied.by_row = Matrix._held(lines, all_ids, all_values, len(thrice))
    order = np.argsort(all_ids, kind="stable")
    copied.by_feature = Matrix._held(all_ids[order], lines[order].astype(np.int32), all_values[order], matrix.width)
    many = held_out(copied, labels[thrice], np.ones(80, bool), 3, 4, 0, 1.0, 200, thrice)
    np.testing.assert_allclose(many[:60], one, atol=2e-3)
    assert (many[60:] == many[7]).all()


# ---------------------------------------------------------------------------- end to end


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def only(**settings):
    return recipe({"checks": {"label_noise": settings}})


def test_wrong_rows_that_stand_there_many_times_are_found(tmp_path):
    """Nine copies with a wrong label, some with words exchanged or in capitals, do not speak for one another."""
    rows, bad = texts_of(400, 0.08)
    copies = []
    for number in bad[:10]:
        words = rows[number]["text"].split()
        texts = [" ".join(words), " ".join(words).upper(), " ".join([words[1], words[0], *words[2:]])] * 3
        copies += [{**rows[number], "text": text} for text in texts]
    source = write(tmp_path / "rows.jsonl", [{"text": r["text"], "label": r["label"]} for r in rows + copies])
    audit(str(source), tmp_path / "audit", only(), workers=1)
    found = {finding["row"] for finding in read(tmp_path / "audit/findings.jsonl")}
    wrong = {*bad, *range(400, 490)}
    assert len(found & wrong) >= 0.95 * len(wrong)
    assert len(found & wrong) >= 0.9 * len(found)


def test_planted_labels_are_found_repaired_and_found_no_more(tmp_path):
    rows, bad = texts_of(400, 0.08)
    source = write(tmp_path / "rows.jsonl", [{"review": r["text"], "stars": r["label"]} for r in rows])
    columns = {"columns": {"text": "review", "label": "stars"}}
    made = audit(str(source), tmp_path / "audit", recipe(columns, {"checks": {"label_noise": {}}}), workers=1)
    found = [finding["row"] for finding in read(tmp_path / "audit/findings.jsonl")]
    assert len(set(found) & set(bad)) >= 0.95 * len(bad)
    assert len(set(found) & set(bad)) >= 0.9 * len(found)
    summary = made["checks"]["label_noise"]["summary"]
    assert summary["judged"] == 400
    assert abs(summary["estimated_noise"] - len(bad) / 400) < 0.02
    lines = read(tmp_path / "audit" / FILE)
    assert [line["row"] for line in lines] == found
    assert all(line["text"] == rows[line["row"]]["text"] for line in lines)
    with pytest.raises(ConfigError, match="corrections"):
        clean(str(source), tmp_path / "x.jsonl", only(action="repair"))
    mending = recipe(tmp_path / "audit/recipe.yaml", "checks.label_noise.action=repair")
    told = clean(str(source), tmp_path / "clean.jsonl", mending, workers=1)
    assert told["why_changed"] == {"label_noise": {"mislabelled": len(found)}}
    cleaned = read(tmp_path / "clean.jsonl")
    right = sum(new["stars"] == old["kind"] for new, old in zip(cleaned, rows))
    assert right >= 400 - 0.1 * len(bad)
    changed = read(tmp_path / "clean.changed.jsonl")
    assert [row["row"] for row in changed] == found
    for row in changed:
        assert row["values"] == {"review": rows[row["row"]]["text"], "stars": rows[row["row"]]["label"]}
    clean(str(tmp_path / "clean.jsonl"), tmp_path / "twice.jsonl", mending, workers=1)
    assert (tmp_path / "twice.jsonl").read_bytes() == (tmp_path / "clean.jsonl").read_bytes()
    dropping = recipe(tmp_path / "audit/recipe.yaml", "checks.label_noise.action=drop")
    assert clean(str(source), tmp_path / "fewer.jsonl", dropping, workers=1)["kept"] == 400 - len(found)


def test_a_person_decides_by_the_file(tmp_path):
    """Lines that are taken out are not done; equal texts with labels that would change places stay."""
    rows = [{"text": "one two", "label": "a"}, {"text": "one two", "label": "b"}, {"text": "three", "label": 1}]
    source = write(tmp_path / "rows.jsonl", rows)
    from luthier.prepare.checks.label_noise import text_hash

    one, three = (text_hash(view(row)).hex() for row in rows[1:])
    chosen = [
        {"text_hash": one, "label": "a", "suggested": "b"},
        {"text_hash": one, "label": "b", "suggested": "a"},
        {"text_hash": three, "label": "1", "suggested": 2},
    ]
    file = write(tmp_path / "corrections.jsonl", chosen)
    clean(str(source), tmp_path / "out.jsonl", only(action="repair", corrections=str(file)), workers=1)
    assert read(tmp_path / "out.jsonl") == [*rows[:2], {"text": "three", "label": 2}]
    write(file, chosen[:1])
    clean(str(source), tmp_path / "other.jsonl", only(action="repair", corrections=str(file)), workers=1)
    assert [row["label"] for row in read(tmp_path / "other.jsonl")] == ["b", "b", 1]
    file.write_text('{"text_hash": "zz", "label": "a", "suggested": "b"}\n')
    with pytest.raises(DataError, match=r"corrections.jsonl:1"):
        clean(str(source), tmp_path / "bad.jsonl", only(action="repair", corrections=str(file)), workers=1)


@pytest.mark.parametrize("as_file", [True, False])
def test_predictions_of_your_own(tmp_path, as_file):
    rows = [{"text": f"row {n}", "label": "ab"[label]} for n, label in enumerate(LABELS)]
    if as_file:
        given = np.concatenate([[[0.5, 0.5]], BY_HAND[:4], [[0.1, 0.9]], BY_HAND[4:]])
        rows = [{"text": "no label"}, *rows[:4], {"text": "nor here"}, *rows[4:]]
        np.savez(tmp_path / "p.npz", probabilities=given, classes=np.array(["a", "b"]))
        settings = {"predictions": str(tmp_path / "p.npz")}
    else:
        rows = [{**row, "p": {"a": float(p), "b": float(1 - p)}} for row, p in zip(rows, OF_A)]
        settings = {"predictions": "p"}
    audit(str(write(tmp_path / "rows.jsonl", rows)), tmp_path / "audit", only(**settings), workers=1)
    found = read(tmp_path / "audit/findings.jsonl")
    assert [finding["row"] for finding in found] == ([4, 9] if as_file else [3, 7])
    assert found[0]["detail"] == "labelled 'a', looks like 'b': 0.800"
    least = only(**settings, least=0.75)
    audit(str(tmp_path / "rows.jsonl"), tmp_path / "sure", least, workers=1)
    assert len(read(tmp_path / "sure/findings.jsonl")) == 1


@pytest.mark.parametrize(("arrays", "message"), [
    ({"probabilities": BY_HAND[:5], "classes": np.array(["a", "b"])}, "5 lines, and row 7"),
    ({"probabilities": BY_HAND, "classes": np.array(["a", "c"])}, "labelled 'b', which `classes` has not"),
    ({"probabilities": BY_HAND * 2, "classes": np.array(["a", "b"])}, "line 0 is no distribution"),
    ({"probabilities": BY_HAND[:, :1], "classes": np.array(["a", "b"])}, r"shape \[8, 1\], and there are 2 classes"),
    ({"probabilities": BY_HAND}, "it needs the arrays"),
    ({"probabilities": np.array([object()]), "classes": np.array(["a"])}, "no .npz file of numbers"),
])  # fmt: skip
def test_bad_predictions(tmp_path, arrays, message):
    rows = [{"text": f"row {n}", "label": "ab"[label]} for n, label in enumerate(LABELS)]
    np.savez(tmp_path / "p.npz", **arrays)
    source = str(write(tmp_path / "r.jsonl", rows))
    with pytest.raises(DataError, match=message):
        audit(source, tmp_path / "a", only(predictions=str(tmp_path / "p.npz")), workers=1)


def test_bad_columns_and_files(tmp_path):
    rows = [{"text": f"row {n}", "label": "ab"[label], "p": [0.1, 0.9]} for n, label in enumerate(LABELS)]
    source = str(write(tmp_path / "r.jsonl", rows))
    with pytest.raises(DataError, match=r"r.jsonl:1: .* no probabilities by the names"):
        audit(source, tmp_path / "a", only(predictions="p"), workers=1)
    with pytest.raises(DataError, match="no labelled row has probabilities"):
        audit(source, tmp_path / "b", only(predictions="q"), workers=1)
    with pytest.raises(ConfigError, match="there is no file"):
        only(predictions="nowhere.npz")
    with pytest.raises(ConfigError, match="filter_by"):
        only(filter_by="prune")
    with pytest.raises(ConfigError, match="did you mean 'rounds'"):
        only(round=3)


@pytest.mark.parametrize(("row", "label"), [
    ({"text": "x", "label": "a"}, "a"), ({"text": "x", "label": 3}, "3"), ({"text": "x", "label": True}, "true"),
    ({"text": "x", "label": None}, None), ({"text": "x", "label": 0.5}, None), ({"text": "x", "labels": ["a"]}, None),
    ({"text": "x"}, None), ({"prompt": "q", "completion": "a", "label": True}, None),
    ({"messages": [{"role": "user", "content": "x"}], "label": "a"}, "a"),
    ({"messages": [{"role": "user", "content": "x"}], "label": True}, None),
])  # fmt: skip
def test_which_rows_are_labelled(row, label):
    assert label_of(view(row)) == label


def test_pieces_and_processes_change_nothing_and_few_rows_are_not_judged(tmp_path):
    rows, _ = texts_of(120, 0.1)
    rows += [{"text": "a lone text", "label": "rare {0}"}, {"text": "no label at all"}]
    rows += [{"text": "value", "label": 0.25}]
    write(tmp_path / "one.jsonl", rows)
    for number in range(3):
        (tmp_path / "many").mkdir(exist_ok=True)
        write(tmp_path / f"many/{number}.jsonl", rows[41 * number : 41 * (number + 1)])
    one = audit(str(tmp_path / "one.jsonl"), tmp_path / "a", only(), workers=1)["checks"]["label_noise"]
    many = audit(str(tmp_path / "many"), tmp_path / "b", only(), workers=2)["checks"]["label_noise"]
    for made in (one, many):
        made["summary"].pop("files", None)
        for example in made["examples"]:
            example.pop("place")
    assert one == many
    assert (one["summary"]["rows"], one["summary"]["judged"], one["summary"]["classes"]) == (121, 120, 4)


def test_nothing_to_judge(tmp_path):
    for name, rows in {"one": [{"text": f"x {n}", "label": "a"} for n in range(9)], "none": [{"text": "x"}] * 3,
                       "few": [{"text": f"x {n}", "label": f"{n}"} for n in range(4)]}.items():  # fmt: skip
        made = audit(str(write(tmp_path / f"{name}.jsonl", rows)), tmp_path / name, only(), workers=1)
        assert made["checks"]["label_noise"]["rows"] == 0, name
        assert made["checks"]["label_noise"]["summary"]["judged"] == 0, name


def test_from_the_command_line(tmp_path, capsys):
    rows, bad = texts_of(300, 0.08)
    source = write(tmp_path / "rows.jsonl", rows)
    code = main(["data", "audit", str(source), "--json", "--quiet", "--workers", "1", "--set",
                 "checks.label_noise={allowed: 0.02}"])  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert code == 8
    assert "label_noise" in told["faults"]
    assert told["checks"]["label_noise"]["rows"] >= 0.8 * len(bad)
    assert "files" not in told["checks"]["label_noise"]["summary"]
