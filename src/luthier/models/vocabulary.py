"""Vocabularies: a byte-level BPE tokenizer learnt from texts and kept, tokens added, embeddings that fit them.

Byte-level BPE (arXiv:1508.07909, on bytes as GPT-2 has it) writes every text and reads it back unchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ModelError
from ..files import flush_folder, write_atomically
from . import Model
from .names import CHATML_TOKENS

END, PAD = "<|endoftext|>", "<|pad|>"  # END stands before a text, too: its first token is predicted from there
RECORD = "training.json"  # what the tokenizer was made from, beside it


# ---------------------------------------------------------------------------- training


def special_tokens(model: Model) -> list[str]:
    return [END, PAD, *(CHATML_TOKENS if model.chat_template == "chatml" else ())]


def train(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> Any:
    """A tokenizer of at most `vocab_size` tokens: special ones, the 256 bytes, merges; the same texts, the same bytes.

    The texts are read once and never held together. Digits stand alone, so that numbers are written in one way.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), show_progress=False, min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def keep(folder: Path, model: Model, texts: Callable[[], Iterable[str]], resumed: bool, say: Callable[[str], None]):
    """See to it that `folder` holds the tokenizer of this run: made once, found again ever after.

    With `resumed`, weights were trained with it: it must be there, unchanged. Without, it is made anew if the texts
    or the settings are others than it was made from.
    """
    wanted = {"vocab_size": model.vocab_size, "special_tokens": special_tokens(model)}
    reason = _damage(folder, wanted)
    if resumed and reason:
        raise CheckpointError(
            f"the tokenizer that the checkpoints of this run were trained with is not usable: {folder / reason}; "
            "restore that folder, or give another output_dir"
        )
    if resumed or (reason is None and _record(folder)["texts"] == _Digest(texts()).exhausted()):
        return
    digest = _Digest(texts())
    assert model.vocab_size is not None
    tokenizer = train(digest, model.vocab_size, special_tokens(model))
    if not digest.texts:
        raise ModelError("model.tokenizer=train: the training rows hold no text")
    record = wanted | {"texts": digest.value(), "rows": digest.texts, "bytes": digest.bytes}
    _write(folder, tokenizer, record)
    fewer = "" if len(tokenizer) == model.vocab_size else f", as there is no more to merge than for {len(tokenizer):,}"
    say(
        f"tokenizer: {model.vocab_size:,} tokens wanted{fewer}; made from {digest.texts:,} texts, {digest.bytes:,} "
        f"bytes of the training rows, in {folder}"
    )


class _Digest:
    """Passes texts through and keeps their number, size and fingerprint."""

    def __init__(self, texts: Iterable[str]):
        self.source, self.texts, self.bytes, self.made = texts, 0, 0, hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        for text in self.source:
            data = text.encode()
            self.made.update(len(data).to_bytes(8, "little") + data)
            self.texts += 1
            self.bytes += len(data)
            yield text

    def value(self) -> str:
        return self.made.hexdigest()[:16]

    def exhausted(self) -> str:
        for _ in self:
            pass
        return self.value()


def _record(folder: Path) -> dict:
    return json.loads((folder / RECORD).read_text())


def _damage(folder: Path, wanted: dict) -> str | None:
    """The file that is missing or was changed, or None where all is as it was written for these settings."""
    try:
        record = _record(folder)
        for name, digest in record["files"].items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                return name
    except FileNotFoundError as error:
        return Path(error.filename).name
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return RECORD
    return None if {key: record.get(key) for key in wanted} == wanted else RECORD


def _write(folder: Path, tokenizer: Any, record: dict) -> None:
    """Whole or not there, like a checkpoint."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    for left in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    tokenizer.save_pretrained(aside)
    files = {}
    for path in sorted(aside.iterdir()):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
            files[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    write_atomically(aside / RECORD, json.dumps(record | {"files": files}, indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(aside, folder)
    flush_folder(folder.parent)


# ---------------------------------------------------------------------------- tokens that are added


def add(tokenizer: Any, model: Model) -> None:
    """Give the tokenizer the tokens of `model.new_tokens`; one that it already has is an error."""
    from tokenizers import AddedToken

    for token in model.new_tokens:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if token in tokenizer.get_vocab() or (len(ids) == 1 and tokenizer.decode(ids) == token):
            raise ModelError(
                f"model.new_tokens: {token!r} is token {ids[0]} of the tokenizer already: leave it out of the list"
            )
    special = model.new_tokens_special
    made = [AddedToken(token, special=special, normalized=False) for token in model.new_tokens]
    if made:
        tokenizer.add_tokens(made, special_tokens=special)


def fit(model: Any, tokenizer: Any, new_tokens: Sequence[str]) -> None:
    """Embeddings and head as long as the tokenizer needs; rows of new tokens start at the mean of the old tokens'.

    A vocabulary that was padded to a round number is used before it is made longer. The mean, as it keeps the new
    tokens' probabilities small at the start: https://nlp.stanford.edu/~johnhew/vocab-expansion.html
    """
    # No padding is ever run, and the token that is named for it is often the end of a text: it is to be learnt, too.
    model.get_input_embeddings().padding_idx = None
    vocabulary = tokenizer.get_vocab()
    rows = model.get_input_embeddings().weight.shape[0]
    new = [vocabulary[token] for token in new_tokens]
    if new:
        old = sorted(i for i in vocabulary.values() if i < rows and i not in set(new))
        if max(new) >= rows:
            model.resize_token_embeddings(max(new) + 1, mean_resizing=False)
        _to_the_mean(model, new, old)
    _check(model, tokenizer, vocabulary)


@torch.no_grad()
def _to_the_mean(model: Any, new: list[int], old: list[int]) -> None:
    head = model.get_output_embeddings()
    own = (model.get_input_embeddings().weight, getattr(head, "weight", None), getattr(head, "bias", None))
    tables = {id(t): t for t in own}
    for table in tables.values():
        if table is not None:
            mean = table[torch.tensor(old, device=table.device)].float().mean(0)
            table[torch.tensor(new, device=table.device)] = mean.to(table.dtype)


def _check(model: Any, tokenizer: Any, vocabulary: dict[str, int]) -> None:
    """A token without an embedding ends a run on a GPU without a word of what it was.

    Some published tokenizers have markers of images or the like beyond a text model's embeddings: those never occur.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = {token: i for token, i in vocabulary.items() if i >= rows}
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    wrong = sorted(beyond, key=beyond.__getitem__) if beyond.keys() - special or beyond.keys() & used else []
    if wrong:
        raise ModelError(
            f"the tokenizer has {len(wrong)} tokens without an embedding ({wrong[0]!r} is {beyond[wrong[0]]}, the "
            f"model has rows 0 to {rows - 1}): it is not this model's; give the right one as model.tokenizer"
        )


def check_moving(model: Any, new_tokens: Sequence[str]) -> None:
    """Embeddings of new tokens know nothing yet: frozen, they would stay at the mean for ever."""
    if not new_tokens:
        return
    ends = {"embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    frozen = [name for name, module in ends.items() if module is not None and not _moves(module)]
    if frozen:
        remedy = " ".join(f"trainable.{name}=true" for name in frozen)
        raise ModelError(
            f"model.new_tokens: {new_tokens[0]!r} has to be learnt, but the {' and the '.join(frozen)} would not move: "
            f"use method=full, method=partial with {remedy}, or an adapter with both in trainable.modules_to_save"
        )


def _moves(module: nn.Module) -> bool:
    plain = getattr(module, "plain", None) or module  # of an adapter that trains a copy, the copy
    return all(p.requires_grad for p in plain.parameters())
