"""The language of a text: by its script, and in scripts of many languages by their most frequent words and letters.

Texts of which the words do not tell are told by trigrams of letters. It needs no model and some microseconds. It is
meant for sorting rows, not for telling close relatives apart: Norwegian and Danish, or Galician and Portuguese, share
most of what it goes by. A text too short to tell is `und` (ISO 639).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from .views import APART

UNKNOWN = "und"
LONGEST = 480  # characters that are looked at
MOST, TOGETHER = 80, 40  # words, and how many at a time

WORDS = {  # the most frequent words of running text and of short requests
    "en": "the of and to in is that it for was with as on be at by this are you from or an have not but what all "
          "were when we there can your which their will do how if so has would them then these been some could "
          "other than its my i he she they about into turn off please set make find give write show who where "
          "should no just like also out up between does only over such must used each here using",
    "de": "der die das und ist nicht ein eine einen mit den dem des von zu im auf für sich auch als an werden aus "
          "er sie es wird bei sind noch wie über so zum war haben nur oder aber vor zur bis mehr durch man sein "
          "wurde wir ich du was wenn kann schalte mache stelle licht bitte gibt ihr mir dich mich dieser diese "
          "dieses beim vom kein keine soll ins um nach",
    "fr": "le la les de des du et est un une en que qui dans pour pas sur au avec il elle ce cette sont par plus ne "
          "se nous vous je tu mais ou où comme tout être avoir fait sans leur aux son sa ses été même aussi ont l d "
          "qu c n s j allume éteins règle quelle quel votre notre mes ton était peut très ces entre après depuis",
    "es": "el la los las de del y en que es un una por con no para se su al lo como más pero sus le ya o este sí "
          "porque esta entre cuando muy sin sobre también me hasta hay donde quien desde todo nos durante uno ni "
          "ese eso mi qué yo cómo enciende apaga pon luz luces está son fue ser hace puede tiene esto estos usted "
          "tu te",
    "it": "il lo la i gli le di del della dei delle e è che in un una uno per non con si da al alla ai nel nella "
          "sono come più ma ha anche o se ci questo questa su dal dalla essere stato suo sua loro cui quando "
          "accendi spegni imposta luce luci mi ti ho hanno perché tutti fare molto dove degli sul sulla era chi",
    "pt": "o a os as de do da dos das e em no na nos nas que é um uma por para com não se seu sua mais como mas ao "
          "foi ele ela ou ser quando muito há já está eu também só pelo pela até isso entre era depois sem mesmo "
          "aos seus quem nas me esse eles você essa num nem suas às minha ligar desligar acende luz luzes são tem "
          "ter fazer pode",
    "nl": "de het een en van in is dat op te zijn met voor niet aan er om ook als dan maar uit bij nog naar heeft "
          "worden wordt door over deze dit ze hij zij je ik wat kan geen meer of tot werd wel hebben hun zet doe "
          "licht lamp aan uit mijn jij zou moet waar veel al onder hoe onze bent",
    "sv": "och att det i en som är på för av med inte den till ett om har de men vid var så från jag kan när han "
          "hon vi eller under nu också efter utan skulle hade finns vara detta mer ska slå tänd släck lampan ljuset "
          "mig dig sin vad alla blir mycket bara där här upp dem får in av man över",
    "da": "og at det i en som er på for af med ikke den til et om har de men ved var så fra jeg kan når han hun vi "
          "eller under nu også efter uden skulle havde være dette mere skal tænd sluk lyset mig dig sin hvad alle "
          "bliver meget kun hvor op dem får man over ind nogle efter blev",
    "no": "og at det i en som er på for av med ikke den til et om har de men ved var så fra jeg kan når han hun vi "
          "eller under nå også etter uten skulle hadde være dette mer skal slå lyset meg deg sin hva alle blir mye "
          "bare hvor opp dem får man over inn noen etter ble seg ut jeg",
    "fi": "ja on ei se että oli hän joka mutta ovat kun niin myös tai ole sen kuin ovat olla mitä jos vain tämä "
          "sitä hänen ne minä sinä ne tässä siitä sekä kanssa sammuta laita valot päälle pois mikä missä nyt vielä "
          "kaikki voi tämän joka jotka olen ollut mukaan jälkeen",
    "pl": "i w na z nie się do to że jest o jak a po za ale od co przez dla tego są czy tak tym jego być może oraz "
          "był która które który jej ich już tylko przy pod można jeszcze będzie włącz wyłącz światło ustaw ten ta "
          "te mnie mi ja ty bardzo gdzie kiedy lub jako we ze bez nad",
    "cs": "a v na se je že s z do o to i k pro jako ale za by byl jsem po jeho od jsou si které který která nebo co "
          "tak být při však také jen už až podle bylo své této mezi zapni vypni světlo světla nastav může jaký jaká "
          "jak kde než ve ke ze jsme má tento jejich když",
    "sk": "a v na sa je že s z do o to i k pre ako ale za by bol som po jeho od sú si ktoré ktorý ktorá alebo čo "
          "tak byť pri však tiež len už až podľa bolo tejto medzi zapni vypni svetlo nastav môže aký aká kde než vo "
          "ku zo sme má tento ich keď nie",
    "hu": "a az és hogy nem is egy ez volt meg mint csak de van már még vagy ki ha el azt amely lesz minden azonban "
          "után majd ezt kell lehet olyan fel nagyon mi le én itt pedig között alatt kapcsold be ki lámpát fényt "
          "állítsd ami aki voltak szerint által mert ezek",
    "ro": "și de în a la cu pe nu este că se o un pentru din care ce mai sau dar au fi am al lui ale prin această "
          "după fost când sunt foarte să ai aceasta acest dacă unde până fără toate aprinde stinge lumina setează "
          "eu tu ei ele cum decât într am lor",
    "tr": "ve bir bu da de için ile ne çok gibi daha olarak var olan kadar en sonra ama ya değil mi o ki her şey "
          "ben sen ise oldu olduğu göre tarafından diye hem aç kapat ışığı ışıkları ayarla nasıl nerede kim bana "
          "beni sadece veya tüm yeni önce",
    "id": "yang dan di dengan untuk dari pada adalah ini itu tidak dalam akan ke sebagai oleh juga atau saya anda "
          "dapat karena telah bisa ada mereka kami kita ia lebih seperti sudah hanya apa bagaimana nyalakan matikan "
          "lampu sangat secara jika agar bahwa tersebut para",
    "vi": "và của là có không được trong cho một người với các này đã để những khi tôi như cũng từ bạn ở đến về "
          "nhiều sẽ lại thì ra nếu vào trên hay hoặc bật tắt đèn mà phải theo năm rất gì nào làm đó việc hãy",
    "ca": "el la els les de del i en que és un una per amb no se seu va al com més però o quan també són aquest "
          "aquesta hi molt sense ha han dels pels encén apaga llum llums entre fins sobre tot ser perquè dins seva "
          "seus on què",
    "hr": "i u na je se da su za od s ne što kao iz koji o ali bi a po ili biti koje koja do sam samo nije više "
          "kako već kada bio to uključi isključi svjetlo postavi gdje ima će te ti mi ako nakon između još sve",
    "et": "ja on ei et see oli ta mis aga kui ka oma nii või siis ning kes ma sa seda mida veel ole selle nende "
          "pole lülita sisse välja tuled pane kuidas kus kõik väga ainult pärast kuid ning",
    "lt": "ir yra kad į su iš tai ne bet kaip buvo ar už nuo jis ji jo jų jos kurie kuris tik dar po labai jau "
          "įjunk išjunk šviesą prie per būti taip apie arba jei šis kai",
    "lv": "un ir ka no uz ar tas par nav bet kā bija vai viņš viņa pēc lai pie arī tikai ļoti jau kas ieslēdz "
          "izslēdz gaismu to šo tika būt kad ja es tu",
    "ru": "и в не на что я с он как это по но из у за от к так же все вы для бы то мы было если есть уже или ни "
          "быть до был его ее их она они при который которые мне только включи выключи свет где когда чтобы может "
          "этот об",
    "uk": "і в не на що я з він як це по але із у за від до так ж все ви для би то ми було якщо є вже або ні бути "
          "був його її їх вона вони при який які мені тільки увімкни вимкни світло де коли щоб може цей про та й",
    "bg": "и в не на че аз с той как това по но из у за от до така се всички вие да то ние беше ако е вече или нито "
          "бъде бил негов тя те при който които ми само включи изключи лампата къде кога може този със са са съм",
    "sr": "и у на је се да су за од с не што као из који о али би а по или бити које која до сам само није више "
          "како већ када био то укључи искључи светло где има ће те ти ми ако након између још све",
}  # fmt: skip
LETTERS = {  # that tell a language among those of its script
    "de": "ß", "es": "ñ¿¡", "pt": "ãõ", "pl": "łąęśźżńć", "cs": "ěřů", "sk": "ĺŕľô", "hu": "őű", "ro": "țșăţş",
    "tr": "ğışİ", "sv": "åäö", "da": "æøå", "no": "æøå", "fi": "äö", "et": "õäöü", "lt": "ėųįū",
    "lv": "ļķņģāēī", "vi": "ơưđạảấầậẵếềệịọộợụủứừựỹ", "hr": "đčćžš", "fr": "çœêèàùâî", "ca": "ŀ·çòèï",
    "uk": "іїєґ", "ru": "ыэё", "bg": "ъщ", "sr": "ђљњћџј", "nl": "ĳ",
}  # fmt: skip
SCRIPTS = (  # of one language each, or of those that a further test tells apart
    ("ja", "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f"), ("ko", "\uac00-\ud7a3\u1100-\u11ff\u3131-\u318e"),
    ("zh", "\u3400-\u4dbf\u4e00-\u9fff"), ("ar", "\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc"),
    ("he", "\u0590-\u05ff"), ("el", "\u0370-\u03ff\u1f00-\u1fff"), ("hi", "\u0900-\u097f"), ("bn", "\u0980-\u09ff"),
    ("pa", "\u0a00-\u0a7f"), ("gu", "\u0a80-\u0aff"), ("ta", "\u0b80-\u0bff"), ("te", "\u0c00-\u0c7f"),
    ("kn", "\u0c80-\u0cff"), ("ml", "\u0d00-\u0d7f"), ("si", "\u0d80-\u0dff"), ("th", "\u0e00-\u0e7f"),
    ("lo", "\u0e80-\u0eff"), ("my", "\u1000-\u109f"), ("ka", "\u10a0-\u10ff"), ("am", "\u1200-\u137f"),
    ("km", "\u1780-\u17ff"), ("hy", "\u0530-\u058f"), ("cyrillic", "\u0400-\u04ff"),
)  # fmt: skip
BY_TRIGRAMS = ("af", "sq", "eu", "gl", "is", "sl", "az", "cy", "ga", "eo", "ms", "sw", "mk", "be", "kk", "ky", "mn")
CODES = (UNKNOWN, *WORDS, *BY_TRIGRAMS, *(code for code, _ in SCRIPTS if code != "cyrillic"), "fa", "ur")
WORDS_READ, FEWEST = 30, 12  # words whose trigrams are counted; fewer trigrams tell nothing
LEAST, LEAD = 0.9, 0.7  # of the score a trigram: how good a language has to be, and how much better than English
CYRILLIC = {"ru", "uk", "bg", "sr", "mk", "be", "kk", "ky", "mn"}
_SCRIPT = {code: re.compile(f"[{letters}]") for code, letters in SCRIPTS}
_OTHER = re.compile("[\u0370-\u1fff\u3041-\ud7a3\uf900-\ufefc]")  # any of them


def _weights() -> dict[bytes, tuple[tuple[str, float], ...]]:
    """Each word's languages, and what it counts for each: the less, the more share it, and nothing where four do."""
    of: dict[str, list[str]] = {}
    for code, words in WORDS.items():
        for word in dict.fromkeys(words.split()):
            if len(word) > 1 or word in "aeiouyàéèíóúъыяіув":  # not what variables are called
                of.setdefault(word, []).append(code)
    return {
        word.encode(): tuple((code, round(1 / len(codes), 2)) for code in codes)
        for word, codes in of.items() if len(codes) < 4
    }  # fmt: skip


