"""luthier data audit on real rows with planted faults: recall and precision of each check, peers, speed, memory.

    pip download --no-binary :all: --no-deps vaderSentiment==3.3.2
    pip install --no-deps home-assistant-intents python-stdnum phonenumbers   # what is planted is made by these
    pip install --no-deps ftfy wcwidth py3langid detect-secrets               # peers, each of which may be left out
    python benchmarks/audit.py vaderSentiment-3.3.2.tar.gz                    # recall and precision, and peers beside
    python benchmarks/audit.py --speed 1000000                 # rows a second and memory, rows of 500 characters
    python benchmarks/audit.py --speed 1000000 --short         # rows of 60

Base: paragraphs of Python's manual, snippets of film reviews (Hutto and Gilbert 2014), descriptions of Debian's
packages (apt-cache), as answers to a question. Planted, each into rows of its own: equal rows, UTF-8 read as Latin-1
and Windows-1252 once and twice, control and invisible characters, what could not be decoded, addresses and numbers made
by python-stdnum and libphonenumber, keys of the makers' forms, answers that refuse, rows in 40 languages (sentences of
Home Assistant's voice commands), wrong orders of roles, lengths far out. Numbers and keys stand in the middle of a
sentence, without a word before them that tells what they are. Everything found in a row in which it was not planted
counts against precision, though the base has some real ones, which are printed. Refusals come from a list that was
written with the check in mind: their recall says least. Trigrams of the languages were counted in texts of which the
planted sentences are a part, too.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import re
import resource
import string
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

QUESTIONS = ("What can you tell me about this?", "Please say a few words on it.", "What does the text say?", "Go on.")
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


# ---------------------------------------------------------------------------- the base


def python_manual() -> list[str]:
    from pydoc_data import topics

    paragraphs = (" ".join(p.split()) for topic in topics.topics.values() for p in topic.split("\n\n"))
    return [p for p in paragraphs if 60 < len(p) < 900]


def snippets(source: Path) -> list[str]:
    with tarfile.open(source) as outer:
        inner = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(inner)) as archive:
            lines = archive.extractfile(SNIPPETS).read().decode("utf-8", "replace").splitlines()  # type: ignore[union-attr]
    return [text for line in lines if len(text := line.split("\t", 2)[2].strip()) > 40 and "\ufffd" not in text]


def debian() -> list[str]:
    try:
        told = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line[13:] for line in told.splitlines() if line.startswith("Description: ") and len(line) > 50]


def row(text: str, rng: random.Random) -> dict:
    return {"messages": [{"role": "user", "content": rng.choice(QUESTIONS)}, {"role": "assistant", "content": text}]}


# ---------------------------------------------------------------------------- what is planted


def within(text: str, what: str, rng: random.Random) -> str:
    """The text with something between two of its words."""
    words = text.split(" ")
    at = rng.randrange(1, len(words)) if len(words) > 1 else 1
    return " ".join([*words[:at], what, *words[at:]])


def misread(text: str, encoding: str) -> str:
    return "".join(bytes([b]).decode(encoding, "ignore") or chr(b) for b in text.encode())


def drawn(rng: random.Random, count: int, letters: str = string.ascii_letters + string.digits) -> str:
    return "".join(rng.choice(letters) for _ in range(count))


def email(rng: random.Random) -> str:
    names = ["anna", "maria", "john", "li", "omar", "kofi", "ivan", "jose", "sven", "yuki"]
    ends = ["com", "org", "net", "de", "co.uk", "fr", "io", "edu", "com.br"]
    joined = rng.choice([".", "_", "-", "", str(rng.randrange(99))])
    host = drawn(rng, rng.randrange(3, 12), string.ascii_lowercase)
    return f"{rng.choice(names)}{joined}{rng.choice(names)}@{host}.{rng.choice(ends)}"


REGIONS = ("US", "GB", "DE", "FR", "IT", "ES", "IN", "BR", "JP", "CN", "AU", "NL", "SE", "PL", "MX", "ZA", "CH", "TR")


def phone(rng: random.Random) -> str:
    import phonenumbers as p

    while True:
        region = rng.choice(REGIONS)
        example = p.example_number_for_type(
            region, rng.choice([p.PhoneNumberType.MOBILE, p.PhoneNumberType.FIXED_LINE])
        )
        number = p.PhoneNumber(example.country_code, example.national_number // 10000 * 10000 + rng.randrange(10000))
        if p.is_valid_number(number):
            forms = [p.PhoneNumberFormat.INTERNATIONAL] * 3 + [p.PhoneNumberFormat.E164]
            forms += [p.PhoneNumberFormat.NATIONAL] if region in ("US", "FR") else []
            return p.format_number(number, rng.choice(forms))


def card(rng: random.Random) -> str:
    from stdnum import luhn

    prefix, length = rng.choice([("4", 16), ("53", 16), ("2345", 16), ("37", 15), ("6011", 16), ("3530", 16)])
    body = prefix + drawn(rng, length - len(prefix) - 1, string.digits)
    number = body + luhn.calc_check_digit(body)
    mark = rng.choice(["", " ", "-"])
    return mark.join(re.findall(".{1,4}", number)) if length == 16 else number


def iban(rng: random.Random) -> str:
    country, length = rng.choice([("DE", 22), ("FR", 27), ("NL", 18), ("GB", 22), ("ES", 24), ("IT", 27), ("PL", 28)])
    letters = {"NL": 4, "GB": 4, "IT": 1}.get(country, 0)
    body = drawn(rng, letters, string.ascii_uppercase) + drawn(rng, length - 4 - letters, string.digits)
    number = int("".join(str(int(c, 36)) for c in body + country + "00"))
    made = f"{country}{98 - number % 97:02}{body}"
    return made if rng.random() < 0.5 else " ".join(re.findall(".{1,4}", made))


def ip(rng: random.Random) -> str:
    import ipaddress

    while True:
        made = (
            ipaddress.IPv4Address(rng.getrandbits(32))
            if rng.random() < 0.7
            else ipaddress.IPv6Address((0x2600 << 112) | rng.getrandbits(112))
        )
        if made.is_global and not made.is_multicast:
            return str(made)


def national_id(rng: random.Random) -> str:
    from stdnum.br import cpf
    from stdnum.cn import ric
    from stdnum.es import dni
    from stdnum.pl import pesel
    from stdnum.se import personnummer

    day = f"{rng.randrange(50, 99)}{rng.randrange(1, 13):02}{rng.randrange(1, 29):02}"
    forms: list[tuple[Callable, Callable[[str], bool], str]] = [
        (lambda: drawn(rng, 8, string.digits) + rng.choice("TRWAGMYFPDXBNJZSQVHLCKE"), dni.is_valid, ""),
        (
            lambda: (
                f"{drawn(rng, 3, string.digits)}.{drawn(rng, 3, string.digits)}.{drawn(rng, 3, string.digits)}-"
                f"{drawn(rng, 2, string.digits)}"
            ),
            cpf.is_valid,
            "",
        ),
        (lambda: day + drawn(rng, 5, string.digits), pesel.is_valid, ""),
        (lambda: f"{day}-{drawn(rng, 4, string.digits)}", personnummer.is_valid, ""),
        (lambda: f"11010519{day}{drawn(rng, 3, string.digits)}{rng.choice(string.digits + 'X')}", ric.is_valid, ""),
    ]
    make, valid, _ = rng.choice(forms)
    while True:
        made = make()
        if valid(made):
            return made


def jwt(rng: random.Random) -> str:
    parts = [
        {"alg": rng.choice(["HS256", "RS256"]), "typ": "JWT"},
        {"sub": drawn(rng, 10), "iat": rng.randrange(10**9)},
    ]
    coded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*coded, drawn(rng, 43)])


SECRETS: dict[str, Callable[[random.Random], str]] = {
    "aws_key": lambda r: "AKIA" + drawn(r, 16, string.ascii_uppercase + "234567"),
    "github_token": lambda r: r.choice(["ghp_", "gho_", "ghs_"]) + drawn(r, 36),
    "slack_token": lambda r: f"xoxb-{drawn(r, 12, string.digits)}-{drawn(r, 24)}",
    "google_key": lambda r: "AIza" + drawn(r, 35),
    "openai_key": lambda r: r.choice(["sk-", "sk-proj-", "sk-ant-api03-"]) + drawn(r, 48),
    "stripe_key": lambda r: "sk_live_" + drawn(r, 24),
    "jwt": jwt,
    "private_key": lambda r: (
        "-----BEGIN RSA PRIVATE KEY-----\n"
        + "\n".join(drawn(r, 64) for _ in range(4))
        + "\n-----END RSA PRIVATE KEY-----"
    ),
    "assigned": lambda r: f'{r.choice(["api_key", "password", "SECRET_TOKEN"])} = "{drawn(r, 32)}"',
    "password_in_url": lambda r: f"postgres://admin:{drawn(r, 12)}@db.corp.net/main",
}
PERSONAL = {"email": email, "phone": phone, "credit_card": card, "iban": iban, "ip": ip, "national_id": national_id}
REFUSALS = (
    "I'm sorry, but I can't assist with that.",
    "I am sorry, but I cannot provide instructions for doing so.",
    "I apologize, but I'm not able to help with this request.",
    "Sorry, I can't do that.",
    "I cannot fulfill this request.",
    "Unfortunately, I can't provide a link to that.",
    "I'm unable to browse the internet, so I cannot say.",
    "As an AI language model, I cannot form an opinion on this.",
    "I’m really sorry, but I won’t be able to help with this.",
    "I must decline to write that, as it may hurt people.",
    "I'm not able to share private information about people.",
    "My apologies, but I can't comply with that.",
    "I do apologise, but we cannot discuss this here.",
    "I can't help with that, sorry.",
)


def sentences(rng: random.Random) -> Iterator[tuple[str, str]]:
    """(language, text) from the commands of Home Assistant's languages, without their slots."""
    import home_assistant_intents as intents

    folder = Path(intents.__file__).parent / "data"
    texts: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        templates = [s for intent in told["intents"].values() for block in intent["data"] for s in block["sentences"]]
        made = {_expanded(s, rng) for s in templates}
        texts[path.stem] = sorted(s for s in made if len(s) > 12)
    codes = [code for code in texts if len(texts[code]) > 20 and code[:2] != "en"]
    while True:
        code = rng.choice(codes)
        yield code, ". ".join(rng.sample(texts[code], 4))


