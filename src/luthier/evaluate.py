"""Held-out rows measured: their loss, the answers to them, general rows, tasks; the base to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import reward_models, scores
from .assemble import assemble
from .assembled import Assembled
from .batch import Batch, Document, rectangles
from .completions import completed, fitting, prompt_of
from .config import Config
from .data import dataset as datasets
from .data.conversations import BadRow, Conversation
from .data.dataset import Dataset
from .data.masks import Renderer
from .errors import ConfigError, DataError, MetricError, RewardError
from .fields import PYTHON_DOCS
from .generate import complete, generate
from .measured import Documents, Measured
from .objectives import NextToken
from .parallel.ranks import Ranks
from .rewards import Given, scoring, with_functions
from .rewards.scoring import Built
from .scores import Answer, Scorer
from .surgery import added, trainable

Tell = Callable[[str], None]
NO_REWARD = (
    "objective.rewards: nothing says what an answer is worth: name a reward, for example "
    "objective.rewards=[exact_match], or give a function with --reward FILE.py:FUNCTION (in Python, rewards=)"
)
DOCS_ROWS, DOCS_CHARACTERS = 24, 600  # of the fixed slice of Python's documentation


@dataclass(frozen=True)
class Measurement:
    """What is to be measured, the same for base and tuned."""

    config: Config
    rows: Dataset
    forgetting: Dataset | None = None
    functions: Mapping[str, Scorer] = field(default_factory=dict)
    rewards: Sequence[Built] = ()  # of answers to held-out prompts, where the objective learns from rewards

    @classmethod
    def of(
        cls, config: Config, rows: Dataset, renderer: Renderer, say: Tell, warn: Tell,
        functions: Mapping[str, Scorer] | None = None,
    ) -> Measurement:  # fmt: skip
        """With the general rows read, if any are wanted, and the names of a user's functions checked."""
        scores.check_names(functions or {})
        if functions and not config.evaluation.generate:
            raise ConfigError("a metric scores answers: give evaluation.generate, the number of prompts to answer")
        if config.objective.rows == "prompts":
            rows = fitting(config, rows, warn)
        return cls(config, rows, general_rows(config, renderer, say, warn), functions or {})


# ---------------------------------------------------------------------------- measuring


def measure(made: Assembled, wanted: Measurement, answer: bool = True) -> Measured:
    """All figures of a network as it stands; with `answer`, those of its answers and tasks, too."""
    config = wanted.config
    asks = config.objective.rows == "prompts"  # and is measured by what its answers are worth
    sets = {} if asks else {"held_out": wanted.rows}
    if wanted.forgetting:
        sets["forgetting"] = wanted.forgetting
    found: list[Answer] = []
    tasks: dict[str, dict] = {}
    objectives = {"held_out": made.objective, "forgetting": NextToken().build()}
    documents = {name: held_out(made, rows, config.batch.micro_tokens, objectives[name]) for name, rows in sets.items()}
    if asks:
        documents["held_out"], found = rewarded(made, wanted.rows, wanted.rewards)
    if answer and config.evaluation.generate:
        e = config.evaluation
        found = answers(made, wanted.rows, e.generate, e.max_new_tokens, e.batch_size)
    if answer and config.evaluation.tasks:
        from . import harness

        tasks = harness.figures(made, config.evaluation.tasks, config.batch.micro_tokens, config.evaluation.batch_size)
    return Measured(documents, found, tasks, metrics_of(config))


def metrics_of(config: Config) -> tuple[str, ...]:
    """What scores answers against their references; rewards score those of a run that learns from them."""
    return () if config.objective.rows == "prompts" else tuple(config.evaluation.metrics)


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


