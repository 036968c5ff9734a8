"""All layers in one call of C: what the model's own modules give, and the same bits in any company."""

import ctypes
import gc
from collections.abc import Callable, Hashable, Sequence
from itertools import count

import pytest
import torch
from torch import Tensor, nn

from reference.families import CONTEXT, VOCABULARY, added, randomise, tiny_base
from reference.measure import relative
from topwork.adapters.config import AdapterConfig
from topwork.generation.native_runner import NativeRunner, native_runner
from topwork.generation.passes import VIRTUAL, Rows
from topwork.generation.pool import KeyValuePool
from topwork.models.base import Base
from topwork.models.program import Angles
from topwork.ops.batch import batch_of
from topwork.ops.native import load as native
from topwork.ops.packed import pack_4bit, pack_int8
from topwork.ops.paged import BLOCK
from topwork.quantization.linear import QuantizedLinear

pytestmark = pytest.mark.skipif(native.compiled("decode") is None, reason="no C compiler, or TOPWORK_NO_NATIVE")

WILD = {"initializer_range": 0.3, "init_std": 0.3}
FAST = [
    "llama", "gemma2", "gemma3_text", "mistral", "phi3", "qwen2", "qwen3", "granite", "olmo2", "smollm3", "exaone4",
    "olmo3",
]  # fmt: skip
LENGTHS = (9, 1, 40, 17, 5)
CLOSE = {torch.float32: 3e-6, torch.bfloat16: 3e-2}
METHODS = {
    "lora": AdapterConfig(r=4, lora_alpha=16),
    "odd ranks": AdapterConfig(r=3, lora_alpha=16, use_rslora=True, rank_pattern={"q_proj": 7, "down_proj": 33}),
    "dora": AdapterConfig(r=4, lora_alpha=16, use_dora=True),
    "ia3": AdapterConfig(method="ia3"),
    "vera": AdapterConfig(method="vera", r=9),
    "loha": AdapterConfig(method="loha", r=3),
    "lokr": AdapterConfig(method="lokr", r=8),
    "prefix": AdapterConfig(method="prefix", num_virtual_tokens=3),
    "prompt": AdapterConfig(method="prompt", num_virtual_tokens=5),
    "saved": AdapterConfig(r=2, modules_to_save=["lm_head", "norm"]),
    "embedding": AdapterConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    "full": AdapterConfig(method="full"),
    "head": AdapterConfig(r=4, target_modules=["lm_head", "v_proj"]),
    "tokens": AdapterConfig(r=2, trainable_token_indices=[5, 7, 98]),
    "tokens of both": AdapterConfig(r=2, trainable_token_indices={"embed_tokens": [5, 7], "lm_head": [98, 7, 5]}),
}


