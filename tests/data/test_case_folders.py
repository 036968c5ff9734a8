"""Files that people had trouble with, each with what is learned of it, or the line that helps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.case_folders import LONG_CELL, Case, Read, chatml, learned, template

Open = Callable[[str], Case]


@pytest.fixture
def open_case(small_llama: Path, tmp_path: Path) -> Open:
    """open_case(number) -> a Case; its tokenizer is of llama 2's kind and has no template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_llama)
    return lambda number: Case(number, tmp_path, small_llama, tokenizer)


def sky_tool(name: str, argument: str) -> str:
    return (
        f'{{"type": "function", "function": {{"name": "{name}", "description": "does {name}", "parameters": '
        f'{{"type": "object", "properties": {{"{argument}": {{"type": "string"}}}}}}}}}}'
    )


def tool_call(name: str, argument: str, value: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"{argument}": "{value}"}}}}\n</tool_call>'


CALL = tool_call("sky", "city", "Orlen")
FIVE = "<think>\ntwo and three make five\n</think>\n\n5"


@pytest.mark.parametrize("train", ["train.jsonl", "train.parquet"])
def test_01_a_call_has_the_arguments_that_were_written(train: str, open_case: Open) -> None:
    read = open_case("01").read(train=train, chat_template="chatml")
    assert [learned(shown) for shown in read.train] == [
        [CALL + "<|im_end|></s>"], ["Clear.<|im_end|></s>"],
        [tool_call("stock", "sku", "B7") + "<|im_end|></s>"], ["Yes.<|im_end|></s>"],
    ]  # fmt: skip
    for shown, own, other in zip(read.train, ["city", "city", "sku", "sku"], ["sku", "sku", "city", "city"]):
        name = "sky" if own == "city" else "stock"
        assert f"<tools>\n{sky_tool(name, own)}\n</tools>" in shown
        assert other not in shown
        assert "null" not in shown


@pytest.mark.parametrize("columns", [{}, {"input": "input"}])
def test_02_a_column_that_first_appears_late_is_read(columns: dict[str, str], open_case: Open) -> None:
    read = open_case("02").read(train="alpaca.jsonl", chat_template="chatml", columns=columns)
    assert len(read.train) == 60
    assert read.train[51] == chatml("user: Say number 51.", "assistant: 51")
    assert read.train[52] == chatml("user: Put into capitals.\n\nword0", "assistant: WORD0")
    assert read.train[59] == chatml("user: Put into capitals.\n\nword7", "assistant: WORD7")


def test_02_a_system_column_that_first_appears_late_is_read(open_case: Open) -> None:
    read = open_case("02").read(train="system.jsonl", chat_template="chatml")
    assert read.train[0] == chatml("user: number 0?", "assistant: 0")
    assert read.train[59] == chatml("system: Your name is Bo.", "user: who?", "assistant: Bo")


def test_02_tools_that_first_appear_late_are_read(open_case: Open) -> None:
    read = open_case("02").read(train="tools.jsonl", chat_template="chatml")
    assert "<tools>" not in read.train[51]
    assert all(f"<tools>\n{sky_tool('sky', 'city')}\n</tools>" in shown for shown in read.train[52:])
    assert learned(read.train[59]) == ["no<|im_end|></s>"]


def test_03_text_that_brings_its_markup_has_one_bos_and_one_eos(open_case: Open) -> None:
    case = open_case("03")
    read = case.read(train="train.jsonl")
    bos, eos = case.tokenizer.bos_token_id, case.tokenizer.eos_token_id
    for number, example in enumerate(read.data.train, 3):
        tokens = example.tokens.tolist()
        assert (tokens[0], tokens.count(bos), tokens[-1], tokens.count(eos)) == (bos, 1, eos, 1)
        assert case.tokenizer.decode(tokens) == f"<s> [INST] count to {number} [/INST] one to {number}</s>"
        assert example.weights.tolist() == [0.0] + [1.0] * (len(tokens) - 1)


def test_04_control_tokens_in_content_are_letters(open_case: Open) -> None:
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


