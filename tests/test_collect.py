"""Collecting: every kind of raw document, hostile ones, encodings, long texts, kills; nothing is lost in silence."""

from __future__ import annotations

import io
import json
import mailbox
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from email.message import EmailMessage
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import QUIET, config_of, killed

from luthier import train
from luthier.cli import main
from luthier.data import formats
from luthier.data.sources import Row
from luthier.errors import CheckpointError, ConfigError, DataError
from luthier.monitor import records
from luthier.prepare.card import sha256
from luthier.prepare.collect import base, docx, html, mail, pdf, stream
from luthier.prepare.collect.base import Document, How, Part
from luthier.prepare.collect.collecting import collect, texts_of
from luthier.prepare.collect.encodings import decoded
from luthier.prepare.collect.parting import parted


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def collected(tmp_path, *names, **how):
    report = collect([str(name) for name in names], tmp_path / "out.jsonl", How(**how), workers=1)
    return rows_of(tmp_path / "out.jsonl"), report


def one(tmp_path, name, data, **how):
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return collected(tmp_path, path, **how)


def refused(tmp_path, name, data, **how):
    """The reason in the report of a file that gives nothing."""
    with pytest.raises(DataError, match="nothing was collected"):
        one(tmp_path, name, data, **how)
    assert not (tmp_path / "out.jsonl").exists()
    (entry,) = json.loads((tmp_path / "out.report.json").read_text())["entries"]
    return entry.get("reason") or " ".join({**entry.get("problems", {}), **entry.get("left", {})})


# ---------------------------------------------------------------------------- texts


def test_a_text_has_its_source(tmp_path):
    rows, report = one(tmp_path, "a.txt", "one\r\ntwo\n")
    path = tmp_path / "a.txt"
    assert rows == [{"text": "one\ntwo", "_source": {"file": str(path), "at": {"line": 1}, "sha256": sha256(path)}}]
    assert (report["rows"], report["refused"], report["damaged"], report["entries"]) == (1, 0, 0, [])


@pytest.mark.parametrize(
    ("data", "declared", "wanted", "warned"),
    [
        ("über".encode(), None, "über", False),
        ("über".encode("utf-8-sig"), None, "über", False),
        ("über".encode("utf-16"), None, "über", False),
        ("über".encode("utf-32"), None, "über", False),
        ("über".encode("latin-1"), "iso-8859-1", "über", False),
        ("über".encode("latin-1"), None, "über", True),
        ("“über”".encode("cp1252"), "no-such-charset", "“über”", True),
        ("日本".encode("iso2022_jp"), "iso-2022-jp", "日本", False),  # its bytes are ASCII
        ("日本".encode("shift_jis"), "shift_jis", "日本", False),
        (b"\x81\xff", None, "\ufffdÿ", True),  # 0x81 is nothing in cp1252
        (b"\xff\xab", "zlib", "ÿ«", True),  # a codec, but none of texts
    ],
)
def test_encodings(data, declared, wanted, warned):
    text, warning = decoded(data, declared)
    assert (text, warning is not None) == (wanted, warned)


def test_a_guessed_encoding_is_counted(tmp_path):
    rows, report = one(tmp_path, "a.txt", "für".encode("cp1252"))
    assert rows[0]["text"] == "für"
    assert report["warnings"] == {"neither UTF-8 nor declared: read as cp1252": 1}
    assert report["entries"][0]["warnings"]


@given(st.text(alphabet="ab.# \n。", max_size=200), st.integers(1, 50))
@settings(max_examples=300, deadline=None)
def test_parts_hold_all_but_blanks_and_say_where_they_are(text, most):
    parts = list(parted(text, most))
    assert all(0 < len(part) <= most and text[at : at + len(part)] == part for at, part in parts)
    assert "".join("".join(part for _, part in parts).split()) == "".join(text.split())


def test_long_texts_part_at_headings_and_paragraphs(tmp_path):
    text = "# One\n\n" + "word " * 30 + "\n\n## Two\n\n" + "more " * 20 + "\n\nlast paragraph here\n"
    rows, _ = one(tmp_path, "a.md", text, max_chars=180)
    assert [row["text"].split("\n")[0] for row in rows] == ["# One", "## Two"]
    at = rows[1]["_source"]["at"]
    assert text[at["char"] :].startswith("## Two")
    assert text.split("\n")[at["line"] - 1] == "## Two"


def test_parts_of_pages_say_the_page():
    document = Document([Part("a" * 10, {"page": 1}), Part("b" * 10, {"page": 3})])
    assert list(texts_of(document, 12)) == [("a" * 10, {"page": 1, "char": 0}), ("b" * 10, {"page": 3, "char": 12})]


