"""Every rule of advice has a reason and a source, applies to somebody, and changes what is advised."""

import re
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from advice_cases import FACTS, GIB, LARGE, SMALL, llama

from topwork.common.errors import RequestError
from topwork.plan.advice import advise as advising
from topwork.plan.advice.advise import Advice, advise
from topwork.plan.advice.facts import GOALS, TASKS, Facts
from topwork.plan.advice.rule import ANSWER, Rule
from topwork.plan.advice.sources import How
from topwork.plan.advice.table import RULES
from topwork.recipe.recipe import all_keys, make_recipe

ROOT = Path(__file__).parents[3]
NAMES = [rule.name for rule in RULES]


def chosen(advice: Advice) -> dict[str, Any]:
    return {
        ANSWER: advice.answer.value,
        "reason": advice.answer.reason,
        **{choice.key: choice.value for choice in advice.choices},
    }


@cache
def advised() -> dict[str, Advice]:
    """With all rules."""
    return {name: advise(facts) for name, facts in FACTS.items()}


def deciding(facts: Facts, key: str) -> str:
    """The rule that decides a key, or nothing."""
    advice = advise(facts)
    return next((choice.rule.name for choice in (advice.answer, *advice.choices) if choice.key == key), "")


def test_names_are_told_apart_and_keys_are_a_recipes() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert {rule.decides for rule in RULES} - {ANSWER} <= set(all_keys())


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_rule_says_why_and_from_where(rule: Rule) -> None:
    assert rule.when
    assert rule.what
    assert len(rule.why.split()) > 5
    assert rule.why.endswith(".")
    assert rule.sources
    for source in rule.sources:
        assert source.how in get_args(How)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", source.date)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_source_of_this_repository_is_there(rule: Rule) -> None:
    for source in rule.sources:
        named = re.findall(r"\b(?:benchmarks|docs)/[\w/-]+\.(?:md|yaml)", source.text)
        assert source.how != "measured here" or named or "README.md" in source.text
        for path in named:
            assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_rule_applies_to_somebody_and_changes_what_is_advised(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    applied = [
        name for name, advice in advised().items()
        if any(choice.rule is rule for choice in (advice.answer, *advice.choices))
    ]  # fmt: skip
    assert applied, "no facts of advice_cases.py are decided by it"
    monkeypatch.setattr(advising, "RULES", tuple(each for each in RULES if each is not rule))
    if rule.name == "enough-examples":  # without the last answer there is none
        return
    assert any(chosen(advise(FACTS[name])) != chosen(advised()[name]) for name in applied)


@pytest.mark.parametrize("name", FACTS)
def test_what_is_advised_is_a_recipe(name: str) -> None:
    recipe = make_recipe(advised()[name].recipe())
    assert recipe.data.train == "train.jsonl"


@pytest.mark.parametrize("task", TASKS)
def test_every_goal_and_amount_gets_an_answer_and_a_recipe(task: str) -> None:
    for goal in (None, *GOALS):
        for rows in (None, 0, 1, 50, 10**7):
            advice = advise(Facts(task, rows=rows, structure=SMALL, goals=frozenset({goal} if goal else ())))
            assert advice.answer.value in ("prompt", "retrieval", "fine-tune")
            make_recipe(advice.recipe())


# Boundaries, by hand: facts, the key, the rule below the boundary and the one above


@pytest.mark.parametrize(
    ("rows", "rule"), [(0, "few-examples"), (49, "few-examples"), (50, "enough-examples"), (None, "enough-examples")]
)
def test_fifty_examples_are_worth_a_try(rows: int | None, rule: str) -> None:
    assert deciding(Facts("instruction", rows=rows), ANSWER) == rule


def test_few_documents_are_no_few_examples() -> None:
    assert deciding(Facts("continued-pretraining", rows=3), ANSWER) == "plain-text"


@pytest.mark.parametrize(
    ("task", "goals", "answer"),
    [
        ("classification", {"changing-knowledge"}, "knowledge-changes"),
        ("classification", {"citations"}, "sources-are-named"),
        ("classification", {"new-facts"}, "facts-are-new"),
        ("classification", {"cost"}, "one-of-a-few-answers"),
        ("extraction", (), "a-fixed-form"),
        ("tool-calls", (), "a-fixed-form"),
        ("instruction", {"format"}, "a-fixed-form"),
        ("chat-style", (), "a-tone"),
        ("summarization", {"style"}, "a-tone"),
        ("reasoning", {"latency"}, "quick-or-cheap"),
        ("reasoning", {"cost"}, "quick-or-cheap"),
        ("reasoning", (), "enough-examples"),
    ],
)
def test_what_matters_goes_before_the_task(task: str, goals: Any, answer: str) -> None:
    assert deciding(Facts(task, rows=500, goals=frozenset(goals)), ANSWER) == answer


@pytest.mark.parametrize(
    ("rows", "batch"), [(1, 4), (99, 4), (100, 8), (999, 8), (1_000, 16), (19_999, 16), (20_000, 32), (10**7, 32)]
)
def test_batches_grow_with_the_rows_and_stay_small(rows: int, batch: int) -> None:
    assert advise(Facts("instruction", rows=rows)).value("training.batch_size") == batch


@pytest.mark.parametrize(
    ("task", "rows", "epochs"),
    [
        ("instruction", 10_000, 1), ("instruction", 9_999, 1), ("instruction", 4_800, 1), ("instruction", 4_799, 2),
        ("instruction", 1_000, 5), ("instruction", 10, 5), ("continued-pretraining", 10, 4),
    ],
)  # fmt: skip
def test_epochs_make_three_hundred_steps_and_no_more_than_five(task: str, rows: int, epochs: int) -> None:
    assert advise(Facts(task, rows=rows)).value("training.num_train_epochs") == epochs


def test_steps_that_are_given_leave_epochs_alone() -> None:
    advice = advise(Facts("instruction", rows=500, structure=SMALL, decided={"training.max_steps": 99}))
    assert advice.value("training.num_train_epochs") is None
    assert advice.steps == 99
    assert advice.value("training.learning_rate") == 2e-3
    longer = advise(Facts("instruction", rows=500, structure=SMALL, decided={"training.max_steps": 100}))
    assert longer.value("training.learning_rate") == 1.3e-3


@pytest.mark.parametrize(("steps", "share"), [(99, 0.05), (100, 0.03)])
def test_a_short_run_warms_up_longer(steps: int, share: float) -> None:
    assert advise(Facts("instruction", decided={"training.max_steps": steps})).value("training.warmup_ratio") == share


def test_a_warm_up_in_steps_is_left_alone() -> None:
    advice = advise(Facts("instruction", rows=500, decided={"training.warmup_steps": 3}))
    assert advice.value("training.warmup_ratio") is None


@pytest.mark.parametrize(
    ("hidden", "family", "method", "rate"),
    [
        (2000, "llama", "lora", 5e-4), (4096, "llama", "lora", 2.9e-4), (2048, "llama", "lora", 4.9e-4),
        (4096, "qwen3", "lora", 4.7e-4), (4096, "qwen2", "dora", 4.7e-4), (4096, "mistral", "full", 2.9e-5),
    ],
)  # fmt: skip
def test_rates_are_tinkers(hidden: int, family: str, method: str, rate: float) -> None:
    """The values for Llama-3.2-1B, Llama-8B and Qwen3-8B as its formula gives them."""
    facts = Facts("instruction", structure=llama(hidden, family=family), decided={"adapter.method": method})
    assert advise(facts).value("training.learning_rate") == rate


@pytest.mark.parametrize("method", ["ia3", "prefix", "prompt", "bitfit"])
def test_nothing_is_said_of_rates_of_other_methods(method: str) -> None:
    advice = advise(Facts("instruction", rows=500, structure=SMALL, decided={"adapter.method": method}))
    assert advice.value("training.learning_rate") is None
    assert not [choice.key for choice in advice.choices if choice.key.startswith(("adapter", "quantization"))]


def test_a_base_of_which_only_the_size_is_known_has_a_llamas_width() -> None:
    assert Facts("instruction", parameters=8_030_000_000).hidden == pytest.approx(4096, rel=0.1)
    assert advise(Facts("instruction", parameters=8_030_000_000)).value("training.learning_rate") == 2.7e-4
    assert advise(Facts("instruction")).value("training.learning_rate") == 2e-4


def test_the_rank_follows_the_learned_tokens() -> None:
    """SmolLM2's linear layers have 305,280 parameters for each rank: 4.9 million at 16."""
    assert FACTS["tickets"].trained_per_rank == 4_884_480 // 16

    def rank(rows: int, tokens: float = 1000) -> int:
        facts = Facts("instruction", rows=rows, tokens_per_row=tokens, learned_share=1.0, structure=SMALL)
        return int(advise(facts).value("adapter.r"))

    assert (rank(199), rank(200), rank(4_884), rank(4_885), rank(9_768), rank(9_769)) == (8, 16, 16, 32, 32, 64)
    assert rank(10**9) == 256
    assert rank(199, 30_000) == 32


@pytest.mark.parametrize(("memory", "method"), [(24, "full"), (1, "lora")])
def test_a_base_is_trained_whole_only_beyond_lora_and_where_it_fits(memory: int, method: str) -> None:
    facts = Facts("continued-pretraining", rows=2_000_000, tokens_per_row=900, kind="text", structure=SMALL,
                  memory_bytes=memory * GIB)  # fmt: skip
    assert advise(facts).value("adapter.method") == method


def test_four_bits_come_where_sixteen_do_not_fit() -> None:
    def packed(**more: Any) -> bool | None:
        value = advise(Facts("instruction", rows=500, longest=512, **more)).value("quantization.load_in_4bit")
        assert value is None or isinstance(value, bool)
        return value

    assert packed(structure=LARGE, memory_bytes=8 * GIB, device="cuda") is False
    assert packed(structure=LARGE, memory_bytes=3 * GIB, device="cuda") is True
    assert packed(parameters=8_000_000_000, memory_bytes=24 * GIB) is False
    assert packed(parameters=8_000_000_000, memory_bytes=12 * GIB) is True
    assert packed(structure=SMALL) is None
    assert packed(memory_bytes=24 * GIB) is None


@pytest.mark.parametrize(("epochs", "dropout"), [(2, 0.0), (3, 0.05)])
def test_dropout_is_for_rows_that_come_again(epochs: int, dropout: float) -> None:
    facts = Facts("instruction", rows=500, decided={"training.num_train_epochs": epochs})
    assert advise(facts).value("adapter.lora_dropout") == dropout


@pytest.mark.parametrize(
    ("epochs", "held_out", "share", "patience"),
    [(1, True, 0, None), (2, True, 0, 3), (2, False, 0, None), (2, False, 0.1, 3)],
)
def test_stopping_early_needs_something_to_see(epochs: int, held_out: bool, share: float, patience: int | None) -> None:
    decided = {"training.num_train_epochs": epochs, "data.eval_fraction": share}
    advice = advise(Facts("instruction", rows=500, held_out=held_out, decided=decided))
    assert advice.value("training.early_stopping_patience") == patience


@pytest.mark.parametrize(
    ("rows", "share"), [(1, 0.2), (500, 0.2), (1_000, 0.1), (4_000, 0.025), (5_000, 0.02), (10**6, 0.02)]
)
def test_a_hundred_rows_are_held_out(rows: int, share: float) -> None:
    assert advise(Facts("instruction", rows=rows)).value("data.eval_fraction") == share
    assert advise(Facts("instruction", rows=rows, held_out=True)).value("data.eval_fraction") is None


@pytest.mark.parametrize(
    ("longest", "measured", "limit"),
    [(10, True, 128), (128, True, 128), (129, True, 192), (129, False, 256), (9_000, True, 8192)],
)
def test_the_limit_is_the_longest_row_with_room(longest: int, measured: bool, limit: int) -> None:
    facts = Facts("instruction", longest=longest, measured=measured, structure=SMALL)
    assert advise(facts).value("data.max_length") == limit


@pytest.mark.parametrize(
    ("task", "kind", "turns", "what"),
    [
        ("continued-pretraining", "text", False, "split"), ("extraction", "text", False, "drop"),
        ("chat-style", "messages", True, "oldest_turns"), ("chat-style", "messages", False, "middle"),
        ("continued-pretraining", "messages", False, "middle"),
    ],
)  # fmt: skip
def test_what_is_too_long_is_shortened_by_its_kind(task: str, kind: Any, turns: bool, what: str) -> None:
    assert advise(Facts(task, kind=kind, turns=turns)).value("data.too_long") == what


def test_text_of_a_domain_is_cut_in_pieces_and_a_text_file_into_paragraphs() -> None:
    facts = Facts("continued-pretraining", kind="text", longest=50, structure=llama(context_length=512))
    assert advise(facts).value("data.max_length") == 512
    assert advise(facts).value("data.documents") is None
    assert advise(FACTS["books"]).value("data.max_length") == 1024
    assert advise(FACTS["books"]).value("data.documents") == "paragraph"


@pytest.mark.parametrize(("writes", "template"), [(None, None), (True, None), (False, "chatml")])
def test_calls_get_a_template_that_writes_them(writes: bool | None, template: str | None) -> None:
    assert advise(Facts("tool-calls", writes_calls=writes)).value("data.chat_template") == template
    assert advise(Facts("instruction", writes_calls=writes)).value("data.chat_template") is None


@pytest.mark.parametrize(
    ("task", "tokens", "grader"),
    [
        ("classification", 32, "exact_match"),
        ("reasoning", 512, None),
        ("extraction", None, "auto"),
        ("chat-style", None, None),
    ],
)
def test_answers_are_graded_by_the_task(task: str, tokens: int | None, grader: str | None) -> None:
    advice = advise(Facts(task))
    assert (advice.value("evaluation.max_new_tokens"), advice.value("evaluation.grader")) == (tokens, grader)


def test_what_is_decided_is_not_decided_again() -> None:
    advice = advise(Facts("instruction", rows=500, structure=SMALL, decided={"adapter.r": 3, "training.batch_size": 1}))
    assert advice.value("adapter.r") is None
    assert advice.recipe()["adapter"]["r"] == 3
    assert advice.value("training.num_train_epochs") == 1


# What cannot be


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"task": "clasification"}, "did you mean 'classification'"),
        ({"task": "instruction", "goals": frozenset({"citation"})}, "did you mean 'citations'"),
        ({"task": "instruction", "rows": -1}, "examples: -1 cannot be; expected at least 0"),
        ({"task": "instruction", "tokens_per_row": 0}, "tokens per row: 0 cannot be"),
        ({"task": "instruction", "longest": 0}, "longest: 0 cannot be"),
        ({"task": "instruction", "memory_bytes": 0}, "memory bytes: 0 cannot be"),
        ({"task": "instruction", "learned_share": 1.5}, "expected a share from 0 to 1"),
        ({"task": "instruction", "tokens_per_row": float("nan")}, "tokens per row: nan cannot be"),
    ],
)
def test_facts_that_cannot_be_are_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        Facts(**facts)