_WEIGHTS = _weights()
_MARKS: dict[str, tuple[str, ...]] = {}
for _code, _letters in LETTERS.items():
    for _letter in _letters:
        _MARKS[_letter] = (*_MARKS.get(_letter, ()), _code)


_MARKED = frozenset(_MARKS)


def language_of(text: str, words: Sequence[bytes] | None = None) -> str:
    """The code (ISO 639-1) of a text's language, `und` where it cannot be told; `words` are its own (`View.words`)."""
    among = None
    plain = text.isascii()
    if not plain:
        text = text[:LONGEST]
        if _OTHER.search(text):
            script, _ = _script_of(text)
            if script and script != "cyrillic":
                return script
            among = CYRILLIC if script else None
            words = None
    if words is None:
        words = text[:LONGEST].lower().encode("utf-8", "surrogatepass").translate(APART).split()
    found = _by_words(words, None if plain else text.lower(), among)
    if found == UNKNOWN and sum(map(text.count, "{}=;<>_|")) * 25 <= len(text):  # neither code nor JSON
        found = by_trigrams(list(dict.fromkeys(words[:MOST])), among is not None)
    return found


def _script_of(text: str) -> tuple[str, int]:
    """The script of most letters, and how many; kana make Chinese characters Japanese."""
    counts = {code: len(pattern.findall(text)) for code, pattern in _SCRIPT.items()}
    code = max(counts, key=lambda c: counts[c])
    letters = sum(map(str.isalpha, text))
    if code == "zh" and counts["ja"] > 0.05 * counts["zh"]:
        code = "ja"
    if code == "ar":
        code = "ur" if re.search("[ٹڈڑےں]", text) else "fa" if re.search("[پچژگیک]", text) else "ar"
    most = max(counts.values())
    dense = 3 if code in ("zh", "ja", "ko") else 1  # a character of these says as much as three letters
    return (code, letters) if most * dense * 2 >= letters and most else ("", 0)