class BlankPool(KeyValuePool):
    """Memory as it may be found: whatever is read before it was written shows."""

    def __init__(self, blocks: int = 131) -> None:
        super().__init__(blocks)

    def of(
        self, layer: Hashable, heads: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        blank = layer not in self._layers
        found = super().of(layer, heads, size, dtype, device)
        for tensor in found if blank else ():
            tensor.fill_(float("nan"))
        return found


def runner_of(base: Base) -> NativeRunner:
    found = native_runner(base, BlankPool())
    assert found is not None
    return found


def texts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def cut(base: Base, text: list[int], adapter: str | None, blocks: list[int], sizes: Sequence[int]) -> list[Rows]:
    """A sequence in chunks, the last as long as what is left."""
    whole = [VIRTUAL] * base.virtual_tokens(adapter) + text
    chunks, at = [], 0
    for size in (*sizes, len(whole)):
        chunk = whole[at : at + size]
        if chunk:
            chunks.append(Rows(chunk, at, blocks, adapter, at + len(chunk) == len(whole)))
            at += len(chunk)
    return chunks


def some_blocks() -> Callable[[int], list[int]]:
    """Blocks for so many tokens, in no order."""
    free = iter([(7 * number + 3) % 131 for number in range(131)])
    return lambda tokens: [next(free) for _ in range(-(-tokens // BLOCK))]


def by_modules(base: Base, text: list[int], adapter: str | None) -> Tensor:
    with torch.no_grad():
        return base.logits(batch_of([torch.tensor(text)], adapter), torch.tensor([len(text) - 1]))[0]


def together_and_apart(base: Base, asked: list[tuple[list[int], str | None]]) -> Tensor:
    """All in one pass, which is the same to the bit as each alone in chunks, and in chunks beside others."""
    take, runner = some_blocks(), runner_of(base)
    for _, adapter in asked:
        assert runner.can_run(adapter)
    together = runner.run([cut(base, text, name, take(CONTEXT), [])[0] for text, name in asked])
    for sizes in ([1, 3, 5, 1, 1], [16]):
        take, runner, alone = some_blocks(), runner_of(base), []
        for text, name in asked:
            chunks = cut(base, text, name, take(CONTEXT), sizes)
            alone.append([runner.run([chunk]).clone() for chunk in chunks][-1])
        assert torch.equal(torch.cat(alone), together)
    take, runner, ends = some_blocks(), runner_of(base), {}
    waiting = {at: cut(base, text, name, take(CONTEXT), [2, 7]) for at, (text, name) in enumerate(asked)}
    for turn in count():
        if not (there := [at for at in waiting if waiting[at] and (at + turn) % 3]):
            if not any(waiting.values()):
                break
            continue
        there.sort(key=lambda at: (asked[at][1] or "", -at))
        chunks = [waiting[at].pop(0) for at in there]
        found = iter(runner.run(chunks).clone())
        ends |= {at: next(found) for at, chunk in zip(there, chunks) if chunk.wanted}
    assert torch.equal(torch.stack([ends[at] for at in range(len(asked))]), together)
    return together


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAST)
def test_families_as_their_modules_run(family: str, dtype: torch.dtype) -> None:
    base = tiny_base(family, dtype, **WILD)
    found = together_and_apart(base, [(text, None) for text in texts()])
    expected = torch.stack([by_modules(base, text, None) for text in texts()])
    assert relative(found, expected) < CLOSE[dtype] * (3 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_all_methods_in_one_pass(dtype: torch.dtype) -> None:
    """In 16 bits as far from fp32 as the modules are, and no farther."""
    base, exact = tiny_base("llama", dtype, **WILD), tiny_base("llama", **WILD)
    exact.module.load_state_dict(base.module.state_dict())
    added(base, **METHODS)
    added(exact, **METHODS)
    asked = [(text, name) for name in [None, *METHODS] for text in texts((1, 21, 9))]
    found = together_and_apart(base, asked)
    modules, truth = (torch.stack([by_modules(one, text, name) for text, name in asked]) for one in (base, exact))
    bare = torch.stack([by_modules(base, text, None) for text, _ in asked])
    for name in [None, *METHODS]:
        rows = [row for row, (_, own) in enumerate(asked) if own == name]
        assert relative(found[rows], truth[rows]) < 2 * relative(modules[rows], truth[rows]) + 3e-6, name
        assert name is None or relative(found[rows], bare[rows]) > 1e-3


def test_biases_and_gains_beside_them() -> None:
    """Qwen 2 has biases in its projections: BitFit learns them, DoRA's gain leaves them alone, IA3's does not."""
    base = tiny_base("qwen2", **WILD)
    methods = {name: METHODS[name] for name in ("lora", "dora", "ia3", "full")} | {
        "bitfit": AdapterConfig(method="bitfit")
    }
    added(base, **methods)
    asked = [(text, name) for name in methods for text in texts()[2:4]]
    found = together_and_apart(base, asked)
    assert relative(found, torch.stack([by_modules(base, text, name) for text, name in asked])) < 1e-5


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_base_is_its_dequantized_twin(dtype: torch.dtype, double: bool) -> None:
    """To the bit: a panel's values are the dense weight's, and so are its sums."""
    packed, dense = tiny_base("llama", dtype, **WILD), tiny_base("llama", dtype, **WILD)
    for number, (path, module) in enumerate(list(packed.module.named_modules())):
        if type(module) is nn.Linear and "lm_head" not in path:
            eight = number % 3 == 0
            codes = pack_int8(module.weight) if eight else pack_4bit(module.weight, "nf4", 64, double)
            held = QuantizedLinear(module.in_features, module.out_features).hold(codes)
            packed.module.set_submodule(path, held)
            dense.module.get_submodule(path).weight.data.copy_(codes.dense())
    for base in (packed, dense):
        added(base, lora=METHODS["lora"], dora=METHODS["dora"])
    asked = [(text, name) for name in (None, "lora", "dora") for text in texts()]
    found, expected = together_and_apart(packed, asked), together_and_apart(dense, asked)
    same = [
        at for at, (_, name) in enumerate(asked) if name != "dora"
    ]  # its lengths are made of panels of another size
    assert torch.equal(found[same], expected[same])
    assert relative(found, expected) < CLOSE[dtype]
    assert relative(found, torch.stack([by_modules(packed, text, name) for text, name in asked])) < CLOSE[dtype]


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama", torch.bfloat16, **WILD)
    added(base, lora=METHODS["lora"], dora=METHODS["dora"])
    asked = [(text, name) for name in (None, "lora", "dora") for text in texts()]
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(together_and_apart(base, asked))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_positions_beyond_the_first_table() -> None:
    """Angles are made for more positions as they are reached."""
    base = tiny_base("llama", max_position_embeddings=4096, **WILD)
    text = torch.randint(3, VOCABULARY, (2100,), generator=torch.Generator().manual_seed(0)).tolist()
    runner = native_runner(base, BlankPool(70))
    assert runner is not None
    for at in range(0, 2100, 512):
        chunk = text[at : at + 512]
        found = runner.run([Rows(chunk, at, list(range(70)), None, at + len(chunk) == 2100)])
    assert relative(found[0], by_modules(base, text, None)) < 1e-5


def test_tables_that_could_not_be_made_are_not_taken_for_made() -> None:
    """Else C would read beyond the old ones."""
    asked: list[int] = []

    def make(positions: int) -> list[tuple[Tensor, Tensor]]:
        asked.append(positions)
        if len(asked) == 2:
            raise MemoryError
        return [(torch.zeros(positions, 4), torch.zeros(positions, 4))]

    angles = Angles(make)
    angles.upto(100)
    with pytest.raises(MemoryError):
        angles.upto(2049)
    positions, ((cos, _),) = angles.upto(2049)
    assert positions == len(cos) == 4096


def test_an_adapter_that_comes_while_others_run_has_all_of_its_parts() -> None:
    """Some in layers that are adapted already, some in layers that it is the first to adapt."""
    base = tiny_base("llama", **WILD)
    adapters = added(base, first=AdapterConfig(r=4, target_modules=["q_proj"]))
    runner, text = runner_of(base), texts()[0]
    runner.begin()
    runner.run([Rows(text, 0, [1], "first", True)])
    adapters.add("later", AdapterConfig(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"]))
    randomise(adapters, "later", seed=5)
    found = runner.run([Rows(text, 0, [2], "later", True)])
    assert relative(found[0], by_modules(base, text, "later")) < 1e-5


def test_a_pass_leaves_nothing_behind() -> None:
    base = tiny_base("llama", **WILD)
    runner = runner_of(base)

    def arrays() -> int:
        runner.run([Rows(texts()[0], 0, [1], None, True)])
        gc.collect()
        return sum(issubclass(type(each), ctypes.Array) for each in gc.get_objects())

    first = arrays()
    assert [arrays() for _ in range(3)] == [first] * 3


def test_more_rows_than_there_is_memory_for_are_refused() -> None:
    runner = runner_of(tiny_base("llama"))
    with pytest.raises(ValueError, match="a pass of 513 rows, where 512 at most"):
        runner.run([Rows([5] * 513, 0, list(range(17)), None, True)])


def test_what_is_no_list_of_steps_has_no_runner() -> None:
    for family in ("gpt2", "qwen3_moe", "gpt_oss", "deepseek_v3"):
        assert native_runner(tiny_base(family), BlankPool()) is None
    assert native_runner(tiny_base("llama", torch.float16), BlankPool()) is None


def test_a_plan_that_gives_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """By structure and by trial: what the model does beside its layers no structure tells."""
    base = tiny_base("llama", **WILD)
    forward = base.module.base_model.norm.forward
    monkeypatch.setattr(base.module.base_model.norm, "forward", lambda x: 1.1 * forward(x))
    assert native_runner(base, BlankPool()) is None


def test_weights_that_changed_are_compiled_again() -> None:
    """Between `end` and `begin` an adapter may learn; one that is frozen stays compiled."""
    base = tiny_base("llama", **WILD)
    adapters = added(base, lora=METHODS["lora"])
    runner = runner_of(base)
    text = texts()[2]

    def run() -> Tensor:
        runner.begin()
        found = runner.run(cut(base, text, "lora", [1, 2, 3], [])).clone()
        runner.end()
        return found

    before = run()
    with torch.no_grad():
        for parameter in adapters.parameters("lora").values():
            parameter.mul_(2)
    after = run()
    assert relative(after[0], by_modules(base, text, "lora")) < 1e-5
    assert relative(after, before) > 1e-3


def test_what_is_frozen_is_kept_until_it_is_forgotten() -> None:
    base = tiny_base("llama", **WILD)
    added(base, lora=METHODS["lora"], dora=METHODS["dora"])
    runner = native_runner(base, BlankPool(), frozen={"lora"})
    assert runner is not None
    for name in ("lora", "dora"):
        runner.begin()
        runner.run(cut(base, texts()[2], name, [1, 2, 3], []))
        runner.end()
    assert set(runner.compiled) == {"lora"}
    runner.forget("lora")
    assert not runner.compiled
