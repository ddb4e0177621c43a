"""The checks of single rows: what each finds, what it leaves, what its repair gives."""

from __future__ import annotations

import base64
import json
import random
import string
from zlib import crc32

import numpy as np
import pytest

from luthier.errors import ConfigError
from luthier.prepare.checks import CHECKS
from luthier.prepare.checks.boilerplate import Boilerplate
from luthier.prepare.checks.check import Gathered
from luthier.prepare.checks.encoding import Encoding
from luthier.prepare.checks.exact_duplicates import ExactDuplicates, repeated
from luthier.prepare.checks.language import Language
from luthier.prepare.checks.length import Length, bounds, histogram
from luthier.prepare.checks.personal_data import PersonalData
from luthier.prepare.checks.secrets import Secrets, entropy
from luthier.prepare.checks.structure import Structure
from luthier.prepare.languages import language_of
from luthier.prepare.recipe import recipe
from luthier.prepare.views import put, view


def text(value: str, key: str = "text"):
    return view({key: value})


def chat(*turns: str, **more):
    roles = ("user", "assistant") * len(turns)
    return view({"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns)], **more})


def whats(check, seen) -> list[str]:
    return [finding.what for finding in check.look(seen)]


def mended(check, seen) -> str:
    made = check.repair(seen, check.look(seen))
    return made.get(0, seen.texts[0].text)


# ---------------------------------------------------------------------------- views


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"to": "x"}}}],
                    },
                ]
            },
            [("system", "s"), ("user", "q"), ("assistant", "x")],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [("user", "q"), ("assistant", "a")],
        ),
        (
            {"output": "o", "instruction": "i", "input": "more", "history": [["a", "b"]]},
            [("user", "a"), ("assistant", "b"), ("user", "i"), ("user", "more"), ("assistant", "o")],
        ),
        (
            {"prompt": "p", "chosen": "c", "rejected": [{"role": "assistant", "content": "r"}]},
            [("user", "p"), ("assistant", "c"), ("rejected", "r")],
        ),
        ({"text": "t", "label": "x"}, [("text", "t")]),
        ({"tokens": ["a", "b"], "ner_tags": [0, 1]}, [("text", "a b")]),
        ({"messages": '[{"role": "user", "content": "q"}]'}, [("user", "q")]),
        (
            {"prompt": '[{"role": "user"}]', "completion": '{"intent": "x"}'},
            [("user", '[{"role": "user"}]'), ("assistant", '{"intent": "x"}')],
        ),
        (
            {"prompt": "p", "chosen": '[{"role": "assistant", "content": "c"}]', "rejected": '{"a": 1}'},
            [("user", "p"), ("assistant", "c"), ("rejected", '{"a": 1}')],
        ),
        ({"review": "r", "stars": 3, "note": "n"}, [("text", "r"), ("text", "n")]),
        ({"input_ids": [1, 2]}, []),
    ],
)
def test_views_tell_texts_by_their_format_and_put_them_back(values, expected):
    seen = view(values)
    assert [(t.role, t.text) for t in seen.texts] == expected
    before = json.dumps(values)
    for one in seen.texts:
        changed = put(values, one.path, "c d" if one.path == ("tokens",) else one.text + "!")
        assert view(changed).texts != seen.texts
        assert put(changed, one.path, one.text) == values
    assert json.dumps(values) == before


def test_words_that_would_lose_their_tags_are_not_put_back():
    with pytest.raises(ValueError, match="number of words"):
        put({"tokens": ["a", "b"], "ner_tags": [0, 1]}, ("tokens",), "a b c")


# ---------------------------------------------------------------------------- characters


@pytest.mark.parametrize(
    ("damaged", "what", "sound"),
    [
        ("Itâ€™s", ["mojibake"], "It’s"),
        ("a\x00b\x1b[0m", ["control"], "ab[0m"),
        ("it\x92s", ["control"], "it’s"),
        ("\ufeffa\u200bb", ["invisible"], "ab"),
        ("a\u200db", ["invisible"], "ab"),
        ("user\u202enimda", ["invisible"], "usernimda"),
        ("hi\U000e0041\U000e0042", ["invisible"], "hi"),
        ("a\ud800b", ["surrogate"], "ab"),
    ],
)
def test_damage_to_characters(damaged, what, sound):
    check = Encoding()
    assert whats(check, text(damaged)) == what
    assert mended(check, text(damaged)) == sound
    assert whats(check, text(sound)) == []


