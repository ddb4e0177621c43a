"""Numbers of people and accounts: patterns, and the checksums that tell them from other numbers."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from datetime import date

# ---------------------------------------------------------------------------- sums


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1: from the right, every second digit doubled, digits summed, a multiple of ten."""
    total = 0
    for place, character in enumerate(reversed(digits)):
        value = int(character) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


# The dihedral group of the pentagon: turns are 0 to 4, reflections 5 to 9.
_D = [[(a + b) % 5 + 5 * (b > 4) if a < 5 else (a - b) % 5 + 5 * (b < 5) for b in range(10)] for a in range(10)]
_P = [list(range(10)), [1, 5, 7, 6, 2, 8, 3, 0, 9, 4]]
for _i in range(2, 8):
    _P.append([_P[_i - 1][_P[1][_j]] for _j in range(10)])


def verhoeff(digits: str) -> bool:
    """J. Verhoeff, Error Detecting Decimal Codes, 1969."""
    check = 0
    for place, character in enumerate(reversed(digits)):
        check = _D[check][_P[place % 8][int(character)]]
    return check == 0


def weighted(digits: str, weights: str) -> int:
    return sum(int(d) * int(w) for d, w in zip(digits, weights))


def _day(year: int, month: int, day: int) -> bool:
    try:
        date(year, month, day)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------------------- accounts

# Lengths of IBANs by country: the registry of ISO 13616.
_IBAN_LENGTHS = {
    "AD": 24,
    "AE": 23,
    "AL": 28,
    "AT": 20,
    "AZ": 28,
    "BA": 20,
    "BE": 16,
    "BG": 22,
    "BH": 22,
    "BR": 29,
    "BY": 28,
    "CH": 21,
    "CR": 22,
    "CY": 28,
    "CZ": 24,
    "DE": 22,
    "DK": 18,
    "DO": 28,
    "EE": 20,
    "EG": 29,
    "ES": 24,
    "FI": 18,
    "FO": 18,
    "FR": 27,
    "GB": 22,
    "GE": 22,
    "GI": 23,
    "GL": 18,
    "GR": 27,
    "GT": 28,
    "HR": 21,
    "HU": 28,
    "IE": 22,
    "IL": 23,
    "IQ": 23,
    "IS": 26,
    "IT": 27,
    "JO": 30,
    "KW": 30,
    "KZ": 20,
    "LB": 28,
    "LC": 32,
    "LI": 21,
    "LT": 20,
    "LU": 20,
    "LV": 21,
    "MC": 27,
    "MD": 24,
    "ME": 22,
    "MK": 19,
    "MR": 27,
    "MT": 31,
    "MU": 30,
    "NL": 18,
    "NO": 15,
    "PK": 24,
    "PL": 28,
    "PS": 29,
    "PT": 25,
    "QA": 29,
    "RO": 24,
    "RS": 22,
    "SA": 24,
    "SE": 24,
    "SI": 19,
    "SK": 24,
    "SM": 27,
    "TN": 24,
    "TR": 26,
    "UA": 29,
    "VA": 22,
    "VG": 24,
    "XK": 20,
}
# A pattern begins with a set of characters and looks back after the first: so a text is searched for these at once.
IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z]\d{2}(?: ?[A-Z0-9]){11,30}(?![A-Za-z0-9])")
CARDS = (
    re.compile(r"\d(?<![\d.,+-].)\d{12,18}(?!\d|[.,]\d)"),
    re.compile(r"\d(?<![\d.,+-].)\d{3}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{1,3})?(?!\d|\1\d{4}(?!\d)|[.,]\d)"),
    re.compile(r"3(?<![\d.,+-].)[47]\d\d([ -])\d{6}\1\d{5}(?!\d|[.,]\d)"),
)


def iban(text: str) -> str | None:
    """The IBAN that a text begins with, its blanks kept: right length for its country, and 1 modulo 97."""
    length = _IBAN_LENGTHS.get(text[:2])
    if length is None:
        return None
    taken, count = 0, 0
    while taken < len(text) and count < length:
        count += text[taken] != " "
        taken += 1
    plain = text[:taken].replace(" ", "")
    if len(plain) != length or text[taken : taken + 1].isalnum():
        return None
    number = "".join(str(int(character, 36)) for character in plain[4:] + plain[:4])
    return text[:taken] if int(number) % 97 == 1 else None


