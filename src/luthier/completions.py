"""Prompts that the network answers, and its answers as rewards see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .errors import DataError
from .rewards import Completed

if TYPE_CHECKING:
    from .assembled import Assembled
    from .config import Config
    from .data.dataset import Dataset


def prompt_of(config: Config, prompts: Dataset, document: int) -> list[int]:
    """The tokens that are to be answered: of a prompt all, of a conversation those before its last answer."""
    if config.objective.rows == "prompts":
        return prompts.documents[document].tokens.tolist()
    conversation = prompts.conversations[document]
    if conversation.plain:
        raise DataError(
            f"{config.objective.sampling.section} answers the prompts of rows, and plain text has none: give rows with "
            "prompts and answers"
        )
    return prompts.renderer.prompt(conversation)[0]


def completed(made: Assembled, prompts: Dataset, document: int, new: Sequence[int], ended: bool) -> Completed:
    """An answer as rewards see it."""
    conversation = prompts.conversations[document]
    messages = list(conversation.messages)
    if made.config.objective.rows != "prompts":
        messages = messages[: max(i for i, m in enumerate(messages) if m["role"] == "assistant")]
    users = [m["content"] for m in messages if m["role"] == "user"]
    text = made.tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True).strip()
    row = prompts.documents[document].row
    return Completed(users[-1] if users else "", messages, text, conversation.columns, len(new), not ended, row)


def fitting(config: Config, prompts: Dataset, warn: Callable[[str], None]) -> Dataset:
    """The prompts that leave room for the longest answer; others are an error, or left out, as data.on_bad_row says."""
    s = config.objective.sampling
    room = config.data.max_length - s.max_completion_length
    lengths = [len(prompt_of(config, prompts, i)) for i in range(len(prompts))]
    long = [i for i, length in enumerate(lengths) if length > room]
    if not long:
        return prompts
    rows = ", ".join(str(prompts.documents[i].row) for i in long[:10]) + (", ..." if len(long) > 10 else "")
    text = (
        f"{len(long)} of {len(prompts)} prompts (rows {rows}; the first has {lengths[long[0]]} tokens) leave no room "
        f"for {s.section}.max_completion_length={s.max_completion_length} tokens in data.max_length="
        f"{config.data.max_length}: raise data.max_length, or lower {s.section}.max_completion_length"
    )
    if config.data.on_bad_row == "error" or len(long) == len(prompts):
        raise DataError(f"{text}. Or leave them out with data.on_bad_row=skip; nothing was trained.")
    warn(f"{text}. They are left out.")
    return prompts.subset([i for i, length in enumerate(lengths) if length <= room])
