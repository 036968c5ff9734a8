"""The work of a step against arithmetic by hand, and its time against published records."""

import sys
from dataclasses import replace
from subprocess import run

import pytest

from topwork.adapters.config import AdapterConfig, FullConfig, Ia3Config, LoraConfig
from topwork.models.config import ModelConfig
from topwork.models.structure import Module
from topwork.plan.base import structure_named
from topwork.plan.devices import find_device
from topwork.plan.speeds import cpu_speed, speed_of
from topwork.plan.time import Speed, forward_seconds, run_cost, start_seconds, step_seconds
from topwork.plan.work import head_weights, last_products, linear_weights, pass_work, update_bytes
from topwork.quantization.config import QuantizationConfig
from topwork.training.memory_setup import Member, PassShape, Setup

TABLE = {
    "smollm2-135m": (0.54, 0.029, 0.21, 4.88),
    "smollm2-360m": (1.45, 0.052, 0.38, 8.68),
    "qwen2.5-0.5b": (1.98, 0.053, 0.26, 8.80),
    "qwen3-0.6b": (2.38, 0.061, 0.70, 10.1),
    "llama-3.2-1b": (4.94, 0.068, 0.40, 11.3),
    "llama-3.2-3b": (12.85, 0.146, 1.06, 24.3),
    "llama-3.1-8b": (30.02, 0.252, 1.61, 41.9),
}
"""Published counts for LoRA r16 on all linear layers and sequences of 2,048 tokens, all learned: 4 N, 6 P and
6 L d_attn S in 10^9 operations a token, P in millions."""

UNIT = Speed("unit", 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, "a test")


def setup_of(name: str, r: int = 16, adapter: AdapterConfig | None = None, nf4: bool = False) -> Setup:
    """LoRA on every linear layer but the head, or another adapter that trains as many values."""
    base = structure_named(ModelConfig(model_name_or_path=name))
    layers = [module for module in base.modules if module.kind == "linear" and module.path != base.head]
    sizes = {module.path: (r * module.rows, r * module.columns) for module in layers}
    member = Member(adapter or LoraConfig(r=r), "adamw", sizes)
    return Setup(base, "bfloat16", QuantizationConfig(load_in_4bit=nf4), (member,))


@pytest.mark.parametrize("name", TABLE)
def test_work_is_what_published_counts_say(name: str) -> None:
    setup = setup_of(name)
    work = pass_work(setup, PassShape(2048, 2048, 2048))
    products, adapter, attention, trained = TABLE[name]
    assert (work.base + work.head) / 2048e9 == pytest.approx(products, abs=0.005)
    assert work.adapter / 2048e9 == pytest.approx(adapter, abs=0.0005)
    assert work.attention / 2048e9 == pytest.approx(attention, abs=0.005)
    assert setup.members[0].values / 1e6 == pytest.approx(trained, rel=0.005)


def test_the_parts_of_a_llama_by_hand() -> None:
    setup, base = setup_of("smollm2-135m"), structure_named(ModelConfig(model_name_or_path="smollm2-135m"))
    layer = 576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536
    assert linear_weights(base) == 30 * layer
    assert head_weights(base) == 49152 * 576
    assert last_products(base) == 30 * 576 * 1536
    work = pass_work(setup, PassShape(1000, 100, 500), attended=200.0)
    assert work.base == 4 * 30 * layer * 1000
    assert work.head == 4 * 49152 * 576 * 100
    assert work.attention == 6 * 30 * 576 * 1000 * 200
    assert work.recomputed == work.unpacked_bytes == 0


def test_only_learned_tokens_meet_the_head() -> None:
    setup = setup_of("smollm2-135m")
    few, many = (pass_work(setup, PassShape(1000, learned, 500)) for learned in (1, 1000))
    assert many.head == 1000 * few.head
    assert many.base == few.base


def test_checkpointed_layers_go_forward_twice_but_for_their_last_product() -> None:
    setup = setup_of("smollm2-135m")
    layer, last, adapter = 30 * 3538944, 30 * 576 * 1536, setup.members[0].values
    whole = pass_work(setup, PassShape(1000, 500, 500), 30)
    assert whole.recomputed == pytest.approx(2 * (layer - last + adapter) * 1000 + 2 * 30 * 576 * 1000 * 500)
    assert pass_work(setup, PassShape(1000, 500, 500), 10).recomputed == pytest.approx(whole.recomputed / 3)
    plain = replace(setup, structure=replace(setup.structure, fast=False))
    assert pass_work(plain, PassShape(1000, 500, 500), 30).recomputed > whole.recomputed