def _expanded(template: str, rng: random.Random) -> str:
    """One of the sentences of a template: an alternative of each choice, what is optional, no slots."""
    text, before = template, ""
    while text != before:
        before = text
        text = re.sub(r"[(\[]([^()\[\]]*)[)\]]", lambda m: rng.choice(m[1].split("|")), text)
    return " ".join(re.sub(r"\{[^}]*\}|<[^>]*>|[|;]", " ", text).split())


def planted(base: list[str], each: int, rng: random.Random) -> list[tuple[dict, str, str]]:
    """(row, check, what) with a fault each."""
    made: list[tuple[dict, str, str]] = []
    typographic = [t.replace("'", "’") for t in base if "'" in t]
    typographic += [t.replace('"', "“") for t in base if t.count('"') == 1]
    foreign = sentences(rng)

    def add(check: str, what: str, text: str | dict) -> None:
        made.append((row(text, rng) if isinstance(text, str) else text, check, what))

    for number in range(each):
        text = rng.choice(base)
        damaged = rng.choice(typographic) if number % 2 else next(foreign)[1]
        which = "mojibake" if number % 2 else "mojibake, other languages"
        for _ in range(1 + number % 3 // 2):
            damaged = misread(damaged, ("latin-1", "cp1252")[number % 2])
        if damaged.isascii():  # nothing in it that could have been misread
            damaged, which = misread(rng.choice(typographic), "cp1252"), "mojibake"
        add("encoding", which, damaged)
        at = rng.randrange(len(text))
        add("encoding", "control", text[:at] + rng.choice("\x00\x07\x08\x1b\x7f\x92") + text[at:])
        add("encoding", "invisible", text[:at] + rng.choice("\ufeff\u200b\u2060\u202e") + text[at:])
        add("encoding", "replacement", text[:at] + "\ufffd" + text[at:])
        for what, make in PERSONAL.items():
            add("personal_data", what, within(rng.choice(base), make(rng), rng))
        what = list(SECRETS)[number % len(SECRETS)]
        add("secrets", what, within(rng.choice(base), SECRETS[what](rng), rng))
        add("boilerplate", "refusal", row(rng.choice(REFUSALS) + rng.choice(["", " " + rng.choice(base)]), rng))
        made[-1][0]["messages"][0]["content"] += f" This is question {number} of many."
        add("language", "other_language", next(foreign)[1])
        turns = row(text, rng)["messages"]
        turns[0]["content"] += f" This is question {number}."
        wrong = [
            turns[::-1],
            [turns[0], turns[0], turns[1]],
            [turns[0], {**turns[1], "content": " "}],
            [turns[1]],
            turns[:1],
        ]
        add("structure", "wrong", {"messages": rng.choice(wrong)})
        add(
            "length",
            "far",
            {"messages": [{"role": "user", "content": drawn(rng, 4)}, {"role": "assistant", "content": "ok"}]}
            if number % 2
            else " ".join(rng.choice(base) for _ in range(300)),
        )
        add("exact_duplicates", "duplicate", "")
    return made


# ---------------------------------------------------------------------------- what is found


def judge(source: Path, each: int, seed: int) -> None:
    from luthier.prepare.audit import audit
    from luthier.prepare.recipe import recipe

    rng = random.Random(seed)
    packages = debian()
    base = list(dict.fromkeys([*python_manual(), *snippets(source), *rng.sample(packages, min(8000, len(packages)))]))
    rng.shuffle(base)
    faults = planted(base, each, rng)
    rows = [(row(text, rng), "", "") for text in base]
    originals = [r for r, *_ in rows[:each]]
    copies = iter(originals)
    faults = [
        (json.loads(json.dumps(next(copies))) if check == "exact_duplicates" else r, check, what)
        for r, check, what in faults
    ]
    everything = rows + faults
    rng.shuffle(everything)
    everything = [*[(r, "", "") for r in originals], *(e for e in everything if e[1] or e[0] not in originals)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r, *_ in everything)
        path.write_text(lines, encoding="utf-8", errors="surrogatepass")
        settings = ["checks.language.languages=[en]"]
        began = time.perf_counter()
        verdict = audit(str(path), Path(folder) / "audit", recipe(*settings), workers=1)
        seconds = time.perf_counter() - began
        with open(Path(folder) / "audit" / "findings.jsonl", encoding="utf-8") as file:
            findings = [json.loads(line) for line in file]
    print(f"{verdict['rows']:,} rows, {len(faults):,} of them with a planted fault; audited in {seconds:.1f} s\n")
    found: dict[tuple[str, str], set[int]] = defaultdict(set)
    for f in findings:
        found[f["check"], _named(f["check"], f["what"])].add(f["row"])
    truth: dict[tuple[str, str], set[int]] = defaultdict(set)
    for number, (_, check, what) in enumerate(everything):
        if check:
            truth[check, what].add(number)
    abroad = truth.pop(("encoding", "mojibake, other languages"), set())
    truth["encoding", "mojibake"] |= abroad
    found["language", "other_language"] -= abroad  # which they are, too
    findings = [f for f in findings if not (f["check"] == "language" and f["row"] in abroad)]
    everything = [(r, c, w.split(",")[0]) for r, c, w in everything]
    _table(truth, found)
    _strange(everything, findings, truth)
    _peers(everything, truth, abroad)


def _named(check: str, what: str) -> str:
    """Several things that are planted as one: which of the wrong orders, too short or too long."""
    return {"structure": "wrong", "length": "far"}.get(check, what)


def _table(truth: dict, found: dict) -> None:
    print("| check | what | planted | recall | precision |\n| --- | --- | --- | --- | --- |")
    for check, what in truth:
        planted_, got = truth[check, what], found[check, what]
        right = len(planted_ & got)
        print(f"| {check} | {what} | {len(planted_)} | {right / len(planted_):.3f} | {right / max(1, len(got)):.3f} |")
    sums = defaultdict(lambda: [0, 0, 0])
    for (check, what), planted_ in truth.items():
        for place, count in enumerate((len(planted_), len(planted_ & found[check, what]), len(found[check, what]))):
            sums[check][place] += count
    for check, (planted_, right, got) in sums.items():
        print(f"| **{check}** | all | {planted_} | {right / planted_:.3f} | {right / max(1, got):.3f} |")


def _strange(everything: list, findings: list[dict], truth: dict) -> None:
    """What was found where nothing was planted, and what was missed."""
    print("\nfound where it was not planted:")
    shown: dict[str, int] = defaultdict(int)
    for f in findings:
        key = f["check"], _named(f["check"], f["what"])
        if key in truth and f["row"] not in truth[key]:
            shown[f"{key[0]} {key[1]}"] += 1
            if shown[f"{key[0]} {key[1]}"] <= 6:
                text = everything[f["row"]][0]["messages"][-1]["content"]
                spans = f.get("spans")
                cut = text[max(0, spans[0][1] - 30) : spans[0][2] + 30] if spans else text[:90]
                print(f"  {f['check']} {f['what']} ({f['detail'][:40]}): {cut!r}")
    print(dict(shown))
    print("\nmissed:")
    got = {(f["row"], f["check"], _named(f["check"], f["what"])) for f in findings}
    shown.clear()
    for number, (r, check, what) in enumerate(everything):
        if check and (number, check, what) not in got:
            shown[f"{check} {what}"] += 1
            if shown[f"{check} {what}"] <= 4:
                print(f"  {check} {what}: {json.dumps(r['messages'][-1]['content'], ensure_ascii=False)[:160]}")
    print(dict(shown))


# ---------------------------------------------------------------------------- peers


def _peers(everything: list, truth: dict, abroad: set[int]) -> None:
    """Libraries that look for some of the same, on the same rows."""
    print("\n| peer | looks for | recall | precision | rows/s |\n| --- | --- | --- | --- | --- |")
    whole = ["\n".join(m["content"] for m in r["messages"]) for r, *_ in everything]
    answers = [r["messages"][-1]["content"] for r, *_ in everything]
    for name, what, make in PEERS:
        try:
            looks = make()
        except ImportError:
            print(f"| {name} | not installed | | | |")
            continue
        texts = answers if ("language", "other_language") in what else whole
        began = time.perf_counter()
        got = {number for number, text in enumerate(texts) if looks(text)}
        rate = len(texts) / (time.perf_counter() - began)
        wanted = set().union(*(rows for key, rows in truth.items() if key in what or (key[0], "*") in what))
        if texts is answers:
            got -= abroad
        right = len(wanted & got)
        told = ", ".join(sorted({w if w != "*" else c for c, w in what}))
        print(f"| {name} | {told} | {right / len(wanted):.3f} | {right / max(1, len(got)):.3f} | {rate:,.0f} |")


def _ours(module: str, check: str, kind: str) -> Callable:
    def make() -> Callable[[str], Any]:
        from importlib import import_module

        from luthier.prepare.views import view

        settings = {"languages": ["en"]} if kind == "language" else {}
        made = getattr(import_module(f"luthier.prepare.checks.{module}"), check)(**settings)
        if kind == "mojibake":
            return lambda text: any(f.what == "mojibake" for f in made.look(view({"text": text})))
        return lambda text: any(kind in ("", "language", f.what) for f in made.look(view({"text": text})))

    return make


def _ftfy() -> Callable[[str], Any]:
    import ftfy

    config = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        fix_surrogates=False,
        remove_control_chars=False,
        normalization=None,
        fix_c1_controls=False,
    )
    return lambda text: ftfy.fix_text(text, config) != text


