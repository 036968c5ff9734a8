"""How it is trained: batch, epochs, learning rate, schedule, when to stop.

The learning rate follows from the base's width, the method and the number of steps:

    full fine-tuning   5e-5 · (2000 / width)^p
    LoRA               10 times that, 15 times where the run is short

with p = 0.781, for Qwen 0.0775 (Tinker's fit over sweeps of llamas and Qwens; "LoRA Without Regret" for the factors).
Over smollm2-135m (width 576) that is 2.0e-3 for a short run. Batches are not in it: a rate that went with the root of
the batch would be a quarter of this at 8 rows a step instead of 128, and the best rates found here at 4 and 8 are not.
"""

from topwork.plan.advice.rule import Case, Rule, Table, always, given
from topwork.plan.advice.sources import (
    BANKING,
    BANKING_BATCH,
    BANKING_RANKS,
    BANKING_RATES,
    E2E_RATES,
    GSM8K_RATES,
    KEPT_BEST,
    QLORA,
    RATE_MATTERS,
    REPEATS,
    STOPPING,
    TINKER_RATE,
    WITHOUT_REGRET,
)

FULL_RATE, REFERENCE_WIDTH = 5e-5, 2000
LORA_FACTOR, SHORT_FACTOR = 10, 15
SHORT_STEPS = 100
EXPONENT, QWEN_EXPONENT = 0.781, 0.0775
UNKNOWN_RATE = 2e-4
BATCHES = ((100, 4), (1_000, 8), (20_000, 16))
LARGEST_BATCH = 32
"""Rows a step, by the number of rows below which they are meant."""
WANTED_STEPS, MOST_EPOCHS, MOST_OF_TEXT = 300, 5, 4


def _batch(case: Case) -> int:
    rows = case.facts.rows or 0
    return next((batch for below, batch in BATCHES if rows < below), LARGEST_BATCH)


def _epochs(case: Case) -> int:
    """As many as make WANTED_STEPS."""
    rows = max(1, case.facts.rows or 1)
    most = MOST_OF_TEXT if case.facts.task == "continued-pretraining" else MOST_EPOCHS
    return min(most, max(1, -(-WANTED_STEPS * case.value("training.batch_size", 16) // rows)))


def _short(case: Case) -> bool:
    return case.steps is not None and case.steps < SHORT_STEPS


def _warms_by_share(case: Case) -> bool:
    return "training.warmup_steps" not in case.chosen


def _wide(case: Case) -> bool:
    return case.low_rank and case.facts.hidden is not None


def _rate(case: Case, factor: float) -> float:
    exponent = QWEN_EXPONENT if case.facts.family.startswith("qwen") else EXPONENT
    rate = FULL_RATE * factor * (REFERENCE_WIDTH / (case.facts.hidden or REFERENCE_WIDTH)) ** exponent
    return float(f"{rate:.2g}")


TRAINING: Table = (
    Rule(
        "small-batches", "training.batch_size", "the rows are counted", lambda case: bool(case.facts.rows),
        f"{', '.join(f'{batch} below {below:,} rows' for below, batch in BATCHES)}, else {LARGEST_BATCH}", _batch,
        "LoRA loses more by large batches than full fine-tuning does, whatever its rank, and few rows make few steps: "
        "16 rows a step instead of 32, and nothing else, took banking77 from 85.7 to 87.4 %.",
        (BANKING_BATCH, WITHOUT_REGRET),
    ),
    Rule(
        "steps-enough", "training.num_train_epochs", "the rows are counted, and no number of steps is given",
        lambda case: bool(case.facts.rows) and "training.max_steps" not in case.chosen,
        f"as many as make {WANTED_STEPS} steps, 1 to {MOST_EPOCHS} (of plain text {MOST_OF_TEXT})", _epochs,
        "Sixty and a hundred steps left banking77 at 0.7 of loss and more, 313 brought it to 0.12. New rows "
        "teach more than rows that come again, and those that come more than a few times are learned by heart.",
        (BANKING_RATES, BANKING_RANKS, BANKING, REPEATS),
    ),
    Rule(
        "rate-of-the-whole", "training.learning_rate", "full fine-tuning of a base whose width is known",
        lambda case: case.method == "full" and case.facts.hidden is not None,
        "5e-5 · (2000 / width)^0.781, for Qwen ^0.0775", lambda case: _rate(case, 1),
        "A tenth of LoRA's: sweeps over llamas and Qwens lie on this line to half a percent of their loss.",
        (TINKER_RATE, WITHOUT_REGRET),
    ),
    Rule(
        "rate-of-a-short-run", "training.learning_rate", f"LoRA, fewer than {SHORT_STEPS} steps",
        lambda case: _wide(case) and _short(case), "15 · 5e-5 · (2000 / width)^0.781, for Qwen ^0.0775",
        lambda case: _rate(case, SHORT_FACTOR),
        "B begins at zero, and a short run has to bring it far in few steps, so its best rate is about 15 times full "
        "fine-tuning's. Sweeps here hold it: over a base of width 576 it is within a factor of two of their best.",
        (TINKER_RATE, WITHOUT_REGRET, BANKING_RATES, GSM8K_RATES, E2E_RATES),
    ),
    Rule(
        "rate-by-the-width", "training.learning_rate", "LoRA, the base's width is known", _wide,
        "10 · 5e-5 · (2000 / width)^0.781, for Qwen ^0.0775", lambda case: _rate(case, LORA_FACTOR),
        "About ten times full fine-tuning's best rate, whatever the rank, and the lower the wider the base; families "
        "that nobody fitted go by llamas. What methods seem to differ by is mostly this number: `topwork sweep --preset "
        "learning-rate` finds your own.",
        (TINKER_RATE, WITHOUT_REGRET, RATE_MATTERS),
    ),
    Rule(
        "rate-unknown", "training.learning_rate", "LoRA, the base is not known", lambda case: case.low_rank,
        f"{UNKNOWN_RATE:g}", given(UNKNOWN_RATE),
        "What QLoRA took for 7 and 13 billion parameters. A small base learns slowly at it: name yours.",
        (QLORA,),
    ),
    Rule(
        "cosine", "training.lr_scheduler_type", "always", always, "cosine", given("cosine"),
        "Small steps at the end settle what large ones have found; all records here were made so.",
        (BANKING_RATES, BANKING),
    ),
    Rule(
        "warm-up-of-a-short-run", "training.warmup_ratio", f"fewer than {SHORT_STEPS} steps",
        lambda case: _short(case) and _warms_by_share(case), "0.05", given(0.05),
        "A short run's rate is high, and Adam's first steps are full ones whatever the gradient; three of sixty rise "
        "to it in the records here.",
        (BANKING_RATES,),
    ),
    Rule(
        "warm-up", "training.warmup_ratio", "else", _warms_by_share, "0.03", given(0.03),
        "Adam's first steps are full ones whatever the gradient; so few steps of rising are enough.",
        (QLORA, BANKING),
    ),
    Rule(
        "stop-when-worse", "training.early_stopping_patience", "rows seen twice or more, and some held out",
        lambda case: case.epochs >= 2 and (case.facts.held_out or case.value("data.eval_fraction", 0) > 0),
        "3", given(3),
        "Three validations in a row without a lower loss are seldom luck, and what follows them is learning by heart. "
        "The best adapter is the one that is kept.",
        (STOPPING, KEPT_BEST),
    ),
)  # fmt: skip
