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
from luthier.prepare.checks.label_noise import FILE, LabelNoise, label_of
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


def matrix_of(texts):
    made = features(texts)
    return Matrix(made, vocabulary(made))


def test_chosen_texts_are_as_they_would_be_alone():
    texts = ["one two three", "", "four", "two two one"]
    whole, rows = features(texts), np.array([3, 1, 0])
    for ours, alone in zip(chosen(whole, rows), features([texts[i] for i in rows]), strict=True):
        np.testing.assert_array_equal(ours, alone)


def test_logistic_regression_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.linear_model")
    rows, _ = texts_of(150, 0.1)
    matrix = matrix_of([row["text"] for row in rows])
    labels = np.array([["farm", "sea", "sky"].index(row["label"]) for row in rows])
    share = np.where(np.arange(150) % 3 == 0, 0.25, 1.0).astype(np.float32)
    ours = fitted(matrix, torch.from_numpy(labels), torch.from_numpy(share), 3, 2.0, 200)(matrix)
    dense = matrix.times(torch.eye(matrix.width)).numpy()
    np.testing.assert_allclose((dense**2).sum(axis=1), 1, rtol=1e-5)
    made = sklearn.LogisticRegression(C=2.0, tol=1e-8, max_iter=2000).fit(dense, labels, sample_weight=share)
    theirs = made.predict_proba(dense)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    back = matrix.back(torch.from_numpy(ours))
    torch.testing.assert_close(back, torch.from_numpy(dense.T @ ours), atol=1e-4, rtol=1e-4)


HOW = Learning(folds=4, seed=0, c=1.0, iterations=30, prune=True, most=10_000)


@pytest.mark.parametrize("prune", [True, False])
def test_nothing_that_a_prediction_follows_from_has_seen_the_rows_label(prune):
    """All labels of a fold changed among themselves: the fold's predictions stay to the bit, those of others do not."""
    rows, _ = texts_of(60, 0.1)
    made, alike = features([row["text"] for row in rows]), np.arange(60)
    labels = np.arange(60) % 3
    folds = folds_of(labels, 4, 0, alike)
    assert np.bincount(folds).tolist() == [15, 15, 15, 15]
    assert np.bincount(labels[folds == 0]).tolist() == [5, 5, 5]
    how = HOW._replace(prune=prune)
    before = held_out([made], labels, alike, 3, how)
    assert (before == held_out([made], labels, alike, 3, how)).all()
    other = labels.copy()
    other[folds == 0] = np.roll(labels[folds == 0], 1)  # as many of each
    with pytest.MonkeyPatch.context() as patch:
        as_before = lambda _, count, seed, same: folds_of(labels, count, seed, same)  # noqa: E731
        patch.setattr("luthier.prepare.held_out.folds_of", as_before)
        after = held_out([made], other, alike, 3, how)
    assert (before[folds == 0] == after[folds == 0]).all()
    assert (before[folds != 0] != after[folds != 0]).any()


def test_wrong_rows_are_not_learnt_from():
    """With every fifth label wrong, classifiers that leave out what looks wrong are nearer to the truth."""
    rows, _ = texts_of(300, 0.2)
    names = ["farm", "sea", "sky"]
    labels, true = (np.array([names.index(row[key]) for row in rows]) for key in ("label", "kind"))
    made, alike = features([row["text"] for row in rows]), np.arange(300)
    sure = {
        prune: held_out([made], labels, alike, 3, HOW._replace(prune=prune, c=20.0))[np.arange(300), true].mean()
        for prune in (True, False)
    }
    assert sure[True] > sure[False] + 0.05


def test_no_class_loses_more_than_half_of_its_rows():
    from luthier.prepare.held_out import _looks_wrong

    labels = np.array([0] * 40 + [1] * 6)
    texts = ["one two"] * 40 + ["one two"] * 5 + ["three four"]  # what is labelled 1 looks like 0
    here = np.ones(46, bool)
    share = torch.ones(46)
    matrix = matrix_of(texts)

    def learnt(which):
        return fitted(matrix, torch.from_numpy(labels), share * torch.from_numpy(which), 2, 20.0, 50)

    wrong = _looks_wrong(matrix, labels, here, np.arange(46) % 3, learnt)
    assert wrong[40:].sum() <= 3
    assert not wrong[:40].any()


