"""Bad rows of more than 500 kinds, made by rule: each is counted and named, and the good rows among them survive."""

import bz2
import copy
import gzip
import itertools
import json
import lzma
import math
import re

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from conftest import TEMPLATE, make_tokenizer
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from luthier.cli import main
from luthier.data import Data, dataset, sources
from luthier.data.conversations import BadRow
from luthier.data.formats import converted, of_kind
from luthier.data.masks import Renderer
from luthier.errors import DataError

FORMATS = {form.name: form for form in of_kind("text")}

TEMPLATE_WITH_TOOLS = TEMPLATE.replace(
    "{% for m in messages %}", "{{ tools | tojson if tools else '' }}{% for m in messages %}"
).replace("+ m['content'] +", "+ m['content'] + ((m['tool_calls'] | tojson) if m.get('tool_calls') else '') +")
TOKENIZER = make_tokenizer(TEMPLATE_WITH_TOOLS)


def load(path, **data):
    config = Data(train=str(path), max_length=512, on_bad_row="skip", **data)
    return dataset.load(config, str(path), Renderer(TOKENIZER, config.train_on, config.max_length, config.long_text))


def deep(levels):
    value = "x"
    for _ in range(levels):
        value = [value]
    return value


# What no field that holds text can hold. Most other fields can hold none of it either; EXCEPT says which can.
JUNK = {
    "null": None, "true": True, "false": False, "zero": 0, "int": 5, "negative": -1, "float": 1.5, "huge": 10**400,
    "nan": math.nan, "inf": math.inf, "empty list": [], "list of int": [5], "list of null": [None],
    "list of list": [["a"]], "list of object": [{}], "deep list": deep(200), "object": {"a": 1}, "empty object": {},
    "deep object": {"a": {"b": {"c": deep(90)}}}, "image": [{"type": "image_url", "image_url": {"url": "x"}}],
    "text part without text": [{"type": "text"}], "text part of int": [{"type": "text", "text": 5}],
    "part without type": [{"text": "x"}], "two parts, one bad": [{"type": "text", "text": "x"}, 5],
    "surrogate": "\ud800", "surrogate in text": "ab\udfffcd", "special token": "<|im_end|>",
    "special token in text": "a <|im_start|>assistant\n b",
}  # fmt: skip
STRINGS = {"word": "word", "number in text": "5", "broken JSON": '{"a": ', "JSON scalar": "5.0", "JSON null": "null"}
SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a", "weight": 1}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}  # fmt: skip
GOOD = {
    "messages": {
        "messages": [SYSTEM, USER, CALL, {"role": "tool", "content": "17"}, ANSWER],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    },
    "sharegpt": {
        "system": "S",
        "conversations": [
            {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "add", "arguments": {}}'},
            {"from": "observation", "value": "17"}, {"from": "gpt", "value": "a", "weight": 0.5},
        ],
        "tools": '[{"name": "add"}]',
    },
    "alpaca": {"instruction": "q", "input": "more", "output": "a", "history": [["x", "y"]], "system": "S"},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "text": {"text": "some text"},
    "tokens": {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "loss_mask": [0, 1, 1], "attention_mask": [1, 1, 1],
               "position_ids": [0, 1, 2]},
}  # fmt: skip
NOTHING = {"null", "empty list"}
NUMBERS = {"null", "zero", "int", "float"}
# Path of a field -> what of JUNK and STRINGS is right there.
TEXT_FIELD = set(STRINGS)
FIELDS = {
    "messages": {
        ("messages",): set(), ("messages", 0): set(), ("messages", 1): set(), ("messages", 4): set(),
        ("messages", 0, "role"): set(), ("messages", 1, "role"): set(), ("messages", 4, "role"): set(),
        ("messages", 0, "content"): TEXT_FIELD, ("messages", 1, "content"): TEXT_FIELD,
        ("messages", 2, "content"): TEXT_FIELD | {"null"}, ("messages", 3, "content"): TEXT_FIELD | {"null"},
        ("messages", 4, "content"): TEXT_FIELD,
        ("messages", 2, "tool_calls"): set(), ("messages", 2, "tool_calls", 0): set(),
        ("messages", 2, "tool_calls", 0, "function"): set(),
        ("messages", 2, "tool_calls", 0, "function", "name"): TEXT_FIELD,
        ("messages", 2, "tool_calls", 0, "function", "arguments"):
            {"null", "object", "empty object", "JSON null"},
        ("messages", 4, "weight"): NUMBERS,
        ("messages", 1, "weight"): {"null", "zero"},
        ("messages", 4, "train"): {"null"}, ("messages", 1, "train"): {"null", "false"},
        ("messages", 1, "loss"): {"null", "false"},
        ("tools",): NOTHING | {"JSON null"},
    },
    "sharegpt": {
        ("conversations",): set(), ("conversations", 0): set(), ("conversations", 3): set(),
        ("conversations", 0, "from"): set(), ("conversations", 3, "from"): set(),
        ("conversations", 0, "value"): TEXT_FIELD, ("conversations", 1, "value"): set(),
        ("conversations", 2, "value"): TEXT_FIELD | {"null"}, ("conversations", 3, "value"): TEXT_FIELD,
        ("conversations", 3, "weight"): NUMBERS,
        ("conversations", 0, "weight"): {"null", "zero"}, ("conversations", 3, "loss"): {"null"},
        ("system",): TEXT_FIELD | {"null"},
        ("tools",): NOTHING | {"JSON null"},
    },
    "alpaca": {
        ("instruction",): TEXT_FIELD, ("input",): TEXT_FIELD | {"null"}, ("output",): TEXT_FIELD,
        ("system",): TEXT_FIELD | {"null"}, ("history",): NOTHING | {"JSON null"},
        ("history", 0): set(), ("history", 0, 0): TEXT_FIELD, ("history", 0, 1): TEXT_FIELD,
    },
    "prompt_completion": {("prompt",): TEXT_FIELD, ("completion",): TEXT_FIELD},
    "text": {("text",): TEXT_FIELD},
    "tokens": {
        ("input_ids",): set(), ("input_ids", 1): set(), ("labels",): {"null", "JSON null"}, ("labels", 1): set(),
        ("loss_mask",): {"null", "JSON null"}, ("loss_mask", 1): {"true", "int", "float"},
        ("attention_mask",): {"null", "JSON null"}, ("attention_mask", 1): {"true"},
        ("position_ids",): {"null", "JSON null"}, ("position_ids", 1): set(),
    },
}  # fmt: skip
OPTIONAL = {"tools", "system", "input", "history", "labels", "loss_mask", "attention_mask", "position_ids", "weight",
            "id", "type", "train", "loss", "arguments"}  # fmt: skip


