"""Sampled: an answer that the network gave while it is trained, rewarded and scored; needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .document import Document


@dataclass
class Sampled:
    """One answer to one prompt. What is said of its n tokens is [n, ...], the one that ended it included."""

    prompt: int  # number of the prompt among the training documents
    row: int  # of the data
    group: int  # answers to one drawing of a prompt have the same
    tokens: np.ndarray  # [L] int32, of the prompt and the answer
    start: int  # where the answer begins: n = L - start
    ended: bool  # a stop token came, its last; else it was cut at max_completion_length
    logprobs: np.ndarray  # [n] float32, under the distribution that each token was drawn from
    raw_logprobs: np.ndarray  # [n] float32, under the network as it was sampled, at temperature 1
    reward: float = 0.0  # the weighted sum
    rewards: Mapping[str, float] = field(default_factory=dict)  # each, before weighting
    fields: dict[str, np.ndarray] = field(default_factory=dict)  # [n, ...] what the objective says of predicting each
    learnt: bool = True  # whether it is learnt from
    given: bool = False  # the row's own answer, beside those of the network

    def __len__(self) -> int:
        """n"""
        return len(self.tokens) - self.start

    def document(self) -> Document:
        """To learn its answer's tokens, with the fields."""
        weights = np.zeros(len(self.tokens), np.float32)
        weights[self.start :] = 1
        fields = {
            name: np.concatenate([np.zeros((self.start, *values.shape[1:]), values.dtype), values])
            for name, values in self.fields.items()
        }
        return Document(self.tokens, weights, self.row, fields=fields)


def grouped(samples: Sequence[Sampled]) -> list[list[Sampled]]:
    """The answers of each group, which are neighbours."""
    groups: list[list[Sampled]] = []
    for one in samples:
        if not groups or groups[-1][0].group != one.group:
            groups.append([])
        groups[-1].append(one)
    return groups


# ---------------------------------------------------------------------------- as arrays, for messages and checkpoints


def to_arrays(samples: Sequence[Sampled]) -> dict[str, np.ndarray]:
    """All of them in a few arrays; none of no samples."""
    if not samples:
        return {}
    first = samples[0]
    arrays = {
        "numbers": np.array(
            [[s.prompt, s.row, s.group, len(s.tokens), s.start, s.ended, s.learnt, s.given] for s in samples]
        ),
        "tokens": np.concatenate([s.tokens for s in samples]),
        "logprobs": np.concatenate([s.logprobs for s in samples]),
        "raw_logprobs": np.concatenate([s.raw_logprobs for s in samples]),
        "reward": np.array([s.reward for s in samples], np.float64),
    }
    arrays |= {f"rewards.{n}": np.array([s.rewards[n] for s in samples], np.float64) for n in first.rewards}
    return arrays | {f"fields.{n}": np.concatenate([s.fields[n] for s in samples]) for n in first.fields}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> list[Sampled]:
    """The inverse of `to_arrays`."""
    if not arrays:
        return []
    numbers = arrays["numbers"].tolist()
    of_all = np.cumsum([0, *(row[3] for row in numbers)])
    of_answers = np.cumsum([0, *(row[3] - row[4] for row in numbers)])

    def part(prefix: str, i: int) -> dict[str, np.ndarray]:
        a, b = of_answers[i : i + 2]
        return {n.removeprefix(prefix): v[a:b].copy() for n, v in arrays.items() if n.startswith(prefix)}

    rewards = {n.removeprefix("rewards."): v.tolist() for n, v in arrays.items() if n.startswith("rewards.")}
    out = []
    for i, (prompt, row, group, _, start, ended, learnt, given) in enumerate(numbers):
        answer = part("", i)
        out.append(
            Sampled(
                prompt, row, group, arrays["tokens"][of_all[i] : of_all[i + 1]].copy(), start, bool(ended),
                answer["logprobs"], answer["raw_logprobs"], float(arrays["reward"][i]),
                {name: column[i] for name, column in rewards.items()}, part("fields.", i), bool(learnt),
                bool(given),
            )
        )  # fmt: skip
    return out
