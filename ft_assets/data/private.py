"""Find personal data and secrets in a text, by checksums and forms. Nothing is sent anywhere.

Found: card numbers (Luhn's checksum, ISO/IEC 7812), IBANs (mod 97, ISO 13616), e-mail addresses,
phone numbers with their country's code or in the form of North America, keys that services issue,
private keys, and passwords in URLs. Not found: names, addresses, and national phone numbers.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ft_assets.redaction import ISSUED_KEY

Kind = Literal["personal data", "secret"]

# Major issuers: Visa, Mastercard, American Express, Discover, JCB, Diners Club, UnionPay. Without
# it one in ten numbers of this length passes Luhn's checksum.
_ISSUER = re.compile(
    r"4(\d{12}|\d{15}|\d{18})|(5[1-5]|2[2-7])\d{14}|3[47]\d{13}|6(011|5\d\d)\d{12}|35\d{14}"
    r"|3(0[0-5]|[68]\d)\d{11}|62\d{14,17}"
)
_CARD = re.compile(r"(?<![\w.,+-])\d(?:[ -]?\d){12,18}(?![\w-])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_MAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,24}\b", re.I)
# RFC 2606 reserves them for examples.
_RESERVED = re.compile(r"(^|[@.])(example\.(com|net|org)|\w+\.(test|example|invalid))$", re.I)
_PHONE = re.compile(
    r"(?<![\w+.])\+[1-9](?:[ ()./-]{0,2}\d){6,14}(?![\w-])"
    r"|(?<![\w+.-])\(?[2-9]\d\d\)?[ .-][2-9]\d\d[.-]\d{4}(?![\w-])"
)
_FICTIONAL = re.compile(r"555\D?01\d\d$")  # North America keeps 555-0100 to 555-0199 for stories
_URL_PASSWORD = re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/@:]{0,99}:[^\s/@]{1,99}@", re.I)
_PRIVATE_KEY = re.compile(r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----")
_FORMS: tuple[tuple[Kind, str, re.Pattern[str]], ...] = (
    ("secret", "a private key", _PRIVATE_KEY),
    ("secret", "a key that a service issued", ISSUED_KEY),
    ("secret", "a password in a URL", _URL_PASSWORD),
    ("personal data", "an e-mail address", _MAIL),
    ("personal data", "an IBAN", _IBAN),
    ("personal data", "a card number", _CARD),
    ("personal data", "a phone number", _PHONE),
)


@dataclass(frozen=True)
class Private:
    """A piece of personal data or a secret. `shown` names it without its middle."""

    kind: Kind
    shown: str


def find_private(text: str) -> Iterator[Private]:
    """Yield the pieces of personal data and the secrets of a text."""
    taken: list[tuple[int, int]] = []
    for kind, name, form in _FORMS:
        for hit in form.finditer(text):
            inside = any(begin < hit.end() and hit.start() < end for begin, end in taken)
            if not inside and _is_valid(name, hit[0]):
                taken.append(hit.span())
                yield Private(kind, f"{name} ({_masked(hit[0])})")


def _is_valid(name: str, text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    if name == "a card number":
        return bool(_ISSUER.fullmatch(digits)) and luhn(digits)
    if name == "an IBAN":
        return mod_97(text.replace(" ", ""))
    if name == "an e-mail address":
        return not _RESERVED.search(text)
    if name == "a phone number":
        return 8 <= len(digits) <= 15 and not _FICTIONAL.search(text)
    return True


def luhn(digits: str) -> bool:
    """Return True if the last digit is Luhn's checksum of the others."""
    doubled = [int(one) * 2 for one in digits[-2::-2]]
    total = sum(map(int, digits[-1::-2])) + sum(one - 9 * (one > 9) for one in doubled)
    return total % 10 == 0 and len(set(digits)) > 1


def mod_97(iban: str) -> bool:
    """Return True if an IBAN without blanks has a possible length and the right check digits."""
    moved = "".join(str(int(letter, 36)) for letter in iban[4:] + iban[:4])
    return 15 <= len(iban) <= 34 and int(moved) % 97 == 1


def _masked(text: str) -> str:
    text = " ".join(text.split())
    return f"{text[:2]}…{text[-2:]}" if len(text) > 8 else "…"
