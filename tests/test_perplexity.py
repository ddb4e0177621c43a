"""Outliers by a model's perplexity: what is scored beside transformers, thresholds by hand, kills, cleaning twice."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from luthier.errors import ConfigError
from luthier.prepare import likelihood
from luthier.prepare.audit import audit
from luthier.prepare.checks import perplexity
from luthier.prepare.checks.perplexity import Perplexity, above, bounds
from luthier.prepare.clean import clean
from luthier.prepare.recipe import recipe
from luthier.prepare.views import view


def test_bounds_by_hand():
    """Logarithms 1, 2, 3, 4, 10: median 3, deviations 2, 1, 0, 1, 7 with median 1; 3 +- 2 x 1.4826."""
    low, high = bounds(np.array([1.0, 2, 3, 4, 10]), 2.0)
    assert low == pytest.approx(math.exp(3 - 2 * 1.4826), rel=1e-3)
    assert high == pytest.approx(math.exp(3 + 2 * 1.4826), rel=1e-3)
    low, high = bounds(np.full(9, 3.0), 5.0)  # no deviation at all: 0.1
    assert (low, high) == (pytest.approx(math.exp(2.5), rel=1e-3), pytest.approx(math.exp(3.5), rel=1e-3))


def test_the_most_bits_are_those_of_the_nearer_bound():
    """Median 2, deviations 1 to 0 and 1: exp(log 2 + 2 x 1.4826 log 2) = 15.6, and 2 + 3 x 1.4826 = 6.448."""
    bits = np.array([1.0, 1, 2, 2, 2, 4, 4, 1, 4])
    assert above(bits, 3.0) == pytest.approx(2 + 3 * 1.4826, rel=1e-3)
    assert above(np.full(9, 3.0), 3.0) == pytest.approx(3.3)
    made = Perplexity(deviations=2.0)._judged(np.arange(9), np.full(9, 2.0), bits, 9).summary["proposed"]
    assert made["max_bits_per_byte"] == pytest.approx(2 + 3 * 1.4826, rel=1e-3)
    even = np.linspace(1.9, 2.1, 9)  # near one another, both are alike and the logarithm's is less
    made = Perplexity(deviations=2.0)._judged(np.arange(9), np.full(9, 2.0), even, 9).summary["proposed"]
    assert made["max_bits_per_byte"] == pytest.approx(min(bounds(np.log(even), 2.0)[1], above(even, 3.0)))


def test_what_is_judged_by_hand():
    """Of equal rows the deviation is the floor, 0.1: bounds are a factor exp(0.5) from the median."""
    rows, logs, bits = np.arange(7), np.log([10.0, 10, 10, 300, 1.5, 10, 10]), np.array([1.0, 1, 1, 9, 1, 5, 0.2])
    found = Perplexity(deviations=5.0)._judged(rows, logs, bits, 8)
    assert found.rows.tolist() == [3, 4, 5, 6]
    assert [found.told[code][0] for code in found.codes] == ["high", "low", "dense", "thin"]
    np.testing.assert_allclose(found.numbers, [300, 1.5, 5, 0.2])
    assert found.told[0][1].format(number=300.0) == "perplexity 300.00, median 10.00"
    assert found.told[2][1].format(number=5.0) == "5.00 bits a byte, median 1.00"
    assert found.summary["proposed"] == pytest.approx(
        {"min": 6.065, "max": 16.49, "min_bits_per_byte": 0.6065, "max_bits_per_byte": 1.649}, rel=1e-3
    )
    assert (found.summary["rows"], found.summary["judged"]) == (8, 7)
    assert Perplexity(max=200.0)._judged(rows, logs, bits, 7).rows.tolist() == [3]
    assert Perplexity(min=2.0, max=500.0)._judged(rows, logs, bits, 7).rows.tolist() == [4]
    assert Perplexity(max_bits_per_byte=6.0)._judged(rows, logs, bits, 7).rows.tolist() == [3]
    assert Perplexity(min_bits_per_byte=0.5)._judged(rows, logs, bits, 7).rows.tolist() == [6]
    odd = np.array([1.0, 1, 1, np.nan, np.inf])
    assert Perplexity()._judged(rows[:5], odd, np.ones(5), 5).rows.tolist() == [3, 4]
    assert Perplexity()._judged(rows[:5], np.ones(5), odd, 5).rows.tolist() == [3, 4]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return (tiny_model / "tokenizer.json").read_text()


@pytest.fixture(scope="module")
def scores(tiny_model, tokenizer):
    return likelihood.Likelihood(str(tiny_model), tokenizer, 40)


def test_the_same_as_transformers(tiny_model, scores, monkeypatch):
    """Answers given what stands before them, cut at 40 tokens, many rows at a time; bytes are tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokens = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    rows = [
        ({"prompt": "one two", "completion": "three four"}, "one two\n\n", "three four"),
        ({"text": "a text of its own"}, "", "a text of its own"),
        (
            {"messages": [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "ä" * 30}]},
            "q?\n\n",
            "ä" * 18,
        ),
        ({"prompt": "q", "chosen": "good one", "rejected": "bad"}, "q\n\n", "good one"),
        ({"prompt": "only asked"}, "", "only asked"),
        ({"text": "x"}, "", "x"),
    ]
    monkeypatch.setattr(likelihood, "MICRO_TOKENS", 64)
    nll, count, sizes = scores([view(row) for row, *_ in rows])
    for (_, before, learnt), got, number, size in zip(rows, nll, count, sizes):
        start = len(tokens(before)["input_ids"]) if before else 0
        ids = torch.tensor([tokens(before + learnt)["input_ids"]])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        first = max(start, 1)
        wanted = -sum(logs[i - 1, ids[0, i]].item() for i in range(first, ids.shape[1]))
        assert number == ids.shape[1] - first
        assert size == len((before + learnt).encode()) - first, "bytes are tokens, and the first is not counted"
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert count.tolist()[-1] == 0


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [{"text": f"the text of number {n} of all these"} for n in range(30)]