def test_html_is_its_text(tmp_path):
    page = """<!DOCTYPE html><html><head><title>Fish &amp; Chips</title><style>p{}</style></head><body>
    <nav>Home</nav><header>Logo</header><h1>Heading</h1><p>Caf&eacute;&#x21; a <b>bo</b>ld<br>line</p>
    <script>var x = "<p>no</p>";</script><ul><li>one</li><li>two</ul><pre>a  b
  c</pre><table><tr><th>k</th><th>v</th></tr><tr><td>1</td><td>2</td></tr></table><footer>(c)</footer></body></html>"""
    rows, _ = one(tmp_path, "page", page)  # told by content
    assert rows[0]["title"] == "Fish & Chips"
    assert rows[0]["text"] == "Heading\n\nCafé! a bold\nline\n\n- one\n- two\n\na  b\n  c\n\nk | v\n1 | 2"


def test_html_that_never_closes_its_nav_keeps_its_text():
    assert html.text_of("<nav>menu<p>all of the text")[0].endswith("all of the text")
    assert html.text_of("<nav>menu</nav><p>all of the text")[0] == "all of the text"


@pytest.mark.parametrize("piece", ["<!--", "<td></td>", "<a ", "</", "<?", '<a href="', "<p>", "<nav>", "&#", "<li> "])
def test_hostile_pages_take_no_time(piece):
    began = time.monotonic()
    warnings = Counter()
    text, _ = html.text_of("<body>text " + piece * 40_000 + "x", warnings)
    assert time.monotonic() - began < 5  # quadratic time was 40 s for the first
    assert text.startswith("text")
    assert bool(warnings) == (piece in ("<!--", "<a ", "</", "<?", '<a href="'))


def test_html_has_the_charset_that_it_declares(tmp_path):
    rows, report = one(tmp_path, "a.html", '<html><meta charset="koi8-r"><p>привет</p>'.encode("koi8-r"))
    assert rows[0]["text"] == "привет"
    assert not report["warnings"]


# ---------------------------------------------------------------------------- PDF and DOCX


def pdf_of(path, pages, **more):
    """A PDF by pypdf: a page for each text, in Helvetica."""
    pypdf = pytest.importorskip("pypdf")
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

    made = pypdf.PdfWriter()
    for text in pages:
        page = made.add_blank_page(300, 300)
        font = DictionaryObject({NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1"),
                                 NameObject("/BaseFont"): NameObject("/Helvetica")})  # fmt: skip
        fonts = DictionaryObject({NameObject("/F1"): made._add_object(font)})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        content = DecodedStreamObject()
        content.set_data(f"BT /F1 12 Tf 10 100 Td ({text}) Tj ET".encode() if text else b"")
        page[NameObject("/Contents")] = made._add_object(content)
    made.add_metadata({"/Title": "A title"})
    if more:
        made.encrypt(**more)
    made.write(path)
    return path


def test_pdf_by_page_and_whole(tmp_path):
    path = pdf_of(tmp_path / "a.pdf", ["First page", "", "Third page"])
    rows, report = collected(tmp_path, path, per="page")
    assert [(row["text"], row["title"], row["_source"]["at"]) for row in rows] == [
        ("First page", "A title", {"page": 1}), ("Third page", "A title", {"page": 3}),
    ]  # fmt: skip
    assert report["left"] == {"a page without text, perhaps a picture of it": 1}
    (tmp_path / "whole").mkdir()
    rows, _ = collected(tmp_path / "whole", path)
    assert rows[0]["text"] == "First page\n\nThird page"


