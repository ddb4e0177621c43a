"""Tasks of lm-evaluation-harness on our network: packed rows for likelihoods, batched decoding for answers.

https://github.com/EleutherAI/lm-evaluation-harness; a folder of task files and their data needs no network.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .assembled import Assembled
from .batch import Batch, Document, rectangles
from .errors import ConfigError
from .generate import generate
from .intervals import mean
from .logprobs import scored

os.environ.setdefault("TQDM_DISABLE", "1")  # its progress bars; ours say what is done
try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as problem:
    raise ConfigError(
        f"tasks are done with lm-evaluation-harness: pip install 'luthier[eval]' ({problem})"
    ) from None

DEFAULT_NEW_TOKENS = 256  # lm-evaluation-harness's, where a task says nothing


def figures(made: Assembled, tasks: Sequence[str], micro_tokens: int, batch_size: int) -> dict[str, dict]:
    """`tasks.NAME.METRIC` -> value, interval, the value of each row where the figure is their mean, what is better."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager, names = _found(tasks)
    training = made.network.training
    made.network.eval()
    try:
        with torch.no_grad():
            results: Any = lm_eval.simple_evaluate(
                model=Adapter(made, micro_tokens, batch_size), tasks=names, task_manager=manager, log_samples=True
            )
    finally:
        made.network.train(training)
    out: dict[str, dict] = {}
    for task, measured in results["results"].items():
        rows = results["samples"].get(task, [])
        for key, value in measured.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            name = f"tasks.{task}.{metric}" + ("" if kind == "none" else f".{kind}")
            better = results["higher_is_better"].get(task, {}).get(metric, True)
            out[name] = _figure(value, measured.get(f"{metric}_stderr,{kind}"), rows, metric, kind) | {
                "higher_is_better": better is not False
            }
    return out


def _figure(value: float, error: Any, rows: Sequence[dict], metric: str, kind: str) -> dict:
    """Paired rows where the figure is their mean, else the normal interval of the harness's standard error."""
    mine = [r for r in rows if r.get("filter", kind) == kind and metric in r]
    samples = [r[metric] for r in sorted(mine, key=lambda r: r["doc_id"])]
    plain = bool(samples) and all(isinstance(s, (bool, int, float, np.number)) and math.isfinite(s) for s in samples)
    if plain and math.isclose(sum(samples) / len(samples), value, rel_tol=1e-9, abs_tol=1e-12):
        found = mean([float(s) for s in samples])
        interval = found.interval()
        return {"value": found.value, "interval": interval and list(interval), "samples": [float(s) for s in samples]}
    finite = isinstance(error, (int, float)) and math.isfinite(error)
    interval = [value - 1.96 * error, value + 1.96 * error] if finite else None
    return {"value": value if math.isfinite(value) else None, "interval": interval, "samples": None}


def _found(tasks: Sequence[str]) -> tuple[Any, list[str]]:
    """The manager and the names of all tasks; the harness's own are only looked through where one is named."""
    paths = [Path(task).expanduser() for task in tasks]
    folders = [p if p.is_dir() else p.parent for p in paths if p.exists()]
    manager = TaskManager(
        include_path=[str(f.resolve()) for f in dict.fromkeys(folders)] or None,
        include_defaults=any(not p.exists() for p in paths),
    )
    names: list[str] = []
    for task, path in zip(tasks, paths):
        if not path.exists():
            if task not in manager.task_index:
                raise ConfigError(f"tasks: lm-evaluation-harness knows no task {task!r}, and there is no such file")
            names.append(task)
            continue
        inside = [n for n, entry in manager.task_index.items() if _lies_in(entry, path) and n in manager.all_subtasks]
        if not inside:
            raise ConfigError(f"tasks: {path} defines no task of lm-evaluation-harness (a YAML file with `task: NAME`)")
        names += inside
    return manager, list(dict.fromkeys(names))


