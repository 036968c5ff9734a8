"""`topwork quantize --analyze` on a random tiny base."""

import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from transformers import AutoModelForCausalLM

from run import tiny
from topwork.common.errors import DataError, ModelError
from topwork.models.config import ModelConfig
from topwork.models.load import load_base
from topwork.ops.packed import pack_4bit
from topwork.quantization.config import QuantizationConfig
from topwork.run import analyze as analyze_part
from topwork.run.analyze import SCORED, Analysis, TextScores, analyze

KINDS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TEXT = "The kettle leaks and the lamp hums. Order nine is late, and the radio is broken; please help. " * 40


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("analysis") / "folder"


@pytest.fixture(scope="module")
def analysis(tiny_llama: Path, text: Path, out: Path) -> Analysis:
    return analyze(str(tiny_llama), text, windows=2, out=out, log=lambda _: None)


def test_every_format_over_every_linear_layer_but_the_head(analysis: Analysis) -> None:
    assert (analysis.layers, analysis.dtype) == (14, "bfloat16")
    for row in analysis.formats:
        assert row.by_kind.keys() == KINDS
        assert sum(errors.parameters for errors in row.by_kind.values()) == row.whole.parameters == analysis.parameters
        assert row.whole.mse == pytest.approx(
            sum(errors.mse * errors.parameters for errors in row.by_kind.values()) / analysis.parameters
        )
        assert row.whole.max_error == max(errors.max_error for errors in row.by_kind.values())


