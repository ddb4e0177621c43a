"""Scores of answers against hand-worked numbers and other libraries; intervals against closed forms."""

import json
import math
import random

import numpy as np
import pytest

from luthier import intervals, scores
from luthier.errors import ConfigError, MetricError
from luthier.intervals import Figure, mean, quotient, sign_test, wilson
from luthier.scores import Answer

WORDS = ["the", "a", "cat", "sat", "on", "mat,", "Mat!", "café", "12", "don't", "x_y", "über.", "(so)", "e.g.", "-"]


def texts(count, seed=0):
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        reference = [draw.choice(WORDS) for _ in range(draw.randrange(0, 9))]
        answer = [w if draw.random() < 0.7 else draw.choice(WORDS) for w in reference] + draw.choices(WORDS, k=1)
        made.append((" ".join(reference), " ".join(answer[: draw.randrange(0, 10)])))
    return [Answer(i, "q", r, a) for i, (r, a) in enumerate(made)]


# ---------------------------------------------------------------------------- one answer


def test_f1_by_hand():
    """Articles and marks are dropped: cat, sat against cat, cat, ran share one; 2 * 1 / (2 + 3)."""
    assert scores.f1("The cat sat.", "a cat, cat ran") == pytest.approx(0.4)
    assert scores.f1("a", "the") == 1.0  # neither has a word
    assert scores.f1("cat", "the") == 0.0
    assert scores.f1("The Cat!", "cat") == 1.0


def test_rouge_by_hand():
    """a b c d against a c b: bigrams share none of 3 and 2; the longest common subsequence has 2 words of 4 and 3."""
    assert scores.rouge_n("a b c d", "a c b", 1) == pytest.approx(2 * 3 / 7)
    assert scores.rouge_n("a b c d", "a c b", 2) == 0.0
    assert scores.rouge_l("a b c d", "a c b") == pytest.approx(2 * 2 / 7)
    assert scores.rouge_l("", "") == 0.0
    assert scores.rouge_l("straße über", "über straße") == pytest.approx(0.5)  # words of any script


def test_rouge_equals_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for a in texts(300, seed=1):
        reference, answer = (t.replace("é", "e").replace("ü", "u") for t in (a.reference, a.answer))  # it knows ASCII
        theirs = scorer.score(reference, answer)
        assert scores.rouge_n(reference, answer, 1) == pytest.approx(theirs["rouge1"].fmeasure)
        assert scores.rouge_n(reference, answer, 2) == pytest.approx(theirs["rouge2"].fmeasure)
        assert scores.rouge_l(reference, answer) == pytest.approx(theirs["rougeL"].fmeasure)


@pytest.mark.parametrize(
    ("reference", "answer", "same"),
    [
        ('{"a": 1, "b": [2]}', ' {"b":[2],"a":1.0}', 1),
        ('{"a": 1}', '{"a": true}', 0),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', 0),
        ('{"a": 1}', '{"a": 1, "b": 2}', 0),
        ('{"a": 1}', '{"a": 1} and more', 0),
        ("NaN", "NaN", 0),
        ("not JSON", "not JSON", 0),
        ("[" * 100_000, "[" * 100_000, 0),
        ("null", "null", 1),
        ("0", "false", 0),
    ],
)
def test_json_equality(reference, answer, same):
    assert scores.json_equal(reference, answer) == same


# ---------------------------------------------------------------------------- corpora


def test_bleu_and_chrf_equal_sacrebleu():
    import sacrebleu

    for seed in range(5):
        found = texts(40, seed)
        hypotheses, references = [a.answer for a in found], [[a.reference for a in found]]
        assert scores.bleu(found).value == pytest.approx(sacrebleu.corpus_bleu(hypotheses, references).score)
        assert scores.chrf(found).value == pytest.approx(sacrebleu.corpus_chrf(hypotheses, references).score)
    same = [Answer(0, "", "the cat sat on the mat", "the cat sat on the mat")]
    assert scores.bleu(same).value == pytest.approx(100)
    assert scores.chrf(same).value == pytest.approx(100)
    empty = [Answer(0, "", "the cat", ""), Answer(1, "", "a dog", "")]
    assert scores.bleu(empty).value == scores.chrf(empty).value == 0


def test_bleu_without_sacrebleu_names_the_command(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError, match=r"pip install 'luthier\[eval\]'"):
        scores.bleu(texts(2))


def test_all_metrics_have_their_keys():
    found = scores.figures(texts(12), list(scores.METRICS))
    assert set(found) == {
        "exact_match", "f1", "bleu", "chrf", "rouge_1", "rouge_2", "rouge_l", "json_equal", "valid_json",
    }  # fmt: skip
    for key, figure in found.items():
        low, high = figure.interval()
        assert low <= figure.value <= high, key


# ---------------------------------------------------------------------------- intervals


def test_the_bootstrap_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = mean(values).interval()
    error = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.02)