def _lies_in(entry: Any, path: Path) -> bool:
    place = Path(entry.yaml_path).resolve() if getattr(entry, "yaml_path", None) else None
    return place is not None and (place == path.resolve() or (path.is_dir() and path.resolve() in place.parents))


class Adapter(TemplateLM):
    """Takes the harness's requests to our network. All ranks get all requests and share the work inside."""

    tokenizer: Any

    def __init__(self, made: Assembled, micro_tokens: int, batch_size: int):
        super().__init__()
        self.made, self.micro_tokens, self.batch = made, micro_tokens, batch_size
        self.tokenizer = made.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        return getattr(self.made.network.config.get_text_config(), "max_position_embeddings", None) or 2048

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # not where a template has written it already
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether each token was the likeliest."""
        documents = [_document(context, continuation, self.max_length) for _, context, continuation in requests]
        ranks, network = self.made.ranks, self.made.network
        lengths = [d.inputs for d in documents]
        table = torch.zeros(len(documents), 2, dtype=torch.float64)
        order = sorted(range(len(documents)), key=lambda i: lengths[i])
        for part in ranks.mine(rectangles(order, lengths, self.micro_tokens)):
            batch = Batch.pack([documents[i] for i in part]).to(ranks.device)
            hidden, targets, _ = network.predictions(batch, network.hidden(batch))
            logprobs, hits = scored(hidden, network.head, targets)
            counts = [int(np.count_nonzero(documents[i].weights)) for i in part]
            for i, p, h in zip(part, logprobs.double().split(counts), hits.split(counts)):
                table[i] = torch.tensor([p.sum().item(), h.all().item()])
        return [(p, bool(h)) for p, h in ranks.sum_(table.to(ranks.device)).tolist()]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the model's length where they are longer."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text)
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[i] += logprob
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each cut at the first of its stop sequences."""
        groups: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            options = request.args[1]
            options = normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS)
            if options.get("do_sample"):
                raise ConfigError("tasks: a task asks for sampled answers, which are not offered; set do_sample: false")
            stops = handle_stop_sequences(options.get("until"), self.tokenizer.decode([self.eot_token_id]))
            groups.setdefault((int(options["max_gen_toks"]), tuple(stops)), []).append(i)
        out = [""] * len(requests)
        for (limit, stops), members in groups.items():
            room = self.max_length - limit
            if room < 1:
                raise ConfigError(f"tasks: {limit} new tokens leave no room in the model's {self.max_length} positions")
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
            for i, text in zip(members, self._texts(prompts, limit, stops)):
                out[i] = postprocess_generated_text(text, list(stops), None)
        return out

    def _texts(self, prompts: list[list[int]], limit: int, stops: Sequence[str]) -> list[str]:
        ranks, network = self.made.ranks, self.made.network
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        batches = [order[start : start + self.batch] for start in range(0, len(order), self.batch)]
        mine = list(chain.from_iterable(ranks.mine(batches)))
        table = torch.zeros(len(prompts), limit + 1, dtype=torch.int64)  # how many tokens, and which

        def finished(tokens: list[int]) -> bool:
            text = self.tokenizer.decode(tokens)
            return any(stop in text for stop in stops)

        new = generate(
            network, [prompts[i] for i in mine], {self.eot_token_id}, limit, batch_size=self.batch, finished=finished
        )
        for i, tokens in zip(mine, new):
            table[i, : len(tokens) + 1] = torch.tensor([len(tokens), *tokens])
        rows = ranks.sum_(table.to(ranks.device)).tolist()
        return [self.tokenizer.decode(tokens[:length], skip_special_tokens=True) for length, *tokens in rows]


def _document(context: list[int], continuation: list[int], longest: int) -> Document:
    """A context too long for the model loses its beginning, as the harness would have it."""
    tokens = np.asarray([*context, *continuation][-(longest + 1) :], np.int32)
    weights = np.zeros(len(tokens), np.float32)
    weights[len(tokens) - min(len(continuation), len(tokens) - 1) :] = 1.0
    return Document(tokens, weights, 0)

