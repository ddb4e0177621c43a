"""Forms of answers: whatever a model would say, what comes out parses and is valid, and what is valid can be said."""

import json
import math
import random
import re
import time

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from luthier.serve.grammar import (
    Guide,
    Machines,
    Triggered,
    Unsupported,
    Vocabulary,
    json_object,
    numbers,
    of_schema,
    patterns,
    strings,
)
from luthier.serve.grammar.expressions import Choice, Grammar, Literal, Repeat, Rule, Sequence
from luthier.serve.grammar.guide import Masks
from luthier.serve.grammar.machine import Machine
from luthier.serve.tools import Sifted, Style, grammar, read, style_of

WORDS = [
    b'"name"', b'":', b'": "', b'", "', b'"}', b"}}", b"[[", b'{"', b"true", b"null", b"12", b"hello", b" world", b"\n",
    b"\n  ", b"},", b"],", "é".encode(), "漢字".encode(), b"\\n", b".5", b"e1", b"0.", b"    ", b"-", b"\\u00", b'""',
    "é".encode()[:1] + b"", "漢".encode()[1:], b"<tool_call>", b'>{"', b"</tool_call>",
]  # fmt: skip
STOP = 256
VOCABULARY = Vocabulary.of_texts([*(bytes([b]) for b in range(256)), None, *WORDS])


def spoken(grammar, most, rng, stops=0.3):
    """What a model that takes any allowed token says."""
    masks = Masks(grammar, VOCABULARY, [STOP])
    guide, answer = Guide(masks, most), []
    while len(answer) < most:
        ids = guide(answer).nonzero()[:, 0].tolist()
        assert ids, b"".join(VOCABULARY.texts[t] for t in answer)
        token = STOP if STOP in ids and (ids == [STOP] or rng.random() < stops) else rng.choice(ids)
        if token == STOP:
            break
        answer.append(token)
    assert guide.complete(answer)
    return b"".join(VOCABULARY.texts[t] for t in answer).decode()


SCHEMAS = [
    {"type": "object", "properties": {
        "name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": -3, "maximum": 150},
        "tags": {
            "type": "array", "items": {"enum": ["a", "b\"\\\n", 3, None, {"x": [1]}]}, "minItems": 1, "maxItems": 3,
        },
    }, "required": ["name", "age"], "additionalProperties": False},
    {"$ref": "#/$defs/node", "$defs": {"node": {
        "type": "object", "properties": {
            "value": {"type": "number", "minimum": 0.25, "exclusiveMaximum": 1},
            "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
        }, "required": ["value", "next"], "additionalProperties": False,
    }}},
    {"type": "string", "pattern": "^a[bc]{2,4}\\d+(x|yz)?$"},
    {"type": "string", "pattern": "[\\w\"]{3}"},
    {"type": "string", "pattern": "^[^a-z\\s]+$|^\\S$"},
    {"type": "integer", "multipleOf": 7, "minimum": 20},
    {"type": "number", "multipleOf": 3, "exclusiveMaximum": 0},
    {"type": "object", "additionalProperties": {"type": "integer"}, "properties": {"a": {"type": "string"}}},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    {"type": ["string", "null"], "minLength": 2},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "boolean"}], "items": False, "minItems": 1},
    {"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}, "minItems": 2, "maxItems": 4},
    {"oneOf": [
        {"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]},
        {"type": "object", "properties": {"k": {"const": "b"}, "z": {"type": "array"}}, "required": ["k"]},
    ]},
    {"type": "number", "minimum": -1.5, "maximum": 2},
    {"type": "number", "exclusiveMinimum": 0},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}, "required": ["a"]},
               {"properties": {"b": {"type": "null"}, "a": {"maximum": 3}}, "required": ["b"]}]},
    {"anyOf": [{"minimum": 3}, {"maximum": -3}], "type": "integer"},
    {"enum": [1, 2.5, "x"], "type": "number"},
    {"type": "object", "required": ["odd key\n"], "properties": {"q": True}},
    True,
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_what_is_said_is_valid(number):
    schema = SCHEMAS[number]
    rng = random.Random(number)
    for most in (60, 60, 60, 120, 120, 240):
        jsonschema.validate(json.loads(spoken(of_schema(schema), most, rng)), schema)