def test_pdf_with_a_password_and_broken_ones_are_told(tmp_path):
    assert "password" in refused(tmp_path, "a.pdf", pdf_of(tmp_path / "b.pdf", ["x"], user_password="s").read_bytes())
    whole = pdf_of(tmp_path / "c.pdf", ["x"]).read_bytes()
    assert refused(tmp_path, "a.pdf", whole[: len(whole) // 3])


def test_pdf_without_its_library_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4\n")
    monkeypatch.setattr(pdf, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"luthier\[collect\]"):
        collected(tmp_path, tmp_path / "a.pdf")
    assert not (tmp_path / "out.jsonl").exists()


W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def docx_of(body, styles="", document=None):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", document or f"<w:document {W}><w:body>{body}</w:body></w:document>")
        if styles:
            archive.writestr("word/styles.xml", f"<w:styles {W}>{styles}</w:styles>")
    return made.getvalue()


def paragraph(text, about=""):
    return f"<w:p><w:pPr>{about}</w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>"


def test_docx_has_headings_lists_and_tables(tmp_path):
    def row(*cells):
        return "<w:tr>" + "".join(f"<w:tc>{paragraph(cell)}</w:tc>" for cell in cells) + "</w:tr>"

    def item(text, level):
        return paragraph(text, f'<w:numPr><w:ilvl w:val="{level}"/><w:numId w:val="1"/></w:numPr>')

    body = (
        paragraph("Kapitel", '<w:pStyle w:val="berschrift1"/>') + paragraph("Sub", '<w:pStyle w:val="Heading2"/>')
        + "<w:p><w:r><w:t>a &amp; </w:t></w:r><w:r><w:t>b</w:t><w:tab/><w:t>c</w:t><w:br/><w:t>d</w:t></w:r>"
        + "<w:del><w:r><w:delText>gone</w:delText></w:r></w:del></w:p>"
        + item("one", 0) + item("two", 1) + f"<w:tbl>{row('k', 'v')}{row('1', '2')}</w:tbl>" + paragraph("end")
    )  # fmt: skip
    styles = '<w:style w:styleId="berschrift1"><w:name w:val="heading 1"/></w:style>'
    rows, report = one(tmp_path, "a.docx", docx_of(body, styles))
    assert rows[0]["text"] == "# Kapitel\n\n## Sub\n\na & b\tc\nd\n\n- one\n  - two\n\nk | v\n1 | 2\n\nend"
    assert report["kinds"] == {"docx": {"files": 1, "rows": 1}}


def test_bombs_are_refused(tmp_path, monkeypatch):
    bomb = f"<w:document {W}><w:body><w:p><w:r><w:t>{'a' * (64 << 20)}</w:t></w:r></w:p></w:body></w:document>"
    data = docx_of("", document=bomb)
    assert len(data) < 1 << 20
    assert "unpacks to" in refused(tmp_path, "zip.docx", data)
    entities = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    for encoding in ("utf-8", "utf-16"):
        head = f'<?xml version="1.0" encoding="{encoding}"?>'
        document = f"{head}{entities}<w:document {W}>{paragraph('&b;')}</w:document>".encode(encoding)
        assert "document type" in refused(tmp_path, "entity.docx", docx_of("", document=document))
    monkeypatch.setattr(docx, "LONGEST", 1 << 16)
    assert "unpacks to" in refused(tmp_path, "long.docx", docx_of(paragraph("word " * 20000)))
    assert "no XML" in refused(tmp_path, "broken.docx", docx_of("", document="<w:document"))


def test_other_zips_are_named(tmp_path):
    def archive(name):
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as written:
            written.writestr(name, "x")
        return made.getvalue()

    assert "xlsx" in refused(tmp_path, "a.docx", archive("xl/workbook.xml"))
    assert "unpack it" in refused(tmp_path, "b.zip", archive("any"))
    assert "damaged zip" in refused(tmp_path, "c.docx", docx_of("x")[:60])


# ---------------------------------------------------------------------------- rows


def test_rows_stay_as_they_are_and_training_reads_them(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    row = {"prompt": "a", "completion": "b", "n": 1}
    (folder / "a.jsonl").write_text(json.dumps(row) + "\nnot json\n" + json.dumps({**row, "_source": "before"}))
    (folder / "b.csv").write_text("prompt,completion\nx,y\n")
    (folder / "c.json").write_text(json.dumps([row, 7, row]))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p"], "completion": ["q"]}), folder / "d.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"\xff"]}), folder / "e.parquet")
    (folder / "f.json").write_text('{"one": "object"}')
    rows, report = collected(tmp_path, folder)
    plain = [{k: v for k, v in r.items() if k != "_source"} for r in rows]
    assert plain == [row, row, {"prompt": "x", "completion": "y"}, row, row, {"prompt": "p", "completion": "q"}]
    assert [r["_source"]["at"] for r in rows] == [
        {"line": 1}, {"line": 3}, {"line": 2}, {"row": 0}, {"row": 2}, {"row": 0},
    ]  # fmt: skip
    assert rows[1]["_source"]["source"] == "before"
    assert report["damaged"] == 4
    assert len(report["entries"]) == 4
    for r in rows:
        found = formats.recognise(r, "here", {})
        assert found.name == "prompt_completion"
        assert formats.converted(Row(0, r, "here"), found, {}).messages[-1]["content"] == r["completion"]


