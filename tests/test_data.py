"""Sources, formats, masks and packing: what is read, what is learnt of it, and what is refused."""

import bz2
import csv
import gzip
import json
import lzma
import re
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from conftest import TEMPLATE, make_tokenizer
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from luthier.data import Data, dataset, inspection, packing, sources, stream
from luthier.data.conversations import BadRow
from luthier.data.formats import recognise
from luthier.data.masks import Renderer
from luthier.errors import DataError, ModelError

MARKED = TEMPLATE.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}",
)
TOOLS = TEMPLATE.replace(
    "+ m['content'] +",
    "+ m['content'] + (('<call>' + m['tool_calls'][0]['function']['name'] + '(' + "
    "(m['tool_calls'][0]['function']['arguments'] | tojson) + ')') if m.get('tool_calls') else '') +",
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4, of course"},
]


def load(tmp_path, rows, template=TEMPLATE, **data):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = Data(train=str(path), **data)
    return dataset.load(config, str(path), Renderer(make_tokenizer(template), config.train_on, config.max_length))


def learnt(found, index=0):
    """The learnt stretches of a document, as text."""
    document, tokenizer = found.documents[index], found.renderer.tokenizer
    out, run = [], []
    for token, weight in zip([*document.tokens.tolist(), 0], [*document.weights.tolist(), 0]):
        if weight:
            run.append(token)
        elif run:
            out.append(tokenizer.decode(run))
            run = []
    return out


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_all_assistant_turns_with_their_ends_are_learnt(tmp_path, template):
    found = load(tmp_path, [{"messages": CHAT}], template)
    assert learnt(found) == ["2<|im_end|>", "4, of course<|im_end|>"]
    whole = found.renderer.tokenizer.decode(found.documents[0].tokens)
    assert whole.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 1+1?<|im_end|>\n")
    assert not found.faults


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_last_turn_only(tmp_path, template):
    assert learnt(load(tmp_path, [{"messages": CHAT}], template, train_on="last")) == ["4, of course<|im_end|>"]


def test_the_mask_equals_that_of_transformers_generation_markers(tmp_path):
    found = load(
        tmp_path,
        [{"messages": CHAT}],
        MARKED.replace(
            "{% endgeneration %}{% else %}", "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        ).replace("{% endif %}{{ '<|im_end|>\n' }}", "{{ '<|im_end|>\n' }}{% endif %}"),
    )
    theirs = found.renderer.tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    document = found.documents[0]
    n = len(document.tokens)
    assert document.tokens.tolist() == theirs["input_ids"][:n]
    assert document.weights.tolist() == theirs["assistant_masks"][:n]
    assert sum(theirs["assistant_masks"][n:]) == 0


def test_the_prompt_of_an_evaluation_is_what_stood_before_the_answer(tmp_path):
    found = load(tmp_path, [{"messages": CHAT}])
    prompt, answer = found.renderer.prompt(found.conversations[0])
    assert answer == "4, of course"
    assert found.documents[0].tokens[: len(prompt)].tolist() == prompt
    assert found.documents[0].weights[len(prompt)] == 1


def test_tool_calls_are_learnt_and_tool_answers_are_not(tmp_path):
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "17"},
        {"role": "assistant", "content": "It is 17."},
    ]
    found = load(tmp_path, [{"messages": messages, "tools": json.dumps([{"name": "add"}])}], TOOLS)
    assert learnt(found) == ['<call>add({"a": 1})<|im_end|>', "It is 17.<|im_end|>"]
    assert found.conversations[0].tools == [{"name": "add"}]