def test_06_thinking_that_the_template_does_not_know_is_not_lost(open_case: Open) -> None:
    case = open_case("06")
    asked: dict[str, Any] = {"train": "field.jsonl", "chat_template": template("smollm2")}
    case.refused(r"thinking.*data\.thinking: inline.*or drop", **asked)
    assert learned(case.read(**asked, thinking="inline").train[0]) == [FIVE + "<|im_end|></s>"]
    assert learned(case.read(**asked, thinking="drop").train[0]) == ["5<|im_end|></s>"]


def test_06_thinking_that_the_template_strips_is_learned_as_it_stands(open_case: Open) -> None:
    case = open_case("06")
    opened = case.read(train="inline.jsonl", chat_template=template("r1"))
    assert opened.train == ["<s> <|User|>2+3?<|Assistant|><think>\n⟦two and three make five\n</think>\n\n5</s>⟧"] * 2
    old = case.read(train="inline.jsonl", chat_template=template("r1_old"))
    assert old.train == [f"<s> <|User|>2+3?<|Assistant|>⟦{FIVE}</s>⟧"] * 2
    assert old.data.template.prompt_ids(_asked("2+3?")) == _before_learned(old)


def _asked(text: str) -> list[Any]:
    from topwork.data.conversations import Message

    return [Message("user", text)]


def _before_learned(read: Read) -> list[int]:
    example = read.data.train[0]
    return example.tokens[: int((example.weights > 0).argmax())].tolist()


@pytest.mark.parametrize("train", ["field.jsonl", "thinking.jsonl", "inline.jsonl"])
def test_06_thinking_is_learned_as_the_template_writes_it(train: str, open_case: Open) -> None:
    read = open_case("06").read(train=train, chat_template=template("qwen3"))
    assert [learned(shown) for shown in read.train] == [[FIVE + "<|im_end|></s>"]] * 2


def test_07_plain_answers_follow_the_prompt_that_will_be_used(open_case: Open) -> None:
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
def test_08_who_is_greeted_first_is_answered(options: dict[str, str], open_case: Open) -> None:
    read = open_case("08").read(train="train.jsonl", chat_template="chatml", **options)
    answered = chatml("assistant: Welcome, traveller.", "user: a room?", "assistant: Two coins.")
    assert read.train == [answered] * 3


def test_08_a_system_message_makes_the_greeting_an_answer(open_case: Open) -> None:
    read = open_case("08").read(train="train.jsonl", chat_template="chatml", system="You keep an inn.")
    system = "system: You keep an inn."
    answers = [learned(shown) for shown in read.train]
    assert ["Two coins.<|im_end|></s>"] in answers
    assert chatml(system, "assistant: Welcome, traveller.", "user: a room?", "assistant: Two coins.") in read.train
    assert all("You keep an inn." in shown for shown in read.train)
    assert len({example.source for example in read.data.train}) == 3


def test_08_a_file_that_is_missing_is_named(open_case: Open) -> None:
    open_case("08").refused(r"nowhere\.jsonl", train="nowhere.jsonl", chat_template="chatml")


def test_10_turns_of_one_role(open_case: Open) -> None:
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


def test_10_a_system_message_that_the_template_rejects(open_case: Open) -> None:
    case = open_case("10")
    case.refused(r"data\.fold_system: true", train="system.jsonl", chat_template=template("gemma"))
    folded = case.read(train="system.jsonl", chat_template=template("gemma"), fold_system=True)
    assert [shown.replace("<s> ", "<s>") for shown in folded.train] == [
        "<s><start_of_turn>user\nbe short\n\nis it open?<end_of_turn>\n<start_of_turn>model\n⟦yes<end_of_turn></s>⟧"
    ] * 2


def test_11_a_book_is_one_document(open_case: Open) -> None:
    case = open_case("11")
    story = (case.folder / "story.txt").read_text("utf-8")
    read = case.read(train="story.txt", max_length=64, too_long="split")
    eos = case.tokenizer.eos_token_id
    ends = [example.tokens.tolist().count(eos) for example in read.data.train]
    assert ends == [0] * (len(ends) - 1) + [1]
    assert len(ends) > 1
    assert read.data.train[-1].tokens[-1] == eos
    tokens = [token for example in read.data.train for token in example.tokens[example.weights > 0].tolist()]
    assert case.tokenizer.decode(tokens[:-1]).rstrip("\n") == story.rstrip("\n")
    paragraphs = case.read(train="story.txt", documents="paragraph")
    assert paragraphs.train[:2] == [
        "<s>⟦Once there was a small hill.</s>⟧", "<s>⟦On it stood a mill, and in it a cat.</s>⟧"
    ]  # fmt: skip
    assert len(paragraphs.train) == 12


