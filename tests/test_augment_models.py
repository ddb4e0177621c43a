"""Ways that ask a model: a server on this machine that answers as it is told, and a small random model of ours."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given as given_by
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_augment import read, write

from luthier.errors import ConfigError, DataError, RewardError
from luthier.prepare.augment import rouge
from luthier.prepare.augment.paraphrase import bare
from luthier.prepare.augment.preferences import grade
from luthier.prepare.augment.recipe import augmentation
from luthier.prepare.augment.self_instruct import SelfInstruct
from luthier.prepare.augment.writing import augment
from luthier.prepare.chat_client import Answer, ChatClient, Question, ServerError, fence, unsafe, wrong_address

KEY = "sk-test-0123456789abcdef"


class Fake(ThreadingHTTPServer):
    """Answers by a function of the request's body, which may give a text, or (state, headers, bytes)."""

    daemon_threads = True

    def __init__(self, answer: Callable[[dict], object]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.asked, self.keys, self.paths = answer, [], [], []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):  # a client that was killed
        pass


class _Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
            self.server.paths.append(self.path)
        made = self.server.answer(body)
        state, headers, data = made if isinstance(made, tuple) else (200, {}, completion(made))
        self.send_response(state)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def completion(text: object, reason: str = "stop") -> bytes:
    made = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]}
    return json.dumps(made).encode()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = []

    def start(answer) -> Fake:
        made.append(Fake(answer))
        return made[-1]

    yield start
    for server in made:
        server.shutdown()
        server.server_close()


def asked(body: dict) -> str:
    return body["messages"][-1]["content"]


def client(server: Fake, **more) -> ChatClient:
    return ChatClient(server.url, "small", sleep=lambda seconds: None, **more)


def question(text: str, **more) -> Question:
    return Question((("user", text),), **more)


# ---------------------------------------------------------------------------- the client


def test_what_is_sent_and_what_comes_back(serve, monkeypatch):
    server = serve(lambda body: f"  {asked(body)}!\n")
    monkeypatch.setenv("MY_KEY", KEY)
    answers = client(server, api_key_env="MY_KEY", body={"seed": None, "top_k": 5}).answers(
        [question(f"q{i}", temperature=0.5, seed=i) for i in range(20)]
    )
    assert [answer.text for answer in answers] == [f"q{i}!" for i in range(20)]
    assert not any(a.cut for a in answers)
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert set(server.paths) == {"/v1/chat/completions"}
    assert server.asked[0] | {"messages": None} == {
        "model": "small",
        "messages": None,
        "temperature": 0.5,
        "top_p": 1.0,
        "max_tokens": 512,
        "stream": False,
        "top_k": 5,
    }


def test_what_may_pass_is_tried_again(serve):
    states = iter([(429, {"Retry-After": "7"}, b"slow down"), (503, {}, b""), "done"])
    waited: list[float] = []
    server = serve(lambda body: next(states))
    assert ChatClient(server.url, "small", sleep=waited.append).answer(question("x")).text == "done"
    assert waited[0] == 7.0
    assert 1.0 <= waited[1] <= 2.0


def test_an_answer_that_is_none_is_asked_for_again_but_not_for_long(serve):
    answers = iter([(200, {}, b"<html>502 from a gateway"), (200, {}, b'{"choices": [{"mess'), "done"])
    server = serve(lambda body: next(answers))
    assert client(server).answer(question("x")).text == "done"
    other = serve(lambda body: (200, {}, b"<html>welcome"))
    with pytest.raises(ServerError, match="welcome"):
        client(other, retries=6).answer(question("x"))
    assert len(other.asked) == 3


def test_thoughts_of_a_reasoning_model_are_no_answer():
    assert Answer("<think>1. one\n{}</think>\n\nyes").said() == Answer("yes")
    assert Answer("the template began them</think>yes", True).said() == Answer("yes", True)
    assert Answer("<think>and so on", True).said() == Answer("", True)
    assert Answer("<think>and so on").said() == Answer("", True)
    assert Answer("I think <think> is a tag").said() == Answer("I think <think> is a tag")
    given = Answer("<think>1. Write a poem about trees.</think>1. Name three rivers of Asia.")
    assert SelfInstruct().instructions(given) == ["Name three rivers of Asia."]


