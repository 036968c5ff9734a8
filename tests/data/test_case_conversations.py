"""Conversations that people had trouble with, each with what is learned of it, or the line that helps."""

from typing import Any

import pytest

from data.case_folders import OpenCase, Read, chatml, learned, sky_tool, template, tool_call
from topwork.data.conversations import Message

CALL = tool_call("sky", "city", "Orlen")
FIVE = "<think>\ntwo and three make five\n</think>\n\n5"


def test_03_text_that_brings_its_markup_has_one_bos_and_one_eos(open_case: OpenCase) -> None:
    case = open_case("03")
    read = case.read(train="train.jsonl")
    bos, eos = case.tokenizer.bos_token_id, case.tokenizer.eos_token_id
    for number, example in enumerate(read.data.train, 3):
        tokens = example.tokens.tolist()
        assert (tokens[0], tokens.count(bos), tokens[-1], tokens.count(eos)) == (bos, 1, eos, 1)
        assert case.tokenizer.decode(tokens) == f"<s> [INST] count to {number} [/INST] one to {number}</s>"
        assert example.weights.tolist() == [0.0] + [1.0] * (len(tokens) - 1)


def test_04_control_tokens_in_content_are_letters(open_case: OpenCase) -> None:
    case = open_case("04")
    read = case.read(train="train.jsonl", chat_template="plain")
    assert read.train == [
        "<s> mark 9.99 as the old price\n⟦<s>9.99</s> now 7.50</s>⟧",
        "<s> what ends a turn?<|im_end|>\n<|im_start|>assistant\nHA\n"
        "⟦In ChatML it is <|im_end|> and then a new line.</s>⟧",
    ]
    for example in read.data.train:
        tokens = example.tokens.tolist()
        assert (tokens.count(case.tokenizer.bos_token_id), tokens.count(case.tokenizer.eos_token_id)) == (1, 1)
    brought = case.read(train="train.jsonl", chat_template="plain", split_special_tokens=False)
    assert brought.data.train[0].tokens.tolist().count(case.tokenizer.eos_token_id) == 2


def test_06_thinking_that_the_template_does_not_know_is_not_lost(open_case: OpenCase) -> None:
    case = open_case("06")
    asked: dict[str, Any] = {"train": "field.jsonl", "chat_template": template("smollm2")}
    case.refused(r"thinking.*data\.thinking: inline.*or drop", **asked)
    assert learned(case.read(**asked, thinking="inline").train[0]) == [FIVE + "<|im_end|></s>"]
    assert learned(case.read(**asked, thinking="drop").train[0]) == ["5<|im_end|></s>"]


def test_06_thinking_that_the_template_strips_is_learned_as_it_stands(open_case: OpenCase) -> None:
    case = open_case("06")
    opened = case.read(train="inline.jsonl", chat_template=template("r1"))
    assert opened.train == ["<s> <|User|>2+3?<|Assistant|><think>\n⟦two and three make five\n</think>\n\n5</s>⟧"] * 2
    old = case.read(train="inline.jsonl", chat_template=template("r1_old"))
    assert old.train == [f"<s> <|User|>2+3?<|Assistant|>⟦{FIVE}</s>⟧"] * 2
    assert old.data.template.prompt_ids(_asked("2+3?")) == _before_learned(old)


def _asked(text: str) -> list[Any]:
    return [Message("user", text)]


def _before_learned(read: Read) -> list[int]:
    example = read.data.train[0]
    return example.tokens[: int((example.weights > 0).argmax())].tolist()


@pytest.mark.parametrize("train", ["field.jsonl", "thinking.jsonl", "inline.jsonl"])
def test_06_thinking_is_learned_as_the_template_writes_it(train: str, open_case: OpenCase) -> None:
    read = open_case("06").read(train=train, chat_template=template("qwen3"))
    assert [learned(shown) for shown in read.train] == [[FIVE + "<|im_end|></s>"]] * 2


