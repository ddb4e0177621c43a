"""What a network can do on held-out rows, base against tuned, every figure with an interval."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import scores
from .assemble import Assembled, assemble
from .batch import Batch, Document
from .config import PYTHON_DOCS, Config
from .data import dataset as datasets
from .data.dataset import Dataset
from .data.formats import BadRow, Conversation
from .data.masks import Renderer
from .errors import ConfigError, DataError, MetricError
from .files import write_atomically
from .generate import generate
from .intervals import Figure, finite, quotient, sign_test
from .parallel.ranks import Ranks
from .scores import Answer, Scorer
from .surgery import adapters, adapters_off, trainable

Tell = Callable[[str], None]
DOCS_ROWS, DOCS_CHARACTERS = 24, 600  # of the fixed slice of Python's documentation


@dataclass(frozen=True)
class Measurement:
    """What is to be measured, the same for base and tuned."""

    config: Config
    rows: Dataset
    forgetting: Dataset | None = None
    functions: Mapping[str, Scorer] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: Config, rows: Dataset, renderer: Renderer, say: Tell, warn: Tell,
        functions: Mapping[str, Scorer] | None = None,
    ) -> Measurement:  # fmt: skip
        """With the general rows read, if any are wanted, and the names of a user's functions checked."""
        scores.check_names(functions or {})
        if functions and not config.evaluation.generate:
            raise ConfigError("a metric scores answers: give evaluation.generate, the number of prompts to answer")
        return cls(config, rows, general_rows(config, renderer, say, warn), functions or {})


@dataclass(frozen=True)
class Documents:
    """Sums over the learnt tokens of each held-out row; all columns are [D]."""

    rows: list[int]
    columns: dict[str, np.ndarray]  # loss (weighted), weight, bytes, and what the objective counts: token_accuracy, nll

    def figures(self, prefix: str = "") -> dict[str, Figure]:
        c = self.columns

        def of(above: str, below: str, of_sums: Callable = quotient, higher: bool = False) -> Figure:
            return Figure(np.stack([c[above], c[below]], 1), of_sums, higher)

        out = {"loss": of("loss", "weight")}
        if "nll" in c:
            out |= {"perplexity": of("loss", "weight", _perplexity), "bits_per_byte": of("nll", "bytes", _bits)}
        if "token_accuracy" in c:
            out["token_accuracy"] = of("token_accuracy", "weight", higher=True)
        return {prefix + key: figure for key, figure in out.items()}

    def subset(self, at: Sequence[int]) -> Documents:
        return Documents([self.rows[i] for i in at], {name: c[list(at)] for name, c in self.columns.items()})


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
    told = [f"loss {values['loss']:.4f}"]
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
            told.append(f"{values['truncated']} of them cut at evaluation.max_new_tokens")
    return ", ".join(told)


_SHOWN = ("loss", "perplexity", "bits_per_byte", "token_accuracy")

# ---------------------------------------------------------------------------- measuring


def measure(made: Assembled, wanted: Measurement, answer: bool = True) -> Measured:
    """All figures of a network as it stands; with `answer`, those of its answers and tasks, too."""
    config = wanted.config
    sets = {"held_out": wanted.rows} | ({"forgetting": wanted.forgetting} if wanted.forgetting else {})
    found: list[Answer] = []
    tasks: dict[str, dict] = {}
    documents = {name: held_out(made, rows, config.batch.micro_tokens) for name, rows in sets.items()}
    if answer and config.evaluation.generate:
        e = config.evaluation
        found = answers(made, wanted.rows, e.generate, e.max_new_tokens, e.batch_size)
    if answer and config.evaluation.tasks:
        from . import harness

        tasks = harness.figures(made, config.evaluation.tasks, config.batch.micro_tokens, config.evaluation.batch_size)
    return Measured(documents, found, tasks, tuple(config.evaluation.metrics))


def score(ranks: Ranks, functions: Mapping[str, Scorer], measured: Measured, kept: Path | None = None) -> Measured:
    """The answers scored by a user's functions, each by one rank. An error is raised on all ranks."""
    if not functions or not measured.answers:
        return measured
    given = torch.zeros(len(measured.answers), len(functions), dtype=torch.float64)
    error = None
    for i in ranks.mine(range(len(measured.answers))):
        try:
            given[i] = torch.tensor(list(scores.score_by(functions, measured.answers[i]).values()))
        except MetricError as caught:
            error = caught
            break
    if ranks.any(error is not None):
        told = str(error) if error else "a metric failed on another rank, which says how"
        where = f"; the answers are kept in {kept}, nothing is lost: mend the function and start again" if kept else ""
        raise MetricError(told + where) from error
    numbers = ranks.sum_(given.to(ranks.device)).tolist()
    scored = [replace(a, scores=dict(zip(functions, row))) for a, row in zip(measured.answers, numbers)]
    return replace(measured, answers=scored)