def test_sharegpt_becomes_messages(tmp_path):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    tool = [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"}]
    rows, report = one(
        tmp_path, "a.json", json.dumps([{"id": "1", "conversations": turns, "system": "s"}, {"conversations": tool}])
    )
    assert rows[0]["messages"] == [
        {"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
    ]  # fmt: skip
    assert rows[0]["id"] == "1"
    assert rows[1]["conversations"] == tool
    assert report["warnings"] == {"a conversation with tools or unknown speakers, left as it is": 1}


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=4), max_leaves=8))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_the_stream_gives_what_json_gives(value):
    text = json.dumps([value, {"key": value}], indent=1, ensure_ascii=_half(value)).encode()
    for block in (1, 3, 1 << 20):  # borders of blocks lie inside of everything
        made = stream.Stream(io.BytesIO(text), block)
        found = [{key: made.value() for key in made.fields()} if n else made.value() for n in made.items()]
        assert found == [value, {"key": value}]
        made.end()


@pytest.mark.parametrize(
    "text", ["[1 2]", '[{"a" 1}]', "[{a: 1}]", "[1,", "[tru", "[1] x", '["a', "[,]", "[" * 100_000]
)
def test_the_stream_refuses_what_is_no_json(text):
    made = stream.Stream(io.BytesIO(text.encode()), 2)
    with pytest.raises(base.Unreadable, match="JSON"):
        [made.value() for _ in made.items()], made.end()


def _half(value):
    return any("\ud800" <= c <= "\udfff" for c in json.dumps(value, ensure_ascii=False))


# ---------------------------------------------------------------------------- mail


def message(text="Hello\n", page=None, subject="Grüße", **heads):
    made = EmailMessage()
    made["Subject"], made["From"], made["Date"] = subject, "a@example.org", "Tue, 24 Nov 2026 10:00:00 +0100"
    for name, value in heads.items():
        made[name.replace("_", "-")] = value
    if text is not None:
        made.set_content(text)
    if page is not None:
        made.add_alternative(page, subtype="html") if text is not None else made.set_content(page, subtype="html")
    return made


def test_mail_prefers_its_plain_part(tmp_path):
    made = message("Plain ü\n", "<p>Page</p>", Message_ID="<1@x>")
    made.add_attachment(b"\0\1", maintype="application", subtype="octet-stream", filename="x.bin")
    rows, report = one(tmp_path, "a.eml", bytes(made))
    source = rows[0].pop("_source")
    assert rows == [{"text": "Plain ü", "subject": "Grüße", "date": "2026-11-24T10:00:00+01:00"}]
    assert source["at"] == {"message": "<1@x>"}
    assert report["left"] == {"an attachment": 1}


def test_mail_of_html_alone_is_its_text(tmp_path):
    rows, _ = one(tmp_path, "message", bytes(message(None, "<p>Page <b>x</b></p><script>no</script>")))
    assert rows[0]["text"] == "Page x"


def test_mail_of_html_with_a_plain_foot_keeps_both(tmp_path):
    made = message(None, "<p>Page</p>")
    made.make_mixed()
    foot = EmailMessage()
    foot.set_content("The list's foot\n")
    made.attach(foot)
    rows, _ = one(tmp_path, "a.eml", bytes(made))
    assert rows[0]["text"] == "Page\n\nThe list's foot"


def test_an_mbox_is_read_as_the_standard_library_reads_it(tmp_path):
    box = mailbox.mbox(tmp_path / "a.mbox")
    for number in range(5):
        box.add(message(f"Number {number}\nFrom here on\n\nFrom there, 10:00 in 2026\n", Message_ID=f"<{number}@x>"))
    box.close()
    box = mailbox.mbox(tmp_path / "a.mbox")
    wanted = [m.get_payload(decode=True).decode().strip("\n").replace(">From", "From") for m in box]
    box.close()
    (tmp_path / "a.mbox").rename(tmp_path / "inbox")  # told by content
    rows, report = collected(tmp_path, tmp_path / "inbox")
    assert [row["text"] for row in rows] == wanted
    assert [row["_source"]["at"]["message"] for row in rows] == [f"<{number}@x>" for number in range(5)]
    assert report["kinds"] == {"mbox": {"files": 1, "rows": 5}}


