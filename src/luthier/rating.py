"""Scores of whole conversations by a trained reward model, written as they were when it was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .batch import Batch, rectangles
from .data import kinds, whole_pairs
from .data.conversations import BadRow, Conversation, said
from .data.formats import converted, recognise
from .data.masks import Rendered, Renderer
from .data.sources import Row
from .document import Document
from .errors import DataError
from .models.network import Network

BETWEEN = "\t"  # of a prompt and its answer
Given = str | Mapping | Sequence[Mapping]


class Rater:
    """A model that gives conversations one score each. `columns` are those of the run's rows, as data.columns is."""

    def __init__(
        self, network: Network, renderer: Renderer, columns: Mapping[str, str] | None = None, micro_tokens: int = 4096,
        system: str | None = None,
    ):  # fmt: skip
        self.network, self.renderer, self.micro_tokens = network, renderer, micro_tokens
        self.columns, self.system = columns or {}, system

    def __call__(self, *given: Given) -> list[dict[str, Any]]:
        """The `score` of each: of a prompt and its answer with a tab between, of messages, or of a row in any format of
        answers; of a row of preferences the scores of `chosen` and `rejected`, and their `margin`.

        A row with `text` alone is read as it stands, without the chat template, as rows of two texts are.
        """
        rows = [self._rendered(number, one) for number, one in enumerate(given)]
        documents: list[Document] = []
        for number, made in enumerate(self.renderer.documents(list(enumerate(rows)))):
            if isinstance(made, BadRow):
                raise _error(number, made)
            documents += [member._replace(labels=()) for member in made[0].members]
        scores = iter(self._scores(documents))
        return [_pair(next(scores), next(scores)) if row.rest else {"score": next(scores)} for row in rows]

    def _rendered(self, number: int, given: Given) -> Rendered:
        try:
            return self._row(number, given)
        except BadRow as fault:
            raise _error(number, fault) from None

    def _row(self, number: int, given: Given) -> Rendered:
        if isinstance(given, str):
            prompt, tab, answer = given.partition(BETWEEN)
            if not tab:
                raise BadRow("empty_answer", "there is no answer to score: give the prompt and its answer with a tab "
                                             "between, messages, or a row, as JSON")  # fmt: skip
            turns = [said("user", prompt), said("assistant", answer)]
            turns = [said("system", self.system), *turns] if self.system else turns
            return whole_pairs.alone(self.renderer, Conversation([message for message, _ in turns]))
        if self.system:
            raise BadRow("format", "a system turn goes with a prompt and its answer; messages and rows have their own")
        values = given if isinstance(given, Mapping) else {"messages": list(given)}
        columns = self.columns if all(column in values for column in self.columns.values()) else {}
        row = Row(number, dict(values), f"row {number}")
        for kind, render in (("pairs", kinds.KINDS["whole_pairs"]), ("text", whole_pairs.alone)):
            try:
                form = recognise(values, row.place, columns, kind)
            except DataError:
                if kind == "text":
                    raise
                continue
            return render(self.renderer, converted(row, form, columns))
        raise AssertionError

    @torch.no_grad()
    def _scores(self, documents: Sequence[Document]) -> list[float]:
        """Of each document, whatever it is batched with."""
        lengths = [document.inputs for document in documents]
        out = [0.0] * len(documents)
        self.network.eval()
        for part in rectangles(sorted(range(len(lengths)), key=lengths.__getitem__), lengths, self.micro_tokens):
            if part:
                batch = Batch.pack([documents[i] for i in part]).to(self.network.device)
                for i, score in zip(part, self.network.scores(batch)[:, 0].float().tolist()):
                    out[i] = score
        return out


def read(line: str) -> Given:
    """What a line is: JSON of a row or of messages, else a prompt and its answer."""
    if line.lstrip().startswith(("{", "[")):
        try:
            return json.loads(line)
        except ValueError as error:
            if BETWEEN not in line:
                raise DataError(f"{line[:60]!r} begins as JSON, and is none: {error}") from None
    return line


def _pair(chosen: float, rejected: float) -> dict[str, float]:
    return {"chosen": chosen, "rejected": rejected, "margin": chosen - rejected}


def _error(number: int, fault: BadRow) -> DataError:
    return DataError(f"row {number}: {fault.kind}: {fault.detail}")
