"""The page of a search in a real browser, and the learning-rate range test."""

import json
import math
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml

import luthier
from luthier.cli import main
from luthier.config import configure
from luthier.errors import ConfigError, SearchError
from luthier.monitor import Console
from luthier.search import lr_range as lr_range_
from luthier.search.lr_range import found, lr_range
from luthier.search.plan import plan
from luthier.search.plots import page, write

QUIET = Console(quiet=True)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser_only = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
HOSTILE = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)>"
STATES = ("complete", "complete", "complete", "pruned", "diverged", "complete")


def report_of(made, metrics=1):
    """A report by hand: six trials, of which three or so have values."""
    trials = []
    for n, state in enumerate(STATES):
        settings = {"optim.learning_rate": 10.0 ** (n - 6), "method": "lora" if n % 2 else "full"}
        if n % 2:
            settings["trainable.r"] = (8, 16)[n % 4 == 1]
        names = [m.name for m in made.metrics]
        values = {name: [2.0 - 0.1 * n, 10.0 + n][i] for i, name in enumerate(names)} if state == "complete" else None
        curve = [[2, 3.0 - 0.1 * n], [4, 2.0 - 0.1 * n]][: 1 + (values is not None)]
        trials.append(
            {"trial": n, "state": state, "settings": settings, "values": values, "steps": 4, "seconds": 1.0,
             "reason": HOSTILE if state == "diverged" else "", "curve": curve, "attempts": 1, "costs": {}}
        )  # fmt: skip
    best = [5] if metrics == 1 else [5, 2, 1, 0]
    return {"trials": trials, "best": best, "importance": {"shares": {}, "note": "few"}, "fresh": None}


def made_of(settings, **more):
    space = {"optim.learning_rate": "log(1e-6, 1)", "method": "[full, lora]", "trainable.r": "[8, 16] if method=lora"}
    return plan(settings | {"evaluation": {"every": 2}}, space=space, trials=6, **more)


@browser_only
def test_the_page_is_drawn_without_a_network_and_says_texts_as_texts(settings, tmp_path):
    """What the browser has made of the page: a point in the history and a line for each trial, no foreign markup."""
    made = made_of(settings)
    made.folder.mkdir()
    write(made, report_of(made))
    path = made.folder / "report.html"
    text = path.read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", text.replace("http://www.w3.org/2000/svg", ""))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    ran = subprocess.run([CHROMIUM, *options, path.as_uri()], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr[-1000:]
    dom = ran.stdout
    names = ("history", "parallel", "curves")
    drawn = {name: re.search(rf"<svg id=\"{name}\".*?</svg>", dom, re.S)[0] for name in names}
    assert drawn["history"].count("<circle") == 6
    assert drawn["history"].count('class="dot best"') == 1
    assert drawn["parallel"].count("<polyline") == 6
    assert drawn["curves"].count("<polyline") == 6
    for name in ("optim.learning_rate", "method", "trainable.r", "eval.loss", "1.00e-6", "full", "16"):
        assert f">{name}</text>" in drawn["parallel"], name
    assert "<title>run-search: a search</title>" in dom
    assert "<img" not in dom
    # the lines go through the places of their values: by hand, of the axis of the rate, which is logarithmic
    places = re.findall(r'points="[\d.]+,([\d.]+) [^"]*"[^>]*data-trial="(\d)"', drawn["parallel"])
    heights = {int(n): float(y) for y, n in places}
    steps = np.diff([heights[n] for n in sorted(heights)])
    assert steps == pytest.approx([(34 - 306) / 6] * 5, abs=0.2)  # a decade each, of six between the ends


@browser_only
@pytest.mark.skipif(not find_spec("playwright"), reason="Playwright is not installed")
def test_the_page_reacts(settings):
    """Pointing tells of a trial and marks it everywhere, a click keeps it, dragging along an axis leaves trials out."""
    from playwright.sync_api import sync_playwright

    made = made_of(settings, metrics=["eval.loss", "parameters"])
    made.folder.mkdir()
    write(made, report_of(made, 2))
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1000, "height": 1600})
        faults, asked = [], []
        tab.on("console", lambda m: faults.append(m.text))
        tab.on("pageerror", lambda e: faults.append(str(e)))
        tab.on("request", lambda r: asked.append(r.url))
        tab.goto((made.folder / "report.html").as_uri())
        told = tab.locator("#told")
        tab.locator("#history circle[data-trial='2']").hover()
        assert told.inner_text().startswith("trial 2, complete: eval.loss 1.8, parameters 12; optim.learning_rate=1")
        assert tab.locator(".chosen").count() == 6  # history, parallel, curve with its end, front, row of the table
        tab.locator("h1").hover()
        assert "Point at a trial" in told.inner_text()
        tab.locator("#front circle[data-trial='1']").click()
        tab.locator("h1").hover()
        assert told.inner_text().startswith("trial 1, complete")  # it is kept
        assert tab.locator("#count").inner_text() == "6 of 6 trials"
        tab.locator("rect[data-axis='optim.learning_rate']").scroll_into_view_if_needed()
        box = tab.locator("rect[data-axis='optim.learning_rate']").bounding_box()
        x, unit = box["x"] + box["width"] / 2, box["height"] / 6
        tab.mouse.move(x, box["y"] + 3.5 * unit)  # between 1e-4 and 1e-3
        tab.mouse.down()
        tab.mouse.move(x, box["y"] + 0.5 * unit, steps=3)
        tab.mouse.up()
        assert tab.locator("#count").inner_text() == "3 of 6 trials"
        assert {int(n) for n in tab.locator("#parallel polyline:not(.out)").evaluate_all(
            "nodes => nodes.map((n) => n.dataset.trial)")} == {3, 4, 5}  # fmt: skip
        assert tab.locator("tr.out").count() == 3
        tab.mouse.click(x, box["y"] + 2 * unit)
        assert tab.locator("#count").inner_text() == "6 of 6 trials"
        tab.locator("tr[data-trial='4']").focus()
        assert HOSTILE in told.inner_text()
        browser.close()
    assert not faults
    assert [url for url in asked if not url.startswith("file:")] == []


