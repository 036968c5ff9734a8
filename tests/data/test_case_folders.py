"""Files that people had trouble with, each with what is learned of it, or the line that helps."""

from typing import Any

import pytest

from data.case_folders import LONG_CELL, OpenCase, chatml, learned, sky_tool, tool_call

CALL = tool_call("sky", "city", "Orlen")


@pytest.mark.parametrize("train", ["train.jsonl", "train.parquet"])
def test_01_a_call_has_the_arguments_that_were_written(train: str, open_case: OpenCase) -> None:
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
def test_02_a_column_that_first_appears_late_is_read(columns: dict[str, str], open_case: OpenCase) -> None:
    read = open_case("02").read(train="alpaca.jsonl", chat_template="chatml", columns=columns)
    assert len(read.train) == 60
    assert read.train[51] == chatml("user: Say number 51.", "assistant: 51")
    assert read.train[52] == chatml("user: Put into capitals.\n\nword0", "assistant: WORD0")
    assert read.train[59] == chatml("user: Put into capitals.\n\nword7", "assistant: WORD7")


def test_02_a_system_column_that_first_appears_late_is_read(open_case: OpenCase) -> None:
    read = open_case("02").read(train="system.jsonl", chat_template="chatml")
    assert read.train[0] == chatml("user: number 0?", "assistant: 0")
    assert read.train[59] == chatml("system: Your name is Bo.", "user: who?", "assistant: Bo")


def test_02_tools_that_first_appear_late_are_read(open_case: OpenCase) -> None:
    read = open_case("02").read(train="tools.jsonl", chat_template="chatml")
    assert "<tools>" not in read.train[51]
    assert all(f"<tools>\n{sky_tool('sky', 'city')}\n</tools>" in shown for shown in read.train[52:])
    assert learned(read.train[59]) == ["no<|im_end|></s>"]


def test_11_a_book_is_one_document(open_case: OpenCase) -> None:
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


def test_12_a_folder_has_splits(open_case: OpenCase) -> None:
    read = open_case("12").read(train="set", eval_fraction=0.2, chat_template="chatml")
    answers = [f"assistant: train answer {number}" for number in range(4)]
    assert read.train == [chatml(f"user: train question {n}", answer) for n, answer in enumerate(answers)]
    assert read.eval == [
        chatml(f"user: validation question {n}", f"assistant: validation answer {n}") for n in range(2)
    ]
    assert any("not learned: test.jsonl" in line for line in read.said)


def test_14_a_csv_with_blank_cells(open_case: OpenCase) -> None:
    read = open_case("14").read(train="a.csv", chat_template="plain")
    assert read.train == [
        "<s> Say hi\n⟦hi</s>⟧", "<s> Upper\n\nab\n⟦AB</s>⟧", "<s> Say NA\n⟦NA</s>⟧", "<s> Say null\n⟦null</s>⟧"
    ]  # fmt: skip


def test_14_a_cell_of_140_000_characters(open_case: OpenCase) -> None:
    case = open_case("14")
    read = case.read(train="b.csv", chat_template="plain", too_long="truncate")
    assert read.train == ["<s> short\n⟦yes</s>⟧"]
    assert read.data.summary.train.long_dropped == 1
    assert len(LONG_CELL) > 131_072
    kept = case.read(train="b.csv", chat_template="plain", too_long="middle")
    assert [learned(shown) for shown in kept.train] == [["yes</s>"], ["no</s>"]]


def test_14_encodings_are_found_and_following_the_advice_works(open_case: OpenCase) -> None:
    case = open_case("14")
    said = case.refused(r"data\.encoding: gb18030|data\.encoding: gbk", train="d.csv", chat_template="plain")
    assert "你好" in said
    assert case.read(train="d.csv", chat_template="plain", encoding="gb18030").train == ["<s> 你好\n⟦您好</s>⟧"]


def test_14_utf_16_says_so_itself(open_case: OpenCase) -> None:
    case = open_case("14")
    assert case.read(train="c.csv", chat_template="plain").train == ["<s> hi\n⟦hello</s>⟧"]


def test_14_nan_is_nothing(open_case: OpenCase) -> None:
    read = open_case("14").read(train="e.json", chat_template="plain")
    assert read.train == ["<s> Say hi\n⟦hi</s>⟧", "<s> Upper\n\nab\n⟦AB</s>⟧"]


@pytest.mark.parametrize("columns", [{}, {"prompt": "prompt", "completion": "completion"}])
def test_14_a_header_with_spaces(columns: dict[str, str], open_case: OpenCase) -> None:
    read = open_case("14").read(train="f.csv", chat_template="plain", columns=columns)
    assert [shown.replace("⟦ ", "⟦") for shown in read.train] == ["<s> hi\n⟦hello</s>⟧", "<s> bye\n⟦ciao</s>⟧"]