def card(text: str) -> bool:
    """Whether a payment card has this number: prefix and length of a network, and the Luhn sum."""
    digits = re.sub(r"[ -]", "", text)
    length, two, three, four = len(digits), int(digits[:2]), int(digits[:3]), int(digits[:4])
    network = (
        (digits[0] == "4" and length in (13, 16, 19))
        or (51 <= two <= 55 and length == 16)
        or (2221 <= four <= 2720 and length == 16)
        or (two in (34, 37) and length == 15)
        or ((four == 6011 or 644 <= three <= 649 or two == 65) and 16 <= length <= 19)
        or (3528 <= four <= 3589 and 16 <= length <= 19)
        or ((300 <= three <= 305 or two in (36, 38, 39)) and length == 14)
        or (two == 62 and 16 <= length <= 19)
    )
    return network and len(set(digits)) > 2 and luhn(digits)


# ---------------------------------------------------------------------------- addresses on networks

IP4 = re.compile(r"\d(?<![\w.].)\d{0,2}\.(?:\d{1,3}\.){2}\d{1,3}(?!\w|\.\d|-\w)")
IP6 = re.compile(
    r"[0-9A-Fa-f](?<![\w:.].)[0-9A-Fa-f]{0,3}:(?:[0-9A-Fa-f]{1,4}:){1,6}(?::?[0-9A-Fa-f]{1,4}){1,6}(?![\w:])", re.A
)
_VERSION = re.compile(r"(?:\bv|\bver(?:sion)?|\brelease|\bsection|\bchapter|\bbuild|§)[ .:=]*\Z", re.I)


def ip(text: str, before: str) -> bool:
    """Whether somebody may have this address: not of a private or documentation network, no number of a version."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if not address.is_global or address.is_multicast or _VERSION.search(before):
        return False
    if address.version == 4:  # such as 1.2.3.4, which numbers a version or a section; one address in 30,000
        return max(address.packed) >= 20 or text in ("1.1.1.1", "8.8.8.8", "8.8.4.4", "9.9.9.9")
    return len([part for part in text.split(":") if part]) >= 3 and any(c.isdigit() for c in text)


# ---------------------------------------------------------------------------- telephones

# Seven digits with little between them: without these, a text has no number of a telephone, a card or a person.
CANDIDATE = re.compile(r"\d(?:[ .\-/()]{0,3}\d){6,}")
# Codes of countries: ITU-T E.164, assigned ones.
_CODES = {
    "1",
    "7",
    "20",
    "27",
    "30",
    "31",
    "32",
    "33",
    "34",
    "36",
    "39",
    "40",
    "41",
    "43",
    "44",
    "45",
    "46",
    "47",
    "48",
    "49",
    "51",
    "52",
    "53",
    "54",
    "55",
    "56",
    "57",
    "58",
    "60",
    "61",
    "62",
    "63",
    "64",
    "65",
    "66",
    "81",
    "82",
    "84",
    "86",
    "90",
    "91",
    "92",
    "93",
    "94",
    "95",
    "98",
    *(str(n) for n in range(211, 214)),
    "216",
    "218",
    *(str(n) for n in range(220, 270) if n != 259),
    "290",
    "291",
    "297",
    "298",
    "299",
    *(str(n) for n in range(350, 360)),
    *(str(n) for n in range(370, 390) if n not in (384, 388)),
    "420",
    "421",
    "423",
    *(str(n) for n in range(500, 510)),
    *(str(n) for n in range(590, 600)),
    *(str(n) for n in range(670, 693) if n not in (671, 684)),
    "850",
    "852",
    "853",
    "855",
    "856",
    "880",
    "886",
    *(str(n) for n in range(960, 978) if n not in (969,)),
    "992",
    "993",
    "994",
    "995",
    "996",
    "998",
}
PHONE = re.compile(
    r"(?<![\w.+/=#-])"
    r"(?:(?:\+|(?<!\d )\b00)\d{1,3}(?:[ .\-/]?\(0?\d{1,4}\))?(?:[ .\-/]{0,2}\d{1,5}){1,6}"  # international
    r"|(?<!\d )(?:(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[-. ])[2-9]\d\d[-. ]\d{4}"  # North America
    r"|\(0\d{1,5}\)[ -]?\d{2,4}(?:[ .-]?\d{2,4}){1,3}"  # with the trunk prefix
    r"|0\d(?:[ .-]\d\d){4}"  # France
    r"|0\d{1,5}[ /-]\d{3,8}(?:[ -]\d{1,4}){0,3}))"
    r"(?![\w]|[.,:/-]\d| \d{3})"
)
_CALLED = re.compile(
    r"(?:\b(?:tel[eé](?:phon|f[oó]n|fax)\w{0,9}|(?:cell|mobile|tele)?[ -]?phones?|tel|mobile?|"
    r"mobil\w{0,5}nummer|cell|call|fax|"
    r"fon|whatsapp|sms|number is|dial)\b|☎|📞)[^\d\n]{0,25}\Z",
    re.I,
)
CALLED = re.compile(r"(?<![\w.+-])\d{2,5}(?:[ .-]?\d{2,5}){1,4}(?![\w]|[.,:-]\d)")
CALLED_WORDS = (
    "tel",
    "phone",
    "mobil",
    "cell",
    "call",
    "fax",
    "fon",
    "whatsapp",
    "sms",
    "dial",
    "number",
    "\u260e",
    "\U0001f4de",
)


def phone(text: str) -> str | None:
    """What can be dialled, as far as its digits tell: a text, or its beginning, where other numbers follow it."""
    while text:
        if _dialled(text):
            return text
        shorter = re.match(r"(.*\d\)?)[ .\-/]+\(?\d+\)?\Z", text)
        text = shorter[1] if shorter and text.startswith(("+", "00")) else ""
    return None


def _dialled(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    if text.startswith(("+", "00")):
        told = digits[2:] if text.startswith("00") else digits
        return 8 <= len(told) <= 15 and any(told[:n] in _CODES for n in (1, 2, 3)) and len(set(told)) > 2
    if text.startswith("0"):
        return 9 <= len(digits) <= 12 and len(set(digits)) > 2 and not re.match(r"0\d[ /-]\d\d\d\d\b", text)
    return 9 <= len(digits) <= 12 and len(set(digits)) > 2


def called(text: str, before: str) -> bool:
    """Whether a number without the form of one is said to be a telephone's."""
    digits = re.sub(r"\D", "", text)
    return 7 <= len(digits) <= 13 and len(set(digits)) > 2 and _CALLED.search(before) is not None