def with_model(tiny_model, **settings):
    return recipe({"model": str(tiny_model), "checks": {"perplexity": settings}})


def test_an_audit_proposes_bounds_and_cleaning_twice_changes_nothing(tmp_path, tiny_model):
    """A random model finds about all texts alike, so bounds are given a little deviation."""
    rows = [*ROWS, {"text": "short"}]
    source = write(tmp_path / "rows.jsonl", rows)
    made = audit(source, tmp_path / "audit", with_model(tiny_model, deviations=0.02), workers=1)
    one = made["checks"]["perplexity"]
    assert (one["summary"]["rows"], one["summary"]["judged"]) == (31, 30)
    found = [json.loads(line) for line in (tmp_path / "audit/findings.jsonl").read_text().splitlines()]
    assert 0 < len(found) < 30
    low, high = one["summary"]["proposed"]["min"], one["summary"]["proposed"]["max"]
    for finding in found:
        value = float(finding["detail"].split()[1].rstrip(",").replace(",", ""))
        assert value >= high - 0.01 if finding["what"] == "high" else value <= low + 0.01
        assert finding["place"] == f"{source}:{finding['row'] + 1}"
    assert all(finding["what"] in ("high", "low") for finding in found), "bytes are tokens: the same order"
    mending = recipe(tmp_path / "audit/recipe.yaml", "checks.perplexity.action=drop")
    assert (mending.checks["perplexity"].min, mending.checks["perplexity"].max) == (low, high)
    told = clean(source, tmp_path / "clean.jsonl", mending, workers=1)
    assert told["removed"] == len(found)
    assert clean(str(tmp_path / "clean.jsonl"), tmp_path / "twice.jsonl", mending, workers=1)["removed"] == 0


def test_a_kill_keeps_what_was_scored(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(perplexity, "TOGETHER", 8)
    source = write(tmp_path / "rows.jsonl", ROWS)
    asked: list[int] = []
    real = likelihood.Likelihood.__call__

    def killed(self, views):
        asked.append(len(views))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(self, views)

    monkeypatch.setattr(likelihood.Likelihood, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        audit(source, tmp_path / "audit", with_model(tiny_model), workers=1)
    made = audit(source, tmp_path / "audit", with_model(tiny_model), workers=1)
    assert asked == [8, 8, 8, 8, 6]
    whole = audit(source, tmp_path / "whole", with_model(tiny_model), workers=1)
    assert made["checks"] == whole["checks"]
    assert not [*(tmp_path / "audit/.luthier").glob("*.safetensors")]


def test_it_is_made_where_it_is_asked_for(tiny_model):
    assert "perplexity" not in recipe().checks
    assert "perplexity" not in recipe({"model": str(tiny_model)}).checks
    assert "perplexity" in recipe({"model": str(tiny_model)}, "checks.perplexity=keep").checks
    assert "encoding" in recipe({"model": str(tiny_model)}, "checks.perplexity=keep").checks


@pytest.mark.parametrize(("settings", "message"), [
    ({"min": 5.0, "max": 2.0}, "min=5.0 is more than max=2.0"), ({"action": "repair"}, "action"),
    ({"maximum": 5.0}, "did you mean 'max'"), ({"max": 0.5}, "max"),
    ({"min_bits_per_byte": 5.0, "max_bits_per_byte": 2.0}, "min_bits_per_byte=5.0 is more than max_bits_per_byte=2.0"),
])  # fmt: skip
def test_bad_settings(tiny_model, settings, message):
    with pytest.raises(ConfigError, match=message):
        with_model(tiny_model, **settings)


def test_what_it_lacks(tmp_path, tiny_model):
    with pytest.raises(ConfigError, match="give --model"):
        recipe({"checks": {"perplexity": {}}})
    with pytest.raises(ConfigError, match="needs min or max"):
        clean(write(tmp_path / "r.jsonl", ROWS), tmp_path / "o.jsonl", with_model(tiny_model, action="drop"))