@given_by(st.lists(st.sampled_from(["-", "--------", "a", "\n", "-----\nGrade: 10"]), max_size=8).map("".join))
@hypothesis_settings(max_examples=50, deadline=None)
def test_no_text_ends_its_fence(text):
    line = fence(text, "plain")
    assert len(line) >= 5
    assert line not in text


def test_an_answer_that_is_cut_says_so(serve):
    server = serve(lambda body: (200, {}, completion("half", "length")))
    assert client(server).answer(question("x")) == Answer("half", True)


@pytest.mark.parametrize(
    ("answer", "problem", "times"),
    [
        ((401, {}, f"Incorrect key {KEY}".encode()), r"401 .*Incorrect key \*\*\*", 1),
        ((500, {}, b"broken"), "500 .*broken", 3),
        ((200, {}, b"<html>"), "no chat completion", 3),
        ((200, {}, b'{"choices": []}'), "no chat completion.*such as http://localhost:8000/v1", 3),
        ((200, {}, json.dumps({"error": f"quota of {KEY}"}).encode()), r"no chat completion.*quota of \*\*\*", 3),
        ((302, {"Location": "http://127.0.0.1:9/elsewhere"}, b"moved"), "302", 1),
    ],
)
def test_what_does_not_pass_is_an_error_without_the_key(serve, monkeypatch, answer, problem, times):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda body: answer)
    with pytest.raises(ServerError, match=problem) as found:
        client(server, retries=2).answers([question("x")])
    assert KEY not in str(found.value)
    assert len(server.asked) == times


def test_addresses():
    with pytest.raises(ServerError, match="cannot be reached"):
        ChatClient("http://127.0.0.1:9/v1", "m", retries=1, sleep=lambda seconds: None).answer(question("x"))
    assert wrong_address("https://api.example.com/v1") is None
    assert wrong_address("http://localhost:8000/v1") is None
    for wrong in ("api.example.com", "ftp://a", "http://", "http://a?key=1", "http://user:word@a/v1", "http://[::1"):
        assert wrong_address(wrong), wrong
    assert unsafe("http://api.example.com/v1")
    assert unsafe("http://8.8.8.8/v1")
    for near in (
        "https://api.example.com",
        "http://localhost:1",
        "http://10.1.2.3",
        "http://gpu-box:8000",
        "http://[::1]:1",
    ):
        assert unsafe(near) is None, near


# ---------------------------------------------------------------------------- paraphrases


def of_server(server: Fake, ways, **more) -> dict:
    return {"ways": ways, "model": {"kind": "openai", "base_url": server.url, "name": "small", **more}}


def reversed_words(body: dict) -> str:
    text = asked(body).rpartition("Text:\n")[2]
    return 'Here is the new text:\n\n"' + " ".join(reversed(text.split())) + '"'


PROMPTS = [{"prompt": f"please add {n} and {n + 1} up for me", "completion": str(2 * n + 1)} for n in range(40)]


