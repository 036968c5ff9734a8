"""What an export of a model that is large leaves out: a second copy on the disk, and silence."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from topwork.common.errors import RunError
from topwork.run import counted
from topwork.run.export import export
from topwork.run.exporting import gguf as export_gguf
from topwork.run.merge import merge
from topwork.run.merging import plan


def silent(_: str) -> None:
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_merged_gguf_needs_no_merged_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("the merged model was written as a folder")

    monkeypatch.setattr(plan, "write_lazily", refused)
    done = export(trained, tmp_path / "out", "gguf", kind, log=silent)
    (found,) = done.read_back
    assert (found.by, found.prompts) == ("llama.cpp", 4)
    assert found.moved > 0.1 > found.largest
    assert (done.figures["merge"]["method"], done.figures["merge"]["dtype"]) == ("lora", "float32")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_merge_that_left_the_adapter_out_is_seen(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(plan, "merged_lazily", lambda held, *_: held)
    with pytest.raises(RunError, match=r"nats from ours in the mean, and f\d\d explains"):
        export(trained, tmp_path / "out", "gguf", kind, log=silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_without_the_room_for_a_base_an_adapter_is_read_back_by_us_alone(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    disk = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=export_gguf.SPARE_BYTES + 1000))
    monkeypatch.setattr(export_gguf, "shutil", disk)
    done = export(trained, tmp_path / "out", "gguf-adapter", log=told.append)
    assert [each.by for each in done.read_back] == ["Topwork"]
    assert any(line.startswith("not read back by llama.cpp, but by our own reader: a GGUF file") for line in told)


@pytest.mark.filterwarnings("ignore")
def test_a_large_base_is_written_in_its_own_16_bits(
    trained: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(base)
    monkeypatch.setattr(export_gguf, "SMALL_BYTES", 1000)
    adapter = tmp_path / "adapter"
    export(trained, adapter, "peft", check=0, log=silent)
    done = export(adapter, tmp_path / "out", "gguf-adapter", model=str(base), force=True, log=silent)
    assert done.read_back[-1].details == {"base": "bf16"}
    assert done.read_back[-1].largest < 0.5 < 10 * done.read_back[-1].moved
    assert not list((tmp_path / "out").glob("base*"))
    written = export(adapter, tmp_path / "o", "ollama", "f16", model=str(base), force=True, log=silent)
    assert written.read_back[-1].details == {"base": "f16"}


@pytest.mark.filterwarnings("ignore")
def test_it_tells_how_far_it_is(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    merge(trained, tmp_path / "small", check=0, log=told.append)
    assert not any("/" in line for line in told if "tensors" in line)
    monkeypatch.setattr(counted, "WORTH_TELLING", 0)
    merge(trained, tmp_path / "merged", check=0, log=told.append)
    assert [line for line in told if line.startswith("merged tensors: ")][-1] == "merged tensors: 21/21"
    export(tmp_path / "merged", tmp_path / "gguf", "gguf", "q4_0", check=0, log=told.append)
    assert [line for line in told if line.startswith("tensors as q4_0: ")][-1] == "tensors as q4_0: 21/21"
    export(tmp_path / "merged", tmp_path / "hf", "hf", check=0, log=told.append)
    assert "tensors written: 21/21" in told