def held_out(made: Assembled, dataset: Dataset, micro_tokens: int, objective: Any = None) -> Documents:
    """The sums of every document, by the run's objective or another: the same for any number of ranks."""
    objective = objective or made.objective
    training = made.network.training
    made.network.eval()
    columns: dict[str, torch.Tensor] = {}
    order = sorted(range(len(dataset)), key=lambda i: dataset.lengths[i])
    parts = rectangles(order, dataset.lengths, micro_tokens)
    mine = made.ranks.mine(parts)
    def batch_of(part: Sequence[int]) -> Batch:
        return Batch.pack([dataset.documents[i] for i in part]).to(made.ranks.device)

    try:
        with torch.no_grad():
            if survey := getattr(objective, "survey", None):
                survey(made.network, map(batch_of, mine), made.ranks.sum_)
            for part in mine or parts[:1]:  # a rank that has none must know the columns, too
                loss = objective.evaluate(made.network, batch_of(part))
                for name, sums in {"loss": loss.total, "weight": loss.count, **loss.metrics}.items():
                    column = columns.setdefault(name, torch.zeros(len(dataset), dtype=torch.float64))
                    if mine:
                        column[part] = sums.double().cpu()
    finally:
        made.network.train(training)
    summed = {name: made.ranks.sum_(c.to(made.ranks.device)).cpu().numpy() for name, c in columns.items()}
    if not summed["weight"].any():
        raise DataError(f"{dataset.source}: no token of these rows is learnt, so they have no loss")
    if "nll" in summed:
        summed["bytes"] = learnt_bytes(made.tokenizer, dataset.documents)
    return Documents([d.row for d in dataset.documents], summed)


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


def built_rewards(
    config: Config, functions: Mapping[str, Callable[..., Any]], ranks: Ranks, tell: Tell
) -> list[Built]:  # fmt: skip
    """The rewards of a run: those of its configuration, and functions that this does not name; ConfigError if none."""
    wanted = with_functions(config.objective.rewarded or [], list(functions))
    if not wanted:
        raise ConfigError(NO_REWARD)
    return scoring.build(wanted, Given(functions, reward_models.loader(ranks, tell)))


def rewarded(made: Assembled, dataset: Dataset, rewards: Sequence[Built]) -> tuple[Documents, list[Answer]]:
    """Greedy answers to all prompts and what rewards say of each; the ranks share them. RewardError on all ranks."""
    s, stop = made.config.objective.sampling, made.renderer.stop_tokens()
    mine = made.ranks.mine(range(len(dataset)))
    prompts = [prompt_of(made.config, dataset, i) for i in mine]
    given = complete(made.network, prompts, stop, s.max_completion_length, batch_size=s.decode_batch_size)
    answered = [completed(made, dataset, i, g.tokens, g.ended) for i, g in zip(mine, given)]
    tokens = torch.zeros(len(dataset), s.max_completion_length + 2, dtype=torch.int64)
    numbers = torch.zeros(len(dataset), 1 + len(rewards), dtype=torch.float64)
    error = None
    try:
        found = scoring.total(rewards, answered) if mine else None
    except RewardError as caught:
        found, error = None, caught
    if made.ranks.any(error is not None):
        raise error or RewardError("a reward failed on another rank, which says how")
    for at, (i, g) in enumerate(zip(mine, given)):
        tokens[i, : 2 + len(g.tokens)] = torch.tensor([len(g.tokens), g.ended, *g.tokens])
        assert found is not None
        numbers[i] = torch.tensor([found.totals[at], *(column[at] for column in found.columns.values())])
    tokens, numbers = (made.ranks.sum_(t.to(made.ranks.device)).cpu() for t in (tokens, numbers))
    names = ["reward", *(f"reward.{built.name}" for built in rewards)]
    out = []
    for i, ((length, ended, *row), values) in enumerate(zip(tokens.tolist(), numbers.tolist())):
        one = completed(made, dataset, i, row[:length], bool(ended))
        wanted = one.columns.get("answer")
        out.append(
            Answer(
                one.row, one.prompt, wanted if isinstance(wanted, str) else "", one.completion, truncated=not ended,
                scores=dict(zip(names, values)), messages=tuple(one.messages),
            )
        )  # fmt: skip
    columns = {"weight": np.ones(len(dataset)), "completion_length": tokens[:, 0].double().numpy()}
    return Documents([d.row for d in dataset.documents], columns), out


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
    source, renderer = config.evaluation.forgetting, renderer.of_text()
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


# ---------------------------------------------------------------------------- the base


@contextmanager
def base_of(made: Assembled, tell: Tell) -> Iterator[Assembled]:
    """The network as it was before it was trained, with the adapters that lie frozen beneath. Where more than adapters
    moved, it is loaded afresh and takes the place of the tuned one, whose memory is given up: measure that first."""
    inside = {id(p) for p in added(made.network.model)}
    adapted = inside and all(id(p) in inside for p in trainable(made.network.model).values())
    if adapted or made.config.objective.compares:
        with made.as_base():
            yield made
        return
    made.network.to("meta")
    tell("loading the base model again, to compare with it")
    fresh = assemble(made.config, tell, training=False)
    fresh.network.eval()
    with fresh.as_base():  # where it was trained rounded, the base is not
        yield fresh
