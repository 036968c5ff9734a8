"""Whether a run fits into memory, with which pass, and what to change where it does not: in the order of harm, each
change with the memory that it brings. Free of torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from topwork.adapters.config import FullConfig, LoraConfig
from topwork.common.errors import AdapterError
from topwork.models.config import ModelConfig
from topwork.models.config_files import shape_names
from topwork.models.structure import Structure
from topwork.plan.base import structure_named
from topwork.plan.setup import setup_of
from topwork.quantization.config import QuantizationConfig
from topwork.recipe.recipe import Recipe
from topwork.training.memory import MARGIN, SMALLEST_PASS, PassShape, Setup, Usage, fitting_pass, peak

IDLE_SHARE = 0.005
"""A change that brings less than so much of the whole is not worth its words."""
QUERY_VALUE = ("q_proj", "v_proj")
RANKS = (8, 4)


@dataclass(frozen=True)
class Fit:
    """A pass: of how many tokens, with how many layers checkpointed, what it takes at its peak, that with a margin for
    what planning is under, and whether it is there. Where nothing fits, it is the pass that takes least."""

    tokens_per_pass: int
    checkpointed_layers: int
    peak: Usage
    needed_bytes: int
    fits: bool


@dataclass(frozen=True)
class Job:
    """What is to fit: recipes that train together on one base, into so much memory.

    longest  tokens of the longest sequence, virtual ones among them

    Every token of a pass may be learned, as training takes it too (`run/fit.py`): a row that is learned whole has to
    fit, however few others are.
    """

    recipes: Sequence[Recipe]
    structure: Structure
    device: Literal["cpu", "cuda"]
    memory_bytes: int
    longest: int

    @cached_property
    def setup(self) -> Setup:
        """As the memory model takes it. Raises AdapterError where an adapter does not fit the base."""
        return setup_of(self.recipes, self.structure, self.device)

    def shape(self, tokens: int) -> PassShape:
        """A pass of so many tokens."""
        return PassShape(tokens, tokens, min(self.longest, tokens))

    @cached_property
    def fit(self) -> Fit:
        """The largest pass that fits, as training itself plans it; one that the recipe names is as large as it says."""
        return self._planned(self.memory_bytes)

    @cached_property
    def least(self) -> Fit:
        """The smallest pass that the recipe allows, with as many layers checkpointed as may be: what a run needs."""
        return self._planned(0)

    def _planned(self, memory_bytes: int) -> Fit:
        training = self.recipes[0].training
        tokens, layers = fitting_pass(
            self.setup,
            memory_bytes,
            1.0,
            self.longest,
            training.activation_checkpointing,
            training.tokens_per_pass,
        )
        return self._fit(tokens, layers)

    def _fit(self, tokens: int, layers: int) -> Fit:
        usage = peak(self.setup, self.shape(tokens), layers)
        needed = round(MARGIN[self.device] * usage.bytes)
        return Fit(tokens, layers, usage, needed, needed <= self.memory_bytes)

    def with_recipes(self, change: Callable[[Recipe], Recipe]) -> "Job":
        """The same with each recipe changed."""
        changed = [change(recipe) for recipe in self.recipes]
        longest = min(self.longest, changed[0].data.max_length + changed[0].adapter.virtual_tokens)
        return replace(self, recipes=changed, longest=longest)


@dataclass(frozen=True)
class Change:
    """A line of a recipe that lowers what a run takes.

    key, value   as the recipe has it
    says         what it costs, for people
    saved_bytes  beside what the changes before it bring; total_bytes is what a run needs at least then
    """

    key: str
    value: Any
    says: str
    saved_bytes: int
    total_bytes: int
    fits: bool

    def as_json(self) -> dict[str, Any]:
        """Plain values under names that stay."""
        return asdict(self)


@dataclass(frozen=True)
class _Step:
    """A change that may be made."""

    key: str
    value: Any
    says: str

    def on(self, job: Job) -> Job | None:
        """The job with it; None where it does not go with the rest."""
        try:
            found = self._made(job)
            _ = found.setup
            return found
        except (ValueError, AdapterError):  # a packed head without packed layers; targets that another base lacks
            return None

    def _made(self, job: Job) -> Job:
        if self.key != "model.model_name_or_path":
            return job.with_recipes(lambda recipe: changed(recipe, {self.key: self.value}))
        model = ModelConfig(model_name_or_path=self.value, dtype=job.recipes[0].model.dtype)
        other = replace(job, structure=structure_named(model))
        return other.with_recipes(lambda recipe: recipe.model_copy(update={"model": model}))


def changed(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with other values of dotted keys, which are not checked again."""
    for key, value in values.items():
        section, _, name = key.partition(".")
        options = getattr(recipe, section)
        if key == "adapter.method":
            found: Any = LoraConfig() if value == "lora" else FullConfig()
        elif section == "quantization":  # whose options lean on each other
            given = {each: getattr(options, each) for each in options.model_fields_set}
            found = QuantizationConfig.model_validate({**given, name: value})
        else:
            found = options.model_copy(update={name: value})
        recipe = recipe.model_copy(update={section: found})
    return recipe


