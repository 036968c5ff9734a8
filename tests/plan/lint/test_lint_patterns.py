"""What counts as damage and as a secret: what people really have, and what only looks like it."""

import pytest

from topwork.plan.lint.damage import is_mojibake
from topwork.plan.lint.secrets import _cards, _ibans, _people, keys, masked


@pytest.mark.parametrize(
    "text", ["schön", "it’s “so”", "naïve café", "日本語のテキスト", "привет, мир", "😀 party", "10 °C", "£5", "Łódź"]
)
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_utf8_that_was_read_in_another_encoding(text: str, encoding: str) -> None:
    wrong = "".join(
        bytes([byte]).decode(encoding)
        if encoding == "latin-1" or byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
        else chr(byte)
        for byte in text.encode()
    )
    assert is_mojibake(wrong), wrong
    assert not is_mojibake(text)


def test_russian_that_was_read_as_cp1251() -> None:
    assert is_mojibake("Он сказал: РїСЂРёРІРµС‚")
    assert is_mojibake("锟斤拷 is what is left")


@pytest.mark.parametrize(
    "text",
    [
        "„Spaß“ und „Größe“", "MAÇÃ e MAÇÃS, NÃO É", "ÂNGULO", "“MAÇÔ é fruta", "Đã đọc Â Ê Ô",
        "Российская РСФСР, СССР РФ",
        "Ð and ð are Icelandic letters: Það", "L’été à Sète — déjà vu…", "€ 5 – 10", "É»", "中文，标点。", "à la carte",
    ],
)  # fmt: skip
def test_text_that_is_right_is_not_called_wrong(text: str) -> None:
    assert not is_mojibake(text)


@pytest.mark.parametrize(
    "text",
    [
        "AKIAIOSFODNN7EXAMPLE", "-----BEGIN RSA PRIVATE KEY-----", "-----BEGIN OPENSSH PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----", "ghp_" + "a1B2" * 9, "github_pat_" + "a1B2c" * 12, "sk-proj-" + "a1B2" * 12,
        "sk-" + "a1B2" * 12, "xoxb-1234567890-abcdef", "hf_" + "aBcD" * 9, "AIza" + "aB1-_" * 7, "glpat-" + "a1B2c" * 4,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NSJ9.dBjftJeZ4CVPmB92K27uhbUJU1p1r",
    ],
)  # fmt: skip
def test_keys(text: str) -> None:
    assert list(keys(f"Use {text} for it.")), text
    assert text not in masked(next(keys(f"Use {text} for it."))) or text.startswith("-----")


@pytest.mark.parametrize(
    "text",
    ["sk-learn is a library", "risk-" + "averse-" * 8, "hf_hub", "AKIA", "task-oriented-dialogue-systems-are-many"],
)
def test_what_is_no_key(text: str) -> None:
    assert not list(keys(text))


@pytest.mark.parametrize(
    "text", ["4111111111111111", "5555 5555 5555 4444", "3782-822463-10005", "6011 1111 1111 1117"]
)
def test_cards(text: str) -> None:
    assert list(_cards(f"My card is {text}."))


@pytest.mark.parametrize(
    "text",
    [
        "4111111111111112",
        "0000000000000000",
        "3.1415926535897932",
        "order 4111",
        "4,111,111,111,111,111",
        "4444444444444444",
    ],
)
def test_numbers_that_are_no_cards(text: str) -> None:
    assert not list(_cards(f"It is {text} here"))


def test_ibans() -> None:
    assert list(_ibans("Pay to DE89 3704 0044 0532 0130 00 please"))
    assert list(_ibans("Pay to GB29NWBK60161331926819."))
    assert not list(_ibans("Pay to DE89 3704 0044 0532 0130 01 please"))
    assert not list(_ibans("the XX12 ABCD EFGH IJKL code"))


def test_people() -> None:
    assert list(_people("Ask so.me+one@mail.example.org.")) == ["so.me+one@mail.example.org"]
    assert list(_people("Call +49 30 901820 now")) == ["+49 30 901820"]
    assert list(_people("SSN 219-09-9999")) == ["219-09-9999"]
    assert not list(_people("2 + 3 = 5, f(x) + 12 34; @property def f(self); 2021-10-1234; 1+1"))


def test_masks() -> None:
    assert masked("someone@example.org") == "so…@example.org"
    assert masked("4111 1111 1111 1111") == "4111…11"
    assert masked("-----BEGIN RSA PRIVATE KEY-----") == "begin rsa private key"