@pytest.mark.parametrize(
    "sound",
    [
        "a\tb\r\nc\fd",
        "می‌خواهم",
        "👩‍👩‍👧",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        "क्‍ष",
        "שלום \u202bx\u202c",
        "naïve",
        "日本",
        "a\u00adb".replace("\u00ad", ""),
    ],
)
def test_what_scripts_and_emoji_need_stays(sound):
    assert whats(Encoding(), text(sound)) == []


def test_what_is_lost_is_dropped_where_others_are_repaired():
    check = Encoding()
    assert whats(check, text("caf\ufffd")) == ["replacement"]
    assert (check.action_of("replacement"), check.action_of("mojibake")) == ("drop", "repair")
    assert Encoding(action="keep").action_of("replacement") == "keep"


# ---------------------------------------------------------------------------- structure


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, []),
        ({"messages": [{"role": "assistant", "content": "a"}]}, ["role_order"]),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "q"}]}, ["role_order"]),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]}, ["empty_answer"]),
        ({"messages": [{"role": "user", "content": " \n"}, {"role": "assistant", "content": "a"}]}, ["empty_turn"]),
        ({"messages": [{"role": "user", "content": "q"}]}, ["no_trained_token"]),
        ({"messages": []}, ["format"]),
        ({"messages": [{"role": "robot", "content": "q"}]}, ["role_order"]),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a"},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a"},
                ]
            },
            [],
        ),
        ({"prompt": "p", "completion": ""}, ["empty_answer"]),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, ["equal_answers"]),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, []),
        ({"text": " ", "label": "x"}, ["empty_text"]),
        ({"text": "t", "label": ""}, ["label"]),
        ({"text": "t", "label": None}, ["label"]),
        ({"text": ""}, ["empty_answer"]),
        ({"tokens": ["a"], "ner_tags": [0, 1]}, ["label"]),
        ({"review": ""}, []),
    ],
)
def test_structure(values, what):
    assert whats(Structure(), view(values)) == what


def test_structure_refuses_what_training_refuses():
    """The quick way through plain messages says no more and no less than the readers of training."""
    from luthier.data import conversations
    from luthier.data.conversations import BadRow

    drawn = random.Random(0)
    for _ in range(3000):
        turns = [
            {
                "role": drawn.choice(["system", "user", "assistant", "tool"]),
                "content": drawn.choice(["x", "y", " ", ""]),
            }
            for _ in range(drawn.randrange(5))
        ]
        if drawn.random() < 0.3:
            turns = turns[:2]
        values = {"messages": turns}
        try:
            conversation = conversations.messages(values)
            conversations.check_roles(conversation)
            expected = any(not t["content"].strip() for t in turns if t["role"] in ("system", "user"))
        except BadRow:
            expected = True
        assert bool(Structure().look(view(values))) == expected, turns


# ---------------------------------------------------------------------------- secrets

DRAWN = random.Random(7)


def drawn(count: int, letters: str = string.ascii_letters + string.digits) -> str:
    while True:
        made = "".join(DRAWN.choice(letters) for _ in range(count))
        if any(c.isdigit() for c in made) or not any(c.isdigit() for c in letters):
            return made


def github() -> str:
    body = drawn(30)
    number, told = crc32(body.encode()), ""
    for _ in range(6):
        number, digit = divmod(number, 62)
        told = (string.digits + string.ascii_uppercase + string.ascii_lowercase)[digit] + told
    return f"ghp_{body}{told}"


def jwt() -> str:
    parts = [{"alg": "HS256", "typ": "JWT"}, {"sub": "1234567890", "name": "x"}]
    return ".".join(
        [*(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts), drawn(43)]
    )


SECRETS = {
    "aws_key": lambda: "AKIA" + drawn(16, string.ascii_uppercase + "234567"),
    "github_token": github,
    "slack_token": lambda: f"xoxb-{drawn(12, string.digits)}-{drawn(24)}",
    "google_key": lambda: "AIza" + drawn(35),
    "openai_key": lambda: "sk-proj-" + drawn(48),
    "stripe_key": lambda: "sk_live_" + drawn(24),
    "huggingface_token": lambda: "hf_" + drawn(34, string.ascii_letters),
    "gitlab_token": lambda: "glpat-" + drawn(20),
    "package_token": lambda: "npm_" + drawn(36),
    "sendgrid_key": lambda: f"SG.{drawn(22)}.{drawn(43)}",
    "jwt": jwt,
    "private_key": lambda: f"-----BEGIN RSA PRIVATE KEY-----\n{drawn(64)}\n{drawn(64)}\n-----END RSA PRIVATE KEY-----",
}