def test_the_error_is_that_of_the_bf16_weights(analysis: Analysis, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    errors = []
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight.detach().float()
        errors.append((weight - pack_4bit(weight, "nf4", 128, False).dense()).double().flatten())
    row = next(r for r in analysis.formats if (r.format.name, r.format.block_size) == ("nf4", 128))
    assert row.by_kind["down_proj"].mse == pytest.approx(float(torch.cat(errors).square().mean()), rel=1e-6)


def test_the_bases_perplexity_is_transformers(analysis: Analysis, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    base = load_base(ModelConfig(model_name_or_path=str(tiny_llama), device="cpu"), lambda _: None)
    ids = torch.tensor(base.tokenizer(TEXT, add_special_tokens=False)["input_ids"])[: 2 * 256].view(2, 256)
    losses = [float(model(input_ids=row[None], labels=row[None]).loss.detach()) for row in ids]
    assert analysis.scores is not None
    assert (analysis.scores.windows, analysis.scores.window_tokens) == (2, 256)
    assert analysis.scores.by_window["base"] == pytest.approx(losses, rel=2e-3)
    assert analysis.scores.losses["base"] == pytest.approx(mean(losses), rel=2e-3)


def test_a_formats_perplexity_is_that_of_a_base_held_so(analysis: Analysis, tiny_llama: Path, text: Path) -> None:
    wanted = QuantizationConfig(load_in_4bit=True)
    base = load_base(ModelConfig(model_name_or_path=str(tiny_llama), device="cpu"), lambda _: None, wanted)
    windows = analyze_part.read_windows(base, text, 2)
    assert analysis.scores is not None
    losses = analysis.scores.losses
    assert mean(analyze_part.window_losses(base, windows)) == pytest.approx(losses["nf4 + DQ"], rel=2e-3)
    assert list(losses) == ["base", *(form.name for form in SCORED)]
    assert len(set(losses.values())) == len(losses)


def test_a_difference_comes_with_its_paired_standard_error() -> None:
    scores = TextScores("text", 256, {"base": [1.0, 2.0, 3.0], "nf4": [1.1, 2.3, 3.2], "int4": [1.0, 2.0, 3.0]})
    above, error = scores.more("nf4")
    assert (above, error) == pytest.approx((0.2, stdev([0.1, 0.3, 0.2]) / 3**0.5))
    assert scores.more("nf4", "int4") == (above, error)
    assert scores.perplexities["base"] == pytest.approx(math.exp(2.0))


def test_the_weights_are_the_originals_again(tiny_llama: Path) -> None:
    base = load_base(ModelConfig(model_name_or_path=str(tiny_llama), device="cpu"), lambda _: None)
    layer = base.module.model.layers[1].self_attn.q_proj
    before = layer.weight.detach().clone()
    with analyze_part._through(base, SCORED[0]):
        assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, before)


def test_what_is_written(analysis: Analysis, out: Path) -> None:
    written = json.loads((out / "analysis.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(analysis.as_json()))
    first = written["formats"][0]
    assert (first["name"], first["block_size"], first["double_quant"]) == ("nf4", 32, False)
    assert first.keys() >= {"mse", "max_error", "correlation", "snr_db", "bits_per_parameter", "held_bytes", "by_kind"}
    perplexity = written["perplexity"]
    assert perplexity["perplexities"]["nf4"] == pytest.approx(math.exp(perplexity["losses"]["nf4"]))
    assert [row["name"] for row in written["footprint"]] == ["fp32", "bf16", "int8", "NF4", "NF4 + DQ"]
    assert (out / "analysis.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_table(analysis: Analysis) -> None:
    text = analysis.as_text()
    rows = [line for line in text.splitlines() if line.startswith("nf4 + DQ") and len(line.split()) == 11]
    assert [line.split()[3] for line in rows] == ["32", "64", "128", "256", "512", "1024", "2048", "4096"]
    for expected in (*KINDS, "All weights in memory", "NF4 + DQ", "Perplexity of", "2 windows of 256 tokens"):
        assert expected in text


def test_without_a_text_there_is_no_perplexity_and_it_says_so(tiny_llama: Path) -> None:
    found = analyze(str(tiny_llama), log=lambda _: None)
    assert found.scores is None
    assert found.as_json()["perplexity"] is None
    assert "--text" in found.as_text()


def test_a_conv1d_family(tmp_path: Path) -> None:
    """gpt2 holds its weights as [in, out]; what is packed is [out, in]."""
    from reference.families import tiny_model

    tiny_model("gpt2").save_pretrained(tmp_path)
    found = analyze(str(tmp_path), log=lambda _: None)
    assert found.layers == 8
    assert found.formats[0].by_kind.keys() == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize(("windows", "expected"), [(3, 2), (1, 1)])
def test_fewer_windows_than_asked_for_are_told(windows: int, expected: int, tiny_llama: Path, tmp_path: Path) -> None:
    base = load_base(ModelConfig(model_name_or_path=str(tiny_llama), device="cpu"), lambda _: None)
    whole = base.tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    short = tmp_path / "short.txt"
    short.write_text(TEXT[: whole[600][1]], encoding="utf-8")
    told: list[str] = []
    config = ModelConfig(model_name_or_path=str(tiny_llama), device="cpu")
    scores = analyze_part._score(config, short, windows, told.append)
    assert scores.windows == expected
    assert any("fewer than the 3 asked for" in line for line in told) == (windows == 3)


@pytest.mark.parametrize(
    ("content", "windows", "message"),
    [
        (None, 2, "cannot be read as UTF-8 text"),
        (b"\xff\xfe\x00", 2, "cannot be read as UTF-8 text"),
        (b"", 2, "has 0 tokens, expected 256 or more"),
        (b"a few words", 2, "tokens, expected 256 or more"),
        (TEXT.encode(), 0, "0 windows were asked for"),
    ],
)
def test_texts_that_cannot_be_scored(
    content: bytes | None, windows: int, message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        analyze(str(tiny_llama), path, windows, log=lambda _: None)


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="quantized already"):
        analyze(str(folder), log=lambda _: None)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[1].self_attn.v_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.v_proj: .*NaN"):
        analyze(str(folder), log=lambda _: None)


def test_without_matplotlib_there_is_json_and_a_word_about_it(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told: list[str] = []
    analyze_part._write(analysis, tmp_path, told.append)
    assert [path.name for path in tmp_path.iterdir()] == ["analysis.json"]
    assert "pip install matplotlib" in told[0]
