"""Rows of several members, labels and fields on their way through shards and batches; rows of logits in chunks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from torch import nn

from luthier import logprobs, surgery
from luthier.batch import Batch
from luthier.data import Data, dataset, kinds
from luthier.data.conversations import BadRow
from luthier.data.formats import FORMATS
from luthier.data.masks import Renderer
from luthier.data.shards import Documents
from luthier.document import Document
from luthier.logprobs import Head


def pair(row: int, better: int, worse: int, **more) -> Document:
    """Two members that begin with a token of nothing learnt."""
    tokens = np.arange(better + worse, dtype=np.int32) + 10 * row
    weights = np.ones(better + worse, np.float32)
    weights[[0, better]] = 0
    return Document(tokens, weights, row, (0, better), **more)


def test_members_come_back_from_shards():
    documents = [pair(0, 3, 4, labels=(0.5,)), pair(1, 2, 6, labels=(2.0,))]
    kept = Documents.of(documents)
    assert list(kept.lengths()) == [2 + 3, 1 + 5], "each member without its last token"
    for one, other in zip(documents, kept):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.weights, other.weights)
        assert (one.starts, one.labels, other.token_labels) == (other.starts, other.labels, None)
    changed = [documents[0], documents[1]._replace(labels=(3.0,))]
    assert Documents.of(changed).fingerprint() != kept.fingerprint()
    moved = [documents[0]._replace(starts=(0, 2)), documents[1]]
    assert Documents.of(moved).fingerprint() != kept.fingerprint()


def test_token_labels_come_back_from_shards():
    documents = [Document(np.arange(n, dtype=np.int32), np.zeros(n, np.float32), 0,
                          token_labels=np.arange(n, dtype=np.int32) - 1) for n in (3, 5)]  # fmt: skip
    kept = Documents.of(documents)
    assert [d.token_labels.tolist() for d in kept] == [[-1, 0, 1], [-1, 0, 1, 2, 3]]
    batch = Batch.pack(list(kept))
    assert batch.ends == (0, 3, 8), "where nothing is predicted all tokens are run"
    assert batch.token_fields["labels"].tolist() == [-1, 0, 1, -1, 0, 1, 2, 3]


def test_a_batch_never_parts_the_members_of_a_row():
    fields = [{"known": np.arange(7, dtype=np.float32)}, {"known": np.arange(8, dtype=np.float32) + 10}]
    documents = [pair(0, 3, 4, labels=(1.0,), fields=fields[0]), pair(1, 2, 6, labels=(0.0,), fields=fields[1])]
    batch = Batch.pack(documents)
    assert batch.ends == (0, 2, 5, 6, 11)
    assert batch.units == (0, 2, 4)
    assert batch.rows == (0, 1)
    # Tokens 0 1 and 3 4 5 of the first row are run; what is known of a token stands where it is predicted.
    assert batch.token_fields["known"].tolist() == [1, 2, 4, 5, 6, 11, 13, 14, 15, 16, 17]
    assert batch.targets.tolist() == [1, 2, 4, 5, 6, 11, 13, 14, 15, 16, 17]
    first, second = batch.split(1)
    assert (first.ends, second.ends) == ((0, 2, 5), (0, 1, 6))
    assert (first.units, second.units) == ((0, 2), (0, 2))
    assert second.fields["labels"].tolist() == [[0.0]]
    assert second.token_fields["known"].tolist() == [11, 13, 14, 15, 16, 17]
    filled = batch.padded_to(16)
    assert (filled.documents, len(filled.ends) - 1, filled.units) == (4, 5, (0, 2, 4))
    assert filled.token_fields["known"][11:].tolist() == [0] * 5
    assert batch.owners().tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3]


def test_members_of_one_number():
    """Of rows that have it, with their labels; a batch that was filled up is filled up again."""
    alone = Document(np.arange(20, 25, dtype=np.int32), np.r_[0, np.ones(4)].astype(np.float32), 2, labels=(3.0,))
    batch = Batch.pack([pair(0, 3, 4, labels=(1.0,)), pair(1, 2, 6, labels=(2.0,)), alone])
    first, second = batch.members(0), batch.members(1)
    assert (first.tokens.tolist(), first.ends) == ([0, 1, 10, 20, 21, 22, 23], (0, 2, 3, 7))
    assert first.targets.tolist() == [1, 2, 11, 21, 22, 23, 24]
    assert first.fields["labels"].tolist() == [[1.0], [2.0], [3.0]]
    assert (second.tokens.tolist(), second.rows) == ([3, 4, 5, 12, 13, 14, 15, 16], (0, 1))
    assert second.fields["labels"].tolist() == [[1.0], [2.0]]
    assert second.trained.tolist() == list(range(8))
    assert batch.members(2) is None
    filled = batch.padded_to(24).members(1)
    assert (len(filled), filled.documents, filled.fillers) == (9, 2, 1), "a multiple of an eighth of 24"


def renderer(kind: str) -> Renderer:
    return Renderer(make_tokenizer(), "all", 256, kind=kind)


def documents_of(kind: str, form: str, *rows: dict) -> list:
    made = renderer(kind)
    out = []
    for values in rows:
        try:
            out.append((0, kinds.render(made, FORMATS[form].convert(values))))
        except BadRow as fault:
            out.append(fault)
    return [d if isinstance(d, BadRow) else made.documents([d])[0] for d in out]


def test_a_preference_pair_is_two_members_with_the_prompt_in_both():
    as_texts = {"prompt": "hi", "chosen": "good", "rejected": "no"}
    asked = [{"role": "user", "content": "hi"}]
    as_messages = {key: [*asked, {"role": "assistant", "content": as_texts[key]}] for key in ("chosen", "rejected")}
    prompted = {"prompt": asked, **{k: as_messages[k][1:] for k in as_messages}}
    tokenizer = make_tokenizer()
    for values in (as_texts, as_messages, prompted):
        ((document,),) = documents_of("pairs", "preference", values)
        better, worse = document.members
        for member, answer in ((better, "good"), (worse, "no")):
            assert tokenizer.decode(member.tokens) == (
                f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
            )
            assert tokenizer.decode(member.tokens[member.weights > 0]) == f"{answer}<|im_end|>"


def test_a_pair_that_prefers_nothing_is_a_bad_row():
    rows = [
        {"prompt": "hi", "chosen": "a", "rejected": "a"},
        {"prompt": "hi", "chosen": "a", "rejected": ""},
        {"chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}],
         "rejected": [{"role": "user", "content": "y"}, {"role": "assistant", "content": "b"}]},
    ]  # fmt: skip
    assert [fault.kind for fault in documents_of("pairs", "preference", *rows)] == [
        "equal_answers", "empty_answer", "format",
    ]  # fmt: skip


def test_a_prompt_keeps_what_its_row_says(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "2 + 2", "answer": "4", "level": 1}) + "\n")
    made = dataset.load(Data(train=str(path)), str(path), renderer("prompts"))
    (document,) = made.documents
    assert make_tokenizer().decode(document.tokens).endswith("2 + 2<|im_end|>\n<|im_start|>assistant\n")
    assert not document.weights.any()
    assert made.conversations[0].columns == {"answer": "4", "level": 1}


@pytest.mark.parametrize("head", ["linear", "biased", "capped"])
def test_rows_of_logits_in_chunks_are_those_of_all_at_once(monkeypatch, head):
    """Values and gradients, with a length that the chunks do not divide."""
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", {"cpu": 4 * 50 * 4 * 4})  # four rows
    torch.manual_seed(0)
    layer = nn.Linear(8, 50, bias=head == "biased")
    made = Head(layer, 0.5, 3.0 if head == "capped" else None)
    hidden, targets = torch.randn(11, 8, requires_grad=True), torch.randint(0, 50, (11,))
    upstream = torch.randn(11)
    found = logprobs.rowwise(hidden, made, logprobs.logprob_of, targets)
    (found * upstream).sum().backward()
    gradients = [hidden.grad.clone(), *(p.grad.clone() for p in layer.parameters())]
    hidden.grad = None
    layer.zero_grad()
    wanted = made(hidden).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, wanted)
    (wanted * upstream).sum().backward()
    for one, other in zip(gradients, [hidden.grad, *(p.grad for p in layer.parameters())]):
        torch.testing.assert_close(one, other)


def test_swapped_values_come_back_without_a_copy():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    places = (a.data_ptr(), b.data_ptr())
    with surgery.swapped({"a": a, "b": b}, {"a": torch.zeros(2)}):
        assert (a.tolist(), b.tolist()) == ([0, 0], [1, 1, 1])
    assert (a.data_ptr(), b.data_ptr()) == places
    assert a.tolist() == [1, 1]