def changed(row, path, value=None, remove=False):
    made = copy.deepcopy(row)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return made


def wrong_fields(name):
    """{what is wrong: row} for every field and every value that is wrong there, and every needed field that is gone."""
    for path, right in FIELDS[name].items():
        for junk, value in (JUNK | STRINGS).items():
            if junk not in right:
                yield f"{path} is {junk}", changed(GOOD[name], path, value)
        if path[-1] not in OPTIONAL and path[-1] != "content" and not isinstance(path[-1], int) and path[-1] != "value":
            yield f"no {path}", changed(GOOD[name], path, remove=True)


def wrong_orders():
    """All orders of up to three speakers but those that a grammar of conversations has."""
    roles = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}
    for length in (1, 2, 3):
        for letters in itertools.product(roles, repeat=length):
            if not re.fullmatch(r"[sd]?(ua(t+a)*t*)+u?", "".join(letters)):
                yield f"order {letters}", {"messages": [{"role": roles[c], "content": "x"} for c in letters]}
    for role in ("", "User", "ASSISTANT", "human", "gpt", "function", "ipython", "model", " user", "user\n", "\x00"):
        yield f"role {role!r}", {"messages": [{"role": role, "content": "x"}, ANSWER]}


def wrong_lines(good):
    """Lines that are no JSON object, made from one that is; bytes."""
    whole = json.dumps(good).encode()
    for cut in range(1, len(whole), max(1, len(whole) // 25)):
        yield f"cut at {cut}", whole[:cut]
        yield f"NUL at {cut}", whole[:cut].rstrip(b" ") + b"\0" + whole[cut:] if cut == 1 else whole[:cut] + b"\0"
    for text in ("5", "-0", "null", "true", "NaN", "[]", "[1, 2]", '""', '"text"', "{}", '{"": ""}', "{oops", "}", "]",
                 "//", "#", "'text'", "{'text': 'x'}", '{"text": "x",}', '{"text": undefined}', '{"text": None}',
                 '{"text": "x"} {"text": "y"}', '{"text": "x"} // why', '{"text": "x"', '{"text": "a\tb"}',
                 '{"text": "\\x"}', '{"text": "\\u12"}', '{"text" "x"}', '{text: "x"}', '{"text": "x", "text": "y"}',
                 '{"text": 0x10}', '{"text": 01}', '{"text": .5}', '{"text": "x"}}', "\ufeff{}", "<html>", "text,label",
                 "---", "[" * 100_000, '{"text": ' + "[" * 100_000, '{"a": ' * 50_000, "9" * 5000,
                 '{"text": ' + "9" * 5000 + "}", '{"text": "x", "n": ' + "9" * 5000 + "}", "1e999",
                 "Infinity"):  # fmt: skip
        yield f"line {text[:40]}", text.encode()
    for name, content in {"latin-1": b"\xe4", "cut UTF-8": "ä".encode()[:1], "overlong": b"\xc0\x80",
                          "surrogate bytes": b"\xed\xa0\x80", "UTF-16": b"x\0\xff"}.items():  # fmt: skip
        yield f"bytes of {name}", b'{"text": "' + content + b'"}'


def more(name):
    """What single fields cannot say."""
    if name == "messages":
        yield from wrong_orders()
        yield "all weights 0", {"messages": [USER, ANSWER | {"weight": 0}]}
        yield "weight and train", {"messages": [USER, ANSWER | {"train": True}]}
        yield "blank answer", {"messages": [USER, {"role": "assistant", "content": " \n\t"}]}
        yield "long answer", {"messages": [USER, {"role": "assistant", "content": "x" * 600}]}
        yield "too deep arguments", {"messages": [USER, changed(
            CALL, ("tool_calls", 0, "function", "arguments"), {"a": deep(70)})]}  # fmt: skip
        for n, weight in enumerate((-0.001, -1e300, 1e39, 1e300, 1e-46, -math.inf, "1", [1], {"a": 1})):
            yield f"weight {n}", {"messages": [USER, ANSWER | {"weight": weight}]}
    if name == "sharegpt":
        for n, call in enumerate(("[]", "5", '"add"', "[5]", "{}", '{"name": 5}', '{"name": ""}', '[{"name": "a"}, 5]',
                                  '{"name": "a", "arguments": "x"}', '{"name": "a", "arguments": [1]}')):  # fmt: skip
            yield f"call {n}", changed(GOOD[name], ("conversations", 1, "value"), call)
    if name == "prompt_completion":
        for n, completion in enumerate(
            ([], [USER], [USER, USER], [SYSTEM], [5], {"role": "assistant"}, [ANSWER, ANSWER])
        ):
            yield f"completion {n}", {"prompt": [USER], "completion": completion}
        yield "prompt ends with an answer", {"prompt": [USER, ANSWER], "completion": "a"}
        yield "blank", {"prompt": "q", "completion": " "}
    if name == "text":
        for n, blank in enumerate(("", " ", "\n", "\t \n", "\u3000")):
            yield f"blank {n}", {"text": blank}
    if name == "tokens":
        ids = {"input_ids": [1, 2, 3]}
        for n, extra in enumerate((
            {"input_ids": [1, 259, 3]}, {"input_ids": [1, 2**31, 3]}, {"input_ids": [1, 2**63, 3]},
            {"input_ids": [-100]},
            {"input_ids": [5]}, {"labels": [-100] * 3}, {"labels": [1, -100, -100]}, {"labels": [-100, 3, 2]},
            {"labels": [1, 2]}, {"labels": [1, 2, 3, 4]}, {"labels": [-1, 2, 3]}, {"labels": "1 2 3"},
            {"loss_mask": [0, 0, 0]}, {"loss_mask": [1, 1]}, {"loss_mask": [0, 1, 1e39]}, {"attention_mask": [0, 0, 0]},
            {"attention_mask": [1, 0, 1]}, {"attention_mask": [1, 2, 3]}, {"attention_mask": [1, 1]},
            {"position_ids": [0, 1, 0]}, {"position_ids": [1, 2, 3]}, {"position_ids": [0, 1]},
            {"labels": [1, 2, 3], "loss_mask": [1, 1, 0]}, {"labels": [1, 2, 3], "attention_mask": [1, 1, 0]},
            {"input_ids": [1] * 600, "labels": [-100] + [1] * 599, "loss_mask": [0, 0] + [1] * 598},
            {"input_ids": [1] * 600, "loss_mask": [0, 0] + [1] * 598},
        )):  # fmt: skip
            yield f"tokens {n}", ids | extra


def bad_lines(name):
    """{what is wrong: line} of one format; the lines differ."""
    rows = itertools.chain(wrong_fields(name), more(name))
    lines = {what: json.dumps(row).encode() for what, row in rows}
    lines |= dict(wrong_lines(GOOD[name]))
    other = next(other for other in GOOD if other != name)
    lines["another format"] = json.dumps(GOOD[other]).encode()
    return {what: line for line, what in {line: what for what, line in lines.items()}.items()}


@pytest.fixture(scope="module")
def counted():
    return {name: bad_lines(name) for name in FORMATS}


def test_there_are_more_than_500_kinds(counted):
    assert set(GOOD) == set(FIELDS) == set(FORMATS)
    assert sum(map(len, counted.values())) > 1000
    assert len({line for lines in counted.values() for line in lines.values()}) > 1000


@pytest.mark.parametrize("format", ["auto", "named"])
@pytest.mark.parametrize("name", FORMATS)
def test_each_bad_row_is_counted_and_named_and_good_rows_survive(tmp_path, counted, name, format):
    good, kinds = json.dumps(GOOD[name]).encode(), counted[name]
    lines, names = [], {}
    for what, line in kinds.items():
        lines += [good, line] if format == "named" or lines else [line, good]  # a bad row may come first
        names[len(lines) - (1 if lines[-1] is line else 2)] = what
    path, clean = tmp_path / "rows.jsonl", tmp_path / "clean.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    clean.write_bytes((good + b"\n") * (len(lines) - len(names)))
    found = load(path, format="auto" if format == "auto" else name)
    faults = {f.row: f for f in found.faults}
    assert {what: True for row, what in names.items() if row not in faults} == {}
    assert sorted(faults) == sorted(names)
    for row, fault in faults.items():
        assert fault.place == f"{path}:{row + 1}"
        assert fault.kind in dataset.REMEDIES
        assert fault.detail
        assert fault.detail.isprintable(), names[row]
        assert len(fault.detail) < 500
    untouched = load(clean, format=name)
    assert not untouched.faults
    assert [d.row for d in found.documents] == [row for row in range(len(lines)) if row not in names]
    assert found.fingerprint() == untouched.fingerprint()
    told = []
    kept = dataset.settle(found, Data(train="x", on_bad_row="skip"), tmp_path / "skipped.jsonl", told.append)
    assert len(kept) == len(lines) - len(names)
    assert [json.loads(line)["row"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == sorted(names)
    assert f"{len(names)} bad rows" in told[0]
    with pytest.raises(DataError, match=f"{len(names)} bad rows"):
        dataset.settle(found, Data(train="x"), None, print)


ODD = ["\x00", "a\x00b", "\x1b[31m", "\x7f\x85", "\u2028\u2029", "\ufeff", "\u202e", "\U0001f600", "\U0010ffff", "null",
       "</script><!--", "<|im_end", "im_end|>", "{{ 7*7 }}{% raise %}", "\r\n", "  x  ", "e\u0301", "ﬁ",
       "'\"\\"]  # fmt: skip


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_odd_texts_are_learnt_as_they_are(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x" + text}]})
    )
    found = load(path)
    assert not found.faults
    assert TOKENIZER.decode(found.documents[0].tokens) == (
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\nx{text}<|im_end|>"
    )


# ---------------------------------------------------------------------------- broken files

LINES = b"".join(json.dumps({"text": f"text {i}"}).encode() + b"\n" for i in range(40))
TABLE = pa.Table.from_pylist([{"text": f"text {i}", "more": {"n": i}} for i in range(40)])


def packed(name, folder):
    """A whole file of 40 rows."""
    path = folder / f"whole-{name}"
    if name.endswith(".zst"):
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(LINES)
    elif name.endswith(".parquet"):
        pq.write_table(TABLE, path, row_group_size=15)
    elif name.endswith((".arrow", ".feather")):
        made = pa.ipc.new_stream if "stream" in name else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, made(sink, TABLE.schema) as writer:
            writer.write_table(TABLE, max_chunksize=15)
    else:
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[path.suffix]
        path.write_bytes(pack(LINES))
    return path.read_bytes()


def outcome(path, **options):
    """(rows read, faults, error): nothing but a DataError may come, and it names the file."""
    rows, faults = 0, 0
    try:
        for row in sources.read(str(path), **options):
            rows += row.fault is None
            faults += row.fault is not None
    except DataError as error:
        told = str(error)
    else:
        return rows, faults, None
    assert str(path) in told
    return rows, faults, told


@pytest.mark.parametrize(
    "name",
    ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.txt.gz", "a.parquet", "a.arrow", "a.stream.arrow",
     "a.feather"],
)  # fmt: skip
def test_cut_and_damaged_files(tmp_path, name):
    whole = packed(name, tmp_path)
    path = tmp_path / name
    path.write_bytes(whole)
    assert outcome(path, sample_by="line") == (40, 0, None)
    silent = []
    for cut in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:cut])
        rows, faults, error = outcome(path, sample_by="line")
        if error is None and not faults and rows < 40:
            silent.append(cut)
    assert not silent
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        outcome(path, sample_by="line")  # a flipped byte of a text is a text; that nothing else comes is what is shown


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", b"a,a\n1,2\n", "the column 'a' is there twice"),
        ("a.csv", b"a,b,,\n1,2,3,4\n", "the column '' is there twice"),
        ("a.csv", b'text\n"abc\nd\n', r"a\.csv:3: unexpected end of data"),
        ("a.csv", b'text\n"a"b\n', r"a\.csv:2: .*quote"),
        ("a.csv", "text\nx\n".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("a.csv", b"te\xe4xt\nx\n", "header is not UTF-8"),
        ("a.csv", b"text\n", "no rows"),
        ("a.csv", b"", "no rows"),
        ("a.json", b"5", "expected a list of rows, found int"),
        ("a.json", b'"text"', "expected a list of rows, found str"),
        ("a.json", b"null", "expected a list of rows, found NoneType"),
        ("a.json", b"[]", "no rows"),
        ("a.json", b'{"text": "x"}', "found one object"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'[{"text": "\xe4"}]', "not UTF-8"),
        ("a.json", b"\xff\xfe[\0]\0", "UTF-16"),
        ("a.json", b"", "not JSON"),
        ("a.jsonl", b"\n \n", "no rows"),
        ("a.jsonl", "{}".encode("utf-32"), "UTF-32"),
        ("a.jsonl.gz", b"", "no rows"),
        ("a.jsonl.gz", b"{}", "cannot be read"),
        ("a.jsonl.xz", b"{}", "cannot be read"),
        ("a.jsonl.bz2", b"{}", "cannot be read"),
        ("a.jsonl.zst", b"{}{}{}{}", "cannot be read"),
        ("a.parquet", b"", "cannot be read"),
        ("a.parquet", b"PAR1" * 9, "cannot be read"),
        ("a.arrow", b"", "cannot be read"),
        ("a.arrow", b"ARROW1" * 9, "cannot be read"),
        ("a.arrow", b"{}{}{}{}{}{}", "cannot be read"),
        ("a.feather", b"FEA1" * 9, "first version of Feather"),
        ("a.txt", b"", None),
        ("a.exe", b"MZ", "unknown kind of file"),
    ],
)
def test_broken_files_say_what_is_wrong_with_them(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    rows, faults, error = outcome(tmp_path / name)
    if told is None:
        assert (rows, faults, error) == (1, 0, None)
        assert load_faults(tmp_path / name) == ["empty_answer"]
    else:
        assert re.search(told, error)


def load_faults(path, **data):
    return [f.kind for f in load(path, **data).faults]


def test_wrong_rows_of_a_table_of_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\nq,a\nq\nq,a,b\n"q,",""\nq,"x\ny"\n\nq,\xe4\n"q""",a\nq,<|im_end|>\nq,5\n')
    found = load(path)
    assert [(f.row, f.place.rpartition(":")[2]) for f in found.faults] == [
        (1, "3"), (2, "4"), (3, "5"), (5, "9"), (7, "11")
    ]  # fmt: skip
    answers = [c.messages[1]["content"] for c in found.conversations]
    assert answers == ["a", "x\ny", "a", "5"]
    assert found.conversations[2].messages[0]["content"] == 'q"'


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize(
    ("column", "bad"),
    [
        (pa.array([1, 2, 3]), 3), (pa.array([1.5, None, 2.5]), 3), (pa.array([True, None, False]), 3),
        (pa.array([b"x", b"\xff", None]), 3), (pa.array(["good", None, "fine"]), 1), (pa.nulls(3), 3),
        (pa.array([["a"], [], None]), 3), (pa.array([{"a": 1}, None, {"a": 2}]), 3),
        (pa.array(["a", "b", "a"]).dictionary_encode(), 0), (pa.array(["a", "b", "c"], pa.large_string()), 0),
        (pa.array([1 << 50, 5, 6], pa.timestamp("s")), 3),
        (pa.array([[("k", "v")], [], None], pa.map_(pa.string(), pa.string())), 3),
    ],
)  # fmt: skip
def test_columns_of_any_type(tmp_path, name, column, bad):
    table = pa.table({"text": column})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        pyarrow.feather.write_feather(table, str(tmp_path / name))
    found = load(tmp_path / name)
    assert (len(found.faults), len(found)) == (bad, 3 - bad)


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pyarrow.feather.write_feather(table, str(tmp_path / "a.arrow"))
    assert "the column 'text' is there twice" in outcome(tmp_path / "a.arrow")[2]


# ---------------------------------------------------------------------------- anything

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(codec=None), max_size=20),
    st.sampled_from(["user", "assistant", "<|im_end|>", "\ud800", "[]", "{}", '{"name": "x"}', "human", "gpt",
                     10**400]),
)  # fmt: skip
KEYS = sorted({
    "role", "content", "from", "value", "weight", "train", "loss", "tool_calls", "function", "name", "arguments",
    "type",
    "text", "id", "reasoning_content", *(key for form in FORMATS.values() for key in (*form.keys, *form.more)),
})  # fmt: skip
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=12,
)
RENDERER = Renderer(TOKENIZER, "all", 64)


