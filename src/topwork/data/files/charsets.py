"""Which encoding text that is not UTF-8 is likely in. Short files defeat statistics alone, so every likely encoding is
tried, and its letters are judged: are they those that its languages use most, and do they stand where letters stand?"""

from collections.abc import Callable
from dataclasses import dataclass

_SAMPLE_BYTES = 1 << 16
_SIMPLIFIED = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同现当"
    "没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手"
    "应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平"
    "系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基眼书非则听白却"
    "请您谢吗吧呢问答见早晚京"
)
_TRADITIONAL = (
    "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過發後作裡用道行所然家種事成方多經麼去法學如都同現當"
    "沒動面起看定天分還進好小部其些主樣理心她本前開但因只從想實日軍者意無力它與長把機十民第公此已工使情明性知全三又關點正業外將兩高間由問很最重並物手"
    "應戰向頭文體政美相見被利什二等產或新己制身果加西斯月話合回特代內信表化老給世位次度門任常先海通教兒原東聲提立及比員解水名真論處走義各入幾口認條平"
    "請您謝嗎吧呢答早晚灣"
)
_HANGUL = (
    "이다는을의에고가은로하지한도를서기사있어나리그자아시인대해일들것정수부전스"
    "라장보과주게으안녕세요니습합감까네만와우면여오무제구비상조원성용내생되했었겠"
)
_PUNCTUATION = "，。、；：？！（）《》“”‘’—…·「」『』　～"
_CENTRAL = ("ąćęłńóśżáčéěířšúůýžőűöüä", "źďňťăâîşţđôĺľŕ")
_MARKS = "’‘“”–—…€°«»¿¡£§©®•„№"


@dataclass(frozen=True)
class _Candidate:
    """An encoding as `data.encoding` names it, its wider forms, and how much (-1 to 1) a character speaks for it."""

    names: tuple[str, ...]
    worth: Callable[[str, str, str], float]
    bonus: float = 0.0


def _ideographs(common: str, narrow: str, first: int, last: int) -> Callable[[str, str, str], float]:
    """Chinese: a character in the most common ones; else one of the `narrow` encoding's everyday rows."""
    usual = frozenset(common)

    def worth(char: str, _before: str, _after: str) -> float:
        if char in usual:
            return 1.0
        if char in _PUNCTUATION or "\uff01" <= char <= "\uff5e":
            return 0.8
        if not "\u4e00" <= char <= "\u9fff":
            return -0.5
        code = char.encode(narrow, "ignore")
        return 0.5 if code and first <= code[0] <= last else -0.2

    return worth


def _japanese(char: str, _before: str, _after: str) -> float:
    if "\u3041" <= char <= "\u3096" or "\u30a1" <= char <= "\u30fc":
        return 1.0
    if char in _PUNCTUATION or "\uff01" <= char <= "\uff5e":
        return 0.8
    if "\u4e00" <= char <= "\u9fff":
        code = char.encode("euc_jp", "ignore")
        return 0.4 if code and 0xB0 <= code[0] <= 0xCF else -0.2
    return -0.5  # half-width kana among them, which every other double-byte text looks like


def _korean(char: str, _before: str, _after: str) -> float:
    if "\uac00" <= char <= "\ud7a3":
        return 1.0 if char in _HANGUL else 0.4
    if char in _PUNCTUATION:
        return 0.8
    return -0.2


def _accents(common: str, others: str = "") -> Callable[[str, str, str], float]:
    """Letters beyond ASCII of an alphabet that is ASCII's but for them: they stand in words among ASCII's."""
    often, usual = frozenset(common + common.upper()), frozenset((common + others) + (common + others).upper())

    def worth(char: str, before: str, after: str) -> float:
        if char in _MARKS:
            return 1.0 if char == "’" and (before + after).isalpha() else 0.5
        if char not in usual:
            return 0.1 if char.isalpha() else -0.5
        if _capital_inside(char, before):
            return -1.0
        among = any(near.isascii() and near.isalpha() for near in (before, after))
        if among:
            return 1.0 if char in often else 0.7
        return -0.3 if (before + after).strip() and not (before + after).isascii() else 0.4

    return worth


def _script(common: str, others: str = "", marks: str = "") -> Callable[[str, str, str], float]:
    """Letters of a script of its own: they stand in words without ASCII's. `marks` stand on a letter before them."""
    often, seldom = frozenset(common + common.upper()), frozenset(others + others.upper())

    def worth(char: str, before: str, after: str) -> float:
        if char in _MARKS:
            return 0.3
        if char in marks:
            return 1.0 if before in often or before in seldom or before in marks else -1.0
        if char not in often and char not in seldom:
            return -0.5
        if _capital_inside(char, before) or any(near.isascii() and near.isalpha() for near in (before, after)):
            return -1.0
        if not (before.isalpha() or after.isalpha() or after in marks):
            return 0.3  # a word of one letter, or no letter at all
        return 1.0 if char in often and not (char.isupper() and before.isupper()) else 0.3

    return worth


