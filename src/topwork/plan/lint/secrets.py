"""What looks like a secret or like personal data. It is told, masked, and never taken out: only its owner knows.

Numbers are told where their checksum is right: card numbers (Luhn, ISO/IEC 7812) and IBANs (ISO 13616, modulo 97).
"""

import re
from collections.abc import Callable, Iterator

from topwork.plan.lint.examined import Examined
from topwork.plan.lint.finding import Finding, Severity, of_rows

_KEY = re.compile(
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_[A-Za-z0-9_]{50,}\b|\bglpat-[A-Za-z0-9_-]{20,}\b"
    r"|\bsk-(?:proj-|ant-|svcacct-)?[A-Za-z0-9_-]{32,}\b"
    r"|\bxox[abeoprs]-[A-Za-z0-9-]{10,}\b"
    r"|\bhf_[A-Za-z]{30,}\b"
    r"|\bAIza[0-9A-Za-z_-]{35}\b"
    r"|\b[sr]k_live_[0-9A-Za-z]{16,}\b"
    r"|\bnpm_[A-Za-z0-9]{36}\b|\bpypi-[A-Za-z0-9_-]{50,}"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{16,}"
)
"""Private keys; AWS, GitHub, GitLab, OpenAI and its like, Slack, Hugging Face, Google, Stripe, npm, PyPI; JWT."""
_KEY_HINTS = (
    "PRIVATE KEY", "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "sk-", "xox", "hf_",
    "AIza", "k_live_", "npm_", "pypi-", "eyJ",
)  # fmt: skip
_DIGITS = re.compile(r"(?<![\w.,-])[3-6]\d{3}(?:[ -]?\d){9,15}(?![\w-]|[.,]\d)")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_MAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}\b")
_PHONE = re.compile(r"(?<![\w+])\+\d{1,3}[ .-]?\(?\d{1,4}\)?(?:[ .-]?\d{2,4}){2,4}(?!\d)")
_SOCIAL = re.compile(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
_NUMBERS = re.compile(r"\d(?:[ -]?\d){11}|[A-Z]{2}\d{2}")


def keys(text: str) -> Iterator[str]:
    """What looks like a key or a token that opens something."""
    if any(hint in text for hint in _KEY_HINTS):
        yield from (found.group() for found in _KEY.finditer(text))


def _cards(text: str) -> Iterator[str]:
    for found in _DIGITS.finditer(text):
        digits = re.sub(r"\D", "", found.group())
        if 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn(digits):
            yield found.group()


def luhn(digits: str) -> bool:
    """Whether the last digit is the checksum of the others."""
    doubled = [int(digit) * (1 + at % 2) for at, digit in enumerate(reversed(digits))]
    return sum(number - 9 if number > 9 else number for number in doubled) % 10 == 0


def _ibans(text: str) -> Iterator[str]:
    for found in _IBAN.finditer(text):
        bare = found.group().replace(" ", "")
        if 15 <= len(bare) <= 34 and iban(bare):
            yield found.group()


def iban(bare: str) -> bool:
    """Whether the two digits behind the country are the checksum of the rest."""
    return int("".join(str(int(letter, 36)) for letter in bare[4:] + bare[:4])) % 97 == 1


def _people(text: str) -> Iterator[str]:
    if "@" in text:
        yield from (found.group() for found in _MAIL.finditer(text))
    if "+" in text:
        yield from (found.group() for found in _PHONE.finditer(text) if 9 <= _count_digits(found.group()) <= 15)
    if "-" in text:
        yield from (found.group() for found in _SOCIAL.finditer(text))


def _count_digits(text: str) -> int:
    return sum(letter.isdigit() for letter in text)


def masked(found: str) -> str:
    """Enough to find it again, too little to use it: `so…@example.org`, `4111…11`."""
    name, at, host = found.partition("@")
    if at and "." in host:
        return f"{name[:2]}…@{host}"
    if found.startswith("-----"):
        return found.strip("-").strip().lower()
    return f"{found[:4]}…{found[-2:]}"


_CHECKS: tuple[tuple[str, Severity, tuple[Callable[[str], Iterator[str]], ...], str, str], ...] = (
    (
        "secrets", "warning", (keys,), "hold what looks like a key or a token that opens something",
        "take it out and make it void where it is real: a model repeats what it learned to whoever asks",
    ),
    (
        "payment-numbers", "warning", (_cards, _ibans), "hold card numbers or IBANs of which the checksum is right",
        "put made-up ones in their place, unless they are",
    ),
    (
        "personal-data", "notice", (_people,), "hold mail addresses, telephone or social security numbers",
        "nothing where they are public or made up; else replace them, and ask whether you may train on them",
    ),
)  # fmt: skip


def secrets(examined: Examined) -> Iterator[Finding]:
    """Keys, payment numbers and personal data, in one pass over the texts."""
    rows: dict[str, list[str]] = {check[0]: [] for check in _CHECKS}
    examples: dict[str, list[str]] = {check[0]: [] for check in _CHECKS}
    for side in examined.sides:
        for row, _, text in side.texts():
            numbers = _NUMBERS.search(text) is not None
            for rule, _, finders, *_ in _CHECKS:
                if rule == "payment-numbers" and not numbers:
                    continue
                hits = [hit for finder in finders for hit in finder(text)]
                if hits:
                    rows[rule].append(row.source)
                    examples[rule] += hits if len(examples[rule]) < 3 else []
    for rule, severity, _, told, remedy in _CHECKS:
        if rows[rule]:
            shown = ", ".join(dict.fromkeys(masked(hit) for hit in examples[rule][:3]))
            yield of_rows(rule, severity, rows[rule], examined.total, f"{told} ({shown})", remedy)
