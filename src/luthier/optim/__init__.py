"""Steps 5 to 7: the optimiser, its schedule, weight decay and clipping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ..settings import Settings

if TYPE_CHECKING:
    from torch import nn


class AdamW(Settings):
    """AdamW (arXiv:1711.05101) with clipping of the whole gradient by its norm."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    """Never applied to norms and biases, that is, to what has less than two dimensions."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0)
    """0 does not clip; the norm is logged all the same."""


class Schedule(Settings):
    """The learning rate over the steps of a run."""

    kind: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float | int = Field(0, ge=0)
    """A share of the steps below 1, or a number of steps."""
    min_ratio: float = Field(0.0, ge=0, le=1)
    """Where linear and cosine end, as a share of the peak."""


class Regularisation(Settings):
    """What keeps the network from learning its rows by heart; nothing of it acts in an evaluation."""

    dropout: float | None = Field(None, ge=0, lt=1)
    """Of the embeddings and of what attention and MLP add (arXiv:1706.03762, section 5.4); by default what the model's
    own configuration says. Adapters have trainable.lora_dropout."""
    attention_dropout: float | None = Field(None, ge=0, lt=1)
    """Of attention's probabilities; a GPU's packed kernels have none, so rows run padded there."""
    neftune_noise_alpha: float | None = Field(None, gt=0)
    """NEFTune (arXiv:2310.05914): uniform noise on the embeddings of at most alpha / sqrt(length x width)."""

    def apply(self, model: nn.Module) -> None:
        from . import regularisation

        regularisation.apply(self, model)


class NoAveraging(Settings):
    """The weights of a step are what is evaluated, kept as best and exported."""

    kind: Literal["none"] = "none"

    def build(self, weights: dict, total: int) -> None:
        return None


class EMA(Settings):
    """An exponential moving average of the weights (Polyak and Juditsky 1992) is evaluated and exported."""

    kind: Literal["ema"] = "ema"
    decay: float = Field(0.999, gt=0, lt=1)
    """Of what is kept at each update; less in the first ones, (1 + n) / (10 + n) of update n."""
    every: int = Field(1, ge=1)
    """Steps between updates."""

    def build(self, weights: dict, total: int) -> Any:
        from . import averaging

        return averaging.MovingAverage(self, weights)


class LastAverage(Settings):
    """The mean of the weights over the last steps of a run (arXiv:1803.05407) is evaluated and exported."""

    kind: Literal["last"] = "last"
    steps: float | int = Field(0.25, gt=0)
    """A share of the run below 1, or a number of steps."""
    every: int = Field(1, ge=1)
    """Steps between the weights that are averaged."""

    def build(self, weights: dict, total: int) -> Any:
        from . import averaging

        return averaging.LastMean(self, weights, total)


Averaging = Annotated[NoAveraging | EMA | LastAverage, Field(discriminator="kind")]


class EarlyStopping(Settings):
    """End a run once its evaluations have stopped getting better, by evaluation.metric_for_best_model."""

    patience: int = Field(3, ge=1)
    """Evaluations in a row that may bring nothing better."""
    threshold: float = Field(0.0, ge=0)
    """By how much one has to be better to count."""

    def build(self, better: int) -> Any:
        from . import stopping

        return stopping.Patience(self, better)
