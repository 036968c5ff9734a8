"""Write the support data set: train.jsonl (1,200 rows) and test.jsonl (300 rows), byte for byte the same each time.

Every sentence stands in phrases.train.txt or phrases.test.txt, which share no wording; this script only draws the
facts of a ticket, puts hand-written pieces around them and blurs some tickets with typing slips. README.md states the
rule behind each field. Run it as ``python examples/support/make_data.py``; it needs the standard library alone.
"""

import datetime
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SYSTEM = "Read the support ticket and answer with one line of JSON."
ROWS = {"train": 1200, "test": 300}
SEEDS = {"train": 20260, "test": 20261}

DATE_GROUP = {"track": "ordered", "address": "ordered", "cancel": "ordered", "charge": "charge", "account": "account"}
ORDER_CHANCE = {"account": 0.35, "praise": 0.4}
DEVICE_INTENTS = ("replace", "repair", "warranty", "howto")  # where a serial number would be natural
URGENCY = ("high",) * 6 + ("low",) * 5 + ("normal",) * 9
PRAISE_URGENCY = ("low",) * 5 + ("normal",) * 15
SHAPES = ("bare",) * 3 + ("short",) * 9 + ("mail",) * 6 + ("long",) * 2
STYLES = ("plain",) * 12 + ("slips",) * 5 + ("lower",) * 3

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
KEY_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
FIRST_DAY, DAYS = datetime.date(2024, 6, 1), 850


def ordinal(day: int) -> str:
    suffix = "th" if 10 < day < 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


DATE_FORMS: tuple[Callable[[datetime.date], str], ...] = (
    lambda d: d.isoformat(),
    lambda d: f"{d.day} {MONTHS[d.month - 1]} {d.year}",
    lambda d: f"{MONTHS[d.month - 1]} {d.day}, {d.year}",
    lambda d: f"{MONTHS[d.month - 1]} {ordinal(d.day)}, {d.year}",
    lambda d: f"the {ordinal(d.day)} of {MONTHS[d.month - 1]} {d.year}",
    lambda d: f"{d.day} {MONTHS[d.month - 1][:3]} {d.year}",
    lambda d: f"{d.day:02}.{d.month:02}.{d.year}",
    lambda d: f"{d.day}.{d.month}.{d.year}",
    lambda d: f"{d.day:02}.{d.month:02}.{d.year % 100}",
    lambda d: f"{d.day:02}/{d.month:02}/{d.year}",
)
UNSEEN_DATE_FORMS: tuple[Callable[[datetime.date], str], ...] = (  # join the others in the test rows
    lambda d: f"{d.day}-{MONTHS[d.month - 1][:3]}-{d.year}",
    lambda d: f"{d.day:02} {d.month:02} {d.year}",
)