def changes_that_fit(job: Job, percentiles: Mapping[int, int] | None = None) -> list[Change]:
    """What to change so that a job fits which does not, the least harmful first; the last of them makes it fit, unless
    nothing does. What brings little and is not needed is left out.

    percentiles  of the sequences' lengths, where they are known
    """
    taken: list[_Step] = []
    at = job
    for step in _steps(job, percentiles or {}):
        tried = step.on(at)
        if tried is None:
            continue
        if (
            at.least.needed_bytes - tried.least.needed_bytes < IDLE_SHARE * job.least.needed_bytes
            and not tried.fit.fits
        ):
            continue
        taken = [each for each in taken if each.key != step.key] + [step]
        at = tried
        if at.fit.fits:
            break
    return _told(job, _needed(job, taken) if at.fit.fits else taken)


def _needed(job: Job, taken: list[_Step]) -> list[_Step]:
    """Without those that it fits without, the most harmful of them left out first."""
    kept = list(taken)
    for step in reversed(taken):
        rest = [each for each in kept if each is not step]
        after = _after(job, rest)
        if rest and after is not None and after.fit.fits:
            kept = rest
    return kept


def _after(job: Job, steps: Sequence[_Step]) -> Job | None:
    found: Job | None = job
    for step in steps:
        found = step.on(found) if found is not None else None
    return found


def _told(job: Job, steps: Sequence[_Step]) -> list[Change]:
    found = []
    for step in steps:
        after = step.on(job)
        assert after is not None
        before, total = job.least.needed_bytes, after.least.needed_bytes
        found.append(Change(step.key, step.value, step.says, before - total, total, after.fit.fits))
        job = after
    return found


def _steps(job: Job, percentiles: Mapping[int, int]) -> Iterator[_Step]:
    """All that could be changed, the least harmful first."""
    yield from _harmless(job)
    yield from _of_precision(job)
    yield from _of_learning(job, percentiles)
    yield from (
        _Step("model.model_name_or_path", name, "a smaller base, which knows less") for name in _smaller_bases(job)
    )


def _harmless(job: Job) -> Iterator[_Step]:
    """The result stays as it is, or nearly."""
    training = job.recipes[0].training
    if training.tokens_per_pass is not None:
        says = "smaller passes, as memory has room for them; the result is the same"
        yield _Step("training.tokens_per_pass", None, says)
    if training.activation_checkpointing not in ("auto", "full"):
        says = "layers keep their input alone and run again: more time, the same result"
        yield _Step("training.activation_checkpointing", "auto", says)
    if any(recipe.training.optim == "adamw" for recipe in job.recipes):
        yield _Step("training.optim", "adamw_8bit", "the optimizer's states in 8 bits")


def _of_precision(job: Job) -> Iterator[_Step]:
    """The base in fewer bits."""
    recipe = job.recipes[0]
    full = any(isinstance(each.adapter, FullConfig) for each in job.recipes)
    if full:
        yield _Step("adapter.method", "lora", "an adapter in the place of full fine-tuning")
    if job.setup.dtype == "float32":
        yield _Step("model.dtype", "bfloat16", "the base in 16 bits, as it was most likely released")
    if not recipe.quantization.load_in_4bit and not recipe.quantization.load_in_8bit:
        yield _Step("quantization.load_in_4bit", True, "QLoRA: the base in 4 bits; slower, and a little less exact")
    if recipe.quantization.head == "16bit" and not recipe.quantization.load_in_8bit:
        yield _Step("quantization.head", "int8", "the output head in 8 bits too")
        yield _Step("quantization.head", "nf4", "the output head in 4 bits too")


def _of_learning(job: Job, percentiles: Mapping[int, int]) -> Iterator[_Step]:
    """Less is learned."""
    adapter, least = job.recipes[0].adapter, SMALLEST_PASS
    shares = {length: percent for percent, length in sorted(percentiles.items())}
    lengths = [*sorted(shares, reverse=True), *(least << n for n in range(6, -1, -1))]
    for length in dict.fromkeys(each for each in lengths if least <= each < job.longest):
        whole = f"; {shares[length]} % of the sequences stay whole" if length in shares else ""
        yield _Step("data.max_length", length, f"longer sequences are cut or left out (data.too_long){whole}")
    if not isinstance(adapter, LoraConfig | FullConfig):
        return
    r = adapter.r if isinstance(adapter, LoraConfig) else LoraConfig().r
    for rank in (each for each in RANKS if each < r):
        yield _Step("adapter.r", rank, "a smaller rank, which holds less of what is to be learned")
    names = {module.path.rpartition(".")[2] for module in job.structure.modules}
    if set(QUERY_VALUE) <= names:
        yield _Step("adapter.target_modules", list(QUERY_VALUE), "queries and values alone: fewer places to learn in")


def _smaller_bases(job: Job) -> Iterator[str]:
    """Shipped shapes below this base's size, those of its family first, the largest first."""
    known = [(name, structure_named(ModelConfig(model_name_or_path=name))) for name in shape_names()]
    smaller = [(name, each) for name, each in known if each.parameters < 0.9 * job.structure.parameters]
    for name, _ in sorted(smaller, key=lambda own: (own[1].family != job.structure.family, -own[1].parameters)):
        yield name