def test_copies_stand_in_one_fold_and_count_as_one():
    alike = np.array([0, 1, 2, 0, 3, 0, 4, 5, 1, 6, 7])
    labels = np.array([0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1])  # row 3 is a copy of row 0 with another label
    folds = folds_of(labels, 4, 0, alike)
    for number in range(8):
        assert len(set(folds[alike == number])) == 1
    first = [0, 1, 2, 4, 6, 7, 9, 10]
    assert np.bincount(folds[first]).tolist() == [2, 2, 2, 2]
    rows, _ = texts_of(60)
    made, labels = features([row["text"] for row in rows]), torch.arange(60) % 3
    words, thrice = vocabulary(made), np.r_[np.arange(60), [7] * 20]
    one, share = Matrix(made, words), np.where(thrice == 7, 1 / 21, 1.0).astype(np.float32)
    many = Matrix(chosen(made, thrice), words)
    alone = fitted(one, labels, torch.ones(60), 3, 1.0, 200)(one)
    copied = fitted(many, labels[thrice], torch.from_numpy(share), 3, 1.0, 200)(one)
    np.testing.assert_allclose(copied, alone, atol=2e-3)


def test_of_many_rows_some_are_learnt_and_all_are_predicted():
    labels = np.r_[np.zeros(5000, int), np.ones(150, int), np.full(30, 2)]
    rows = drawn(labels, 1000, 0)
    assert (np.diff(rows) > 0).all()
    assert np.bincount(labels[rows]).tolist() == [int(np.ceil(5000 * 1000 / 5180)), AT_LEAST, 30]
    assert (drawn(labels, 1000, 0) == rows).all()
    assert (drawn(labels, 1000, 1) != rows).any()
    assert drawn(labels, 5180, 0).tolist() == [*range(5180)]
    texts, _ = texts_of(1200, 0.05)
    names = ["farm", "sea", "sky"]
    labels, true = (np.array([names.index(row[key]) for row in texts]) for key in ("label", "kind"))
    whole, alike = features([row["text"] for row in texts]), np.arange(1200)
    how = HOW._replace(most=300, c=20.0)
    one = held_out([whole], labels, alike, 3, how)
    parts = [chosen(whole, np.arange(1200)[a:b]) for a, b in ((0, 0), (0, 500), (500, 501), (501, 1200))]
    assert (held_out(parts, labels, alike, 3, how) == one).all()
    assert (one.argmax(axis=1) == true).mean() > 0.97
    assert (held_out([whole], labels, alike, 3, HOW._replace(c=20.0)) != one).any()


# ---------------------------------------------------------------------------- the noise model


def drawn_labels(count, classes, matrix, power, seed):
    """(labels, what they really are, predictions that are too sure or too unsure by `power`)."""
    rng = np.random.default_rng(seed)
    logs = rng.normal(0, 2.5, (count, classes))
    sound = np.exp(logs) / np.exp(logs).sum(axis=1, keepdims=True)
    true = np.array([rng.choice(classes, p=p) for p in sound])
    labels = np.array([rng.choice(classes, p=matrix[k]) for k in true])
    told = np.exp(logs / power)
    return labels, true, told / told.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("power", [0.8, 2.0])
@pytest.mark.parametrize("matrix", [
    [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]], [[0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.1, 0.0, 0.9]],
])  # fmt: skip
def test_the_model_that_drew_the_labels_is_found(matrix, power):
    labels, true, told = drawn_labels(6000, 3, np.array(matrix), power, 0)
    model = noise_model.fitted(labels, told)
    assert sum(model.weights) == pytest.approx(1)
    best = int(np.argmax(model.weights))
    assert abs(np.log(model.powers[best] / power)) < 0.3  # of steps of 0.29
    np.testing.assert_allclose(model.labelled[best], matrix, atol=0.06)
    doubt, expected = noise_model.wrong(labels, told, model)
    for low, high in ((0, 0.1), (0.1, 0.4), (0.4, 0.7), (0.7, 1.0)):
        inside = (doubt >= low) & (doubt <= high)
        assert inside.sum() > 30
        assert abs(doubt[inside].mean() - (labels != true)[inside].mean()) < 0.12  # what it says comes true
    np.testing.assert_allclose(expected.sum(axis=1), np.bincount(labels))
    assert abs(1 - np.trace(expected) / 6000 - (labels != true).mean()) < 0.03


def test_probability_of_a_wrong_label_by_hand():
    """p = (0.2, 0.8) squared is (1, 16) / 17; labelled 0: 0.9 x 1 against 0.3 x 16. Without mistakes, never."""
    model = noise_model.NoiseModel((0.75, 0.25), (2.0, 1.0), (np.array([[0.9, 0.1], [0.3, 0.7]]), np.eye(2)))
    doubt, expected = noise_model.wrong(np.array([0]), np.array([[0.2, 0.8]]), model)
    assert doubt[0] == pytest.approx(0.75 * (1 - 0.9 / (0.9 + 0.3 * 16)))
    np.testing.assert_allclose(expected, [[1 - doubt[0], doubt[0]], [0, 0]])