def read_phrases(split: str) -> dict[str, list[str]]:
    """Sections of hand-written pieces: ``== name``, then one piece a line."""
    bank: dict[str, list[str]] = {}
    name = ""
    for line in (HERE / f"phrases.{split}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            name = line[3:]
            bank[name] = []
        elif line:
            bank[name].append(line.replace("\\n", "\n"))
    return bank


class Dice:
    """Draws from a seed with ``random()`` alone: Python promises the same numbers from it in every version."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._decks: dict[str, list[str]] = {}

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def below(self, n: int) -> int:
        return int(self._random.random() * n)

    def draw(self, deck: str, cards: Sequence[str]) -> str:
        """The next card of a shuffled deck, which is shuffled anew when it is used up: every card comes up as often."""
        left = self._decks.setdefault(deck, [])
        if not left:
            left.extend(cards)
        return left.pop(self.below(len(left)))


class Writer:
    """Makes the tickets of one split."""

    def __init__(self, split: str) -> None:
        self.bank = read_phrases(split)
        self.intents = [name.removeprefix("core.") for name in self.bank if name.startswith("core.")]
        self.products = [name.removeprefix("product.") for name in self.bank if name.startswith("product.")]
        self.dice = Dice(SEEDS[split])
        self.forms = DATE_FORMS + (UNSEEN_DATE_FORMS if split == "test" else ())
        self.digit = {"train": "1357", "test": "2468"}[split]  # first digits: no order number stands in both splits
        self.used: set[str] = set()

    def pick(self, section: str) -> str:
        return self.dice.draw(section, self.bank[section])

    def order(self) -> str:
        """A new order number: five digits, with the prefix FW- in half of the cases."""
        while True:
            digits = self.digit[self.dice.below(4)] + "".join(str(self.dice.below(10)) for _ in range(4))
            if digits not in self.used:
                self.used.add(digits)
                return "FW-" + digits if self.dice.chance(0.5) else digits

    def mention(self, product: str) -> str:
        """The product by its name in half of the cases, else by model, by kind or by both."""
        aliases = self.bank[f"product.{product}"]
        return product if self.dice.chance(0.4) else self.dice.draw(f"alias {product}", aliases)

    def row(self, intent: str) -> dict[str, list[dict[str, str]]]:
        """One conversation: system, ticket, answer."""
        dice = self.dice
        fixed, _, core = self.pick(f"core.{intent}").rpartition("| ")
        shape = dice.draw("shape", SHAPES)
        urgency = dice.draw(f"urgency {intent}", PRAISE_URGENCY if intent == "praise" else URGENCY)
        detailed = shape != "bare"
        lead = "{p}" not in core and detailed and dice.chance(0.35)
        product = (fixed or dice.draw("product", self.products)) if "{p}" in core or lead else None
        order = self.order() if "{o}" in core or (detailed and dice.chance(ORDER_CHANCE.get(intent, 0.65))) else None
        day = FIRST_DAY + datetime.timedelta(days=dice.below(DAYS))
        date = day if "{d}" in core or (detailed and dice.chance(0.55)) else None
        opening = [self.pick("lead")] if lead else []
        body = [*opening, *self.around(core, intent, order, date, shape), *self.cue(urgency, intent)]
        if dice.chance(0.15):  # the hurry, or the lack of it, said first
            body = body[-1:] + body[:-1]
        text = self.fill(self.frame(body, shape), product, order, date)
        answer = {"intent": intent, "product": product, "urgency": urgency, "order": order}
        answer["date"] = date.isoformat() if date else None
        return conversation(blur(text, dice), answer)

    def cue(self, urgency: str, intent: str) -> list[str]:
        """The words that decide the urgency; none makes it normal."""
        if urgency == "high":
            return [self.pick("danger" if intent == "repair" and self.dice.chance(0.3) else "high")]
        if urgency == "low":
            return [self.pick("low.praise" if intent == "praise" else "low")]
        return []

    def around(self, core: str, intent: str, order: str | None, date: datetime.date | None, shape: str) -> list[str]:
        """The core with the sentences that carry the order and the date, distractors and small talk."""
        dice, group = self.dice, DATE_GROUP.get(intent, "bought")
        need_order, need_date = bool(order) and "{o}" not in core, bool(date) and "{d}" not in core
        details = []
        if need_order and need_date and intent != "account" and dice.chance(0.4):
            details.append(self.pick("both"))
        else:
            details += [self.pick("order.account" if intent == "account" else "order")] if need_order else []
            details += [self.pick(f"date.{group}")] if need_date else []
        if not date and shape != "bare" and dice.chance(0.15):
            details.append(self.pick(f"vague.{group}"))
        if shape != "bare" and dice.chance(0.14):
            details.append(self.pick("number.device" if intent in DEVICE_INTENTS and dice.chance(0.5) else "number"))
        if order and dice.chance(0.05):
            details.append(self.pick("other.order"))
        if "{p}" in core and shape != "bare" and dice.chance(0.05):
            details.append(self.pick("other.product"))
        for _ in range({"mail": dice.below(2), "long": 2}.get(shape, 0)):
            section = "annoyed" if intent != "praise" and dice.chance(0.3) else "filler"
            details.insert(dice.below(len(details) + 1), self.pick(section))
        place = dice.below(len(details) + 1) if dice.chance(0.35) else 0
        return [*details[:place], core, *details[place:]]

    def frame(self, body: list[str], shape: str) -> str:
        """One text; mails get a greeting and a sign-off."""
        text = body[0]
        for piece in body[1:]:
            text += (". " if text[-1].isalnum() or text[-1] == "}" else " ") + piece
        if shape in ("mail", "long"):
            if self.dice.chance(0.7):
                text = self.pick("greeting") + self.dice.draw("after greeting", (" ", "\n")) + text
            if self.dice.chance(0.7):
                text += "\n" + self.pick("signoff")
        return text

    def fill(self, text: str, product: str | None, order: str | None, date: datetime.date | None) -> str:
        """Slots filled in; what an answer is read from is wrapped in \\x02 and \\x03, so that no slip touches it."""
        dice = self.dice
        others = [name for name in self.products if name != product]
        slots: dict[str, Callable[[], str]] = {
            "{p}": lambda: self.mention(product or ""),
            "{o}": lambda: order or "",
            "{d}": lambda: self.forms[dice.below(len(self.forms))](date or FIRST_DAY),
            "{x}": self.order,
            "{q}": lambda: others[dice.below(len(others))],
            "{name}": lambda: self.pick("name"),
            "{street}": lambda: self.pick("street"),
            "{price}": lambda: f"{dice.below(240) + 20}.90 euros",
        }
        text = re.sub(r"\{\w+\}", lambda found: f"\x02{slots[found[0]]()}\x03", text)
        text = re.sub("~", lambda _: str(dice.below(9) + 1), text)
        return re.sub(r"^(\x02?)([a-z])", lambda found: found[1] + found[2].upper(), text) if dice.chance(0.8) else text


def slip(word: str, dice: Dice) -> str:
    """One typing slip inside a word: two letters swapped, one lost, one doubled, or the key beside it."""
    at = 1 + dice.below(len(word) - 2)
    keys = next(row for row in KEY_ROWS if word[at] in row)
    beside = keys[(keys.index(word[at]) + 1) % len(keys)]
    new = (word[at + 1] + word[at], word[at + 1], 2 * word[at] + word[at + 1], beside + word[at + 1])[dice.below(4)]
    return word[:at] + new + word[at + 2 :]


def blur(text: str, dice: Dice) -> str:
    """A share of the tickets with typing slips or without capitals and apostrophes; the markers are taken out."""
    style = dice.draw("style", STYLES)
    pieces = re.split("(\x02[^\x03]*\x03)", text)  # the odd ones are protected
    if style == "lower":
        pieces = [piece if "\x02FW-" in piece else piece.lower().replace("'", "") for piece in pieces]
    elif style == "slips":
        words = [(i, found) for i in range(0, len(pieces), 2) for found in re.finditer(r"\b[a-z]{5,}\b", pieces[i])]
        chosen = {dice.below(len(words)) for _ in range(1 + len(words) // 9)} if words else set()
        for i, found in (words[k] for k in sorted(chosen, reverse=True)):  # from the end: earlier places stay right
            pieces[i] = pieces[i][: found.start()] + slip(found[0], dice) + pieces[i][found.end() :]
    return re.sub("[\x02\x03]", "", "".join(pieces))


def conversation(ticket: str, answer: dict[str, str | None]) -> dict[str, list[dict[str, str]]]:
    line = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    roles = (("system", SYSTEM), ("user", ticket), ("assistant", line))
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


def make(split: str) -> str:
    """The whole file of a split as text: as many rows of each intent, no ticket twice, in a drawn order."""
    writer = Writer(split)
    rows: dict[str, str] = {}
    for intent in writer.intents * (ROWS[split] // len(writer.intents)):
        before = len(rows)
        while len(rows) == before:  # a ticket that stands there already, but for its capitals, is written anew
            row = writer.row(intent)
            rows.setdefault(row["messages"][1]["content"].lower(), json.dumps(row, ensure_ascii=False))
    lines = [writer.dice.draw("lines", list(rows.values())) for _ in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for split in ROWS:
        (HERE / f"{split}.jsonl").write_text(make(split), encoding="utf-8", newline="\n")
