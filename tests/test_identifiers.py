"""Numbers of people and accounts against python-stdnum and phonenumbers, and by hand."""

from __future__ import annotations

import random
import re

import phonenumbers
import pytest
from stdnum import luhn, verhoeff
from stdnum.be import nn
from stdnum.br import cpf
from stdnum.cn import ric
from stdnum.es import dni
from stdnum.fi import hetu
from stdnum.fr import nir
from stdnum.it import codicefiscale
from stdnum.no import fodselsnummer
from stdnum.pl import pesel
from stdnum.se import personnummer

from luthier.prepare import identifiers as ids
from luthier.prepare.checks.personal_data import personal


def found(text: str) -> list[tuple[str, str]]:
    return [(what, text[start:stop]) for what, start, stop, _ in personal(text)]


@pytest.mark.parametrize("digits", ["79927398713", "4539148803436467", "0", "18", "26"])
def test_sums_are_those_of_stdnum(digits):
    assert ids.luhn(digits) == luhn.is_valid(digits)
    for other in range(10):
        changed = digits[:-1] + str(other)
        assert ids.luhn(changed) == luhn.is_valid(changed)
        assert ids.verhoeff(changed) == verhoeff.is_valid(changed)


MADE = {  # a number of the country's form with its last characters drawn, and what stdnum says of it
    "BR": ("###.###.###-##", cpf.is_valid),
    "ES": ("########A", dni.is_valid),
    "FI": ("1#0#5#-###B", hetu.is_valid),
    "FR": ("1 8# 0# 1# 1## ### ##", nir.is_valid),
    "NO": ("1#0#6######", fodselsnummer.is_valid),
    "PL": ("8#0#1######", pesel.is_valid),
    "SE": ("8#0#1#-####", personnummer.is_valid),
    "CN": ("11010519491#3####X", ric.is_valid),
    "BE": ("8#.0#.1#-###.##", nn.is_valid),
}


@pytest.mark.parametrize("country", MADE)
def test_national_numbers_are_those_of_stdnum(country):
    form, valid = MADE[country]
    drawn = random.Random(country)
    holds = next(check for name, _, check in ids.NATIONAL if name == country)
    pattern = next(pattern for name, pattern, _ in ids.NATIONAL if name == country)
    agreed = {True: 0, False: 0}
    for _ in range(6000):
        text = re.sub(
            "[#AB]",
            lambda m: {
                "#": drawn.choice("0123456789"),
                "A": drawn.choice("TRWAGMYFPDXBNJZSQVHLCKE"),
                "B": drawn.choice("0123456789ABCDEFHJKLMNPRSTUVWXY"),
            }[m[0]],
            form,
        )
        if not pattern.fullmatch(text):
            continue
        expected = valid(text)
        if holds(text) != expected:
            # stdnum also asks whether somebody can have been born then, or a region exists: ours is sum and form
            assert holds(text), text
            continue
        agreed[expected] += 1
    assert agreed[True] > 5
    assert agreed[False] > 100


def test_italian_codes():
    assert codicefiscale.is_valid("RCCMNL83S18D969H")
    assert found("Codice RCCMNL83S18D969H.") == [("national_id", "RCCMNL83S18D969H")]
    assert found("Codice RCCMNL83S18D969I.") == []


@pytest.mark.parametrize(
    "text",
    [
        "DE89370400440532013000",
        "GB29 NWBK 6016 1331 9268 19",
        "FR14 2004 1010 0505 0001 3M02 606",
        "NL91 ABNA 0417 1643 00",
        "NO93 8601 1117 947",
    ],
)
def test_ibans(text):
    assert found(f"Pay to {text}, please.") == [("iban", text)]
    wrong = text[:-1] + str((int(text[-1]) + 1) % 10)
    assert ("iban", wrong) not in found(f"Pay to {wrong}, please.")


def test_cards():
    for text in ("4539 1488 0343 6467", "5500-0000-0000-0004", "378282246310005", "6011000990139424"):
        assert found(f"card {text}.") == [("credit_card", text)]
        wrong = text[:-1] + str((int(text[-1]) + 1) % 10)
        assert "credit_card" not in dict(found(f"card {wrong}."))
    assert found("order 4539 1488 0343 6467 12 and 0000 0000 0000 0000, 3.14159265358979323846") == []


REGIONS = ("US", "GB", "DE", "FR", "IT", "ES", "IN", "BR", "JP", "CN", "AU", "NL", "SE", "PL", "MX", "ZA", "CH", "TR")


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("kind", ["MOBILE", "FIXED_LINE"])
def test_telephones_as_libphonenumber_writes_them(region, kind):
    number = phonenumbers.example_number_for_type(region, getattr(phonenumbers.PhoneNumberType, kind))
    text = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.INTERNATIONAL)
    assert found(f"Call {text} now, or write.") == [("phone", text)]
    assert found(f"Tel: {phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)}")


@pytest.mark.parametrize(
    "text",
    [
        "(415) 555-2671",
        "415-555-2671",
        "1-415-555-2671",
        "030/12345678",
        "(030) 123 456 78",
        "01 42 68 53 00",
        "0044 20 7946 0958",
        "0171 1234567",
    ],
)
def test_telephones_as_people_write_them(text):
    assert found(f"My number: {text}.") == [("phone", text)]
    assert [what for what, _ in found(f"Please ring ({text})")] == ["phone"]


@pytest.mark.parametrize(
    "text",
    [
        "in 1789, 1848 and 1989",
        "2021-03-04 12:30:45.123456",
        "2021-03-04T12:30:45+01:00",
        "from 10.5 to 2,345,678.90",
        "version 3.11.7.0",
        "ISBN 978-3-16-148410-0",
        "1234567890",
        "id 00000000",
        "0.1234567890123",
        "pi 3.141592653589793",
        "1 000 000 000",
        "a[1:2:3]",
        "std::string a::b",
        "12:30:45",
        "10.0.0.1 and 192.168.1.1 and 127.0.0.1",
        "1.2.3.4",
        "section 22.33.44.55",
        "git@github.com:a/b.git",
        "me@example.com",
        "logo@2x.png",
        "@decorator",
        "a @ b",
        "0x7fffffffffff",
        "sha 9b74c9897bac770ffc029102a200c5de",
        "+1 to that",
        "2^64 = 18446744073709551616",
        "11 22 33 44 55 66",
        "1700000000",
        "page 123-456",
        "99-2020",
        "doi 10.1000/182",
        "1.23e-10 4.56e+12",
        "40.7128, -74.0060",
        "3,000,000,000",
        "IEEE 754-2008, RFC 2606",
        "0-471-95869-7",
        "%08d 00:00:00",
        "0123456789",
    ],
)
def test_other_numbers_are_nobodys(text):
    assert found(text) == []


def test_addresses():
    text = "To anna.maria+list@mail.uni-koeln.de (or o'neil_7@corp.co.uk); from 93.184.216.34 or 2606:4700:4700::1111."
    assert found(text) == [
        ("email", "anna.maria+list@mail.uni-koeln.de"),
        ("email", "o'neil_7@corp.co.uk"),
        ("ip", "93.184.216.34"),
        ("ip", "2606:4700:4700::1111"),
    ]
    assert found("SSN 219-09-9999 and 666-12-3456") == [("national_id", "219-09-9999")]


def test_a_number_that_is_said_to_be_a_telephones():
    assert found("Phone number: 98765 43210") == [("phone", "98765 43210")]
    assert found("In all 98765 43210 of them") == []
