"""Classification and regression of texts, and of each of their words: the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from ..errors import DataError
from ..labels import ONE, SEVERAL, VALUE, Tally, balanced
from .objective import Known, Learning

if TYPE_CHECKING:
    from torch import nn

MANY = 20  # so many names, and a name for every other row, are probably values


class Labelling(Learning):
    """What is common to labels of texts and of words."""

    labels: list[str] = []
    """Names of the labels in their order, by which integers in the data count; by default as found in the training
    rows: integers by size, names by their letters, the tag `O` first."""
    class_weights: Literal["balanced"] | list[Annotated[float, Field(gt=0)]] | None = None
    """A factor of the loss for each label, or `balanced`, so that each counts the same; of several labels, for rows
    that have the label."""
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1)
    """This share of the target is spread evenly over the labels (arXiv:1512.00567); in training only."""

    @property
    def asks_labels(self) -> bool:
        return not self.labels or self.class_weights == "balanced"

    def settled(self, known: Known) -> Self:
        if known.labels is None or not self.asks_labels:
            return self
        each = (tag for tags in known.labels for tag in tags) if self.rows == "tagged" else known.labels
        tally = Tally.of(each, self.problem)
        if not tally.counts and tally.problem != VALUE:
            raise DataError("data.train: no row has a label; name the column that holds it with data.columns")
        return self.model_copy(update=self._told(tally))

    def _told(self, tally: Tally) -> dict[str, Any]:
        names = self.labels or tally.names
        made: dict[str, Any] = {"labels": names}
        if self.class_weights == "balanced":
            counts = [tally.counts.get(name, 0) for name in names]
            if names == self.labels and not any(counts):  # the rows have integers
                counts = [tally.counts.get(str(i), 0) for i in range(len(names))]
            made["class_weights"] = balanced(counts, tally.problem or ONE, tally.rows)
        return made

    def problems(self) -> list[str]:
        """What of these settings does not go together."""
        found, names, weights = [], self.labels, self.class_weights
        if twice := sorted({name for name in names if names.count(name) > 1}):
            found.append(f"objective.labels: {twice[0]!r} is there twice")
        if any(not name.strip() for name in names):
            found.append("objective.labels: a name is empty")
        if isinstance(weights, list) and not names:
            found.append("objective.class_weights: in which order? give objective.labels, too, or use balanced")
        elif isinstance(weights, list) and len(weights) != len(names):
            found.append(f"objective.class_weights has {len(weights)} numbers, and objective.labels {len(names)} names")
        return found


class Classification(Labelling):
    """Labels of texts by a head on the network: one or several for each, or a value (regression)."""

    rows: ClassVar[str] = "labelled"
    ends_in: ClassVar[str] = "text"
    kind: Literal["classification"] = "classification"
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    """One label a row (cross-entropy), several (binary cross-entropy of each), or a value (squared error); by default
    as the training rows have it: lists are several labels, numbers with a fraction are values."""

    @property
    def scores(self) -> tuple[str, ...]:
        return ("value",) if self.problem_type == VALUE else tuple(self.labels)

    @property
    def problem(self) -> str | None:
        return self.problem_type

    @property
    def asks_labels(self) -> bool:
        return self.problem_type is None or (self.problem_type != VALUE and super().asks_labels)

    def _told(self, tally: Tally) -> dict[str, Any]:
        if tally.problem == VALUE:
            if problems := self.model_copy(update={"problem_type": VALUE}).problems():
                raise DataError(f"data.train: its labels are numbers, and {'; '.join(problems)}")
            return {"problem_type": VALUE}
        if not self.labels and self.problem_type is None and len(tally.counts) > max(MANY, tally.rows // 2):
            raise DataError(
                f"data.train: {tally.rows:,} rows have {len(tally.counts):,} labels: is another column the label "
                "(data.columns), or are they values (objective.problem_type=regression)? If all are labels, say "
                f"objective.problem_type={tally.problem}"
            )
        return super()._told(tally) | {"problem_type": tally.problem}

    def problems(self) -> list[str]:
        found = super().problems()
        if self.problem_type == VALUE:
            given = {"labels": self.labels, "class_weights": self.class_weights,
                     "label_smoothing_factor": self.label_smoothing_factor}  # fmt: skip
            for name, value in given.items():
                if value:
                    found.append(
                        f"objective.{name} is of labels, and problem_type=regression learns values: leave it out"
                    )
        elif len(self.labels) == 1 and self.problem_type != SEVERAL:
            found.append(f"objective.labels={self.labels} is a single class: there is nothing to tell apart")
        return found

    def build(self, network: Any = None) -> nn.Module:
        from . import classifying

        return classifying.ClassificationObjective(self)


class TokenClassification(Labelling):
    """A tag for each word of a text, such as the entities of BIO tags; a word's first token bears it."""

    rows: ClassVar[str] = "tagged"
    ends_in: ClassVar[str] = "each"
    kind: Literal["token_classification"] = "token_classification"

    @property
    def scores(self) -> tuple[str, ...]:
        return tuple(self.labels)

    @property
    def problem(self) -> str | None:
        return ONE

    def problems(self) -> list[str]:
        found = super().problems()
        if len(self.labels) == 1:
            found.append(f"objective.labels={self.labels} is a single tag: there is nothing to tell apart")
        return found

    def build(self, network: Any = None) -> nn.Module:
        from . import classifying

        return classifying.TaggingObjective(self)
