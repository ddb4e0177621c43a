"""The named methods of the field: each a row, a point on the axes."""

from __future__ import annotations

from dataclasses import dataclass, field

AXES = ("objective", "trainable", "precision")


@dataclass(frozen=True)
class Method:
    name: str
    caption: str
    paper: str
    settings: dict = field(default_factory=dict)  # what the row sets; a user's own settings go over it
    any_of: tuple[str, ...] = ()  # axes on which any answer is this method, and the row's is the one without a word

    @property
    def kinds(self) -> dict[str, str]:
        """axis -> answer, the point that makes the method."""
        return {axis: self.settings[axis]["kind"] for axis in AXES if "kind" in self.settings.get(axis, {})}

    @property
    def fixed(self) -> dict[str, str]:
        """axis -> answer, where another answer is another method."""
        return {axis: kind for axis, kind in self.kinds.items() if axis not in self.any_of}


def row(name: str, caption: str, paper: str, any_of: tuple[str, ...] = (), **settings: dict) -> Method:
    return Method(name, caption, paper, settings, any_of)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        row(
            "full", "every weight moves", "",
            trainable={"kind": "full"}, objective={"kind": "next_token"}, precision={"kind": "as_loaded"},
            optim={"learning_rate": 1e-5},
        ),
        row(
            "partial", "chosen layers move, the rest is frozen", "",
            trainable={"kind": "partial", "last_layers": 2}, objective={"kind": "next_token"},
            precision={"kind": "as_loaded"}, optim={"learning_rate": 5e-5},
        ),
        row(
            "lora", "a low-rank update beside each frozen linear layer", "arXiv:2106.09685",
            trainable={"kind": "lora"}, objective={"kind": "next_token"}, precision={"kind": "as_loaded"},
            optim={"learning_rate": 2e-4},
        ),
        row(
            "qlora", "a low-rank update beside linear layers that are frozen in 4 bits", "arXiv:2305.14314",
            trainable={"kind": "lora"}, objective={"kind": "next_token"}, precision={"kind": "nf4"},
            optim={"learning_rate": 2e-4},
        ),
        row(
            "dora", "LoRA for the directions of a weight's rows, and their lengths trained apart", "arXiv:2402.09353",
            trainable={"kind": "dora"}, objective={"kind": "next_token"}, precision={"kind": "as_loaded"},
            optim={"learning_rate": 2e-4},
        ),
        row(
            "qdora", "DoRA beside linear layers that are frozen in 4 bits", "arXiv:2402.09353",
            trainable={"kind": "dora"}, objective={"kind": "next_token"}, precision={"kind": "nf4"},
            optim={"learning_rate": 2e-4},
        ),
        row(
            "bottleneck", "small networks at the ends of frozen sublayers", "arXiv:1902.00751",
            trainable={"kind": "bottleneck"}, objective={"kind": "next_token"}, precision={"kind": "as_loaded"},
            optim={"learning_rate": 3e-4},
        ),
        row(
            "prefix", "learnt keys and values before every document, in each layer", "arXiv:2101.00190",
            trainable={"kind": "prefix"}, objective={"kind": "next_token"}, precision={"kind": "as_loaded"},
            optim={"learning_rate": 3e-2},
        ),
        row(
            "prompt", "learnt embeddings before every document", "arXiv:2104.08691",
            trainable={"kind": "prompt"}, objective={"kind": "next_token"}, precision={"kind": "as_loaded"},
            optim={"learning_rate": 3e-2},
        ),
        row(
            "p_tuning", "embeddings before every document that a small network makes", "arXiv:2103.10385",
            trainable={"kind": "p_tuning"}, objective={"kind": "next_token"}, precision={"kind": "as_loaded"},
            optim={"learning_rate": 1e-2},
        ),
        row(
            "qat", "every weight moves, and layers compute with rounded numbers", "arXiv:1712.05877",
            trainable={"kind": "full"}, objective={"kind": "next_token"}, precision={"kind": "qat"},
            optim={"learning_rate": 1e-5},
        ),
        row(
            "qat-lora", "a low-rank update, rounded together with the layer that it is merged into", "arXiv:2406.06385",
            trainable={"kind": "lora"}, objective={"kind": "next_token"}, precision={"kind": "qat"},
            optim={"learning_rate": 2e-4},
        ),
        row(
            "ia3", "learnt scales of keys, values and feed-forward inputs", "arXiv:2205.05638",
            trainable={"kind": "ia3"}, objective={"kind": "next_token"}, precision={"kind": "as_loaded"},
            optim={"learning_rate": 1e-2},
        ),
        row(
            "ppo", "clipped policy gradient on the network's own answers, with a critic", "arXiv:1707.06347",
            any_of=("trainable", "precision"), trainable={"kind": "lora"}, objective={"kind": "ppo"},
            precision={"kind": "as_loaded"}, optim={"learning_rate": 1e-5}, schedule={"kind": "constant"},
            evaluation={"metric_for_best_model": "reward"},
        ),
        *(
            row(
                name, caption, paper, any_of=("trainable", "precision"),
                trainable={"kind": "lora"}, objective={"kind": "grpo", **objective}, precision={"kind": "as_loaded"},
                optim={"learning_rate": 1e-5}, schedule={"kind": "constant"},
                evaluation={"metric_for_best_model": "reward"},
            )
            for name, caption, paper, objective in (
                ("grpo", "answers compared with others to the same prompt", "arXiv:2402.03300", {}),
                (
                    "rloo", "each answer compared with the mean of the others", "arXiv:2402.14740",
                    {"baseline": "leave_one_out", "scale_rewards": "none", "kl_in": "reward", "kl_estimator": "k1",
                     "beta": 0.05, "loss_type": "dr_grpo"},
                ),
                (
                    "dr_grpo", "GRPO without its biases of length and difficulty", "arXiv:2503.20783",
                    {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0},
                ),
                (
                    "dapo", "GRPO by tokens, with a higher clip and groups drawn again", "arXiv:2503.14476",
                    {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.0, "max_resamples": 3,
                     "mask_truncated_completions": True},
                ),
                (
                    "gspo", "GRPO with the ratio of whole answers", "arXiv:2507.18071",
                    {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4, "beta": 0.0},
                ),
            )
        ),
        row(
            "distill", "a teacher's distribution at each token is learnt, beside the token", "arXiv:1503.02531",
            any_of=("trainable", "precision"),
            trainable={"kind": "full"}, objective={"kind": "distillation"}, precision={"kind": "as_loaded"},
            optim={"learning_rate": 5e-5},
        ),
        row(
            "classify", "a head on the network gives a text its labels, or a value", "arXiv:1810.04805",
            any_of=("trainable", "precision"), data={"max_length": 512, "long_text": "cut"},
            trainable={"kind": "lora"}, objective={"kind": "classification"}, precision={"kind": "as_loaded"},
            optim={"learning_rate": 2e-4},
        ),
        row(
            "classify_tokens", "a head on the network gives each word of a text its tag", "arXiv:1810.04805",
            any_of=("trainable", "precision"), data={"max_length": 512, "long_text": "cut"},
            trainable={"kind": "lora"}, objective={"kind": "token_classification"}, precision={"kind": "as_loaded"},
            optim={"learning_rate": 2e-4},
        ),
        row(
            "pretrain", "every weight moves, from a random start, on plain text", "",
            model={"init": "random"}, data={"format": "text"},
            trainable={"kind": "full"}, objective={"kind": "next_token"}, precision={"kind": "as_loaded"},
            optim={"kind": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1, "adam_beta2": 0.95},
            schedule={"kind": "cosine", "warmup": 0.02, "min_ratio": 0.1},
        ),
        row(
            "continued_pretraining", "every weight moves, from loaded weights, on plain text", "arXiv:2004.10964",
            model={"init": "loaded"}, data={"format": "text"},
            trainable={"kind": "full"}, objective={"kind": "next_token"}, precision={"kind": "as_loaded"},
            optim={"kind": "adamw", "learning_rate": 5e-5, "weight_decay": 0.1, "adam_beta2": 0.95},
            schedule={"kind": "cosine", "warmup": 0.02, "min_ratio": 0.1},
        ),
        row(
            "dpo", "the better answer of each pair gains on the worse, against the start", "arXiv:2305.18290",
            any_of=("trainable", "precision"), trainable={"kind": "lora"}, objective={"kind": "dpo"},
            precision={"kind": "as_loaded"}, optim={"learning_rate": 5e-6},
        ),
        row(
            "simpo", "DPO on means over tokens, with a margin and no reference", "arXiv:2405.14734",
            any_of=("trainable", "precision"), trainable={"kind": "lora"}, objective={"kind": "simpo"},
            precision={"kind": "as_loaded"}, optim={"learning_rate": 5e-6},
        ),
        row(
            "orpo", "the better answer is learnt and made likelier than the worse by odds", "arXiv:2403.07691",
            any_of=("trainable", "precision"), trainable={"kind": "lora"}, objective={"kind": "orpo"},
            precision={"kind": "as_loaded"}, optim={"learning_rate": 5e-6},
        ),
        row(
            "cpo", "DPO without a reference, with the better answer's own loss", "arXiv:2401.08417",
            any_of=("trainable", "precision"), trainable={"kind": "lora"}, objective={"kind": "cpo"},
            precision={"kind": "as_loaded"}, optim={"learning_rate": 5e-6},
        ),
        row(
            "kto", "answers that are liked gain, others lose, against the start", "arXiv:2402.01306",
            any_of=("trainable", "precision"), trainable={"kind": "lora"}, objective={"kind": "kto"},
            precision={"kind": "as_loaded"}, optim={"learning_rate": 5e-6},
        ),
        row(
            "reward", "a score of whole conversations, larger for the better one of each pair", "arXiv:1706.03741",
            any_of=("trainable", "precision"), trainable={"kind": "lora"}, objective={"kind": "reward"},
            precision={"kind": "as_loaded"}, optim={"learning_rate": 1e-4},
        ),
    )
}  # fmt: skip