def test_an_object_of_no_schema_parses():
    rng = random.Random(1)
    for most in (2, 3, 7, 40, 40, 40, 300):
        assert isinstance(json.loads(spoken(json_object(), most, rng)), dict)


FORMATS = ["date", "time", "date-time", "uuid", "email", "ipv4", "ipv6", "hostname", "duration"]


@pytest.mark.parametrize("form", FORMATS)
def test_formats_are_those_of_the_checker(form):
    schema, rng = {"type": "string", "format": form}, random.Random(2)
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    for _ in range(10):
        text = json.loads(spoken(of_schema(schema), 120, rng))
        if form in checker.checkers:
            jsonschema.validate(text, schema, format_checker=checker)
        if form == "date-time":
            import datetime

            datetime.datetime.fromisoformat(text)


VALID = [
    ({"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"]},
     [{"a": 1}, {"a": -20, "b": [1, {"x": None}, "é\n"]}], [{}, {"a": 1.5}, {"b": 1}, {"a": "1"}]),
    ({"type": "array", "items": {"type": "number", "minimum": 2, "maximum": 10.5}, "maxItems": 2},
     [[], [2, 10.5], [3.25]], [[1], [11], [10.51], [2, 2, 2]]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "äöü", "\"\\\n", "😀😀"], ["a", "abcd", 1]),
    ({"const": {"a": [1, 2]}}, [{"a": [1, 2]}], [{"a": [1]}]),
    ({"type": "integer", "minimum": -12, "exclusiveMaximum": 105}, [-12, 0, 7, 104], [-13, 105, 1000]),
    ({"type": "string", "pattern": "^\\d{3}-[A-Z]+$"}, ["123-AB"], ["12-AB", "123-", "x123-AB"]),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(VALID)))
