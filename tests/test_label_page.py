"""The labelling page in a real headless browser: keys, spans, preferences, edits, kills, people at once, attacks."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from luthier.cli import main
from luthier.data import sources
from luthier.errors import CheckpointError, ConfigError, DataError
from luthier.prepare.label.plan import plan
from luthier.prepare.label.project import Project
from luthier.prepare.label.server import Desk, Server, order

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="no playwright here (the test extra has it)")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


class Labelling:
    """The page of some rows, served from this process as `luthier data label page` does it."""

    def __init__(self, folder: Path, rows: list[dict], *settings: str, per_row: int | None = None):
        self.source, self.out = folder / "rows.jsonl", folder / "out.jsonl"
        self.source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.project = Project(str(self.source), self.out, plan(*settings))
        self.project.__enter__()
        self.server = Server(Desk(self.project, "ann", per_row))
        self.url = self.server.url
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self) -> None:
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()
            self.project.__exit__()

    def end(self) -> dict:
        told = self.project.write()
        self.stop()
        return told

    def rows(self, name: str = "out.jsonl") -> list[dict]:
        return read(self.out.with_name(name))

    def journal(self) -> list[dict]:
        return [json.loads(line) for line in (self.project.folder / "said.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def labelling(*arguments, **more) -> Iterator[Labelling]:
    made = Labelling(*arguments, **more)
    try:
        yield made
    finally:
        made.stop()


def read(path: Path) -> list[dict]:
    return [row.values for row in sources.read(str(path))] if path.exists() and path.stat().st_size else []


@contextlib.contextmanager
def command(folder: Path, *settings: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The command itself, and its address."""
    given = [part for one in settings for part in ("--set", one)]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "luthier",
            "data",
            "label",
            "page",
            "rows.jsonl",
            "out.jsonl",
            *given,
            "--by",
            "ann",
            "--json",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    try:
        said = ""
        while not said.startswith("label here: "):
            said = process.stderr.readline()
            assert said, process.stdout.read()
        yield process, said.removeprefix("label here: ").strip()
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


class Page:
    """The page as a person has it before them; whatever the browser complains of is kept."""

    def __init__(self, browser, url: str, name: str = "ann"):
        self.context = browser.new_context()
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("body[data-ready]")
        self.page.fill("#by", name)
        self.settled(lambda: self.page.press("#by", "Enter"))

    def settled(self, act) -> None:
        before = self.page.get_attribute("body", "data-ready")
        act()
        self.page.wait_for_function("before => document.body.dataset.ready !== before", arg=before)

    def press(self, *keys: str) -> None:
        """Keys, each of which the server answers."""
        for key in keys:
            self.settled(lambda key=key: self.page.keyboard.press(key))

    def keys(self, *keys: str) -> None:
        """Keys that the page answers by itself."""
        for key in keys:
            self.page.keyboard.press(key)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def end(self) -> None:
        self.context.close()


REVIEWS = [{"text": f"review {i}", "id": i} for i in range(5)]
CLASSES = ("task.kind=classes", "task.labels=[good, bad]")


def test_classes_by_keys_undone_skipped_and_killed(browser, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in REVIEWS))
    out, journal = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.luthier" / "said.jsonl"
    with command(tmp_path, *CLASSES, "task.instructions=Is the writer content?") as (process, url):
        page = Page(browser, url)
        assert page.text("#texts .said") == "review 0"
        assert page.text("#instructions") == "Is the writer content?"
        page.press("1", "2", "s")  # good, bad, skipped
        assert page.text("#told") == "2 of 5 labelled, 1 skipped"
        assert page.text("#texts .said") == "review 3"
        page.press("1", "u")
        assert page.text("#texts .said") == "review 3"  # again, as its label was taken back
        page.press("2")
        process.kill()
        process.wait()
        assert not out.exists()
        page.press("1")
        assert "cannot be reached" in page.text("#problem")
        page.end()
    with open(journal, "ab") as file:  # what a kill in the middle of a line leaves
        file.write(b'{"row": 4, "by": "ann", "lab')
    with command(tmp_path, *CLASSES) as (process, url):
        page = Page(browser, url)
        assert page.text("#texts .said") == "review 4"
        page.press("1")
        assert page.text("#end").startswith("Nothing is left to label.")
        page.settled(lambda: page.page.click("#again"))
        assert page.text("#texts .said") == "review 2"
        page.press("2")
        assert page.problems == []
        assert {urlsplit(asked).netloc for asked in page.requests} <= {urlsplit(url).netloc, ""}
        page.end()
        process.terminate()
        told = json.loads(process.communicate(timeout=60)[0])
        assert process.returncode == 0
    assert read(out) == [
        {**REVIEWS[i], "label": label} for i, label in enumerate(["good", "bad", "bad", "bad", "good"])
    ]
    assert told["labelled"] == 5
    assert told["labels"] == {"bad": 3, "good": 2}
    assert [e["row"] for e in map(json.loads, journal.read_text().splitlines()) if e.get("undone")] == [3]