def test_12_a_folder_has_splits(open_case: Open) -> None:
    read = open_case("12").read(train="set", eval_fraction=0.2, chat_template="chatml")
    answers = [f"assistant: train answer {number}" for number in range(4)]
    assert read.train == [chatml(f"user: train question {n}", answer) for n, answer in enumerate(answers)]
    assert read.eval == [
        chatml(f"user: validation question {n}", f"assistant: validation answer {n}") for n in range(2)
    ]
    assert any("test.jsonl" in line or "test" in line.split() for line in read.said)


def test_14_a_csv_with_blank_cells(open_case: Open) -> None:
    read = open_case("14").read(train="a.csv", chat_template="plain")
    assert read.train == [
        "<s> Say hi\n⟦hi</s>⟧", "<s> Upper\n\nab\n⟦AB</s>⟧", "<s> Say NA\n⟦NA</s>⟧", "<s> Say null\n⟦null</s>⟧"
    ]  # fmt: skip


def test_14_a_cell_of_140_000_characters(open_case: Open) -> None:
    case = open_case("14")
    read = case.read(train="b.csv", chat_template="plain", too_long="truncate")
    assert read.train == ["<s> short\n⟦yes</s>⟧"]
    assert read.data.summary.train.long_dropped == 1
    assert len(LONG_CELL) > 131_072
    kept = case.read(train="b.csv", chat_template="plain", too_long="middle")
    assert [learned(shown) for shown in kept.train] == [["yes</s>"], ["no</s>"]]


def test_14_encodings_are_found_and_following_the_advice_works(open_case: Open) -> None:
    case = open_case("14")
    said = case.refused(r"data\.encoding: gb18030|data\.encoding: gbk", train="d.csv", chat_template="plain")
    assert "你好" in said
    assert case.read(train="d.csv", chat_template="plain", encoding="gb18030").train == ["<s> 你好\n⟦您好</s>⟧"]


def test_14_utf_16_says_so_itself(open_case: Open) -> None:
    case = open_case("14")
    assert case.read(train="c.csv", chat_template="plain").train == ["<s> hi\n⟦hello</s>⟧"]


def test_14_nan_is_nothing(open_case: Open) -> None:
    read = open_case("14").read(train="e.json", chat_template="plain")
    assert read.train == ["<s> Say hi\n⟦hi</s>⟧", "<s> Upper\n\nab\n⟦AB</s>⟧"]


@pytest.mark.parametrize("columns", [{}, {"prompt": "prompt", "completion": "completion"}])
def test_14_a_header_with_spaces(columns: dict[str, str], open_case: Open) -> None:
    read = open_case("14").read(train="f.csv", chat_template="plain", columns=columns)
    assert [shown.replace("⟦ ", "⟦") for shown in read.train] == ["<s> hi\n⟦hello</s>⟧", "<s> bye\n⟦ciao</s>⟧"]


def test_14_json_over_several_lines_and_pandas_columns(open_case: Open) -> None:
    case = open_case("14")
    for name in ("g.jsonl", "h.json"):
        read = case.read(train=name, chat_template="plain")
        assert read.train == ["<s> hi\n⟦hello</s>⟧", "<s> bye\n⟦ciao</s>⟧"]


@pytest.mark.parametrize("options", [{}, {"format": "messages"}])
@pytest.mark.parametrize("train", ["train.csv", "train.parquet"])
def test_15_messages_as_json_text_are_parsed(train: str, options: dict[str, str], open_case: Open) -> None:
    read = open_case("15").read(train=train, chat_template="chatml", **options)
    assert read.train == [chatml("user: hi", f"assistant: hello {number}") for number in range(3)]


def test_15_json_text_asked_for_as_text_is_told(open_case: Open) -> None:
    """It is learned, since it was asked for by name."""
    read = open_case("15").read(train="train.csv", chat_template="chatml", columns={"text": "messages"})
    assert read.train[0] == '<s>⟦[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello 0"}]</s>⟧'
    assert any("messages, as JSON text" in line for line in read.said)