def test_what_is_valid_can_be_said(number):
    schema, good, bad = VALID[number]
    machine = Machine(of_schema(schema))
    for value in good:
        jsonschema.validate(value, schema)
        assert machine.matches(json.dumps(value, ensure_ascii=False).encode()), value
    for value in bad:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(value, schema)
        assert not machine.matches(json.dumps(value, ensure_ascii=False).encode()), value


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "object", "patternProperties": {"a": {}}}, "patternProperties"),
        ({"not": {"type": "string"}}, "'not'"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "text"}, "type"),
        ({"type": "object", "properties": {"a": {"if": {}}}}, r"schema\.properties\.a: 'if'"),
        ({"$ref": "https://example.org/x"}, "leads out"),
        ({"$ref": "#/$defs/gone"}, "not there"),
        ({"$ref": "#"}, "without end|itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}},
                                               "required": ["a"]}}}, "without end"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"type": "string", "pattern": "(?=a)"}, "look-ahead"),
        ({"type": "string", "pattern": "a**"}, None),
        ({"type": "string", "pattern": "(a"}, "not closed"),
        ({"type": "string", "pattern": "\\1"}, "supported"),
        ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength is more"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "no number"),
        ({"type": "integer", "multipleOf": 0.5}, "multipleOf"),
        ({"type": "string", "minimum": 3}, "minimum"),
        ({"enum": []}, "enum"),
        ({"enum": ["a"], "type": "integer"}, "no value"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "required"),
        (False, "nothing"),
        ([], "no schema"),
        ({"type": "object", "properties": []}, "properties"),
        ({"type": "array", "minItems": -1}, "minItems"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_to_is_refused_by_name(schema, told):
    if told is None:
        of_schema(schema)  # counted twice is the same as once
        return
    with pytest.raises(Unsupported, match=told):
        of_schema(schema)


def test_a_deep_schema_is_refused():
    schema: dict = {}
    for _ in range(500):
        schema = {"type": "array", "items": schema or {"type": "null"}}
    with pytest.raises(Unsupported, match="deep"):
        of_schema(schema)


def test_nesting_has_an_end():
    """A model that only ever opens brackets is made to close them: JSON that Python can read."""
    masks = Masks(of_schema({"type": "array"}), VOCABULARY, [STOP])
    guide, answer = Guide(masks, 2000), []
    opening = [VOCABULARY.texts.index(b"[["), ord("["), ord("{"), ord('"'), ord(":")]
    while len(answer) < 2000:
        allowed = guide(answer)
        token = next((t for t in opening if allowed[t]), None)
        token = int(allowed.nonzero()[0, 0]) if token is None else token
        if token == STOP:
            break
        answer.append(token)
    assert guide.complete(answer)
    json.loads(b"".join(VOCABULARY.texts[t] for t in answer))


def test_a_budget_that_is_too_small_is_refused():
    masks = Masks(of_schema({"const": "abcdef"}), VOCABULARY, [STOP])
    with pytest.raises(Unsupported, match="8 bytes, and max_tokens is 7"):
        Guide(masks, 7)
    assert Guide(masks, 8)([]).any()


def test_utf8_of_ranges():
    rng = random.Random(3)
    for _ in range(40):
        first = rng.choice([0, 0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0x10000, rng.randrange(0x110000)])
        last = min(first + rng.choice([0, 1, 63, 64, 5000, 70000]), 0x10FFFF)
        of = strings.ranges([(first, last)])
        if not of:
            continue
        nodes = [node for a, b in of for node in strings.utf8(a, b)]
        machine = Machine(Grammar(Choice(nodes)))
        drawn = {rng.randrange(0x110000) for _ in range(20)}
        for code in {first, last, first - 1, last + 1, (first + last) // 2} | drawn:
            if 0 <= code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF:
                assert machine.matches(chr(code).encode()) == (first <= code <= last), (first, last, code)


@examples(max_examples=60, deadline=None)
@given(st.integers(-2000, 2000), st.integers(0, 3000), st.sampled_from([1, 2, 7, 30]))
def test_whole_numbers_between_bounds(low, width, multiple):
    try:
        machine = Machine(Grammar(numbers.integer(low, low + width, multiple)))
    except Unsupported:
        assert not [n for n in range(low, low + width + 1) if n % multiple == 0]
        return
    for n in {*range(low - 12, low + 12), *range(low + width - 12, low + width + 12), 0, -1, 1, 10, 100, 1000}:
        assert machine.matches(str(n).encode()) == (low <= n <= low + width and n % multiple == 0), n
    assert not machine.matches(b"007")
    assert not machine.matches(b"-0")


PATTERNS = ["^ab?c*$", "a{2,3}", "^(foo|ba[rz])+$", "[a-c]x|^z", "^[^a]b.$", "\\d\\D", "^\\w+\\W\\s$", "", "^$",
            "a\\.b", "^(?:a|)b$"]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_those_of_the_checker(pattern):
    machine = Machine(Grammar(patterns.inside_string(pattern)))
    rng = random.Random(4)
    said = [json.loads(spoken(Grammar(patterns.inside_string(pattern)), 30, rng)) for _ in range(10)]
    assert all(re.search(pattern, text) for text in said)
    for one in range(400):
        text = "".join(rng.choice("abcxz01. _foobr\n") for _ in range(rng.randrange(6)))
        text = text if one % 2 else said[one % 10][: rng.randrange(5)] + text
        found, expected = machine.matches(json.dumps(text, ensure_ascii=False).encode()), re.search(pattern, text)
        if found or (text.isascii() and not text.endswith("\n")):
            # Of classes of other characters no two checkers say the same, and `$` of Python is also before a last \n.
            assert found == (expected is not None), text


def test_other_keys_are_no_other_spelling_of_one():
    machine = Machine(Grammar(strings.other_key(["a", "ab", "ü"])))
    for key, free in (("a", False), ("ab", False), ("ü", False), ("", True), ("abc", True), ("b", True), ("ü2", True)):
        assert machine.matches(json.dumps(key, ensure_ascii=False).encode()) == free, key
    assert not machine.matches(b'"\\u0061"')


def test_repetitions_and_rules_by_hand():
    rule = Rule("nested")
    rule.body = Choice((Sequence((Literal(b"("), rule, Literal(b")"))), Literal(b"x")))
    machine = Machine(Grammar(Sequence((rule, Repeat(Literal(b"ab"), 2, 3)))))
    for text, good in (("xabab", 1), ("((x))ababab", 1), ("xab", 0), ("(xabab", 0), ("xabababab", 0), ("x", 0)):
        assert machine.matches(text.encode()) == bool(good), text


def test_tokens_of_a_real_kind_of_tokenizer():
    from conftest import make_tokenizer
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = make_tokenizer()
    found = Vocabulary.of(tokenizer, 320)
    assert len(found) == 320
    for text in ("é ", "\n", "a"):
        ids = tokenizer(text)["input_ids"]
        assert b"".join(found.texts[i] for i in ids) == text.encode()
    assert found.texts[tokenizer.convert_tokens_to_ids("<|im_end|>")] is None

    vocabulary = {"<unk>": 0, "▁a": 1, "b": 2, "<0x0A>": 3, "▁": 4}
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>"])
    pieces = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    assert Vocabulary.of(pieces).texts == [None, b" a", b"b", b"\n", b" "]

    words = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(Unsupported, match="tokenizer of bytes"):
        Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=words))


