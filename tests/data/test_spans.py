"""Learned spans on real templates: exactly the answers and their ends, after exactly what generation is given."""

from collections.abc import Callable
from typing import Any

import pytest
from family_tokenizers import FAMILIES, build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from topwork.common.errors import DataError
from topwork.data.chat.template import ChatTemplate, Encoded, stop_ids
from topwork.data.conversations import Conversation, Message

SYSTEM = Message("system", "Be brief.")
TURNS = (
    Message("user", "Hi there"),
    Message("assistant", "Hello!"),
    Message("user", "Bye"),
    Message("assistant", "See you.\n\nSoon."),
)


def chat(*messages: Message, tools: list[dict[str, Any]] | None = None) -> Conversation:
    return Conversation(messages, tools, "train.jsonl:1")


def shown(template: ChatTemplate, encoded: Encoded) -> str:
    """The sequence as text, its learned stretches in ⟦ ⟧."""
    runs: list[tuple[bool, list[int]]] = []
    for token, weight in zip(encoded.tokens, encoded.weights):
        if not runs or runs[-1][0] != bool(weight):
            runs.append((bool(weight), []))
        runs[-1][1].append(token)
    texts = [(learned, template.tokenizer.decode(ids, skip_special_tokens=False)) for learned, ids in runs]
    return "".join(f"⟦{text}⟧" if learned else text for learned, text in texts)