def test_16_the_prompt_is_shortened_and_the_answer_kept(open_case: Open) -> None:
    case = open_case("16")
    asked: dict[str, Any] = {"train": "train.jsonl", "max_length": 64, "chat_template": "plain"}
    cut = case.read(**asked, too_long="truncate")
    assert all(learned(shown) for shown in cut.train)
    assert len(cut.train) == 2
    assert cut.data.summary.train.long_dropped == 3
    assert any("3 too long and dropped" in line for line in cut.said)
    kept = case.read(**asked, too_long="middle")
    assert [learned(shown) for shown in kept.train[:3]] == [["the mill</s>"]] * 3
    assert all(len(example.tokens) <= 64 for example in kept.data.train)
    assert all(shown.startswith("<s> Read: the mill") and "turns?\n" in shown for shown in kept.train[:3])


def test_17_ids_of_another_kind(open_case: Open) -> None:
    read = open_case("17").read(train="one.jsonl", chat_template=template("mistral_tools"))
    (both, _) = read.train
    call, answer = learned(both)
    head = '[CALLS] {"name": "sky", "arguments": {"city": "Orlen"}, "id": "'
    assert call.startswith(head)
    identity = call.removeprefix(head).removesuffix('"}</s>')
    assert len(identity) == 9
    assert identity.isalnum()
    assert answer == "Clear.</s>"


def test_17_two_calls_where_the_template_takes_one(open_case: Open) -> None:
    """Each call has a turn, with its result behind it."""
    case = open_case("17")
    read = case.read(train="two.jsonl", chat_template=template("llama3_1"))
    calls = [f'{{"name": "sky", "parameters": {{"city": "{city}"}}}}</s>' for city in ("Orlen", "Brask")]
    assert [learned(shown) for shown in read.train] == [[*calls, "Clear.</s>"]] * 2
    assert f"{calls[0]}⟧[ipython]clear[/ipython][assistant]⟦{calls[1]}⟧[ipython]clear[/ipython]" in read.train[0]
    assert any("two.jsonl:1" in line for line in read.said)
    both = case.read(train="two.jsonl", chat_template="chatml")
    assert learned(both.train[0]) == [f"{CALL}\n{tool_call('sky', 'city', 'Brask')}<|im_end|></s>"]


def test_17_arguments_as_text(open_case: Open) -> None:
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
    train: str, options: dict[str, Any], result: str, open_case: Open
) -> None:
    read = open_case("17").read(train=train, chat_template="chatml", **options)
    assert [learned(shown) for shown in read.train] == [[CALL + "<|im_end|></s>"], ["Clear.<|im_end|></s>"]] * 2
    assert f"<tool_response>\n{result}\n</tool_response>" in read.train[1]
    assert f"<tools>\n{sky_tool('sky', 'city')}\n</tools>" in read.train[0]


@pytest.mark.parametrize("columns", [{}, {"tools": "functions"}])
def test_17_functions_of_old(columns: dict[str, str], open_case: Open) -> None:
    read = open_case("17").read(train="legacy.jsonl", chat_template="chatml", columns=columns)
    assert [learned(shown) for shown in read.train] == [[CALL + "<|im_end|></s>"]] * 2
    assert f"<tools>\n{sky_tool('sky', 'city')}\n</tools>" in read.train[0]


def test_17_text_beside_a_call_is_not_lost(open_case: Open) -> None:
    case = open_case("17")
    asked: dict[str, Any] = {"train": "both.jsonl", "chat_template": template("llama3_1")}
    case.refused(r"data\.lost_text: allow", **asked)
    allowed = case.read(**asked, lost_text="allow")
    assert learned(allowed.train[0]) == ['{"name": "sky", "parameters": {"city": "Orlen"}}</s>', "Clear.</s>"]
    assert any("both.jsonl:1" in line for line in allowed.said)
    whole = case.read(train="both.jsonl", chat_template="chatml")
    assert learned(whole.train[0]) == [f"Let me look at the sky first.\n{CALL}<|im_end|></s>"]


