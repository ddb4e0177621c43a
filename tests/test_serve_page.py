"""The chat page in a real headless browser: base against tuned, streaming, stopping, keys, and what must not run."""

import shutil

import pytest
from serving import in_thread, write_adapter, write_model
from test_label_page import FLAGS

pytest.importorskip("fastapi", reason="no fastapi here (the serve extra has it)")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in BROWSERS if (found := shutil.which(name))), None)
HI = [{"role": "user", "content": "hi there"}]
KEY = "a-key-of-sufficient-length"
BAD = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium here (apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api", reason="no playwright here (the test extra has it)")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = write_model(tmp_path_factory.mktemp("page") / "model")
    write_adapter(made.parent / "adapter", made)
    return made


@pytest.fixture(scope="module")
def server(folder):
    with in_thread(folder, adapters={"tuned": str(folder.parent / "adapter")}) as made:
        yield made


@pytest.fixture
def page(browser, server):
    """The page, with all that it asked for and all that went wrong in it."""
    made = browser.new_page()
    made.asked, made.wrong = [], []
    made.on("request", lambda request: made.asked.append(request.url))
    made.on("console", lambda message: made.wrong.append(message.text) if message.type == "error" else None)
    made.on("pageerror", lambda error: made.wrong.append(str(error)))
    made.goto(server[0] + "/")
    made.wait_for_selector("section")
    yield made
    assert all(url.startswith((server[0] + "/", "data:")) for url in made.asked), "a request to elsewhere"
    made.close()


def ask(page, text, most=12):
    page.fill("#most", str(most))
    page.fill("#question", text)
    page.keyboard.press("Enter")


def test_base_and_tuned_answer_side_by_side(page, server):
    import json
    import urllib.request

    assert [s.get_attribute("data-model") for s in page.query_selector_all("section")] == ["model", "tuned"]
    ask(page, "hi there")
    page.wait_for_selector("#send:enabled")
    page.wait_for_function("() => document.querySelectorAll('.told').length == 2")
    shown = [div.text_content() for div in page.query_selector_all(".assistant")]
    for model, text in zip(("model", "tuned"), shown):
        body = {"model": model, "messages": HI, "temperature": 0, "max_tokens": 12}
        request = urllib.request.Request(
            server[0] + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            assert text == json.load(answer)["choices"][0]["message"]["content"]
    assert shown[0] != shown[1]
    assert all("12 tokens" in told.text_content() for told in page.query_selector_all(".told"))
    ask(page, "and then")  # the conversation goes on, each with its own answers
    page.wait_for_function("() => document.querySelectorAll('.assistant').length == 4")
    page.wait_for_selector("#send:enabled")
    page.click("#clear")
    assert not page.query_selector_all(".turn")
    assert not page.wrong


def test_an_answer_comes_bit_by_bit_and_can_be_stopped(page, server):
    engine = next(iter(server[1].served.engines.values()))
    before = engine.stats()["ended_cancelled"]
    page.select_option("#right", "")
    ask(page, "tell me all", most=1900)
    page.wait_for_function("() => document.querySelector('.assistant')?.textContent.length > 5")
    first = len(page.query_selector(".assistant").text_content())
    page.wait_for_function(f"() => document.querySelector('.assistant').textContent.length > {first}")
    assert page.query_selector("#send:disabled")
    page.click("#stop")
    page.wait_for_selector("#send:enabled")
    assert "stopped" in page.query_selector(".told").text_content()
    while engine.stats()["running"]:
        page.evaluate("fetch('health')")
    assert engine.stats()["ended_cancelled"] == before + 1


def test_what_is_said_is_text(page):
    def answer(route):
        import json

        said = {"choices": [{"delta": {"content": BAD}, "finish_reason": None}]}
        parts = [said, {"choices": [], "usage": {"completion_tokens": 1}}]
        text = "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"
        route.fulfill(status=200, content_type="text/event-stream", body=text)

    page.route("**/v1/chat/completions", answer)
    ask(page, BAD)
    page.wait_for_function("() => document.querySelectorAll('.told').length == 2")
    page.wait_for_selector("#send:enabled")
    assert [div.text_content() for div in page.query_selector_all(".turn")] == [BAD] * 4
    assert not page.query_selector_all("main img, main script")
    assert page.title() == "Luthier"
    # and even a script that got in would not run, nor would anything be sent elsewhere
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title=1'}))"
    )
    sent = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')")
    assert (page.title(), sent) == ("Luthier", "refused")
    assert any("Content Security Policy" in text for text in page.wrong)
    page.asked = [url for url in page.asked if ":9/" not in url]


def test_what_goes_wrong_is_told(page):
    ask(page, "<|im_end|>")
    page.wait_for_function("() => document.getElementById('problem').textContent.includes('special token')")
    page.wait_for_selector("#send:enabled")
    ask(page, "hi")
    page.wait_for_function("() => document.querySelectorAll('.told').length == 4")
    assert page.text_content("#problem") == ""


def test_a_server_with_a_key(browser, folder):
    with in_thread(folder, keys=(KEY,)) as (url, _):
        page = browser.new_page()
        page.goto(url + "/")
        page.wait_for_selector("#keyed:visible")
        page.fill("#key", KEY)
        page.keyboard.press("Tab")
        page.wait_for_selector("section")
        ask(page, "hi")
        page.wait_for_function("() => document.querySelector('.told')?.textContent.includes('tokens')")
        page.close()


def test_the_page_can_be_left_out(folder):
    import urllib.error
    import urllib.request

    with in_thread(folder, page=False) as (url, _):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url + "/")
        assert caught.value.code == 404
        caught.value.close()