def test_several_classes_toggle_and_are_saved_by_enter(browser, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}, {"text": "x"}]
    with labelling(
        tmp_path, rows, "task.kind=classes", "task.labels=[cheap, quick, kind]", "task.several=true"
    ) as made:
        page = Page(browser, made.url)
        assert page.page.locator("#texts .role").all_inner_texts() == ["user", "assistant"]
        page.keys("3", "2", "1", "2")
        assert page.page.locator("#choices [aria-pressed=true]").all_inner_texts() == ["cheap 1", "kind 3"]
        page.press("Enter", "Enter")  # the second row is of no class
        page.end()
        made.end()
        assert [row["labels"] for row in made.rows()] == [["cheap", "kind"], []]


def test_spans_by_keys_and_by_mouse(browser, tmp_path):
    rows = [{"text": "👩 Ann Lee went to Rome."}, {"tokens": ["Bo", "saw", "York"]}]
    with labelling(tmp_path, rows, "task.kind=spans", "task.labels=[PER, LOC]") as made:
        page = Page(browser, made.url)
        page.keys("ArrowRight", "Shift+ArrowRight", "1")  # from the emoji to Ann, and Lee with it
        word = page.page.locator(".word[data-at='5']")
        word.dblclick()  # Rome
        page.keys("2")
        assert page.page.locator("#words .tag").all_inner_texts() == ["PER", "LOC"]
        page.press("Enter")
        boxes = [page.page.locator(f".word[data-at='{i}']").bounding_box() for i in (0, 2)]
        page.page.mouse.move(boxes[0]["x"] + 2, boxes[0]["y"] + 8)  # drag from Bo to York
        page.page.mouse.down()
        page.page.mouse.move(boxes[1]["x"] + boxes[1]["width"] - 2, boxes[1]["y"] + 8)
        page.page.mouse.up()
        page.page.wait_for_selector(".word[data-at='2'].chosen")
        page.keys("2")
        assert page.page.locator(".word[data-at].inside").count() == 3
        page.page.locator(".word[data-at='1']").click()
        page.page.wait_for_selector(".word[data-at='1'].at")
        page.keys("Backspace")  # no entity after all
        assert page.page.locator(".word.inside").count() == 0
        page.keys("ArrowLeft", "1")
        page.press("Enter")
        assert page.problems == []
        page.end()
        made.end()
        assert made.rows() == [
            {
                "tokens": ["👩", "Ann", "Lee", "went", "to", "Rome", "."],
                "tags": ["O", "B-PER", "I-PER", "O", "O", "B-LOC", "O"],
            },
            {"tokens": ["Bo", "saw", "York"], "tags": ["B-PER", "O", "O"]},
        ]