ONE = ["4<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "columns", "name"),
    [
        ({"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}, {}, "messages"),
        ({"conversations": [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}]}, {}, "sharegpt"),
        ({"instruction": "2+2", "input": "", "output": "4"}, {}, "alpaca"),
        ({"prompt": "2+2", "completion": "4"}, {}, "prompt_completion"),
        ({"prompt": [{"role": "user", "content": "2+2"}], "completion": "4"}, {}, "prompt_completion"),
        ({"question": "2+2", "answer": "4"}, {"prompt": "question", "completion": "answer"}, "prompt_completion"),
    ],
)  # fmt: skip
def test_formats_are_recognised_and_learnt_alike(tmp_path, row, columns, name):
    found = load(tmp_path, [row], columns=columns)
    assert found.found.startswith(name)
    assert learnt(found) == ONE
    assert (
        found.renderer.tokenizer.decode(found.documents[0].tokens)
        == "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
    )


def test_alpaca_input_and_sharegpt_system(tmp_path):
    row = {"instruction": "Translate", "input": "chat", "output": "cat", "system": "You translate."}
    assert [m["content"] for m in load(tmp_path, [row]).conversations[0].messages] == [
        "You translate.",
        "Translate\n\nchat",
        "cat",
    ]
    row = {"system": "S", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert load(tmp_path, [row]).conversations[0].messages[0] == {"role": "system", "content": "S"}


def test_plain_text_is_learnt_whole_but_for_its_first_token(tmp_path):
    found = load(tmp_path, [{"text": "hello"}], template=None)
    assert learnt(found) == ["ello<|im_end|>"]


def test_unknown_keys_name_the_remedy():
    with pytest.raises(DataError, match=r"data\.columns"):
        recognise({"foo": 1}, "x:1", {})


FAULTS = {
    "role_order": {"messages": [{"role": "assistant", "content": "hi"}]},
    "empty_answer": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "  "}]},
    "no_trained_token": {"messages": [{"role": "user", "content": "a"}]},
    "truncated": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 100}]},
    "special_token": {"messages": [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"}]},
    "format": {"messages": "nonsense"},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_bad_rows_are_counted_with_their_numbers(tmp_path, kind):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    found = load(tmp_path, [good, FAULTS[kind], good], max_length=80)
    assert [(f.kind, f.row) for f in found.faults] == [(kind, 1)]
    assert [d.row for d in found.documents] == [0, 2]
    with pytest.raises(DataError, match=f"{kind}: 1 rows \\(numbers 1;"):
        dataset.settle(found, Data(train="x"), None, print)
    told = []
    listing = tmp_path / "skipped.jsonl"
    dataset.settle(found, Data(train="x", on_bad_row="skip"), listing, told.append)
    assert kind in told[0]
    assert json.loads(listing.read_text())["row"] == 1


@pytest.mark.parametrize(
    "roles",
    [["user", "user", "assistant"], ["user", "assistant", "assistant"], ["user", "system", "assistant"],
     ["tool", "assistant"], ["user", "wizard"]],
)  # fmt: skip
def test_impossible_role_orders(tmp_path, roles):
    found = load(tmp_path, [{"messages": [{"role": r, "content": "x"} for r in roles]}])
    assert [f.kind for f in found.faults] == ["role_order"]


def test_a_template_that_rewrites_earlier_turns_is_not_learnt_from_by_guess(tmp_path):
    # Like Qwen3 and its thoughts: answers before the last question are written in another way.
    rewriting = TEMPLATE.replace(
        "m['content'] +", "(m['content'] if loop.last or m['role'] != 'assistant' else m['content'] | upper) +"
    )
    chat = [*CHAT[:2], {"role": "assistant", "content": "two"}, *CHAT[3:]]
    found = load(tmp_path, [{"messages": chat}], rewriting)
    assert [f.kind for f in found.faults] == ["template"]
    assert learnt(load(tmp_path, [{"messages": chat}], rewriting, train_on="last")) == ["4, of course<|im_end|>"]


def test_a_template_without_an_end_of_turn_is_refused(tmp_path):
    found = load(
        tmp_path,
        [{"messages": CHAT}],
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}",
    )
    assert [f.kind for f in found.faults] == ["template"]
    assert "no special token" in found.faults[0].detail


def test_a_template_that_drops_answers_is_refused(tmp_path):
    with pytest.raises(ModelError, match="leaves the assistant's answer out"):
        load(tmp_path, [{"messages": CHAT}], "{{ messages[0]['content'] }}")


def test_what_follows_the_last_answer_is_cut(tmp_path):
    found = load(tmp_path, [{"messages": [*CHAT, {"role": "user", "content": "thanks"}]}])
    assert found.renderer.tokenizer.decode(found.documents[0].tokens).endswith("4, of course<|im_end|>")


# ---------------------------------------------------------------------------- sources

RECORDS = [{"prompt": f"p{i}", "completion": 'ä\n,"'} for i in range(5)]


def _write(path, kind):
    lines = "".join(json.dumps(r) + "\n" for r in RECORDS).encode()
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    elif kind == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(RECORDS)
    elif kind == "zst":
        import pyarrow

        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(lines)
    else:
        packed = {"jsonl": lines, "json": json.dumps(RECORDS).encode(), "gz": gzip.compress(lines),
                  "bz2": bz2.compress(lines), "xz": lzma.compress(lines)}  # fmt: skip
        path.write_bytes(packed[kind])


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst"]
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    _write(path, name.rpartition(".")[2])
    assert [r.values for r in sources.read(str(path))] == RECORDS
    assert [r.number for r in sources.read([str(tmp_path), str(path)])] == list(range(10))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", b"[1, 2"), ("a.jsonl.gz", b"not gzip"), ("a.parquet", b"PAR1 no"), ("a.jsonl", b"\xff\xfe"),
     ("a.jsonl", b"")],
)  # fmt: skip
def test_broken_files_are_explained(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        list(sources.read(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [("a.jsonl", b'{"prompt": "x"}\n{oops\n', "a.jsonl:2"), ("a.jsonl", b"[1]\n", "a.jsonl:1"),
     ("a.csv", b"a,b\n1\n", "a.csv:2")],
)  # fmt: skip
def test_broken_lines_are_bad_rows(tmp_path, name, content, place):
    path = tmp_path / name
    path.write_bytes(content)
    last = list(sources.read(str(path)))[-1]
    assert last.fault
    assert last.place.endswith(place)


# ---------------------------------------------------------------------------- packing


def lognormal(count, mean=600, top=4096, seed=0):
    lengths = np.random.default_rng(seed).lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.clip(lengths, 16, top).astype(int).tolist()


@pytest.mark.parametrize(("mean", "row"), [(600, 4096), (250, 2048), (150, 8192)])
def test_rows_are_at_least_97_percent_full(mean, row):
    lengths = lognormal(3000, mean, row)
    rows = list(packing.best_fit(packing.order(3000, 0, 0), lengths, row))
    assert packing.fullness(rows, lengths, row) >= 0.97


@pytest.mark.parametrize("row", [1024, 2048, 4096])
def test_rows_of_real_texts_are_full(row):
    """The paragraphs of Python's own manual and its modules, measured in words."""
    manual = [part for text in topics.values() for part in text.split("\n\n") if part.strip()]
    library = Path(json.__file__).parents[1]
    files = [p for p in library.rglob("*.py") if not {"site-packages", "test", "tests"} & set(p.parts)]
    modules = [path.read_text("utf-8", "replace") for path in files]
    for texts in (manual, modules):
        lengths = [min(row, len(re.findall(r"\w+|[^\w\s]", text)) or 1) for text in texts]
        rows = list(packing.best_fit(packing.order(len(lengths), 0, 0), lengths, row))
        assert packing.fullness(rows[:-1], lengths, row) >= 0.97  # the last holds what is left


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 80))
@hypothesis_settings(deadline=None)
def test_packing_places_every_document_once(lengths, row):
    rows = list(packing.best_fit(range(len(lengths)), lengths, row))
    assert sorted(d for r in rows for d in r) == list(range(len(lengths)))
    assert all(sum(lengths[d] for d in r) <= row for r in rows)


