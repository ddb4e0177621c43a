"""What was measured after a step: its figures, its files, and base against tuned."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import classes, scores
from .figures import greater_is_better
from .files import write_atomically
from .intervals import Figure, finite, quotient, sign_test
from .scores import Answer

COUNTED = ("loss", "weight", "bytes", "nll", "token_accuracy", "liked")


@dataclass(frozen=True)
class Documents:
    """Sums over the learnt tokens of each held-out row; all columns are [D]."""

    rows: list[int]
    columns: dict[str, np.ndarray]  # loss (weighted), weight, bytes, and what the objective counts: token_accuracy, nll

    def figures(self, prefix: str = "") -> dict[str, Figure]:
        c = self.columns

        def of(name: str, above: str, below: str, of_sums: Callable = quotient) -> dict[str, Figure]:
            return {name: Figure(np.stack([c[above], c[below]], 1), of_sums, greater_is_better(name))}

        out = of("loss", "loss", "weight") if "loss" in c else {}
        if "nll" in c:
            out |= of("perplexity", "loss", "weight", _perplexity) | of("bits_per_byte", "nll", "bytes", _bits)
        if "token_accuracy" in c:
            out |= of("token_accuracy", "token_accuracy", "weight")
        for name in [name for name in c if name not in COUNTED and not name.startswith(classes.PREFIXES)]:
            number = name == "kl" or (name.startswith(("rewards/", "logps/")) and "accuracies" not in name)
            out |= of(name, name, "weight", _mean if number else quotient)
        if "liked" in c:
            out |= self._of_sides(out)
        out |= classes.figures(c)
        return {prefix + key: figure for key, figure in out.items()}

    def _of_sides(self, figures: Mapping[str, Figure]) -> dict[str, Figure]:
        """Of rows that are liked or not, each with a 0 where a figure is of the others: means over those of its side,
        undefined where it has none."""
        c = self.columns
        rows = {"chosen": c["liked"], "rejected": 1 - c["liked"]}
        out = {}
        for name in [name for name in c if name.rpartition("/")[2] in rows]:
            out[name] = replace(figures[name], statistics=np.stack([c[name], rows[name.rpartition("/")[2]]], 1))
        sides = [c["rewards/chosen"], rows["chosen"], c["rewards/rejected"], rows["rejected"]]
        return out | {"rewards/margins": Figure(np.stack(sides, 1), _difference)}

    def subset(self, at: Sequence[int]) -> Documents:
        return Documents([self.rows[i] for i in at], {name: c[list(at)] for name, c in self.columns.items()})


def _mean(sums: np.ndarray) -> np.ndarray:
    """Of numbers: a share has an interval of its own, and numbers that happen to be 0 are none."""
    return quotient(sums)


def _difference(sums: np.ndarray) -> np.ndarray:
    """Of two means."""
    return quotient(sums[:, :2]) - quotient(sums[:, 2:])


def _perplexity(sums: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(quotient(sums))


def _bits(sums: np.ndarray) -> np.ndarray:
    return quotient(sums) / np.log(2)


@dataclass(frozen=True)
class Measured:
    """What was found; a figure's key is the same in `metrics.jsonl`, in the report and for early stopping."""

    documents: dict[str, Documents]  # held_out, forgetting
    answers: list[Answer] = field(default_factory=list)
    tasks: dict[str, dict] = field(default_factory=dict)  # tasks.NAME.METRIC -> value, interval, samples, higher
    metrics: tuple[str, ...] = ("exact_match",)

    def figures(self) -> dict[str, Figure]:
        out = {}
        for name, documents in self.documents.items():
            out |= documents.figures("" if name == "held_out" else f"{name}.")
        if self.answers:
            out |= scores.figures(self.answers, self.metrics)
        for key, task in self.tasks.items():
            if task["samples"] is not None:
                data = np.asarray(task["samples"], np.float64)
                out[key] = Figure(np.stack([data, np.ones_like(data)], 1), quotient, task["higher_is_better"])
        return out

    def values(self) -> dict[str, Any]:
        """Flat: `loss`, `loss_interval`, `exact_match`, `forgetting.loss`, ...; None where there is no number."""
        out: dict[str, Any] = {"rows": len(self.documents["held_out"].rows)}
        if self.answers:
            out |= {"answered": len(self.answers), "truncated": sum(a.truncated for a in self.answers)}
        for key, figure in self.figures().items():
            out |= {key: figure.value, f"{key}_interval": _listed(figure.interval())}
        for key, task in self.tasks.items():
            out.setdefault(key, task["value"])
            out.setdefault(f"{key}_interval", task["interval"])
        return out