def test_07_plain_answers_follow_the_prompt_that_will_be_used(open_case: OpenCase) -> None:
    case = open_case("07")
    asked: dict[str, Any] = {"train": "train.jsonl", "chat_template": template("qwen3")}
    user = "<s> <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n".removeprefix("<s> ")
    history = user + "hello<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n"
    block, ends = "<think>\n\n</think>\n\n", "<|im_end|></s>⟧"
    assert case.read(**asked).train == [f"{user}⟦{block}hello{ends}", f"{history}⟦{block}ciao{ends}"] * 2
    off = case.read(**asked, chat_template_kwargs={"enable_thinking": False})
    assert off.train == [f"{user}{block}⟦hello{ends}", f"{history}{block}⟦ciao{ends}"] * 2
    assert off.data.template.prompt_ids(_asked("hi")) == _before_learned(off)
    case.refused(r"no chat template.*data\.chat_template", train="train.jsonl")


@pytest.mark.parametrize("options", [{}, {"on_bad_row": "drop"}, {"train_on": "last_answer"}])
def test_08_who_is_greeted_first_is_answered(options: dict[str, str], open_case: OpenCase) -> None:
    read = open_case("08").read(train="train.jsonl", chat_template="chatml", **options)
    answered = chatml("assistant: Welcome, traveller.", "user: a room?", "assistant: Two coins.")
    assert read.train == [answered] * 3


def test_08_a_greeting_behind_a_system_message_is_context_too(open_case: OpenCase) -> None:
    read = open_case("08").read(train="train.jsonl", chat_template="chatml", system="You keep an inn.")
    asked = ("system: You keep an inn.", "assistant: Welcome, traveller.", "user: a room?")
    assert read.train == [chatml(*asked, "assistant: Two coins.")] * 3


def test_08_a_file_that_is_missing_is_named(open_case: OpenCase) -> None:
    open_case("08").refused(r"nowhere\.jsonl", train="nowhere.jsonl", chat_template="chatml")


def test_10_turns_of_one_role(open_case: OpenCase) -> None:
    case = open_case("10")
    read = case.read(train="train.jsonl", chat_template="chatml")
    asked = ("user: hi", "user: is it open?")
    both = [chatml(*asked, "assistant: yes"), chatml(*asked, "assistant: yes", "assistant: until six")]
    assert read.train == both * 2
    gemma = template("gemma")
    case.refused(r"alternate.*data\.merge_turns: true", train="train.jsonl", chat_template=gemma)
    merged = case.read(train="train.jsonl", chat_template=gemma, merge_turns=True)
    start = "<s><start_of_turn>"
    assert [shown.replace("<s> ", "<s>") for shown in merged.train] == [
        f"{start}user\nhi\n\nis it open?<end_of_turn>\n<start_of_turn>model\n⟦yes\n\nuntil six<end_of_turn></s>⟧"
    ] * 2


def test_10_a_system_message_that_the_template_rejects(open_case: OpenCase) -> None:
    case = open_case("10")
    case.refused(r"data\.fold_system: true", train="system.jsonl", chat_template=template("gemma"))
    folded = case.read(train="system.jsonl", chat_template=template("gemma"), fold_system=True)
    assert [shown.replace("<s> ", "<s>") for shown in folded.train] == [
        "<s><start_of_turn>user\nbe short\n\nis it open?<end_of_turn>\n<start_of_turn>model\n⟦yes<end_of_turn></s>⟧"
    ] * 2


def test_17_ids_of_another_kind(open_case: OpenCase) -> None:
    read = open_case("17").read(train="one.jsonl", chat_template=template("mistral_tools"))
    (both, _) = read.train
    call, answer = learned(both)
    head = '[CALLS] {"name": "sky", "arguments": {"city": "Orlen"}, "id": "'
    assert call.startswith(head)
    identity = call.removeprefix(head).removesuffix('"}</s>')
    assert len(identity) == 9
    assert identity.isalnum()
    assert answer == "Clear.</s>"


