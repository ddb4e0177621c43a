"""Steps 5 to 7: optimisers, learning-rate schedules and clipping; a class for each answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ..settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from .rule import Rule


# ---------------------------------------------------------------------------- optimisers


class Group(Settings):
    """Parameters with a rate or a decay of their own; a parameter belongs to the first group that names it."""

    patterns: str | list[str]
    """Names of parameters or modules: whole, their ends, globs (`*.mlp.*`), or `re:` and a regular expression."""
    learning_rate: float | None = Field(None, gt=0)
    """The peak of these parameters' rate; it follows the schedule."""
    lr_scale: float | None = Field(None, gt=0)
    """Or the peak as a multiple of optim.learning_rate."""
    weight_decay: float | None = Field(None, ge=0)
    """In place of optim.weight_decay; norms and biases in the group still do not decay."""


class Optimisation(Settings):
    """What all optimisers share."""

    learning_rate: float = Field(1e-4, gt=0)
    """The peak of the rate; the schedule says what becomes of it."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled (arXiv:1711.05101). Never applied to norms and biases: to what has less than two dimensions."""
    groups: list[Group] = []
    """Rates and decays by the names of parameters."""
    loraplus_lr_ratio: float | None = Field(None, gt=0)
    """LoRA+ (arXiv:2402.12354): the rate of the matrices B is this many times that of A."""
    rounding: Literal["master", "stochastic", "nearest"] = "master"
    """How weights in 16 bits take small steps: beside a `master` in float32 (4 bytes a weight), by `stochastic`
    rounding without one (right on average), or rounded to the `nearest` (steps below half a unit are lost)."""
    fused_backward: bool = False
    """Step each parameter and free its gradient as soon as the backward pass has made it (arXiv:2306.09782)."""

    def rule(self, hidden_matrix: bool) -> Rule:
        """How a parameter is stepped; `hidden_matrix` tells matrices inside the network from its ends and vectors."""
        raise NotImplementedError


class AdamW(Optimisation):
    """AdamW (arXiv:1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)

    def rule(self, hidden_matrix: bool) -> Rule:
        from .adamw import AdamWRule

        return AdamWRule(self.adam_beta1, self.adam_beta2, self.adam_epsilon)


class AdamW8bit(Optimisation):
    """AdamW with both moments in 8 bits, block by block (arXiv:2110.02861): 2 bytes a weight instead of 8."""

    kind: Literal["adamw_8bit"] = "adamw_8bit"
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    min_8bit_size: int = Field(4096, ge=1)
    """Parameters of fewer elements keep their moments in float32."""

    def rule(self, hidden_matrix: bool) -> Rule:
        from .adamw_8bit import AdamW8bitRule

        return AdamW8bitRule(self.adam_beta1, self.adam_beta2, self.adam_epsilon, self.min_8bit_size)


class Adafactor(Optimisation):
    """Adafactor (arXiv:1804.04235): second moments of matrices by rows and columns, updates clipped by their size."""

    kind: Literal["adafactor"] = "adafactor"
    beta1: float | None = Field(None, ge=0, lt=1)
    """Momentum, which costs 4 bytes a weight; none without it."""
    decay_rate: float = Field(-0.8, lt=0)
    """The second moment of step t forgets at 1 - t^decay_rate."""
    clip_threshold: float = Field(1.0, gt=0)
    """Largest root mean square of a parameter's update before the learning rate."""
    scale_parameter: bool = False
    """Multiply the rate by the root mean square of the parameter."""
    adafactor_epsilon: float = Field(1e-30, gt=0)
    """Added to squared gradients."""
    scale_epsilon: float = Field(1e-3, gt=0)
    """The least root mean square that scale_parameter assumes."""

    def rule(self, hidden_matrix: bool) -> Rule:
        from .adafactor import AdafactorRule

        return AdafactorRule(self)


class SGD(Optimisation):
    """Stochastic gradient descent, with momentum if wanted."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(0.0, ge=0, lt=1)
    nesterov: bool = False

    def rule(self, hidden_matrix: bool) -> Rule:
        from .sgd import SGDRule

        return SGDRule(self.momentum, self.nesterov)


class Lion(Optimisation):
    """Lion (arXiv:2302.06675): the sign of a momentum; wants a third to a tenth of AdamW's rate, and more decay."""

    kind: Literal["lion"] = "lion"
    lion_beta1: float = Field(0.9, ge=0, lt=1)
    lion_beta2: float = Field(0.99, ge=0, lt=1)

    def rule(self, hidden_matrix: bool) -> Rule:
        from .lion import LionRule

        return LionRule(self.lion_beta1, self.lion_beta2)