def test_a_page_allows_its_own_script_alone(settings):
    """The digests in the policy are those of the script and the style that stand in the page."""
    import base64
    import hashlib

    made = made_of(settings)
    text = page(made, report_of(made))
    policy = re.search(r'Content-Security-Policy content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none'")
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        inner = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        assert len(inner) == 1
        digest = base64.b64encode(hashlib.sha256(inner[0].encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert HOSTILE not in text


# ---------------------------------------------------------------------------- learning-rate range


def test_the_range_by_hand():
    """A loss that falls as a logistic curve over the logarithm of the rate is steepest at its middle."""
    rates = np.logspace(-7, 0, 141)
    losses = 3 - 2 / (1 + np.exp(-3 * (np.log10(rates) + 3)))
    report = found(rates.tolist(), losses.tolist())
    assert math.log10(report["steepest"]) == pytest.approx(-3, abs=0.06)
    assert math.log10(report["least"]) == pytest.approx(0, abs=0.2)
    assert report["diverged"] is None
    rising = losses + np.where(rates > 1e-1, 200 * (np.log10(rates) + 1) ** 2, 0)
    report = found(rates.tolist(), rising.tolist())
    assert math.log10(report["steepest"]) == pytest.approx(-3, abs=0.06)
    assert math.log10(report["least"]) == pytest.approx(-1.2, abs=0.5)
    assert report["diverged"] == rates[-1]
    rng = np.random.default_rng(0)
    report = found(rates.tolist(), (losses + 0.1 * rng.standard_normal(141)).tolist())
    assert math.log10(report["steepest"]) == pytest.approx(-3, abs=0.5)


def test_a_loss_that_never_falls():
    rates = np.logspace(-7, 0, 60).tolist()
    rng = np.random.default_rng(0)
    with pytest.raises(SearchError, match="does not fall"):
        found(rates, (3 + 0.1 * rng.standard_normal(60)).tolist())
    with pytest.raises(SearchError, match="does not fall"):
        found(rates, np.linspace(3, 9, 60).tolist())
    with pytest.raises(SearchError, match="not finite after 3 steps"):
        found(rates[:4], [3.0, 3.0, 3.0, math.inf])


def test_the_rates_of_a_run(settings, tmp_path):
    """Each step's rate is the one before times the same factor, and the rates of groups keep their share."""
    groups = [{"patterns": "*.q_proj.*", "lr_scale": 0.5}]
    values = settings | {"optim": {"learning_rate": 1e-3, "groups": groups}, "schedule": {"kind": "cosine"}}
    made = lr_range(configure(values), QUIET, steps=40, low=1e-5, high=1e-1)
    assert made.report["rates"] == pytest.approx(np.logspace(-5, -1, 40)[: len(made.report["rates"])], rel=1e-6)
    assert made.folder == tmp_path / "run-lr-range"
    assert json.loads((made.folder / "lr_range.json").read_text()) == made.report
    assert "<svg" in (made.folder / "lr_range.html").read_text()
    assert not (made.folder / "run").exists()
    assert 1e-4 < made.report["steepest"] < 1e-1
    again = lr_range(configure(values), QUIET, steps=40, low=1e-5, high=1e-1)
    assert again.report == made.report


def test_a_run_that_diverges_ends_there(settings):
    values = settings | {"method": "full", "optim": {"kind": "sgd", "learning_rate": 1e-3}, "clipping": "none"}
    report = lr_range(configure(values), QUIET, steps=100, low=1e-3, high=1e6).report
    assert report["diverged"]
    assert len(report["rates"]) < 100
    assert report["steepest"] < report["least"] < report["diverged"] < 1e6


def test_the_command(settings, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = ["search", str(file), "--lr-range", "--quiet"]
    assert main([*command, "--lr-steps", "30", "--folder", str(tmp_path / "range")]) == 0
    assert "try  optim.learning_rate=" in capsys.readouterr().out
    assert (tmp_path / "range" / "lr_range.html").exists()
    for more, word in (
        (["--lr-from", "1", "--lr-to", "1e-3"], "the lower one first"),
        (["--lr-steps", "3"], "at least 10 steps"),
        (["--trials", "3"], "leave out --trials"),
        (["trainable.r=[2, 4]"], "leave out trainable.r"),
    ):
        assert main([*command, *more]) == 2
        assert word in capsys.readouterr().err
    assert main(["search", str(file), "trainable.r=[2,4]", "--lr-steps", "30"]) == 2
    assert "--lr-steps is of --lr-range" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "words"), [("--lr-steps", "at least 10 steps"), ("--lr-from", "two rates above 0")])
def test_nothing_is_no_number_of_steps_and_no_rate(settings, tmp_path, capsys, option, words):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["search", str(path), "--lr-range", option, "0"]) == 2
    assert words in capsys.readouterr().err


def test_methods_without_a_loss_to_follow(settings):
    values = settings | {
        "method": "grpo", "objective": {"rewards": ["exact_match"], "num_generations": 2, "max_completion_length": 8},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="does not say what is learnt"):
        lr_range(configure(values), QUIET)
    assert callable(luthier.search)
    assert lr_range_.LEAST == 10
    assert isinstance(Path(settings["output_dir"]), Path)