@given(st.sampled_from(list(FORMATS.values())), st.data())
@hypothesis_settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_value_of_any_field_is_learnt_or_named(form, data):
    values = {key: data.draw(ANYTHING) for key in form.keys}
    values |= data.draw(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=3))
    try:
        rendered = RENDERER.render(converted(sources.Row(0, values, "x:1"), form, {}))
        (found,) = RENDERER.documents([(0, rendered)])
    except BadRow as fault:
        found = fault
    if isinstance(found, BadRow):
        assert found.kind in dataset.REMEDIES
        assert found.detail.isprintable()
        found.detail.encode()
    else:
        assert all(len(d.tokens) <= 64 and d.weights[0] == 0 and d.weights.any() for d in found)


@given(
    st.binary(max_size=200),
    st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.arrow", "a.parquet", "a.gz.x"]),
)
@hypothesis_settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_bytes_under_any_name(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        found = load(path)
    except DataError as error:
        told = str(error)
    else:
        told = str(path)
        assert len(found) + len(found.faults) > 0
    assert str(path) in told


def test_the_command_line_shows_bad_rows_without_a_traceback(tmp_path, tiny_model, capsys, counted):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD["prompt_completion"]).encode()
    path.write_bytes(b"\n".join([good, *counted["prompt_completion"].values()]) + b"\n")
    assert main(["data", "inspect", str(path), "--model", str(tiny_model)]) == 0
    assert f"{len(counted['prompt_completion'])} bad rows" in capsys.readouterr().out
    assert main(["data", "inspect", str(path), "--model", str(tiny_model), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert sum(shown["bad_rows"].values()) == len(counted["prompt_completion"])
