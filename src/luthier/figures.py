"""Names of figures: which way each gets better."""

from __future__ import annotations

FALLING = (  # the less, the better
    "loss", "perplexity", "bits_per_byte", "mse", "mae", "kl", "truncated", "completion_length", "rewards/rejected",
    "logps/rejected",
)  # fmt: skip
OF_LABELS = ("precision.", "recall.", "f1.", "entity_")  # of one label, which may have any name


def greater_is_better(name: str) -> bool:
    """False of losses, errors, perplexity and the like, true of everything else; `name` is as in metrics.jsonl."""
    last = name.rpartition(".")[2]  # forgetting.loss, tasks.NAME.word_perplexity
    return name.startswith(OF_LABELS) or not (last in FALLING or last.endswith(("_loss", "_perplexity")))