@pytest.mark.parametrize("columns", [{}, {"input": "context"}])
def test_18_a_passage_is_part_of_the_question(columns: dict[str, str], open_case: Open) -> None:
    case = open_case("18")
    read = case.read(train="dolly.jsonl", chat_template="chatml", columns=columns)
    asked = "user: When did the mill open?\n\nThe mill of Brask opened in "
    assert read.train == [chatml(f"{asked}{year}.", f"assistant: In {year}.") for year in (1830, 1840, 1850, 1860)]


def test_18_orca_has_a_system_prompt(open_case: Open) -> None:
    read = open_case("18").read(train="orca.jsonl", chat_template="chatml")
    assert read.train == [
        chatml("system: You are brief.", f"user: Add {n} and 1.", f"assistant: {n + 1}") for n in range(4)
    ]


def test_18_question_context_answer(open_case: Open) -> None:
    case = open_case("18")
    years = (1830, 1840, 1850, 1860)
    expected = [chatml(f"user: When did the mill open?\n\nThe mill opened in {y}.", f"assistant: {y}") for y in years]
    assert case.read(train="qca.jsonl", chat_template="chatml").train == expected
    mapped = case.read(train="qca.jsonl", chat_template="chatml", columns={"input": "context"})
    assert mapped.train == expected
    said = {"prompt": "{question}\n\n{context}", "completion": "answer"}
    assert case.read(train="qca.jsonl", chat_template="chatml", columns=said).train == expected


@pytest.mark.parametrize(
    "train", [["part-one.jsonl", "part-two.jsonl"], "part-*.jsonl", [{"path": "part-one.jsonl"}, "part-two.jsonl"]]
)
def test_20_lists_and_globs(train: Any, open_case: Open) -> None:
    read = open_case("20").read(train=train, chat_template="plain")
    assert read.train == [f"<s> {name} {n}\n⟦yes {n}</s>⟧" for name in ("one", "two") for n in range(3)]


def test_20_compressed_files_and_hub_folders(open_case: Open) -> None:
    case = open_case("20")
    assert case.read(train="train.jsonl.gz", chat_template="plain").train == ["<s> hi\n⟦hello</s>⟧"]
    assert case.read(train="hub", chat_template="plain").train == ["<s> hi\n⟦hello</s>⟧"] * 3


def test_23_only_what_follows_a_marker_is_learned(open_case: Open) -> None:
    case = open_case("23")
    read = case.read(train="train.jsonl", response_part="### Assistant:", instruction_part="### Human:")
    asked = "<s> ### Human: say {0}### Assistant:⟦{0}⟧### Human: again### Assistant:⟦{0} {0}</s>⟧"
    assert [shown.replace("<s>###", "<s> ###") for shown in read.train] == [asked.format(n) for n in range(3)]
    whole = case.read(train="train.jsonl")
    assert whole.train[0] == "<s>⟦### Human: say 0### Assistant: 0### Human: again### Assistant: 0 0</s>⟧"


def test_24_the_marked_span_is_learned(open_case: Open) -> None:
    read = open_case("24").read(train="train.jsonl", chat_template=template("generation"))
    assert read.train == ["[user]hi[end][assistant]⟦hello</s>⟧[user]bye[end][assistant]⟦ciao</s>⟧"] * 2


def test_25_no_row_is_on_both_sides(open_case: Open) -> None:
    case = open_case("25")
    read = case.read(train="train.jsonl", eval_fraction=0.2, chat_template="chatml")
    assert read.eval
    assert not set(read.train) & set(read.eval)
    assert len(read.train) + len(read.eval) == 40
    assert any("same" in line or "duplicate" in line for line in read.said)
    once = case.read(train="train.jsonl", eval_fraction=0.2, chat_template="chatml", duplicates="drop")
    assert len(once.train) + len(once.eval) == 20
    assert len(set(once.train) | set(once.eval)) == 20


def test_25_no_prompt_is_on_both_sides(open_case: Open) -> None:
    case = open_case("25")
    read = case.read(train="prompts.jsonl", eval_fraction=0.2, chat_template="chatml")
    prompts = [{shown.split("⟦")[0] for shown in side} for side in (read.train, read.eval)]
    assert read.eval
    assert not prompts[0] & prompts[1]
    assert len(read.train) + len(read.eval) == 40