def test_preferences_are_shuffled_and_the_order_is_kept(browser, tmp_path):
    rows = [{"prompt": f"question {i}", "a": f"first {i}", "b": f"second {i}"} for i in range(8)]
    orders = [order("ann", i) for i in range(8)]
    assert ["a", "b"] in orders
    assert ["b", "a"] in orders
    with labelling(tmp_path, rows, "task.kind=preference") as made:
        page = Page(browser, made.url)
        for i, shown in enumerate(orders[:7]):
            names = {"a": f"first {i}", "b": f"second {i}"}
            assert page.page.locator("#answers .said").all_inner_texts() == [names[one] for one in shown]
            assert page.text("#texts .said") == f"question {i}"
            page.press("a" if shown[0] == "a" else "ArrowRight")  # always the first column
        page.press("t")
        page.end()
        told = made.end()
        assert made.rows() == [
            {"prompt": f"question {i}", "chosen": f"first {i}", "rejected": f"second {i}"} for i in range(7)
        ]
        assert [entry["shown"] for entry in made.journal()] == orders
        assert [row["why"] for row in made.rows("out.aside.jsonl")] == ["tie"]
        assert told["aside"] == {"tie": 1}


def test_answers_are_edited(browser, tmp_path):
    rows = [{"prompt": "2 + 2?", "completion": "5"}, {"prompt": "3 + 3?", "completion": "6"}, {"prompt": "u?"}]
    with labelling(tmp_path, rows, "task.kind=edit") as made:
        page = Page(browser, made.url)
        assert page.page.input_value("#edited") == "5"
        page.page.fill("#edited", "4 <b>\nus")
        page.keys("u", "s")  # letters are letters here
        page.press("Control+Enter", "Alt+s")
        page.page.fill("#edited", "")
        page.press("Control+Enter")
        assert page.text("#problem") == "the answer is empty"
        page.page.fill("#edited", "you")
        page.press("Control+Enter", "Alt+u")
        page.page.fill("#edited", "me")
        page.press("Control+Enter")
        page.end()
        made.end()
        assert made.rows() == [{"prompt": "2 + 2?", "completion": "4 <b>\nusus"}, {"prompt": "u?", "completion": "me"}]


ATTACKS = [
    "<script>document.title = 'owned'; fetch('http://127.0.0.1:9/')</script>",
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "\u202e<svg onload=alert(3)>",
    "{{7*7}} ${alert(4)} javascript:alert(5)",
]


@pytest.mark.parametrize("kind", ["classes", "spans", "preference", "edit"])
def test_rows_are_text_and_never_markup(browser, tmp_path, kind):
    """In every place where a row, a label, or an instruction is shown."""
    if kind == "preference":
        rows = [{"prompt": text, "a": text, "b": text[::-1]} for text in ATTACKS]
    elif kind == "edit":
        rows = [{"prompt": text, "completion": text} for text in ATTACKS]
    else:
        rows = [{"text": text} for text in ATTACKS]
    settings = [f"task.kind={kind}", f"task.instructions={json.dumps(ATTACKS[1])}"]
    labels = ["<img src=x onerror=alert(6)>", "<b>"]
    with labelling(
        tmp_path, rows, *settings, *([f"task.labels={json.dumps(labels)}"] if kind in ("classes", "spans") else [])
    ) as made:
        page = Page(browser, made.url, "<script>alert(7)</script>")
        for text in ATTACKS:
            seen = page.page.evaluate(
                "document.getElementById('work').textContent + document.getElementById('edited').value"
            )
            assert text in seen
            assert (
                page.page.evaluate("document.querySelectorAll('main img, main svg, main script, main b').length") == 0
            )
            page.press("s" if kind != "edit" else "Alt+s")
        assert page.page.title() == "Label rows"
        assert page.problems == []
        assert {urlsplit(url).netloc for url in page.requests} == {urlsplit(made.url).netloc}
        page.end()


def test_several_people_at_once(browser, tmp_path):
    rows = [{"text": f"review {i}"} for i in range(4)]
    with labelling(tmp_path, rows, *CLASSES) as made:
        ann, bo = Page(browser, made.url), Page(browser, made.url, "bo")
        ann.press("1", "1", "2", "2")
        bo.press("1", "1", "1", "2")
        told_page = ann.page
        told_page.click("#write")
        told_page.wait_for_selector("#written:not(:empty)")
        assert ann.text("#written") == f"3 rows written to {made.out}, 1 aside"
        assert len(made.rows()) == 3
        ann.end()
        bo.end()
        told = made.end()
        assert [row["label"] for row in made.rows()] == ["good", "good", "bad"]
        [aside] = made.rows("out.aside.jsonl")
        assert (aside["row"], aside["why"], aside["labels"]) == (2, "disagreed", {"ann": "bad", "bo": "good"})
    # agreed 3/4; by chance 1/2 x 3/4 + 1/2 x 1/4 = 1/2
    assert told["agreement"]["pairs"] == {"ann, bo": {"rows": 4, "same": 0.75, "cohen": 0.5}}
    assert told["agreement"]["annotators"] == {"ann": 4, "bo": 4}