# ---------------------------------------------------------------------------- people


def _dni(text: str) -> bool:
    """Spain: the letter is the number modulo 23; foreigners' numbers begin with X, Y, Z for 0, 1, 2."""
    plain = re.sub(r"[ -]", "", text.upper())
    number = plain[:-1].translate(str.maketrans("XYZ", "012"))
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == plain[-1]


_ODD: dict[str, int] = dict(
    zip(
        "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        (
            1,
            0,
            5,
            7,
            9,
            13,
            15,
            17,
            19,
            21,
            1,
            0,
            5,
            7,
            9,
            13,
            15,
            17,
            19,
            21,
            2,
            4,
            18,
            20,
            11,
            3,
            6,
            8,
            12,
            14,
            16,
            10,
            22,
            25,
            24,
            23,
        ),
    )
)


def _fiscale(text: str) -> bool:
    """Italy: the last letter is a sum of tables over the others, modulo 26."""
    total = 0
    for place, character in enumerate(text[:15]):
        total += _ODD[character] if place % 2 == 0 else int(character) if character.isdigit() else ord(character) - 65
    return chr(65 + total % 26) == text[15]


def _nir(text: str) -> bool:
    """France: the key is 97 less the number modulo 97; Corsica's 2A and 2B are 19 and 18."""
    plain = text.replace(" ", "").replace("2A", "19").replace("2B", "18")
    return len(plain) == 15 and plain.isdigit() and 97 - int(plain[:13]) % 97 == int(plain[13:])