def test_full_fine_tuning_is_six_operations_a_weight() -> None:
    setup = setup_of("smollm2-135m", adapter=FullConfig())
    work = pass_work(setup, PassShape(1000, 500, 500))
    assert work.base == 6 * 30 * 3538944 * 1000
    assert work.head == 6 * 49152 * 576 * 500
    assert work.adapter == 0


def test_a_head_that_is_saved_whole_has_a_gradient_of_its_own_and_is_no_lora() -> None:
    plain = setup_of("smollm2-135m")
    sizes = {**plain.members[0].sizes, "lm_head": (49152 * 576,)}
    saved = replace(plain, members=(Member(LoraConfig(modules_to_save=["lm_head"]), "adamw", sizes),))
    shape = PassShape(1000, 500, 500)
    assert pass_work(saved, shape).head == 1.5 * pass_work(plain, shape).head
    assert pass_work(saved, shape).adapter == pass_work(plain, shape).adapter


def test_vectors_cost_no_product() -> None:
    assert pass_work(setup_of("smollm2-135m", adapter=Ia3Config()), PassShape(1000, 500, 500)).adapter == 0


def test_members_share_a_passes_tokens() -> None:
    one = setup_of("smollm2-135m", r=8)
    two = replace(one, members=one.members + setup_of("smollm2-135m", r=24).members)
    shape = PassShape(1000, 500, 500)
    assert pass_work(two, shape).adapter == pytest.approx(2 * pass_work(one, shape).adapter)
    assert update_bytes(two) == pytest.approx(4 * update_bytes(one))


def test_packed_weights_are_made_dense_forward_and_backward() -> None:
    four, eight = setup_of("smollm2-135m", nf4=True), QuantizationConfig(load_in_8bit=True)
    shape, weights = PassShape(1000, 500, 500), 30 * 3538944
    assert pass_work(four, shape).unpacked_bytes == 2 * 2.5 * weights
    assert pass_work(replace(four, quantization=eight), shape).unpacked_bytes == 2 * 3 * weights
    assert pass_work(four, shape, backward=False).unpacked_bytes == 2.5 * weights
    assert pass_work(four, shape, 30).unpacked_bytes == pytest.approx(2.5 * (3 * weights - 30 * 576 * 1536))


def test_experts_count_as_many_as_a_token_visits() -> None:
    base = structure_named(ModelConfig(model_name_or_path="smollm2-135m"))
    experts = Module("model.layers.0.mlp.experts", "other", parameters=8000)
    moe = replace(base, modules=(*base.modules, experts), config={"num_experts": 8, "num_experts_per_tok": 2})
    assert linear_weights(moe) == linear_weights(base) + 2000


def test_going_forward_is_half_of_the_frozen_work_or_a_third_of_attention() -> None:
    setup, shape = setup_of("smollm2-135m"), PassShape(1000, 500, 500)
    there, back = pass_work(setup, shape, backward=False), pass_work(setup, shape)
    assert (back.base, back.head) == (2 * there.base, 2 * there.head)
    assert back.adapter == 3 * there.adapter  # forward, the input's gradient and its own: a product each
    assert back.attention == 3 * there.attention


def test_a_step_is_its_passes_and_one_update() -> None:
    setup, shape = setup_of("smollm2-135m"), PassShape(1000, 500, 500)
    speed = replace(UNIT, layer_seconds=1e9, pass_seconds=1e10, step_seconds=1e11)
    work = pass_work(setup, shape)
    one = work.flops + work.walked_bytes + 30 * 1e9 + 1e10
    update = 44 * setup.members[0].values + 1e11
    assert step_seconds(setup, shape, 0, speed) == pytest.approx(one + update)
    assert step_seconds(setup, shape, 0, speed, passes=3) == pytest.approx(3 * one + update)
    assert step_seconds(setup, shape, 0, replace(speed, scale=2.0)) == pytest.approx(2 * (one + update))