def test_paraphrases_keep_their_answers(serve, tmp_path):
    server = serve(reversed_words)
    source = write(tmp_path / "in.jsonl", PROMPTS)
    done = augment(str(source), tmp_path / "out.jsonl", augmentation(of_server(server, ["paraphrase"])))
    rows = read(tmp_path / "out.jsonl")
    assert done["new"] == 40
    assert len(rows) == 80
    assert len(server.asked) == 40
    for given, new in zip(rows[::2], rows[1::2]):
        assert new["prompt"] == " ".join(reversed(given["prompt"].split()))
        assert new["completion"] == given["completion"]
        assert new["_parent"]["way"] == "paraphrase"
    assert {body["temperature"] for body in server.asked} == {0.7}
    assert len({body["seed"] for body in server.asked}) == 40
    again = augment(
        str(source),
        tmp_path / "again.jsonl",
        augmentation(of_server(server, ["paraphrase"]), {"cache": str(tmp_path / ".out.jsonl.luthier.answers")}),
    )
    assert again["new"] == 40
    assert len(server.asked) == 40
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_paraphrases_that_are_none_are_refused(serve, tmp_path):
    answers = {
        "a cold day in may": "",
        "the same words here": "The same, words HERE!",
        "take 3 of them": "take four of them",
        "say this in short": "no",
        "a fine text that is cut": (200, {}, completion("a fine", "length")),
        "is it cold today?": "it is cold on this day",
        "the film is not good": "the film is a fine one",
        "a good one": "one that is good",
    }
    server = serve(lambda body: answers[asked(body).rpartition("Text:\n")[2]])
    rows = [{"text": text, "label": 1} for text in answers]
    rows.append({"tokens": ["a", "b"], "ner_tags": ["O", "O"]})
    done = augment(
        str(write(tmp_path / "in.jsonl", rows)), tmp_path / "out.jsonl", augmentation(of_server(server, ["paraphrase"]))
    )
    assert [r["text"] for r in read(tmp_path / "out.jsonl") if "_parent" in r] == ["one that is good"]
    reasons = [row["reason"] for row in read(tmp_path / "out.refused.jsonl")]
    for reason, part in zip(
        reasons,
        ("no text", "same words", "other numbers", "shorter", "cut", "question", "negates", "words would move"),
        strict=True,
    ):
        assert part in reason
    assert done["refused"]["paraphrase"] == Counter(reasons)


def test_what_models_put_around_an_answer():
    assert bare('Sure, here it is:\n"go on"', "keep going") == "go on"
    assert bare("Text: go on", "keep going") == "go on"
    assert bare('"go" and "on"', "keep going") == '"go" and "on"'
    assert bare('"go on"', '"keep going"') == '"go on"'


COMMAND = [sys.executable, "-m", "luthier", "data", "augment"]


def test_a_kill_costs_no_answer(serve, tmp_path):
    """Killed in the midst of asking, it asks only what was not answered, and ends with the same bytes."""
    source = write(tmp_path / "in.jsonl", PROMPTS)
    halfway, go = threading.Event(), threading.Event()
    lock, served = threading.Lock(), []

    def slow(body):
        with lock:
            served.append(asked(body))
            count = len(served)
        if count > 25 and not go.is_set():
            halfway.set()
            go.wait(60)
        return reversed_words(body)

    server = serve(slow)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENAI_API_KEY": KEY}
    command = [
        *COMMAND,
        str(source),
        str(tmp_path / "out.jsonl"),
        "--way",
        "paraphrase",
        "--base-url",
        server.url,
        "--model",
        "small",
        "--set",
        "model.parallel=4",
    ]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    assert halfway.wait(60)
    process.kill()
    process.wait()
    go.set()
    ran = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert max(Counter(served).values()) <= 2
    assert len(served) <= 40 + 4
    augment(str(source), tmp_path / "whole.jsonl", augmentation(of_server(server, ["paraphrase"])))
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    for path in [*tmp_path.rglob("*")]:
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    assert KEY.encode() not in ran.stdout + ran.stderr
    assert f"Bearer {KEY}" in server.keys


# ---------------------------------------------------------------------------- self-instruct


SEEDS = [
    {"instruction": text, "input": "", "output": "x"}
    for text in (
        "Name three colours of autumn leaves",
        "Write a rhyme about the sea",
        "Explain why bread rises",
        "Translate good morning into Dutch",
        "Sort these words by length",
    )
]
KINDS = ["recipe", "riddle", "letter", "poem", "slogan", "proverb", "limerick", "dialogue", "speech", "toast"]
THINGS = ["owls", "rivers", "lamps", "clocks", "tunnels", "kites", "castles", "gardens", "comets", "bakers"]