def test_masks_are_found_once():
    """The second answer of a form costs a look-up for each token."""
    masks = Masks(json_object(), VOCABULARY, [STOP])
    text = [ord(c) for c in json.dumps({"name": "x" * 20, "list": [1, {"a": None}]})]
    times = []
    for _ in range(2):
        guide, started = Guide(masks, 1000), time.perf_counter()
        for i in range(len(text)):
            assert guide(text[:i])[text[i]]
        times.append(time.perf_counter() - started)
    assert len(masks._made) < len(text)
    assert torch.equal(guide(text), Guide(masks, 1000)(text))
    states = len(masks.machine)
    Guide(masks, 1000)(text)
    assert len(masks.machine) == states


def test_machines_are_kept_by_what_they_are_made_of():
    machines, made = Machines(lambda: VOCABULARY), []

    def make():
        made.append(1)
        return json_object()

    assert machines.get("a", make, [1]) is machines.get("a", make, [1])
    assert machines.get("a", make, [2]) is not machines.get("b", make, [2])
    assert len(made) == 3


# ---------------------------------------------------------------------------- calls of tools

HERMES = Style("hermes", "<tool_call>", end="</tool_call>")
LLAMA = Style("llama", "")
MISTRAL = Style("mistral", "[TOOL_CALLS]", STOP + 1)
ARGS = Style("mistral_args", "[TOOL_CALLS]")
CITY = {"city": {"type": "string", "maxLength": 6}}
WEATHER = ("weather", {"type": "object", "properties": CITY, "required": ["city"]})
TOOLS = [WEATHER, ("now", None)]


