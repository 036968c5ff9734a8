"""How much there is to learn from, beside what is trained."""

from collections.abc import Iterator

from topwork.adapters.config import LoraConfig
from topwork.data.batches import steps_per_epoch
from topwork.plan.lint.examined import Examined
from topwork.plan.lint.finding import Finding

PER_TOKEN = 1000
"""Trained parameters per learned token from which a smaller rank is advised."""
FEW_ROWS = 50
FEW_STEPS = 10


def few_for_the_rank(examined: Examined) -> Iterator[Finding]:
    """Many parameters for little data.

    A learned token tells a model about one bit that it did not know, and a parameter can hold about two (Allen-Zhu and
    Li, arXiv:2404.05405), so capacity is hardly ever what lacks; with a thousand parameters for each token it is so far
    above need that the rows are learned by heart within an epoch or two.
    """
    learned = int(examined.train.sequences.learned.sum())
    trained, adapter = examined.trainable, examined.recipe.adapter
    if not learned or not trained or trained < PER_TOKEN * learned:
        return
    smaller = ""
    if isinstance(adapter, LoraConfig) and adapter.r > 1:
        rank = max(1, int(adapter.r * PER_TOKEN * learned / trained))
        smaller = f"adapter.r: {rank} (or fewer target_modules), or "
    yield Finding(
        "few-rows-for-the-rank", "notice",
        f"{trained:,} trained parameters for {learned:,} learned tokens: {trained // learned:,} for each. A token "
        f"tells about one bit and a parameter holds about two, so from {PER_TOKEN:,} on rows are learned by heart",
        f"{smaller}more rows, few epochs, and a look at the validation loss: it tells when to stop",
        count=learned,
    )  # fmt: skip


def few_rows(examined: Examined) -> Iterator[Finding]:
    """A set, or a plan, too small to learn from or to validate by."""
    side, training = examined.train, examined.recipe.training
    usable = len(side.sequences)
    if 0 < usable < FEW_ROWS:
        yield Finding(
            "few-rows", "notice", f"rows to learn from: {usable:,}",
            "enough to try whether all works; a style needs about a hundred good rows, a task some hundreds",
            count=usable,
        )  # fmt: skip
    if not usable or training.max_steps is not None:
        return
    steps = round(steps_per_epoch(usable, training.batch_size) * training.num_train_epochs)
    if steps < FEW_STEPS:
        yield Finding(
            "few-steps", "notice",
            f"{usable:,} rows in batches of {training.batch_size} over {training.num_train_epochs} epochs are {steps} "
            "optimizer steps",
            "lower training.batch_size or raise training.num_train_epochs: below some tens of steps hardly anything is "
            "learned",
            count=steps,
        )  # fmt: skip