def held_out(made: Assembled, dataset: Dataset, micro_tokens: int) -> Documents:
    """The sums of every document: the same for any number of ranks."""
    training = made.network.training
    made.network.eval()
    columns: dict[str, torch.Tensor] = {}
    order = sorted(range(len(dataset)), key=lambda i: dataset.lengths[i])
    parts = rows_of(order, dataset.lengths, micro_tokens)
    mine = made.ranks.mine(parts)
    try:
        with torch.no_grad():
            for part in mine or parts[:1]:  # a rank that has none must know the columns, too
                batch = Batch.pack([dataset.documents[i] for i in part])
                loss = made.objective.evaluate(made.network, batch.to(made.ranks.device))
                for name, sums in {"loss": loss.total, "weight": loss.count, **loss.metrics}.items():
                    column = columns.setdefault(name, torch.zeros(len(dataset), dtype=torch.float64))
                    if mine:
                        column[part] = sums.double().cpu()
    finally:
        made.network.train(training)
    summed = {name: made.ranks.sum_(c.to(made.ranks.device)).cpu().numpy() for name, c in columns.items()}
    if not summed["weight"].any():
        raise DataError(f"{dataset.source}: no token of these rows is learnt, so they have no loss")
    summed["bytes"] = learnt_bytes(made.tokenizer, dataset.documents)
    return Documents([d.row for d in dataset.documents], summed)


