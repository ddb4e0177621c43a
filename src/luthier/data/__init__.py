"""Step 1, data: from files to packed rows of tokens with what is learnt of them."""

from typing import Literal

from pydantic import Field

from ..settings import Settings

FORMAT = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "tokens", "preference", "prompt",
    "prompt_messages", "labelled", "several_labels", "labelled_messages", "sentence_pair", "premise", "question_pair",
    "question_sentence", "sentence", "ner_tags", "tags", "token_labels",
]  # fmt: skip


class Source(Settings):
    """One entry of a list of sources, with what it has of its own; what is not given is that of `data`."""

    path: str | list[str]
    """A file, a folder of files or a hub name."""
    weight: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Share of the rows learnt, relative to the other weights. Each source has its own passes: one that runs out begins
    again, and an epoch is as many rows as all sources have together. Without weights every row is learnt once."""
    format: FORMAT | None = None
    """Its own `data.format`."""
    columns: dict[str, str] | None = None
    """Its own `data.columns`."""
    subset: str | None = None
    """Its own `data.subset`."""
    split: str | None = None
    """Its own `data.split`."""
    limit: int | None = Field(None, ge=1)
    """Use no more than so many of its rows, after the validation rows were taken."""


class Data(Settings):
    """Where rows come from and how they become tokens."""

    train: str | list[str | Source]
    """A file (.jsonl .json .csv .parquet .arrow .txt ..., plain or .gz .bz2 .xz .zst), a folder, a pattern such as
    `texts/**/*.md`, a hub name, or a list of them; entries such as {path: chat.jsonl, weight: 0.7} give a source its
    share."""
    validation: str | float | int | None = None
    """Held-out rows: a file or hub name, a share of `train` below 1, or a number of its rows; of a stream the share
    that a hash of the row picks, or its first rows."""
    format: FORMAT = "auto"
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
    long_text: Literal["split", "cut", "error"] = "split"
    """A plain text longer than that: consecutive pieces, of which every token is learnt once; cut to that length, as
    classification does, and counted; or a bad row."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop on rows from which nothing right can be learnt, or leave them out and list them in a file."""
    limit: int | None = Field(None, ge=1)
    """Use no more than so many rows of `train`, after the validation rows were taken."""
    seed: int = 0
    """Decides the validation split and, with the epoch, the order of rows."""
    cache: Literal["auto"] | bool = "auto"
    """Keep tokens on the disk and map them, so that they need no memory and are there at once the next time; `auto`
    does so for 4 MB of data and more. Any change of data, tokenizer, template or option makes them anew."""
    cache_dir: str | None = None
    """Where; else LUTHIER_CACHE, else the folder `luthier` of the user's cache. It may be removed between runs."""
    num_proc: int | None = Field(None, ge=1)
    """Processes that tokenise; by itself one, or for 16 MB of data and more one a core. It changes no token."""
    streaming: bool = False
    """Read and tokenise rows as they are needed, for data larger than memory and disk; needs `max_steps`."""
    shuffle_buffer: int = Field(10_000, ge=1)
    """Rows of a stream that are read, shuffled and packed together. Files come in another order in each pass."""

    def sources(self) -> list[Source]:
        """The entries of `train`, complete."""
        return [self.complete(entry) for entry in ([self.train] if isinstance(self.train, str) else self.train)]

    def complete(self, entry: str | list[str] | Source) -> Source:
        made = entry if isinstance(entry, Source) else Source(path=entry)  # type: ignore[call-arg]
        missing = {name: getattr(self, name) for name in ("format", "columns", "subset", "split")}
        return made.model_copy(update={k: v for k, v in missing.items() if getattr(made, k) is None})