def test_quotes_can_be_left_out(tmp_path):
    text = "Yes.\n\nOn Mon, 23 Nov 2026 at 10:00, Bob <b@example.org> wrote:\n> May I?\n> Bob\n\nBest\n"
    assert mail.without_quotes(text) == "Yes.\n\nBest"
    assert mail.without_quotes("Ja\n\nAm 23.11.2026 um 10:00 schrieb Bob:\n> Darf ich?\n") == "Ja"
    assert mail.without_quotes("New\n-----Original Message-----\nFrom: Bob\nold") == "New"
    assert mail.without_quotes("On the whole he wrote: well\n") == "On the whole he wrote: well"
    rows, _ = one(tmp_path, "a.eml", bytes(message(text)), quotes=False)
    assert rows[0]["text"] == "Yes.\n\nBest"


# ---------------------------------------------------------------------------- chats


def test_chatgpt_follows_the_branch_that_was_shown(tmp_path):
    def node(name, parent, role=None, *parts, **more):
        said = role and {"author": {"role": role}, "content": {"content_type": "text", "parts": list(parts)}, **more}
        return {"id": name, "parent": parent, "message": said, "children": []}

    nodes = [
        node("root", None), node("s", "root", "system", ""), node("q", "s", "user", "Question", {"asset": 1}),
        node("old", "q", "assistant", "Old answer"), node("tool", "q", "assistant", "search()", recipient="browser"),
        node("result", "tool", "tool", "found"), node("new", "result", "assistant", "New answer"),
        node("more", "new", "assistant", "and more"),
    ]  # fmt: skip
    mapping = {n["id"]: n for n in nodes}
    talk = {"title": "T", "create_time": 0, "conversation_id": "c1", "mapping": mapping, "current_node": "more"}
    loop = {"mapping": {"a": {**node("a", "a", "user", "x")}}, "current_node": "a"}
    rows, report = one(tmp_path, "conversations.json", json.dumps([talk, loop]))
    source = rows[0].pop("_source")
    assert rows == [{
        "messages": [{"role": "user", "content": "Question"},
                     {"role": "assistant", "content": "New answer\n\nand more"}],
        "title": "T", "date": "1970-01-01T00:00:00+00:00",
    }]  # fmt: skip
    assert source["at"] == {"message": "c1"}
    assert report["left"] == {"a call or an answer of a tool": 2, "a picture or a file in a message": 1,
                              "a conversation without a question and an answer": 1}  # fmt: skip


ANDROID = """23/11/2026, 21:58 - Messages and calls are end-to-end encrypted.
23/11/2026, 21:59 - Ann: Hello
second line
23/11/2026, 22:00 - Bob: <Media omitted>
23/11/2026, 22:01 - Bob: Hi: there
24/11/2026, 08:00 - Ann: Morning
"""
IPHONE = """[11/23/26, 9:59:00\u202fPM] Ann: Hello
[11/23/26, 10:01:00\u202fPM] Bob: Hi: there
\u200e[11/23/26, 10:02:00\u202fPM] Ann: \u200eimage omitted
"""


def test_whatsapp_with_and_without_me(tmp_path):
    rows, report = one(tmp_path, "chat.txt", ANDROID)
    assert [(row["text"], row["date"], row["_source"]["at"]) for row in rows] == [
        ("Ann: Hello\nsecond line\nBob: Hi: there", "2026-11-23", {"line": 2}),
        ("Ann: Morning", "2026-11-24", {"line": 6}),
    ]
    assert sum(report["left"].values()) == 2
    (tmp_path / "me").mkdir()
    rows, report = collected(tmp_path / "me", tmp_path / "chat.txt", me="Bob")
    assert [row["messages"] for row in rows] == [
        [{"role": "user", "content": "Hello\nsecond line"}, {"role": "assistant", "content": "Hi: there"}]
    ]
    assert report["left"]["a stretch of chat in which nothing of Bob was said"] == 1
    (tmp_path / "whole").mkdir()
    rows, _ = collected(tmp_path / "whole", tmp_path / "chat.txt", me="Bob", per="whole")
    assert [m["role"] for m in rows[0]["messages"]] == ["user", "assistant", "user"]


def test_whatsapp_of_an_iphone(tmp_path):
    rows, _ = one(tmp_path, "_chat.txt", IPHONE)
    assert (rows[0]["text"], rows[0]["date"]) == ("Ann: Hello\nBob: Hi: there", "2026-11-23")


def test_a_me_that_nobody_is_is_told(tmp_path):
    assert "nothing of --me Carl; the chat has" in refused(tmp_path, "chat.txt", ANDROID, me="Carl")


