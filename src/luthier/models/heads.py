"""What a network ends in: scores of the next token, of a whole text, or of each token; new heads, and their check.

A head is transformers' own, run over hidden states in the place of the decoder or encoder that would have made them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..surgery import heads

CLASSES = {
    "tokens": "AutoModelForCausalLM", "text": "AutoModelForSequenceClassification",
    "each": "AutoModelForTokenClassification",
}  # fmt: skip
WHAT = {
    "tokens": "causal language model", "text": "model that scores texts", "each": "model that scores each token",
}  # fmt: skip
TAKES = ("last", "first", "all")  # of a text's hidden states; `whole`: a head that only its own model can run


@dataclass(frozen=True)
class Ending:
    """What a network ends in; of scores, their names and what they are for."""

    ends_in: str = "tokens"
    scores: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def auto(self) -> Any:
        """The class of transformers that loads it."""
        import transformers

        return getattr(transformers, CLASSES[self.ends_in])

    @property
    def what(self) -> str:
        return WHAT[self.ends_in]

    def name_in(self, config: Any) -> None:
        """Write the scores into a model's configuration, as transformers reads them again."""
        if self.ends_in == "tokens":
            return
        assert self.scores, "a network that ends in scores has at least one"
        config.num_labels = len(self.scores)
        config.id2label = dict(enumerate(self.scores))
        config.label2id = {name: i for i, name in enumerate(self.scores)}
        config.problem_type = self.problem
        if hasattr(config, "architectures"):
            config.architectures = None


TOKENS = Ending()


# ---------------------------------------------------------------------------- loading


def attending(build: Callable[..., Any]) -> Any:
    """What `build(attn_implementation=...)` makes, by PyTorch's fused attention where the family has it."""
    try:
        return build(attn_implementation="sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        return build(attn_implementation="eager")


def is_head(name: str, prefix: str) -> bool:
    """Whether a tensor of a model's files is of a head: outside of the base, or of its pooler."""
    own = name.removeprefix(f"{prefix}.")
    return own == name or own.startswith("pooler.")


def draw(model: Any, names: Collection[str], seed: int) -> None:
    """First values of new heads, the family's own: drawn on the CPU in float32, so that device and precision change
    nothing; random states elsewhere stay as they were."""
    places = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(seed)
        for place in places:
            live = model.get_submodule(place)
            fresh = copy.deepcopy(live).to_empty(device="cpu").float()
            for part in (fresh, *fresh.parameters(recurse=False)):
                vars(part).pop("_is_hf_initialized", None)  # else transformers would leave them as they are
            if hasattr(fresh, "reset_parameters"):
                fresh.reset_parameters()
            model._init_weights(fresh)
            for leaf, parameter in fresh.named_parameters(recurse=False):
                live._parameters[leaf].copy_(parameter)


def told(model: Any, new: Collection[str], dropped: Collection[str], seed: int) -> str | None:
    """What is said of heads that are new, and of old ones that are not used."""
    if not new:
        return None
    count = sum(p.numel() for n, p in model.named_parameters() if n in set(new))
    where = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in new))
    left = f"; {', '.join(sorted(dropped)[:3])} of its files is of another head and not used" if dropped else ""
    size = f"{count:,} parameters for {model.config.num_labels} scores"
    return f"a new head, {where} ({size}), drawn by seed={seed}{left}"


def on_base(causal: Any, ending: Ending, seed: int) -> Any:
    """A model that ends in scores, made of the decoder of a causal language model, with a new head."""
    config = copy.deepcopy(causal.config)
    ending.name_in(config)
    dtype = causal.get_input_embeddings().weight.dtype
    with torch.device("meta"):
        made = attending(lambda **kind: ending.auto.from_config(config, dtype=dtype, **kind))
    setattr(made, made.base_model_prefix, causal.base_model)
    names = [n for n, p in made.named_parameters() if p.is_meta]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        module = made.get_submodule(parent)
        old = module._parameters[leaf]
        assert old is not None
        module._parameters[leaf] = nn.Parameter(torch.empty(old.shape, dtype=dtype, device=causal.device))
    draw(made, names, seed)
    return made.eval()


def name_padding(model: Any, tokenizer: Any) -> None:
    """A decoder that scores texts looks for their ends by the token that they are filled up with."""
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "the tokenizer has no token to fill texts up with, by which transformers finds their ends: give its "
            "tokenizer_config.json a pad_token"
        )
    for part in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        part.pad_token_id = tokenizer.pad_token_id


def assume_padding(model: Any) -> None:
    """The same where there is no tokenizer, for shapes alone."""
    for part in (model.config, model.config.get_text_config()):
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = 0


# ---------------------------------------------------------------------------- scores


class _Given(nn.Module):
    """In the place of a base: hidden states that are there already."""

    def __init__(self, base: nn.Module, hidden: Tensor):
        super().__init__()
        self.__dict__["base"], self.__dict__["hidden"] = base, hidden  # no child, no state

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        hidden: Any = self.hidden
        pooler = getattr(self.base, "pooler", None)
        pooled = pooler(hidden) if isinstance(pooler, nn.Module) else None
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)


@contextmanager
def _instead(model: Any, hidden: Tensor) -> Iterator[None]:
    prefix = model.base_model_prefix
    base = model._modules[prefix]
    model._modules[prefix] = _Given(base, hidden)
    try:
        yield
    finally:
        model._modules[prefix] = base


def of_hidden(model: Any, hidden: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """The model's own scores of hidden states [D, L, H] of tokens [D, L]: [D, K], or [D, L, K] of each token."""
    given = {} if mask is None else {"attention_mask": mask}
    with _instead(model, hidden):
        return model(input_ids=tokens, **given).logits


def parameters(model: Any) -> dict[str, nn.Parameter]:
    """Those of the heads, by name."""
    return {f"{place}.{leaf}": p for place in heads(model) for leaf, p in model.get_submodule(place).named_parameters()}
