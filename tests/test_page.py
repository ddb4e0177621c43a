"""luthier data inspect --html: the page says what training will see, loads nothing, and can be read by everybody."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import make_tokenizer

from luthier.cli import main
from luthier.data import Data, dataset, inspection, page
from luthier.data.masks import Renderer
from luthier.errors import ConfigError

HOSTILE = "</title></style></script><script>alert(1)</script><img src=x onerror=alert(1)>\" ' & \x1b[31m\u202e\x00"
ROWS = [
    {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]}
    for i in range(60)
] + [
    {"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE, "weight": 0.25}]},
    {"messages": [{"role": HOSTILE, "content": "x"}]},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]},
]  # fmt: skip
VOID = {"meta", "br", "rect"}


class Read(HTMLParser):
    """The page as a browser takes it: elements with their attributes, and per row the text with what is marked."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.rows, self.style = [], [], [], ""
        self.feed(text)
        assert not [tag for tag in self.open if tag != "html"], self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if attributes.get("class") == "tokens":
            self.rows.append([])
        if "title" in attributes and tag == "span":
            self.rows[-1].append([attributes["title"], "", "mark" in self.open])

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        elif self.open and self.open[-1] == "span" and self.rows:
            self.rows[-1][-1][1] += data


def make(folder, rows=ROWS, count=None, **data):
    path = folder / "rows <b>.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = Data(train=str(path), **data)
    found = dataset.load(config, str(path), Renderer(make_tokenizer(), "all", config.max_length))
    totals = inspection.totals(found, 512, 0)
    return found, page.page(found, totals, 512, 0, range(len(found) if count is None else count))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    found, text = make(tmp_path_factory.mktemp("page"))
    return found, text, Read(text)


def test_every_token_stands_there_with_its_weight(made):
    found, _, read = made
    assert len(read.rows) == len(found) == 61
    for document, shown in zip(found.documents, read.rows):
        assert "".join(text for _, text, _ in shown) == inspection.visible(
            found.renderer.tokenizer.decode(document.tokens)
        ).replace("\n", "↵\n")
        told = [re.fullmatch(r"tokens? [\d to]+, id ([\d ]+), weight ([\d.]+)", title).groups() for title, *_ in shown]
        assert [int(i) for ids, _ in told for i in ids.split()] == document.tokens.tolist()
        weights = [float(weight) for ids, weight in told for _ in ids.split()]
        assert np.array(weights, np.float32).tolist() == document.weights.tolist()
        assert shown[-1][0].startswith(f"token {len(document.tokens) - 1},")
        assert [marked for *_, marked in shown] == [weight != "0" for _, weight in told]


def test_totals_bad_rows_and_their_places_are_told(made):
    _, text, _ = made
    for told in (
        "<dt>rows</dt><dd>63</dd>", "<dt>bad rows</dt><dd class=bad>2</dd>", ".jsonl:62</td>", ".jsonl:63</td>",
        "<td>empty_answer</td>", "<b>×0.25</b>", "role_order",
    ):  # fmt: skip
        assert told in text


def test_nothing_of_the_data_is_markup_and_nothing_is_loaded(made):
    _, text, read = made
    tags = {tag for tag, _ in read.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "form", "base", "audio", "video"}
    attributes = {name for _, found in read.elements for name in found}
    assert not any(name.startswith("on") or name in ("src", "style", "srcset", "action") for name in attributes)
    assert all(found["href"].startswith("#") for tag, found in read.elements if tag == "a")
    assert "url(" not in read.style
    assert "@import" not in read.style
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", text)
    shown = "".join(piece for _, piece, _ in read.rows[-1])
    assert "<script>alert(1)</script>" in shown
    assert "[U+001B][31m[U+202E][U+0000]" in shown


def test_the_policy_allows_the_one_style_sheet_and_nothing_else(made):
    _, _, read = made
    (policy,) = [a["content"] for tag, a in read.elements if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(read.style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def contrast(one, other):
    """https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio"""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(c * share for c, share in zip(parts, (0.2126, 0.7152, 0.0722)))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_read_in_light_and_dark():
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in page.STYLE.split("@media (prefers")[:2])
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    for colours in (light, dark):
        for text, back in (
            ("text", "back"), ("dim", "back"), ("dim", "even"), ("dim", "panel"), ("text", "panel"), ("bad", "panel"),
            ("learnt", "learnt-back"), ("learnt", "learnt-even"),
        ):  # fmt: skip
            assert contrast(colours[text], colours[back]) >= 4.5, (text, back)
        for mark in ("bar", "rule", "focus"):
            assert contrast(colours[mark], colours["back"]) >= 3, mark


def test_what_is_learnt_is_told_without_colour_and_reached_by_keyboard(made):
    _, text, read = made
    assert re.search(r"mark \{[^}]*border-bottom: 2px solid", read.style)
    assert text.count("<i class=hidden>learnt: </i>") == len(re.findall("<mark><i", text)) == 61
    regions = [a for _, a in read.elements if a.get("role") == "region"]
    assert len(regions) == 62
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    assert len([1 for tag, a in read.elements if tag == "details" and "open" in a]) == 61
    assert ":focus-visible" in read.style
    assert ("html", {"lang": "en"}) in read.elements


def test_parts_of_a_long_text_are_named(tmp_path):
    _, text = make(tmp_path, [{"text": "x" * 200}, {"text": "y"}], max_length=64)
    assert [m[1] for m in re.finditer(r"<summary>row ([^:]*):", text)] == [
        *(f"0 part {i} of 4" for i in (1, 2, 3, 4)), "1"
    ]  # fmt: skip


def test_tokens_that_share_a_character_and_first_spaces_are_shown_right(tmp_path):
    found, _ = make(tmp_path, [{"text": "é🎉 a b"}])
    assert [(p.text, len(p.ids)) for p in inspection.tokens_of(found, 0)] == [
        ("é", 2), ("🎉", 4), (" ", 1), ("a", 1), (" ", 1), ("b", 1), ("<|im_end|>", 1)
    ]  # fmt: skip


def test_the_command_writes_the_page(tmp_path, tiny_model, rows_file, capsys):
    out = tmp_path / "page.html"
    arguments = ["data", "inspect", str(rows_file), "--model", str(tiny_model), "--html", str(out), "--rows", "7"]
    assert main([*arguments, "data.max_length=512"]) == 0  # an override after options
    assert f"written to {out}" in capsys.readouterr().out
    assert len(Read(out.read_text(encoding="utf-8")).rows) == 7
    assert main([*arguments, "--row", "3", "--row", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["html"], sorted(told["tokens_of_rows"])) == (str(out), ["3", "5"])
    assert "row 5: " in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("extra", "told"),
    [(["--html", "rows.jsonl"], "should end in .html"), (["--html", "a.html", "--rows", "-1"], "--rows -1"),
     (["oops", "--html", "a.html", "oops"], "oops"), (["--html", "a.html", "--bogus=1"], "--bogus=1")],
)  # fmt: skip
def test_a_wrong_command_line_is_refused(tiny_model, rows_file, capsys, extra, told):
    assert main(["data", "inspect", str(rows_file), "--model", str(tiny_model), *extra]) == ConfigError.exit_code
    assert told in capsys.readouterr().err
