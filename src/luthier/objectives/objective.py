"""What the settings of every objective say of it: the rows that it learns from, what its network ends in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..settings import Settings

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Known:
    """What of a run is known when its objective decides what it leaves open."""

    moves: bool  # the base's own weights
    passes: int | None  # how often every row is learnt; None where that is not known, as of a stream
    labels: Iterable[Any] | None = None  # of the training rows, once these are read


class Learning(Settings):
    """Settings of an objective. `build` makes the module with `prepare`, `forward` and `evaluate`.

    `prepare(network, batch) -> Batch` adds fields without gradients. `forward(network, batch) -> Loss` gives the sum,
    its count, and the metrics that the module's `metrics` names, always all of them. `evaluate(network, batch) -> Loss`
    gives the same of each row of the data [U], with metrics of its own, which become figures under their names.

    A module may have `survey(network, batches, sum_)`: what it must know of all rows of a step before any is learnt,
    of this rank's batches, added up over ranks by `sum_`.

    A module may have `shown(means) -> dict[str, float]`: what the log has of a step, made of its metrics' sums, each
    divided by the count. So a mean may be one over some of the rows only, and be left out where there are none.

    A module may have `ahead(network, batch) -> dict[str, Tensor]`: what is computed once for every row by the network
    as it was at the start, [N, ...] of the trained positions (ahead.py); batches then have it in `token_fields`.
    """

    rows: ClassVar[str] = "text"
    """Kind of rows, a key of data.kinds."""
    ends_in: ClassVar[str] = "tokens"
    """What the network ends in, a key of models.heads: scores of the next token, of a text, of each token."""

    @property
    def asks_labels(self) -> bool:
        """Whether `settled` wants the labels of the training rows, which are read before anything heavy."""
        return False

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the scores that the network ends in, one each, where it does not end in those of tokens."""
        return ()

    @property
    def problem(self) -> str | None:
        """What the scores are for, as transformers' config.json has it: its `problem_type`."""
        return None

    @property
    def compares(self) -> bool:
        """Whether the module is given `reference`, a context that is the network as it was at the start."""
        return False

    @property
    def rolls_out(self) -> bool:
        """Whether it learns from answers that the network gives meanwhile, as objectives.rolling_out says."""
        return False

    @property
    def sampling(self) -> Any:
        """The settings that say how those answers are drawn."""
        return None

    @property
    def rewarded(self) -> list[Any] | None:
        """What the configuration rewards answers by (rewards.Rewards); None where it learns from no rewards."""
        return None

    @property
    def own_critic(self) -> Any:
        """The settings of a critic that is a network of its own (ppo.ValueModel), where it has one."""
        return None

    @property
    def ahead(self) -> str | None:
        """The setting, with its value, that wants what the module's `ahead` gives computed before the first step."""
        return None

    def settled(self, known: Known) -> Self:
        """The same with what it leaves open decided, as far as that can be told; told twice, it stays as it is."""
        return self

    def problems(self) -> list[str]:
        """What no single setting is wrong about, but several together."""
        return []

    @property
    def taught(self) -> bool:
        """Whether the module is given `teacher`, a function that gives a frozen network beside what is trained."""
        return False

    def remarks(self, dataset: Any) -> list[str]:
        """What should be said about the training rows (data.dataset.Dataset); DataError where they cannot do."""
        return []

    def build(self, network: Any) -> nn.Module:
        raise NotImplementedError
