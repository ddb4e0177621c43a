"""What a row may be and what is learnt of it: text files, Arrow, tokens, weights of turns, long texts."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TEMPLATE, make_tokenizer
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from luthier import steps, train
from luthier.batch import Batch
from luthier.config import configure
from luthier.data import Data, dataset, readers, sources
from luthier.data.conversations import Conversation, Tokens
from luthier.data.masks import Rendered, Renderer
from luthier.errors import ConfigError, DataError
from luthier.monitor import records

TOKENIZER = make_tokenizer()
QUESTION = {"role": "user", "content": "q"}
TOOLS = TEMPLATE.replace(
    "+ m['content'] +",
    "+ m['content'] + (('<call>' + (m['tool_calls'] | tojson)) if m.get('tool_calls') else '') +",
)


def load(tmp_path, rows, template=TEMPLATE, **data):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return load_file(path, template, **data)


def load_file(path, template=TEMPLATE, **data):
    config = Data(train=str(path), **data)
    tokenizer = TOKENIZER if template == TEMPLATE else make_tokenizer(template)
    renderer = Renderer(tokenizer, config.train_on, config.max_length, config.long_text)
    return dataset.load(config, str(path), renderer)


def only_fault(found):
    (fault,) = found.faults
    return f"{fault.kind}: {fault.detail}"


# ---------------------------------------------------------------------------- text files

TEXT = "First line,\nsecond line.\n\n  \nA new paragraph:\r\nits end"
PARTS = {
    "document": [(TEXT, "")],
    "paragraph": [("First line,\nsecond line.", ":1"), ("A new paragraph:\r\nits end", ":5")],
    "line": [("First line,", ":1"), ("second line.", ":2"), ("A new paragraph:", ":5"), ("its end", ":6")],
}


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "a.py", "a.TXT.gz"])
@pytest.mark.parametrize("sample_by", PARTS)
def test_text_files_are_read_whole_by_paragraph_or_by_line(tmp_path, name, sample_by):
    path = tmp_path / name
    path.write_bytes(gzip.compress(TEXT.encode()) if name.endswith(".gz") else b"\xef\xbb\xbf" + TEXT.encode())
    rows = list(sources.read(str(path), sample_by=sample_by))
    assert [(r.values, r.place) for r in rows] == [({"text": t}, f"{path}{place}") for t, place in PARTS[sample_by]]
    found = load_file(path, sample_by=sample_by)
    assert found.found == "text (told by the keys text)"
    assert "".join(TOKENIZER.decode(d.tokens) for d in found.documents) == "".join(
        text + "<|im_end|>" for text, _ in PARTS[sample_by]
    )


def test_text_is_read_line_by_line(tmp_path):
    """A cut archive: what stands before the cut is there before the end of the file was looked at."""
    path = tmp_path / "a.txt.gz"
    content = gzip.compress(np.random.default_rng(0).bytes(200_000).hex("\n", 40).encode())
    path.write_bytes(content[: len(content) // 2])
    rows = sources.read(str(path), sample_by="line")
    assert len(next(rows).values["text"]) == 80
    with pytest.raises(DataError, match=r"a\.txt\.gz: cannot be read"):
        list(rows)


def test_a_readme_beside_rows_is_no_row_and_hidden_files_are_none(tmp_path):
    (tmp_path / "README.md").write_text("About these rows.")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "b.jsonl").write_text("{}")
    assert [p.name for p in sources.files_of(str(tmp_path))] == ["README.md"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert [p.name for p in sources.files_of(str(tmp_path))] == ["a.jsonl"]


def test_patterns_name_files(tmp_path):
    for name in ("a.py", "deep/b.py", "deep/c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [r.values["text"] for r in sources.read(f"{tmp_path}/**/*.py")] == ["a.py", "deep/b.py"]
    assert sources.missing(f"{tmp_path}/*.rs") == f"'{tmp_path}/*.rs' matches no file"
    with pytest.raises(DataError, match="matches no file"):
        list(sources.read(f"{tmp_path}/*.rs"))


def test_a_folder_of_several_splits_is_read_by_split(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    assert [r.values["text"][:5] for r in sources.read(str(tmp_path))] == ["train", "train"]
    assert [r.values["text"][:5] for r in sources.read(str(tmp_path), split="test")] == ["test-"]
    with pytest.raises(DataError, match=r"data\.split='dev' is not there; it has test, train"):
        list(sources.read(str(tmp_path), split="dev"))
    (tmp_path / "more.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"others \(more\.jsonl\)"):
        list(sources.read(str(tmp_path)))


# ---------------------------------------------------------------------------- Arrow, and any row first

RECORDS = [{"text": f"text {i}"} for i in range(2500)]


def write_arrow(path, kind, rows=RECORDS, batch=700):
    table = pa.Table.from_pylist(rows)
    made = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, made(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)


def write(path):
    kind = path.name.split(".", 1)[1]
    lines = "".join(json.dumps(r) + "\n\n" for r in RECORDS)
    if kind in ("arrow", "stream.arrow"):
        write_arrow(path, "file" if kind == "arrow" else "stream")
    elif kind == "feather":
        import pyarrow.feather

        pyarrow.feather.write_feather(pa.Table.from_pylist(RECORDS), str(path), chunksize=300)
    elif kind.startswith("arrow"):
        write_arrow(path.with_suffix(""), "stream" if "stream" in path.name else "file")
        path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
        path.with_suffix("").unlink()
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=600)
    elif kind == "json":
        path.write_text(json.dumps(RECORDS))
    elif kind == "csv":
        path.write_text("text\n" + "".join(f'"{r["text"]}"\n' for r in RECORDS))
    elif kind == "txt":
        path.write_text("".join(r["text"] + "\n" for r in RECORDS))
    else:
        path.write_bytes(gzip.compress(lines.encode()) if kind.endswith("gz") else lines.encode())


NAMES = ["a.arrow", "a.stream.arrow", "a.feather", "a.arrow.gz", "stream.arrow.gz", "a.parquet", "a.json", "a.csv",
         "a.txt", "a.jsonl", "a.jsonl.gz"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_rows_from_any_number_on(tmp_path, name):
    """What is read from row N on is what is read from the beginning, without its first N rows; over two files, too."""
    write(tmp_path / name)
    both = [str(tmp_path / name)] * 2
    whole = list(sources.read(both, sample_by="line"))
    assert [r.values for r in whole] == RECORDS * 2
    assert [r.number for r in whole] == list(range(5000))
    for start in (0, 1, 599, 600, 1300, 2499, 2500, 2501, 4999, 5000, 9999):
        assert list(sources.read(both, start=start, sample_by="line")) == whole[start:]


@pytest.mark.parametrize(("name", "parsed"), [("a.jsonl", "parse_json"), ("a.parquet", "pq"), ("a.arrow", "pq")])
def test_rows_before_the_first_are_not_parsed(tmp_path, monkeypatch, name, parsed):
    write(tmp_path / name)
    made = []
    if parsed == "parse_json":
        monkeypatch.setattr(readers, "parse_json", lambda text: made.append(1) or json.loads(text))
    else:
        monkeypatch.setattr(readers, "SLICE", 50)
        row = readers._rows
        monkeypatch.setattr(
            readers, "_rows", lambda path, schema, batches, number, skip: row(
                path, schema, (made.append(b.num_rows) or b for b in batches), number, skip
            )
        )  # fmt: skip
    next(sources.read(str(tmp_path / name), start=2400))
    assert sum(made) == {"a.jsonl": 1, "a.parquet": 50, "a.arrow": 2500}[name]


def test_what_datasets_saves_to_disk_is_read(tmp_path):
    import datasets

    made = datasets.Dataset.from_list(
        [{"messages": [QUESTION, {"role": "assistant", "content": str(i)}], "n": i} for i in range(100)]
    )
    made.save_to_disk(str(tmp_path / "one"), num_shards=3)
    datasets.DatasetDict({"train": made, "test": made.select(range(5))}).save_to_disk(str(tmp_path / "two"))
    assert [r.values for r in sources.read(str(tmp_path / "one"))] == made.to_list()
    assert len(list(sources.read(str(tmp_path / "two")))) == 100
    assert len(list(sources.read(str(tmp_path / "two"), split="test"))) == 5
    with pytest.raises(DataError, match=r"data\.split='dev' is not there; the splits are test, train"):
        list(sources.read(str(tmp_path / "two"), split="dev"))
    assert len(load_file(tmp_path / "one")) == 100
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"which state\.json names, is not there"):
        list(sources.read(str(tmp_path / "one")))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns_do_not_fill_arguments_with_nulls(tmp_path, name):
    """Columns give every object the fields of all: the arguments of one call must not get those of another."""

    def row(arguments):
        call = {"function": {"name": "set", "arguments": arguments}}
        return {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}], "unused": None}

    rows = [row({"light": 1}), row({"heat": 2})]
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_arrow(path, "file", rows)
    found = load_file(path, TOOLS)
    texts = [found.renderer.tokenizer.decode(d.tokens) for d in found.documents]
    assert ['"arguments": {"light": 1}' in texts[0], '"arguments": {"heat": 2}' in texts[1]] == [True, True]
    assert not any("null" in text for text in texts)


def test_one_unreadable_value_of_a_column_is_one_bad_row(tmp_path):
    ends = np.array([0, 4, 6, 10], np.int32)
    texts = pa.StringArray.from_buffers(3, pa.py_buffer(ends.tobytes()), pa.py_buffer(b"good\xff\xfefine"))
    table = pa.table({"text": texts})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    found = load_file(tmp_path / "a.arrow")
    assert [d.row for d in found.documents] == [0, 2]
    assert (found.faults[0].row, "cannot be read" in found.faults[0].detail) == (1, True)


# ---------------------------------------------------------------------------- tokens


def test_tokens_are_learnt_as_labels_or_mask_say(tmp_path):
    ids = TOKENIZER("question answer")["input_ids"]
    masked = [-100] * 9 + ids[9:]
    rows = [
        {"input_ids": ids},
        {"input_ids": ids, "labels": masked},
        {"input_ids": ids, "loss_mask": [0] * 9 + [1] * 6},
        {"input_ids": ids, "loss_mask": [False] * 9 + [0.5] * 6},
        {"input_ids": [7, 7, *ids, 7], "labels": [-100, -100, *masked, -100], "attention_mask": [0, 0, *[1] * 15, 0]},
        {"input_ids": ids, "labels": masked, "loss_mask": [0] * 9 + [2] * 6, "text": "ignored"},
    ]
    found = load(tmp_path, rows)
    assert found.found == "tokens (told by the keys input_ids)"
    assert not found.faults
    assert [d.tokens.tolist() for d in found.documents] == [ids] * 6
    assert found.documents[0].weights.tolist() == [0.0] + [1.0] * 14
    for document, weight in zip(found.documents[1:], (1, 1, 0.5, 1, 2)):
        assert document.weights.tolist() == [0.0] * 9 + [weight] * 6
    # As transformers has it: labels are shifted by one, and -100 is left out.
    batch = Batch.pack(found.documents[1:2])
    assert batch.targets[batch.trained].tolist() == [label for label in masked[1:] if label != -100]
    assert found.renderer.prompt(found.conversations[1]) == (ids[:9], "answer")
    kept = Conversation(**json.loads(json.dumps(vars(found.conversations[1]))))  # as a cache keeps it
    assert found.renderer.prompt(kept) == (ids[:9], "answer")
    with pytest.raises(DataError, match="have no prompt"):
        found.renderer.prompt(found.conversations[0])


def test_tokens_never_pass_through_template_or_tokenizer(monkeypatch):
    renderer = Renderer(TOKENIZER, "all", 64)

    def refuse(*_, **__):
        raise AssertionError("tokens were made into text")

    monkeypatch.setattr(type(TOKENIZER), "__call__", refuse)
    monkeypatch.setattr(type(TOKENIZER), "apply_chat_template", refuse)
    rendered = renderer.render(Conversation([], tokens=Tokens([1, 258, 3], [1.0, 0.0, 1.0])))
    ((document,),) = renderer.documents([(4, rendered)])
    assert (document.tokens.tolist(), document.weights.tolist(), document.row) == ([1, 258, 3], [0, 0, 1], 4)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"input_ids": [1, 2, 259]}, "input_ids holds 259, and the tokenizer's ids are 0 to 258"),
        ({"input_ids": [1, -1]}, "input_ids holds -1"),
        ({"input_ids": [1, True]}, r"input_ids\[1\] is True, not an integer"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, r"labels\[1\] is 3: neither input_ids\[1\]=2 nor -100"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries, input_ids 2"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "no_trained_token"),
        ({"input_ids": [1, 2], "loss_mask": [1, -1]}, "weight is -1"),
        ({"input_ids": [1, 2], "labels": [1, 2], "loss_mask": [1, 0]}, "labels and loss_mask disagree"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "has a hole"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 1, 2]}, "more than zeros and ones"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}, "attention_mask hides it"),
        ({"input_ids": [1, 2, 3], "position_ids": [0, 1, 0]}, "holds several documents"),
        ({"input_ids": list(range(70)), "labels": [-100] * 9 + list(range(9, 70))}, "truncated"),
    ],
)  # fmt: skip
def test_tokens_that_cannot_be_right(tmp_path, row, told):
    import re

    assert re.search(told, only_fault(load(tmp_path, [row], max_length=64)))


def test_rows_of_tokens_say_themselves_what_is_learnt(tmp_path):
    with pytest.raises(DataError, match=r"data\.train_on=last: rows of tokens"):
        load(tmp_path, [{"input_ids": [1, 2]}], train_on="last")


# ---------------------------------------------------------------------------- weights of turns


def weighted(*weights, key="weight"):
    messages = []
    for i, weight in enumerate(weights):
        messages += [QUESTION, {"role": "assistant", "content": f"a{i}"} | ({} if weight is None else {key: weight})]
    return messages


def learnt(found, index=0):
    """[(stretch of text, weight)]"""
    out = []
    for token, weight in zip(found.documents[index].tokens.tolist(), found.documents[index].weights.tolist()):
        if weight and out and out[-1][1] == weight and out[-1][2]:
            out[-1][0].append(token)
        elif weight:
            out.append([[token], weight, True])
        elif out:
            out[-1][2] = False
    return [(found.renderer.tokenizer.decode(tokens), weight) for tokens, weight, _ in out]


MARKED = TEMPLATE.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}",
)


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_each_turn_is_learnt_by_its_weight(tmp_path, template):
    rows = [
        {"messages": weighted(0, None, 1)},
        {"messages": weighted(0.25, 3.0)},
        {"messages": weighted(False, True, key="train")},
        {"conversations": [{"from": "human", "value": "q", "weight": 0},
                           {"from": "gpt", "value": "a0", "weight": 0.5}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a0", "loss": False},
                           {"from": "human", "value": "q", "train": False}, {"from": "gpt", "value": "a1"}]},
    ]  # fmt: skip
    expected = [
        [("a1<|im_end|>", 1), ("a2<|im_end|>", 1)],
        [("a0<|im_end|>", 0.25), ("a1<|im_end|>", 3)],
        [("a1<|im_end|>", 1)],
        [("a0<|im_end|>", 0.5)],
        [("a1<|im_end|>", 1)],
    ]
    for row, wanted in zip(rows, expected):
        found = load(tmp_path, [row], template)
        assert (found.faults, learnt(found)) == ([], wanted)
        assert all(set(m) == {"role", "content"} for m in found.conversations[0].messages)  # a template sees no marks
    assert learnt(load(tmp_path, rows[1:2], template, train_on="last")) == [("a1<|im_end|>", 3)]


def test_an_evaluation_asks_for_the_last_learnt_answer(tmp_path):
    found = load(tmp_path, [{"messages": weighted(1, 0)}])
    assert found.renderer.prompt(found.conversations[0])[1] == "a0"


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (weighted(0, 0), "no_trained_token: the weight of every assistant turn"),
        ([QUESTION | {"weight": 1}, *weighted(1)[1:]], "weight=1 on a user turn: only assistant turns are learnt"),
        ([QUESTION | {"train": True}, *weighted(1)[1:]], "train=True on a user turn"),
        (weighted(-1), "weight is -1, not a finite number from 0 up"),
        (weighted(float("nan")), "weight is nan"),
        (weighted(float("inf")), "weight is inf"),
        (weighted(1e300), "weight is 1e\\+300"),
        (weighted(1e-300), "weight is 1e-300"),
        (weighted(10**400), "weight is 1000"),
        (weighted(True), "weight is True, not a number"),
        (weighted("1"), "weight is '1', not a number"),
        (weighted(1, key="train"), "train is 1, not true or false"),
        ([*weighted(1)[:1], weighted(1)[1] | {"train": True}], "both 'weight' and 'train'"),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_right(tmp_path, messages, told):
    import re

    assert re.search(told, only_fault(load(tmp_path, [{"messages": messages}])))


def test_train_on_last_with_a_last_turn_of_weight_0_learns_nothing(tmp_path):
    assert "train_on=last) is 0" in only_fault(load(tmp_path, [{"messages": weighted(1, 0)}], train_on="last"))


# ---------------------------------------------------------------------------- long texts


@given(st.integers(2, 70), st.integers(2, 9))
@hypothesis_settings(deadline=None)
def test_every_token_of_a_long_text_but_the_first_is_learnt_once(length, longest):
    """What the chunks teach, as a batch has it: targets are the text's tokens without the first, in order."""
    ids = [i % 250 for i in range(length)]
    renderer = Renderer(TOKENIZER, "all", longest)
    (documents,) = renderer.documents([(0, renderer.render(Conversation([], tokens=Tokens(ids, [1.0] * length))))])
    assert not isinstance(documents, Exception)
    assert all(2 <= len(d.tokens) <= longest for d in documents)
    batch = Batch.pack(documents)
    assert batch.targets[batch.trained].tolist() == ids[1:]
    assert batch.weights.tolist() == [1.0] * (length - 1)
    assert batch.tokens.tolist() == ids[:-1]  # each is made from the token right before it


