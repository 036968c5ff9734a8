"""The shipped quickstart data: reproducible, answers that follow from the ticket by rule, train and test apart."""

import datetime
import importlib.util
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "support"
KEYS = ["intent", "product", "urgency", "order", "date"]
MONTHS = "january february march april may june july august september october november december".split()  # noqa: SIM905
ORDER = re.compile(r"(?<![\d-])(?:FW-)?\d{5}(?!\d|-)")
NUMERIC_DATE = re.compile(r"\b\d{1,2}([./ ])\d{1,2}\1\d{2,4}\b|\b\d{4}-\d\d-\d\d\b")
WORD_DATE = re.compile(
    rf"\b\d{{1,2}}(st|nd|rd|th)?( of |-| )({'|'.join(m[:3] for m in MONTHS)})|\b({'|'.join(MONTHS)}) \d"
)
CUE_SECTIONS = ("high", "danger", "low", "low.praise")
CUE_WORDS = re.compile(
    r"\b(urgent|asap|hurry|rush|immediately|(right|straight) away|at once|quickly|fast"
    r"|deadline|tomorrow|today|tonight|whenever|wait any"
    r"|patien\w*|priority|without delay|smoke|spark\w*|electric shock|fire|flame|burn\w*)\b",
    re.IGNORECASE,
)

Row = tuple[str, dict[str, Any]]  # the ticket and the parsed answer