def test_telegram_one_chat_and_all(tmp_path):
    def said(number, name, text, **more):
        return {"id": number, "type": "message", "date": "2026-11-23T10:00:00", "from": name, "from_id": f"user{name}",
                "text": text, **more}  # fmt: skip

    link = ["see ", {"type": "link", "text": "x.org"}, "!"]
    chat = {"name": "Talk", "type": "personal_chat", "id": 1, "messages": [
        {"id": 1, "type": "service", "action": "phone_call"}, said(2, "Ann", link), said(3, "Bob", "yes"),
        said(4, "Bob", "", photo="p.jpg"),
    ]}  # fmt: skip
    rows, report = one(tmp_path, "result.json", json.dumps(chat), me="Bob")
    assert rows[0]["messages"] == [
        {"role": "user", "content": "see x.org!"}, {"role": "assistant", "content": "yes"},
    ]  # fmt: skip
    assert rows[0]["_source"]["at"] == {"message": "2"}
    assert report["left"] == {"a line of the program": 1, "a message without text": 1}
    (tmp_path / "all").mkdir()
    whole = {"about": "x", "personal_information": {"user_id": 1}, "chats": {"about": "y", "list": [chat, chat]}}
    rows, _ = one(tmp_path / "all", "result.json", json.dumps(whole))
    assert [(row["text"], row["title"]) for row in rows] == [("Ann: see x.org!\nBob: yes", "Talk")] * 2


def slack_of(folder):
    (folder / "general").mkdir(parents=True)
    users = [{"id": "U1", "name": "ann", "profile": {"display_name": "Ann"}},
             {"id": "U2", "name": "bob", "profile": {}}]  # fmt: skip
    (folder / "users.json").write_text(json.dumps(users))
    (folder / "channels.json").write_text("[]")

    def said(ts, user, text, **more):
        return {"type": "message", "ts": ts, "user": user, "text": text, **more}

    (folder / "general" / "2026-11-23.json").write_text(json.dumps([
        said("1.1", "U1", "joined", subtype="channel_join"), said("1795428000.1", "U1", "hi <@U2> &lt;3"),
        said("3.1", "U2", "see <https://x.org|this>"), said("4.1", "U1", "a question", thread_ts="4.1"),
    ]))  # fmt: skip
    (folder / "general" / "2026-11-24.json").write_text(
        json.dumps([said("5.1", "U2", "an answer", thread_ts="4.1"), said("6.1", "U2", "new day")])
    )
    (folder / "general" / "2026-11-25.json").write_text("broken")
    return folder


def test_slack_has_days_and_threads(tmp_path):
    folder = slack_of(tmp_path / "export")
    rows, report = collected(tmp_path, folder)
    assert [(row["text"], row["date"], Path(row["_source"]["file"]).name) for row in rows] == [
        ("Ann: hi @bob <3\nbob: see this (https://x.org)", "2026-11-23", "2026-11-23.json"),
        ("bob: new day", "2026-11-24", "2026-11-24.json"),
        ("Ann: a question\nbob: an answer", "2026-11-23", "2026-11-23.json"),
    ]
    assert rows[0]["_source"]["at"]["time"] == "2026-11-23T10:00:00+00:00"
    assert rows[0]["_source"]["sha256"] == sha256(folder / "general" / "2026-11-23.json")
    assert any("2026-11-25.json cannot be read" in problem for problem in report["problems"])
    (tmp_path / "me").mkdir()
    rows, _ = collected(tmp_path / "me", folder, me="bob")
    assert [[m["role"] for m in row["messages"]] for row in rows] == [["user", "assistant"]] * 2


# ---------------------------------------------------------------------------- what is hostile


def test_binary_files_are_refused_by_name(tmp_path):
    assert "picture" in refused(tmp_path, "a.txt", b"\x89PNG\r\n\x1a\n" + bytes(100))
    assert "zero bytes" in refused(tmp_path, "b.txt", b"text\0text")
    assert "NUL" in refused(tmp_path, "c.txt", b"a line\n" * 20000 + b"\0")  # beyond what is looked at first
    assert "empty" in refused(tmp_path, "d.txt", b"")
    assert "no text" in refused(tmp_path, "e.txt", b" \n ")
    assert "password" in refused(tmp_path, "f.doc", b"\xd0\xcf\x11\xe0" + bytes(600))


def test_a_line_of_100_mb_is_refused(tmp_path):
    path = tmp_path / "long.txt"
    with open(path, "wb") as file:
        for _ in range(100):
            file.write(b"a" * (1 << 20))
    with pytest.raises(DataError, match="a line is longer than 32 MiB"):
        collected(tmp_path, path)


