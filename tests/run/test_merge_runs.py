"""`topwork merge`: runs and adapters alone, what is checked before a folder stands, and what is refused by name."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.sheet import lora
from merging.streams import loaded_base
from merging.streams import trained as adapter_of
from reference.families import alone, sequences
from reference.measure import furthest
from reference.tiny_disk import printed_on_a_tiny_disk
from run import tiny
from run.fixtures import Said
from topwork.adapters.peft_format import read_adapter
from topwork.common.errors import AdapterError, RequestError, RunError
from topwork.common.memory import Free
from topwork.merging import stream
from topwork.run.merge import merge
from topwork.run.merging import plan as merge_plan
from topwork.run.train import train

Log = Callable[[str], None]


def silent(_: str) -> None:
    """Says nothing."""


def test_an_adapter_alone_is_merged_as_peft_merges_it(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    found = merge(trained / "adapter", tmp_path / "out", model=str(tiny_llama), log=silent)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    theirs = peft.PeftModel.from_pretrained(base, str(trained / "adapter")).merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = [alone(model.eval(), sequences()) for model in (ours, theirs)]
    assert furthest(*logits) <= 1e-5 * float(logits[1].abs().max())
    assert found["sequences"] == 24
    assert "texts that Topwork brings" in found["inputs"]
    assert found["largest_relative_difference"] <= 1e-5
    assert found["adapter_kl"] > 0
    assert json.loads((tmp_path / "out" / "merge.json").read_text()) == found
    assert str(tmp_path) not in json.dumps(found)
    assert str(tiny_llama) not in json.dumps(found)


def test_rows_for_an_adapter_alone(trained: Path, tickets: Path, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = trained / "adapter"
    found = merge(adapter, tmp_path / "out", model=str(tiny_llama), data=str(tickets), check=7, log=silent)
    assert found["sequences"] == 7
    assert found["inputs"] == str(tickets)


def test_a_tokenizer_beside_an_adapter_is_the_one(
    trained: Path, tiny_llama: Path, tmp_path: Path
) -> None:  # fmt: skip
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (trained / "adapter").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    tokenizer.save_pretrained(adapter)
    merge(adapter, tmp_path / "out", model=str(tiny_llama), check=0, log=silent)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_what_rounding_took_is_told(topwork: Callable[..., Said], trained: Path, tmp_path: Path) -> None:
    said = topwork("merge", trained, tmp_path / "out", "--dtype", "bfloat16", "--check", 0, "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    lost = found["rounding"]
    assert 0 < lost["share"] < lost["worst_share"] < 1
    assert "sequences" not in found
    adapter, base = (
        read_adapter(trained / "adapter"),
        load_file(_base_of(trained) / "model.safetensors"),
    )
    squares = torch.zeros(2, dtype=torch.float64)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for key, a in adapter.tensors.items():
        if key.endswith("lora_A.weight"):
            name = key.replace("lora_A.weight", "weight")
            delta = 2.0 * adapter.tensors[key.replace("lora_A", "lora_B")] @ a  # alpha / r
            exact = base[name].bfloat16().float() + delta
            squares += torch.stack([(merged[name].float() - exact).square().sum(), delta.square().sum()]).double()
    assert lost["share"] == pytest.approx(float((squares[0] / squares[1]).sqrt()), rel=1e-3)
    said = topwork("merge", trained, tmp_path / "other", "--dtype", "bfloat16", "--check", 3)
    assert "rounding to bfloat16 took" in said.out
    assert (tmp_path / "other" / "model.safetensors").is_file()


def _base_of(run: Path) -> Path:
    return Path(yaml.safe_load((run / "recipe.yaml").read_text())["model"]["model_name_or_path"])


def test_a_wrong_merge_is_refused_and_leaves_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_: Any, weight: torch.Tensor, bias: Any) -> Any:
        return weight.float(), bias

    monkeypatch.setattr(stream, "folded", lost)
    with pytest.raises(RunError, match=r"is not the one that was trained: its logits differ by .* --check 0"):
        merge(trained, tmp_path / "out", log=silent)
    with pytest.raises(RunError, match=r"nats a token.*rounding in bfloat16 explains"):
        merge(trained, tmp_path / "out", dtype="bfloat16", log=silent)
    assert list(tmp_path.iterdir()) == []
    told: list[str] = []
    merge(trained, tmp_path / "out", force=True, log=told.append)
    assert "kept all the same" in told[-1]


def test_too_little_memory_is_told_before_the_merge(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("topwork.run.loading.free_memory", lambda _: Free(1 << 20))
    with pytest.raises(RequestError, match=r"^running the model in the check .*, and 1 MB are free\..*--check 0"):
        merge(trained, tmp_path / "out", log=silent)
    merge(trained, tmp_path / "out", check=0, log=silent)


def test_what_is_asked_wrongly(topwork: Callable[..., Said], trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        said = topwork("merge", *arguments)
        assert said.code == 2, said.err
        assert not (tmp_path / "out").exists()
        return said.err

    out, adapter = tmp_path / "out", trained / "adapter"
    assert "was not quantized in training" in refused(trained, out, "--base", "16bit")
    alone = (adapter, out, "--model", tiny_llama)
    assert "does not tell how its base was held" in refused(*alone, "--base", "dequantized")
    assert "leave one of them out" in refused(trained, out, "--check", 0, "--data", "rows.jsonl")
    assert "is neither a run's folder" in refused(tiny_llama, out)
    assert "lies in it or holds it" in refused(trained, trained / "out")
    assert "is the base's own folder" in refused(adapter, tiny_llama / "out", "--model", tiny_llama)
    other = tiny.write_model(tmp_path / "other", seed_shift=0.01)
    assert "their weights differ" in refused(adapter, out, "--model", other)
    assert "their weights differ" in refused(trained, out, "--model", other)
    said = topwork("merge", adapter, out, "--model", other, "--force", "--check", 0)
    assert "loaded all the same" in said.out


def test_nan_in_an_adapters_file(trained: Path, tiny_llama: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes((trained / "adapter" / "adapter_config.json").read_bytes())
    tensors = load_file(trained / "adapter" / "adapter_model.safetensors")
    next(tensor for key, tensor in sorted(tensors.items()) if "lora_B" in key)[0, 0] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"adapter holds NaN or infinite values \(1 tensors, first .*lora_B"):
        merge(adapter, tmp_path / "out", model=str(tiny_llama), check=0, log=silent)
    assert not (tmp_path / "out").exists()


def test_learned_tokens_cannot_be_merged(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    values = yaml.safe_load(make_recipe(training={"max_steps": 1}).read_text())
    values["adapter"] = {"method": "prompt", "num_virtual_tokens": 2}
    recipe = tiny.write_recipe(tmp_path / "prompt.yaml", values)
    run = train(recipe, log=silent).folder
    with pytest.raises(AdapterError, match="prefix and prompt tuning cannot be merged"):
        merge(run, tmp_path / "out", log=silent)


def test_weights_that_reading_makes_are_merged_in_memory(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(trained, tmp_path / "streamed", log=silent)

    def not_stored(*_: Any) -> Any:
        raise merge_plan.NotStoredError("tiny holds no tensor for x, which reading computes out of others")

    monkeypatch.setattr(merge_plan, "merged_lazily", not_stored)
    told: list[str] = []
    merge(trained, tmp_path / "out", log=told.append)
    assert any("merged in memory instead" in line for line in told)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "streamed"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_killed_it_leaves_nothing_that_looks_whole(trained: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys; from topwork.run import merge as part; from topwork.models import lazy_writing as writing\n"
        "def killed(path, tensors): open(path, 'wb').write(b'half'); os.kill(os.getpid(), 9)\n"
        "writing.write_tensors = killed\n"
        "part.merge(sys.argv[1], sys.argv[2], check=0, log=lambda _: None)"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", program, trained, out], capture_output=True)
    assert done.returncode == -9, done.stderr
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 1
    merge(trained, out, check=0, log=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


FULL_DISK = """
import sys
from pathlib import Path
from topwork.common.errors import RequestError, RunError
from topwork.run import merge as part
place = Path(sys.argv[1])
for patched in (False, True):
    if patched:
        part.refuse_small_disk = lambda *_: None
    try:
        part.merge({adapter!r}, place / "out", model={base!r}, check=0, log=lambda _: None)
        print("written")
    except (RequestError, RunError) as error:
        print("told" if "free" in str(error) and "another disk" in str(error) else error)
    print(len(list(place.iterdir())))
"""


def test_a_full_disk_is_told_before_and_while_writing(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", num_hidden_layers=40, tie_word_embeddings=True)
    adapter_of(loaded_base(base), tmp_path / "adapter", lora(target_modules=["q_proj"]))
    (tmp_path / "disk").mkdir()
    program = FULL_DISK.format(adapter=str(tmp_path / "adapter"), base=str(base))
    assert printed_on_a_tiny_disk(program, tmp_path / "disk") == ["told", "0", "told", "0"]