def writer(body: dict) -> str:
    text = asked(body)
    if not text.startswith("Below are tasks"):
        return f"An answer to: {text}"
    start = body["seed"]
    lines = [
        f"Compose a {KINDS[(start + i) % 10]} concerning {THINGS[(start // 10 + i) % 10]} quickly" for i in range(5)
    ]
    lines += ["Draw a picture of a cat", "Too short", re.findall(r"^1\. (.*)$", text, re.M)[0]]
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))


def test_self_instruct_makes_new_rows_like_the_given_ones(serve, tmp_path):
    server = serve(writer)
    ways = {"self_instruct": {"count": 8, "requests": 2, "shown": 4}}
    held = write(tmp_path / "v.jsonl", [{"instruction": "compose a riddle concerning OWLS, quickly", "output": "y"}])
    recipe = augmentation(of_server(server, ways), {"validation": str(held), "seed": 4})
    source = write(tmp_path / "in.jsonl", SEEDS)
    done = augment(str(source), tmp_path / "out.jsonl", recipe)
    rows = read(tmp_path / "out.jsonl")
    new = [row for row in rows if "_parent" in row]
    assert rows[:5] == SEEDS
    assert done["new"] == len(new) == 8
    assert done["ways"] == {"self_instruct": 8}
    for row in new:
        assert row["instruction"].startswith("Compose")
        assert row["output"] == f"An answer to: {row['instruction']}"
        parents = [row["_parent"], *row["_parent"]["others"]]
        assert {p["row"] for p in parents} <= set(range(5))
        assert all(p["file"] == str(source) for p in parents)
        assert row["instruction"] != "Compose a riddle concerning owls quickly"
    every = [row["instruction"] for row in rows]
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for i, text in enumerate(every):
        assert all(scorer.score(other, text)["rougeL"].fmeasure < 0.7 for other in every[:i])
    shown = asked(server.asked[0])
    assert sum(seed["instruction"] in shown for seed in SEEDS) == 4
    count = len(server.asked)
    assert augment(str(source), tmp_path / "out.jsonl", recipe) == done
    assert len(server.asked) == count


def test_self_instruct_goes_on_after_an_error(serve, tmp_path):
    broken = threading.Event()
    lock, served = threading.Lock(), []

    def answer(body):
        with lock:
            served.append(json.dumps(body))
            if len(served) > 7 and not broken.is_set():
                return 401, {}, b"no more money"
        return writer(body)

    server = serve(answer)
    source = str(write(tmp_path / "in.jsonl", SEEDS))
    recipe = augmentation(of_server(server, {"self_instruct": {"count": 8, "requests": 2}}, parallel=1))
    with pytest.raises(ServerError, match="no more money"):
        augment(source, tmp_path / "out", recipe)
    broken.set()
    done = augment(source, tmp_path / "out", recipe)
    assert done["new"] == 8
    assert sorted(Counter(served).values())[-2:] == [1, 2]  # only what failed was asked again
    augment(source, tmp_path / "whole", recipe)
    for path in (tmp_path / "whole").glob("*.jsonl"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "whole").glob("*.jsonl"))) == 2


def test_self_instruct_ends_where_nothing_new_comes(serve, tmp_path):
    server = serve(lambda body: "1. Write a rhyme about the sea" if "Below" in asked(body) else "x")
    way = {"self_instruct": {"count": 12, "requests": 2, "patience": 3}}
    done = augment(
        str(write(tmp_path / "in.jsonl", SEEDS)), tmp_path / "out.jsonl", augmentation(of_server(server, way))
    )
    assert done["new"] == 0
    assert len(server.asked) == 6
    with pytest.raises(DataError, match="no row is of a format with answers"):
        augment(
            str(write(tmp_path / "l.jsonl", [{"text": "a", "label": 1}])),
            tmp_path / "o.jsonl",
            augmentation(of_server(server, way)),
        )