def test_a_long_text_file_becomes_chunks(tmp_path):
    text = "The quick brown fox. " * 20
    (tmp_path / "a.txt").write_text(text)
    found = load_file(tmp_path / "a.txt", max_length=64)
    assert len(found) == 7
    batch = Batch.pack(found.documents)
    assert TOKENIZER.decode(batch.targets[batch.trained]) == text[1:] + "<|im_end|>"
    assert [d.row for d in found.documents] == [0] * 7
    assert len(found.conversations) == 7
    assert load_file(tmp_path / "a.txt", max_length=2048).trained_tokens == found.trained_tokens
    told = only_fault(load_file(tmp_path / "a.txt", max_length=64, long_text="error"))
    assert told == "truncated: a text of 421 tokens, with data.max_length=64 and long_text=error"


def test_a_long_answer_is_never_cut(tmp_path):
    found = load(tmp_path, [{"prompt": "a", "completion": "b" * 100}], max_length=64)
    assert only_fault(found).startswith("truncated")


@pytest.mark.parametrize("setting", ["data.long_text=cut", "data.sample_by=word", "data.format=token"])
def test_values_that_are_none_of_these_are_refused(settings, setting):
    with pytest.raises(ConfigError, match=setting.split("=")[0]):
        configure(settings, setting)