@pytest.mark.parametrize("what", SECRETS)
def test_secrets_by_their_form(what):
    check = Secrets()
    for _ in range(20):
        secret = SECRETS[what]()
        seen = text(f"Here it is: {secret} as you asked.")
        assert whats(check, seen) == [what], secret
        assert mended(check, seen) == f"Here it is: [{what.upper()}] as you asked."
        assert whats(check, text(mended(check, seen))) == []
        assert all(secret not in finding.detail for finding in check.look(seen))


def test_the_checksum_of_a_token_is_told():
    [finding] = Secrets().look(text(github()))
    assert "its checksum holds" in finding.detail
    [finding] = Secrets().look(text("ghp_" + drawn(36)))
    assert "checksum" not in finding.detail


def test_what_is_assigned_and_passwords_in_addresses():
    check = Secrets()
    assert (
        mended(check, text("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYzz12345678"))
        == "aws_secret_access_key = [SECRET]"
    )
    assert (
        mended(check, text("postgres://admin:hunter2!@db.corp.net/x"))
        == "postgres://admin:[PASSWORD_IN_URL]@db.corp.net/x"
    )


@pytest.mark.parametrize(
    "sound",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "sk-xxxxxxxxxxxxxxxxxxxxxxxx",
        "token = get_token_from_environment_1()",
        "the sk-learn library",
        "password: ************",
        "https://user:password@host.com",
        "-----BEGIN PRIVATE KEY-----",
        "api_key=YOUR_API_KEY_HERE",
        "secret: os.environ['SECRET_TOKEN_12']",
        "eyJhbGciOi.eyJub.x",
        "token=aaaaaaaaaaaaaaaaaaaa1",
        "self.token = tokens[index_of_token_2]",
        "tokenizer: Qwen/Qwen3-0.6B-instruct-2507",
        "key = 'a_long_name_of_a_setting_2'",
        "sk-learn-compatible-estimators-for-all",
    ],
)
def test_examples_and_code_are_no_secrets(sound):
    assert whats(Secrets(), text(sound)) == []


def test_entropy_by_hand():
    assert entropy("aabb") == 1.0
    assert entropy("abcd") == 2.0


# ---------------------------------------------------------------------------- personal data


def test_personal_data_is_masked_by_what_it_was():
    seen = chat(
        "I am ann@corp.com, +44 20 7946 0958; card 4539 1488 0343 6467", "Paid from GB29 NWBK 6016 1331 9268 19."
    )
    check = PersonalData()
    made = check.repair(seen, check.look(seen))
    assert made == {0: "I am [EMAIL], [PHONE]; card [CREDIT_CARD]", 1: "Paid from [IBAN]."}
    assert whats(check, chat(*made.values())) == []
    assert all("ann@" not in finding.detail for finding in check.look(seen))


# ---------------------------------------------------------------------------- boilerplate


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ("I'm sorry, but I can't assist with that request.", ["refusal"]),
        ("I’m sorry, but I cannot fulfill this request.", ["refusal"]),
        ("I cannot help with creating malware.", ["refusal"]),
        ("Sorry, I am unable to access the internet.", ["refusal"]),
        ("I apologize, but I will not provide that. ", ["refusal"]),
        ("As an AI language model, I don't have feelings.", ["disclaimer"]),
        ("I'm just an AI, so take this lightly: water is wet.", ["disclaimer"]),
        ("My knowledge cutoff is September 2021.", ["disclaimer"]),
        ("Dear [Your Name], thank you.", ["placeholder"]),
        ("Lorem ipsum dolor sit amet.", ["placeholder"]),
        ("Paris. Let me know if you have any other questions!", ["closing"]),
        ("Paris is the capital of France.", []),
        ("You cannot pass a list here; see the manual.", []),
        ("She said: sorry, the shop is closed.", []),
        ("The AI winter began in 1974. A language model predicts words.", []),
        ("x = a[your_index]; y = d['name']", []),
        ("I cannot recommend this film highly enough.", []),
    ],
)
def test_boilerplate(answer, what):
    assert whats(Boilerplate(), chat("Say.", answer)) == what


def test_only_answers_that_would_be_learnt_are_looked_at():
    assert whats(Boilerplate(), chat("I'm sorry, but I can't assist with that.", "Fine.")) == []
    assert (
        whats(Boilerplate(), view({"prompt": "p", "chosen": "Yes.", "rejected": "I'm sorry, I can't help with that."}))
        == []
    )
    assert whats(
        Boilerplate(), view({"prompt": "p", "chosen": "I'm sorry, I can't help with that.", "rejected": "Yes."})
    )