def _pesel(text: str) -> bool:
    """Poland: a date whose month tells the century, and weights 1, 3, 7, 9."""
    year, month, day = int(text[:2]), int(text[2:4]), int(text[4:6])
    century = {0: 1900, 1: 2000, 2: 2100, 3: 2200, 4: 1800}[month // 20]
    return _day(century + year, month % 20, day) and weighted(text, "13791379131") % 10 == 0


def _cpf(text: str) -> bool:
    """Brazil: two digits, each a sum modulo 11."""
    digits = re.sub(r"\D", "", text)
    if len(set(digits)) == 1:
        return False
    for length in (9, 10):
        total = sum(int(d) * (length + 1 - i) for i, d in enumerate(digits[:length]))
        if total * 10 % 11 % 10 != int(digits[length]):
            return False
    return True


def _resident(text: str) -> bool:
    """China: a date, and a sum modulo 11 (ISO 7064); X is ten."""
    if not _day(int(text[6:10]), int(text[10:12]), int(text[12:14])) or not 1900 <= int(text[6:10]) <= 2100:
        return False
    total = sum(int(c) * pow(2, 17 - i, 11) for i, c in enumerate(text[:17]))
    return "10X98765432"[total % 11] == text[17].upper()


def _personnummer(text: str) -> bool:
    """Sweden: a date, and the Luhn sum of the last ten digits."""
    digits = re.sub(r"\D", "", text)[-10:]
    return _day(2000 + int(digits[:2]), int(digits[2:4]), int(digits[4:6])) and luhn(digits)


def _hetu(text: str) -> bool:
    """Finland: a date, and a letter that is the number modulo 31."""
    if not _day(2000 + int(text[4:6]), int(text[2:4]), int(text[:2])):
        return False
    return "0123456789ABCDEFHJKLMNPRSTUVWXY"[int(text[:6] + text[7:10]) % 31] == text[10]


def _fodselsnummer(text: str) -> bool:
    """Norway: a date, and two digits, each a sum modulo 11."""
    digits = text.replace(" ", "")
    if not _day(2000 + int(digits[4:6]), int(digits[2:4]), int(digits[:2])):
        return False
    return weighted(digits, "3761894521") % 11 == 0 and weighted(digits, "54327654321") % 11 == 0


def _belgian(text: str) -> bool:
    """Belgium: 97 less the number modulo 97, of those born since 2000 with a 2 before it."""
    digits = re.sub(r"\D", "", text)
    return any(97 - int(before + digits[:9]) % 97 == int(digits[9:]) for before in ("", "2"))


def _aadhaar(text: str) -> bool:
    """India: Verhoeff's sum; the first digit is neither 0 nor 1."""
    return verhoeff(text.replace(" ", ""))


def _ssn(text: str) -> bool:
    """United States: no checksum, but areas, groups and serials that were never given."""
    area, group, serial = text.split("-")
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


FISCALE = re.compile(r"[A-Z](?<!\w.)[A-Z]{5}\d{2}[A-EHLMPRST]\d{2}[A-Z]\d{3}[A-Z](?!\w)")
fiscale = _fiscale
_ = r"(?<![\w.+-])"
NATIONAL: tuple[tuple[str, re.Pattern, Callable[[str], bool]], ...] = (  # all but Italy's have seven digits in a row
    ("ES", re.compile(_ + r"(?:\d{8}|[XYZ]-?\d{7})[ -]?[A-HJ-NP-TV-Z](?!\w)"), _dni),
    (
        "FR",
        re.compile(_ + r"[12] ?\d{2} ?(?:0[1-9]|1[0-2]|[2-9]\d) ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}(?!\w|[ .-]\d)"),
        _nir,
    ),
    ("BR", re.compile(_ + r"\d{3}\.\d{3}\.\d{3}-\d{2}(?!\w)"), _cpf),
    ("CN", re.compile(_ + r"[1-8]\d{5}(?:19|20)\d{2}[01]\d[0-3]\d\d{3}[\dXx](?!\w)"), _resident),
    ("SE", re.compile(_ + r"(?:19|20)?\d{2}[01]\d[0-3]\d[-+]\d{4}(?![\w-])"), _personnummer),
    ("FI", re.compile(_ + r"[0-3]\d[01]\d{3}[-+A-FU-Y]\d{3}[0-9A-Y](?!\w)"), _hetu),
    ("BE", re.compile(_ + r"\d{2}\.[01]\d\.[0-3]\d[- ]\d{3}[.-]\d{2}(?!\w)"), _belgian),
    ("NO", re.compile(_ + r"[0-3]\d[01]\d{3} ?\d{5}(?![\w]|[ .-]\d)"), _fodselsnummer),
    ("PL", re.compile(_ + r"\d{2}[0-9]\d[0-3]\d{6}(?![\w]|[ .-]\d)"), _pesel),
    ("IN", re.compile(_ + r"(?<!\d )[2-9]\d{3} \d{4} \d{4}(?![\w]| ?\d|-)"), _aadhaar),
    ("US", re.compile(_ + r"\d{3}-\d{2}-\d{4}(?![\w-])"), _ssn),
)
