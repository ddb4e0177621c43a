"""What the settings of every objective say of it: the rows that it learns from, what its network ends in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..settings import Settings

if TYPE_CHECKING:
    from torch import nn


class Learning(Settings):
    """Settings of an objective. `build` makes the module with `prepare`, `forward` and `evaluate`.

    `prepare(network, batch) -> Batch` adds fields without gradients. `forward(network, batch) -> Loss` gives the sum,
    its count, and the metrics that the module's `metrics` names, always all of them. `evaluate(network, batch) -> Loss`
    gives the same of each row of the data [U], with metrics of its own, which become figures under their names.
    """

    rows: ClassVar[str] = "text"
    """Kind of rows, a key of data.kinds."""
    ends_in: ClassVar[str] = "tokens"
    """What the network ends in, a key of models.heads: scores of the next token, of a text, of each token."""

    @property
    def compares(self) -> bool:
        """Whether the module is given `reference`, a context that is the network as it was at the start."""
        return False

    @property
    def rolls_out(self) -> bool:
        """Whether it learns from answers that the network gives meanwhile, as objectives.rolling_out says."""
        return False

    def build(self, network: Any) -> nn.Module:
        raise NotImplementedError