def test_classes_that_are_hard_to_tell_apart_are_no_noise():
    """Where confident learning counts every fifth label as wrong, though none is."""
    rng = np.random.default_rng(1)
    one = 1 / (1 + np.exp(-rng.normal(0, 1, 4000)))
    labels, told = (rng.random(4000) > one).astype(int), np.stack([one, 1 - one], axis=1)
    assert joint(labels, told).noise > 0.2
    doubt, _ = noise_model.wrong(labels, told, noise_model.fitted(labels, told))
    assert (doubt > 0.4).mean() < 0.01
    assert doubt.mean() < 0.1


def test_many_rows_are_fitted_to_some_and_parts_change_nothing(monkeypatch):
    labels, _, told = drawn_labels(3000, 3, np.full((3, 3), 0.05) + 0.85 * np.eye(3), 1.0, 2)
    whole = noise_model.fitted(labels, told)
    doubt = noise_model.wrong(labels, told, whole)
    monkeypatch.setattr(noise_model, "MOST", 4500)
    monkeypatch.setattr(noise_model, "_BLOCK", 100)
    some = noise_model.fitted(labels, told)
    np.testing.assert_allclose(some.labelled[0], whole.labelled[0], atol=0.1)
    assert some.labelled[0].tolist() != whole.labelled[0].tolist()
    for ours, before in zip(noise_model.wrong(labels, told, whole), doubt):
        np.testing.assert_allclose(ours, before)


def test_a_class_that_no_row_is_labelled_with():
    labels, told = np.array([0, 0, 2]), np.array([[0.9, 0.0, 0.1], [0.0, 1.0, 0.0], [0.1, 0.0, 0.9]])
    doubt, _ = noise_model.wrong(labels, told, noise_model.fitted(labels, told))
    assert np.isfinite(doubt).all()
    assert doubt[1] > max(doubt[0], doubt[2])


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
    assert len(found) > 20
    assert len(set(found) & set(bad)) >= 0.95 * len(bad)
    assert len(set(found) & set(bad)) >= 0.9 * len(found)
    summary = made["checks"]["label_noise"]["summary"]
    assert summary["judged"] == 400
    assert abs(summary["estimated_noise"] - len(bad) / 400) < 0.02
    lines = read(tmp_path / "audit" / FILE)
    assert [line["row"] for line in lines] == found
    assert all(0.4 < line["wrong"] <= 1 for line in lines)
    assert summary["expected_precision"] == pytest.approx(np.mean([line["wrong"] for line in lines]), abs=1e-3)
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
    settings["filter_by"] = "prune_by_noise_rate"
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
    with pytest.raises(ConfigError, match="did you mean 'folds'"):
        only(fold=3)


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
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes() != b""
    for made in (one, many):
        made["summary"].pop("files", None)
        for example in made["examples"]:
            example.pop("place")
    assert one == many
    assert (one["summary"]["rows"], one["summary"]["judged"], one["summary"]["classes"]) == (121, 120, 4)


def test_a_killed_audit_and_a_killed_cleaning_go_on_to_the_same_bytes(tmp_path, monkeypatch):
    rows, _ = texts_of(200, 0.1)
    (tmp_path / "many").mkdir()
    for number in range(4):
        write(tmp_path / f"many/{number}.jsonl", rows[50 * number : 50 * (number + 1)])
    source = str(tmp_path / "many")
    audit(source, tmp_path / "whole", only(), workers=1)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LabelNoise, "_lines", killed)
        with pytest.raises(KeyboardInterrupt):
            audit(source, tmp_path / "audit", only(), workers=1)
    audit(source, tmp_path / "audit", only(), workers=1)
    for name in (FILE, "findings.jsonl"):
        assert (tmp_path / "audit" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() != b""
    mending = only(action="drop", corrections=str(tmp_path / "whole" / FILE))
    clean(source, tmp_path / "once", mending, workers=1)
    look, seen = LabelNoise.look, []

    def dies(self, row):
        seen.append(row)
        if len(seen) == 120:
            raise KeyboardInterrupt
        return look(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(LabelNoise, "look", dies)
        with pytest.raises(KeyboardInterrupt):
            clean(source, tmp_path / "twice", mending, workers=1)
    clean(source, tmp_path / "twice", mending, workers=1)
    for number in range(4):
        made = [(tmp_path / folder / f"{number}.jsonl").read_bytes() for folder in ("once", "twice")]
        assert made[0] == made[1] != b""


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