@pytest.mark.parametrize(
    ("style", "text", "content", "calls"),
    [
        (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>', "",
         [("weather", {"city": "Köln"})]),
        (HERMES, 'Sure. <tool_call>{"name": "a", "arguments": {}}</tool_call>'
                 '<tool_call>{"name": "b", "arguments": "{}"}',
         "Sure.", [("a", {}), ("b", {})]),
        (HERMES, "<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
        (HERMES, "plain", "plain", []),
        (LLAMA, '{"name": "weather", "parameters": {"city": "x"}}', "", [("weather", {"city": "x"})]),
        (LLAMA, '<|python_tag|>{"name": "a", "parameters": {}}; {"name": "b", "parameters": {"z": 1}}', "",
         [("a", {}), ("b", {"z": 1})]),
        (LLAMA, '{"name": 3}', '{"name": 3}', []),
        (LLAMA, "Hello {", "Hello {", []),
        (MISTRAL, '[TOOL_CALLS] [{"name": "a", "arguments": {"x": 1}, "id": "abc"}]', "", [("a", {"x": 1})]),
        (ARGS, 'Well[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b[CALL_ID]123[ARGS]{}', "Well",
         [("a", {"x": 1}), ("b", {})]),
        (ARGS, "[TOOL_CALLS]a[ARGS]{", "[TOOL_CALLS]a[ARGS]{", []),
        (HERMES, "<tool_call>" + "[" * 100_000, "<tool_call>" + "[" * 100_000, []),
    ],
)  # fmt: skip
def test_calls_are_read(style, text, content, calls):
    for pieces in ([text], list(text) if len(text) < 1000 else [text]):
        sifted = Sifted(style)
        shown = "".join(map(sifted.add, pieces))
        rest, found = sifted.end()
        assert [(call.name, json.loads(call.arguments)) for call in found] == calls
        assert (shown + rest).strip() == content
        assert len({call.id for call in found}) == len(found)
    assert [call.name for call in read(text, style)[1]] == [name for name, _ in calls]


@pytest.mark.parametrize("style", [HERMES, LLAMA, Style("mistral", "[TOOL_CALLS]"), ARGS])
def test_forced_calls_are_valid(style):
    rng, schemas = random.Random(5), dict(TOOLS)
    for parallel in (False, True):
        for _ in range(8):
            rest, calls = read(spoken(grammar(style, TOOLS, parallel), 200, rng, stops=0.5), style)
            assert calls
            assert not rest.strip()
            assert parallel or len(calls) == 1
            for call in calls:
                jsonschema.validate(json.loads(call.arguments), schemas[call.name] or {"maxProperties": 0})


def test_a_mark_that_is_a_token_is_the_only_thing_that_may_come_first():
    vocabulary = Vocabulary.of_texts([*VOCABULARY.texts[:256], None, None])
    masks = Masks(grammar(MISTRAL, TOOLS, False), vocabulary, [STOP])
    guide = Guide(masks, 200)
    assert guide([]).nonzero()[:, 0].tolist() == [STOP + 1]
    assert set(guide([STOP + 1]).nonzero()[:, 0].tolist()) == {ord(" "), ord("[")}


def test_a_call_that_the_model_begins_is_held_to_its_form():
    from luthier.serve.tools import inner

    masks = Masks(Grammar(inner(HERMES, TOOLS)), VOCABULARY, [])
    rng = random.Random(6)
    for mark in ([VOCABULARY.texts.index(b"<tool_call>")], list(b"<tool_call"), list(b"say <tool_call>")):
        triggered, answer = Triggered(masks, b"<tool_call>", None, 300), list(b"free ")
        if mark[-1] == ord("l") and len(mark) > 1:
            mark = [*mark, VOCABULARY.texts.index(b'>{"')]  # a token that is more than the mark
        for token in mark:
            assert triggered(answer) is None
            answer.append(token)
        while (allowed := triggered(answer)) is not None and len(answer) < 300:
            answer.append(rng.choice(allowed.nonzero()[:, 0].tolist()))
        text = b"".join(VOCABULARY.texts[t] for t in answer).decode()
        assert len(read(text, HERMES)[1]) == 1, text
        assert triggered([*answer, ord("x")]) is None


def test_the_style_is_told_from_the_template():
    class Tokenizer:
        added_tokens_decoder: dict = {}

        def __init__(self, template):
            self.chat_template = template

    for template, kind in (
        ("{{ tools }}<tool_call>", "hermes"), ("{{ tools }}[TOOL_CALLS]", "mistral"), ("no", None), (None, None),
        ("{{ tools }}[TOOL_CALLS][ARGS]", "mistral_args"), ("{{ tools }}<|python_tag|>", "llama"),
        ("{{ tools }}", None),
    ):  # fmt: skip
        found = style_of(Tokenizer(template))
        assert (found.kind if found else None) == kind
    assert math.isinf(Grammar(Literal(b"a")).shortest(Choice(())))
