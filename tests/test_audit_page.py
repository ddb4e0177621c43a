"""The page of an audit in a real headless browser: findings, links, nothing run, nothing fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from luthier.prepare.audit import audit
from luthier.prepare.recipe import recipe

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
ATTACK = "<script>document.title='owned'</script><img src=http://127.0.0.1:9/x.png onerror=document.title='owned'>"
SOUND = "The {}. number is followed by {}, as that is how one counts."


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
def audited(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    rows = [{"text": SOUND.format(n, n + 1), "label": "ab"[n % 2]} for n in range(60)]
    rows += [{"text": f"Write to ann{n}@corp.com, {ATTACK}", "label": ATTACK} for n in range(55)]
    rows += [{"text": "Itâ€™s mine.", "label": "a"}, {"text": f"{ATTACK}\u202e caf\ufffd", "label": "b"}, rows[0]]
    source = folder / "<b>rows&amp;.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + f"{{{ATTACK}\n")
    audit(str(source), folder / "out", recipe(), workers=1)
    return folder / "out"


@pytest.fixture
def opened(browser, audited):
    """(the page, what it asked for, what its console said)."""
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((audited / "audit.html").as_uri())
    yield page, asked, said
    context.close()


def test_the_page_asks_for_nothing_and_runs_nothing(opened, audited):
    page, asked, said = opened
    assert asked == [(audited / "audit.html").as_uri()]
    assert said == []
    assert page.title().startswith("Audit of ")
    assert "<b>rows&amp;.jsonl" in page.title()
    assert page.locator("script, img, iframe, link, object").count() == 0
    assert "<script>" in page.locator("section#balance").inner_text()  # what rows say is text


def test_the_page_lists_what_the_verdict_and_the_findings_have(opened, audited):
    page, _, _ = opened
    verdict = json.loads((audited / "verdict.json").read_text())
    findings = [json.loads(line) for line in (audited / "findings.jsonl").read_text().splitlines()]
    assert page.locator("header strong").inner_text() == "faulty" == verdict["verdict"]
    tiles = dict(zip(page.locator(".totals dt").all_inner_texts(), page.locator(".totals dd").all_inner_texts()))
    assert (tiles["rows"], tiles["unreadable rows"]) == ("119", "1")
    overview = page.locator("#checks tbody tr")
    assert overview.count() == len(verdict["checks"])
    for place, (kind, one) in enumerate(verdict["checks"].items()):
        cells = overview.nth(place).locator("th, td").all_inner_texts()
        assert cells[:2] == [kind, f"{one['rows']:,}"]
        assert cells[-1] == ("sound" if one["sound"] else "faulty")
        listed = page.locator(f"section#{kind} [aria-label=Findings] tbody tr")
        mine = [found for found in findings if found["check"] == kind]
        assert listed.count() == min(len(mine), 50)
        for at in (0, listed.count() - 1) if listed.count() else ():
            row, where, what, _ = listed.nth(at).locator("td").all_inner_texts()
            assert (f"{mine[at]['row']:,}", mine[at]["what"]) == (row, what)
            assert where.endswith(f":{mine[at]['row'] + 1}")
    assert {"structure", "encoding", "personal_data", "exact_duplicates"} <= set(verdict["faults"])


def test_links_lead_to_their_checks_and_long_texts_break(opened):
    page, _, _ = opened
    for links in (page.locator("nav a"), page.locator("#checks tbody a")):
        for at in range(links.count()):
            link = links.nth(at)
            target = link.get_attribute("href")
            link.click()
            assert page.url.endswith(target)
            box = page.locator(target).bounding_box()
            assert box is not None
            assert -1 <= box["y"] < 800  # it is in sight
    for width in (1100, 390):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_headings_say_what_each_check_is(opened):
    page, _, _ = opened
    names = page.locator("main section > h2").all_inner_texts()
    assert len(names) == len(set(names))
    assert not [name for name in names if "_" in name or name.islower()]
