"""What is trained: method, quantization, rank, alpha, targets, dropout."""

from topwork.plan.advice.room import fits
from topwork.plan.advice.rule import Case, Rule, Table, always, given
from topwork.plan.advice.sources import (
    BANKING,
    BANKING_METHODS,
    BANKING_RATES,
    BANKING_SCALES,
    BANKING_TARGETS,
    CAPACITY,
    DROPOUT,
    DROPOUT_AMX,
    GSM8K_METHODS,
    GSM8K_SCALES,
    GSM8K_TARGETS,
    LEARNS_LESS,
    OPTIMIZERS,
    QLORA,
    QLORA_BANKING,
    QLORA_GSM8K,
    QLORA_STEP,
    RATE_MATTERS,
    TINKER_RANK,
    WITHOUT_REGRET,
)

ALPHA = 32
USUAL_RANK, SMALL_RANK, LARGEST_RANK = 16, 8, 256
FEW_ROWS = 200
"""Rows below which a small rank is enough for any length."""
REPEATED = 3
"""Epochs from which rows are known by heart."""


def _needed_rank(case: Case) -> int | None:
    """The rank at which there are as many trained parameters as learned tokens."""
    tokens, each = case.facts.learned_tokens, case.facts.trained_per_rank
    return None if tokens is None or each is None else -(-tokens // each)


def _beyond_lora(case: Case) -> bool:
    rank = _needed_rank(case)
    return rank is not None and rank > LARGEST_RANK and fits(case, full=True) is True


def _large(case: Case) -> bool:
    rank = _needed_rank(case)
    return case.low_rank and rank is not None and rank > USUAL_RANK


def _large_rank(case: Case) -> int:
    rank = _needed_rank(case) or USUAL_RANK
    return min(LARGEST_RANK, 1 << (rank - 1).bit_length())


def _room_known(case: Case) -> bool:
    return case.low_rank and fits(case) is not None


def _needs_four_bits(case: Case) -> bool:
    return case.low_rank and fits(case) is False


METHOD: Table = (
    Rule(
        "more-than-lora-holds", "adapter.method",
        f"more learned tokens than LoRA has parameters at r = {LARGEST_RANK}, and memory for training the base whole",
        _beyond_lora, "full", given("full"),
        "LoRA keeps up with full fine-tuning until the data exceed what it can hold; from there on it learns less for "
        "the same tokens, in continued pretraining most of all.",
        (WITHOUT_REGRET, LEARNS_LESS, TINKER_RANK),
    ),
    Rule(
        "plain-lora", "adapter.method", "else", always, "lora", given("lora"),
        "Nine variants are within 1 to 2 % of LoRA once each has its own best learning rate; here DoRA equalled LoRA "
        "at the same rate on two tasks, and LoRA at its best rate reached what LoRA+ had reached.",
        (RATE_MATTERS, BANKING_METHODS, GSM8K_METHODS, BANKING_RATES),
    ),
)  # fmt: skip
"""Before learning rates, which read it."""

ADAPTER: Table = (
    Rule(
        "rank-for-the-tokens", "adapter.r",
        f"more learned tokens than LoRA has parameters at r = {USUAL_RANK}", _large,
        f"the next power of two with a parameter for each learned token, at most {LARGEST_RANK}", _large_rank,
        "LoRA learns as full fine-tuning does while it has about as many parameters as there are learned tokens; below "
        "that it learns less.",
        (TINKER_RANK, WITHOUT_REGRET, CAPACITY),
    ),
    Rule(
        "rank-for-few-rows", "adapter.r", f"LoRA, fewer than {FEW_ROWS} rows",
        lambda case: case.low_rank and case.facts.rows is not None and case.facts.rows < FEW_ROWS,
        str(SMALL_RANK), given(SMALL_RANK),
        "A learned token tells about one bit and a parameter holds about two: a low rank holds all of so few rows, in "
        "half the memory and file, and the learning rate stays the same at this alpha.",
        (CAPACITY, WITHOUT_REGRET),
    ),
    Rule(
        "usual-rank", "adapter.r", "LoRA, else", lambda case: case.low_rank, str(USUAL_RANK), given(USUAL_RANK),
        "Enough for what the rows hold. A larger rank did better here only with alpha / r held, where it also moves "
        "further in a step: as a larger learning rate does, for twice the memory.",
        (WITHOUT_REGRET, TINKER_RANK, BANKING_RATES),
    ),
    Rule(
        "constant-alpha", "adapter.lora_alpha", "LoRA", lambda case: case.low_rank, str(ALPHA), given(ALPHA),
        "With alpha / r as the scale and alpha left alone the best learning rate hardly depends on the rank; alpha and "
        "the learning rate do the same, so search for one of them.",
        (WITHOUT_REGRET, BANKING_SCALES, GSM8K_SCALES),
    ),
    Rule(
        "all-linear-layers", "adapter.target_modules", "LoRA", lambda case: case.low_rank, "all-linear",
        given("all-linear"),
        "At equal parameters attention alone is behind (banking77 2.05 against 1.82, GSM8K 0.912 against 0.881 of "
        "loss), and all linear layers are within the error of the best or next to it.",
        (BANKING_TARGETS, GSM8K_TARGETS, WITHOUT_REGRET),
    ),
    Rule(
        "four-bits-to-fit", "quantization.load_in_4bit", "LoRA, and the base does not fit into memory in 16 bits",
        _needs_four_bits, "true", given(True),
        "NF4 holds the base in a quarter of the memory at 1.04 times the time of a step. It costs a small base some "
        "quality (at r = 16 −1.3 ± 0.9 points on banking77, 0.11 of loss on GSM8K), so only where 16 bits do not fit.",
        (QLORA_STEP, QLORA_BANKING, QLORA_GSM8K),
    ),
    Rule(
        "sixteen-bits", "quantization.load_in_4bit", "LoRA, and it fits", _room_known, "false", given(False),
        "There is room for 16 bits, and 4 cost quality and time: on GSM8K 0.11 of loss at r = 16.",
        (QLORA_STEP, QLORA_BANKING, QLORA_GSM8K),
    ),
    Rule(
        "small-moments", "training.optim", "full fine-tuning", lambda case: case.method == "full", "adamw_8bit",
        given("adamw_8bit"),
        "Two moments of every weight are most of what full fine-tuning takes; in 8 bits they are a quarter of it (0.8 "
        "GB less for 134.5 million parameters; of an adapter's it would be 28 MB).",
        (OPTIMIZERS,),
    ),
    Rule(
        "dropout-for-repeats", "adapter.lora_dropout", f"LoRA, rows seen {REPEATED} times or more",
        lambda case: case.low_rank and case.epochs >= REPEATED, "0.05", given(0.05),
        "Rows that come again are learned by heart; a little dropout slows that. It takes 1 to 12 % of a step here "
        "(most on AMX) and hardly any memory.",
        (QLORA, DROPOUT, DROPOUT_AMX),
    ),
    Rule(
        "no-dropout", "adapter.lora_dropout", "LoRA, else", lambda case: case.low_rank, "0", given(0.0),
        "Rows that are seen once or twice are not known by heart, and nothing is gained by hiding a part of them; "
        "banking77 was learned without.",
        (BANKING, DROPOUT),
    ),
)  # fmt: skip
