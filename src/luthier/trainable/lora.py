"""LoRA (arXiv:2106.09685): W + scale * B A, with W frozen and B zero at the start; PEFT's names for its settings."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from ..errors import ModelError
from .adapter import OnLayers

if TYPE_CHECKING:
    from torch import nn

    from ..surgery import Rule

AWAY = {  # first values of PEFT that change the base: their files belong to another base than the one they name
    "pissa", "olora", "corda", "loftq", "lora_ga",
}  # fmt: skip


class LoRA(OnLayers):
    """Low-rank adaptation (arXiv:2106.09685): W + scale * B A, with W frozen and B zero at the start."""

    peft_type: ClassVar[str] = "LORA"
    neutral: ClassVar[Mapping[str, Any]] = {
        "bias": ("none",), "megatron_core": ..., "loftq_config": ..., "eva_config": ..., "qalora_group_size": ...,
    }  # fmt: skip
    while_training: ClassVar[Collection[str]] = ("lora_dropout",)
    fits_experts: ClassVar[bool] = True
    kind: Literal["lora"] = "lora"
    r: int = Field(16, ge=1)
    """Rank."""
    lora_alpha: float = Field(32, gt=0)
    """The update is scaled by lora_alpha / r, with use_rslora by lora_alpha / sqrt(r)."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Of what goes into A; embeddings have none, as what goes into theirs are numbers of tokens."""
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv:2312.03732)."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Other ranks for some layers, by names and patterns as in target_modules; the first that matches counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Other values of lora_alpha for some layers, in the same way."""
    init_lora_weights: Literal[True] | Annotated[str, Field(pattern=r"^(kaiming|gaussian|pissa|pissa_niter_\d+)$")] = (
        "kaiming"
    )
    """First values: `kaiming` (also true) or `gaussian` draw one of A and B and leave the other zero; `pissa` begins
    with the largest principal parts of W (arXiv:2404.02948), `pissa_niter_N` finds them in N quick iterations."""
    zero_init: Literal["lora_A", "lora_B"] | None = None
    """Which of A and B is zero at the start (arXiv:2406.08447); by default B, and A of embeddings."""
    layers_to_transform: list[int] | None = None
    """Only in these layers of the network, counted from 0."""
    target_parameters: list[str] | None = None
    """Fused expert weights to adapt, by names and patterns (`experts.down_proj`); by default all, where target_modules
    is `all-linear` or `mlp`, and else none."""
    modules_to_save: list[str] = []
    """Names and patterns of modules that are trained in full beside the adapter, and saved with it."""
    ensure_weight_tying: bool = False
    """Of embeddings that are tied to the head: what is trained for one of the two is the other's as well."""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.pissa and self.zero_init:
            found.append(
                f"trainable.zero_init={self.zero_init} beside init_lora_weights={self.init}, where neither is zero: "
                "leave one out"
            )
        if not (self.target_modules or self.target_parameters):
            found.append("trainable.target_modules=[]: nothing is adapted; name layers, or give target_parameters")
        if self.target_parameters and self.lora_dropout:
            found.append(
                f"trainable.lora_dropout={self.lora_dropout}: fused expert weights (target_parameters) have none, as "
                "their inputs are inside the experts: use lora_dropout=0"
            )
        if self.target_parameters and not self.fits_experts:
            found.append(
                f"trainable.target_parameters: {self.kind} has no rule for fused expert weights: use method=lora"
            )
        if self.layers_to_transform == []:
            found.append("trainable.layers_to_transform=[]: no layer is left; name some, or leave it out for all")
        return found

    def scale(self, name: str) -> tuple[int, float]:
        """Rank and scaling of the layer, or the parameter, of this name."""
        r = self.rank_pattern.get(_first(self.rank_pattern, name), self.r)
        alpha = self.alpha_pattern.get(_first(self.alpha_pattern, name), self.lora_alpha)
        return r, alpha / (r**0.5 if self.use_rslora else r)

    @property
    def init(self) -> str:
        return "kaiming" if self.init_lora_weights is True else self.init_lora_weights

    @property
    def pissa(self) -> bool:
        return self.init.startswith("pissa")

    def fits(self, module: nn.Module) -> bool:
        from torch import nn

        from ..surgery import innermost

        return super().fits(module) or isinstance(innermost(module), nn.Embedding)

    def rule(self, name: str, layer: nn.Module) -> Rule:
        from ..surgery import linear_shape

        r, scaling = self.scale(name)
        if linear_shape(layer) is None:
            from .embedded import LowRankEmbedding

            if self.pissa:
                raise ModelError(f"trainable.init_lora_weights={self.init} is of linear layers, and {name} is none")
            return LowRankEmbedding(r, scaling, self.zero_init or "lora_A")
        from .low_rank import LowRank

        return LowRank(r, scaling, self.lora_dropout, self.init, self.zero_init or "lora_B")

    def apply(self, model: nn.Module, name: str = "default") -> None:
        from . import beside

        beside.apply(self, model, name)

    def remarks(self, model: nn.Module) -> list[str]:
        from . import beside

        return beside.remarks(self, model)

    # ------------------------------------------------------------------ PEFT's words for it
    def peft(self) -> dict[str, Any]:
        """With PiSSA those of the LoRA of twice the rank that it is beside the base as it was."""
        same = self.model_dump(include={"lora_dropout", "use_rslora", "ensure_weight_tying"})
        ranks, alphas = (2, 2**0.5 if self.use_rslora else 2) if self.pissa else (1, 1)
        return {
            "r": self.r * ranks,
            "lora_alpha": self.lora_alpha * alphas,
            **same,
            "rank_pattern": {_expression(k): v * ranks for k, v in self.rank_pattern.items()},
            "alpha_pattern": {_expression(k): v * alphas for k, v in self.alpha_pattern.items()},
            "bias": "none",
        }

    def placed(self, model: nn.Module, name: str = "default") -> dict[str, Any]:
        from . import beside

        return beside.placed(model, name)

    @classmethod
    def reads(cls, values: Mapping[str, Any]) -> bool:
        return super().reads(values) and not values.get("use_dora")

    @classmethod
    def from_peft(cls, values: Mapping[str, Any]) -> Self:
        """First values leave no trace in a file, but where they changed the base."""
        given = dict(values)
        first = given.pop("init_lora_weights", True)
        if isinstance(first, str) and first.partition("_niter_")[0] in AWAY:
            raise ModelError(
                f"init_lora_weights={first!r}: the adapter stands beside a base that PEFT changed when it began, not "
                "beside the one that it names; save it again with PEFT's path_initial_model_for_weight_conversion"
            )
        for key in ("rank_pattern", "alpha_pattern"):
            if given.get(key):
                given[key] = {_pattern(k): v for k, v in given[key].items()}
        if given.get("modules_to_save"):  # PEFT takes any name with such an end, `input_layernorm` for `norm`
            given["modules_to_save"] = [rf"re:.*{re.escape(name)}" for name in given["modules_to_save"]]
        if given.get("target_parameters") and given.get("target_modules") is None:
            given["target_modules"] = []
        given["target_parameters"] = given.get("target_parameters") or []  # PEFT's `all-linear` means no experts
        return super().from_peft(given)


def _first(patterns: Mapping[str, Any], name: str) -> str:
    """The first of the patterns that matches a name."""
    from ..surgery import matches

    return next((pattern for pattern in patterns if matches(name, pattern)), "")


def _expression(pattern: str) -> str:
    """A pattern of ours as the regular expression that PEFT matches with the end of a name."""
    if pattern.startswith("re:"):
        return f"^(?:{pattern[3:]})"
    return "^" + fnmatch.translate(pattern) if re.search(r"[*?\[]", pattern) else pattern


def _pattern(expression: str) -> str:
    """And back."""
    return expression if re.fullmatch(r"[\w.]+", expression) else rf"re:(.*\.)?({expression})"