# ---------------------------------------------------------------------------- whole runs


def text_files(folder):
    for name in ("a.txt", "b.md"):
        (folder / name).write_text(f"The text of {name} goes on.\n\n" * 30)
    return {"train": [str(folder / "a.txt"), str(folder / "b.md")], "validation": 4, "sample_by": "paragraph"}


def long_texts(folder):
    return text_files(folder) | {"sample_by": "document", "validation": 1}


def weighted_turns(folder):
    rows = [{"messages": weighted(0, i % 3 / 2 + 0.5)} for i in range(30)]
    (folder / "w.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"train": str(folder / "w.jsonl"), "validation": 4}


def ready_tokens(folder):
    write_arrow(folder / "t.arrow", "stream", [{"input_ids": [i, 1, 2], "loss_mask": [0, 1, 0.5]} for i in range(30)])
    return {"train": str(folder / "t.arrow"), "validation": 4}


@pytest.mark.parametrize("made", [text_files, long_texts, weighted_turns, ready_tokens])
def test_stopped_and_resumed_ends_with_the_same_bytes(settings, tmp_path, made):
    from test_train import QUIET, finished

    (tmp_path / "data").mkdir()
    data = {"data": {"max_length": 64, **made(tmp_path / "data")}, "checkpoint": {"every": 2}}
    whole = configure(settings | data, method="full")
    history = records(train(whole, QUIET).folder / "metrics.jsonl")
    assert all(np.isfinite(r["loss"]) for r in history if r["kind"] == "train")
    parted = configure(settings | data, {"output_dir": str(tmp_path / "parted")}, method="full")
    for step in steps(parted, QUIET):
        if step.step == 3:
            break
    train(parted, QUIET)
    assert finished(tmp_path / "run") == finished(tmp_path / "parted")
    assert configure(tmp_path / "run" / "config.yaml").data == whole.data


# ---------------------------------------------------------------------------- nothing silent


def call(**function):
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", **function}}]}


@pytest.mark.parametrize(
    ("row", "template", "told"),
    [
        ({"messages": [QUESTION, call(arguments={"a": "<|im_end|>"})]}, TOOLS, "special_token: turn 1 (assistant)"),
        ({"messages": [QUESTION, call(arguments={"<|im_end|>": 1})]}, TOOLS, "special_token: turn 1 (assistant)"),
        ({"messages": weighted(1), "tools": [{"name": "<|im_end|>"}]}, TOOLS, "special_token: tools"),
        ({"messages": [QUESTION | {"name": "<|im_start|>"}, *weighted(1)[1:]]}, TEMPLATE, "special_token: turn 0 (u"),
        ({"messages": [QUESTION, call(arguments="[1]")]}, TOOLS, "arguments of a tool call are list, not an object"),
        ({"messages": [QUESTION, call(arguments='{"a": NaN}')]}, TOOLS, "nan is no JSON number"),
        ({"messages": [QUESTION, call()]}, TEMPLATE, "leaves the call of 'add' out"),
        ({"messages": weighted(1), "tools": [{"name": "sum"}]}, TEMPLATE, "leaves the tool 'sum' out"),
        ({"messages": [QUESTION, weighted(1)[1] | {"reasoning_content": "hm"}]}, TEMPLATE, "leaves the reasoning_con"),
        ({"messages": [{"role": "system", "content": "S"}, *weighted(1)]},
         TEMPLATE.replace("for m in messages", "for m in messages if m.role != 'system'"), "content of a system turn"),
        ({"messages": [{"role": "user", "content": None}, *weighted(1)[1:]]}, TEMPLATE, "a user turn has no content"),
        ({"messages": [QUESTION | {"tool_calls": [1]}, *weighted(1)[1:]]}, TEMPLATE, "tool_calls on a user turn"),
        ({"messages": [QUESTION, {"role": "assistant", "content": "a", "tool_calls": {}}]}, TEMPLATE, "tool_calls is"),
        ({"instruction": "a", "input": 0, "output": "b"}, TEMPLATE, "input is int, not text"),
        ({"instruction": "a", "history": [["q", 5]], "output": "b"}, TEMPLATE, "history is int, not text"),
        ({"instruction": "a", "history": 5, "output": "b"}, TEMPLATE, "history is int, not a list"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "Function_Call", "value": "x"}]}, TOOLS,
         "a function call is a string, but not JSON"),
        ({"text": 5}, TEMPLATE, "text is int, not text"),
    ],
)  # fmt: skip
def test_what_would_be_learnt_wrongly_in_silence(tmp_path, row, template, told):
    assert told in only_fault(load(tmp_path, [row], template))


