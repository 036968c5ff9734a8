"""Pairs, judged answers and prompts: every shape that people have, what is wrong with rows, and sft's word."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pasting import pasted, printed
from preference_rows import ASKED, BEFORE, GOOD, JUDGED, PAIRS, POOR, PROMPTS, SYSTEM, hh

from topwork.common.errors import DataError
from topwork.data.chat.template import ChatTemplate
from topwork.data.config import DataConfig
from topwork.data.conversations import BadRow, Message
from topwork.data.files.rows import Row
from topwork.data.meaning.formats import read_conversations, recognise
from topwork.data.preferences.reading import (
    Judged,
    Pair,
    Prompt,
    Unit,
    read_preferences,
    recognise_preferences,
    unpaired,
)


def rows_of(*fields: dict[str, Any]) -> list[Row]:
    return [Row(item, f"a.jsonl:{number}") for number, item in enumerate(fields, 1)]


def read(*fields: dict[str, Any], kind: Any = None, **config: Any) -> tuple[list[Unit], list[BadRow]]:
    made, rows = DataConfig(train="a.jsonl", **config), rows_of(*fields)
    return read_preferences(rows, recognise_preferences(rows, made, kind), made)


def pair(fields: dict[str, Any], **config: Any) -> Pair:
    (found,), bad = read(fields, **config)
    assert not bad
    assert isinstance(found, Pair)
    return found


def turns(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


def problem(fields: dict[str, Any], good: dict[str, Any], **config: Any) -> str:
    found, bad = read(good, fields, **config)
    assert len(found) == 1
    assert bad[0].source == "a.jsonl:2"
    return bad[0].reason


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_every_shape(name: str) -> None:
    found = pair(PAIRS[name])
    assert turns(found.prompt) == [("user", "Two and two?")]
    assert turns(found.chosen) == [("assistant", "Four.")]
    assert turns(found.rejected) == [("assistant", "Five!")]
    assert (found.margin, found.tools, found.source) == (None, None, "a.jsonl:1")


def learned(tokenizer: Any, fields: dict[str, Any], **options: Any) -> tuple[str, str]:
    """What is not learned of a row, and what is."""
    made, rows = DataConfig(train="a.jsonl", chat_template="chatml", **options), rows_of(fields)
    conversations, bad = read_conversations(rows, recognise(rows, made), made)
    assert not bad
    (sequence,) = ChatTemplate.from_config(tokenizer, made).encode(conversations[0], made.train_on)
    given = list(zip(sequence.tokens, sequence.weights))
    before, after = ([token for token, weight in given if bool(weight) == on] for on in (False, True))
    return tokenizer.decode(before), tokenizer.decode(after)


ADVICE = re.compile(r"To learn .*? stands?, set (.*)")


def advised(fields: dict[str, Any], match: str) -> dict[str, Any]:
    """The options that a refusal under sft names."""
    with pytest.raises(DataError, match=match) as refused:
        recognise(rows_of(fields), DataConfig(train="a.jsonl"))
    text = ADVICE.search(str(refused.value))
    assert text is not None
    assert "\n" not in str(refused.value)
    return pasted(printed(text[1]))


@pytest.mark.parametrize("name", sorted(PAIRS.keys() - {"nectar", "hh"}))
def test_under_sft_a_pair_is_refused_and_the_advice_learns_the_chosen_answer(
    name: str, make_tokenizer: Callable[..., Any]
) -> None:
    match = r"preference data \(columns? .*\): they compare answers and need a preference objective \(DPO, ORPO\)"
    options = advised(PAIRS[name], match)
    assert learned(make_tokenizer("qwen2_5"), PAIRS[name], **options) == (
        "<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n", "Four.<|im_end|>",
    )  # fmt: skip


def test_the_advice_for_ranked_answers_is_the_first_where_it_is_the_best(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"column answers, with ranks.* completion: COLUMN\}, after writing the best"):
        recognise(rows_of(PAIRS["nectar"]), DataConfig(train="a"))
    ordered = sorted(PAIRS["nectar"]["answers"], key=lambda answer: float(answer["rank"]))
    fields = {**PAIRS["nectar"], "answers": ordered}
    options = advised(fields, "column answers, with ranks")
    assert options == {"columns": {"prompt": "prompt", "completion": "answers[0].answer"}}
    assert learned(make_tokenizer("qwen2_5"), fields, **options)[1] == "Four.<|im_end|>"


def test_the_advice_for_talks_as_text_are_markers(make_tokenizer: Callable[..., Any]) -> None:
    options = advised(PAIRS["hh"], "talks of Human: and Assistant:")
    assert options == {
        "format": "text", "columns": {"text": "chosen"}, "response_part": "\n\nAssistant:",
        "instruction_part": "\n\nHuman:",
    }  # fmt: skip
    expected = "\n\nHuman: Two and two?\n\nAssistant:", " Four.<|im_end|>"
    assert learned(make_tokenizer("qwen2_5"), PAIRS["hh"], **options) == expected


def test_the_advice_learns_the_last_answer_of_several(make_tokenizer: Callable[..., Any]) -> None:
    whole = {"chosen": [*BEFORE, ASKED, GOOD], "rejected": [*BEFORE, ASKED, POOR]}
    apart = {"prompt": [*BEFORE, ASKED], "chosen": [GOOD], "rejected": [POOR]}
    for fields in (whole, apart):
        options = advised(fields, "for the last of its turns alone")
        assert options["train_on"] == "last_answer"
        assert learned(make_tokenizer("qwen2_5"), fields, **options)[1] == "Four.<|im_end|>"


@pytest.mark.parametrize("name", JUDGED)
def test_a_judged_answer_of_every_shape(name: str) -> None:
    (found,), _ = read(JUDGED[name])
    assert isinstance(found, Judged)
    assert turns(found.prompt) == [("user", "Two and two?")]
    assert turns(found.completion) == [("assistant", "Four.")]
    assert found.label is True


@pytest.mark.parametrize("name", JUDGED)
def test_under_sft_a_judged_answer_is_refused_and_the_advice_learns_it(
    name: str, make_tokenizer: Callable[..., Any]
) -> None:
    options = advised(JUDGED[name], r"\(true/false column .* beside .*\): they judge answers and need .* \(KTO\)")
    assert learned(make_tokenizer("qwen2_5"), JUDGED[name], **options)[1] == "Four.<|im_end|>"


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_of_every_shape(name: str) -> None:
    fields, kept = PROMPTS[name]
    (found,), _ = read(fields, kind="prompts")
    assert isinstance(found, Prompt)
    assert turns(found.messages) == [("user", "Two and two?")]
    assert found.columns == kept


def test_under_sft_prompts_have_no_answers() -> None:
    for fields in (PROMPTS["verl"][0], {"prompt": "Two and two?", "level": 3}):
        with pytest.raises(
            DataError,
            match=r"no answers: these rows are prompts \(column prompt\) .*holds them, set data.columns: \{prompt",
        ):
            recognise(rows_of(fields), DataConfig(train="a"))
    with pytest.raises(DataError, match=r"no answers: .* Give each row one, and set"):
        recognise(rows_of({"prompt": "Two and two?"}), DataConfig(train="a"))
    with pytest.raises(DataError, match=r"prompts without answers \(column prompt\): .* \(GRPO\), while .* is sft"):
        recognise(rows_of(PROMPTS["verl"][0]), DataConfig(train="a", format="prompts"))


@pytest.mark.parametrize(
    ("fields", "config", "match"),
    [
        (PAIRS["orca"], {"format": "preference"}, r"DPO, ORPO.* sft\. .*\{prompt: question, completion: chosen\}"),
        (JUDGED["trl"], {"format": "kto"}, r"KTO.* sft\. .*\{prompt: prompt, completion: completion\}"),
        ({"a": "b"}, {"format": "kto"}, r"data\.format kto is for .* \(KTO\), while .*leave it out.* which of a holds"),
        (
            {"q": "x", "good": "y", "bad": "z"},
            {"columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
            r"columns good and bad.*\{prompt: q, completion: good\}",
        ),
    ],
)
def test_under_sft_a_named_preference_format_is_refused(
    fields: dict[str, Any], config: dict[str, Any], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        recognise(rows_of(fields), DataConfig(train="a", **config))


def test_labels_that_judge_nothing_are_no_labels() -> None:
    for fields in ({"prompt": "x", "completion": "y", "label": "sports"}, {"text": "x", "label": 1}):
        with pytest.raises(DataError, match=r"no kto or preference rows are known: kto needs messages, or prompt and"):
            recognise_preferences(rows_of(fields), DataConfig(train="a"), "kto")
    assert recognise(rows_of({"prompt": "x", "completion": "y", "label": "sports"}), DataConfig(train="a")).name == (
        "prompt_completion"
    )
    named = {"prompt": "x", "completion": "y", "liked": 0}
    (found,), _ = read(named, format="kto", columns={"label": "liked"})
    assert isinstance(found, Judged)
    assert found.label is False


@pytest.mark.parametrize(
    ("value", "label"),
    [(True, True), (False, False), (1, True), (0, False), (1.0, True), ("TRUE", True), ("false", False), ("👎", False),
     ("0", False), (" 1 ", True), ("thumbs_down", False), (-1, False)],
)  # fmt: skip
def test_what_labels_say(value: object, label: bool) -> None:
    (found,), _ = read({"prompt": "x", "completion": "y", "label": value})
    assert isinstance(found, Judged)
    assert found.label is label


def test_the_columns_are_those_that_the_recipe_names() -> None:
    fields = {"frage": "Two and two?", "gut": "Four.", "schlecht": "Five!", "abstand": 2}
    columns = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht", "margin": "abstand"}
    found = pair(fields, format="preference", columns=columns)
    assert (turns(found.prompt), turns(found.chosen), found.margin) == (
        [("user", "Two and two?")], [("assistant", "Four.")], 2.0,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"'gutt', which .* did you mean 'gut'"):
        read(fields, columns={**columns, "chosen": "gutt"})
    with pytest.raises(DataError, match=r"the field 'choosen'; did you mean 'chosen'"):
        read(fields, columns={"choosen": "gut"})
    with pytest.raises(DataError, match=r"columns frage, gut.*preference needs prompt, chosen and rejected"):
        read(fields)
    with pytest.raises(DataError, match=r"data\.format is kto, and the objective needs preference rows"):
        read(fields, kind="preference", format="kto")
    with pytest.raises(DataError, match=r"data\.format is alpaca, which holds one answer a row"):
        read(fields, format="alpaca")


def test_talks_as_json_text_and_in_other_words() -> None:
    text = {name: json.dumps(value) for name, value in PAIRS["whole_talks"].items()}
    assert turns(pair(text).chosen) == [("assistant", "Four.")]
    text = {"prompt": json.dumps([ASKED]), "chosen": json.dumps(GOOD), "rejected": json.dumps([POOR])}
    assert turns(pair(text).rejected) == [("assistant", "Five!")]
    assert turns(pair({"prompt": "[1, 2]?", "chosen": "{}", "rejected": "[]"}).prompt) == [("user", "[1, 2]?")]
    asked, good, poor = (
        {"who": "client", "said": "Two and two?"},
        *({"who": "bard", "said": text} for text in ("Four.", "Five!")),
    )
    names: dict[str, Any] = {
        "message_keys": {"who": "role", "said": "content"},
        "roles": {"bard": "assistant", "client": "user"},
    }
    for fields in (
        {"chosen": [asked, good], "rejected": [asked, poor]},
        {"prompt": [asked], "chosen": good, "rejected": poor},
    ):
        found = pair(fields, **names)
        assert turns(found.prompt + found.chosen) == [("user", "Two and two?"), ("assistant", "Four.")]
        with pytest.raises(DataError, match="preference data"):
            recognise(rows_of(fields), DataConfig(train="a", **names))


def test_system_tools_margin_and_answers_that_call() -> None:
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": "{}"}}],
    }
    result = {"role": "tool", "content": "4"}
    tools = [{"name": "add"}]
    apart = {"prompt": [ASKED], "chosen": [call, result, GOOD], "rejected": [call, result, POOR], "tools": tools}
    found = pair({**apart, "system": "Be kind.", "margin": "1.5"})
    assert turns(found.prompt) == [("system", "Be kind."), ("user", "Two and two?")]
    assert [message.role for message in found.chosen] == ["assistant", "tool", "assistant"]
    assert found.tools == [{"type": "function", "function": {"name": "add"}}]
    assert found.margin == 1.5
    whole = {"chosen": [SYSTEM, ASKED, call, result, GOOD], "rejected": [SYSTEM, ASKED, POOR]}
    found = pair({**whole, "score_chosen": 8.5, "score_rejected": 6}, system="Not this.")
    assert turns(found.prompt) == [("system", "Be kind."), ("user", "Two and two?")]
    assert (len(found.chosen), len(found.rejected), found.margin) == (3, 1, 2.5)
    openai = {**PAIRS["openai"], "input": {"messages": [ASKED], "tools": tools, "parallel_tool_calls": True}}
    assert pair(openai).tools == [{"type": "function", "function": {"name": "add"}}]
    config = DataConfig(train="a", columns={"prompt": "input", "completion": "preferred_output"})
    _, (bad,) = read_conversations(rows_of(openai), recognise(rows_of(openai), config), config)
    assert bad.reason == "input has tools beside its messages; put them into a column of their own, tools"


def test_several_turns_before_the_answer() -> None:
    before = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Two and two?")]
    for fields in (
        {"chosen": [*BEFORE, ASKED, GOOD], "rejected": [*BEFORE, ASKED, POOR]},
        {"prompt": [*BEFORE, ASKED], "chosen": [GOOD], "rejected": [POOR]},
        {
            "chosen": hh("Hi", "Hello!", "Two and two?", "Four."),
            "rejected": hh("Hi", "Hello!", "Two and two?", "Five!"),
        },
        {"prompt": hh("Hi", "Hello!", "Two and two?") + "\n\nAssistant:", "chosen": " Four.", "rejected": " Five!"},
        {**PAIRS["nectar"], "prompt": hh("Hi", "Hello!", "Two and two?") + "\n\nAssistant:"},
    ):
        assert turns(pair(fields).prompt) == before
        assert turns(pair(fields).chosen) == [("assistant", "Four.")]


def test_answers_that_begin_alike_are_never_cut_inside() -> None:
    fields = {"chosen": hh("Who?", "Forty men."), "rejected": hh("Who?", "Forty mice.")}
    assert [turns(answer) for answer in (pair(fields).chosen, pair(fields).rejected)] == [
        [("assistant", "Forty men.")], [("assistant", "Forty mice.")],
    ]  # fmt: skip
    talk = hh("Who?", "A list:\n\n1. One\n\n2. Two")
    assert turns(pair({"chosen": talk, "rejected": hh("Who?", "No.")}).chosen) == [
        ("assistant", "A list:\n\n1. One\n\n2. Two")
    ]


@pytest.mark.parametrize(
    ("good", "change", "reason"),
    [
        ("texts", {"rejected": "Four."}, "the chosen and the rejected answer are equal"),
        ("texts", {"chosen": " "}, "no answer: chosen is empty"),
        ("texts", {"rejected": None}, "no answer: rejected is"),
        ("texts", {"prompt": ""}, "no question: prompt is empty"),
        (
            "texts",
            {
                "prompt": "What is two and two?",
                "chosen": "What is two and two? 4",
                "rejected": "What is two and two? 5",
            },
            "both answers begin with the whole prompt",
        ),
        ("whole_talks", {"rejected": [{"role": "user", "content": "Three?"}, POOR]}, "different prompts"),
        ("whole_talks", {"rejected": [*BEFORE, ASKED, POOR]}, "different prompts"),
        ("whole_talks", {"chosen": [ASKED, GOOD, ASKED, GOOD]}, "differ before the last answer, so"),
        ("whole_talks", {"chosen": [ASKED, {**GOOD, "content": ""}]}, "no answer: the last turn is empty"),
        ("hh", {"rejected": hh("Two and two?", "Four.")}, "are equal"),
        ("hh", {"rejected": hh("Two and two?", "")}, "no answer"),
        ("hh", {"rejected": hh("Two and two?", "Hm.") + "\n\nAssistant: Five!"}, "differ before the last answer"),
        ("hh", {"rejected": hh("Three?", "Five!")}, "different prompts"),
        ("hh", {"rejected": "Five!"}, "rejected is no talk of Human: and Assistant:"),
        ("swift", {"rejected_response": None}, "no answer"),
        ("swift", {"messages": [ASKED, "Four."]}, "no answer: the last turn is empty"),
        ("nectar", {"answers": [{"answer": "x", "rank": [1]}, "y"]}, "fewer than two ranks"),
        ("factory", {"rejected": {"from": "gpt", "value": ""}}, "no answer"),
        ("nectar", {"answers": [{"answer": "x", "rank": 1}]}, "fewer than two ranks"),
        ("nectar", {"answers": [{"answer": "x", "rank": 1}, {"answer": "y"}]}, "fewer than two ranks"),
    ],
)
def test_what_is_wrong_with_a_pair(good: str, change: dict[str, Any], reason: str) -> None:
    assert reason in problem({**PAIRS[good], **change}, PAIRS[good])


def test_the_advice_can_be_pasted_whatever_columns_are_called(make_tokenizer: Callable[..., Any]) -> None:
    fields = {"The question: which?": "Two and two?", "a, b": "Four.", "c": "Five!"}
    columns = {"prompt": "The question: which?", "chosen": "a, b", "rejected": "c"}
    with pytest.raises(DataError, match="preference data") as refused:
        recognise(rows_of(fields), DataConfig(train="a", columns=columns))
    options = pasted(printed(str(refused.value)))
    assert learned(make_tokenizer("qwen2_5"), fields, **options)[1] == "Four.<|im_end|>"


def test_what_is_wrong_with_judged_answers_and_prompts() -> None:
    trl = [JUDGED["trl"]] * 20
    for label, told in ((None, "None"), ("perhaps", "'perhaps'")):
        _, (bad,) = read(*trl, {**JUDGED["trl"], "label": label})
        assert bad.reason == f"no label: label is {told}, expected true or false, 1 or 0, 👍 or 👎"
    assert "no answer" in problem({**JUDGED["trl"], "completion": ""}, JUDGED["trl"])
    assert "no answer" in problem({**JUDGED["factory"], "messages": [ASKED]}, JUDGED["factory"])
    talk = PROMPTS["messages"][0]
    assert "the prompt ends with an answer" in problem({"messages": [ASKED, GOOD]}, talk, kind="prompts")
    assert "no margin" in problem({**PAIRS["texts"], "margin": "much"}, {**PAIRS["texts"], "margin": 1})


def test_pairs_serve_an_objective_that_reads_labels() -> None:
    rows = rows_of(PAIRS["factory"])
    config = DataConfig(train="a")
    format = recognise_preferences(rows, config, "kto")
    assert format.kind == "preference"
    found, _ = read_preferences(rows, format, config)
    judged = unpaired([one for one in found if isinstance(one, Pair)])
    assert [(turns(one.completion), one.label) for one in judged] == [
        ([("assistant", "Four.")], True), ([("assistant", "Five!")], False),
    ]  # fmt: skip
    assert turns(judged[0].prompt) == turns(judged[1].prompt) == [("user", "Two and two?")]


REAL = {
    "hh_rlhf/helpful-base.test.jsonl": (2339, {"before the last answer": 9, "are equal": 2, "is empty": 4}),
    "rasbt_instruct/instruction-data-with-preference.json": (1094, {"are equal": 6}),
    "llamafactory_demo/dpo_en_demo.json": (300, {}),
    "llamafactory_demo/v1_dpo_demo.jsonl": (10, {}),
    "llamafactory_demo/kto_en_demo.json": (300, {}),
    "foundry_formats/orca_dpo_pairs.validation.jsonl": (284, {}),
    "torchtune_tiny/hh_rlhf_tiny.json": (1, {}),
    "torchtune_tiny/stack_exchange_paired_tiny.json": (25, {}),
    "foundry_formats/countdown_train_100.jsonl": (100, {}),
}


def real(name: str) -> list[Row]:
    text = (DATA / name).read_text("utf-8")
    found = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    return rows_of(*found)


DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets do not stand beside this checkout")
@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str) -> None:
    rows, config = real(name), DataConfig(train=name)
    good, bad = read_preferences(rows, recognise_preferences(rows, config), config)
    count, problems = REAL[name]
    assert len(good) == count
    assert Counter(reason for row in bad for reason in problems if reason in row.reason) == problems
    assert len(bad) == sum(problems.values())


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets do not stand beside this checkout")
@pytest.mark.parametrize("name", [name for name in REAL if "hh_rlhf/" not in name and "countdown" not in name])
def test_the_advice_learns_the_chosen_answers_of_real_files(name: str, make_tokenizer: Callable[..., Any]) -> None:
    rows, config, tokenizer = real(name)[:20], DataConfig(train=name), make_tokenizer("qwen2_5")
    options = {**advised(rows[0].fields, "preference data"), "train_on": "last_answer"}
    units, _ = read_preferences(rows, recognise_preferences(rows, config), config)
    good = {row.source: row.fields for row in rows}
    assert len(units) > len(rows) / 2
    for unit in units:
        assert isinstance(unit, Pair | Judged)
        answer = unit.chosen if isinstance(unit, Pair) else unit.completion
        expected = "".join(message.content for message in answer) + "<|im_end|>"
        assert learned(tokenizer, good[unit.source], **options)[1] == expected


@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets do not stand beside this checkout")
def test_the_labels_of_a_real_file() -> None:
    rows = real("llamafactory_demo/kto_en_demo.json")
    good, _ = read_preferences(rows, recognise_preferences(rows, DataConfig(train="a")), DataConfig(train="a"))
    given = [row.fields["label"] for row in rows]
    assert [one.label for one in good if isinstance(one, Judged)] == given
    assert 0 < sum(given) < 300