def _listed(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def line(values: Mapping) -> str:
    """The figures of an evaluation for the console."""
    told = [f"loss {values['loss']:.4f}"] if "loss" in values else []
    for key, caption, digits in (
        ("perplexity", "perplexity", 2), ("bits_per_byte", "bits per byte", 3), ("token_accuracy", "token accuracy", 3),
    ):  # fmt: skip
        if values.get(key) is not None:
            told.append(f"{caption} {values[key]:.{digits}f}")
    shown = [k for k in values if f"{k}_interval" in values and k not in _SHOWN and values[k] is not None]
    told += [f"{k} {values[k]:.3f}" for k in shown if "." not in k or k == "forgetting.loss" or k.startswith("tasks.")]
    if "answered" in values:
        told.append(f"{values['answered']} answers")
        if values["truncated"]:
            told.append(f"{values['truncated']} of them cut")
    return ", ".join(told)


_SHOWN = ("loss", "perplexity", "bits_per_byte", "token_accuracy")

# ---------------------------------------------------------------------------- base against tuned


def compare(base: Measured | None, tuned: Measured) -> dict:
    """The report: every figure of both, with the interval of its paired change (tuned less base)."""
    tuned_figures = tuned.figures()
    report: dict = {"rows": len(tuned.documents["held_out"].rows), "figures": {}}
    base, paired = _paired(base, tuned) if base else (None, tuned)
    base_figures, paired_figures = (base.figures() if base else {}), paired.figures()
    for key, figure in tuned_figures.items():
        found = {"tuned": figure.value, "tuned_interval": _listed(figure.interval())}
        if key in base_figures:
            found |= _changed(base_figures[key], paired_figures[key])
        report["figures"][key] = found
    for key, task in tuned.tasks.items():
        found = report["figures"].setdefault(key, {"tuned": task["value"], "tuned_interval": task["interval"]})
        if base and key in base.tasks and "base" not in found:
            found |= {"base": base.tasks[key]["value"], "base_interval": base.tasks[key]["interval"]}
    for key, name in (("loss", "held_out_loss"), ("token_accuracy", "token_accuracy")):
        if key in report["figures"]:
            report[name] = {k: v for k, v in report["figures"][key].items() if k in ("base", "tuned")}
    if matrix := classes.confusion(tuned.documents["held_out"].columns):
        report["confusion_matrix"] = classes.table(*matrix)
    if tuned.answers:
        report["answers"] = {"tuned": summary(tuned.answers, tuned.metrics)}
        if base and base.answers:
            report["answers"] = {"base": summary(base.answers, base.metrics), **report["answers"]}
        if base and base.answers and tuned.metrics:
            exact = (scores.METRICS["exact_match"]["exact_match"](m.answers) for m in (base, paired))
            change = _changed(*exact)
            report["answers"] |= {"gain": change["change"], "gain_interval": change["change_interval"]}
    return report


def _changed(base: Figure, tuned: Figure) -> dict:
    """Rows that tuning made better and worse, with the exact sign test of their numbers."""
    wins, losses = (len(at) for at in tuned.wins_and_losses(base))
    before, after = base.value, tuned.value
    return {
        "base": before, "base_interval": _listed(base.interval()),
        "change": None if before is None or after is None else finite(after - before),
        "change_interval": _listed(tuned.gain_over(base)), "higher_is_better": tuned.higher_is_better,
        "wins": wins, "losses": losses, "p_value": sign_test(wins, losses),
    }  # fmt: skip


def _paired(base: Measured, tuned: Measured) -> tuple[Measured, Measured]:
    """Both with those rows only that both were measured on; a set or task without any is left out."""
    sides: list[Measured] = []
    names = [n for n in tuned.documents if n in base.documents]
    asked = [{(a.row, a.reference): a for a in m.answers} for m in (base, tuned)]
    both = [key for key in asked[1] if key in asked[0]]
    known = set.intersection(*(set(a.scores) for m in (base, tuned) for a in m.answers)) if both else set()
    for m, other, answered in ((base, tuned, asked[0]), (tuned, base, asked[1])):
        documents = {n: _common(m.documents[n], other.documents[n]) for n in names}
        chosen = [answered[key] for key in both]
        sides.append(
            Measured(
                {n: d for n, d in documents.items() if d.rows},
                [replace(a, scores={k: a.scores[k] for k in known}) for a in chosen],
                {k: t for k, t in m.tasks.items() if k in other.tasks and _alike(t, other.tasks[k])},
                m.metrics,
            )
        )
    return sides[0], sides[1]


def _common(one: Documents, other: Documents) -> Documents:
    """The documents of `one` that `other` has, too: the same row with the same learnt tokens and text."""
    names = [n for n in ("weight", "bytes") if n in one.columns and n in other.columns]
    theirs = {(r, *(other.columns[n][i] for n in names)) for i, r in enumerate(other.rows)}
    at = [i for i, r in enumerate(one.rows) if (r, *(one.columns[n][i] for n in names)) in theirs]
    return one.subset(at)


def _alike(one: dict, other: dict) -> bool:
    if one["samples"] is None or other["samples"] is None:
        return one["samples"] is other["samples"]
    return len(one["samples"]) == len(other["samples"])


def summary(found: Sequence[Answer], metrics: Sequence[str] = ("exact_match",)) -> dict:
    """The figures of answers, with how many there are and how many did not come to their end."""
    out: dict = {"rows": len(found), "truncated": sum(a.truncated for a in found)}
    for key, figure in scores.figures(found, list(dict.fromkeys(["exact_match", *metrics])) if metrics else []).items():
        out |= {key: figure.value, f"{key}_interval": _listed(figure.interval())}
    return out


def comparison(base: Measured, tuned: Measured) -> list[dict]:
    """Every row that both answered, side by side: a win or a loss by the first of `evaluation.metrics`."""
    base, tuned = _paired(base, tuned)
    if not tuned.answers:
        return []
    before, after = base.figures(), tuned.figures()
    keys = [k for k in scores.figures(tuned.answers, tuned.metrics) if k in before]
    wins, losses = (set(at.tolist()) for at in after[keys[0]].wins_and_losses(before[keys[0]]))
    of_rows = {k: (before[k].rows, after[k].rows) for k in keys}
    return [
        {
            "row": a.row, "outcome": "win" if i in wins else "loss" if i in losses else "tie", "prompt": a.prompt,
            "reference": a.reference, "base": b.answer, "tuned": a.answer,
            "scores": {k: [finite(before[i]), finite(after[i])] for k, (before, after) in of_rows.items()},
        }
        for i, (b, a) in enumerate(zip(base.answers, tuned.answers))
    ]  # fmt: skip


# ---------------------------------------------------------------------------- files of a run


def report(folder: Path, step: int, metrics: Sequence[str] = ("exact_match",)) -> dict:
    """Base against tuned as a run's files have it: the evaluation before the first step and the one after `step`.

    What both answered is written to `answers/compare.jsonl`.
    """
    tuned = read(folder, step, metrics)
    if tuned is None:
        return {}
    base = read(folder, 0, metrics)
    if base is not None:
        write_comparison(folder / "answers" / "compare.jsonl", comparison(base, tuned))
    made = compare(base, tuned)
    made["held_out_rows"] = made.pop("rows")
    return made


def write_comparison(path: Path, rows: Sequence[Mapping]) -> None:
    if rows:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def confusion(folder: Path, step: int) -> tuple[list[str], np.ndarray] | None:
    """Labels and counts [true, said] of the held-out rows after a step, where they have one label each."""
    found = read(folder, step, ())
    return None if found is None else classes.confusion(found.documents["held_out"].columns)


def answers_file(folder: Path, step: int) -> Path:
    return folder / "answers" / f"step-{step:08}.jsonl"


def figures_file(folder: Path, step: int) -> Path:
    return folder / "evaluations" / f"step-{step:08}.json"


def keep(folder: Path, step: int, measured: Measured) -> None:
    """What was measured after a step, from which all figures can be made again."""
    if measured.answers:
        path = answers_file(folder, step)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, to_json(measured.answers))
    documents = {
        name: {"row": d.rows} | {key: column.tolist() for key, column in d.columns.items()}
        for name, d in measured.documents.items()
    }
    path = figures_file(folder, step)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps({"documents": documents, "tasks": measured.tasks}))


def read(folder: Path, step: int, metrics: Sequence[str]) -> Measured | None:
    """What `keep` wrote, or None."""
    if not figures_file(folder, step).exists():
        return None
    kept = json.loads(figures_file(folder, step).read_text())
    documents = {}
    for name, columns in kept["documents"].items():
        rows = columns.pop("row")
        documents[name] = Documents(rows, {k: np.asarray(v, np.float64) for k, v in columns.items()})
    path = answers_file(folder, step)
    found = from_json(path.read_text()) if path.exists() else []
    return Measured(documents, found, kept["tasks"], tuple(metrics))


def to_json(found: Sequence[Answer]) -> str:
    lines = []
    for a in found:
        record = {k: v for k, v in asdict(a).items() if k != "messages"} | {"exact": a.exact}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def from_json(text: str) -> list[Answer]:
    names = ("row", "prompt", "reference", "answer", "truncated", "scores")
    return [Answer(**{k: r[k] for k in names if k in r}) for r in map(json.loads, text.split("\n")[:-1])]
