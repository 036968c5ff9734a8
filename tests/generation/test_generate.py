"""Generation over flat batches against transformers' own greedy generate, and its own promises."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from reference.families import CONTEXT, VOCABULARY, logits, randomise, tiny_base, tiny_model
from reference.measure import relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.common.errors import RequestError
from topwork.generation.engine import generate
from topwork.generation.module_runner import ModuleRunner
from topwork.generation.native_runner import NativeRunner
from topwork.generation.passes import Rows
from topwork.generation.sampling import Sampling
from topwork.models.base import Base
from topwork.ops.batch import batch_of
from topwork.ops.native import load as native
from topwork.ops.paged import BLOCK

NEW = 20
NEVER: set[int] = set()
FAMILIES = [
    "llama", "gemma2", "gemma3_text", "gpt_oss", "gpt2", "mistral", "phi3", "qwen3_moe", "opt", "deepseek_v3",
]  # fmt: skip
WILD = {"initializer_range": 0.3, "init_std": 0.3}
"""Random models of the usual deviation say one token for ever."""


def prompts(lengths: tuple[int, ...] = (9, 1, 17, 4, 9), seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def by_transformers(model: PreTrainedModel, prompt: list[int], count: int = NEW) -> list[int]:
    """Greedy, with nothing that stops it."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def greedy(base: Base, given: list[list[int]], names: list[str | None] | None = None, **values: Any) -> list[list[int]]:
    return generate(base, given, names or [None] * len(given), NEVER, Sampling(max_new_tokens=NEW), **values)


def with_adapters(family: str = "llama", **values: Any) -> Base:
    base = tiny_base(family)
    adapters = Adapters(base.module)
    for seed, name in enumerate(("one", "two")):
        adapters.add(name, AdapterConfig(r=4, lora_alpha=16, **values), seed)
        randomise(adapters, name, seed)
    return base


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_generate(family: str) -> None:
    """Windows shorter than the prompts, soft-capping, sinks, learned positions, values of another size than keys."""
    model = tiny_model(family, **WILD)
    found = greedy(tiny_base(family, **WILD), prompts())
    assert found == [by_transformers(model, prompt) for prompt in prompts()]
    assert len({token for row in found for token in row}) > 3


@pytest.mark.parametrize("values", [{}, {"modules_to_save": ["lm_head"]}], ids=["linear layers", "and a saved head"])
def test_mixed_adapters_in_one_batch_are_each_alone(values: dict[str, Any]) -> None:
    base = with_adapters(**values)
    given, names = prompts(), ["two", None, "one", "two", None]
    together = greedy(base, given, names)
    assert together == [greedy(base, [prompt], [name])[0] for prompt, name in zip(given, names)]
    assert together[1] == by_transformers(tiny_model("llama"), given[1])
    assert greedy(base, [given[0]], ["one"]) != greedy(base, [given[0]], ["two"]) != greedy(base, [given[0]])


def test_the_batch_size_changes_nothing() -> None:
    base = with_adapters()
    given, names = prompts(), ["two", None, "one", "two", None]
    together = greedy(base, given, names)
    for size in (1, 2, 3):
        assert greedy(base, given, names, batch_size=size) == together


def test_stop_ids_end_a_sequence_and_are_not_returned() -> None:
    base = tiny_base("llama")
    whole = greedy(base, prompts())
    stops = {row[at] for row, at in zip(whole, (4, 0, 7))}
    found = generate(base, prompts(), [None] * 5, stops, Sampling(max_new_tokens=NEW))
    for row, cut in zip(whole, found, strict=True):
        end = next((at for at, token in enumerate(row) if token in stops), NEW)
        assert cut == row[:end]
    assert found[1] == []
    assert len({len(row) for row in found}) > 2