def _capital_inside(char: str, before: str) -> bool:
    return char.isupper() and before.isalpha() and not before.isupper()


_RUSSIAN = _script("оеаинтсрвлкмдпуяыьгзб", "чйхжшюцщэфъёіїєґў")
_DOUBLE = 0.25
"""What it says for an encoding that bytes go two by two without one that is left over."""
_CANDIDATES = (
    _Candidate(("gb18030",), _ideographs(_SIMPLIFIED, "gb2312", 0xB0, 0xD7), _DOUBLE),
    _Candidate(("shift_jis", "cp932"), _japanese, _DOUBLE),
    _Candidate(("euc_jp",), _japanese, _DOUBLE),
    _Candidate(("big5", "cp950", "big5hkscs"), _ideographs(_TRADITIONAL, "big5", 0xA4, 0xC6), _DOUBLE),
    _Candidate(("euc_kr", "cp949"), _korean, _DOUBLE),
    _Candidate(("cp1252",), _accents("éèêëàâäáãåçñóòôöõúùûüíìîïßæøœ")),
    _Candidate(("cp1251",), _RUSSIAN),
    _Candidate(("koi8-r",), _RUSSIAN),
    _Candidate(("cp866",), _RUSSIAN),
    _Candidate(("cp1250",), _accents(*_CENTRAL)),
    _Candidate(("iso8859-2",), _accents(*_CENTRAL)),
    _Candidate(("cp1253",), _script("αοιετσνηυρπκμλςωέάήίόύώ", "βγδζθξφχψ")),
    _Candidate(("cp1254",), _accents("ğışİçöüâîû")),
    _Candidate(("cp1257",), _accents("ąčęėįšųūžāēģīķļņōõäöü")),
    _Candidate(("cp1255",), _script("יוהלאשרתבמנםדחעקפ", "גזטךכןסףץצ")),
    _Candidate(("cp1256",), _script("الينمرتوبعدسفهكقحجةأشصىط", "ثخذزضظغءآؤإئپچژگ،؟")),
    _Candidate(("cp874",), _script("านรกงวมยลอสทตดปบคพหจขชเแโไใ", "ผถะฟญณธษศซภฐฉฎฏฑฒฬฮฤ", "ัิีึืุู็่้๊๋์ำๅๆ")),
    _Candidate(("mac_roman",), _accents("éèêëàâäáãåçñóòôöõúùûüíìîïßæøœ")),
    _Candidate(("cp850",), _accents("éèêëàâäáãåçñóòôöõúùûüíìîïßæø")),
)


def likely_encodings(data: bytes, limit: int = 3) -> list[str]:
    """The likeliest encodings of `data`, best first, as `data.encoding` names them; none where none reads it."""
    data = data[:_SAMPLE_BYTES]
    voted = _library_says(data)
    scores: dict[str, float] = {}
    texts: dict[str, str] = {}
    for number, candidate in enumerate(_CANDIDATES):
        name, text = next(((name, text) for name in candidate.names if (text := _read(data, name))), ("", ""))
        if name:
            agrees = voted.replace("-", "_") in {other.replace("-", "_") for other in candidate.names}
            scores[name] = _score(text, candidate) + candidate.bonus + 0.1 * agrees - 0.001 * number
            texts[name] = text
    alike: dict[str, list[str]] = {}
    for name, text in texts.items():
        alike.setdefault(text, []).append(name)
    for same in alike.values():  # of several that read it alike the most usual is enough
        scores[same[0]] = max(scores[name] for name in same)
    names = sorted((same[0] for same in alike.values()), key=lambda name: -scores[name])
    good = [name for name in names if scores[name] > 0] or names[:1]
    return good[:limit] or ([voted] if voted and _read(data, voted) else [])


def _read(data: bytes, name: str) -> str:
    """The text; empty where these bytes are none in this encoding. A character cut off at the end is forgiven."""
    for cut in range(min(4, len(data))):
        try:
            text = data[: len(data) - cut].decode(name)
        except (UnicodeDecodeError, LookupError):
            continue
        return "" if any("\x7f" <= char <= "\x9f" for char in text) else text
    return ""


def _score(text: str, candidate: _Candidate) -> float:
    """The mean worth of the characters beyond ASCII."""
    worths = [
        candidate.worth(char, text[at - 1] if at else " ", text[at + 1] if at + 1 < len(text) else " ")
        for at, char in enumerate(text)
        if not char.isascii()
    ]
    return sum(worths) / len(worths) if worths else -1.0


def _library_says(data: bytes) -> str:
    """What charset-normalizer takes it for; it judges long texts well."""
    import logging

    from charset_normalizer import from_bytes

    logging.getLogger("charset_normalizer").setLevel(logging.ERROR)
    best = from_bytes(data).best()
    return best.encoding if best is not None and best.encoding != "ascii" else ""