def test_lines_that_may_be_instructions():
    way = SelfInstruct()
    text = "1. Tell me a joke\n2) **Count the vowels in it**\nno number\nTask 3: Show me a graph of it\n4. Go"
    assert way.instructions(Answer(text)) == ["Tell me a joke", "Count the vowels in it"]
    assert way.instructions(Answer("1. Tell me a joke\n2. Name all of the", cut=True)) == ["Tell me a joke"]


@given_by(st.lists(st.sampled_from("abcdef")), st.lists(st.sampled_from("abcdef")))
def test_the_longest_common_subsequence(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert rouge.common(a, b) == table[-1][-1]


@hypothesis_settings(deadline=None)
@given_by(st.text("ab c,1", max_size=40), st.text("ab c,1", max_size=40))
def test_rouge_l_is_that_of_rouge_score(a, b):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    expected = scorer.score(a, b)["rougeL"].fmeasure
    assert rouge.rouge_l(rouge.words(a), rouge.words(b)) == pytest.approx(expected)
    pool = rouge.Pool()
    pool.add(a)
    assert pool.like(b, 0.7) == (rouge.rouge_l(rouge.words(a), rouge.words(b)) >= 0.7)


# ---------------------------------------------------------------------------- preferences


def sums(body: dict) -> str:
    """Right where its seed is even; as a grader it gives right answers an 8."""
    text = asked(body)
    if text.startswith("You grade"):
        a, b = map(int, re.findall(r"add (\d+) and (\d+)", text)[0])
        return "8/10" if f"\n{a + b}\n" in text else "I would say 3."
    a, b = map(int, re.findall(r"\d+", text))
    return str(a + b + body["seed"] % 2 * (1 + body["seed"] % 7))


@pytest.mark.parametrize("judge", [False, True])
def test_pairs_of_the_best_and_the_worst_answer(serve, tmp_path, judge):
    server = serve(sums)
    ranked = (
        {"judge": {"kind": "openai", "base_url": server.url, "name": "judge"}}
        if judge
        else {"rewards": ["exact_match"]}
    )
    source = write(tmp_path / "in.jsonl", PROMPTS[:12])
    recipe = augmentation(of_server(server, {"preferences": {"samples": 6, **ranked}}, temperature=1.0))
    done = augment(str(source), tmp_path / "out.jsonl", recipe)
    rows = read(tmp_path / "out.jsonl")
    assert done["new"] == len(rows) >= 9
    assert all("_parent" in row for row in rows)
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected", "score_chosen", "score_rejected", "_parent"}
        given = PROMPTS[row["_parent"]["row"]]
        assert row["prompt"] == [{"role": "user", "content": given["prompt"]}]
        assert row["chosen"] == [{"role": "assistant", "content": given["completion"]}]
        assert row["rejected"][0]["content"] != given["completion"]
        assert (row["score_chosen"], row["score_rejected"]) == ((8, 3) if judge else (1, 0))
    from luthier.data import formats, sources

    form, taken = formats.first_recognised(sources.read(str(tmp_path / "out.jsonl")), {}, "pairs")
    assert formats.converted(taken[0], form, {}).rejected
    assert {body["model"] for body in server.asked} == ({"small", "judge"} if judge else {"small"})


def test_what_cannot_be_ranked(serve, tmp_path):
    server = serve(lambda body: "always this")
    source = write(tmp_path / "in.jsonl", [{"prompt": "a b c"}, {"text": "x y", "label": 1}])
    recipe = augmentation(of_server(server, {"preferences": {"rewards": ["exact_match"]}}))
    done = augment(str(source), tmp_path / "out.jsonl", recipe)
    assert done["new"] == 0
    assert sum(done["refused"]["preferences"].values()) == 2
    assert {reason.split(" ")[0] for reason in done["refused"]["preferences"]} == {"the", "it"}
    other = serve(lambda body: f"answer {body['seed']}")
    with pytest.raises(RewardError, match=r"in.jsonl:1: .*no column 'answer'"):
        augment(
            str(source),
            tmp_path / "out2.jsonl",
            augmentation(of_server(other, {"preferences": {"rewards": ["exact_match"]}})),
        )


@pytest.mark.parametrize(
    ("ways", "more", "problem"),
    [
        ({"preferences": {}}, {}, "give `rewards`, or a `judge`"),
        ({"preferences": {"rewards": ["exact_match"]}, "words": {}}, {}, "rows of another kind"),
        ({"preferences": {"rewards": ["exact_match"]}}, {"given": True}, "rows of another kind than the given"),
        ({"preferences": {"rewards": ["exact_mach"]}}, {}, "rewards"),
        ({"preferences": {"rewards": [{"kind": "function", "name": "f"}]}}, {}, "in Python"),
        ({"self_instruct": {"copies": 2}}, {}, "leave out copies"),
    ],
)
def test_recipes_that_contradict_themselves(ways, more, problem):
    model = {"kind": "openai", "base_url": "http://localhost:1", "name": "m"}
    with pytest.raises(ConfigError, match=problem):
        augmentation({"ways": ways, "model": model, **more})


def test_grades():
    for text, found in [
        ("8", 8),
        ("Grade: 7.5", 7.5),
        ("9/10", 9),
        ("**10**", 10),
        ("0", None),
        ("none", None),
        ("100%", None),
    ]:
        assert grade(text) == found, text


# ---------------------------------------------------------------------------- a model of ours


def of_ours(folder: Path, ways, **more) -> dict:
    return {
        "ways": ways,
        "model": {"kind": "luthier", "name": str(folder), "max_new_tokens": 12, "temperature": 1.0, **more},
    }


def test_our_own_model_answers_the_same_after_a_kill(tiny_model, tmp_path, monkeypatch):
    from luthier.prepare.augment import answering

    source = write(tmp_path / "in.jsonl", [{"prompt": f"say {n}"} for n in range(6)])
    ways = {"preferences": {"samples": 3, "rewards": [{"kind": "regex", "pattern": "[a-m]"}]}}
    recipe = augmentation(of_ours(tiny_model, ways, max_new_tokens=8))
    with monkeypatch.context() as patch:
        patch.setattr(answering.Answerer, "__call__", _uncut(answering.Answerer.__call__))
        augment(str(source), tmp_path / "whole.jsonl", recipe)
    answers = tmp_path / ".whole.jsonl.luthier.answers"
    kept = {path.name: path.read_bytes() for path in answers.rglob("*.json")}
    assert len(kept) >= 18
    for number, path in enumerate(sorted(answers.rglob("*.json"))):
        if number % 2:
            path.unlink()  # as a kill in the midst of a batch leaves it
    with monkeypatch.context() as patch:
        patch.setattr(answering.Answerer, "__call__", _uncut(answering.Answerer.__call__))
        augment(str(source), tmp_path / "again.jsonl", recipe.model_copy(update={"cache": str(answers)}))
    assert {path.name: path.read_bytes() for path in answers.rglob("*.json")} == kept
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert read(tmp_path / "whole.jsonl")


def _uncut(call):
    """A random model seldom ends its answers; they are taken as if it had."""
    return lambda self, questions: [answer._replace(cut=False) for answer in call(self, questions)]


def test_a_model_of_ours_is_in_one_process_and_must_be_able_to_talk(tiny_model, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"prompt": "say 1", "completion": "1"}])
    recipe = augmentation(of_ours(tiny_model, ["paraphrase"]))
    with pytest.raises(ConfigError, match="in one process"):
        augment(str(source), tmp_path / "out.jsonl", recipe, workers=2)
    from conftest import save_model

    silent = save_model(tmp_path / "silent", template=None)
    with pytest.raises(ConfigError, match="no chat template"):
        augment(str(source), tmp_path / "out.jsonl", augmentation(of_ours(silent, ["paraphrase"])))