def test_finished_sequences_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token is computed for what is done, and the others go on as they would alone."""
    base = tiny_base("llama")
    whole = greedy(base, prompts())
    stop = {whole[0][5]}
    widths: list[int] = []
    kind = NativeRunner if native.compiled("decode") is not None else ModuleRunner
    plain: Any = kind.run

    def counted(runner: Any, rows: Sequence[Rows]) -> torch.Tensor:
        widths.append(sum(len(each.tokens) == 1 and each.first > 0 for each in rows))
        return plain(runner, rows)

    monkeypatch.setattr(kind, "run", counted)
    finished: list[int] = []
    found = generate(base, prompts(), [None] * 5, stop, Sampling(max_new_tokens=NEW), on_finished=finished.append)
    ended = Counter(len(row) for row in found)
    assert max(widths) <= 5
    assert widths[-1] < max(widths)
    # a sequence of n tokens is fed back n times, or n - 1 where the limit and not a stop token ended it
    assert sum(widths) == sum(length - (length == NEW) for length in ended.elements())
    assert sum(finished) == 5


def test_every_token_is_told_as_it_comes() -> None:
    base = tiny_base("llama")
    told: dict[int, list[int]] = {index: [] for index in range(5)}
    found = greedy(base, prompts(), on_token=lambda index, token: told[index].append(token))
    assert [told[index] for index in range(5)] == found


def test_sampling_is_decided_by_the_seed() -> None:
    base = tiny_base("llama")

    def drawn(seed: int, temperature: float = 1.0, top_p: float = 1.0) -> list[list[int]]:
        return generate(base, prompts(), [None] * 5, NEVER, Sampling(NEW, temperature, top_p, seed))

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    cold = drawn(1, temperature=1e-4)
    assert cold == greedy(base, prompts())
    assert drawn(0, top_p=1e-6) == greedy(base, prompts())


def test_prompts_that_cannot_be_answered() -> None:
    base = tiny_base("llama")
    with pytest.raises(RequestError, match="prompt 1 has 64 tokens; the context of tiny is 64"):
        greedy(base, [[3], [3] * CONTEXT])
    with pytest.raises(RequestError, match="prompt 0 has 0 tokens"):
        greedy(base, [[]])
    assert generate(base, [], [], NEVER) == []


def test_the_context_is_never_passed() -> None:
    for family in ("llama", "gpt2"):
        base = tiny_base(family)
        room = 5
        found = generate(base, [[3] * (CONTEXT - room), [3] * 30], [None] * 2, NEVER, Sampling(max_new_tokens=NEW))
        assert [len(row) for row in found] == [room, NEW]
        assert found[0] == by_transformers(tiny_model(family), [3] * (CONTEXT - room), room)


def test_a_text_of_several_blocks() -> None:
    base = tiny_base("llama", max_position_embeddings=256)
    model = tiny_model("llama", max_position_embeddings=256)
    count = 4 * BLOCK + 3
    found = generate(base, [[3, 4]], [None], NEVER, Sampling(max_new_tokens=count))
    assert found == [by_transformers(model, [3, 4], count)]
    assert len(found[0]) == count


def with_virtual_tokens(family: str, dtype: torch.dtype = torch.float32) -> Base:
    """A prefix, a prompt and a LoRA."""
    base = tiny_base(family, dtype, **WILD)
    adapters = Adapters(base.module)
    adapters.add("prefix", AdapterConfig(method="prefix", num_virtual_tokens=3))
    adapters.add("prompt", AdapterConfig(method="prompt", num_virtual_tokens=7))
    adapters.add("lora", AdapterConfig(r=4, lora_alpha=16))
    for name in ("prefix", "prompt", "lora"):
        randomise(adapters, name)
    with torch.no_grad():
        for parameter in adapters.parameters("prefix").values():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    return base


def by_whole_passes(base: Base, prompt: list[int], name: str | None, count: int = NEW) -> list[int]:
    """Greedy, the whole text run anew for every token."""
    text = list(prompt)
    for _ in range(count):
        batch = batch_of([torch.tensor(text)], name)
        with torch.no_grad():
            text.append(int(base.logits(batch, torch.tensor([len(text) - 1])).argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi3", "gpt_oss"])
def test_virtual_tokens_stand_before_what_is_generated(family: str) -> None:
    """Mixed in one batch with a LoRA and the bare base: token by token what a whole pass over the text says."""
    base = with_virtual_tokens(family)
    names = ["prompt", "prefix", "lora", "prefix", None]
    found = greedy(base, prompts(), names)
    assert found == [by_whole_passes(base, prompt, name) for prompt, name in zip(prompts(), names)]
    text = torch.tensor(prompts()[0])
    bare = logits(base, batch_of([text]))
    for name in ("prefix", "prompt"):
        assert relative(logits(base, batch_of([text], name)), bare) > 0.01


def test_virtual_tokens_leave_less_of_the_context() -> None:
    base = with_virtual_tokens("llama")
    prompt = prompts((CONTEXT - 10,))[0]
    counts = [len(greedy(base, [prompt], [name])[0]) for name in (None, "prefix", "prompt")]
    assert counts == [10, 7, 3]
    with pytest.raises(RequestError, match="the context of tiny is 57 without virtual tokens"):
        greedy(base, prompts((57,)), ["prompt"])