class Muon(Optimisation):
    """Muon (kellerjordan.github.io/posts/muon): hidden matrices by orthogonalised momentum, all else by AdamW."""

    kind: Literal["muon"] = "muon"
    momentum: float = Field(0.95, ge=0, lt=1)
    nesterov: bool = True
    ns_steps: int = Field(5, ge=1, lt=100)
    """Newton-Schulz iterations."""
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """`match_rms_adamw` (arXiv:2502.16982): 0.2 sqrt(max(rows, columns)), so that AdamW's rates fit;
    `original`: sqrt(max(1, rows / columns))."""
    adamw_learning_rate: float | None = Field(None, gt=0)
    """Of embeddings, head, norms and biases; learning_rate without it."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)

    def rule(self, hidden_matrix: bool) -> Rule:
        from .adamw import AdamWRule
        from .muon import MuonRule

        return MuonRule(self) if hidden_matrix else AdamWRule(self.adam_beta1, self.adam_beta2, self.adam_epsilon)


class ScheduleFreeAdamW(Optimisation):
    """Schedule-free AdamW (arXiv:2405.15682): trains at one point, is evaluated and exported at an average."""

    kind: Literal["schedule_free_adamw"] = "schedule_free_adamw"
    adam_beta1: float = Field(0.9, gt=0, lt=1)
    """How far the point of training lies towards the average."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    r: float = Field(0.0, ge=0)
    """Step t weighs t^r in the average."""
    weight_lr_power: float = Field(2.0, ge=0)
    """And the largest rate so far to this power."""

    def rule(self, hidden_matrix: bool) -> Rule:
        from .schedule_free import ScheduleFreeRule

        return ScheduleFreeRule(self)


Optim = Annotated[
    AdamW | AdamW8bit | Adafactor | SGD | Lion | Muon | ScheduleFreeAdamW, Field(discriminator="kind")
]  # fmt: skip


# ---------------------------------------------------------------------------- schedules


class Scheduling(Settings):
    """What all schedules share."""

    warmup: float | int = Field(0, ge=0)
    """Rises linearly to the peak over a share of the steps below 1, or a number of steps."""


class Constant(Scheduling):
    """The peak rate, after the warm-up."""

    kind: Literal["constant"] = "constant"


class Falling(Scheduling):
    """What falls from the peak."""

    min_ratio: float = Field(0.0, ge=0, le=1)
    """Where it ends, as a share of the peak."""


class Linear(Falling):
    """A straight line from the peak down."""

    kind: Literal["linear"] = "linear"


class Cosine(Falling):
    """Half a cosine (arXiv:1608.03983)."""

    kind: Literal["cosine"] = "cosine"


class CosineWithRestarts(Falling):
    """Half a cosine, several times over (arXiv:1608.03983)."""

    kind: Literal["cosine_with_restarts"] = "cosine_with_restarts"
    num_cycles: int = Field(1, ge=1)


class Polynomial(Falling):
    """(1 - t)^power."""

    kind: Literal["polynomial"] = "polynomial"
    power: float = Field(1.0, gt=0)


class InverseSqrt(Scheduling):
    """1 / sqrt of the steps (arXiv:2106.04560)."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    timescale: int | None = Field(None, ge=1)
    """n steps after the warm-up: sqrt(timescale / (timescale + n)); the warm-up's length without it, 10,000 if none."""


class WarmupStableDecay(Falling):
    """Up, along, down (arXiv:2405.18392)."""

    kind: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    decay: float | int = Field(0.1, gt=0)
    """The last part, in which the rate falls: a share of the steps below 1, or a number of steps."""
    decay_type: Literal["cosine", "linear", "1-sqrt"] = "cosine"


class ReduceLROnPlateau(Falling):
    """The rate falls by a factor whenever an evaluation's figure has stopped getting better."""

    kind: Literal["reduce_lr_on_plateau"] = "reduce_lr_on_plateau"
    metric: str = "loss"
    """A figure of the evaluations, as it is named in metrics.jsonl."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Which way is better; `auto` knows it from the metric's name."""
    factor: float = Field(0.1, gt=0, lt=1)
    patience: int = Field(10, ge=0)
    """So many evaluations without a gain are borne."""
    threshold: float = Field(1e-4, ge=0)
    """The least gain that counts."""
    threshold_mode: Literal["rel", "abs"] = "rel"
    """Whether the threshold is a share of the best figure, or a difference from it."""
    cooldown: int = Field(0, ge=0)
    """Evaluations after a reduction that are not counted."""


Schedule = Annotated[
    Constant | Linear | Cosine | CosineWithRestarts | Polynomial | InverseSqrt | WarmupStableDecay | ReduceLROnPlateau,
    Field(discriminator="kind"),
]


# ---------------------------------------------------------------------------- clipping


class NormClipping(Settings):
    """The mean gradient is scaled down as a whole so that its norm is at most a bound (arXiv:1211.5063)."""

    kind: Literal["norm"] = "norm"
    max_grad_norm: float = Field(1.0, gt=0)


class ValueClipping(Settings):
    """Each element of the mean gradient is kept within a bound."""

    kind: Literal["value"] = "value"
    clip_value: float = Field(gt=0)


class AdaptiveClipping(Settings):
    """Each unit's gradient is kept small beside its weights (AGC, arXiv:2102.06171); the head is left alone.

    A unit is the row of a matrix that makes one output; a vector is one unit.
    """

    kind: Literal["adaptive"] = "adaptive"
    clip_factor: float = Field(0.01, gt=0)
    """Largest ratio of a unit's gradient norm to its weights' norm."""
    clip_epsilon: float = Field(1e-3, gt=0)
    """The least norm that a unit's weights are taken to have."""


class NoClipping(Settings):
    """Gradients as they are; their norm is logged all the same."""

    kind: Literal["none"] = "none"


Clipping = Annotated[NormClipping | ValueClipping | AdaptiveClipping | NoClipping, Field(discriminator="kind")]


# ---------------------------------------------------------------------------- regularisation


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
