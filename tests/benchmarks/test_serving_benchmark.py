"""The serving benchmark's own arithmetic, and the files in which llama.cpp gets the same weights."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
BENCHMARKS, MODELS = (Path(__file__).parents[2] / name for name in ("benchmarks", "tests/models"))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """benchmark(name) -> the module; benchmarks/ is no package, its scripts import one another by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return import_module(name)

    return load


def row(system: str, arm: str, number: int, seconds: float, first: float, tokens: int) -> dict[str, Any]:
    return {
        "system": system, "arm": arm, "round": number, "seconds": seconds, "first_seconds": first, "tokens": tokens,
        "load_before": 0.5, "peak_mib": 100,
    }  # fmt: skip


def test_the_share_of_the_bound_is_taken_round_by_round(benchmark):
    """100 bytes a token at 1,000 bytes a second are ten tokens a second at most, and five at 500."""
    text = benchmark("serving_text")
    tokens = (41, 33, 17)  # in eight seconds after the first
    found = {
        ("topwork", "alone"): {at: row("topwork", "alone", at, 9.0, 1.0, count) for at, count in enumerate(tokens)}
    }
    reads = {at: {"bytes_per_second": speed, "best": speed} for at, speed in enumerate((1000.0, 500.0, 1000.0))}
    told = "\n".join(text._bound(found, reads, {"topwork": {"weight_bytes": 100, "runner": "R"}}))
    assert "| 4.0 (2.0–5.0) | 50% (20%–80%) |" in told


def test_a_ratio_is_to_the_faster_of_its_peers_and_of_rounds_that_all_have(benchmark):
    text = benchmark("serving_text")
    found = {
        ("topwork", "alone"): {at: row("topwork", "alone", at, 1.0, 0.1, 60) for at in (0, 1)},
        ("llama_f16", "alone"): {at: row("llama_f16", "alone", at, 2.0, 0.1, 60) for at in (0, 1)},
        ("llama_bf16", "alone"): {0: row("llama_bf16", "alone", 0, 1.5, 0.1, 60)},
    }
    [told] = text._ratios(found)
    assert "| alone ÷ llama.cpp in 16 bits, its faster | 1.50 | ≥ 0.9 |" in told
    assert "PEFT" not in told


def test_agreement_is_counted_to_the_first_difference(benchmark):
    serving = benchmark("serving_speed")
    answers = {
        ("topwork", "sixteen"): [[1, 2, 3], [4, 5, 6]],
        ("topwork", "sixteen_adapters"): [[1, 2, 3], [4, 9, 6]],
        ("peft", "sixteen_adapters"): [[1, 2, 3], [7, 9, 6]],
        ("bandwidth", "read"): [],
    }
    assert serving.agreeing(answers) == [
        {"system": "peft", "agrees": "sixteen_adapters", "leading": [3, 0]},
        {"system": "topwork", "changed": 1},
    ]


def test_read_bandwidth_adds_up_the_whole_buffer(benchmark, monkeypatch: pytest.MonkeyPatch):
    """It checks its sum; here with three threads and a buffer that they do not share evenly."""
    bandwidth = benchmark("peers.bandwidth")
    told: list[Any] = []
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 8 * 32 * 3 * 1000)
    monkeypatch.setattr(bandwidth, "threads", lambda: 3)
    monkeypatch.setattr(bandwidth, "answer", lambda arms, **_: told.append(arms["read"](0)))
    bandwidth.main()
    assert told[0]["best"] >= told[0]["bytes_per_second"] > 0


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    import gguf

    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.skipif(find_spec("gguf") is None, reason="the gguf package is not installed")
def test_llama_cpp_gets_the_same_weights_and_adapters(benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Read back as a base, the file has the model's logits; with the adapter's delta on its weights, those with it."""
    from gguf import GGMLQuantizationType as Kind
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from topwork.models.gguf import convert_gguf

    monkeypatch.syspath_prepend(str(MODELS))
    import tiny_gguf

    files, model = benchmark("peers.gguf_files"), tiny_gguf.tiny_llama()
    like = tiny_gguf.write_gguf(tmp_path / "like.gguf", tiny_gguf.tiny_llama(), tiny_gguf.byte_level_vocabulary())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)).copy_(parameter.bfloat16())
    path = files.write_model(tmp_path / "model.gguf", model, like, Kind.BF16, Kind.BF16)
    read = AutoModelForCausalLM.from_pretrained(
        convert_gguf(path, tmp_path / "cache", lambda _: None), dtype=torch.float32
    )
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)

    folder, delta = tmp_path / "adapter", {}
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 6}')
    for name in NAMES:
        weight = model.get_submodule(f"model.layers.1.{name}").weight
        a, b = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
        stem = f"base_model.model.model.layers.1.{name}"
        delta |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    save_file(delta, folder / "adapter_model.safetensors")
    adapter = tensors_of(files.write_adapter(tmp_path / "adapter.gguf", folder, model.config))
    before = tensors_of(files.write_model(tmp_path / "before.gguf", model, like, Kind.F32, Kind.F32))
    with torch.no_grad():
        for name in NAMES:
            a, b = (delta[f"base_model.model.model.layers.1.{name}.lora_{side}.weight"] for side in "AB")
            model.get_submodule(f"model.layers.1.{name}").weight.add_(6 / 2 * b @ a)
    after = tensors_of(files.write_model(tmp_path / "after.gguf", model, like, Kind.F32, Kind.F32))
    assert len(adapter) == 2 * len(NAMES)
    for name, weight in before.items():
        change = torch.zeros_like(weight)
        if f"{name}.lora_a" in adapter:
            change = adapter[f"{name}.lora_b"] @ adapter[f"{name}.lora_a"]
        torch.testing.assert_close(after[name] - weight, change, rtol=1e-4, atol=1e-5)
    sys.modules.pop("tiny_gguf", None)
