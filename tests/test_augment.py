"""Noise and synonyms: rates, what stays, spans and tags, parents, duplicates, held-out rows, kills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given as given_by
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from luthier import configure, train
from luthier.cli import main
from luthier.data import sources
from luthier.errors import CheckpointError, ConfigError, DataError
from luthier.monitor import Console
from luthier.prepare import pieces
from luthier.prepare.augment.characters import LAYOUTS, MISREAD, Characters, neighbours
from luthier.prepare.augment.noise import Edit, edited, moved
from luthier.prepare.augment.recipe import augmentation
from luthier.prepare.augment.synonyms import Synonyms
from luthier.prepare.augment.way import Draw, Given, Refused
from luthier.prepare.augment.words import Words
from luthier.prepare.augment.writing import augment
from luthier.prepare.views import view

WORDS = (
    "stone",
    "river",
    "lantern",
    "garden",
    "window",
    "yellow",
    "silver",
    "winter",
    "market",
    "bridge",
    "thunder",
    "pocket",
    "candle",
    "meadow",
    "harbour",
)


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [row.values for row in sources.read(str(path))]


def long_text(words: int, seed: int = 0) -> str:
    draw = Draw("text", seed)
    return " ".join(draw.one(WORDS) for _ in range(words))


def labelled(count: int) -> list[dict]:
    return [{"text": f"{long_text(12, n)} {n}", "label": ["good", "bad"][n % 2]} for n in range(count)]


def changed(way, values: dict, *names, columns=None) -> dict:
    columns = columns or {}
    seen = view({**values, **{known: values[name] for known, name in columns.items()}})
    return way.prepared().changed(Given(values, seen, columns), Draw(*(names or (0,))))


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=0, max_size=80)
ways = st.sampled_from(
    [
        Characters(rate=0.3),
        Characters(rate=1.0),
        Words(rate=0.5),
        Words(rate=1.0, kinds=["delete"]),
        Words(kinds=["swap"]),
    ]
)


# ---------------------------------------------------------------------------- what stays


@hypothesis_settings(deadline=None, max_examples=150)
@given_by(texts, texts, texts, ways, st.integers(0, 9))
def test_only_the_users_side_changes(user, answer, system, way, seed):
    row = {
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": user},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": user[::-1]},
        ],
        "tools": [],
        "id": 7,
    }
    try:
        new = changed(way, row, seed)
    except Refused:
        return
    assert [new["messages"][i] for i in (0, 2)] == [row["messages"][i] for i in (0, 2)]
    assert (new["tools"], new["id"], [m["role"] for m in new["messages"]]) == (
        [],
        7,
        ["system", "user", "assistant", "user"],
    )
    assert row["messages"][1]["content"] == user  # what is given is not changed in place


@pytest.mark.parametrize("way", [Characters(rate=0.5), Words(rate=0.5)])
def test_both_answers_of_a_pair_stay(way):
    row = {"prompt": long_text(20), "chosen": "it is a fence", "rejected": "it is no fence", "margin": 2.0}
    new = changed(way, row)
    assert new["prompt"] != row["prompt"]
    assert {k: v for k, v in new.items() if k != "prompt"} == {k: v for k, v in row.items() if k != "prompt"}


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"text": "all of this is learnt"}, "all of it is learnt"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "all of it is learnt"),
        ({"review": "fine", "stars": 5}, "no known format"),
        ({"prompt": "", "completion": "x"}, "no user's side"),
        ({"text": "2 + 2", "label": 4}, "nothing in it may be changed"),
        ({"text": "a fine day", "label": 1, "answers": {"answer_start": [2]}}, "a form that is not known"),
        ({"tokens": ["to", "New York"], "ner_tags": ["O", "B-LOC"]}, "blanks in them"),
    ],
)
def test_rows_that_are_refused_say_why(values, why):
    with pytest.raises(Refused, match=why):
        changed(Characters(rate=0.5), values)


def test_numbers_negations_markup_and_words_of_the_answer_stay():
    text = (
        "Do not move 24 yellow boxes from https://a.example/yellow to {place}, as `boxes` can't be stacked in kitchen"
    )
    row = {"prompt": text, "completion": "Kitchen: boxes"}
    for seed in range(40):
        for way in (Characters(rate=1.0), Words(rate=1.0, kinds=["delete"]), Words(rate=1.0, kinds=["repeat"])):
            new = changed(way, row, seed)["prompt"].split()
            for kept in ("not", "24", "boxes", "https://a.example/yellow", "{place},", "`boxes`", "can't", "kitchen"):
                assert Counter(new)[kept] == Counter(text.split())[kept], (kept, new)
    free = changed(Words(rate=1.0, kinds=["delete"], protect=[]), row, 1)["prompt"].split()
    assert len(free) == 1  # all may go, and one word stays


def test_renamed_columns_are_changed_under_their_own_names():
    row = {"review": long_text(12), "stars": "5", "text": "not this one"}
    new = changed(Characters(rate=0.4), row, columns={"text": "review", "label": "stars"})
    assert new["review"] != row["review"]
    assert (new["stars"], new["text"], list(new)) == ("5", "not this one", ["review", "stars", "text"])


# ---------------------------------------------------------------------------- rates


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("kind", ["keyboard", "drop", "ocr", "case"])
def test_so_many_letters_change_as_asked(kind, rate):
    text = long_text(4000)
    may = sum(c.isalpha() and (kind != "ocr" or c in MISREAD) for c in text)
    edits = _edits(Characters(rate=rate, kinds=[kind]), text)
    assert abs(len(edits) - rate * may) < 5 * (may * rate * (1 - rate)) ** 0.5
    for edit in edits[:500]:
        letter, new = text[edit.start], edit.text
        expected = {
            "keyboard": new in neighbours("qwerty")[letter] if new else False,
            "drop": new == "",
            "ocr": new in MISREAD.get(letter, ()),
            "case": new == letter.upper(),
        }
        assert edit.stop == edit.start + 1
        assert expected[kind]


def test_swaps_are_of_neighbours_in_a_word():
    text = long_text(3000)
    edits = _edits(Characters(rate=0.05, kinds=["swap"]), text)
    assert all(text[e.start : e.stop] == e.text[::-1] and " " not in e.text and len(set(e.text)) == 2 for e in edits)
    assert 0.03 < len(edits) / sum(map(str.isalpha, text)) < 0.05  # a word's last letter has none to swap with


def _edits(way, text):
    import re

    words = list(re.finditer(r"\S+", text))
    return way.edits(text, [True] * len(words), words, Draw(3), False)


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_so_many_words_change_as_asked(rate):
    count = 8000
    found = Counter(c.kind for c in Words(rate=rate, kinds=["delete", "repeat"]).changes([True] * count, Draw(1)))
    assert abs(sum(found.values()) - rate * count) < 5 * (count * rate * (1 - rate)) ** 0.5
    assert abs(found["delete"] - found["repeat"]) < 5 * sum(found.values()) ** 0.5


def test_the_least_rate_changes_something_in_every_row():
    for seed in range(50):
        assert changed(Characters(rate=1e-9), {"text": "a small text", "label": 0}, seed)["text"] != "a small text"
        assert changed(Words(rate=1e-9, kinds=["delete"]), {"text": "a small text", "label": 0}, seed)["text"] in (
            "small text",
            "a text",
            "a small",
        )


def test_keys_that_are_neighbours():
    assert set(neighbours("qwerty")["s"]) == set("awedzx")
    assert set(neighbours("qwerty")["q"]) == set("wa")
    for layout in LAYOUTS:
        near = neighbours(layout)
        assert all(a in near[b] for a in near for b in near[a])


# ---------------------------------------------------------------------------- places and tags


def test_where_a_stretch_is_after_edits():
    text = "we flew to New York today"
    cases = [
        ([Edit(0, 3, "")], "New York"),
        ([Edit(11, 15, "")], "York"),
        ([Edit(12, 13, "")], "Nw York"),
        ([Edit(8, 10, "into"), Edit(18, 19, "kk"), Edit(20, 25, "now")], "New Yorkk"),
        ([Edit(19, 19, " York")], "New York"),
        ([Edit(10, 12, "n")], "new York"),
        ([Edit(17, 21, "")], "New Yo"),
    ]
    for edits, expected in cases:
        first, last = moved(edits, 11, 19)
        assert edited(text, edits)[first:last].strip() == expected


@hypothesis_settings(deadline=None, max_examples=200)
@given_by(st.data())
def test_stretches_stay_on_their_words(data):
    words = data.draw(st.lists(st.sampled_from(WORDS), min_size=3, max_size=12))
    text = " ".join(words)
    which = data.draw(st.integers(0, len(words) - 1))
    start = len(" ".join(words[:which])) + (which > 0)
    stop = start + len(words[which])
    way = data.draw(st.sampled_from([Words(rate=0.6), Characters(rate=0.1, kinds=["case"])]))
    row = {"text": text, "label": [[start, stop, "THING"]], "id": 1}
    new = changed(way, row, data.draw(st.integers(0, 99)))
    ((first, last, name),) = new["label"]
    assert (new["text"][first:last].lower(), name) == (words[which], "THING")
    entity = {"text": text, "label": 0, "entities": [{"start": start, "end": stop, "text": words[which], "label": "X"}]}
    (found,) = changed(way, entity, 5)["entities"]
    assert found["text"].lower() == words[which]


def test_tags_go_with_their_words():
    words = ["Anna", "flew", "from", "New", "York", "to", "Rome", "on", "a", "cold", "winter", "day"]
    tags = ["B-PER", "O", "O", "B-LOC", "I-LOC", "O", "B-LOC", "O", "O", "O", "O", "O"]
    own = dict(zip(words, tags))
    entities = [(w, t) for w, t in zip(words, tags) if t != "O"]
    for seed in range(60):
        new = changed(Words(rate=0.5), {"tokens": words, "ner_tags": tags}, seed)
        assert [own[word] for word in new["tokens"]] == new["ner_tags"]
        assert [(w, t) for w, t in zip(new["tokens"], new["ner_tags"]) if t != "O"] == entities
        noised = changed(Characters(rate=0.3), {"tokens": words, "ner_tags": tags}, seed)
        assert noised["ner_tags"] == tags
        assert len(noised["tokens"]) == len(words)
        assert all(noised["tokens"])
    with pytest.raises(Refused, match="its tags are numbers"):
        changed(Words(), {"tokens": words, "ner_tags": [0] * len(words)})
    assert len(changed(Characters(rate=0.3), {"tokens": words, "ner_tags": [0] * len(words)})["ner_tags"]) == len(words)


# ---------------------------------------------------------------------------- synonyms


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s.yaml", "big: [large, huge]\ncar: automobile\n"),
        ("s.json", '{"big": ["large", "huge"], "car": ["automobile"]}'),
        ("s.tsv", "big\tlarge\thuge\ncar\tautomobile\n"),
        ("s.csv", 'big,large,huge\n"car",automobile\n'),
    ],
)
def test_synonyms_of_a_table(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    way = Synonyms(rate=1.0, table=str(tmp_path / name))
    found = {changed(way, {"text": "Big cars, one BIG car.", "label": 1}, seed)["text"] for seed in range(30)}
    assert found == {f"{a} cars, one {b} automobile." for a in ("Large", "Huge") for b in ("LARGE", "HUGE")}
    assert way.told()["read"] == sha256(content.encode()).hexdigest()


def test_a_synonym_of_several_words_has_no_tag(tmp_path):
    (tmp_path / "s.json").write_text('{"fast": ["at speed", "quick"]}')
    way = Synonyms(rate=1.0, table=str(tmp_path / "s.json"))
    made = [
        changed(way, {"tokens": ["a", "fast", "car"], "tags": ["O", "O", "O"]}, seed)["tokens"] for seed in range(20)
    ]
    assert made == [["a", "quick", "car"]] * 20


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("s.yaml", "big: [1]\n", "expected one word and its synonyms"),
        ("s.json", "[1]", "expected words with lists"),
        ("s.json", "{", "Expecting"),
        ("s.tsv", "two words\tlarge\n", "'two words'"),
        ("s.tsv", "", "empty"),
        ("s.xml", "", "known are"),
    ],
)
def test_tables_that_are_none(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=problem):
        augmentation({"ways": {"synonyms": {"table": str(tmp_path / name)}}})


def test_wordnet_is_not_downloaded(monkeypatch):
    nltk = pytest.importorskip("nltk")
    from luthier.prepare.augment import synonyms

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", None)
    synonyms.wordnet.cache_clear()
    with pytest.raises(ConfigError, match="not downloaded by itself"):
        augmentation({"ways": ["synonyms"]})


def test_words_of_wordnet_in_their_plain_form(monkeypatch):
    from luthier.prepare.augment import synonyms

    class Sense:
        def __init__(self, *names):
            self.lemma_names = lambda: names

    class Net:
        def synsets(self, word):
            return [Sense("car", "auto", "motor_car"), Sense("railcar", "car")] if word.startswith("car") else []

    monkeypatch.setattr(synonyms, "wordnet", Net)
    synonyms.of_wordnet.cache_clear()
    assert synonyms.of_wordnet("car", 1) == ("auto", "motor car")
    assert synonyms.of_wordnet("car", 2) == ("auto", "motor car", "railcar")
    assert synonyms.of_wordnet("cars", 2) == ()
    synonyms.of_wordnet.cache_clear()


# ---------------------------------------------------------------------------- from file to file

RECIPE = {"ways": {"characters": {"copies": 2}, "words": {"share": 0.5}}}


def test_new_rows_stand_behind_their_parents_and_name_them(tmp_path):
    source = write(tmp_path / "in.jsonl", labelled(60))
    done = augment(str(source), tmp_path / "out.jsonl", augmentation(RECIPE, "seed=7"), workers=1)
    rows, lines = read(tmp_path / "out.jsonl"), source.read_text().splitlines()
    given = [row for row in rows if "_parent" not in row]
    assert given == labelled(60)
    last, counts = None, Counter()
    for row in rows:
        if "_parent" not in row:
            last = row
            continue
        parent = row["_parent"]
        assert json.loads(lines[parent["row"]]) == last
        assert parent["sha256"] == sha256(lines[parent["row"]].encode()).hexdigest()
        assert (parent["file"], parent["seed"]) == (str(source), 7)
        assert row["label"] == last["label"]
        assert row["text"] != last["text"]
        counts[parent["way"], parent["copy"]] += 1
    assert counts["characters", 0] == counts["characters", 1] == 60
    assert 15 < counts["words", 0] < 45
    assert done["ways"] == {"characters": 120, "words": counts["words", 0]}
    assert done["given"] == 60


def test_training_reads_what_comes_out(tmp_path):
    from luthier.data import formats

    augment(str(write(tmp_path / "in.jsonl", labelled(4))), tmp_path / "out.jsonl", augmentation(RECIPE), workers=1)
    rows = list(sources.read(str(tmp_path / "out.jsonl")))
    form, _ = formats.first_recognised(iter(rows), {}, "labelled")
    assert form is formats.FORMATS["labelled"]
    assert {formats.converted(row, form, {}).label for row in rows} == {"good", "bad"}


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_held_out_by_chance_have_no_copies_that_are_learnt(tmp_path, settings, streaming):
    """A share of augmented rows would hold out a row and learn its copy: an error with the way out; a file is none."""
    rows = write(tmp_path / "in.jsonl", [{"prompt": long_text(3, i), "completion": "yes"} for i in range(8)])
    augment(str(rows), tmp_path / "out.jsonl", augmentation(RECIPE), workers=1)
    settings["data"] |= {"train": str(tmp_path / "out.jsonl"), "validation": 0.25, "streaming": streaming}
    with pytest.raises(DataError, match=r"data.validation=0.25: .*out.jsonl:2 was made of another row"):
        train(configure(settings), Console(quiet=True))
    settings["data"]["validation"] = str(rows)
    assert train(configure(settings), Console(quiet=True))


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out"])
def test_the_same_bytes_for_any_number_of_workers_and_pieces(tmp_path, monkeypatch, name):
    rows = labelled(300)
    whole = write(tmp_path / "one" / "rows.jsonl", rows)
    once = tmp_path / "once" / name
    once.parent.mkdir()
    augment(str(whole), once, augmentation(RECIPE), workers=1)
    monkeypatch.setattr(pieces, "PIECE", 6000)
    monkeypatch.setattr(pieces, "BLOCK", 1000)
    cut = tmp_path / "cut" / name
    cut.parent.mkdir()
    augment(str(whole), cut, augmentation(RECIPE), workers=2)
    assert read(cut) == read(once)
    assert (
        len(list(cut.glob("*.jsonl"))) > 3
        if cut.is_dir()
        else cut.read_bytes() == once.read_bytes() or name.endswith("gz")
    )


def test_augmenting_again_adds_nothing(tmp_path):
    augment(str(write(tmp_path / "in.jsonl", labelled(30))), tmp_path / "one.jsonl", augmentation(RECIPE), workers=1)
    done = augment(str(tmp_path / "one.jsonl"), tmp_path / "two.jsonl", augmentation(RECIPE), workers=1)
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert done["new"] == 0
    assert done["new_before"] > 60
    refused = read(tmp_path / "two.refused.jsonl")
    assert {row["reason"] for row in refused} == {"the same input as a given row"}


def test_another_seed_makes_other_rows(tmp_path):
    source = str(write(tmp_path / "in.jsonl", labelled(20)))
    for seed in (0, 1):
        augment(source, tmp_path / f"{seed}.jsonl", augmentation(RECIPE, f"seed={seed}", "given=false"), workers=1)
    texts = [{row["text"] for row in read(tmp_path / f"{seed}.jsonl")} for seed in (0, 1)]
    assert not texts[0] & texts[1]


def test_new_rows_that_are_given_or_made_twice_are_dropped(tmp_path):
    rows = [{"text": "one two", "label": 1}, {"text": "two one", "label": 0}, {"text": "one  two", "label": 1}]
    done = augment(
        str(write(tmp_path / "in.jsonl", rows)),
        tmp_path / "out.jsonl",
        augmentation({"ways": {"words": {"kinds": ["repeat", "swap"], "copies": 20}}}),
        workers=1,
    )
    made = [" ".join(row["text"].split()) for row in read(tmp_path / "out.jsonl") if "_parent" in row]
    assert len(set(made)) == len(made) == done["new"]
    assert not {"one two", "two one"} & set(made)
    assert sum(done["refused"]["words"].values()) + done["new"] == 60
    assert set(done["refused"]["words"]) == {"the same input as a given row", "the same as another new row"}


def test_held_out_rows_are_neither_copied_nor_augmented_nor_made(tmp_path):
    rows = labelled(40)
    held = [{"text": rows[3]["text"].upper() + "!", "label": "other"}, {"text": rows[8]["text"], "label": "good"}]
    held.append({"text": "lantern", "label": "good"})
    rows.append({"text": "the lantern", "label": "bad"})
    out = tmp_path / "out.jsonl"
    recipe = augmentation(
        {"ways": {"words": {"kinds": ["delete"], "copies": 8}}},
        {"validation": str(write(tmp_path / "val.jsonl", held))},
    )
    done = augment(str(write(tmp_path / "in.jsonl", rows)), out, recipe, workers=1)
    made = read(out)
    assert done["held_out"] == 2
    assert not [r for r in made if r["text"] in (rows[3]["text"], rows[8]["text"])]
    assert not [row for row in made if row.get("_parent", {}).get("row") in (3, 8)]
    assert "lantern" not in {row["text"] for row in made}
    assert "the" in {row["text"] for row in made}
    refused = read(tmp_path / "out.refused.jsonl")
    assert [row["row"] for row in refused if not row["way"]] == [3, 8]
    dropped = [row["values"]["text"] for row in refused if row["way"] and "validation" in row["reason"]]
    assert dropped
    assert set(dropped) == {"lantern"}
    with pytest.raises(DataError, match="nothing to augment"):
        augment(
            str(tmp_path / "in.jsonl"),
            tmp_path / "none.jsonl",
            augmentation(RECIPE, {"validation": str(tmp_path / "in.jsonl")}),
            workers=1,
        )


def test_a_long_row_that_holds_a_held_out_one_is_held_out(tmp_path):
    held = long_text(60, 1)
    rows = [{"text": f"Quoted: {held.upper()} end.", "label": 1}, {"text": long_text(60, 2), "label": 1}]
    recipe = augmentation(RECIPE, {"validation": str(write(tmp_path / "v.jsonl", [{"text": held, "label": 0}]))})
    done = augment(str(write(tmp_path / "in.jsonl", rows)), tmp_path / "out.jsonl", recipe, workers=1)
    assert done["held_out"] == 1
    assert {r["_parent"]["row"] for r in read(tmp_path / "out.jsonl") if "_parent" in r} == {1}


# ---------------------------------------------------------------------------- kills, other settings, faults


def _command(source: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "luthier",
        "data",
        "augment",
        str(source),
        str(out),
        "--way",
        "characters",
        "--way",
        "words",
        *more,
    ]


def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path):
    folder = tmp_path / "in"
    for n in range(6):
        write(folder / f"{n}.jsonl", labelled(2000)[n * 300 : n * 300 + 300])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = tmp_path / "whole.jsonl"
    subprocess.run(_command(folder, whole, "--workers", "1"), env=environment, capture_output=True, check=True)
    out = tmp_path / "out.jsonl"
    for last in (["first pass", "2 of 6"], ["second pass", "2 of 6"]):
        process = subprocess.Popen(
            _command(folder, out, "--workers", "1"), env=environment, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        for text in last:
            assert any(line.startswith(text) for line in iter(process.stderr.readline, ""))
        process.kill()
        process.wait()
        process.stderr.close()
        assert not out.exists()
    ran = subprocess.run(_command(folder, out, "--workers", "1"), env=environment, capture_output=True, check=True)
    assert b"going on" in ran.stderr
    assert out.read_bytes() == whole.read_bytes()


def test_an_output_that_was_begun_otherwise_is_refused(tmp_path):
    source = write(tmp_path / "in.jsonl", labelled(5))
    out = tmp_path / "out.jsonl"
    first = augment(str(source), out, augmentation(RECIPE), workers=1)
    assert augment(str(source), out, augmentation(RECIPE), workers=1) == first
    with pytest.raises(CheckpointError, match=r"settings.ways.characters.rate was 0.05 and is now 0.2"):
        augment(str(source), out, augmentation(RECIPE, "ways.characters.rate=0.2"), workers=1)
    (tmp_path / "other.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        augment(str(source), tmp_path / "other.jsonl", augmentation(RECIPE), workers=1)


def test_unreadable_and_missing_rows(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine words", "label": 1}\n{"text": \n')
    with pytest.raises(DataError, match=r"bad.jsonl:2.*luthier data clean"):
        augment(str(bad), tmp_path / "out.jsonl", augmentation(RECIPE), workers=1)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows"):
        augment(str(tmp_path / "empty.jsonl"), tmp_path / "out2.jsonl", augmentation(RECIPE), workers=1)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "ways: none is given; known are characters, words"),
        ({"ways": {"charactres": {}}}, "did you mean 'characters'"),
        ({"ways": {"characters": {"rat": 0.1}}}, r"ways.characters.rat: unknown; did you mean 'rate'"),
        ({"ways": {"characters": {"rate": 2.0}}}, "ways.characters.rate: .*less than or equal to 1"),
        ({"ways": {"characters": {"kinds": ["keybord"]}}}, "ways.characters.kinds.0"),
        ({"ways": {"words": 3}}, "ways.words: expected settings"),
        ({"ways": ["words"], "sed": 1}, "sed: unknown; did you mean 'seed'"),
        ({"ways": ["words"], "columns": {"txt": "a"}}, "columns: no format has a key 'txt'"),
        ({"ways": ["paraphrase"]}, "model: paraphrase asks one"),
        (
            {"ways": ["words"], "model": {"kind": "openai", "base_url": "http://localhost:1", "name": "m"}},
            "none of the ways",
        ),
        (
            {"ways": ["paraphrase"], "model": {"kind": "openai", "base_url": "localhost:1", "name": "m"}},
            "model.base_url: 'localhost:1' is no address",
        ),
        ({"ways": {"preferences": {"rewards": ["exact_mach"]}}}, "rewards.0.kind: .*did you mean 'exact_match'"),
        ({"ways": ["paraphrase"], "model": {"kind": "opnai", "name": "m"}}, "model.kind: .*did you mean 'openai'"),
        ({"ways": ["paraphrase"], "model": {"kind": "openai", "base_url": "http://a:b@c", "name": "m"}}, "environment"),
        (
            {"ways": ["paraphrase"], "model": {"kind": "openai", "base_url": "http://c", "name": "m", "key": "x"}},
            "key: unknown",
        ),
        ({"ways": ["paraphrase"], "model": {"kind": "luthier", "name": "./nowhere"}}, "does not exist"),
        ({"ways": {"paraphrase": {"instruction": "say it"}}}, "it needs {text}"),
    ],
)
def test_what_is_wrong_with_a_recipe(given, problem):
    with pytest.raises(ConfigError, match=problem):
        augmentation(given)


def test_a_recipe_that_was_written_is_read_as_the_same(tmp_path):
    made = augmentation(
        {
            "ways": {"words": {"rate": 0.3}, "paraphrase": None},
            "seed": 3,
            "model": {"kind": "openai", "base_url": "http://localhost:1/v1/", "name": "m"},
        }
    )
    (tmp_path / "r.yaml").write_text(made.dump())
    assert augmentation(tmp_path / "r.yaml") == made


def test_no_new_row_is_a_failure(tmp_path, capsys):
    rows = write(tmp_path / "in.jsonl", [{"text": "all of it is learnt"}])
    given = ["data", "augment", str(rows), str(tmp_path / "out.jsonl"), "--way", "words", "--workers", "1", "--json"]
    assert main([*given]) == DataError.exit_code
    assert json.loads(capsys.readouterr().out)["new"] == 0


def test_the_command_line(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", labelled(5))
    (tmp_path / "r.yaml").write_text("ways:\n  characters: {rate: 0.2}\n")
    arguments = [
        "data",
        "augment",
        str(source),
        str(tmp_path / "o.jsonl"),
        "--recipe",
        str(tmp_path / "r.yaml"),
        "--set",
        "ways.words.rate=0.4",
        "--seed",
        "5",
        "--new-only",
        "--json",
        "--quiet",
        "--workers",
        "1",
    ]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ways"] == {"characters": 5, "words": 5}
    assert told["new"] == len(read(tmp_path / "o.jsonl")) == 10
    assert main(["data", "augment", str(source), str(tmp_path / "p.jsonl"), "--way", "word"]) == 2
    assert "did you mean 'words'" in capsys.readouterr().err
    assert main(["data", "augment", str(source), str(tmp_path / "o.json"), "--way", "words"]) == 2
    assert "written as .jsonl" in capsys.readouterr().err
    assert (
        main(
            [
                "data",
                "augment",
                str(source),
                str(tmp_path / "q.jsonl"),
                "--way",
                "words",
                "--validation",
                str(tmp_path / "gone.jsonl"),
            ]
        )
        == 2
    )
    assert "does not exist" in capsys.readouterr().err
