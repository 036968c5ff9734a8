"""A row's logits are a function of its own sequence, to the bit, and what a whole pass over it gives."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reference.families import VOCABULARY, randomise, tiny_base
from reference.measure import relative
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.generation.module_runner import ModuleRunner, shares_passes
from topwork.generation.passes import VIRTUAL, Rows
from topwork.generation.pool import KeyValuePool
from topwork.models.base import Base
from topwork.ops.batch import batch_of
from topwork.ops.paged import BLOCK

WILD = {"initializer_range": 0.3, "init_std": 0.3}
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 16},
    "dora": {"r": 3, "lora_alpha": 16, "use_dora": True},
    "ia3": {"method": "ia3"},
    "lokr": {"method": "lokr", "r": 2},
    "oft": {"method": "oft", "oft_block_size": 8},
    "prefix": {"method": "prefix", "num_virtual_tokens": 5},
    "prompt": {"method": "prompt", "num_virtual_tokens": 35},
    "tokens": {"r": 2, "trainable_token_indices": [3, 5, 7]},
    "head": {"r": 2, "target_modules": ["q_proj", "lm_head"]},
    "ia3 of inputs": {"method": "ia3", "target_modules": ["q_proj", "k_proj"], "feedforward_modules": ["q_proj"]},
    "saved": {"r": 2, "modules_to_save": ["input_layernorm"]},
    "embedding": {"r": 2, "target_modules": ["embed_tokens"]},
}
ALONE = {"ia3 of inputs", "oft", "saved", "embedding"}
"""What may not share a pass, in a base of fast layers."""
PLAIN = ["lora", "dora", "ia3", "oft", "prefix", "prompt"]

Text = tuple[list[int], str | None]


def adapted(family: str, dtype: torch.dtype, names: Sequence[str]) -> Base:
    base = tiny_base(family, dtype, **WILD)
    adapters = Adapters(base.module)
    for seed, name in enumerate(names):
        adapters.add(name.replace(" ", "_"), AdapterConfig.model_validate(CONFIGS[name]), seed)
        randomise(adapters, name.replace(" ", "_"), seed)
    return base


def texts(base: Base, names: Sequence[str]) -> list[Text]:
    """One of each adapter and two of none, virtual tokens in front."""
    draw, found = random.Random(0), []
    for name in [None, *(name.replace(" ", "_") for name in names), None]:
        virtual = base.virtual_tokens(name)
        length = draw.choice([3, 12, 40]) if virtual < 30 else 12
        found.append(([VIRTUAL] * virtual + [draw.randrange(3, VOCABULARY) for _ in range(length)], name))
    return found


def logits(
    base: Base, given: Sequence[Text], seed: int, sizes: Sequence[int], share: float = 0.7
) -> list[dict[int, Tensor]]:
    """For each text logits by position, of a share of what is run. Passes have rows of some of the texts in a random
    order, as many of each as one of `sizes` says."""
    draw, runner = random.Random(seed), ModuleRunner(base, KeyValuePool(100))
    blocks, done = iter(draw.sample(range(100), 100)), [0] * len(given)
    held = [[next(blocks) for _ in range(-(-len(tokens) // BLOCK))] for tokens, _ in given]
    found: list[dict[int, Tensor]] = [{} for _ in given]
    runner.begin()
    while live := [at for at, (tokens, _) in enumerate(given) if done[at] < len(tokens)]:
        chosen = draw.sample(live, draw.randint(1, len(live)))
        chosen.sort(key=lambda at: given[at][1] or "")
        rows = []
        for at in chosen:
            tokens, adapter = given[at]
            stop = min(len(tokens), done[at] + draw.choice(sizes))
            rows.append(Rows(tokens[done[at] : stop], done[at], held[at], adapter, draw.random() < share))
            done[at] = stop
        wanted = [at for at, each in zip(chosen, rows) if each.wanted]
        for at, own in zip(wanted, runner.run(rows), strict=True):
            found[at][done[at] - 1] = own
    runner.end()
    return found


def differing(family: str, dtype: torch.dtype, names: Sequence[str], trials: int = 2) -> set[str | None]:
    """Whose logits are not the same bits in company and in pieces as alone, token by token."""
    base = adapted(family, dtype, names)
    given, found = texts(base, names), set[str | None]()
    alone = [logits(base, [text], 0, [1], 1)[0] for text in given]
    compared = 0
    for seed in range(trials):
        for (_, name), one, other in zip(given, alone, logits(base, given, seed, [1, 2, 5, 17, 40])):
            compared += len(other)
            if not all(torch.equal(one[position], own) for position, own in other.items()):
                found.add(name)
    assert compared > 2 * len(given)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "names"),
    [("llama", [*CONFIGS]), ("gemma2", ["lora", "prefix", "saved"]), ("gpt2", PLAIN), ("phi3", PLAIN)],
)
def test_company_and_cuts_change_no_bit(family: str, names: list[str], dtype: torch.dtype) -> None:
    assert differing(family, dtype, names) == set()


def test_without_kernels_neither() -> None:
    """Plain torch multiplies an adapter's few rows otherwise than its many: all have passes for themselves."""
    script = (
        "import torch; torch.set_num_threads(1)\n"
        "from generation.test_module_runner import PLAIN, adapted, differing, shares_passes\n"
        "base = adapted('llama', torch.float32, ['lora'])\n"
        "assert shares_passes(base, None) and not shares_passes(base, 'lora')\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    assert differing('llama', dtype, ['lora', 'dora', 'prompt', 'saved']) == set(), dtype\n"
        "print('the same')\n"
    )
    folder = Path(__file__).parents[1]
    paths = os.pathsep.join([str(folder), str(folder.parent / "src")])
    environment = {**os.environ, "PYTHONPATH": paths, "TOPWORK_NO_NATIVE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["the same"], done.stderr


def test_who_may_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    base = adapted("llama", torch.bfloat16, [*CONFIGS])
    assert {name for name in CONFIGS if not shares_passes(base, name.replace(" ", "_"))} == ALONE
    plain = adapted("gpt2", torch.float32, PLAIN)
    assert {name for name in PLAIN if shares_passes(plain, name)} == {"prefix", "prompt"}
    assert shares_passes(plain, None)


def test_passes_are_full_and_as_few_as_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters that may share fill passes together; one that may not has its own, also for its two texts."""
    base = adapted("llama", torch.float32, ["lora", "dora", "saved"])
    runner, seen = ModuleRunner(base, KeyValuePool(20)), []
    plain: Callable[..., Tensor] = Base.run

    def noted(own: Base, context: Any) -> Tensor:
        seen.append([(s.stop - s.start, s.adapter) for s in context.batch.segments])
        return plain(own, context)

    monkeypatch.setattr(Base, "run", noted)
    rows = [
        Rows([3] * length, 0, [number, number + 10], name, True)
        for number, (length, name) in enumerate([(5, None), (1, "dora"), (40, "lora"), (1, "saved"), (2, "saved")])
    ]
    found = runner.run(rows)
    assert found.shape == (5, VOCABULARY)
    assert seen == [[(5, None), (1, "dora"), (26, "lora")], [(32, "lora")], [(32, "saved")]]
    seen.clear()
    assert runner.run([rows[0]]).shape == (1, VOCABULARY)
    assert len(runner.run([Rows([3], 0, [0], None, False)])) == 0
    assert seen == [[(32, None)]] * 2


@pytest.mark.parametrize(("family", "names"), [("llama", [*CONFIGS]), ("gpt_oss", ["prefix", "prompt", "lora"])])
def test_logits_are_a_whole_passes(family: str, names: list[str]) -> None:
    base = adapted(family, torch.float32, names)
    given = texts(base, names)
    for (tokens, name), found in zip(given, logits(base, given, 0, [1, 9, 40])):
        text = torch.tensor([token for token in tokens if token != VIRTUAL])
        batch = batch_of([text], name)
        with torch.no_grad():
            whole = base.logits(batch, torch.arange(len(text)))
        virtual = len(tokens) - len(text)
        for position in (position for position in found if position >= virtual):
            assert relative(found[position], whole[position - virtual]) < 2e-5
