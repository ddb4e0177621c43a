"""UTF-8 that was read as something else is found, put right, and never found where there is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.prepare.mojibake import repaired, stretches

SOUND = [
    "café déjà vu «où»",
    "»Spaß« “Spaß”",
    "MAÇÃ DO AMOR",
    "SÃO PAULO",
    "L’É»",
    "naïveté”—yes",
    "olé…”",
    "Ångström »Å«",
    "Привет мир",
    "日本語",
    "☃",
    "São Paulo: coração",
    "Ärger… Öl“",
    "10 €",
    "CAFÉ®",
    "CAFÉ™ and CAFÉ” and ÖSTERREICH“",
    "×²",
    "É¡",
    "à «quoi»",
    "TM™",
    "½ µm",
    "Łódź",
    "PÂTÉ©",
    "2×½",
    "naïve Ã",
    "Ð, Þ",
    "10 Å\xa0wide",
    "Größe: 3 €",
    "it’s — “so”",
    "¿Qué? ¡Olé!",
    "Ñandú, ÑUÑOA",
    "ÅÄÖ, åäö",
    "þú ert",
    "ΑΒΓ",
    "שלום",
    "1 000 €",
    "“Où?” «Là»",
    "Ça, c’est «ÇA»",
]
WRITTEN = [
    "it’s",
    "“quoted” – dash",
    "żółw",
    "Здравствуйте, и в мире",
    "Ελλάδα",
    "😀 emoji",
    "日本語テキスト",
    "naïve",
    "10 €",
    "°C",
    "à la carte",
    "Größe",
    "½",
    "مرحبا",
    "שלום",
    "é",
    "ñ",
    "ü",
    "→",
    "œuvre",
    "č",
    "Ž",
    "São Paulo",
    "Łódź, Škoda",
    "Don’t worry — it’s “fine”…",
    "crème brûlée",
    "Øresund",
    "Čeština je hezká",
]


def misread(text: str, encoding: str, times: int) -> str:
    """What an editor shows that takes UTF-8 for another encoding; bytes that Windows-1252 lacks as they are."""
    for _ in range(times):
        data = text.encode()
        text = "".join(bytes([b]).decode(encoding, "ignore") or chr(b) for b in data)
    return text


@pytest.mark.parametrize("text", SOUND)
def test_sound_texts_stay(text):
    assert stretches(text) == []
    assert repaired(text) == text


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("text", WRITTEN)
def test_what_was_misread_is_put_right(text, encoding, times):
    damaged = misread(text, encoding, times)
    assert damaged != text
    assert repaired(damaged) == text
    assert repaired(f"Before: {damaged} and after.") == f"Before: {text} and after."


def test_stretches_stand_where_the_damage_is():
    text = f"a {misread('é', 'cp1252', 1)} b {misread('“', 'cp1252', 1)}"
    assert [(text[s.start : s.stop], s.text) for s in stretches(text)] == [("Ã©", "é"), ("â€œ", "“")]


def test_what_was_lost_in_part_is_put_right_where_it_is_known():
    closing = "”".encode().decode("cp1252", "replace")  # Windows-1252 has no character for its last byte
    assert repaired(f"â€œso{closing}") == "“so”"
    spaced = misread("voilà la fête", "cp1252", 1).replace("\xa0", " ")
    assert repaired(spaced) == "voilà la fête"


@given(st.text())
def test_repairing_twice_is_repairing_once(text):
    once = repaired(text)
    assert repaired(once) == once
    assert stretches(once) == []


@given(
    st.text(alphabet=st.characters(min_codepoint=0xC0, max_codepoint=0x17F, categories=["Ll"]), min_size=2, max_size=12)
)
def test_words_of_accented_letters_come_back(word):
    """Any word of small Latin letters with marks, as long as it is sound itself."""
    assert repaired(word) == word
    assert repaired(misread(word, "latin-1", 1)) == word