@cache
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support_make_data", FOLDER / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def rows(split: str) -> list[Row]:
    lines = (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    conversations = [json.loads(line)["messages"] for line in lines]
    return [(messages[1]["content"], json.loads(messages[2]["content"])) for messages in conversations]


def phrases(split: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = script().read_phrases(split)
    return found


def normal(text: str) -> str:
    """Letters only, lower case: what remains equal when numbers, dates, points and capitals differ."""
    return " ".join(re.findall(r"[a-z]+", text.lower().replace("'", "")))


def products_masked(text: str) -> str:
    """The ticket without product names, so that one sentence about two products counts as one sentence."""
    aliases = sorted(
        {a.lower() for s in ("train", "test") for k, v in phrases(s).items() if k[:8] == "product." for a in v}
    )
    return re.sub("|".join(map(re.escape, sorted(aliases, key=len, reverse=True))), "P", text.lower())


def written_forms(date: datetime.date) -> set[str]:
    """Every form in which the README says that a date may stand in a ticket, lower case; numbers are day first."""
    d, m, y = date.day, date.month, date.year
    name = MONTHS[m - 1]
    ends = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}
    th = f"{d}{ends.get(d, 'th')}"
    words = {
        f"{d} {name} {y}",
        f"{name} {d}, {y}",
        f"{name} {th}, {y}",
        f"the {th} of {name} {y}",
        f"{d} {name[:3]} {y}",
    }
    numbers = {date.isoformat(), f"{d:02}.{m:02}.{y}", f"{d}.{m}.{y}", f"{d:02}.{m:02}.{y % 100}", f"{d:02}/{m:02}/{y}"}
    return words | numbers | {f"{d}-{name[:3]}-{y}", f"{d:02} {m:02} {y}"}


@pytest.mark.parametrize("split", ["train", "test"])
def test_files_are_what_the_script_writes(split: str) -> None:
    assert (FOLDER / f"{split}.jsonl").read_bytes() == script().make(split).encode("utf-8")


@pytest.mark.parametrize(("split", "least"), [("train", 1200), ("test", 300)])
def test_rows_are_enough_distinct_and_of_one_shape(split: str, least: int) -> None:
    lines = (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= least
    assert len({ticket.lower() for ticket, _ in rows(split)}) == len(lines)
    for line in lines:
        row = json.loads(line)
        assert list(row) == ["messages"]
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == script().SYSTEM
        answer = row["messages"][2]["content"]
        assert list(json.loads(answer)) == KEYS
        assert answer == json.dumps(json.loads(answer), separators=(",", ":"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_slot_or_marker_is_left_in_a_ticket(split: str) -> None:
    for ticket, _ in rows(split):
        assert not re.search(r"[{}~\x00-\x09\x0b-\x1f]|\| ", ticket), ticket
        assert ticket == ticket.strip()


@pytest.mark.parametrize("split", ["train", "test"])
def test_orders_are_copied_from_the_ticket(split: str) -> None:
    for ticket, answer in rows(split):
        order = answer["order"]
        if order is None:
            assert "FW-" not in ticket
            continue
        assert ORDER.fullmatch(order)
        assert order in ORDER.findall(ticket), (ticket, order)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_order_number_is_called_an_order_and_no_other_number_is(split: str) -> None:
    for section, pieces in phrases(split).items():
        for piece in pieces:
            if "{o}" in piece:
                assert "order" in piece.lower(), piece
            if section.startswith("number") or ("~" in piece and "{o}" not in piece and "core" not in section):
                assert "order" not in piece.lower(), piece


@pytest.mark.parametrize("split", ["train", "test"])
def test_dates_are_a_written_form_of_the_ticket_and_the_only_one(split: str) -> None:
    for ticket, answer in rows(split):
        text = ticket.lower()
        if answer["date"] is None:
            assert not NUMERIC_DATE.search(text), ticket
            assert not WORD_DATE.search(text), ticket
            continue
        forms = [form for form in written_forms(datetime.date.fromisoformat(answer["date"])) if form in text]
        assert forms, (ticket, answer["date"])
        rest = text.replace(max(forms, key=len), "")
        assert not NUMERIC_DATE.search(rest), ticket
        assert not WORD_DATE.search(rest), ticket


@pytest.mark.parametrize("split", ["train", "test"])
def test_product_is_named_in_the_ticket_and_null_means_none_is(split: str) -> None:
    aliases = {k[8:]: [a.lower() for a in v] for k, v in phrases(split).items() if k.startswith("product.")}
    several = 0
    for ticket, answer in rows(split):
        named = {
            product
            for product, names in aliases.items()
            if any(re.search(rf"\b{re.escape(name)}\b", ticket.lower()) for name in names)
        }
        if answer["product"] is None:
            assert not named, ticket
            continue
        assert answer["product"] in named, ticket
        several += len(named) > 1
        assert len(named) <= 2, ticket
    assert 0 < several < 0.06 * len(rows(split))  # the one said not to be affected: there, but sparingly


@pytest.mark.parametrize("split", ["train", "test"])
def test_urgency_words_stand_in_cues_alone(split: str) -> None:
    """Else a core could say "today" while its rows are labelled normal."""
    for section, pieces in phrases(split).items():
        if section not in CUE_SECTIONS:
            assert not [piece for piece in pieces if CUE_WORDS.search(piece)], section


def test_cues_decide_the_urgency_of_unblurred_tickets() -> None:
    for split in ("train", "test"):
        bank = phrases(split)
        for ticket, answer in rows(split):
            high = any(cue in ticket for section in CUE_SECTIONS[:2] for cue in bank[section])
            low = any(cue in ticket for section in CUE_SECTIONS[2:] for cue in bank[section])
            assert not (high and low), ticket
            assert not (high and answer["urgency"] != "high"), ticket
            assert not (low and answer["urgency"] != "low"), ticket


@pytest.mark.parametrize("split", ["train", "test"])
def test_classes_are_balanced(split: str) -> None:
    answers = [answer for _, answer in rows(split)]
    n = len(answers)
    intents = Counter(answer["intent"] for answer in answers)
    assert len(intents) == 12
    assert set(intents.values()) == {n // 12}
    products = Counter(answer["product"] for answer in answers)
    assert len(products) == 9
    assert all(0.08 * n <= count <= 0.25 * n for count in products.values()), products
    urgency = Counter(answer["urgency"] for answer in answers)
    assert all(0.2 * n <= urgency[level] <= 0.5 * n for level in ("low", "normal", "high")), urgency
    for key in ("order", "date"):
        assert 0.4 * n <= sum(answer[key] is not None for answer in answers) <= 0.65 * n


@pytest.mark.parametrize("split", ["train", "test"])
def test_lengths_reach_from_a_shout_to_a_long_mail(split: str) -> None:
    words = sorted(len(ticket.split()) for ticket, _ in rows(split))
    assert words[0] <= 4
    assert words[-1] >= 100
    assert 25 <= sum(words) / len(words) <= 60


def test_wording_is_enough_for_variety() -> None:
    for split, least in (("train", 15), ("test", 6)):
        cores = {k: v for k, v in phrases(split).items() if k.startswith("core.")}
        assert len(cores) == 12
        assert all(len(set(pieces)) >= least for pieces in cores.values())


def test_no_held_out_piece_stands_in_training_or_is_close_to_it() -> None:
    """Names, streets, greetings, cues and cores: all differ; a held-out core shares under half of its words."""
    train = {k: v for k, v in phrases("train").items() if not k.startswith("product.")}
    test = {k: v for k, v in phrases("test").items() if not k.startswith("product.")}
    seen = {normal(piece) for pieces in train.values() for piece in pieces}
    assert not [piece for pieces in test.values() for piece in pieces if normal(piece) in seen]
    known = [set(words.split()) for words in seen if words]
    for section in (name for name in test if name.startswith("core.")):
        for piece in test[section]:
            words = set(normal(piece).split())
            assert max(len(words & other) / len(words | other) for other in known) < 0.5, piece


def test_no_test_ticket_sentence_or_order_stands_in_training() -> None:
    def sentences(split: str) -> set[str]:
        texts = [products_masked(ticket) for ticket, _ in rows(split)]
        return {normal(s) for text in texts for s in re.split(r"[.!?\n]+", text) if len(normal(s).split()) > 1}

    assert not sentences("test") & sentences("train")
    assert not {normal(ticket) for ticket, _ in rows("test")} & {normal(ticket) for ticket, _ in rows("train")}
    orders = {split: {answer["order"] for _, answer in rows(split)} - {None} for split in ("train", "test")}
    assert not orders["train"] & orders["test"]


def test_slips_touch_words_but_never_what_is_copied() -> None:
    make_data = script()
    dice = make_data.Dice(1)
    facts = ("FW-12345", "Plinkbox speaker", "12 August 2025")
    text = "please look \x02{}\x03 after the parcel with \x02{}\x03 from \x02{}\x03 tomorrow".format(*facts)
    blurred = [make_data.blur(text, dice) for _ in range(200)]
    assert all(facts[0] in ticket for ticket in blurred)
    assert all(fact.lower() in ticket.lower() for fact in facts for ticket in blurred)
    assert len(set(blurred)) > 20


def test_the_readme_shows_a_real_row() -> None:
    shown = re.findall(r"```json\n(.*?)```", (FOLDER / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = (FOLDER / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(shown) == 1
    assert json.loads(shown[0]) in [json.loads(line) for line in lines]
