"""`topwork export` from a run, an adapter or a model to a folder, read back by the reader itself."""

import errno
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from reference.families import randomise
from reference.measure import LOGITS_APART
from run.fixtures import Said
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, write_adapter
from topwork.common import files as durable
from topwork.common.errors import AdapterError, ModelError, RequestError, RunError
from topwork.common.files import verify_folder
from topwork.export import peft as peft_folders
from topwork.export.readers import READERS
from topwork.models.load import load_base
from topwork.run import export as command
from topwork.run.export import Exported, export
from topwork.run.exporting.written import line_with

Topwork = Callable[..., Said]
QUIET = {"log": lambda _: None}
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "chosen": {"r": 2, "layers_to_transform": [1], "target_modules": r".*(q_proj|down_proj)"},
    "dora": {"r": 2, "use_dora": True},
    "pissa": {"r": 2, "init_lora_weights": "pissa"},
    "whole modules": {"r": 2, "modules_to_save": ["lm_head", "norm"]},
    "tokens": {"r": 2, "trainable_token_indices": [3, 5]},
    "embedding and head": {"r": 2, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "ia3": {"method": "ia3"},
    "prefix": {"method": "prefix", "num_virtual_tokens": 3},
    "prompt": {"method": "prompt", "num_virtual_tokens": 3},
}  # fmt: skip