def test_the_first_row_that_can_be_told_tells_the_format(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('oops\n{"prmpt": "a"}\n{"prompt": "a", "completion": "b"}\n{"text": "b"}\n')
    found = load_file(path)
    assert found.found.startswith("prompt_completion")
    assert [(f.row, f.kind, f.place) for f in found.faults] == [(i, "format", f"{path}:{i + 1}") for i in (0, 1, 3)]
    assert [d.row for d in found.documents] == [2]


@pytest.mark.parametrize("content", ["oops\n", '{"prmpt": "a"}\n' * 3, "oops\n" * 3000])
def test_a_file_of_no_known_format_is_an_error_that_names_its_first_row(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"a\.jsonl:1: "):
        load_file(tmp_path / "a.jsonl")


def test_columns_must_name_keys_of_a_format(tmp_path, settings):
    with pytest.raises(ConfigError, match=r"data\.columns: no format has a key 'promt'"):
        configure(settings, "data.columns={promt: q}", "data.format=text")
    with pytest.raises(DataError, match=r"data\.columns: no format has a key 'promt'"):
        load(tmp_path, [{"text": "a", "q": "b"}], columns={"promt": "q"})


def test_plain_text_of_a_chat_model_ends_with_the_end_of_text_token(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    renderer = Renderer(tokenizer, "all", 64)
    assert renderer.end_of_turn == "<|im_end|>"
    text = renderer.render(Conversation([{"role": "assistant", "content": "x"}], plain=True))
    assert text == Rendered("x<|endoftext|>", [(0, 14, 1.0)], True)


def test_a_fault_can_be_printed_and_written_whatever_the_row_holds(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": {"\\u001b[31m\\ud800": 1}}\n{"\\ud800\\u001b": 1}\n')
    for fault in load_file(path).faults:
        assert fault.detail.isprintable()
        fault.detail.encode()