def test_rows_are_shared_out(browser, tmp_path):
    rows = [{"text": f"review {i}"} for i in range(3)]
    with labelling(tmp_path, rows, *CLASSES, per_row=1) as made:
        ann, bo = Page(browser, made.url), Page(browser, made.url, "bo")
        assert (ann.text("#texts .said"), bo.text("#texts .said")) == ("review 0", "review 1")
        bo.press("1")
        assert bo.text("#texts .said") == "review 2"
        ann.press("2")
        assert ann.text("#end").startswith("Nothing is left")  # bo has the last one before them
        bo.press("2")
        ann.end()
        bo.end()
        made.end()
        assert [row["label"] for row in made.rows()] == ["bad", "good", "bad"]


def test_two_windows_of_one_annotator(browser, tmp_path):
    """What the first one said of a row is not undone in silence by the second, which still shows it."""
    with labelling(tmp_path, REVIEWS, *CLASSES) as made:
        one, other = Page(browser, made.url), Page(browser, made.url)
        one.press("1")
        for key in ("2", "s"):
            other.press(key)
            assert other.text("#problem").endswith("was done in another window of ann; here is the next one")
            assert other.text("#texts .said") == one.text("#texts .said")
            one.press("1")
        assert [(entry["row"], entry["label"]) for entry in made.journal()] == [(i, "good") for i in range(3)]
        other.press("2")  # row 2, which was done meanwhile, too
        other.press("2", "u", "1")
        assert [entry.get("label") for entry in made.journal()][3:] == ["bad", None, "good"]
        one.end()
        other.end()


def test_the_address_of_a_server_that_ended(browser, tmp_path):
    with labelling(tmp_path, REVIEWS, *CLASSES) as made:
        page = Page(browser, made.url)
        made.server.token = "another"  # as one that was started anew at the same port has it
        page.press("1")
        assert "open the one that the new server printed" in page.text("#problem")
        page.end()
        assert made.journal() == []


def test_long_texts_are_laid_out_in_parts(browser, tmp_path):
    """Letters without a blank may break, as a browser takes minutes for them otherwise, and much text waits."""
    long = "A" * 2500 + " \U0001f469 " + "b" * 150_000
    with labelling(tmp_path, [{"text": long}, {"text": "short"}], *CLASSES) as made:
        page = Page(browser, made.url)
        shown = page.page.evaluate("document.querySelector('.said').textContent")
        assert shown == long[:99_999]  # 100,000 units of UTF-16
        assert page.page.locator(".said wbr").count() == 2 + 97
        assert page.text(".rest") == "Show the other 52,504 characters"
        page.page.click(".rest")
        assert page.page.evaluate("document.querySelector('.said').textContent") == long
        page.press("2")
        assert page.page.locator(".rest").count() == 0
        assert page.problems == []
        page.end()


def test_a_key_in_a_row_of_many_words_draws_what_changes(browser, tmp_path):
    words = [f"w{i}" for i in range(5000)]
    with labelling(tmp_path, [{"tokens": words}], "task.kind=spans", "task.labels=[A, B]") as made:
        page = Page(browser, made.url)
        page.page.evaluate(
            "window.drawn = 0; new MutationObserver((found) => { window.drawn += found.length; })"
            ".observe(document.getElementById('words'), {subtree: true, childList: true, attributes: true})"
        )
        page.keys("ArrowRight", "Shift+ArrowRight", "1", "ArrowRight")
        assert 0 < page.page.evaluate("window.drawn") < 40
        word = page.page.locator(".word[data-at='4000']")
        word.click()
        page.keys("2")
        page.press("Enter")
        assert [entry["label"] for entry in made.journal()] == [[[3, 8, "A"], [22890, 22895, "B"]]]
        page.end()