def test_14_json_over_several_lines_and_pandas_columns(open_case: OpenCase) -> None:
    case = open_case("14")
    for name in ("g.jsonl", "h.json"):
        read = case.read(train=name, chat_template="plain")
        assert read.train == ["<s> hi\n⟦hello</s>⟧", "<s> bye\n⟦ciao</s>⟧"]


@pytest.mark.parametrize("options", [{}, {"format": "messages"}])
@pytest.mark.parametrize("train", ["train.csv", "train.parquet"])
def test_15_messages_as_json_text_are_parsed(train: str, options: dict[str, str], open_case: OpenCase) -> None:
    read = open_case("15").read(train=train, chat_template="chatml", **options)
    assert read.train == [chatml("user: hi", f"assistant: hello {number}") for number in range(3)]


def test_15_json_text_asked_for_as_text_is_told(open_case: OpenCase) -> None:
    """It is learned, since it was asked for by name."""
    read = open_case("15").read(train="train.csv", chat_template="chatml", columns={"text": "messages"})
    assert read.train[0] == '<s>⟦[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello 0"}]</s>⟧'
    assert any("messages, as JSON text" in line for line in read.said)


def test_16_the_prompt_is_shortened_and_the_answer_kept(open_case: OpenCase) -> None:
    case = open_case("16")
    asked: dict[str, Any] = {"train": "train.jsonl", "max_length": 64, "chat_template": "plain"}
    cut = case.read(**asked, too_long="truncate")
    assert all(learned(shown) for shown in cut.train)
    assert len(cut.train) == 2
    assert cut.data.summary.train.long_dropped == 3
    assert any("3 lost their answer and were dropped" in line for line in cut.said)
    kept = case.read(**asked, too_long="middle")
    assert [learned(shown) for shown in kept.train[:3]] == [["the mill</s>"]] * 3
    assert all(len(example.tokens) <= 64 for example in kept.data.train)
    assert all(shown.startswith("<s> Read: the mill") and "turns?\n" in shown for shown in kept.train[:3])


@pytest.mark.parametrize("columns", [{}, {"input": "context"}])
def test_18_a_passage_is_part_of_the_question(columns: dict[str, str], open_case: OpenCase) -> None:
    case = open_case("18")
    read = case.read(train="dolly.jsonl", chat_template="chatml", columns=columns)
    asked = "user: When did the mill open?\n\nThe mill of Brask opened in "
    assert read.train == [chatml(f"{asked}{year}.", f"assistant: In {year}.") for year in (1830, 1840, 1850, 1860)]


def test_18_orca_has_a_system_prompt(open_case: OpenCase) -> None:
    read = open_case("18").read(train="orca.jsonl", chat_template="chatml")
    assert read.train == [
        chatml("system: You are brief.", f"user: Add {n} and 1.", f"assistant: {n + 1}") for n in range(4)
    ]


def test_18_question_context_answer(open_case: OpenCase) -> None:
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
def test_20_lists_and_globs(train: Any, open_case: OpenCase) -> None:
    read = open_case("20").read(train=train, chat_template="plain")
    assert read.train == [f"<s> {name} {n}\n⟦yes {n}</s>⟧" for name in ("one", "two") for n in range(3)]


def test_20_compressed_files_and_hub_folders(open_case: OpenCase) -> None:
    case = open_case("20")
    assert case.read(train="train.jsonl.gz", chat_template="plain").train == ["<s> hi\n⟦hello</s>⟧"]
    assert case.read(train="hub", chat_template="plain").train == ["<s> hi\n⟦hello</s>⟧"] * 3


def test_25_no_row_is_on_both_sides(open_case: OpenCase) -> None:
    case = open_case("25")
    read = case.read(train="train.jsonl", eval_fraction=0.2, chat_template="chatml")
    assert read.eval
    assert not set(read.train) & set(read.eval)
    assert len(read.train) + len(read.eval) == 40
    assert any("20 rows: the same" in line and "data.duplicates: drop" in line for line in read.said)
    once = case.read(train="train.jsonl", eval_fraction=0.2, chat_template="chatml", duplicates="drop")
    assert len(once.train) + len(once.eval) == 20
    assert len(set(once.train) | set(once.eval)) == 20


def test_25_no_prompt_is_on_both_sides(open_case: OpenCase) -> None:
    case = open_case("25")
    read = case.read(train="prompts.jsonl", eval_fraction=0.2, chat_template="chatml")
    prompts = [{shown.split("⟦")[0] for shown in side} for side in (read.train, read.eval)]
    assert read.eval
    assert not prompts[0] & prompts[1]
    assert len(read.train) + len(read.eval) == 40