def test_a_cards_host_runs_beside_it() -> None:
    setup, shape = setup_of("smollm2-135m"), PassShape(1000, 500, 500)
    work = pass_work(setup, shape)
    busy, update = work.flops + work.walked_bytes, 44 * setup.members[0].values
    slow_host = replace(UNIT, beside=True, layer_seconds=busy)
    assert step_seconds(setup, shape, 0, slow_host) == pytest.approx(30 * busy + update)
    assert step_seconds(setup, shape, 0, replace(slow_host, layer_seconds=0.01)) == pytest.approx(busy + update)


def test_products_in_fp32_are_slower() -> None:
    setup, shape = setup_of("smollm2-135m"), PassShape(1000, 500, 500)
    single = replace(setup, dtype="float32")
    assert step_seconds(single, shape, 0, cpu_speed(2)) > 1.5 * step_seconds(setup, shape, 0, cpu_speed(2))


RECORDS = [
    ("H100", "llama-3-8b", 16, False, 8192, 4096, 12_473, 0.05),
    ("RTX 4090", "llama-3.1-8b", 8, False, 4096, 2048, 3_083, 0.05),
    ("RTX 4090", "llama-3.1-8b", 8, True, 4096, 2048, 2_413, 0.25),
    ("A100 40GB", "llama-2-7b", 8, False, 4096, 1024, 4_007, 0.35),
]
"""Card, base, rank, whether in 4 bits, tokens of a pass and of a sequence, published tokens a second, and how near: the
first two are what the cards' shares were taken from; an A100's lies between records that are two times apart."""


@pytest.mark.parametrize(("card", "name", "r", "nf4", "tokens", "length", "published", "near"), RECORDS)
def test_cards_come_near_to_published_speeds(
    card: str, name: str, r: int, nf4: bool, tokens: int, length: int, published: float, near: float
) -> None:
    setup = replace(setup_of(name, r, nf4=nf4), device="cuda")
    seconds = step_seconds(setup, PassShape(tokens, tokens, length), 0, speed_of(find_device(card)))
    assert tokens / seconds == pytest.approx(published, rel=near)


def test_the_cpu_default_is_what_the_records_machine_took() -> None:
    """benchmarks/results/profile_step.md and llama_1b.md, two cores."""
    step = step_seconds(setup_of("smollm2-135m"), PassShape(1958, 1054, 300), 0, cpu_speed(2), attended=205)
    assert step == pytest.approx(1.868, rel=0.1)
    large = step_seconds(setup_of("llama-3.2-1b"), PassShape(2048, 1050, 300), 0, cpu_speed(2), attended=216)
    assert 2048 / large == pytest.approx(160, rel=0.1)
    assert "--calibrate" in cpu_speed(2).source


def test_a_cpu_default_asks_how_many_threads_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topwork.common.processors.physical_cores", lambda *_: 4)
    monkeypatch.setattr("topwork.common.processors.cgroup_cores", lambda _: None)
    for asked, counted in (("3", 3), ("8", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert cpu_speed() == cpu_speed(counted)
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert cpu_speed().products > 0


def test_a_runs_cost_is_its_parts() -> None:
    cost = run_cost(2.0, 100, validation=10.0, validations=4, start=60.0, price_per_hour=3.6)
    assert cost.seconds == 60 + 200 + 40
    assert cost.hours == pytest.approx(300 / 3600)
    assert cost.money == pytest.approx(0.3)
    assert run_cost(2.0, 100).money is None


def test_validation_and_start_take_time_too() -> None:
    setup, shape = setup_of("smollm2-135m"), PassShape(1000, 500, 500)
    forward, step = forward_seconds(setup, shape, cpu_speed(2)), step_seconds(setup, shape, 0, cpu_speed(2))
    assert 0.25 * step < forward < 0.5 * step
    assert forward_seconds(setup, shape, cpu_speed(2), passes=4) == pytest.approx(4 * forward)
    assert start_seconds(setup, 2e9) - start_seconds(setup, 1e9) == pytest.approx(2.0)


def test_neither_torch_nor_transformers_is_imported() -> None:
    told = (
        "import sys; import topwork.plan.time, topwork.plan.speeds, topwork.plan.devices, topwork.plan.calibrations; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets')))"
    )
    assert run([sys.executable, "-c", told]).returncode == 0
