"""Held-out loss, token accuracy, answers compared with their references; base against tuned with an interval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from .assemble import Assembled
from .batch import Batch
from .data.dataset import Dataset
from .generate import generate
from .monitor import records
from .surgery import adapters, adapters_off

RESAMPLES = 10_000


@dataclass(frozen=True)
class Answer:
    """One held-out prompt, what was expected and what came."""

    row: int
    prompt: str
    reference: str
    answer: str

    @property
    def exact(self) -> bool:
        return self.answer.strip() == self.reference.strip()


def held_out(made: Assembled, dataset: Dataset, micro_tokens: int) -> dict[str, float]:
    """Loss and token accuracy over all learnt tokens."""
    training = made.network.training
    made.network.eval()
    total, count, hits = 0.0, 0.0, 0.0
    order = sorted(range(len(dataset)), key=lambda i: dataset.lengths[i])
    try:
        with torch.no_grad():
            for part in made.ranks.mine(_rows(order, dataset.lengths, micro_tokens)):
                batch = Batch.pack([dataset.documents[i] for i in part])
                loss = made.objective.evaluate(made.network, batch.to(made.ranks.device))
                total += loss.total.item()
                count += loss.count.item()
                hits += loss.metrics["token_accuracy"].item()
    finally:
        made.network.train(training)
    sums = made.ranks.sum_(torch.tensor([total, count, hits], dtype=torch.float64, device=made.ranks.device)).tolist()
    return {"loss": sums[0] / sums[1], "token_accuracy": sums[2] / sums[1]}


def _rows(order: Sequence[int], lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = [[]]
    for i in order:
        longest = max(lengths[j] for j in [*rows[-1], i])
        if rows[-1] and longest * (len(rows[-1]) + 1) > micro_tokens:
            rows.append([])
        rows[-1].append(i)
    return rows


def answers(
    made: Assembled, dataset: Dataset, limit: int, max_new_tokens: int, batch_size: int,
) -> list[Answer]:  # fmt: skip
    """Greedy answers to the prompts of the first `limit` documents."""
    renderer, tokenizer = made.renderer, made.tokenizer
    chosen = range(min(limit, len(dataset)))
    asked = [renderer.prompt(dataset.conversations[i]) for i in chosen]
    new = generate(
        made.network, [tokens for tokens, _ in asked], renderer.stop_tokens(), max_new_tokens, batch_size=batch_size
    )
    out = []
    for i, (_, reference), tokens in zip(chosen, asked, new):
        users = [m["content"] for m in dataset.conversations[i].messages if m["role"] == "user"]
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        out.append(Answer(dataset.documents[i].row, users[-1] if users else "", reference, text))
    return out


def interval(values: Sequence[float], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean (Efron 1979)."""
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        return (float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [data[rng.integers(0, len(data), (500, len(data)))].mean(1) for _ in range(RESAMPLES // 500)]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summary(found: Sequence[Answer]) -> dict:
    """Exact match with its interval, and the share of answers that are JSON where the references are."""
    exact = [float(a.exact) for a in found]
    out: dict = {
        "rows": len(found),
        "exact_match": float(np.mean(exact)),
        "exact_match_interval": list(interval(exact)),
    }
    if found and all(is_json(a.reference) for a in found):
        out["valid_json"] = float(np.mean([is_json(a.answer) for a in found]))
    return out


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def compare(base: Sequence[Answer], tuned: Sequence[Answer]) -> dict:
    """What tuning changed, with the interval of the paired difference of exact matches."""
    assert [a.row for a in base] == [a.row for a in tuned], "base and tuned must have answered the same rows"
    gain = [float(t.exact) - float(b.exact) for b, t in zip(base, tuned)]
    return {
        "base": summary(base),
        "tuned": summary(tuned),
        "gain": float(np.mean(gain)),
        "gain_interval": list(interval(gain)),
    }


def measure(made: Assembled, rows: Dataset, generated: int, batch_size: int) -> dict:
    """The figures of a trained network; of its base, too, where adapters can be switched off."""
    config = made.config

    def figures() -> tuple[dict, list[Answer]]:
        found = answers(made, rows, generated, config.evaluation.max_new_tokens, batch_size) if generated else []
        return held_out(made, rows, config.batch.micro_tokens), found

    tuned, tuned_answers = figures()
    base, base_answers = None, []
    if any(True for _ in adapters(made.network.model)):
        with adapters_off(made.network.model):
            base, base_answers = figures()
    both = {"base": base, "tuned": tuned} if base else {"tuned": tuned}
    report: dict = {
        "rows": len(rows),
        "held_out_loss": {name: figures["loss"] for name, figures in both.items()},
        "token_accuracy": {name: figures["token_accuracy"] for name, figures in both.items()},
    }
    if base_answers:
        report["answers"] = compare(base_answers, tuned_answers)
    elif tuned_answers:
        report["answers"] = {"tuned": summary(tuned_answers)}
    return report


def report(folder: Path, step: int) -> dict:
    """Base against tuned as a finished run's files have it: its first evaluation and the one after `step`."""
    history = {r["step"]: r for r in records(folder / "metrics.jsonl") if r["kind"] == "evaluation"}
    out: dict = {}
    if history:
        out["held_out_loss"] = {"base": history[0]["loss"], "tuned": history[step]["loss"]}
        out["token_accuracy"] = {"base": history[0]["token_accuracy"], "tuned": history[step]["token_accuracy"]}
    first, last = (answers_file(folder, n) for n in (0, step))
    if first.exists() and last.exists():
        out["answers"] = compare(*(from_json(path.read_text()) for path in (first, last)))
    return out


def answers_file(folder: Path, step: int) -> Path:
    return folder / "answers" / f"step-{step:08}.jsonl"


def to_json(found: Sequence[Answer]) -> str:
    return "".join(json.dumps(asdict(a) | {"exact": a.exact}, ensure_ascii=False) + "\n" for a in found)


def from_json(text: str) -> list[Answer]:
    rows = (json.loads(line) for line in text.splitlines())
    return [Answer(r["row"], r["prompt"], r["reference"], r["answer"]) for r in rows]
