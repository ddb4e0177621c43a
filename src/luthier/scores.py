"""Answers against their references: exact match, F1, BLEU, chrF, ROUGE, JSON, or a function of the user's."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConfigError, MetricError
from .intervals import Figure, mean

Scorer = Callable[..., Any]  # (reference, answer, prompt, row) -> number


@dataclass(frozen=True)
class Answer:
    """One held-out prompt, what was expected and what came."""

    row: int
    prompt: str  # the last user turn
    reference: str
    answer: str
    truncated: bool = False  # evaluation.max_new_tokens came before the end of the answer
    scores: dict[str, float] = field(default_factory=dict)  # by the user's functions
    messages: tuple[dict, ...] = field(default=(), compare=False, repr=False)  # what was asked, all turns of it

    @property
    def exact(self) -> bool:
        return self.answer.strip() == self.reference.strip()


# ---------------------------------------------------------------------------- of one answer


def normalised(text: str) -> list[str]:
    """The words of a text as SQuAD compares them (arXiv:1606.05250): lower case, no punctuation, no articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1(reference: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the words, each as often as it occurs; 1 where both have none."""
    wanted, found = Counter(normalised(reference)), Counter(normalised(answer))
    if not wanted or not found:
        return float(wanted == found)
    return _f(sum((wanted & found).values()), wanted.total(), found.total())


def _f(common: float, wanted: int, found: int) -> float:
    return 2 * common / (wanted + found) if wanted + found else 0.0


def rouge_words(text: str) -> list[str]:
    """Runs of letters and digits in lower case, of any script; ROUGE's own program knows ASCII only."""
    return re.findall(r"[^\W_]+", text.lower())


def rouge_n(reference: str, answer: str, n: int) -> float:
    """F-measure of the n-grams (Lin 2004, ROUGE-N)."""
    wanted, found = (_ngrams(rouge_words(text), n) for text in (reference, answer))
    return _f(sum((wanted & found).values()), wanted.total(), found.total())


def rouge_l(reference: str, answer: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004, ROUGE-L, the text as one sentence)."""
    wanted, found = rouge_words(reference), rouge_words(answer)
    longest = [0] * (len(found) + 1)  # of the words so far and the first j of the answer's
    for word in wanted:
        before = longest
        longest = [0]
        for j, other in enumerate(found):
            longest.append(before[j] + 1 if word == other else max(before[j + 1], longest[j]))
    return _f(longest[-1], len(wanted), len(found))


def _ngrams(items: Sequence, n: int) -> Counter:
    return Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def is_json(text: str) -> bool:
    return _parsed(text) is not _NOTHING


def json_equal(reference: str, answer: str) -> float:
    """Whether both are JSON and of the same value: the order of keys and the white space do not matter.

    1 and 1.0 are equal, 1 and true are not.
    """
    wanted, found = _parsed(reference), _parsed(answer)
    return float(wanted is not _NOTHING and found is not _NOTHING and _same(wanted, found))


_NOTHING = object()


def _parsed(text: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")  # Python's reader would take NaN and Infinity

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return _NOTHING


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


# ---------------------------------------------------------------------------- of all answers


def each(score: Callable[[str, str], float]) -> Callable[[Sequence[Answer]], Figure]:
    """The mean of what each answer gets."""
    return lambda found: mean([float(score(a.reference, a.answer)) for a in found])


def bleu(found: Sequence[Answer]) -> Figure:
    """BLEU of the corpus (Papineni et al. 2002), 0 to 100, by sacrebleu as it is by default (13a, smoothing exp)."""
    sacrebleu = _sacrebleu()
    counter = sacrebleu.BLEU(effective_order=True)
    rows = []
    for a in found:
        s = counter.sentence_score(a.answer, [a.reference])
        rows.append([*s.counts, *s.totals, s.sys_len, s.ref_len])

    def of_sums(sums: np.ndarray) -> np.ndarray:
        counts = sums.round().astype(np.int64).tolist()
        scores = (sacrebleu.BLEU.compute_bleu(s[:4], s[4:8], s[8], s[9], smooth_method="exp") for s in counts)
        return np.fromiter((s.score for s in scores), np.float64, len(sums))

    return Figure(np.asarray(rows, np.float64).reshape(len(rows), 10), of_sums)


def _sacrebleu() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError:
        raise ConfigError(f"evaluation.metrics: bleu needs {INSTALL}") from None
    return metrics


INSTALL = "`pip install 'luthier[eval]'`"
CHRF_ORDER, CHRF_BETA = 6, 2


def chrf(found: Sequence[Answer]) -> Figure:
    """chrF2 of the corpus (Popović 2015), 0 to 100: n-grams of 1 to 6 characters, no white space, as sacrebleu's."""
    rows = []
    for a in found:
        wanted, written = ("".join(text.split()) for text in (a.reference, a.answer))
        counts: list[int] = []
        for n in range(1, CHRF_ORDER + 1):
            w, f = _ngrams(wanted, n), _ngrams(written, n)
            counts += [f.total() if w else 0, w.total(), (w & f).total()]
        rows.append(counts)
    return Figure(np.asarray(rows, np.float64).reshape(len(rows), 3 * CHRF_ORDER), _chrf)


def _chrf(sums: np.ndarray) -> np.ndarray:
    """[R, 18] of answer, reference and common n-grams -> [R]; the mean over those orders that both have."""
    written, wanted, common = (sums[:, i::3] for i in range(3))
    used = (written > 0) & (wanted > 0)
    orders = np.maximum(used.sum(1), 1)
    precision = np.where(used, common / np.maximum(written, 1), 0).sum(1) / orders
    recall = np.where(used, common / np.maximum(wanted, 1), 0).sum(1) / orders
    weight = CHRF_BETA**2
    below = weight * precision + recall
    return np.where(below > 0, 100 * (1 + weight) * precision * recall / np.where(below > 0, below, 1), 0.0)


METRICS: dict[str, dict[str, Callable[[Sequence[Answer]], Figure]]] = {  # what evaluation.metrics names -> its figures
    "exact_match": {"exact_match": lambda found: mean([float(a.exact) for a in found])},
    "f1": {"f1": each(f1)},
    "bleu": {"bleu": bleu},
    "chrf": {"chrf": chrf},
    "rouge": {
        "rouge_1": each(lambda r, a: rouge_n(r, a, 1)),
        "rouge_2": each(lambda r, a: rouge_n(r, a, 2)),
        "rouge_l": each(rouge_l),
    },
    "json": {"json_equal": each(json_equal), "valid_json": each(lambda _, a: is_json(a))},
}


def figures(found: Sequence[Answer], names: Sequence[str]) -> dict[str, Figure]:
    """By key; the share of valid JSON comes unasked where all references are JSON."""
    out = {key: make(found) for name in names for key, make in METRICS[name].items()}
    if "valid_json" not in out and names and found and all(is_json(a.reference) for a in found):
        out["valid_json"] = METRICS["json"]["valid_json"](found)
    own = set.intersection(*(set(a.scores) for a in found)) if found else set()
    return out | {name: mean([a.scores[name] for a in found]) for name in sorted(own)}


# ---------------------------------------------------------------------------- the user's functions


def load_function(place: str, option: str = "--metric") -> tuple[str, Scorer]:
    """The name and the function of `FILE.py:FUNCTION`. This runs the file, so it is for what a person has named."""
    file, separator, name = place.rpartition(":")
    path = Path(file).expanduser()
    if not separator or path.suffix != ".py" or not name.isidentifier():
        raise ConfigError(f"{option} {place!r}: expected FILE.py:FUNCTION")
    if not path.is_file():
        raise ConfigError(f"{option} {place!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"luthier_{option.strip('-')}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{option} {place!r}: {path} cannot be run: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")) or "none"
        raise ConfigError(f"{option} {place!r}: {path} has no function {name!r} (it has {known})")
    if option == "--metric":
        check_names([name])
    return name, function


def check_names(names: Iterable[str]) -> None:
    taken = {key for keys in METRICS.values() for key in keys}
    taken |= {"loss", "perplexity", "bits_per_byte", "token_accuracy", "rows", "answered", "truncated"}
    for name in names:
        if name in taken or not name.isidentifier() or name.endswith("_interval"):
            raise ConfigError(f"metric {name!r}: one of Luthier's figures has that name, or it is none; rename it")


def score_by(functions: Mapping[str, Scorer], a: Answer) -> dict[str, float]:
    """What each function gives an answer; one that fails or gives no number is a MetricError."""
    scores = {}
    for name, function in functions.items():
        row = {"row": a.row, "messages": [dict(m) for m in a.messages]}
        try:
            given = function(a.reference, a.answer, a.prompt, row)
        except Exception as error:
            raise MetricError(f"metric {name!r} failed on row {a.row}: {type(error).__name__}: {error}") from error
        number = given if isinstance(given, (bool, int, float, np.number, np.bool_)) else None
        if number is None or not math.isfinite(number):
            raise MetricError(f"metric {name!r} gave {given!r} for row {a.row}: expected a finite number")
        scores[name] = float(number)
    return scores
