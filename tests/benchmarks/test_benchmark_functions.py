"""The benchmarks' own arithmetic: a wrong floor or a wrong comparison would be believed."""

import math
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMOLLM2 = {
    "linear": [[576, 576, 60], [576, 192, 60], [576, 1536, 60], [1536, 576, 30]], "head": [576, 49152],
    "attention": [30, 576],
}  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """benchmark(name) -> the module; benchmarks/ is no package, its scripts import one another by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return import_module(name)

    return load


def test_floor_of_smollm2_is_the_reference_tables(benchmark):
    """4 N = 0.54 GF a token with the head on every token, 6 P of 4.88 M, 6 L d_attn S = 0.21 at 2,048 tokens."""
    floor = benchmark("floor")
    parts = floor.floor_flops(floor.Shape.of(SMOLLM2), [(2048, 2048)], r=16)
    per_token = {name: value / 2048 for name, value in parts.items()}
    assert per_token["layers"] + per_token["head"] == 4 * 134_479_872
    assert per_token["adapter"] == 6 * 4_884_480
    assert per_token["attention"] == pytest.approx(0.2123e9, rel=1e-3)


def test_floor_counts_the_head_on_learned_tokens_and_attention_inside_sequences(benchmark):
    floor = benchmark("floor")
    shape = floor.Shape.of(SMOLLM2)
    apart, together = floor.floor_flops(shape, [(100, 10), (300, 30)], 16), floor.floor_flops(shape, [(400, 40)], 16)
    assert apart["attention"] == 6 * 30 * 576 * (100**2 + 300**2)
    assert apart["head"] == together["head"] == 4 * 576 * 49152 * 40
    assert apart["layers"] == together["layers"]


def test_floor_in_tokens_per_second(benchmark):
    floor = benchmark("floor")
    measured = [
        {"shape": SMOLLM2, "flops_per_second": speed, "peak": {"shape": [1, 2, 3], "flops_per_second": 2 * speed}}
        for speed in (1e11, 3e11, 2e11)
    ]
    report = floor.floor_report(measured, [(100, 10), (300, 30)], 16)
    flops = sum(floor.floor_flops(floor.Shape.of(SMOLLM2), [(100, 10), (300, 30)], 16).values())
    assert report["tokens_per_second"] == pytest.approx(2e11 * 400 / flops)
    assert report["tokens_per_second_at_peak"] == pytest.approx(6e11 * 400 / flops)
    assert report["attended_length"] == (100**2 + 300**2) / 400


def test_floor_reads_a_models_shape(benchmark, made_llama):
    floor = benchmark("floor")
    shape = floor.shape_of(str(made_llama))
    weights = sum(inputs * outputs * count for inputs, outputs, count in shape.linear)
    assert shape.attention == (5, 32)
    assert weights == 5 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)


def test_speed_is_weighted_by_what_a_step_has_of_each_shape(benchmark):
    floor = benchmark("floor")
    spent = {(2048, 4, 8): 1.0, (2048, 8, 4): 2.0, (2048, 4, 16): 10.0, (2048, 16, 4): 20.0}
    assert floor.weighted_seconds(spent, [(4, 8, 3.0), (4, 16, 0.5)]) == 3 * 3.0 + 0.5 * 30.0


@pytest.mark.parametrize("batch", [2, 4, 10])
def test_filled_steps_hold_no_more_than_the_budget_and_no_row_twice(benchmark, batch):
    filled = benchmark("peers.prepare").filled
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(80, 330, (400,), generator=generator).tolist()
    budget = 205 * batch
    chosen = filled(lengths, batch, 20, budget)
    totals = [sum(lengths[row] for row in chosen[at : at + batch]) for at in range(0, len(chosen), batch)]
    assert len(set(chosen)) == len(chosen) == 20 * batch
    assert all(0.97 * budget <= total <= budget for total in totals)


def test_filled_steps_refuse_what_does_not_fit(benchmark):
    with pytest.raises(SystemExit, match="fewer sequences"):
        benchmark("peers.prepare").filled([100] * 50, 4, 2, 399)


def test_gradients_compare_by_tensor_and_as_a_whole(benchmark):
    compared = benchmark("gradients").compared
    truth = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[0.0, 2.0]])}
    found = {"a": torch.tensor([6.0, 8.0]), "b": torch.tensor([[2.0, 0.0]])}
    result = compared(found, truth)
    assert result["cosines"] == {"a": pytest.approx(1.0), "b": pytest.approx(0.0)}
    assert result["norm"] == pytest.approx(math.sqrt(104))
    assert result["distance"] == pytest.approx(math.sqrt(25 + 8))
    with pytest.raises(SystemExit, match="same tensors"):
        compared({"a": found["a"]}, truth)


def test_loss_curves_smooth_and_compare_seed_by_seed(benchmark):
    curves = benchmark("loss_curves")
    assert curves.smoothed([1.0, 2.0, 3.0, 4.0], window=2) == [1.5, 2.5, 3.5]
    ours, theirs = [[2.0] * 30, [1.0] * 30], [[1.9] * 30, [1.2] * 30]
    found = curves.difference(ours, theirs)
    assert found["largest"] == pytest.approx(0.2)
    assert found["mean"] == pytest.approx(0.15)
    assert found["last"] == found["bias"] == pytest.approx(-0.05)
    assert found["last_error"] == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("names", "shapes", "group"),
    [
        (["aten::mm", "_Project"], [[2048, 576], [576, 1536], [2048, 1536]], "base products"),
        (["aten::addmm_", "_Project"], [[2048, 1536], [2048, 16], [16, 1536]], "adapter products"),
        (["aten::mm", "_ProjectBackward"], [[48, 2048], [2048, 576]], "adapter products"),
        (["aten::mm", "_InForward"], [[64, 576], [576, 49152]], "head and loss"),
        (["aten::bmm", "_SelfAttentionBackward"], [[9, 128, 64], [9, 64, 128]], "attention backward"),
        (["_SelfAttention"], [[2048, 960]], "attention forward"),
        (["_ProjectBackward"], [[2048, 576]], "native kernels (C)"),
        (["aten::copy_", "aten::clone", "aten::mm", "_ProjectBackward"], [[2048, 576]], "copies, casts, memory"),
        (["aten::copy_", "Optimizer.step#AdamW.step"], [], "optimizer and clipping"),
        (["topwork::dequantize_4bit", "_Project"], [[10]], "unpacking 4-bit weights"),
        (["aten::mul"], [[2048, 576]], "element-wise in torch"),
        (["autograd::engine::evaluate_function: _ProjectBackward"], [], "Python and the rest"),
    ],
)
def test_a_profiled_event_goes_to_its_group(benchmark, names, shapes, group):
    profile_step = benchmark("profile_step")
    assert profile_step.group_of(names, shapes) == group
    assert group in profile_step.GROUPS


def test_every_rule_names_a_group_of_the_table(benchmark):
    profile_step = benchmark("profile_step")
    assert {rule.group for rule in profile_step.RULES} <= set(profile_step.GROUPS)


def test_the_record_tells_what_of_the_floor_was_reached(benchmark):
    compare_text = benchmark("compare_text")
    floor = {
        "tokens": 30, "flops_per_token": 4e8, "parts_per_token": {"layers": 4e8}, "attended_length": 200.0,
        "flops_per_second": 4e11, "flops_per_second_by_round": [4e11],
        "peak": {"shape": [2048, 576, 192], "flops_per_second": 5e11},
        "tokens_per_second": 1000.0, "tokens_per_second_at_peak": 1250.0,
    }  # fmt: skip
    row = {"tokens_per_second": 600.0, "tokens": [1, 1, 10, 20]}
    told = compare_text.floor_text(floor, {"topwork": [row]})
    assert "| topwork | 600 | 1,000 | 60% | 1,250 | 48% |" in told
    assert "not of these steps" not in told
    assert "not of these steps" in compare_text.floor_text(floor | {"tokens": 31}, {"topwork": [row]})


def test_a_neighbours_ratios_are_of_one_turn(benchmark):
    """Beside over alone, turn by turn, without the first step; and over Topwork's of the same round."""
    neighbour = benchmark("neighbour")
    rounds = [
        {"round": at, "system": name, "alone": [alone] * 3, "first": 99.0, "beside": [beside] * 3, "threads": threads,
         "tokens": 1000, "told": told}
        for at, name, alone, beside, threads, told in (
            (0, "topwork", 1.0, 2.0, [2, 1], ["busy"]), (0, "peft_loop", 4.0, 12.0, [2, 2], []),
            (1, "topwork", 2.0, 3.0, [2, 1], ["busy"]), (1, "peft_loop", 8.0, 40.0, [2, 2], []),
        )
    ]  # fmt: skip
    around = {
        "date": "d",
        "commit": "c",
        "versions": {},
        "hardware": {"cpu": "p", "cores": 2, "memory_gib": 1, "threads": 2},
    }
    told = neighbour.text(
        {"question": {"model": "m", "batch": 5, "tokens": 9}, "rounds": rounds, "surroundings": around}
    )
    assert "| topwork | 2 → 1 | 1.50 (1.00–2.00) | 2.50 (2.00–3.00) | 1.75 (1.62–1.88) | 99.00 | 1.00 |" in told
    assert "| peft_loop | 2 | 6.00 (4.00–8.00) | 26.00 (12.00–40.00) | 4.00 (3.50–4.50) | 99.00 | 9.67 |" in told
    assert "Topwork says: busy." in told
    assert "p, 2 cores" in told