def test_links_that_turn_in_circles_end(tmp_path):
    folder = tmp_path / "in"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.txt").write_text("text")
    (folder / "inner" / "loop").symlink_to(folder)
    (folder / "lost").symlink_to(folder / "nothing")
    (folder / "a.txt").symlink_to(folder / "inner" / "a.txt")  # found before what it leads to
    (folder / "z.txt").symlink_to(folder / "inner" / "a.txt")
    (folder / ".hidden").write_text("secret")
    os.mkfifo(folder / "pipe")
    rows, report = collected(tmp_path, folder, folder / "inner")
    assert len(rows) == 1
    reasons = {Path(entry["file"]).name: entry["reason"] for entry in report["entries"]}
    assert reasons["loop"].startswith("the same as")
    assert reasons["z.txt"].startswith("the same as")
    assert reasons["lost"] == "a link to nothing"
    assert reasons["pipe"] == "neither a file nor a folder"
    assert reasons[".hidden"].startswith("hidden")
    assert reasons["inner"].startswith("the same as")


def test_our_own_outputs_are_no_documents(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for _ in range(2):  # the second finds what the first wrote
        report = collect([str(tmp_path)], tmp_path / "out.jsonl", How(), workers=1)
        assert (report["rows"], report["entries"]) == (1, [])


def test_a_broken_file_ends_alone(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("good")
    (folder / "b.docx").write_bytes(docx_of("", document="<broken"))
    (folder / "c.json").write_text('[{"text": "kept"}, {"text": ')
    rows, report = collected(tmp_path, folder)
    assert [row["text"] for row in rows] == ["good", "kept"]
    assert report["damaged"] == 2
    assert {Path(entry["file"]).name for entry in report["entries"]} == {"b.docx", "c.json"}


# ---------------------------------------------------------------------------- the whole


def folder_of_many(folder):
    folder.mkdir()
    for number in range(150):
        (folder / f"{number:03}.txt").write_text(f"text {number}\n\n" * (1 + number % 3))
    (folder / "bad.bin").write_bytes(b"\x7fELF\0")
    return str(folder)


def test_processes_and_shards_change_nothing(tmp_path):
    source = folder_of_many(tmp_path / "in")
    collect([source], tmp_path / "one.jsonl", How(max_chars=12), workers=1)
    collect([source], tmp_path / "two.jsonl", How(max_chars=12), workers=2)
    collect([source], tmp_path / "shards", How(max_chars=12), workers=1)
    whole = (tmp_path / "one.jsonl").read_bytes()
    assert whole.count(b"\n") == 300
    assert (tmp_path / "two.jsonl").read_bytes() == whole
    shards = sorted((tmp_path / "shards").glob("*.jsonl"))
    assert len(shards) == 3
    assert b"".join(shard.read_bytes() for shard in shards) == whole
    assert (tmp_path / "shards.report.json").is_file()


def test_a_killed_collection_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    source = folder_of_many(tmp_path / "in")
    collect([source], tmp_path / "whole.jsonl", How(), workers=1)
    rename, told = os.replace, []

    def counted(*given):
        told.append(1)
        rename(*given)

    monkeypatch.setattr(os, "replace", counted)
    collect([source], tmp_path / "counted.jsonl", How(), workers=1)
    for at in range(len(told)):
        left = iter(range(at))

        def dying(*given, left=left):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*given)

        def work(at=at, dying=dying):
            monkeypatch.setattr(os, "replace", dying)
            collect([source], tmp_path / f"{at}.jsonl", How(), workers=1)

        killed(work)
        monkeypatch.setattr(os, "replace", rename)
        collect([source], tmp_path / f"{at}.jsonl", How(), workers=1)
        assert (tmp_path / f"{at}.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        report = (tmp_path / f"{at}.report.json").read_text().replace(f"{at}.", "whole.")
        assert report == (tmp_path / "whole.report.json").read_text()


def test_other_settings_and_other_files_are_another_collection(tmp_path):
    source = folder_of_many(tmp_path / "in")
    collect([source], tmp_path / "out.jsonl", How(), workers=1)
    with pytest.raises(CheckpointError, match="max_chars"):
        collect([source], tmp_path / "out.jsonl", How(max_chars=5), workers=1)
    (tmp_path / "in" / "149.txt").write_text("changed")  # not the first of its batch
    with pytest.raises(CheckpointError, match="inputs"):
        collect([source], tmp_path / "out.jsonl", How(), workers=1)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = folder_of_many(tmp_path / "in")
    assert main(["data", "collect", source, "a.jsonl.gz", "--quiet", "--workers", "1"]) == 0
    assert "binary: a program" in capsys.readouterr().out
    assert main(["data", "collect", source, "b.jsonl", "--json", "--strict", "--quiet", "--workers", "1"]) == 3
    assert json.loads(capsys.readouterr().out)["refused"] == 1
    assert len(rows_of(tmp_path / "b.jsonl")) == 150
    assert main(["data", "collect", str(tmp_path / "in" / "bad.bin"), "c.jsonl", "--quiet"]) == 3
    assert "nothing was collected" in capsys.readouterr().err
    assert main(["data", "collect", "nowhere", "d.jsonl"]) == 3
    assert not (tmp_path / "c.jsonl").exists()
    assert not (tmp_path / "d.jsonl").exists()
    for bad in (["--kind", "word"], ["--per", "day"], ["--max-chars", "0"], ["--me", " "], ["--workers", "0"]):
        assert main(["data", "collect", source, "e.jsonl", *bad]) == 2
    with pytest.raises(ConfigError, match="known are text"):
        collect([source], tmp_path / "f.jsonl", How(kind="word"))


def test_a_kind_can_be_forced(tmp_path):
    rows, _ = one(tmp_path, "a.txt", "<html><p>x</p>", kind="text")
    assert rows[0]["text"] == "<html><p>x</p>"
    (tmp_path / "b").mkdir()
    assert "--kind rows needs a name" in refused(tmp_path / "b", "b.dat", "{}", kind="rows")


def test_nothing_found_leaves_what_was_made_before(tmp_path):
    one(tmp_path, "a.txt", "text")
    (tmp_path / "b.bin").write_bytes(b"\0")
    with pytest.raises(CheckpointError, match="with other documents"):
        collected(tmp_path, tmp_path / "b.bin")
    assert len(rows_of(tmp_path / "out.jsonl")) == 1


def test_training_on_collected_rows_is_that_on_the_rows_themselves(tmp_path, settings):
    losses = []
    source = settings["data"]["train"]
    collect([source], tmp_path / "out.jsonl", How(), workers=1)
    for name in (source, str(tmp_path / "out.jsonl")):
        data = {**settings["data"], "train": name}
        config = config_of(settings | {"data": data, "max_steps": 2, "output_dir": str(tmp_path / Path(name).stem)})
        run = train(config, QUIET)
        losses.append([r["loss"] for r in records(run.folder / "metrics.jsonl") if r["kind"] == "train"])
    assert "_source" in (tmp_path / "out.jsonl").read_text()
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


@pytest.mark.parametrize("name", ["a.pdf", "a.docx", "a.eml", "a.json", "a.html", "a.txt"])
def test_documents_damaged_at_random_never_end_the_run(tmp_path, name):
    telegram = {"name": "x", "messages": [{"id": 1, "type": "message", "from_id": "u", "date": "2026", "text": "x"}]}
    whole = {
        "a.pdf": lambda: pdf_of(tmp_path / "whole", ["One", "Two"]).read_bytes(),
        "a.docx": lambda: docx_of(paragraph("hello") * 20),
        "a.eml": lambda: bytes(message("Hi\n", "<p>x</p>")),
        "a.json": lambda: json.dumps(telegram).encode(),
        "a.html": lambda: b"<html><body><p>x<b>y</b><table><tr><td>1</table>",
        "a.txt": lambda: ANDROID.encode(),
    }[name]()
    chance = random.Random(0)
    (tmp_path / "in").mkdir()
    for number in range(40):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 3, 10))):
            at = chance.randrange(len(data))
            data[at : at + chance.randrange(12)] = chance.randbytes(chance.randrange(3))
        (tmp_path / "in" / f"{number:02}{name}").write_bytes(data)
    (tmp_path / "in" / "good.txt").write_text("good")
    rows, report = collected(tmp_path, tmp_path / "in", max_chars=10, quotes=False)
    from_files = {row["_source"]["file"] for row in rows}
    told = {entry["file"] for entry in report["entries"]}
    assert from_files | told == {str(path) for path in (tmp_path / "in").iterdir()}


@pytest.mark.parametrize("lines", [1, 2])
def test_a_process_of_several_that_is_killed_goes_on(tmp_path, lines):
    """SIGKILL of the whole command, from outside, at another moment each time."""
    source = folder_of_many(tmp_path / "in")
    collect([source], tmp_path / "whole.jsonl", How(), workers=1)
    command = [sys.executable, "-m", "luthier", "data", "collect", source, str(tmp_path / "out.jsonl"),
               "--workers", "2"]  # fmt: skip
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(lines):
        child.stderr.readline()  # documents found; then a piece done
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert subprocess.run([*command, "--quiet"], stdout=subprocess.DEVNULL, check=True).returncode == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