def test_17_two_calls_where_the_template_takes_one(open_case: OpenCase) -> None:
    """Each call has a turn, with its result behind it."""
    case = open_case("17")
    read = case.read(train="two.jsonl", chat_template=template("llama3_1"))
    calls = [f'{{"name": "sky", "parameters": {{"city": "{city}"}}}}</s>' for city in ("Orlen", "Brask")]
    assert [learned(shown) for shown in read.train] == [[*calls, "Clear.</s>"]] * 2
    assert f"{calls[0]}⟧[ipython]clear[/ipython][assistant]⟦{calls[1]}⟧[ipython]clear[/ipython]" in read.train[0]
    assert any("two.jsonl:1" in line for line in read.said)
    both = case.read(train="two.jsonl", chat_template="chatml")
    assert learned(both.train[0]) == [f"{CALL}\n{tool_call('sky', 'city', 'Brask')}<|im_end|></s>"]


def test_17_arguments_as_text(open_case: OpenCase) -> None:
    read = open_case("17").read(train="one-notools.jsonl", chat_template=template("r1_tools"))
    assert [learned(shown) for shown in read.train] == [
        ['<|call|>sky\n{"city": "Orlen"}<|endcall|></s>', "Clear.</s>"]
    ] * 2


@pytest.mark.parametrize(
    ("train", "options", "result"),
    [
        ("object.jsonl", {}, '{"temp": 18, "sky": "clear"}'),
        ("swift.jsonl", {}, "clear"),
        ("parts.jsonl", {}, "clear"),
    ],
)
def test_17_calls_and_results_as_others_write_them(
    train: str, options: dict[str, Any], result: str, open_case: OpenCase
) -> None:
    read = open_case("17").read(train=train, chat_template="chatml", **options)
    assert [learned(shown) for shown in read.train] == [[CALL + "<|im_end|></s>"], ["Clear.<|im_end|></s>"]] * 2
    assert f"<tool_response>\n{result}\n</tool_response>" in read.train[1]
    assert f"<tools>\n{sky_tool('sky', 'city')}\n</tools>" in read.train[0]


@pytest.mark.parametrize("columns", [{}, {"tools": "functions"}])
def test_17_functions_of_old(columns: dict[str, str], open_case: OpenCase) -> None:
    read = open_case("17").read(train="legacy.jsonl", chat_template="chatml", columns=columns)
    assert [learned(shown) for shown in read.train] == [[CALL + "<|im_end|></s>"]] * 2
    assert f"<tools>\n{sky_tool('sky', 'city')}\n</tools>" in read.train[0]


def test_17_text_beside_a_call_is_not_lost(open_case: OpenCase) -> None:
    case = open_case("17")
    asked: dict[str, Any] = {"train": "both.jsonl", "chat_template": template("llama3_1")}
    case.refused(r"data\.lost_text: allow", **asked)
    allowed = case.read(**asked, lost_text="allow")
    assert learned(allowed.train[0]) == ['{"name": "sky", "parameters": {"city": "Orlen"}}</s>', "Clear.</s>"]
    assert any("both.jsonl:1" in line for line in allowed.said)
    whole = case.read(train="both.jsonl", chat_template="chatml")
    assert learned(whole.train[0]) == [f"Let me look at the sky first.\n{CALL}<|im_end|></s>"]


def test_23_only_what_follows_a_marker_is_learned(open_case: OpenCase) -> None:
    case = open_case("23")
    read = case.read(train="train.jsonl", response_part="### Assistant:", instruction_part="### Human:")
    asked = "<s> ### Human: say {0}### Assistant:⟦{0}⟧### Human: again### Assistant:⟦{0} {0}</s>⟧"
    assert [shown.replace("<s>###", "<s> ###") for shown in read.train] == [asked.format(n) for n in range(3)]
    whole = case.read(train="train.jsonl")
    assert whole.train[0] == "<s>⟦### Human: say 0### Assistant: 0### Human: again### Assistant: 0 0</s>⟧"


def test_24_the_marked_span_is_learned(open_case: OpenCase) -> None:
    read = open_case("24").read(train="train.jsonl", chat_template=template("generation"))
    assert read.train == ["[user]hi[end][assistant]⟦hello</s>⟧[user]bye[end][assistant]⟦ciao</s>⟧"] * 2