IM = "<|im_start|>{}\n{}<|im_end|>\n"
H = "<|start_header_id|>{}<|end_header_id|>\n\n"
EXPECTED: dict[str, tuple[bool, list[str]]] = {
    # family: (with the system message, the sequences)
    "smollm2": (
        True,
        [
            IM.format("system", "Be brief.")
            + IM.format("user", "Hi there")
            + "<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n"
            "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟦See you.\n\nSoon.<|im_end|>⟧"
        ],
    ),
    "qwen2_5": (
        False,
        [
            IM.format("system", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
            + IM.format("user", "Hi there")
            + "<|im_start|>assistant\n⟦Hello!<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n"
            "<|im_start|>assistant\n⟦See you.\n\nSoon.<|im_end|>⟧"
        ],
    ),
    "qwen3": (  # history loses its thinking block, so each answer has a sequence of its own
        True,
        [
            IM.format("system", "Be brief.")
            + IM.format("user", "Hi there")
            + "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello!<|im_end|>⟧",
            IM.format("system", "Be brief.")
            + IM.format("user", "Hi there")
            + IM.format("assistant", "Hello!")
            + IM.format("user", "Bye")
            + "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nSee you.\n\nSoon.<|im_end|>⟧",
        ],
    ),
    "llama3": (
        True,
        [
            f"<|begin_of_text|>{H.format('system')}Be brief.<|eot_id|>{H.format('user')}Hi there<|eot_id|>"
            f"{H.format('assistant')}⟦Hello!<|eot_id|>⟧{H.format('user')}Bye<|eot_id|>"
            f"{H.format('assistant')}⟦See you.\n\nSoon.<|eot_id|>⟧"
        ],
    ),
    "gemma": (
        False,
        [
            "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n⟦Hello!<end_of_turn>⟧\n"
            "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦See you.\n\nSoon.<end_of_turn>⟧"
        ],
    ),
    "gemma3": (
        True,
        [
            "<bos><start_of_turn>user\nBe brief.\n\nHi there<end_of_turn>\n"
            "<start_of_turn>model\n⟦Hello!<end_of_turn>⟧\n"
            "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦See you.\n\nSoon.<end_of_turn>⟧"
        ],
    ),
    "mistral": (
        False,
        ["<s>[INST] Hi there [/INST]⟦Hello!</s>⟧[INST] Bye [/INST]⟦See you.\n\nSoon.</s>⟧"],
    ),
    "mistral_v3": (
        False,
        ["<s>[INST] Hi there[/INST]⟦ Hello!</s>⟧[INST] Bye[/INST]⟦ See you.\n\nSoon.</s>⟧"],
    ),
    "phi3": (
        True,
        [
            "<|system|>\nBe brief.<|end|>\n<|user|>\nHi there<|end|>\n<|assistant|>\n⟦Hello!<|end|>⟧\n"
            "<|user|>\nBye<|end|>\n<|assistant|>\n⟦See you.\n\nSoon.<|end|>⟧"
        ],
    ),
    "phi4": (
        True,
        [
            "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi there<|im_end|>"
            "<|im_start|>assistant<|im_sep|>⟦Hello!<|im_end|>⟧<|im_start|>user<|im_sep|>Bye<|im_end|>"
            "<|im_start|>assistant<|im_sep|>⟦See you.\n\nSoon.<|im_end|>⟧"
        ],
    ),
    "no_end": (  # an EOS is added; history, as generation sees it, has none
        True,
        [
            "Be brief.\n\n### Instruction:\nHi there\n\n### Response:\n⟦Hello!</s>⟧",
            "Be brief.\n\n### Instruction:\nHi there\n\n### Response:\nHello!\n\n"
            "### Instruction:\nBye\n\n### Response:\n⟦See you.\n\nSoon.</s>⟧",
        ],
    ),
}
ENDS = {"phi3": {"<|end|>", "<|endoftext|>"}, "gemma": {"<end_of_turn>", "<eos>"}, "gemma3": {"<end_of_turn>", "<eos>"}}


@pytest.mark.parametrize("family", EXPECTED)
def test_exactly_the_answers_and_their_ends_are_learned(family: str, make_tokenizer: Callable[..., Any]) -> None:
    template = ChatTemplate(make_tokenizer(family))
    with_system, expected = EXPECTED[family]
    messages = (SYSTEM, *TURNS) if with_system else TURNS
    assert [shown(template, item) for item in template.encode(chat(*messages))] == expected


@pytest.mark.parametrize("family", EXPECTED)
def test_stop_ids_are_the_learned_end_and_eos(family: str, make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(family)
    expected = ENDS.get(family, {FAMILIES[family][1]})
    assert stop_ids(ChatTemplate(tokenizer)) == set(tokenizer.convert_tokens_to_ids(list(expected)))


def check_prompts(template: ChatTemplate, messages: tuple[Message, ...]) -> None:
    """Every learned stretch follows exactly the ids that generation would be prompted with, and ends the turn."""
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    prompts = [template.prompt_ids(messages[:number]) for number in answers]
    ends = stop_ids(template)
    found = []
    for item in template.encode(chat(*messages)):
        starts = [i for i, w in enumerate(item.weights) if w and not item.weights[i - 1]]
        stops = [i + 1 for i, w in enumerate(item.weights) if w and not [*item.weights, 0.0][i + 1]]
        assert item.weights[0] == 0
        assert all(item.tokens[stop - 1] in ends for stop in stops)
        found += [item.tokens[:start] for start in starts]
    assert found == prompts


ANSWERS = st.text(st.sampled_from("Hello \n!é.<"), min_size=1, max_size=12).filter(lambda text: text.strip() != "")


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=50, deadline=None)
@given(first=ANSWERS, second=ANSWERS, question=ANSWERS)
def test_training_ids_are_prompt_ids_and_answer(family: str, first: str, second: str, question: str) -> None:
    messages = (
        Message("user", question),
        Message("assistant", first),
        Message("user", "Bye"),
        Message("assistant", second),
    )
    template = ChatTemplate(build_tokenizer(family, words=False))
    check_prompts(template, messages)
    last = template.encode(chat(*messages))[-1]
    learned = shown(template, last).split("⟦")[-1]
    assert second.strip() in learned


def test_a_merge_across_the_boundary_is_cut_there(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("smollm2", words=False)
    template = ChatTemplate(tokenizer)
    messages = (Message("user", "Hi there"), Message("assistant", "\nHello!"))
    prompt = template.prompt_ids(messages[:1])
    whole = tokenizer(template.renderer.render(messages, None, False), add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt)] != prompt, "this tokenizer must merge across the boundary, or the test tests nothing"
    (item,) = template.encode(chat(*messages))
    assert item.tokens[: len(prompt)] == prompt
    assert tokenizer.decode(item.tokens[len(prompt) :]) == "\nHello!<|im_end|>"


def test_no_bos_is_doubled_and_pad_being_eos_hides_nothing(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("gemma", adds_bos=True)
    (item,) = ChatTemplate(tokenizer).encode(chat(*TURNS))
    assert item.tokens.count(tokenizer.bos_token_id) == 1
    smol = make_tokenizer("smollm2")
    assert smol.pad_token_id == smol.eos_token_id
    (item,) = ChatTemplate(smol).encode(chat(*TURNS))
    ends = [weight for token, weight in zip(item.tokens, item.weights) if token == smol.pad_token_id]
    assert ends == [0, 0, 1, 0, 1]  # the inserted system turn, then user and assistant twice


def test_last_answer_and_message_weights(make_tokenizer: Callable[..., Any]) -> None:
    template = ChatTemplate(make_tokenizer("smollm2"))
    (last,) = template.encode(chat(*TURNS), "last_answer")
    assert shown(template, last).count("⟦") == 1
    assert shown(template, last).endswith("⟦See you.\n\nSoon.<|im_end|>⟧")
    weighted = (TURNS[0], Message("assistant", "Hello!", 0.5), TURNS[2], Message("assistant", "See you.", 0.0))
    (item,) = template.encode(chat(*weighted))
    assert shown(template, item).endswith("⟦Hello!<|im_end|>⟧")  # what follows the last learned turn is left out
    assert set(item.weights) == {0.0, 0.5}
    with pytest.raises(DataError, match=r"train.jsonl:1: nothing to learn"):
        template.encode(chat(TURNS[0], Message("assistant", "Hello!", 0.0)))


def test_all_learns_every_token_but_the_first(make_tokenizer: Callable[..., Any]) -> None:
    for family in ("smollm2", "phi3", "no_end"):
        tokenizer = make_tokenizer(family)
        template = ChatTemplate(tokenizer)
        (item,) = template.encode(chat(*TURNS), "all")
        assert item.weights == [0.0] + [1.0] * (len(item.tokens) - 1)
        assert tokenizer.decode(item.tokens).rstrip().endswith(FAMILIES[family][1] or "")
    weighted = (Message("user", "Hi there", 0.0), Message("assistant", "Hello!", 2.0))
    template = ChatTemplate(make_tokenizer("llama3"))
    (item,) = template.encode(chat(*weighted), "all")
    assert shown(template, item).endswith("Hi there<|eot_id|>⟦" + H.format("assistant") + "Hello!<|eot_id|>⟧")
    assert set(item.weights) == {0.0, 2.0}


def test_text_is_learned_from_bos_to_eos(make_tokenizer: Callable[..., Any]) -> None:
    document = Conversation((), None, "a.txt:1", "text", "Hi there. Hello!")
    for adds_bos in (True, False):
        template = ChatTemplate(make_tokenizer("mistral", adds_bos=adds_bos))
        (item,) = template.encode(document)
        assert template.tokenizer.decode(item.tokens) == ("<s>" if adds_bos else "") + "Hi there. Hello!</s>"
        assert item.weights == [0.0] + [1.0] * (len(item.tokens) - 1)


def test_template_that_rejects_a_system_role(make_tokenizer: Callable[..., Any]) -> None:
    for family, reason in (("gemma", "System role not supported"), ("mistral", "must alternate")):
        tokenizer = make_tokenizer(family)
        with pytest.raises(DataError, match=rf"rejects a system message.*{reason}.*data\.fold_system: true"):
            ChatTemplate(tokenizer).encode(chat(SYSTEM, *TURNS))
        template = ChatTemplate(tokenizer, fold_system=True)
        (item,) = template.encode(chat(SYSTEM, *TURNS))
        assert "Be brief.\n\nHi there" in shown(template, item)
        check_prompts(template, (SYSTEM, *TURNS))


def test_template_that_opens_the_turn_otherwise_than_it_writes_it(make_tokenizer: Callable[..., Any]) -> None:
    """Mistral 0.3 writes the system message only while the user's turn is the last, so an answer follows no prompt."""
    tokenizer = make_tokenizer("mistral_v3")
    with pytest.raises(DataError, match=r"train.jsonl:1: .*would never be generated; set data\.fold_system: true"):
        ChatTemplate(tokenizer).encode(chat(SYSTEM, *TURNS))
    check_prompts(ChatTemplate(tokenizer, fold_system=True), (SYSTEM, *TURNS))


def test_roles_that_the_template_rejects(make_tokenizer: Callable[..., Any]) -> None:
    twice = (TURNS[0], TURNS[0], TURNS[1])
    with pytest.raises(DataError, match=r"train.jsonl:1: .*Conversation roles must alternate"):
        ChatTemplate(make_tokenizer("gemma")).encode(chat(*twice))
    with pytest.raises(DataError, match=r"first message is the assistant's"):
        ChatTemplate(make_tokenizer("smollm2")).encode(chat(TURNS[1]))
    with pytest.raises(DataError, match=r"leaves out message 3 \(tool\)"):
        ChatTemplate(make_tokenizer("phi3")).encode(chat(*TURNS[:2], Message("tool", "17 degrees"), TURNS[1]))


def test_no_template_names_the_ways_out(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("smollm2", template="")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template.*data\.chat_template: chatml, plain .*FILE"):
        ChatTemplate(tokenizer).encode(chat(*TURNS))
    with pytest.raises(DataError, match=r"'chatlm', which is no file; did you mean 'chatml'"):
        ChatTemplate(tokenizer, "chatlm")
    with pytest.raises(DataError, match=r"no valid Jinja: line 2"):
        ChatTemplate(tokenizer, "{% for m in messages %}\n{{ m. }}{% endfor %}").encode(chat(*TURNS))


def test_shipped_templates(make_tokenizer: Callable[..., Any], tmp_path: Any) -> None:
    template = ChatTemplate(make_tokenizer("mistral", adds_bos=True), "plain")
    (item,) = template.encode(chat(*TURNS))
    assert shown(template, item) == "<s>Hi there\n⟦Hello!</s>⟧\nBye\n⟦See you.\n\nSoon.</s>⟧"
    template = ChatTemplate(make_tokenizer("smollm2"), "chatml")
    (item,) = template.encode(chat(*TURNS))
    assert shown(template, item).startswith(
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n⟦Hello!<|im_end|>⟧"
    )
    # Without its special tokens ChatML's marks are ordinary text, by which generation cannot stop: EOS is added.
    template = ChatTemplate(make_tokenizer("mistral"), "chatml")
    assert shown(template, template.encode(chat(*TURNS))[0]).endswith("⟦Hello!<|im_end|></s>⟧")
    assert stop_ids(template) == {template.tokenizer.eos_token_id}
    check_prompts(template, TURNS)
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    template = ChatTemplate(make_tokenizer("mistral"), str(own))
    assert shown(template, template.encode(chat(*TURNS[:2]))[0]) == "Hi there</s>⟦Hello!</s>⟧"


def test_tokenizer_without_eos_cannot_learn_to_stop(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("no_end", eos_token=None, pad_token=None)
    with pytest.raises(DataError, match="could not learn to stop"):
        ChatTemplate(tokenizer).encode(chat(*TURNS))


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": {}}}]
TOOL_CHAT = (
    Message("user", "Weather?"),
    Message("assistant", "", None, {"tool_calls": [CALL]}),
    Message("tool", "17 degrees", None, {"name": "get_weather"}),
    Message("assistant", "17 degrees."),
)


@pytest.mark.parametrize(("family", "template"), [("qwen2_5", None), ("qwen3", None), ("smollm2", "chatml")])
def test_tool_calls_are_learned(family: str, template: str | None, make_tokenizer: Callable[..., Any]) -> None:
    made = ChatTemplate(make_tokenizer(family), template)
    text = "".join(shown(made, item) for item in made.encode(chat(*TOOL_CHAT, tools=TOOLS)))
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>⟧'
    assert call in text
    assert "<tool_response>\n17 degrees\n</tool_response><|im_end|>\n" in text
    assert text.endswith("17 degrees.<|im_end|>⟧")


def test_template_that_leaves_out_tools_or_calls(make_tokenizer: Callable[..., Any]) -> None:
    template = ChatTemplate(make_tokenizer("smollm2"))
    with pytest.raises(DataError, match=r"leaves out the tool call get_weather; data\.chat_template: chatml"):
        template.encode(chat(*TOOL_CHAT))
    with pytest.raises(DataError, match="leaves out the tools, get_weather among them"):
        template.encode(chat(*TURNS, tools=TOOLS))
