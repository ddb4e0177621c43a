"""Step 1, data: from files to packed rows of tokens with what is learnt of them."""

from typing import Literal

from pydantic import Field

from ..settings import Settings


class Data(Settings):
    """Where rows come from and how they become tokens."""

    train: str | list[str]
    """A file (.jsonl .json .csv .parquet .arrow .txt ..., plain or .gz .bz2 .xz .zst), a folder, a pattern such as
    `texts/**/*.md`, several of these, or a hub name."""
    validation: str | float | int | None = None
    """Held-out rows: a file or hub name, a share of `train` below 1, or a number of its rows."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokens"] = "auto"
    """How rows are read; `auto` goes by their keys and says what it found."""
    columns: dict[str, str] = {}
    """A map from a key of the format to the name of the column that holds it, such as {prompt: question}."""
    subset: str | None = None
    """The configuration of a hub data set."""
    split: str = "train"
    """The split of a hub data set, or of a folder whose files are of several splits."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """What is a row of a plain text file: all of it, a paragraph (they are parted by blank lines), or a line."""
    train_on: Literal["all", "last"] = "all"
    """Learn every assistant turn of a conversation, or the last one only."""
    max_length: int = Field(2048, ge=2)
    """Longest document, in tokens; an answer that does not fit makes a bad row."""
    long_text: Literal["split", "error"] = "split"
    """A plain text longer than that: consecutive pieces, of which every token is learnt once, or a bad row."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop on rows from which nothing right can be learnt, or leave them out and list them in a file."""
    limit: int | None = Field(None, ge=1)
    """Use no more than so many rows of `train`, after the validation rows were taken."""
    seed: int = 0
    """Decides the validation split and, with the epoch, the order of rows."""
