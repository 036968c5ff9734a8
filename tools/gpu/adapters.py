"""Six adapters in one pass beside the same six alone, and generation at several widths beside transformers' own."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from checkpointing import Arm
from many_adapters import RANKS, in_turns

from gpu.bases import chat_lengths, random_base, random_model, rows_of, shaped
from gpu.card import Card
from gpu.profile import waits
from gpu.result import Result, main
from topwork.adapters.graft import Adapters
from topwork.data.examples import Example
from topwork.generation.engine import generate
from topwork.generation.sampling import Sampling
from topwork.models.base import Base
from topwork.objectives.sft import Sft
from topwork.training.passes import step_passes
from topwork.training.step import Learner, StepResult, train_step

SHAPE = "llama-3.1-8b"
LOSSES_APART = 1e-2
"""Together and alone, as a share: the same weights and rows, in bf16 products of other shapes."""


@dataclass(frozen=True)
class Size:
    """Ranks of the members, rows of a step that each brings, tokens of a pass, rounds; how many sequences are
    generated at once, the tokens of their prompts, and how many are new."""

    ranks: tuple[int, ...] = RANKS
    rows: tuple[int, ...] = (1, 4)
    tokens_per_pass: int = 16384
    rounds: int = 4
    widths: tuple[int, ...] = (1, 16, 64)
    prompt: int = 128
    new: int = 48


TINY = Size((2, 4), (1,), 24, 1, (2,), 3, 2)


class Members:
    """A base with an adapter of each rank, as `benchmarks/many_adapters.py` takes them."""

    def __init__(self, base: Base, size: Size, rows: int, tiny: bool) -> None:
        self.base, self.size, self.rows, self.tiny = base, size, rows, tiny
        adapters = Adapters(base.module)
        arms = [Arm(base, adapters, f"r{r}", r=r, lora_alpha=2 * r) for r in size.ranks]
        self.learners = [Learner(arm.name, Sft(), arm.parameters, arm.optimizer, 1.0) for arm in arms]
        self.adapters = adapters

    def step(self, number: int, which: slice = slice(None)) -> tuple[float, int, list[StepResult]]:
        """One step of some members, each with rows of its own: seconds, passes and results."""
        card = Card(self.base.device)
        learners = list(enumerate(self.learners))[which]
        groups = [(learner.name, self._rows(number, at)) for at, learner in learners]
        passes = step_passes(groups, self.size.tokens_per_pass, self.base.device)
        results: list[Any] = []
        own = [learner for _, learner in learners]
        seconds = card.timed(lambda: results.extend(train_step(self.base, own, passes)))
        for result in results:
            if isinstance(result, Exception):
                raise result
        return seconds, len(passes), results

    def _rows(self, number: int, member: int) -> Sequence[Example]:
        seed = 100 * number + member
        return rows_of(chat_lengths(self.rows, seed, self.tiny), self.base.module.config.vocab_size, seed)


def part(result: Result) -> None:
    config, size = shaped(SHAPE, result.tiny), TINY if result.tiny else Size()
    result.put("shape", SHAPE)
    base = random_base(config, result.card.device)
    for rows in size.rows:
        with result.section(f"{len(size.ranks)} adapters, {rows} rows each"):
            together(result, base, size, rows)
    with result.section("generation"):
        generation(result, base, size)
    with result.section("generation by transformers"):
        by_transformers(result, size)


def together(result: Result, base: Base, size: Size, rows: int) -> None:
    """All members in shared passes, and each alone, from the same weights."""
    members = Members(base, size, rows, result.tiny)
    try:
        rounds = in_turns(members, size.rounds)  # type: ignore[arg-type]
    finally:
        for learner in members.learners:
            members.adapters.remove(learner.name)
    ratios = [turn["together"]["seconds"] / turn["alone"]["seconds"] for turn in rounds]
    apart = max(abs(a / b - 1) for turn in rounds for a, b in zip(turn["together"]["losses"], turn["alone"]["losses"]))
    result.add("members", {
        "rows_each": rows, "ranks": list(size.ranks), "tokens": median(turn["together"]["tokens"] for turn in rounds),
        "together_over_alone": median(ratios), "least": min(ratios), "most": max(ratios), "rounds": rounds,
    })  # fmt: skip
    result.tell(f"{len(size.ranks)} adapters of {rows} rows each: together {median(ratios):.2f} of the time alone")
    result.check(f"{len(size.ranks)} adapters, {rows} rows: losses together and alone apart", apart, LOSSES_APART)


def generation(result: Result, base: Base, size: Size) -> None:
    """Greedy, from prompts of one length; the bare base as transformers has it, and an adapter for each sequence in
    turns where there are several."""
    adapters = Adapters(base.module)
    arms = [Arm(base, adapters, f"r{r}", r=r, lora_alpha=2 * r) for r in size.ranks]
    names = [arm.name for arm in arms]
    for arm in arms:
        adapters.train(arm.name, False)
    for width in size.widths:
        prompts = [row.tokens.tolist() for row in rows_of([size.prompt] * width, base.module.config.vocab_size, 0)]
        for which in ("bare", "adapters"):
            given = [None if which == "bare" else names[at % len(names)] for at in range(width)]

            def run(new: int, prompts: Any = prompts, given: Any = given, into: Any = None) -> None:
                tokens = generate(base, prompts, given, (), Sampling(max_new_tokens=new))
                if into is not None:
                    into.extend(tokens)

            run(2)
            found: list[list[int]] = []
            seconds = result.card.timed(partial(run, size.new, into=found))
            wrong = sum(len(tokens) != size.new for tokens in found)
            result.add("generation", told(f"ours, {which}", width, size.new, seconds))
            result.check(f"generation, {width} sequences, {which}: of another length", wrong, 0)
            found_at = waits(result.card, partial(run, size.new))
            result.check(
                f"generation, {width} sequences, {which}: waits ({told_once(found_at)})", len(found_at), size.new
            )


@torch.no_grad()
def by_transformers(result: Result, size: Size) -> None:
    """`generate` of the same shape."""
    config = shaped(SHAPE, result.tiny)
    model = random_model(config, result.card.device)
    for width in size.widths:
        prompts = torch.stack([
            torch.from_numpy(row.tokens).long() for row in rows_of([size.prompt] * width, config.vocab_size, 0)
        ]).to(result.card.device)  # fmt: skip

        def run(new: int, prompts: torch.Tensor = prompts) -> torch.Tensor:
            return model.generate(  # type: ignore[operator, no-any-return]
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip

        run(2)
        seconds = result.card.timed(partial(run, size.new))
        result.add("generation", told("transformers, bare", width, size.new, seconds))


def told_once(places: Sequence[str]) -> str:
    """Each place with how often."""
    return ", ".join(f"{place} {count} times" for place, count in Counter(places).items())


def told(who: str, width: int, new: int, seconds: float) -> dict[str, Any]:
    """A line of the table; reading the prompts counts."""
    return {"who": who, "sequences": width, "new_tokens": new, "tokens_per_second": width * new / seconds}


if __name__ == "__main__":
    main(part)
