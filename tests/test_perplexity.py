"""Outliers by a model's perplexity: what is scored beside transformers, thresholds by hand, kills, cleaning twice."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch

from luthier.errors import ConfigError
from luthier.prepare import likelihood
from luthier.prepare.audit import audit
from luthier.prepare.checks import perplexity
from luthier.prepare.checks.perplexity import BOUNDS, Perplexity, proposed
from luthier.prepare.clean import clean
from luthier.prepare.recipe import recipe
from luthier.prepare.views import view


def test_bounds_by_hand():
    """Logarithms 1, 2, 3, 4, 10: median 3, deviations 2, 1, 0, 1, 7 with median 1; 3 +- 2 x 1.4826. Bits the same."""
    logs = np.array([1.0, 2, 3, 4, 10])
    made = proposed(logs, logs, 2.0)
    assert made["min"] == pytest.approx(max(1.0, math.exp(3 - 2 * 1.4826)), rel=1e-3)
    assert made["max"] == pytest.approx(math.exp(3 + 2 * 1.4826), rel=1e-3)
    assert made["max_bits"] == pytest.approx(3 + 2 * 1.4826, rel=1e-3)
    spread = 1.4826 * math.log(3 / 2)  # of logarithms of bits: 1.10, 0.41, 0, 0.29, 1.20 from the median
    assert made["min_bits"] == pytest.approx(3 * math.exp(-2 * spread), rel=1e-3)
    made = proposed(np.full(9, 3.0), np.full(9, 3.0), 5.0)  # no deviation at all: 0.1
    wanted = {"min": math.exp(2.5), "max": math.exp(3.5), "min_bits": 3 * math.exp(-0.5), "max_bits": 3.5}
    assert made == pytest.approx(wanted, rel=1e-3)


def told(found):
    return {row: found.told[code][0] for row, code in zip(found.rows.tolist(), found.codes.tolist())}


def test_what_is_judged_by_hand():
    rows, logs, even = np.arange(5), np.log([10.0, 10, 10, 300, 1.5]), np.full(5, 2.0)
    found = Perplexity()._judged(rows, logs, even, 6)
    assert told(found) == {3: "high", 4: "low"}
    np.testing.assert_allclose(found.numbers, [300, 1.5])
    assert found.told[1][1].format(number=300.0) == "perplexity 300.00, median 10.00"
    proposal = found.summary["proposed"]
    assert (proposal["min"], proposal["max"]) == (pytest.approx(6.065, rel=1e-3), pytest.approx(16.49, rel=1e-3))
    assert (found.summary["rows"], found.summary["judged"]) == (6, 5)
    assert told(Perplexity(max=200.0)._judged(rows, logs, even, 5)) == {3: "high"}
    assert told(Perplexity(min=2.0, max=500.0)._judged(rows, logs, even, 5)) == {4: "low"}
    unlikely = np.array([1.0, 1, 1, np.nan, np.inf])
    assert told(Perplexity()._judged(rows, unlikely, even, 5)) == {3: "high", 4: "high"}


def test_bits_are_judged_by_hand():
    """Medians 10 and 2; what is dense or low by its bits is told so, however likely its tokens are."""
    rows, logs = np.arange(12), np.log([10.0, 10, 10, 10, 300, 1.5, *[10.0] * 6])
    bits = np.array([2.0, 2.0, 6.0, 0.1, 5.0, *[2.0] * 7])
    found = Perplexity()._judged(rows, logs, bits, 12)
    assert told(found) == {2: "dense", 3: "low", 4: "dense", 5: "low"}
    np.testing.assert_allclose(found.numbers, [6.0, 0.1, 5.0, 1.5])
    texts = [found.told[code][1].format(number=number) for code, number in zip(found.codes.tolist(), found.numbers)]
    assert texts[:2] == ["6.00 bits a byte, median 2.00", "0.10 bits a byte, median 2.00"]
    assert told(Perplexity(max_bits=5.5)._judged(rows, logs, bits, 12)) == {2: "dense"}
    assert told(Perplexity(min_bits=1.0)._judged(rows, logs, bits, 12)) == {3: "low"}
    again = Perplexity().proposed(found.summary)
    assert told(again._judged(rows, logs, bits, 12)) == told(found)


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
    nll, count, size = scores([view(row) for row, *_ in rows])
    for (_, before, learnt), got, number, of_bytes in zip(rows, nll, count, size, strict=True):
        start = len(tokens(before)["input_ids"]) if before else 0
        ids = torch.tensor([tokens(before + learnt)["input_ids"]])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        first = max(start, 1)
        wanted = -sum(logs[i - 1, ids[0, i]].item() for i in range(first, ids.shape[1]))
        assert number == ids.shape[1] - first
        assert of_bytes == number + (learnt[:1] == "\u00e4" and not before)
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
    limits = one["summary"]["proposed"]
    for finding in found:
        number = float(re.search(r"[\d,]+\.\d+", finding["detail"])[0].replace(",", ""))
        low, high = ("min_bits", "max_bits") if "bits" in finding["detail"] else ("min", "max")
        assert number <= limits[low] + 0.01 if finding["what"] == "low" else number >= limits[high] - 0.01
        assert finding["place"] == f"{source}:{finding['row'] + 1}"
    mending = recipe(tmp_path / "audit/recipe.yaml", "checks.perplexity.action=drop")
    assert {name: getattr(mending.checks["perplexity"], name) for name in BOUNDS} == limits
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
    ({"min": 5.0, "max": 2.0}, "min=5.0 is more than max=2.0"), ({"max_bits": 0}, "max_bits"),
    ({"min_bits": 5.0, "max_bits": 2.0}, "min_bits=5.0 is more than max_bits=2.0"), ({"action": "repair"}, "action"),
    ({"maximum": 5.0}, "did you mean 'max'"), ({"max": 0.5}, "max"),
])  # fmt: skip
def test_bad_settings(tiny_model, settings, message):
    with pytest.raises(ConfigError, match=message):
        with_model(tiny_model, **settings)


def test_what_it_lacks(tmp_path, tiny_model):
    with pytest.raises(ConfigError, match="give --model"):
        recipe({"checks": {"perplexity": {}}})
    with pytest.raises(ConfigError, match="needs min, max, min_bits or max_bits"):
        clean(write(tmp_path / "r.jsonl", ROWS), tmp_path / "o.jsonl", with_model(tiny_model, action="drop"))