def _py3langid() -> Callable[[str], Any]:
    import py3langid

    return lambda text: py3langid.classify(text)[0] != "en"


def _detect_secrets() -> Callable[[str], Any]:
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    plugins = [p() for p in get_mapping_from_secret_type_to_class().values() if "Entropy" not in p.__name__]

    def looks(line: str) -> bool:
        return any(plugin.analyze_line(filename="x", line=line, line_number=1) for plugin in plugins)

    return lambda text: any(map(looks, text.splitlines()))


def _datatrove() -> Callable[[str], Any]:
    from datatrove.data import Document
    from datatrove.pipeline.formatters import PIIFormatter

    formatter = PIIFormatter()
    return lambda text: formatter.format(Document(text=text, id="0").text) != text


PEERS = (
    ("luthier", {("encoding", "mojibake")}, _ours("encoding", "Encoding", "mojibake")),
    ("ftfy", {("encoding", "mojibake")}, _ftfy),
    ("luthier", {("language", "other_language")}, _ours("language", "Language", "language")),
    ("py3langid", {("language", "other_language")}, _py3langid),
    ("luthier", {("secrets", "*")}, _ours("secrets", "Secrets", "")),
    ("detect-secrets", {("secrets", "*")}, _detect_secrets),
    ("luthier", {("personal_data", "*")}, _ours("personal_data", "PersonalData", "")),
    ("datatrove", {("personal_data", "email"), ("personal_data", "ip")}, _datatrove),
)