def _by_words(words: Sequence[bytes], letters: str | None, among: set[str] | None) -> str:
    """A few words at a time, as most texts show soon what they are."""
    scores: dict[str, float] = {}
    if letters is not None:
        for letter in set(letters) & _MARKED:
            for code in _MARKS[letter]:
                scores[code] = scores.get(code, 0.0) + 0.4
    get, scored = _WEIGHTS.get, scores.get
    different = list(dict.fromkeys(words[:MOST]))  # what is said often is told once
    most = len(different)
    for start in range(0, most, TOGETHER):
        for told in [told for word in different[start : start + TOGETHER] if (told := get(word)) is not None]:
            for code, weight in told:
                scores[code] = scored(code, 0.0) + weight
        if (sure := _surest(scores, min(most, start + TOGETHER), among, 2.5, 2.5)) != UNKNOWN:
            return sure
    return _surest(scores, most, among, 1.2, 1.25)


@lru_cache(maxsize=1)
def _profiles() -> tuple[dict[str, tuple[tuple[int, float], ...]], list[str]]:
    """Each trigram's languages and what it counts for them: the logarithm of how far it stands before the last."""
    codes: list[str] = []
    of: dict[str, list[tuple[int, float]]] = {}
    for line in Path(__file__).with_name("trigrams.txt").read_text(encoding="utf-8").splitlines():
        code, *trigrams = line.split(" ")
        for rank, trigram in enumerate(trigrams):
            of.setdefault(trigram, []).append((len(codes), math.log((len(trigrams) + 1) / (rank + 1)) + 1))
        codes.append(code)
    return {trigram: tuple(told) for trigram, told in of.items()}, codes


