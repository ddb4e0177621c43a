"""Document: a stretch of the data as tokens, with what is learnt of it; needs no PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Document(NamedTuple):
    """A row of the data as tokens: `tokens[i]` is learnt, as a prediction from those before, by `weights[i]`."""

    tokens: np.ndarray  # [L] int32
    weights: np.ndarray  # [L] float32; weights[0] is 0: nothing predicts the first token
    row: int  # number of the row in its file, from 0

    @property
    def inputs(self) -> int:
        """How many tokens the network has to run: those before the last learnt one; all where nothing is learnt."""
        learnt = np.flatnonzero(self.weights)
        return int(learnt[-1]) if len(learnt) else len(self.tokens)