def adapter(folder: Path, base: Path, name: str | None = None, **config: Any) -> Path:
    """An adapter's folder, on a base's folder; what the base is called is `name`."""
    loaded = load_base(str(base), lambda _: None)
    adapters = Adapters(loaded.module)
    adapters.add("a", AdapterConfig(**config))
    randomise(adapters, "a")
    write_adapter(folder, adapters, "a", BaseId(name or str(base), loaded.fingerprint))
    return folder


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_reads_what_was_exported_with_our_logits(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    done = export(adapter(tmp_path / "in", tiny_llama, **CONFIGS[name]), tmp_path / "out", "peft", **QUIET)
    ours, theirs = done.read_back
    assert (ours.by, ours.largest) == ("Topwork", 0.0)
    assert theirs.by.startswith("PEFT")
    assert theirs.prompts == 4
    assert theirs.largest < LOGITS_APART
    assert theirs.moved is not None
    assert theirs.moved > 100 * theirs.largest
    verify_folder(tmp_path / "out")
    assert {"tokenizer.json", "chat_template.jinja", "export.json"} <= files(tmp_path / "out").keys()


@pytest.mark.filterwarnings("ignore")
def test_pefts_own_pissa_becomes_a_plain_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    """Its folder says less than all: A and B alone, for a base without the part that they began as."""
    place = adapter(tmp_path / "in", tiny_llama, r=2)
    edited(place, init_lora_weights="pissa")
    for format in ("peft", "vllm"):
        done = export(place, tmp_path / format, format, **QUIET)
        assert [finding.action for finding in done.findings] == ["folded"]
        assert done.read_back[1].largest < 10 * LOGITS_APART  # both sides have decomposed the weights
        config = json.loads((tmp_path / format / "adapter_config.json").read_text())
        assert (config["r"], config["init_lora_weights"]) == (4, True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["vllm", "gguf-adapter", "peft"])
def test_pefts_own_folder(format: str, tiny_llama: Path, tmp_path: Path) -> None:
    """With a name, an expression, patterns, and the copy of the base's embedding that PEFT writes unasked."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, rank_pattern={"up_proj": 2}, alpha_pattern={r".*\.0\.mlp\.up_proj": 3},
        target_modules=r".*(embed_tokens|q_proj|up_proj)", exclude_modules=r".*\.1\.self_attn\..*",
    )  # fmt: skip
    theirs = peft.get_peft_model(model, config, adapter_name="support")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "saved")
    assert any("base_layer" in key for key in load_file(tmp_path / "saved" / "support" / "adapter_model.safetensors"))
    done = export(tmp_path / "saved", tmp_path / "out", format, **QUIET)
    assert done.read_back[-1].largest < 1e-5
    assert {finding.feature for finding in done.findings} == {
        "rslora", "alpha_pattern", "unequal_ranks", "some_layers", "regex_targets", "embedding_lora"
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["vllm", "sglang", "lorax", "gguf-adapter", "hf", "gguf", "ollama"])
def test_a_run_in_every_format(format: str, trained: Path, tmp_path: Path) -> None:
    told: list[str] = []
    done = export(trained, tmp_path / "out", format, log=told.append)
    verify_folder(tmp_path / "out")
    said = json.loads((tmp_path / "out" / "export.json").read_text())
    assert said == json.loads(json.dumps(done.as_json()))
    assert (said["format"], said["reader"]) == (format, READERS[format].reader)
    assert done.read_back[-1].by.startswith({"hf": "transformers", "gguf": "llama.cpp", "ollama": "llama.cpp",
                                             "gguf-adapter": "llama.cpp"}.get(format, "PEFT"))  # fmt: skip
    assert done.read_back[-1].largest < 1e-3
    assert all(str(tmp_path) not in line for line in done.use)
    assert str(tmp_path.parent) not in (tmp_path / "out" / "export.json").read_text(), "a place of this machine"
    if format == "vllm":
        assert done.figures["max_lora_rank"] == 8
        assert "--chat-template OUT/chat_template.jinja" in done.use[1]
    if format == "ollama":  # its own converter turns the rows of A, not of B (convert_llama_adapter.go)
        assert not list((tmp_path / "out").glob("*.safetensors"))
        assert "\nADAPTER ./run-adapter-f32.gguf\n" in (tmp_path / "out" / "Modelfile").read_text()
    if format == "lorax":
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 8


@pytest.mark.filterwarnings("ignore")
def test_the_same_adapter_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    place = adapter(tmp_path / "in", tiny_llama, **CONFIGS["lora"])
    for format in ("peft", "vllm", "gguf-adapter"):
        one, other = (export(place, tmp_path / n / format, format, check=1, **QUIET).folder for n in ("one", "other"))
        assert files(one) == files(other)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_a_merged_folder_in_another_type(kind: str, trained: Path, tmp_path: Path) -> None:
    done = export(trained, tmp_path / "out", "hf", kind, **QUIET)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert done.read_back[0].largest < 0.05


def test_a_model_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    done = export(tiny_llama, tmp_path / "hf", "hf", **QUIET)
    assert [each.by for each in done.read_back] == ["Topwork"]
    own, found = (load_file(folder / "model.safetensors") for folder in (tiny_llama, tmp_path / "hf"))
    assert own.keys() == found.keys()
    assert all(torch.equal(own[key], found[key]) for key in own)
    export(tiny_llama, tmp_path / "bf16", "hf", "bf16", **QUIET)
    assert {t.dtype for t in load_file(tmp_path / "bf16" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    done = export(tiny_llama, tmp_path / "gguf", "gguf", "bf16", **QUIET)
    assert [path.name for path in done.folder.glob("*.gguf")] == ["tiny-llama-bf16.gguf"]
    with pytest.raises(
        RequestError, match=r"--format peft is for adapters, and .* is a model.*one of hf, gguf, ollama"
    ):
        export(tiny_llama, tmp_path / "x", "peft", **QUIET)
    with pytest.raises(RequestError, match="is no adapter, which is what has a base"):
        export(tiny_llama, tmp_path / "x", "hf", model="other", **QUIET)


def refused(error: type[Exception], told: str, place: Path, out: Path, format: str, **how: Any) -> None:
    """Nothing is at `out` afterwards."""
    with pytest.raises(error, match=told):
        export(place, out, format, **{**QUIET, **how})
    assert not out.exists()
    assert not list(out.parent.glob(".topwork*"))


@pytest.mark.filterwarnings("ignore")
def test_what_ollama_has_no_adapter_for_is_merged(tiny_llama: Path, tmp_path: Path) -> None:
    told: list[str] = []
    place = adapter(tmp_path / "in", tiny_llama, r=2, use_dora=True)
    done = export(place, tmp_path / "out", "ollama", log=told.append)
    assert "Ollama has no place for DoRA: the adapter is merged into the model" in told
    assert [finding.action for finding in done.findings] == ["merged"]
    assert "ADAPTER" not in (tmp_path / "out" / "Modelfile").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "Modelfile", "README.md", "export.json", "in-f16.gguf", "manifest.json"
    ]  # fmt: skip


def test_what_is_refused_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    dora = adapter(tmp_path / "dora", tiny_llama, r=2, use_dora=True)
    out = tmp_path / "out"
    refused(
        AdapterError, r"as vllm for vLLM:\n  DoRA: vLLM refuses it → merge instead; .*--format hf", dora, out, "vllm"
    )
    prefix = adapter(tmp_path / "prefix", tiny_llama, method="prefix")
    refused(AdapterError, "prefix tuning.*use it where it was trained", prefix, out, "gguf")
    lora = adapter(tmp_path / "lora", tiny_llama, r=2)
    tensors = load_file(lora / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.inf
    save_file(tensors, lora / "adapter_model.safetensors")
    for format in READERS:
        refused(AdapterError, r"NaN or infinity \(in model\.layers\.0", lora, out, format)
    refused(RequestError, "there are peft, hf", lora, out, "gguff")
    refused(RequestError, "--type q3: --format gguf has f16", lora, out, "gguf", type="q3")
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(RequestError, match="holds files already"):
        export(dora, out, "peft", **QUIET)
    with pytest.raises(RequestError, match="Topwork has not written"):
        export(dora, out, "peft", overwrite=True, **QUIET)
    with pytest.raises(RequestError, match="lies in it or holds it"):
        export(dora, dora / "inside", "peft", **QUIET)
    with pytest.raises(RequestError, match="is the base's own folder, lies in it or holds it"):
        export(dora, tiny_llama / "inside", "peft", **QUIET)


def test_a_dry_run_writes_nothing(tiny_llama: Path, tmp_path: Path, topwork: Topwork) -> None:
    place = adapter(tmp_path / "in", tiny_llama, **CONFIGS["lora"])
    said = topwork("export", place, tmp_path / "out", "--format", "gguf-adapter", "--dry-run")
    assert said.code == 0
    assert "rsLoRA (alpha / sqrt(r)) (" in said.out
    assert "llama.cpp scales by alpha / r: use_rslora is not looked at → folded" in said.out
    assert "nothing was written" in said.out
    assert not (tmp_path / "out").exists()
    said = topwork("export", place, tmp_path / "out", "--format", "gguf-adapter", "--dry-run", "--json")
    assert [each["feature"] for each in json.loads(said.out)["findings"]] == [
        "rslora", "alpha_pattern", "unequal_ranks"
    ]  # fmt: skip


def test_a_base_that_is_not_at_hand(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config suffices; what is left out is said."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place, told = adapter(tmp_path / "in", tiny_llama, "nobody/nothing", **CONFIGS["lora"]), []
    with pytest.raises(ModelError, match="nobody/nothing"):
        export(place, tmp_path / "out", "vllm", **QUIET)
    shutil.copy(tiny_llama / "config.json", tmp_path / "config.json")
    done = export(place, tmp_path / "out", "vllm", model=str(tmp_path / "config.json"), log=told.append)
    assert [each.by for each in done.read_back] == ["Topwork"]
    assert any("no prompts are compared" in line for line in told)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "nobody/nothing"
    )


def test_an_adapter_in_a_folder_of_its_name(tiny_llama: Path, tmp_path: Path) -> None:
    """PEFT's save_pretrained, of an adapter that is not called `default`."""
    adapter(tmp_path / "saved" / "support", tiny_llama, r=2)
    told: list[str] = []
    export(tmp_path / "saved", tmp_path / "out", "vllm", check=0, log=told.append)
    assert any("holds the adapter 'support', in a folder of its name" in line for line in told)
    adapter(tmp_path / "saved" / "other", tiny_llama, r=2)
    with pytest.raises(RequestError, match=r"holds 2 adapters; give one of them: .*other, .*support"):
        export(tmp_path / "saved", tmp_path / "out2", "vllm", **QUIET)


@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_reads_otherwise_is_not_left(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong in writing: here the scale."""
    place, right = adapter(tmp_path / "in", tiny_llama, r=2), peft_folders.plain_config

    def wrong(*given: Any) -> dict[str, Any]:
        config = right(*given)
        return config | {"lora_alpha": 2 * config["lora_alpha"]}

    monkeypatch.setattr(peft_folders, "plain_config", wrong)
    refused(RunError, "Topwork reads something else than was to be written", place, tmp_path / "out", "vllm", check=0)
    monkeypatch.setattr("topwork.run.exporting.peft.reread", lambda *_: None)
    refused(RunError, r"PEFT .* reads something else .* on 4 prompts", place, tmp_path / "out", "vllm")


def test_a_full_disk(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = adapter(tmp_path / "in", tiny_llama, r=2)

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable, "_fsync", full)
    for format in ("peft", "vllm", "gguf-adapter"):
        refused(RunError, "the disk is full", place, tmp_path / "out", format, check=0)


def test_the_command_tells_what_was_written(trained: Path, tmp_path: Path, topwork: Topwork) -> None:
    said = topwork("export", trained, tmp_path / "out", "--format", "vllm", "--check", "0")
    assert said.code == 0, said.err
    assert f"written to {tmp_path / 'out'} for vLLM: rank 4, modules 14, max lora rank 8" in said.out
    assert "read back by Topwork: updates" in said.out
    assert f"--lora-modules NAME={tmp_path / 'out'}" in said.out
    said = topwork("export", trained, tmp_path / "out", "--format", "vllm")
    assert said.code == 2
    assert "--overwrite" in said.err
    assert topwork("export", trained, tmp_path / "out2", "--format", "vlm").code == 2
    assert "Example: topwork export" in topwork("export", "--help").out


def test_every_format_has_a_writer() -> None:
    writers: Sequence[str] = [*command.ADAPTER_WRITERS, *command.MODEL_WRITERS]
    assert set(writers) == READERS.keys()
    assert all(name in command.ADAPTER_WRITERS for name, reader in READERS.items() if reader.reads == "adapter")
    assert isinstance(Exported(Path("x"), "hf", None, "x").as_json(), dict)


def test_lines_of_use_are_what_a_shell_takes_and_name_what_is_there():
    place = Path("my runs/it's")
    assert line_with("vllm serve models/OUTER --lora-modules NAME=OUT", place) == (
        "vllm serve models/OUTER --lora-modules NAME='my runs/it'\"'\"'s'"
    )
    assert line_with('from_pretrained("OUT")', place) == 'from_pretrained("my runs/it\'s")'


def test_a_template_is_named_only_where_one_was_written(tiny_llama, tmp_path):
    bare = shutil.copytree(tiny_llama, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    for base, told in ((tiny_llama, True), (bare, False)):
        given = adapter(tmp_path / f"adapter {told}", base, r=2)
        done = export(given, tmp_path / f"out {told}", "vllm", check=0, **QUIET)
        assert (done.folder / "chat_template.jinja").exists() == told
        assert any("--chat-template" in line for line in done.use) == told