def test_text_from_right_to_left(browser, tmp_path):
    """It begins at the right, and the arrow to the left goes on in it."""
    rows = [{"text": "שלום עולם, ABC DEF זה מבחן\nplain"}, {"text": "plain words here"}]
    with labelling(tmp_path, rows, "task.kind=spans", "task.labels=[A]") as made:
        page = Page(browser, made.url)

        def left(i: int) -> float:
            return page.page.locator(f".word[data-at='{i}']").bounding_box()["x"]

        assert left(0) > left(1) > left(3)
        page.keys("ArrowLeft", "1", "ArrowRight", "ArrowLeft", *["ArrowLeft"] * 4, "1")
        page.keys("ArrowLeft", "ArrowLeft", "1")  # at the last word of the line and over to the next one
        page.press("Enter")
        assert left(0) < left(1) < left(2)
        page.keys("ArrowRight", "1")
        page.press("Enter")
        assert page.problems == []
        page.end()
        made.end()
        assert [row["tags"] for row in made.rows()] == [
            ["O", "B-A", "O", "O", "O", "B-A", "O", "B-A"],
            ["O", "B-A", "O"],
        ]


def test_an_answer_that_is_accepted_stays_as_it_was(browser, tmp_path):
    rows = [{"prompt": "p", "completion": "a\r\nb\rc"}, {"prompt": "p", "completion": "a\r\nb"}]
    with labelling(tmp_path, rows, "task.kind=edit") as made:
        page = Page(browser, made.url)
        page.press("Control+Enter")
        page.page.locator("#edited").press_sequentially("!")
        page.press("Control+Enter")
        page.end()
        made.end()
        assert next(row["completion"] for row in made.rows()) == "a\r\nb\rc"
        assert "!" in made.rows()[1]["completion"]


# ---------------------------------------------------------------------------- requests that are no page's


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with labelling(tmp_path_factory.mktemp("served"), REVIEWS, *CLASSES) as made:
        yield made