def by_trigrams(words: Sequence[bytes], cyrillic: bool) -> str:
    """The language whose frequent trigrams of letters a text is made of (Cavnar and Trenkle, 1994), where one leads."""
    told, codes = _profiles()
    scores, count = [0.0] * len(codes), 0
    for word in words[:WORDS_READ]:
        text = word.decode("utf-8", "replace").strip("'-")
        if not text.isalpha():
            continue
        padded = f"_{text}_"
        for start in range(len(padded) - 2):
            count += 1
            for code, weight in told.get(padded[start : start + 3], ()):
                scores[code] += weight
    if count < FEWEST:
        return UNKNOWN
    among = _cyrillic(b" ".join(words).decode("utf-8", "replace")) if cyrillic else set(codes) - CYRILLIC
    favoured = {"ru": 0.35} if cyrillic else {}  # the others have letters of their own, but Bulgarian
    ranked = sorted(
        ((score / count + favoured.get(code, 0.0), code) for score, code in zip(scores, codes) if code in among),
        reverse=True,
    )
    (first, best), (second, _) = ranked[:2]
    english = next((score for score, code in ranked if code == "en"), 0.0)
    if first < LEAST or (best != "en" and first - english < LEAD):
        return UNKNOWN
    return best if first - second > 0.02 or best == "en" else UNKNOWN


_OWN = {"uk": "іїєґ", "be": "ўі", "sr": "ђћљњџј", "mk": "ѓќѕљњџј", "kk": "әғқңұһі", "ky": "ңөү", "mn": "өү"}


def _cyrillic(text: str) -> set[str]:
    """The languages in Cyrillic that a text may have, by the letters that it has."""
    there = set(text)
    return {"ru", "bg"} | {code for code, letters in _OWN.items() if not there.isdisjoint(letters)}


def _surest(scores: dict[str, float], words: int, among: set[str] | None, least: float, lead: float) -> str:
    """The language that leads clearly and has enough of the words."""
    best, first, second = UNKNOWN, 0.0, 0.0
    for code, score in scores.items():
        if (code in among) if among else (code not in CYRILLIC):
            if score > first:
                best, first, second = code, score, first
            elif score > second:
                second = score
    return best if first >= max(least, 0.05 * words) and first >= lead * second else UNKNOWN


def together(texts: Iterable[str]) -> str:
    """What of a row's texts is looked at: the beginning of each."""
    parts, left = [], LONGEST
    for text in texts:
        parts.append(text[: min(left, 200)])
        left -= len(parts[-1]) + 1
        if left <= 0:
            break
    return " ".join(parts)