# ---------------------------------------------------------------------------- speed


def speed(count: int, short: bool, seed: int) -> None:
    """Audit and clean `count` rows in this process, and say how many a second and how much memory."""
    from luthier.prepare.audit import audit
    from luthier.prepare.clean import clean
    from luthier.prepare.recipe import recipe

    rng = random.Random(seed)
    base = python_manual()
    whole = [s for s in re.split(r"(?<=[.!?]) ", " ".join(base)) if 30 < len(s) < 250]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for number in range(count):
                text = rng.choice(whole)[:40] if short else " ".join(rng.choice(whole) for _ in range(5))[:450]
                turns = [{"role": "user", "content": f"Question {number}: go on."}]
                turns.append({"role": "assistant", "content": text})
                file.write(json.dumps({"messages": turns}) + "\n")
        size = path.stat().st_size
        print(f"{count:,} rows, {size / count:.0f} bytes each, in one process; import and start {_peak():.0f} MiB")
        rules = ("structure", "encoding", "secrets", "personal_data", "boilerplate")
        local = {"checks": {kind: {} for kind in rules}}
        cheap = {"checks": {kind: {} for kind in (*rules, "language", "length")}}
        equal = {"checks": {kind: {} for kind in (*rules, "language", "length", "exact_duplicates")}}
        for name, work in (
            (
                "clean, rules of single rows",
                lambda: clean(str(path), Path(folder) / "a.jsonl", recipe(local), workers=1),
            ),
            ("audit, without duplicates", lambda: audit(str(path), Path(folder) / "b", recipe(cheap), workers=1)),
            ("audit, with equal rows", lambda: audit(str(path), Path(folder) / "c", recipe(equal), workers=1)),
            ("clean, the same, twice", lambda: clean(str(path), Path(folder) / "d.jsonl", recipe(equal), workers=1)),
        ):
            began, used = time.perf_counter(), time.process_time()
            work()
            wall, used = time.perf_counter() - began, time.process_time() - used
            rates = f"{count / wall:>9,.0f} rows/s, {count / used:>9,.0f} a second of CPU"
            print(f"  {name:<30} {rates}, peak {_peak():,.0f} MiB", flush=True)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--each", type=int, default=200, help="faults of each kind (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", type=int, metavar="ROWS", help="measure speed and memory on so many rows instead")
    parser.add_argument("--short", action="store_true", help="rows of 60 characters")
    options = parser.parse_args()
    if options.speed:
        speed(options.speed, options.short, options.seed)
    elif options.source is None:
        sys.exit("give the archive of vaderSentiment, or --speed ROWS")
    else:
        judge(options.source, options.each, options.seed)


if __name__ == "__main__":
    main()
