"""Numbers of JSON between bounds, and multiples of one, as expressions over their digits."""

from __future__ import annotations

from decimal import Decimal

from .expressions import EMPTY, Bytes, Choice, Literal, Node, Repeat, Rule, Unsupported, byte_range, optional
from .expressions import Sequence as InOrder

LONGEST = 15  # digits of a number without a bound: as many as a float tells apart
MOST_STATES = 20_000
DIGIT = byte_range(0x30, 0x39)
FURTHER = 4  # digits after the point, where there are bounds


def integer(low: int | None = None, high: int | None = None, multiple: int = 1) -> Node:
    """Whole numbers from `low` to `high` that `multiple` divides."""
    if multiple == 1 and low is None and high is None:
        return InOrder((optional(Literal(b"-")), _plain()))
    return _scaled(low, high, 0, multiple)


def number(low: Decimal | None = None, high: Decimal | None = None, above: bool = False, below: bool = False) -> Node:
    """Numbers from `low` to `high`, or above and below them."""
    if low is None and high is None:
        digits = Repeat(Bytes(DIGIT), 1, LONGEST)
        sign = Choice((Literal(b"+"), Literal(b"-")))
        exponent = InOrder((Bytes(1 << ord("e") | 1 << ord("E")), optional(sign), Repeat(Bytes(DIGIT), 1, 2)))
        fraction = InOrder((Literal(b"."), digits))
        return InOrder((optional(Literal(b"-")), _plain(), optional(fraction), optional(exponent)))
    given = [-int(bound.as_tuple().exponent) for bound in (low, high) if bound is not None]  # type: ignore[arg-type]
    deepest = max([FURTHER, *given]) + 1
    if deepest > LONGEST:
        raise Unsupported(f"bounds of more than {LONGEST - 1} digits after the point are not supported")
    options = []
    for after in range(deepest + 1):
        scale = Decimal(10) ** after
        first = None if low is None else _up(low * scale, above)
        last = None if high is None else -_up(-high * scale, below)
        if first is None or last is None or first <= last:
            options.append(_scaled(first, last, after, 1))
    if not options:
        raise Unsupported(f"there is no number between {low} and {high} of at most {deepest} digits after the point")
    return Choice(options)


def _up(value: Decimal, strictly: bool) -> int:
    whole = int(value.to_integral_value(rounding="ROUND_CEILING"))
    return whole + 1 if strictly and whole == value else whole


def _plain() -> Node:
    return Choice((Literal(b"0"), InOrder((Bytes(byte_range(0x31, 0x39)), Repeat(Bytes(DIGIT), 0, LONGEST - 1)))))


def _scaled(low: int | None, high: int | None, after: int, multiple: int) -> Node:
    """Whole numbers between bounds, written with a point before the last `after` digits."""
    widest = max([LONGEST, *(len(str(abs(bound))) for bound in (low, high) if bound is not None)])
    if widest > 40:
        raise Unsupported("bounds of more than 40 digits are not supported")
    end = 10**widest - 1
    first, last = -end if low is None else low, end if high is None else high
    options: list[Node] = []
    if first <= last and last >= 0:
        options.append(_positive(max(first, 0), last, after, multiple))
    if first < 0 and first <= last:
        options.append(InOrder((Literal(b"-"), _positive(max(-last, 1), -first, after, multiple))))
    if not options:
        raise Unsupported(f"there is no number from {low} to {high}")
    return Choice(options)


def _positive(low: int, high: int, after: int, multiple: int) -> Node:
    """From `low` to `high`, not below 0."""
    options = []
    for length in range(after + 1, len(str(high)) + 1 if len(str(high)) > after else after + 2):
        first = max(low, 10 ** (length - 1) if length > after + 1 else 0)
        last = min(high, 10**length - 1)
        if first <= last:
            options.append(_digits(str(first).zfill(length), str(last).zfill(length), after, multiple))
    return Choice(options)


def _digits(low: str, high: str, after: int, multiple: int) -> Node:
    """Digits of one length from `low` to `high`, whose number `multiple` divides: a rule for each place."""
    length = len(low)
    if length * multiple > MOST_STATES:
        raise Unsupported(f"multipleOf={multiple} is too large to be kept to")
    rules: dict[tuple[int, bool, bool, int], Rule] = {}

    def at(place: int, on_low: bool, on_high: bool, left: int) -> Node:
        if place == length:
            return EMPTY if left == 0 else Choice(())
        key = (place, on_low, on_high, left)
        if key in rules:
            return rules[key]
        made = rules[key] = Rule(f"digit {key}", EMPTY)
        least, most = int(low[place]) if on_low else 0, int(high[place]) if on_high else 9
        point = [Literal(b".")] if after and place == length - after else []
        groups: dict[int, tuple[Node, int]] = {}
        for digit in range(least, most + 1):
            tail = at(
                place + 1, on_low and digit == least, on_high and digit == most, (left * 10 + digit) % multiple
            )  # fmt: skip
            members = groups[id(tail)][1] if id(tail) in groups else 0
            groups[id(tail)] = (tail, members | 1 << 0x30 + digit)
        made.body = Choice([InOrder((*point, Bytes(members), tail)) for tail, members in groups.values()])
        return made

    return at(0, True, True, 0)