def ask(url: str, path: str | None = None, body: object = None, method: str | None = None, **headers: str):
    """(state, headers, text) of a request; of a POST with the headers of the page itself, unless others are given."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    if data is not None:
        given = {"Origin": f"http://{parts.netloc}", "Content-Type": "application/json"} | given
    connection.putrequest(
        method or ("GET" if data is None else "POST"), parts.path if path is None else path, skip_host="Host" in given
    )
    for name, value in ({"Content-Length": str(len(data))} if data is not None else {}).items():
        given.setdefault(name, value)
    for name, value in given.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(data)
    answer = connection.getresponse()
    made = answer.status, dict(answer.getheaders()), answer.read().decode()
    connection.close()
    return made


def test_the_page_is_closed_to_all_but_itself(served):
    state, headers, text = ask(served.url)
    assert state == 200
    assert "<!doctype html>" in text
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    base = urlsplit(served.url).path
    for path in (
        "/",
        "/x/",
        base[:-1],
        base[:-2] + "/",
        f"{base}../rows.jsonl",
        f"{base}rows.jsonl",
        f"{base}..%2f..%2fetc/passwd",
        f"{base}api/task",
        f"/..{base}",
        f"{base}//etc/passwd",
        f"{base}page.js",
        "/%C3%A9/",
        "*",
        "x",
    ):
        state, _, text = ask(served.url, path)
        assert state == 404, path
        assert "review" not in text
        assert "root:" not in text
    port = urlsplit(served.url).port
    assert ask(served.url, Host=f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1.evil.example:{port}", ""):
        assert ask(served.url, Host=host)[0] == 403


def test_other_sites_can_do_nothing(served):
    api = urlsplit(served.url).path + "api/"
    body = {"by": "eve", "row": 0, "label": "good"}
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": None},
        {"Sec_Fetch_Site": "cross-site"},
        {"Origin": "https://127.0.0.1"},
    ):
        assert ask(served.url, f"{api}label", body, **headers)[0] == 403
    assert ask(served.url, f"{api}label", body, Content_Type="text/plain")[0] == 415
    assert ask(served.url, f"{api}label", body, Content_Type="application/x-www-form-urlencoded")[0] == 415
    assert ask(served.url, "/wrong-token/api/label", body)[0] == 404
    assert ask(served.url, f"{api}label", None)[0] == 404  # GET
    assert ask(served.url, f"{api}label", body, method="PUT")[0] == 501
    journal = served.out.parent / ".out.jsonl.luthier" / "said.jsonl"
    assert journal.read_bytes() == b""
    assert ask(served.url, f"{api}next", {"by": "eve"})[0] == 200  # as the page asks


@pytest.mark.parametrize(
    ("what", "body", "state"),
    [
        ("label", {"by": "ann", "row": 99, "label": "good"}, 400),
        ("label", {"by": "ann", "row": -1, "label": "good"}, 400),
        ("label", {"by": "ann", "row": True, "label": "good"}, 400),
        ("label", {"by": "ann", "row": 0, "label": "great"}, 400),
        ("label", {"by": "ann", "row": 0, "label": {"a": []}}, 400),
        ("label", {"by": "", "row": 0, "label": "good"}, 400),
        ("label", {"by": "a\nb", "row": 0, "label": "good"}, 400),
        ("label", {"by": "x" * 65, "row": 0, "label": "good"}, 400),
        ("label", {"row": 0, "label": "good"}, 400),
        ("next", {"by": ["ann"]}, 400),
        ("undo", {"by": "nobody"}, 400),
        ("__class__", {"by": "ann"}, 404),
        ("label", b"[" * 100000, 400),
        ("label", b"\xff", 400),
        ("label", [], 400),
    ],
)
def test_requests_that_are_wrong(served, what, body, state):
    told = ask(served.url, urlsplit(served.url).path + "api/" + what, body)
    assert told[0] == state, told
    assert "error" in json.loads(told[2])


def test_large_requests_are_not_read(served):
    api = urlsplit(served.url).path + "api/label"
    assert ask(served.url, api, b"", Content_Length=str(1 << 40))[0] == 413
    assert ask(served.url, api, b"", Content_Length="-1")[0] == 413


def test_two_processes_cannot_label_the_same(served):
    again = Project(str(served.source), served.out, plan(*CLASSES))
    with pytest.raises(CheckpointError, match="another process"), again:
        pass
    assert again.rows.closed


# ---------------------------------------------------------------------------- what comes out


def test_what_was_labelled_is_written_without_the_page(tmp_path, capsys):
    rows = [{"text": f"review {i}"} for i in range(3)] + [{"no": "text"}]
    with labelling(tmp_path, rows[:3], *CLASSES) as made:
        desk = made.server.desk
        desk("label", {"by": "ann@x.example", "row": 0, "label": "good"})
        desk("label", {"by": "bo", "row": 0, "label": "good"})
        desk("label", {"by": "bo", "row": 1, "label": "bad"})
        desk("skip", {"by": "bo", "row": 2})
        made.stop()
    project = tmp_path / "project.json"
    given = [
        "data",
        "label",
        "page",
        str(made.source),
        str(made.out),
        "--set",
        CLASSES[0],
        "--set",
        CLASSES[1],
        "--write",
    ]
    assert main([*given, "--label-studio", str(project)]) == 0
    said = capsys.readouterr().out
    assert "labelled        2" in said
    assert "ann@x.example, bo: 1.000 the same of 1" in said
    assert read(made.out) == [{"text": "review 0", "label": "good"}, {"text": "review 1", "label": "bad"}]
    tasks = json.loads(project.read_text())
    assert [len(task["annotations"]) for task in tasks] == [2, 1, 0]
    assert tasks[0]["annotations"][0]["completed_by"] == {"email": "ann@x.example"}
    assert tasks[0]["annotations"][1]["luthier_by"] == "bo"
    back = [
        "data",
        "label",
        "import",
        str(project),
        str(tmp_path / "back.jsonl"),
        "--set",
        CLASSES[0],
        "--set",
        CLASSES[1],
    ]
    assert main([*back, "--quiet"]) == 0
    assert read(tmp_path / "back.jsonl") == read(made.out)


def test_the_output_follows_what_is_taken_back(tmp_path):
    with labelling(tmp_path, REVIEWS, *CLASSES) as made:
        desk = made.server.desk
        for row, by, label in ((0, "ann", "good"), (0, "bo", "bad"), (1, "ann", "good")):
            desk("label", {"by": by, "row": row, "label": label})
        assert made.project.write()["labelled"] == 1
        assert len(made.rows("out.aside.jsonl")) == 1
        desk("undo", {"by": "bo"})
        desk("undo", {"by": "ann"})
        told = made.project.write()
        assert made.rows() == [{**REVIEWS[0], "label": "good"}]
        assert "aside_rows" not in told
        assert not made.out.with_name("out.aside.jsonl").exists()
        desk("undo", {"by": "ann"})
        assert made.project.write()["labelled"] == 0
        assert made.rows() == []


def test_another_task_or_another_source_is_refused(tmp_path):
    with labelling(tmp_path, REVIEWS, *CLASSES) as made:
        pass
    with pytest.raises(CheckpointError, match=r"task.labels\[1\] was \"bad\" and is now \"poor\""):
        Project(str(made.source), made.out, plan("task.kind=classes", "task.labels=[good, poor]"))
    Project(str(made.source), made.out, plan(*CLASSES, "task.instructions=Told better.")).rows.close()
    made.source.write_text(json.dumps({"text": "other"}) + "\n")
    with pytest.raises(CheckpointError, match="was begun otherwise: inputs"):
        Project(str(made.source), made.out, plan(*CLASSES))
    other = tmp_path / "there.jsonl"
    other.write_text("{}")
    with pytest.raises(ConfigError, match="exists"):
        Project(str(made.source), other, plan(*CLASSES))


def test_rows_that_cannot_be_labelled_are_told_of(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "one"}\n{"number": 3}\nnot JSON\n{"text": "two"}\n')
    said = []
    with Project(
        str(source), tmp_path / "out.jsonl.gz", plan("task.kind=spans", "task.labels=[X]"), said.append
    ) as project:
        assert [project.values(i)["text"] for i in range(len(project))] == ["one", "two"]
        assert project.place(1) == f"{source}:4"
        assert said == [
            f"2 of 4 rows cannot be labelled, the first: {source}:2: it has neither `tokens`, a list of words, "
            "nor a `text` with words; name it in task.columns"
        ]
        project.journal.add("ann", 1, [[0, 3, "X"]])
        project.write()
    assert read(tmp_path / "out.jsonl.gz") == [{"tokens": ["two"], "tags": ["B-X"]}]
    source.write_text('{"number": 3}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: it has neither"):
        Project(str(source), tmp_path / "none.jsonl", plan("task.kind=spans", "task.labels=[X]"))
    assert not (tmp_path / ".none.jsonl.luthier" / "rows.jsonl").exists()


def test_a_damaged_journal_is_named(tmp_path):
    with labelling(tmp_path, REVIEWS, *CLASSES) as made:
        made.server.desk("label", {"by": "ann", "row": 0, "label": "good"})
    journal = made.project.folder / "said.jsonl"
    journal.write_bytes(b"garbage\n" + journal.read_bytes())
    again = Project(str(made.source), made.out, plan(*CLASSES))
    with pytest.raises(CheckpointError, match=r"said\.jsonl:1: damaged"), again:
        pass


def test_a_full_disk_keeps_nothing_half_and_says_so(tmp_path, monkeypatch):
    with labelling(tmp_path, REVIEWS, *CLASSES) as made:
        api = urlsplit(made.url).path + "api/label"
        assert ask(made.url, api, {"by": "ann", "row": 0, "label": "good"})[0] == 200
        before = (made.project.folder / "said.jsonl").read_bytes()

        def full(_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("luthier.prepare.label.journal.os.fsync", full)
            state, _, text = ask(made.url, api, {"by": "ann", "row": 1, "label": "good"})
        assert state == 500
        assert "not kept" in json.loads(text)["error"]
        assert (made.project.folder / "said.jsonl").read_bytes() == before
        assert ask(made.url, api, {"by": "ann", "row": 1, "label": "bad"})[0] == 200
        assert [entry["label"] for entry in made.journal()] == ["good", "bad"]