def rows_of(order: Sequence[int], lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Consecutive documents whose padded rectangle has at most `micro_tokens` slots."""
    rows: list[list[int]] = [[]]
    for i in order:
        longest = max(lengths[j] for j in [*rows[-1][-1:], i])
        if rows[-1] and longest * (len(rows[-1]) + 1) > micro_tokens:
            rows.append([])
        rows[-1].append(i)
    return rows


def learnt_bytes(tokenizer: Any, documents: Sequence[Document]) -> np.ndarray:
    """[D] UTF-8 bytes of the text whose tokens are learnt, special tokens left out; a character counts whole.

    Each stretch of learnt tokens is read after what stands before it, as a decoder may drop a text's first blank.
    """
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    out = np.zeros(len(documents))
    for at, document in enumerate(documents):
        learnt = [w > 0 and t not in special for t, w in zip(document.tokens.tolist(), document.weights.tolist())]
        edges = np.flatnonzero(np.diff([False, *learnt, False])).tolist()
        for start, stop in zip(edges[::2], edges[1::2]):
            before, whole = (_decoded(tokenizer, document.tokens[:n]) for n in (start, stop))
            # A mark at the end: the first bytes of a character that is finished, and counted, in this stretch.
            out[at] += len(whole.encode()) - len(before.rstrip("\ufffd").encode())
    return out


def _decoded(tokenizer: Any, tokens: np.ndarray) -> str:
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def answers(
    made: Assembled, dataset: Dataset, limit: int, max_new_tokens: int, batch_size: int,
) -> list[Answer]:  # fmt: skip
    """Greedy answers to the prompts of the first `limit` rows that ask something; the ranks share the batches."""
    asked = _asked(made, dataset, limit, max_new_tokens)
    order = sorted(range(len(asked)), key=lambda i: len(asked[i][1]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = [i for batch in made.ranks.mine(batches) for i in batch]
    stop = made.renderer.stop_tokens()
    new = generate(made.network, [asked[i][1] for i in mine], stop, max_new_tokens, batch_size=batch_size)
    table = torch.zeros(len(asked), max_new_tokens + 1, dtype=torch.int64)  # how many tokens, and which
    for i, tokens in zip(mine, new):
        table[i, : len(tokens) + 1] = torch.tensor([len(tokens), *tokens])
    out = []
    for (at, _, reference), (length, *tokens) in zip(asked, made.ranks.sum_(table.to(made.ranks.device)).tolist()):
        text = made.tokenizer.decode(tokens[:length], skip_special_tokens=True).strip()
        messages = dataset.conversations[at].messages
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        users = [m["content"] for m in messages[:last] if m["role"] == "user"]
        row, prompt = dataset.documents[at].row, users[-1] if users else ""
        cut = length == max_new_tokens
        out.append(Answer(row, prompt, reference, text, truncated=cut, messages=tuple(messages[:last])))
    return out


def _asked(made: Assembled, dataset: Dataset, limit: int, max_new_tokens: int) -> list[tuple[int, list[int], str]]:
    """(position in the data set, prompt, reference) of each row to be answered."""
    positions = getattr(made.network.config.get_text_config(), "max_position_embeddings", None)
    out: list[tuple[int, list[int], str]] = []
    for at, conversation in enumerate(dataset.conversations):
        if len(out) == limit:
            break
        if conversation.plain:  # a text asks nothing
            continue
        prompt, reference = made.renderer.prompt(conversation)
        if not prompt:
            continue
        document = dataset.documents[at]
        if positions is not None and len(prompt) + max_new_tokens > positions:
            raise DataError(
                f"evaluation.generate: the prompt of row {document.row} has {len(prompt)} tokens, and with "
                f"evaluation.max_new_tokens={max_new_tokens} it passes the {positions} positions of the model: lower "
                "evaluation.max_new_tokens, or take the row out"
            )
        if not reference:  # a call of a tool: what the template makes of it
            tokens = document.tokens[len(prompt) :].tolist()
            reference = made.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        out.append((at, prompt, reference))
    if not out:
        raise DataError(
            f"evaluation.generate: {dataset.source} has no row that asks something (plain text has no prompt): set "
            "evaluation.generate=0, or hold out rows with a prompt"
        )
    return out


# ---------------------------------------------------------------------------- general rows, for forgetting


def general_rows(config: Config, renderer: Renderer, say: Tell, warn: Tell) -> Dataset | None:
    """The rows of `evaluation.forgetting`, which are not the task's; their format is told by their keys."""
    source = config.evaluation.forgetting
    if source is None:
        return None
    if source == PYTHON_DOCS:
        return python_docs(renderer)
    plainly = {"format": "auto", "columns": {}, "subset": None, "validation": None, "limit": None, "streaming": False}
    data = config.data.model_copy(update={"train": source, **plainly})
    rows, _ = datasets.open_rows(data, renderer, None, lambda text: say(f"forgetting: {text}"), warn)
    assert isinstance(rows, Dataset)
    return rows


def python_docs(renderer: Renderer) -> Dataset:
    """Pieces of the running Python's documentation, taken evenly from `pydoc_data.topics` (PSF licence)."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore").decode()
    size = min(DOCS_CHARACTERS, renderer.max_length - 4)  # a token is at least a character here; special tokens beside
    starts = [i * (len(text) - size) // (DOCS_ROWS - 1) for i in range(DOCS_ROWS)]
    documents: list[Document] = []
    conversations: list[Conversation] = []
    for i, start in enumerate(starts):
        piece = text[start : start + size].strip()
        conversation = Conversation([{"role": "assistant", "content": piece}], plain=True)
        made = renderer.documents([(i, renderer.render(conversation))])[0]
        if not isinstance(made, BadRow):
            documents += made
            conversations += [conversation] * len(made)
    return Dataset(documents, conversations, [], "text", PYTHON_DOCS, renderer)


# ---------------------------------------------------------------------------- base against tuned


@contextmanager
def base_of(made: Assembled, tell: Tell) -> Iterator[Assembled]:
    """The network as it was before it was trained. Where more than adapters moved, it is loaded afresh and takes the
    place of the tuned one, whose memory is given up: measure that first."""
    inside = {id(p) for _, a in adapters(made.network.model) for p in a.parameters()}
    inside -= {id(p) for _, a in adapters(made.network.model) for p in a.base.parameters()}
    if inside and all(id(p) in inside for p in trainable(made.network.model).values()):
        with adapters_off(made.network.model):
            yield made
        return
    made.network.to("meta")
    tell("loading the base model again, to compare with it")
    fresh = assemble(made.config, tell, training=False)
    fresh.network.eval()
    yield fresh


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
    if tuned.answers:
        report["answers"] = {"tuned": summary(tuned.answers, tuned.metrics)}
        if base and base.answers:
            exact = (scores.METRICS["exact_match"]["exact_match"](m.answers) for m in (base, paired))
            change = _changed(*exact)
            report["answers"] = {"base": summary(base.answers, base.metrics), **report["answers"]}
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
    theirs = {(r, *(other.columns[n][i] for n in ("weight", "bytes"))) for i, r in enumerate(other.rows)}
    at = [i for i, r in enumerate(one.rows) if (r, *(one.columns[n][i] for n in ("weight", "bytes"))) in theirs]
    return one.subset(at)


def _alike(one: dict, other: dict) -> bool:
    if one["samples"] is None or other["samples"] is None:
        return one["samples"] is other["samples"]
    return len(one["samples"]) == len(other["samples"])


def summary(found: Sequence[Answer], metrics: Sequence[str] = ("exact_match",)) -> dict:
    """The figures of answers, with how many there are and how many did not come to their end."""
    out: dict = {"rows": len(found), "truncated": sum(a.truncated for a in found)}
    for key, figure in scores.figures(found, list(dict.fromkeys(["exact_match", *metrics]))).items():
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
