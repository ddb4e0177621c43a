"""Near duplicates and rows that stand in evaluation sets, as checks: on rows, on files, and beside datasketch."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from luthier.cli import main
from luthier.data import sources
from luthier.errors import CheckpointError, ConfigError, DataError
from luthier.prepare import lsh, pieces
from luthier.prepare.audit import audit
from luthier.prepare.checks.check import Decision, Gathered
from luthier.prepare.checks.near_duplicates import NearDuplicates
from luthier.prepare.checks.overlap import Overlap
from luthier.prepare.clean import clean
from luthier.prepare.normal import normal
from luthier.prepare.overlap import Index
from luthier.prepare.recipe import recipe
from luthier.prepare.views import view

PARAGRAPHS = [p for text in topics.values() for p in text.split("\n\n") if 200 < len(p) < 800 and p.isascii()]
TEXTS = list({normal(p)[:40]: " ".join(p.split()) for p in PARAGRAPHS}.values())[:240]
WORDS = sorted({word for text in TEXTS for word in text.split()})


def edited(text: str, share: float, draw: random.Random) -> str:
    """The text with a share of its words put in, left out or made another."""
    words = text.split()
    for place in sorted(draw.sample(range(len(words)), max(1, round(share * len(words)))), reverse=True):
        words[place : place + 1] = draw.choice([[draw.choice(WORDS)], [], [words[place], draw.choice(WORDS)]])
    return " ".join(words)


def planted(seed: int = 0) -> tuple[list[str], dict[int, int]]:
    """Real texts, with copies of some among them: {row of the later: row of the first}."""
    draw = random.Random(seed)
    made = [(source, text) for source, text in enumerate(TEXTS)]
    for source, text in enumerate(TEXTS[:60]):
        sentences = text.split(". ")
        kind = source % 4
        if kind < 2:
            copy = edited(text, draw.uniform(0.05, 0.12), draw)
        elif kind == 2:
            copy = text.upper().replace(",", " -").replace(".", "!")
        else:
            copy = ". ".join([*sentences[1:], sentences[0]])
        made.append((source, copy))
    draw.shuffle(made)
    first: dict[int, int] = {}
    copies = {}
    for row, (source, _) in enumerate(made):
        if source in first:
            copies[row] = first[source]
        first.setdefault(source, row)
    return [text for _, text in made], copies


def decided(check: NearDuplicates, rows: Iterable[dict], parts: int = 1) -> Decision:
    """What the check says of rows that come in so many pieces."""
    views = [view(values, number) for number, values in enumerate(rows)]
    gathered, first = [], 0
    for part in np.array_split(np.arange(len(views)), parts):
        gatherer = check.gatherer()
        for number, at in enumerate(part.tolist()):
            gatherer.add(number, views[at])
        gathered.append(Gathered(first, gatherer.arrays()))
        first += len(part)
    return check.decide(gathered, lambda: enumerate(views))


def text_rows(texts: Iterable[str]) -> list[dict]:
    return [{"text": text} for text in texts]


def write(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [row.values for row in sources.read(str(path))]


# ---------------------------------------------------------------------------- near duplicates


@pytest.mark.parametrize("parts", [1, 7])
def test_planted_copies_are_found_and_nothing_else(parts):
    texts, copies = planted()
    made = decided(NearDuplicates(), text_rows(texts), parts)
    pairs = dict(zip(made.rows.tolist(), made.others.tolist()))
    right = sum(copies.get(row) == other for row, other in pairs.items())
    assert right / len(copies) >= 0.95
    assert right / len(pairs) >= 0.90
    assert made.summary["rows"] == len(pairs) == made.summary["same"] + made.summary["near"]
    assert made.summary["same"] >= 15  # upper case and other marks; and what is one sentence only
    for row, other, alike in zip(made.rows.tolist(), made.others.tolist(), made.numbers.tolist()):
        assert alike == pytest.approx(similarity(texts[row], texts[other]))


def similarity(a: str, b: str, size: int = 5) -> float:
    first, second = ({t[i : i + size] for i in range(len(t) - size + 1)} for t in (normal(a), normal(b)))
    return len(first & second) / len(first | second)


def test_clusters_are_those_of_all_pairs_and_of_datasketch():
    """Datasketch (https://ekzhu.com/datasketch/) on the same shingles, with its own hashes; and every pair compared."""
    datasketch = pytest.importorskip("datasketch")
    texts, _ = planted(1)
    made = decided(NearDuplicates(threshold=0.6), text_rows(texts))
    sets = [{t[i : i + 5].encode() for i in range(len(t) - 4)} for t in map(normal, texts)]

    def clusters(pairs: Iterable[tuple[int, int]]) -> set[frozenset[int]]:
        of = {row: {row} for row in range(len(texts))}
        for a, b in pairs:
            if of[a] is not of[b]:
                of[a] |= of[b]
                for row in of[b]:
                    of[row] = of[a]
        return {frozenset(one) for one in of.values() if len(one) > 1}

    every = [(a, b) for b in range(len(texts)) for a in range(b) if similarity_of(sets[a], sets[b]) >= 0.6]
    assert clusters(zip(made.rows.tolist(), made.others.tolist())) == clusters(every)

    index, pairs = datasketch.MinHashLSH(params=(32, 4), num_perm=128), []
    for row, one in enumerate(sets):
        hashed = datasketch.MinHash(num_perm=128)
        hashed.update_batch(one)
        pairs += [(other, row) for other in index.query(hashed) if similarity_of(sets[other], one) >= 0.6]
        index.insert(row, hashed)
    assert clusters(zip(made.rows.tolist(), made.others.tolist())) == clusters(pairs)


def similarity_of(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


def test_which_row_stays():
    text = TEXTS[0]
    rows = text_rows([text, TEXTS[1], text + " And so on.", text.upper()])
    first = decided(NearDuplicates(), rows)
    assert (first.rows.tolist(), first.others.tolist()) == ([2, 3], [0, 0])
    longest = decided(NearDuplicates(keep="longest"), rows)
    assert (longest.rows.tolist(), longest.others.tolist()) == ([0, 3], [2, 0])
    assert [longest.told[code][0] for code in longest.codes] == ["near", "same"]


def test_a_chain_hangs_together_and_says_so():
    words = TEXTS[2].split()
    steps = [" ".join(["other", "words", "stand", "here"] * i + words[4 * i :]) for i in range(4)]
    alike = similarity(steps[0], steps[3])
    threshold = (alike + min(similarity(a, b) for a, b in pairwise(steps))) / 2
    made = decided(NearDuplicates(threshold=threshold, hashes=512), text_rows(steps))
    assert made.rows.tolist() == [1, 2, 3]
    assert "by rows in between" in made.told[made.codes[2]][1]
    assert made.numbers[2] == pytest.approx(alike)


def test_another_label_is_no_copy():
    rows = [{"text": TEXTS[0], "label": 1}, {"text": TEXTS[0] + "!", "label": 0}, {"text": TEXTS[0], "label": 1}]
    assert decided(NearDuplicates(), rows).rows.tolist() == [2]


def test_answers_the_other_way_round_are_no_copy():
    one = {"prompt": "Which?", "chosen": TEXTS[0], "rejected": TEXTS[1]}
    other = {"prompt": "Which?", "chosen": TEXTS[1], "rejected": TEXTS[0]}
    assert decided(NearDuplicates(), [one, other]).rows.tolist() == []
    assert decided(NearDuplicates(), [one, other, dict(one)]).rows.tolist() == [2]


def test_system_turns_make_no_rows_alike():
    def chat(question):
        return {"messages": [{"role": "system", "content": TEXTS[0]}, {"role": "user", "content": question},
                             {"role": "assistant", "content": "It is " + question[::-1]}]}  # fmt: skip

    assert decided(NearDuplicates(), [chat(TEXTS[1][:200]), chat(TEXTS[2][:200])]).rows.tolist() == []
    assert decided(NearDuplicates(), [chat(TEXTS[1][:200]), chat(TEXTS[1][:190])]).rows.tolist() == [1]


def test_short_rows_are_compared_as_a_whole():
    rows = text_rows(["Set the volume to 30.", "Set the volume to 40.", "set the volume to 30", "", "?!"])
    made = decided(NearDuplicates(), rows)
    assert (made.rows.tolist(), made.others.tolist()) == ([2], [0])
    assert decided(NearDuplicates(shortest=1), rows).rows.tolist() == [1, 2]


@pytest.mark.parametrize("unit", ["characters", "words"])
def test_units(unit):
    chinese = "这个句子在讲一些很长的故事，因为我们需要足够多的字来比较两行文字是不是几乎一样，所以它还要再长一点。" * 2
    rows = text_rows([chinese, chinese.replace("，", " ").replace("所以", "因此"), TEXTS[0]])
    made = decided(NearDuplicates(unit=unit, size=2, shortest=20), rows)
    assert (made.rows.tolist(), made.told[made.codes[0]][0]) == ([1], "near")


def test_settings_that_cannot_find_anything_are_refused():
    with pytest.raises(ConfigError, match=r"hashes=64 do not find pairs at threshold=0\.01"):
        recipe({"checks": {"near_duplicates": {"threshold": 0.01, "hashes": 64}}})
    wrong = ("threshold", 0.0), ("threshold", 1.5), ("size", 0), ("unit", "tokens"), ("keep", "last"), ("hashes", 100)
    for key, value in wrong:
        with pytest.raises(ConfigError, match=rf"checks\.near_duplicates\.{key}"):
            recipe({"checks": {"near_duplicates": {key: value}}})
    with pytest.raises(ConfigError, match="did you mean 'threshold'"):
        recipe({"checks": {"near_duplicates": {"treshold": 0.5}}})


def test_nothing_at_all():
    made = decided(NearDuplicates(), [], 1)
    assert made.rows.tolist() == []
    assert decided(NearDuplicates(), text_rows(["", "."])).summary["rows"] == 0


CHECK = {"checks": {"near_duplicates": {"action": "drop"}}}


@pytest.mark.parametrize("keep", ["first", "longest"])
def test_cleaning_twice_removes_nothing_more_for_any_number_of_workers(tmp_path, monkeypatch, keep):
    monkeypatch.setattr(pieces, "PIECE", 20_000)
    monkeypatch.setattr(pieces, "BLOCK", 3_000)
    monkeypatch.setattr(lsh, "WINDOW", 2)  # so that pairs are left out that a second cleaning might compare
    draw = random.Random(3)
    texts = [edited(draw.choice(TEXTS[:25]), draw.uniform(0, 0.3), draw) for _ in range(300)]
    source = write(tmp_path / "rows.jsonl", text_rows(texts))
    assert len(pieces.pieces_of(str(source))) > 3
    made = recipe(CHECK, f"checks.near_duplicates.keep={keep}", "checks.exact_duplicates.action=drop")
    done = clean(str(source), tmp_path / "one.jsonl", made, workers=1)
    assert 100 < done["removed"] < 290
    again = clean(str(tmp_path / "one.jsonl"), tmp_path / "two.jsonl", made, workers=1)
    assert again["removed"] == 0
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    clean(str(source), tmp_path / "three.jsonl", made, workers=2)
    for name in ("jsonl", "removed.jsonl"):
        assert (tmp_path / f"three.{name}").read_bytes() == (tmp_path / f"one.{name}").read_bytes()


def test_an_audit_tells_which_row_is_like_which(tmp_path):
    source = write(tmp_path / "rows.jsonl", text_rows([*TEXTS[:5], edited(TEXTS[3], 0.05, random.Random(0))]))
    verdict = audit(str(source), tmp_path / "audit", recipe(CHECK), workers=1)
    [found] = verdict["checks"]["near_duplicates"]["examples"]
    assert (found["row"], found["what"], found["place"]) == (5, "near", f"{source}:6")
    assert found["detail"].endswith(f"% like row 3 ({source}:4)")
    assert verdict["faults"] == ["near_duplicates"]
    assert verdict["checks"]["near_duplicates"]["summary"]["clusters"] == 1


# ---------------------------------------------------------------------------- overlap

LONG = " ".join(f"word{i}" for i in range(40))


def matches(rows: list[list[str]], texts: list[str], share: float = 0.01, **given) -> list:
    index = Index(rows, **({"size": 13, "least": 8, "common": 10} | given))
    return [(m.row, m.whole, round(m.share, 4), " ".join(m.words), m.text) for m in index.matches(texts, share)]


def test_runs_of_words_by_hand():
    """40 words have 28 runs of 13. Words 10 to 29 of them, in another text, hold 8 of these: 2/7."""
    part = "Before it, " + " ".join(f"Word{i}," for i in range(10, 30)) + " and after it."
    run = " ".join(f"word{i}" for i in range(10, 23))
    assert matches([["other"], [LONG]], ["nothing here", part]) == [(1, False, 0.2857, run, 1)]
    assert matches([["other"], [LONG]], ["nothing here", part], share=0.28) != []
    assert matches([["other"], [LONG]], ["nothing here", part], share=0.29) == []
    assert matches([[LONG]], [" ".join(f"word{i}" for i in range(10, 22))]) == []  # twelve words
    assert matches([[LONG]], [f"Yes: {LONG.upper()}!"])[0][:3] == (0, False, 1.0)


def test_runs_count_once_and_over_all_texts_of_a_row():
    half = " ".join(f"other{i}" for i in range(13))
    found = matches([[LONG, half]], [LONG + ". " + LONG + " and more", "?"])
    assert found[0][:3] == (0, False, round(28 / 29, 4))


def test_whole_rows_however_short_and_single_turns_from_some_words_on():
    rows = [["Who?", "Ann."], ["What is the capital of that country of theirs?", "Paris"]]
    assert matches(rows, ["who", "ANN"]) == [(0, True, 1.0, "who ann", -1)]
    assert matches(rows, ["Who?", "Bob."]) == []
    assert matches(rows, ["what is the capital, of that country of theirs", "Rome"])[0][:2] == (1, True)
    assert matches(rows, ["what is the capital, of that country of theirs", "Rome"], least=10) == []
    assert matches(rows, ["Rome?", "Paris"]) == []


def test_the_wording_of_a_task_is_no_sign_of_a_row():
    task = " ".join(f"task{i}" for i in range(13))
    rows = [[f"{task} {' '.join(f'row{n}x{i}' for i in range(13))}"] for n in range(12)]
    assert matches(rows, [f"{task} and something of its own"]) == []
    assert len(matches(rows[:10], [f"{task} and something of its own"])) == 10
    assert [m[0] for m in matches(rows, [rows[7][0] + " indeed"])] == [7]


@pytest.fixture
def sets(tmp_path) -> tuple[Path, Path]:
    """A training set into which rows of an evaluation set came: (training, evaluation)."""
    held = [{"question": f"{TEXTS[100 + i]} Why?", "answer": f"Because of {i}."} for i in range(20)]
    clean_rows = [{"messages": [{"role": "system", "content": held[19]["question"]},
                                {"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]}
                  for text in TEXTS[:30]]  # fmt: skip

    def chat(question):
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "I do not know."}]}

    leaks = [chat(held[3]["question"].upper()), chat(TEXTS[50] + " " + held[5]["question"] + " " + TEXTS[51]),
             {"text": held[7]["question"] + " " + held[7]["answer"]}]  # fmt: skip
    return write(tmp_path / "train.jsonl", [*clean_rows, *leaks]), write(tmp_path / "held.jsonl", held)


def test_leaks_are_found_with_the_evaluation_row_and_the_words(sets, tmp_path):
    train, held = sets
    made = recipe({"checks": {"overlap": {"against": {"held": str(held)}}}})
    verdict = audit(str(train), tmp_path / "audit", made, workers=1)
    found = read(tmp_path / "audit" / "findings.jsonl")
    assert [(f["row"], f["what"]) for f in found] == [(30, "whole"), (31, "words"), (32, "whole")]
    assert [f["detail"].split(f"{held}:")[1].split()[0].rstrip(":,") for f in found] == ["4", "6", "8"]
    path, start, stop = found[1]["spans"][0]
    assert path == ["messages", 0, "content"]
    said = read(train)[31]["messages"][0]["content"][start:stop]
    words = found[1]["detail"].split("in 13 words such as ")[1].strip("'")
    assert normal(said) == words
    assert len(words.split()) == 13
    assert words in normal(read(held)[5]["question"])
    told = verdict["checks"]["overlap"]["summary"]["against"]["held"]
    assert (told["rows"], told["in_training"]) == (20, 3)
    assert told["places"] == [f"{held}:{line}" for line in (4, 6, 8)]
    assert verdict["faults"] == ["overlap"]


def test_leaks_are_removed_and_the_cli_names_benchmarks(sets, tmp_path, capsys):
    train, held = sets
    given = [f"--against=held={held}", "--workers=2", "--quiet", "--json"]
    assert main(["data", "clean", str(train), str(tmp_path / "out.jsonl"), *given]) == 0
    assert json.loads(capsys.readouterr().out)["why_removed"]["overlap"] == {"whole": 2, "words": 1}
    assert main(["data", "audit", str(tmp_path / "out.jsonl"), *given]) == 0
    assert main(["data", "audit", str(train), *given]) == 8
    capsys.readouterr()
    assert main(["data", "audit", str(train), "--against=nothing.jsonl"]) == 2
    assert "NAME=PATH" in capsys.readouterr().err


def test_near_copies_by_hand(tmp_path):
    """Of 40 words every tenth is another: no run of 13 is left, but of 36 runs of five four times 5."""
    rows = text_rows(["One and two.", LONG, " ".join(LONG.split()[:15])])
    held = write(tmp_path / "held.jsonl", rows)
    copy = " ".join(f"changed{i}" if i % 10 == 9 else f"word{i}" for i in range(40))
    seen = view({"text": copy})
    [finding] = Overlap(against={"held": str(held)}).prepared({}).look(seen)
    assert finding.what == "near"
    assert finding.detail == f"held: 56% of {held}:2, in 5 words such as 'word0 word1 word2 word3 word4'"
    assert copy[finding.spans[0].start : finding.spans[0].stop] == "word0 word1 word2 word3 word4"
    for given in ({"near": 0.6}, {"near": None}):
        assert Overlap(against={"held": str(held)}, **given).prepared({}).look(seen) == []
    few = view({"text": " ".join(LONG.split()[:12]) + " and more"})  # 8 of 11 runs of a row of 15 words
    assert Overlap(against={"held": str(held)}).prepared({}).look(few) == []


def test_evaluation_sets_that_cannot_be_read(sets, tmp_path):
    train, held = sets

    def checked(path):
        return recipe({"checks": {"overlap": {"against": {"held": str(path)}}}})

    with pytest.raises(DataError, match=r"checks\.overlap\.against\.held: .*does not exist"):
        audit(str(train), tmp_path / "audit", checked(tmp_path / "none.jsonl"), workers=1)
    with pytest.raises(ConfigError, match=r"checks\.overlap: against\.held: .*does not exist"):
        clean(str(train), tmp_path / "out.jsonl", checked(tmp_path / "none.jsonl"), workers=1)
    held.write_text("{}\nnot JSON\n")
    with pytest.raises(DataError, match=r"against\.held: .*held\.jsonl:2: not JSON"):
        audit(str(train), tmp_path / "audit2", checked(held), workers=1)


def test_an_audit_begun_against_other_rows_is_another(sets, tmp_path):
    train, held = sets
    made = recipe({"checks": {"overlap": {"against": {"held": str(held)}}}})
    first = audit(str(train), tmp_path / "audit", made, workers=1)
    assert audit(str(train), tmp_path / "audit", made, workers=1) == first
    with open(held, "a") as file:
        file.write(json.dumps({"question": TEXTS[0], "answer": ""}) + "\n")
    with pytest.raises(CheckpointError, match=r"settings\.recipe\.read\.overlap"):
        audit(str(train), tmp_path / "audit", made, workers=1)


def test_an_index_is_made_anew_when_its_file_changes(sets):
    _, held = sets
    seen = view({"text": "One, two, three: four five six seven eight"})
    check = Overlap(against={"held": str(held)})
    assert check.prepared({}).look(seen) == []
    with open(held, "a") as file:
        file.write(json.dumps({"question": "one two three four five six seven eight", "answer": "nine"}) + "\n")
    os.utime(held, ns=(1, 1))
    [finding] = check.prepared({}).look(seen)
    assert finding.what == "whole"
    assert finding.spans[0][:] == (0, 0, len(seen.texts[0].text))


def shingled(text: str) -> set[str]:
    """Five characters in a row of the words in small letters, by the definition."""
    said = " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
    return {said[i : i + 5] for i in range(len(said) - 4)}


@pytest.mark.parametrize("keep", ["first", "longest"])
def test_what_findings_say_of_chains_is_true(tmp_path, keep):
    """Ten chains of five to nine edits of an edit: each sentence of the file of findings is checked by brute force."""
    draw = random.Random(5)
    rows = []
    for text in TEXTS[:10]:
        for _ in range(draw.randrange(5, 10)):
            rows.append(text)
            text = edited(text, 0.14, draw)
    rows += [rows[3].upper(), *TEXTS[20:40]]
    draw.shuffle(rows)
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    check = {"checks": {"near_duplicates": {"action": "drop", "keep": keep, "hashes": 512}}}
    audit(str(source), tmp_path / "out", recipe(check), workers=1)
    sets = [shingled(text) for text in rows]
    like = np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])
    linked = like >= 0.5
    for _ in range(10):
        linked |= (linked.astype(int) @ linked.astype(int)) > 0  # by any number of rows in between
    told = [json.loads(line) for line in (tmp_path / "out" / "findings.jsonl").read_text().splitlines()]
    kinds = {"direct": 0, "chain": 0, "same": 0}
    for one in told:
        other = int(one["detail"].partition("row ")[2].partition(" ")[0])
        share = like[one["row"], other]
        if one["what"] == "same":
            kinds["same"] += 1
            assert share == 1
        elif "in between" in one["detail"]:
            kinds["chain"] += 1
            assert share < 0.5
            assert linked[one["row"], other]
            assert f"itself {share:.0%} like it" in one["detail"]
        else:
            kinds["direct"] += 1
            assert share >= 0.5
            assert one["detail"].startswith(f"{share:.0%} like row {other} ")
    assert kinds["same"] == 1
    assert min(kinds.values()) > 0
    once = clean(str(source), tmp_path / "once.jsonl", recipe(check), workers=1)
    assert once["removed"] == len(told)
    twice = clean(str(tmp_path / "once.jsonl"), tmp_path / "twice.jsonl", recipe(check), workers=1)
    assert (twice["removed"], twice["changed"]) == (0, 0)
