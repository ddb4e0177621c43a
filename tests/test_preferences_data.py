"""Preference pairs and liked answers in every form that the field writes them in, and what is wrong with a row."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import TEMPLATE, make_tokenizer, write_rows

from luthier.data import Data, dataset, kinds
from luthier.data.conversations import BadRow
from luthier.data.formats import FORMATS, recognise
from luthier.data.masks import Renderer

TOKENIZER = make_tokenizer()


def renderer(kind: str, max_length: int = 256) -> Renderer:
    return Renderer(TOKENIZER, "all", max_length, kind=kind)


def document_of(kind: str, values: dict, max_length: int = 256):
    """The one document of a row, whose format is told by its keys; or its fault."""
    made = renderer(kind, max_length)
    form = recognise(values, "here", {}, kind)
    try:
        (found,) = made.documents([(0, kinds.render(made, FORMATS[form.name].convert(values)))])
    except BadRow as fault:
        return fault
    return found if isinstance(found, BadRow) else found[0]


def texts(document) -> list[tuple[str, str]]:
    """Of each member what stands before, and what is learnt."""
    out = []
    for member in document.members:
        first = int(np.flatnonzero(member.weights)[0])
        out.append((TOKENIZER.decode(member.tokens[:first]), TOKENIZER.decode(member.tokens[member.weights > 0])))
    return out


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "short"}
ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
TOLD = "<|im_start|>system\nshort<|im_end|>\n" + ASKED
END = "<|im_end|>"


@pytest.mark.parametrize(
    ("values", "prompt"),
    [
        ({"prompt": "hi", "chosen": "good", "rejected": "no"}, ASKED),
        ({"prompt": "hi", "chosen": [assistant("good")], "rejected": [assistant("no")]}, ASKED),
        ({"prompt": "hi", "chosen": assistant("good"), "rejected": assistant("no")}, ASKED),
        ({"prompt": "hi", "chosen": [user("hi"), assistant("good")], "rejected": [user("hi"), assistant("no")]}, ASKED),
        ({"chosen": [user("hi"), assistant("good")], "rejected": [user("hi"), assistant("no")]}, ASKED),
        ({"chosen": json.dumps([user("hi"), assistant("good")]), "rejected": json.dumps([user("hi"), assistant("no")])},
         ASKED),
        ({"prompt": [SYSTEM, user("hi")], "chosen": "good", "rejected": "no"}, TOLD),
        ({"prompt": [SYSTEM, user("hi")], "chosen": [assistant("good")], "rejected": [assistant("no")]}, TOLD),
        ({"system": "short", "prompt": "hi", "chosen": "good", "rejected": "no"}, TOLD),
        ({"chosen": "\n\nHuman: hi\n\nAssistant: good", "rejected": "\n\nHuman: hi\n\nAssistant: no"}, ASKED),
        ({"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " good", "rejected": " no"}, ASKED),
        ({"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "good"},
          "rejected": {"from": "gpt", "value": "no"}}, ASKED),
        ({"conversations": [{"from": "human", "value": "hi"}], "system": "short",
          "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "no"}}, TOLD),
        ({"instruction": "hi", "input": "", "chosen": "good", "rejected": "no"}, ASKED),
    ],
)  # fmt: skip
def test_a_pair_however_it_is_written(values, prompt):
    answers = [answer.strip() for answer in ("good<|im_end|>", "no<|im_end|>")]
    found = texts(document_of("pairs", values))
    assert [before for before, _ in found] == [prompt, prompt]
    assert [answer.strip() for _, answer in found] == answers


def test_what_is_learnt_begins_where_the_answers_part():
    """Of conversations, too, whose answers have several turns: what the assistant says from there on."""
    first = [user("hi"), assistant("ho"), user("go")]
    better, worse = [*first, assistant("on"), user("and"), assistant("off")], [*first, assistant("up")]
    (before, good), (_, bad) = texts(document_of("pairs", {"chosen": better, "rejected": worse}))
    assert before.endswith("ho<|im_end|>\n<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n")
    assert (good, bad) == ("on<|im_end|>off<|im_end|>", "up<|im_end|>")


def test_plain_texts_share_their_first_words():
    document = document_of("pairs", {"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert texts(document) == [("The sky is", " blue.<|im_end|>"), ("The sky is", " black.<|im_end|>")]
    longer = document_of("pairs", {"chosen": "The sky is", "rejected": "The sky is not"})
    assert texts(longer) == [("The sky", " is<|im_end|>"), ("The sky", " is not<|im_end|>")]


@pytest.mark.parametrize(
    ("more", "margin"),
    [({}, 0.0), ({"margin": 1.5}, 1.5), ({"score_chosen": 8, "score_rejected": 5.5}, 2.5), ({"score_chosen": 8}, 0.0),
     ({"margin": 1, "score_chosen": 8.0, "score_rejected": 5.0}, 1.0)],
)  # fmt: skip
def test_a_margin_is_kept(more, margin):
    document = document_of("pairs", {"prompt": "hi", "chosen": "good", "rejected": "no", **more})
    assert document.labels == (margin,)


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        ({"prompt": "hi", "chosen": "a", "rejected": "a"}, "equal_answers", "nothing is preferred"),
        ({"prompt": "hi", "chosen": "a", "rejected": " "}, "empty_answer", "neither content nor tool calls"),
        ({"prompt": "hi", "chosen": None, "rejected": "b"}, "empty_answer", None),
        ({"prompt": "hi", "chosen": "a", "rejected": []}, "empty_answer", "rejected is empty"),
        ({"chosen": [user("x"), assistant("a")], "rejected": [user("y"), assistant("b")]}, "format", "give the prompt"),
        ({"chosen": "blue", "rejected": "green"}, "format", "begin differently"),
        ({"chosen": [user("x"), assistant("a"), user("y"), assistant("b")], "rejected": [user("x"), assistant("a")]},
         "empty_answer", "rejected ends where the other goes on"),
        ({"chosen": [user("x"), assistant("a"), user("y"), assistant("b")],
          "rejected": [user("x"), assistant("a"), user("z"), assistant("b")]}, "role_order", "different prompts"),
        ({"prompt": "hi", "chosen": "a", "rejected": "b" * 300}, "truncated", "after data.max_length=256"),
        ({"prompt": "h" * 300, "chosen": "a", "rejected": "b"}, "truncated", None),
        ({"prompt": "hi", "chosen": "a", "rejected": "b", "margin": "big"}, "label", "not a finite number"),
        ({"prompt": "hi", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2}, "label",
         "score_chosen=1 is less than score_rejected=2"),
        ({"prompt": "hi", "chosen": [assistant("a") | {"weight": 0.5}], "rejected": "b"}, "format", "has a weight"),
        ({"prompt": "hi", "chosen": "a<|im_end|>", "rejected": "b"}, "special_token", None),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "format", "prompt is int"),
        ({"prompt": [user("hi")], "chosen": [user("ho"), assistant("a")], "rejected": "b"}, "role_order", None),
    ],
)  # fmt: skip
def test_a_bad_pair_is_told(values, kind, said):
    fault = document_of("pairs", values)
    assert isinstance(fault, BadRow), fault
    assert fault.kind == kind
    assert said is None or said in fault.detail
    assert fault.kind in dataset.REMEDIES


def test_answers_that_a_template_makes_equal_are_equal():
    trimming = TEMPLATE.replace("m['content']", "m['content'] | trim")
    made = Renderer(make_tokenizer(trimming), "all", 256, kind="pairs")
    row = FORMATS["preference"].convert({"prompt": "hi", "chosen": "a", "rejected": "a "})
    with pytest.raises(BadRow, match="once the chat template has written them"):
        kinds.render(made, row)


# ---------------------------------------------------------------------------- liked or not


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "hi", "completion": "good", "label": True},
        {"prompt": "hi", "completion": [assistant("good")], "label": 1},
        {"prompt": [user("hi")], "completion": assistant("good"), "label": True},
        {"messages": [user("hi"), assistant("good")], "label": True},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "good"}], "label": True},
    ],
)
def test_a_liked_answer_however_it_is_written(values):
    for label in (True, False):
        document = document_of("unpaired", values | {"label": label})
        assert texts(document) == [(ASKED, "good<|im_end|>")]
        assert document.labels == (float(label),)


def test_only_the_answer_that_is_judged_is_learnt():
    document = document_of("unpaired", {"messages": [user("a"), assistant("b"), user("c"), assistant("d")], "label": 0})
    ((before, answer),) = texts(document)
    assert "b<|im_end|>" in before
    assert answer == "d<|im_end|>"


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        ({"prompt": "hi", "completion": "a", "label": "yes"}, "label", "not true (liked) or false"),
        ({"prompt": "hi", "completion": "a", "label": 2}, "label", None),
        ({"prompt": "hi", "completion": "a", "label": None}, "label", None),
        ({"prompt": "hi", "completion": "", "label": True}, "empty_answer", None),
        ({"messages": [user("hi")], "label": True}, "role_order", "no answer to like"),
        ({"prompt": "hi", "completion": "a" * 300, "label": True}, "truncated", None),
    ],
)
def test_a_bad_liked_answer_is_told(values, kind, said):
    fault = document_of("unpaired", values)
    assert isinstance(fault, BadRow), fault
    assert fault.kind == kind
    assert said is None or said in fault.detail


def loaded(tmp_path, rows: list[dict], max_length: int = 256):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return dataset.load(Data(train=str(path)), str(path), renderer("unpaired", max_length))


def test_the_second_member_is_the_prompt_with_a_strange_answer(tmp_path):
    """Of another prompt, and not the row's own answer; the same whoever asks."""
    rows = [
        {"prompt": f"ask {n}", "completion": f"say {n} {how}", "label": how == "well"}
        for n in range(20)
        for how in ("well", "badly")
    ]
    found = loaded(tmp_path, rows)
    assert found.members().tolist() == [2] * 40
    assert found.labels().tolist() == [[1.0], [0.0]] * 20
    for row, document in zip(rows, found.documents):
        (before, answer), (again, strange) = texts(document)
        assert before == again
        assert row["prompt"] in before
        assert answer == row["completion"] + END
        other = next(r for r in rows if r["completion"] + END == strange)
        assert other["prompt"] != row["prompt"]
    assert loaded(tmp_path, rows).fingerprint() == found.fingerprint()


def test_a_strange_answer_must_fit(tmp_path):
    """The row with a long prompt takes a short answer; where none fits, the row has one member."""
    rows = [{"prompt": "p" * 30, "completion": f"{n}", "label": True} for n in range(3)]
    rows += [{"prompt": f"{n}", "completion": "c" * 30 + str(n), "label": False} for n in range(30)]
    shortest = len(document_of("unpaired", rows[0]).tokens)
    found = loaded(tmp_path, rows, max_length=shortest + 10)
    members = found.members().tolist()
    assert members[3:] == [2] * 30
    assert members[:3] == [1] * 3, "equal prompts are no strangers, and other answers are too long"
    assert max(len(member.tokens) for document in found.documents for member in document.members) <= shortest + 10


def test_a_row_alone_has_no_stranger(tmp_path):
    assert loaded(tmp_path, [{"prompt": "a", "completion": "b", "label": True}]).members().tolist() == [1]
