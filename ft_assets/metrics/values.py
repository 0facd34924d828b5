"""Numbers and dates as people write them, compared by value where `evaluation` declares it."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Literal

from ft_assets.errors import EvaluationError
from ft_assets.metrics.equality import same_scalar
from ft_assets.rows.types import Json

Kind = Literal["number", "date"]
Amount = tuple[Decimal, str]
EXAMPLES: dict[Kind, str] = {"number": "a number, e.g. 1234.5", "date": "a date, e.g. 2026-11-27"}


@dataclass(frozen=True)
class Values:
    """When two values of an answer are equal.

    kinds: {key of a JSON object: the kind of its value}; the key of an inner object is `outer.key`,
    with or without a list in between. decimal: the decimal separator of numbers in texts.
    day_first: whether 03/04/2026 is in April; None if no date is written like this.
    """

    kinds: Mapping[str, Kind] = field(default_factory=dict)
    decimal: str = "."
    day_first: bool | None = None

    def same_json(self, given: Json, expected: Json, path: str = "") -> bool:
        """Return True if two JSON values are equal, lists and objects to any depth.

        Numbers are equal by value (1 and 1.0). A bool is not a number. Texts are compared in NFC.
        The order of keys does not count, the order of a list does. Raises EvaluationError if the
        expected value is not of its declared kind.
        """
        pairs = [(given, expected, path)]
        while pairs:  # no recursion: a value may be nested deeper than Python's stack
            left, right, at = pairs.pop()
            if at in self.kinds or not isinstance(right, dict | list):
                if not self.same(left, right, at):
                    return False
            elif isinstance(left, dict) and isinstance(right, dict):
                if left.keys() != right.keys():
                    return False
                pairs += [(left[key], right[key], below(at, key)) for key in right]
            elif isinstance(left, list) and isinstance(right, list):
                if len(left) != len(right):
                    return False
                pairs += [(one, other, at) for one, other in zip(left, right, strict=True)]
            else:
                return False
        return True

    def same(self, given: Json, expected: Json, path: str) -> bool:
        """Return True if the value at a path, which is no list or object, is the expected one."""
        kind = self.kinds.get(path)
        if kind is None or expected is None:
            return same_scalar(given, expected)
        return self.same_kind(kind, given, expected, f"its field {path}")

    def same_kind(self, kind: Kind, given: Json, expected: Json, what: str = "it") -> bool:
        """Return True if two values are the same number or date.

        Raises EvaluationError, in which `what` names the expected value, if that is none.
        """
        try:
            wanted = self._read(kind, expected)
        except ValueError as problem:
            raise EvaluationError(
                where="a held-out row",
                found=f"the reference cannot be compared: {what} is {expected!r:.80}, {problem}",
                expected=EXAMPLES[kind],
                fix="correct the row, or evaluation.normalise, decimal, day_first, or metrics",
            ) from None
        try:
            return self._read(kind, given) == wanted
        except ValueError:
            return False

    def _read(self, kind: Kind, value: Json) -> Amount | datetime:
        """Return the number or the date. Raises ValueError with the reason if it is none."""
        return self.number(value) if kind == "number" else self.date(value)

    def number(self, value: Json) -> Amount:
        """Return a number and its currency sign, if it has one: of JSON, or written in a text.

        A text can have groups of three digits, which one mark separates.
        """
        if isinstance(value, int | float) and not isinstance(value, bool):
            return Decimal(repr(value)), ""
        text, currency = _without_currency(value.strip()) if isinstance(value, str) else ("", "")
        found = _numbers(self.decimal).fullmatch(text)
        if found is None or not (found["whole"] or found["part"]):
            raise ValueError(f"which is no number with the decimal separator {self.decimal!r}")
        whole = re.sub(r"\D", "", found["whole"]) or "0"
        digits = f"{found['sign']}{whole}.{found['part'] or '0'}{found['power'] or ''}"
        return Decimal(digits), currency

    def date(self, value: Json) -> datetime:
        """Return a date: in ISO 8601, or any complete date with a year of four digits."""
        text = value.strip() if isinstance(value, str) else ""
        try:
            moment = datetime.fromisoformat(text)
            return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
        except ValueError:
            pass
        orders = (True, False) if self.day_first is None else (self.day_first,)
        if re.match(r"\d{4}\D", text):  # after the year comes the month, everywhere
            orders = (False,)
        found = {moment for order in orders if (moment := _complete_date(text, order))}
        if not found:
            raise ValueError("which is no complete date")
        if len(found) > 1:
            one, other = sorted(moment.date().isoformat() for moment in found)
            raise ValueError(f"which is {one} or {other}: evaluation.day_first is not set")
        return found.pop()


def below(path: str, key: str) -> str:
    """Return the path of a key of the object at a path."""
    return f"{path}.{key}" if path else key


def _without_currency(text: str) -> tuple[str, str]:
    """Return a number's text without its currency sign, and the sign: $5, -$5 or 5 $."""
    text = text.replace("\N{MINUS SIGN}", "-")
    for place in (-1, 0, 1 if text[:1] in ("-", "+") else 0):
        sign = text[place:][:1]
        if sign and unicodedata.category(sign) == "Sc":
            rest = text[:place].strip() + text[place:][1:].strip()
            return rest, sign
    return text, ""


def _numbers(decimal: str) -> re.Pattern[str]:
    groups = {".": ",'’_", ",": ".'’_"}[decimal] + " \N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}"
    grouped = rf"[0-9]{{1,3}}(?P<mark>[{groups}])[0-9]{{3}}(?:(?P=mark)[0-9]{{3}})*"
    part = rf"(?:{re.escape(decimal)}(?P<part>[0-9]*))?"
    power = r"(?P<power>[eE][-+]?[0-9]+)?"
    return re.compile(rf"(?P<sign>[-+]?)\s*(?P<whole>{grouped}|[0-9]*){part}{power}")


def _complete_date(text: str, day_first: bool) -> datetime | None:
    """Return the date of a text that has a day, a month and a year of four digits, else None.

    Of a text with a time of day it is None. dateutil takes what a text lacks from a default: two
    defaults that share nothing show it.
    """
    from dateutil import parser

    if not re.search(r"(?<!\d)\d{4}(?!\d)", text):
        return None
    defaults = (datetime(2001, 1, 1, 1, 1, 1), datetime(2003, 3, 3, 3, 3, 3))
    try:
        found = [
            parser.parse(text, dayfirst=day_first, ignoretz=True, default=default)
            for default in defaults
        ]
    except (ValueError, OverflowError, TypeError):
        return None
    timed = any(one.time() != default.time() for one, default in zip(found, defaults, strict=True))
    if timed or found[0].date() != found[1].date():
        return None
    return datetime.combine(found[0].date(), datetime.min.time())