def test_further_patterns():
    check = Boilerplate(patterns={"brand": r"\bacme\b"}, actions={"brand": "keep"})
    assert whats(check, chat("q", "Buy ACME.")) == ["brand"]
    with pytest.raises(ValueError, match="no regular expression"):
        Boilerplate(patterns={"x": "("})
    with pytest.raises(ValueError, match="taken"):
        Boilerplate(patterns={"refusal": "x"})


# ---------------------------------------------------------------------------- languages

SENTENCES = {
    "en": "The cat sat on the mat and looked at the birds in the garden.",
    "de": "Die Katze saß auf der Matte und sah die Vögel im Garten.",
    "fr": "Le chat était assis sur le tapis et regardait les oiseaux dans le jardin.",
    "es": "El gato estaba sentado en la alfombra y miraba los pájaros del jardín.",
    "it": "Il gatto era seduto sul tappeto e guardava gli uccelli nel giardino.",
    "pt": "O gato estava sentado no tapete e olhava para os pássaros do jardim.",
    "nl": "De kat zat op de mat en keek naar de vogels in de tuin.",
    "sv": "Katten satt på mattan och tittade på fåglarna i trädgården.",
    "pl": "Kot siedział na macie i patrzył na ptaki, które były w ogrodzie.",
    "tr": "Kedi paspasın üzerinde oturdu ve bahçedeki kuşlara baktı, çünkü bu çok güzeldi.",
    "fi": "Kissa istui matolla ja katsoi lintuja, jotka olivat puutarhassa.",
    "cs": "Kočka seděla na podložce a dívala se na ptáky, kteří byli v zahradě.",
    "hu": "A macska a szőnyegen ült, és nézte a madarakat, amelyek a kertben voltak.",
    "ru": "Кошка сидела на коврике и смотрела на птиц в саду.",
    "uk": "Кішка сиділа на килимку і дивилася на птахів у саду, які співали.",
    "zh": "猫坐在垫子上看着花园里的鸟。",
    "ja": "猫はマットの上に座って庭の鳥を見ていました。",
    "ko": "고양이가 매트 위에 앉아 정원의 새를 보았다.",
    "ar": "جلست القطة على السجادة ونظرت إلى الطيور في الحديقة.",
    "he": "החתול ישב על השטיח והביט בציפורים.",
    "el": "Η γάτα κάθισε στο χαλί και κοίταξε τα πουλιά.",
    "hi": "बिल्ली चटाई पर बैठी और पक्षियों को देखा।",
    "th": "แมวนั่งบนเสื่อและมองดูนก",
    "vi": "Con mèo ngồi trên thảm và nhìn những con chim trong vườn.",
    "id": "Kucing itu duduk di atas tikar dan melihat burung yang ada di kebun.",
    "ro": "Pisica stătea pe covor și se uita la păsările din grădină.",
    "fa": "گربه روی فرش نشست و به پرندگان نگاه کرد",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_languages(code):
    assert language_of(SENTENCES[code]) == code


@pytest.mark.parametrize("short", ["", "OK", "x = f(y)", "1234", "Paris", "{}[]()", "😀"])
def test_too_short_to_tell(short):
    assert language_of(short) == "und"


def test_rows_in_other_languages():
    check = Language(languages=["en"], action="drop")
    assert whats(check, text(SENTENCES["de"])) == ["other_language"]
    assert whats(check, text(SENTENCES["en"])) == whats(check, text("x = 1")) == []
    gatherer = Language().gatherer()
    for number in range(100):
        gatherer.add(number, text(SENTENCES["de" if number == 42 else "en"]))
    decision = Language().decide([Gathered(1000, gatherer.arrays())], list)
    assert decision.rows.tolist() == [1042]
    assert decision.told[int(decision.codes[0])] == ("other_language", "de")
    assert decision.summary["languages"] == {"en": 99, "de": 1}
    assert Language().proposed(decision.summary).languages == ["en"]
    with pytest.raises(ValueError, match="did you mean 'en'"):
        Language(languages=["eng"])


# ---------------------------------------------------------------------------- lengths


def test_lengths_far_from_the_others():
    """Lengths of 100, spread at its floor of 0.15: bounds are 100 exp(-0.75) = 47.2 and 100 exp(0.75) = 211.7."""
    lengths = np.array([100] * 50 + [10, 1000])
    assert bounds(lengths, 5.0) == (47, 212)
    gatherer = Length().gatherer()
    for number, length in enumerate(lengths):
        gatherer.add(number, text("x" * length))
    decision = Length().decide([Gathered(0, gatherer.arrays())], list)
    assert decision.rows.tolist() == [50, 51]
    assert [decision.told[c][0] for c in decision.codes] == ["short", "long"]
    proposed = Length().proposed(decision.summary)
    assert (proposed.min, proposed.max) == (47, 212)
    assert whats(proposed, text("x" * 46)) == ["short"]
    assert whats(proposed, text("x" * 47)) == whats(proposed, text("x" * 212)) == []
    assert histogram(lengths) == [
        (8, 16, 1),
        (16, 32, 0),
        (32, 64, 0),
        (64, 128, 50),
        (128, 256, 0),
        (256, 512, 0),
        (512, 1024, 1),
    ]


def test_lengths_in_words():
    check = Length(min=2, max=3, unit="words")
    assert [whats(check, text(one)) for one in ("a", "a b", "a b c", "a, b; c d", " ")] == [
        ["short"],
        [],
        [],
        ["long"],
        ["empty"],
    ]
    with pytest.raises(ValueError, match="more than"):
        Length(min=3, max=2)


# ---------------------------------------------------------------------------- equal rows


def test_equal_rows_keep_the_first():
    hashes = np.array([[1, 1], [2, 2], [1, 1], [1, 2], [2, 2], [1, 1]], np.uint64)
    found, first = repeated(hashes, np.array([10, 11, 12, 13, 14, 15]))
    assert (found.tolist(), first.tolist()) == ([12, 14, 15], [10, 11, 10])
    assert repeated(hashes[:0], np.zeros(0, np.int64))[0].tolist() == []


def duplicates(check: ExactDuplicates, *views_) -> list[tuple[int, int]]:
    halves = []
    for first, part in ((0, views_[:2]), (2, views_[2:])):
        gatherer = check.gatherer()
        for number, seen in enumerate(part):
            gatherer.add(number, seen)
        halves.append(Gathered(first, gatherer.arrays()))
    decision = check.decide(halves, list)
    return list(zip(decision.rows.tolist(), decision.others.tolist()))


def test_what_makes_rows_equal():
    same = [chat("q", "a"), chat("a", "q"), chat("q", "a"), view({"prompt": "q", "completion": "a"}), chat("Q ", "a")]
    assert duplicates(ExactDuplicates(), *same) == [(2, 0), (3, 0)]
    assert duplicates(ExactDuplicates(ignore="case_and_space"), *same) == [(2, 0), (3, 0), (4, 0)]
    labelled = [view({"text": "t", "label": label}) for label in ("a", "b", "a")]
    assert duplicates(ExactDuplicates(), *labelled) == [(2, 0)]


# ---------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"checks": {"encodin": {}}}, r"checks\.encodin: there is no such check; did you mean 'encoding'"),
        ({"checks": {"encoding": {"acton": "drop"}}}, r"checks\.encoding\.acton: unknown; did you mean 'action'"),
        ({"checks": {"encoding": {"action": "mend"}}}, "'repair', 'drop' or 'keep'"),
        ({"checks": {"structure": {"action": "repair"}}}, "'drop' or 'keep'"),
        ({"checks": {"encoding": {"actions": {"mojibak": "drop"}}}}, "did you mean 'mojibake'"),
        ({"checks": {"encoding": {"actions": {"replacement": "repair"}}}}, "cannot be done"),
        ({"check": {}}, "did you mean 'checks'"),
        ({"columns": {"txt": "review"}}, "no format has a key 'txt'"),
        ("checks.length.unit=tokens", "give --model"),
        ("checks.encoding.allowed=2", "less than or equal to 1"),
        ({"checks": {"encoding": 3}}, "expected settings"),
        ({"checks": ["encoding"]}, "expected the kinds"),
    ],
)
def test_recipes_are_strict(given, told):
    with pytest.raises(ConfigError, match=told):
        recipe(given)


def test_recipes_are_written_as_they_are_read(tmp_path):
    made = recipe(
        {"checks": {"encoding": "drop", "length": {"min": 3}}, "columns": {"text": "review"}},
        "checks.encoding.allowed=0.5",
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(made.dump())
    assert recipe(path) == made
    assert list(made.checks) == ["encoding", "length"]
    by_default = [kind for kind, check in CHECKS.items() if check.by_default]
    assert list(recipe("checks.length.min=3").checks) == by_default
    assert set(CHECKS) - set(by_default) == {"perplexity"}
