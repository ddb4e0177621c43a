"""Document: a row of the data as tokens, with what is learnt of it; needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Document(NamedTuple):
    """A row of the data as tokens: `tokens[i]` is learnt, as a prediction from those before, by `weights[i]`.

    It may have several members that belong together, as the two answers of a preference pair: texts of their own, one
    after the other, which see nothing of one another and are learnt in one step.
    """

    tokens: np.ndarray  # [L] int32
    weights: np.ndarray  # [L] float32; 0 where a member begins: nothing predicts its first token
    row: int  # number of the row in its file, from 0
    starts: tuple[int, ...] = (0,)  # [M] where its members begin
    labels: tuple[float, ...] = ()  # [K] what is said of the whole row: its class, its value, whether it is liked
    token_labels: np.ndarray | None = None  # [L] int32, what is said of each token; -100 says nothing
    types: np.ndarray | None = None  # [L] int32, which of two texts each token is of; None where all are of one
    cut: int = 0  # tokens of the row that were left out
    fields: Mapping[str, np.ndarray] = {}  # [L, ...] what is known of predicting each token, as `weights` are

    @property
    def members(self) -> list[Document]:
        """Its members, each a document."""
        if len(self.starts) == 1:
            return [self]
        ends = (*self.starts[1:], len(self.tokens))
        return [
            Document(
                self.tokens[a:b], self.weights[a:b], self.row, (0,), self.labels,
                None if self.token_labels is None else self.token_labels[a:b],
                fields={name: values[a:b] for name, values in self.fields.items()},
            )
            for a, b in zip(self.starts, ends)
        ]  # fmt: skip

    @property
    def inputs(self) -> int:
        """How many tokens the network has to run: those before the last learnt one; all where nothing is learnt."""
        if len(self.starts) > 1:
            return sum(member.inputs for member in self.members)
        learnt = np.flatnonzero(self.weights)
        return int(learnt[-1]) if len(learnt) else len(self.tokens)