def test_a_ratio_of_sums_has_the_interval_of_the_delta_method():
    """Rows of many lengths: the spread is that of the residuals y - r x, not that of the tokens."""
    rng = np.random.default_rng(1)
    x = rng.integers(1, 50, 500).astype(float)
    y = x * rng.gamma(4, 0.5, 500)
    ratio = y.sum() / x.sum()
    error = 1.96 * np.sqrt(((y - ratio * x) ** 2).sum()) / x.sum()
    low, high = Figure(np.stack([y, x], 1), quotient).interval()
    assert (low, high) == pytest.approx((ratio - error, ratio + error), rel=0.01)


def test_many_rows_in_groups_have_the_same_interval():
    values = np.random.default_rng(2).normal(0, 1, 5000)
    grouped = mean(values).interval()
    error = 1.96 * values.std() / math.sqrt(5000)
    assert grouped == pytest.approx((values.mean() - error, values.mean() + error), abs=0.003)


def test_a_paired_change_is_surer_than_its_sides():
    """The same rows are drawn for both: a change of exactly 0.1 in each row has no spread at all."""
    values = np.random.default_rng(3).normal(0, 1, 100)
    base, tuned = mean(values), mean(values + 0.1)
    assert tuned.gain_over(base) == pytest.approx((0.1, 0.1))
    low, high = tuned.interval()
    assert high - low > 0.3
    with pytest.raises(AssertionError):
        tuned.gain_over(mean(values[:50]))


def test_yes_or_no_has_wilsons_interval():
    """Of 0 of 10: z^2 / (n + z^2) = 3.8415 / 13.8415. Of 8 of 10: by the formula (0.4902, 0.9433)."""
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert mean([1.0] * 8 + [0.0] * 2).interval() == pytest.approx((0.49016, 0.94331), abs=1e-5)
    assert mean([1.0] * 5).interval() == pytest.approx((1 - 3.8415 / 8.8415, 1.0), abs=1e-4)


def test_too_little_has_no_interval_and_json_no_nan():
    assert mean([0.3]).interval() is None
    assert Figure(np.zeros((3, 2)), quotient).value is None
    assert Figure(np.zeros((3, 2)), quotient).interval() is None
    assert Figure(np.zeros((0, 2)), quotient).value is None


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (0, 1), (8, 2), (3, 3), (30, 12), (900, 1000)])
def test_the_sign_test_equals_scipy(wins, losses):
    from scipy.stats import binomtest

    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert sign_test(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_the_sign_test_by_hand():
    """8 wins, 2 losses: 2 (1 + 10 + 45) / 1024."""
    assert sign_test(8, 2) == sign_test(2, 8) == pytest.approx(112 / 1024)


def test_wins_and_losses_know_what_is_better():
    base, tuned = mean([1, 2, 3]), mean([1, 1, 4])
    assert [at.tolist() for at in tuned.wins_and_losses(base)] == [[2], [1]]
    lower = Figure(tuned.statistics, quotient, higher_is_better=False)
    assert [at.tolist() for at in lower.wins_and_losses(base)] == [[1], [2]]


def test_resampling_is_the_same_every_time():
    values = np.arange(10.0)
    assert np.array_equal(intervals.resampled(values[:, None]), intervals.resampled(values[:, None]))


# ---------------------------------------------------------------------------- the user's functions


def test_a_function_from_a_file(tmp_path):
    path = tmp_path / "score.py"
    code = "def shorter(reference, answer, prompt, row):\n    return len(answer) < len(reference)\n"
    path.write_text(code + "number = 3\n")
    name, function = scores.load_function(f"{path}:shorter")
    assert scores.score_by({name: function}, Answer(0, "q", "long", "s")) == {"shorter": 1.0}
    for place, message in (
        (str(path), "expected FILE.py:FUNCTION"),
        ("os.path:join", "expected FILE.py:FUNCTION"),
        (f"{tmp_path}/none.py:f", "there is no file"),
        (f"{path}:longer", r"no function 'longer' \(it has shorter\)"),
        (f"{path}:number", "no function 'number'"),
    ):
        with pytest.raises(ConfigError, match=message):
            scores.load_function(place)
    path.write_text("def f1(*a): return 1\n")
    with pytest.raises(ConfigError, match="rename it"):
        scores.load_function(f"{path}:f1")
    path.write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="cannot be run: ZeroDivisionError"):
        scores.load_function(f"{path}:f")


@pytest.mark.parametrize("given", ["good", None, math.nan, math.inf, [1.0]])
def test_a_function_that_gives_no_number(given):
    with pytest.raises(MetricError, match="for row 7: expected a finite number"):
        scores.score_by({"mine": lambda *_: given}, Answer(7, "q", "r", "a"))


def test_a_function_that_fails():
    def fails(reference, answer, prompt, row):
        return 1 / 0

    with pytest.raises(MetricError, match="'fails' failed on row 7: ZeroDivisionError: division by zero"):
        scores.score_by({"fails": fails}, Answer(7, "q", "r", "a"))


def test_what_a_function_is_given():
    seen = []
    asked = ({"role": "user", "content": "q"},)
    scores.score_by({"mine": lambda *given: seen.append(given) or 1}, Answer(7, "q", "r", "a", messages=asked))
    assert seen == [("r", "a", "q", {"row": 7, "messages": [{"role": "user", "content": "q"}]})]
    assert json.dumps(seen)