def test_order_is_a_pure_function_of_seed_and_epoch():
    assert packing.order(100, 1, 2) == packing.order(100, 1, 2)
    assert len({tuple(packing.order(100, s, e)) for s in range(3) for e in range(3)}) == 9


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("size", [{"examples": 7, "tokens": None}, {"examples": None, "tokens": 256}])
def test_a_plan_covers_each_epoch_and_is_its_own_repetition(size, pack):
    lengths = lognormal(100, 40, 128)
    arguments = {**size, "micro_tokens": 128, "pack": pack, "seed": 3, "epochs": 2, "max_steps": None}
    steps = stream.plan(lengths, **arguments)
    documents = [d for step in steps for row in step for d in row]
    assert sorted(documents) == sorted([*range(100), *range(100)])
    assert stream.digest(steps) == stream.digest(stream.plan(lengths, **arguments))
    shorter = stream.plan(lengths, **{**arguments, "max_steps": 5, "epochs": None})
    assert len(shorter) == 5


def test_split_by_share_and_number(tmp_path):
    found = load(tmp_path, [{"prompt": str(i), "completion": "x"} for i in range(50)])
    for share, held in ((0.2, 10), (7, 7)):
        training, validation = dataset.split(found, share, seed=1)
        rows = [d.row for part in (training, validation) for d in part.documents]
        assert (len(validation), sorted(rows)) == (held, list(range(50)))
        assert [d.row for d in dataset.split(found, share, seed=1)[1].documents] == [
            d.row for d in validation.documents
        ]
    with pytest.raises(DataError, match="leaves rows on both sides"):
        dataset.split(found, 50, seed=1)


def test_bad_row_keeps_its_kind():
    assert BadRow("format", "x").kind == "format"


def test_packing_does_not_learn_in_order_of_length():
    lengths = lognormal(3000)
    rows = list(packing.best_fit(packing.order(3000, 0, 0), lengths, 16384))
    parts = [
        np.mean([lengths[d] for row in part for d in row]) for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :])
    ]
    assert abs(parts[0] / parts[1] - 1) < 0.15


def test_learnt_tokens_are_green_and_the_others_dim(tmp_path):
    found = load(tmp_path, [{"prompt": "2+2", "completion": "4"}])
    pieces = inspection.tokens_of(found, 0)
    text = inspection.coloured(pieces)
    assert text.plain == found.renderer.tokenizer.decode(found.documents[0].tokens)
    green = "".join(text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style))
    assert green == "4<|im_end|>"
    assert inspection.bracketed(pieces).endswith("\u27e64<|im_end|>\u27e7")
