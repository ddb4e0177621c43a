"""Hidden states of a student beside those of its teacher: which layers, learnt maps between widths, distances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from .distillation import HiddenStates


def layer_pairs(wanted: HiddenStates, student: int, teacher: int) -> list[tuple[int, int]]:
    """[student's layer, teacher's layer] of networks of so many layers."""
    if wanted.layers is None:
        return [(i, (i + 1) * teacher // student - 1 if student <= teacher else i * teacher // student)
                for i in range(student)]  # fmt: skip
    for one, other in wanted.layers:
        for layer, count, whose in ((one, student, "the student"), (other, teacher, "the teacher")):
            if not 0 <= layer < count:
                raise ModelError(
                    f"objective.hidden_states.layers: [{one}, {other}], but {whose} has the layers 0 to {count - 1}"
                )
    return [(one, other) for one, other in wanted.layers]


class HiddenStateMatching(nn.Module):
    """A map from the student's width to the teacher's for each pair of layers, where the two differ."""

    def __init__(self, config: HiddenStates, pairs: Sequence[tuple[int, int]], width: int, wanted: int):
        super().__init__()
        self.config, self.pairs = config, list(pairs)
        maps = (nn.Linear(width, wanted, bias=False) for _ in pairs) if width != wanted else ()
        self.maps = nn.ModuleList(maps)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """[N] the mean distance over the pairs; the states [N, H] and [N, H'] of each pair, in its order."""
        total = student[0].new_zeros(len(student[0]), dtype=torch.float32)
        for i, (own, theirs) in enumerate(zip(student, teacher)):
            own = self.maps[i](own.float()) if self.maps else own
            total = total + distance(self.config.loss, own.float(), theirs.float())
        return total / len(self.pairs)


def distance(kind: str, own: Tensor, theirs: Tensor) -> Tensor:
    """[N] of states [N, H]."""
    if kind == "mse":
        return (own - theirs).square().mean(-1)
    return 1 - F.cosine_similarity(own, theirs, dim=-1)
