"""The losses of classification, and the modules: scores of texts or of tokens against their labels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import labels
from ..batch import Batch, Loss
from .classification import Classification, Labelling

# ---------------------------------------------------------------------------- losses


def cross_entropy(scores: Tensor, wanted: Tensor, weights: Tensor | None, smoothing: float) -> tuple[Tensor, Tensor]:
    """The sum over rows of w[y] * -log p(y), and the sum of w[y] by which it is divided; scores [N, K], wanted [N].

    Label smoothing by e makes it (1 - e) * -w[y] log p(y) + e * the mean over k of -w[k] log p(k), as PyTorch has it.
    """
    loss = F.cross_entropy(scores.float(), wanted, weights, reduction="sum", label_smoothing=smoothing)
    count = torch.ones_like(wanted, dtype=torch.float32) if weights is None else weights[wanted]
    return loss, count.sum()


def binary_cross_entropy(
    scores: Tensor, wanted: Tensor, weights: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum over rows and labels of -w t log s(x) - (1 - t) log(1 - s(x)), and their number; both [N, K].

    Label smoothing by e takes t to (1 - e) t + e / 2.
    """
    wanted = wanted * (1 - smoothing) + smoothing / 2 if smoothing else wanted
    loss = F.binary_cross_entropy_with_logits(scores.float(), wanted, pos_weight=weights, reduction="sum")
    return loss, wanted.new_tensor(wanted.numel())


def squared_error(scores: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over rows of (x - y)^2, and their number; both [N]."""
    return ((scores.float() - wanted) ** 2).sum(), wanted.new_tensor(len(wanted))


# ---------------------------------------------------------------------------- modules


class _Labelling(nn.Module):
    weights: Tensor | None

    def __init__(self, config: Labelling):
        super().__init__()
        self.config, self.smoothing, self.names = config, config.label_smoothing_factor, config.scores
        given = config.class_weights
        assert given != "balanced", "weights are told from the rows before a model is there"
        self.register_buffer("weights", None if given is None else torch.tensor(given, dtype=torch.float32))

    def prepare(self, network: Any, batch: Batch) -> Batch:
        return batch


class ClassificationObjective(_Labelling):
    """Of texts."""

    def __init__(self, config: Classification):
        super().__init__(config)
        self.problem = config.problem_type or labels.ONE
        metrics = {labels.ONE: "accuracy", labels.SEVERAL: "label_accuracy", labels.VALUE: "mae"}
        self.metrics = (metrics[self.problem],)

    def _scores(self, network: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """[N, K] of the rows, without what fills the batch up, and their labels [N, K] or [N, 1]."""
        return network.scores(batch)[: batch.documents].float(), batch.fields["labels"]

    def forward(self, network: Any, batch: Batch) -> Loss:
        scores, wanted = self._scores(network, batch)
        if self.problem == labels.VALUE:
            scores, wanted = scores[:, 0], wanted[:, 0]
            total, count = squared_error(scores, wanted)
            told = (scores - wanted).abs().sum()
        elif self.problem == labels.SEVERAL:
            total, count = binary_cross_entropy(scores, wanted, self.weights, self.smoothing)
            told = ((scores > 0) == (wanted > 0)).sum()
        else:
            wanted = wanted[:, 0].long()
            total, count = cross_entropy(scores, wanted, self.weights, self.smoothing)
            hits = (scores.argmax(-1) == wanted).float()
            told = (hits if self.weights is None else hits * self.weights[wanted]).sum()
        return Loss(total, count, {self.metrics[0]: told.detach().float()})

    @torch.no_grad()
    def evaluate(self, network: Any, batch: Batch) -> Loss:
        """The plain loss of each row, without class weights and smoothing, and what figures are made from: the scores
        of each label and whether the row has it."""
        scores, wanted = self._scores(network, batch)
        scores, wanted = scores.double(), wanted.double()
        if self.problem == labels.VALUE:
            columns = {"classes.value.score.value": scores[:, 0], "classes.value.label.value": wanted[:, 0]}
            return Loss((scores[:, 0] - wanted[:, 0]) ** 2, torch.ones_like(scores[:, 0]), columns)
        if self.problem == labels.SEVERAL:
            each = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none").mean(-1)
            has, kind = wanted, "several"
            found = scores.sigmoid()
        else:
            each = F.cross_entropy(scores, wanted[:, 0].long(), reduction="none")
            has, kind = F.one_hot(wanted[:, 0].long(), len(self.names)).double(), "one"
            found = scores.softmax(-1)
        columns = {f"classes.{kind}.score.{name}": found[:, i] for i, name in enumerate(self.names)}
        columns |= {f"classes.{kind}.label.{name}": has[:, i] for i, name in enumerate(self.names)}
        return Loss(each, torch.ones_like(each), columns)


class TaggingObjective(_Labelling):
    """Of the first token of each word."""

    metrics: tuple[str, ...] = ("accuracy",)

    def _scores(self, network: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of the N tokens that have a tag: scores [N, K], tags [N], and which document each is in [N]."""
        tags = batch.token_fields["labels"][: batch.ends[batch.documents]]
        if tags.is_meta:  # shapes only: a tag on each token
            return network.scores(batch).float(), tags, tags
        places = (tags != labels.NOTHING).nonzero()[:, 0]
        ends = torch.tensor(batch.ends[1:], device=places.device)
        owners = torch.bucketize(places, ends, right=True)
        return network.scores(batch)[places].float(), tags[places], owners

    def forward(self, network: Any, batch: Batch) -> Loss:
        scores, wanted, _ = self._scores(network, batch)
        total, count = cross_entropy(scores, wanted, self.weights, self.smoothing)
        hits = (scores.argmax(-1) == wanted).float()
        told = hits if self.weights is None else hits * self.weights[wanted]
        return Loss(total, count, {"accuracy": told.sum().detach()})

    @torch.no_grad()
    def evaluate(self, network: Any, batch: Batch) -> Loss:
        """The plain loss of each row [D] and its number of tags; of each tag and each kind of entity how many there
        are, how many were said, and how many of them rightly."""
        scores, wanted, owners = self._scores(network, batch)
        said, size = scores.argmax(-1), batch.documents

        def summed(values: Tensor) -> Tensor:
            zeros = torch.zeros(size, dtype=torch.float64, device=owners.device)
            return zeros.index_add_(0, owners, values.double())

        each = F.cross_entropy(scores, wanted, reduction="none")
        columns = {}
        for i, name in enumerate(self.names):
            columns[f"tags.true.{name}"] = summed(wanted == i)
            columns[f"tags.said.{name}"] = summed(said == i)
            columns[f"tags.right.{name}"] = summed((wanted == i) & (said == i))
        columns |= self._entities(wanted.tolist(), said.tolist(), owners.tolist(), size)
        return Loss(summed(each), summed(torch.ones_like(each)), {n: c.to(owners.device) for n, c in columns.items()})

    def _entities(self, wanted: list[int], said: list[int], owners: list[int], size: int) -> dict[str, Tensor]:
        kinds = labels.entity_kinds(self.names)
        columns = {f"entities.{what}.{kind}": torch.zeros(size, dtype=torch.float64) for kind in kinds
                   for what in ("true", "said", "right")}  # fmt: skip
        if not kinds:
            return {}
        for document in range(size):
            at = [i for i, owner in enumerate(owners) if owner == document]
            true, found = ({*labels.entities([self.names[of[i]] for i in at])} for of in (wanted, said))
            for what, spans in (("true", true), ("said", found), ("right", true & found)):
                for kind, *_ in spans:
                    columns[f"entities.{what}.{kind}"][document] += 1
        return columns
