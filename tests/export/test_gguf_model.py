"""A whole model as a GGUF file: templates and ends, other readers, and how the file comes to be."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from export.gguf_models import TEMPLATE, as_lazy, byte_level, prompts, tiny, with_byte_fallback, written
from reference.tiny_disk import printed_on_a_tiny_disk
from topwork.common.errors import ModelError, RequestError, RunError
from topwork.data.chat.rendering import Renderer
from topwork.data.chat.template import ChatTemplate
from topwork.data.conversations import Message
from topwork.export.gguf import package, readback
from topwork.export.gguf.llama_cpp import LlamaCpp
from topwork.export.gguf.model import write_gguf_model
from topwork.export.gguf.readback import Answer, answers_of, read_back
from topwork.models.config import ModelConfig
from topwork.models.gguf import convert_gguf
from topwork.models.lazy import LazyModel, LazyTensor, open_lazily
from topwork.models.load import as_base, load_base
from topwork.models.source import find_source

FULL = {"use_sliding_window": False, "layer_types": None}
CONVERSATIONS = [
    [("user", "hello")],
    [("system", "be brief"), ("user", "12 + 3?"), ("assistant", "15"), ("user", "é 😀 {{ x }}")],
    [("user", " a\n\n b "), ("assistant", ""), ("user", "<b>&</b>")],
]


def _key(path: Path, key: str) -> Any:
    found = gguf.GGUFReader(path).get_field(key)
    return None if found is None else found.contents()


def test_conversations_are_rendered_as_ours(tmp_path):
    reader = LlamaCpp(written(tmp_path, tiny("llama")).path, 64)
    renderer = Renderer(byte_level(), TEMPLATE)
    for conversation in CONVERSATIONS:
        ours = renderer.render([Message(*each) for each in conversation], None, True)
        assert reader.rendered([{"role": role, "content": content} for role, content in conversation]) == ours


FIN = TEMPLATE.replace("<|im_end|>", "<|fin|>")
"""A turn that ends in a token which llama.cpp does not know by its spelling."""


def _ending_at_once() -> Any:
    """A model whose every answer is token 3 (`<|fin|>`), and its tokenizer, whose EOS is another."""
    model = tiny("llama", mlp_bias=True, initializer_range=0.02)
    direction = torch.randn(64)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.bias.copy_(100 * direction)
        model.lm_head.weight[3] = direction
    return model, byte_level(("<|endoftext|>", "<|im_start|>", "<|pad|>", "<|fin|>", "<|eos|>"))


def test_generation_stops_at_the_templates_end_of_turn(tmp_path):
    model, tokenizer = _ending_at_once()
    lazy, prompt = as_lazy(model), prompts((5,))[0].tolist()
    write_gguf_model(lazy, tokenizer, FIN, tmp_path / "with.gguf", "f32", lambda _: None)
    assert LlamaCpp(tmp_path / "with.gguf", 64).greedy(prompt, 8) == [3]
    assert _key(tmp_path / "with.gguf", "tokenizer.ggml.eos_token_id") == 4
    assert _key(tmp_path / "with.gguf", "tokenizer.ggml.eot_token_id") == 3
    assert _key(tmp_path / "with.gguf", "tokenizer.chat_template") == FIN
    write_gguf_model(lazy, tokenizer, TEMPLATE, tmp_path / "without.gguf", "f32", lambda _: None)
    assert LlamaCpp(tmp_path / "without.gguf", 64).greedy(prompt, 8) == [3] * 8


def test_what_generation_config_stops_at_ends_an_answer_and_what_finds_no_place_is_told(tmp_path):
    model, tokenizer = _ending_at_once()
    told: list[str] = []
    lazy = replace(as_lazy(model), generation={"eos_token_id": [4, 1, 0, 2]})
    write_gguf_model(lazy, tokenizer, FIN, tmp_path / "x.gguf", "f32", told.append)
    ids = [_key(tmp_path / "x.gguf", f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    assert ids == [4, 3, 1]
    assert "0, 2 are left out" in told[0]
    types = _key(tmp_path / "x.gguf", "tokenizer.ggml.token_type")
    assert all(types[number] == 3 for number in ids)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    tokenizer = byte_level()
    tokenizer.eos_token, tokenizer.chat_template = None, None
    with pytest.raises(ModelError, match="never stop"):
        write_gguf_model(as_lazy(tiny("llama")), tokenizer, None, tmp_path / "x.gguf", "f32", lambda _: None)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", {}), ("mistral", {"sliding_window": None}), ("qwen2", FULL), ("qwen3", {**FULL, "head_dim": 128}),
        ("gemma2", {}), ("gemma3_text", {}), ("phi3", {"sliding_window": None}),
    ],
)  # fmt: skip
def test_transformers_reads_the_same_weights_from_the_file(tmp_path, family, values):
    model = tiny(family, **values)
    with torch.no_grad():
        model.to(torch.bfloat16)
    written(tmp_path, model, "bf16")
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="bf16.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    expected, found = model.float().state_dict(), theirs.state_dict()
    assert set(found) == set(expected)
    for key, weight in expected.items():
        # gemma's norms were written plus one, in fp32
        assert torch.equal(found[key], weight) or (found[key] - weight).abs().max() < 2e-7, key


def test_our_own_reader_makes_a_folder_of_the_same_weights_and_tokens(tmp_path):
    model = tiny("llama", tie_word_embeddings=True).to(torch.bfloat16)
    folder = convert_gguf(written(tmp_path, model, "bf16").path, tmp_path / "cache", lambda _: None)
    again: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert all(torch.equal(again.state_dict()[key], weight) for key, weight in model.state_dict().items())
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    assert tokenizer["model"]["vocab"].items() >= byte_level().get_vocab().items() - {("[PAD]", 0)}


class _Watched:
    """Weights that are made when they are fetched, and must be gone before the next is."""

    def __init__(self, model: LazyModel) -> None:
        self.alive: list[weakref.ref[torch.Tensor]] = []
        self.fetched = 0
        tensors = {
            key: LazyTensor(lazy.shape, lazy.dtype, lambda lazy=lazy: self.fetch(lazy))
            for key, lazy in model.tensors.items()
        }
        self.model = replace(model, tensors=tensors)

    def fetch(self, lazy: LazyTensor) -> torch.Tensor:
        assert not any(ref() is not None for ref in self.alive), "two weights are in memory at once"
        weight = lazy.fetch()
        self.alive.append(weakref.ref(weight))
        self.fetched += 1
        return weight


@pytest.mark.parametrize("type", ["f32", "bf16", "q8_0"])
def test_one_weight_at_a_time_is_in_memory(tmp_path, type):
    watched = _Watched(as_lazy(tiny("llama")))
    write_gguf_model(watched.model, byte_level(), None, tmp_path / "x.gguf", type, lambda _: None)
    assert watched.fetched == len(watched.model.tensors)


def test_a_file_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "f32.gguf").write_text("mine")
    with pytest.raises(RequestError, match="exists already"):
        written(tmp_path, tiny("llama"))
    assert (tmp_path / "f32.gguf").read_text() == "mine"


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    lazy = as_lazy(tiny("llama"))
    last = list(lazy.tensors)[-1]

    def fail() -> torch.Tensor:
        assert [path.name for path in tmp_path.iterdir()] != ["x.gguf"]
        raise KeyboardInterrupt

    lazy.tensors[last] = replace(lazy.tensors[last], fetch=fail)
    with pytest.raises(KeyboardInterrupt):
        write_gguf_model(lazy, byte_level(), None, tmp_path / "x.gguf", "f32", lambda _: None)
    assert not list(tmp_path.iterdir())


FULL_DISK = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2] / "src")!r})
from pathlib import Path
import torch
from topwork.common.errors import RunError
from topwork.common.files import whole_file
from topwork.export.gguf.model import _write
from topwork.export.gguf.tensors import Planned
from topwork.export.gguf.types import Stored
place = Path(sys.argv[1])
weight = Planned("w", "w", (512, 1024), Stored("f32"), lambda: torch.ones(512, 1024))
try:
    with whole_file(place / "x.gguf") as aside:
        _write(aside, "llama", {{"general.type": "model"}}, [weight])
except RunError as error:
    print("said" if "the disk is full" in str(error) else error)
print(len(list(place.iterdir())))
"""


def test_a_disk_that_becomes_full_is_told_and_nothing_is_left(tmp_path):
    assert printed_on_a_tiny_disk(FULL_DISK, tmp_path) == ["said", "0"]


def test_a_disk_without_the_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30 - 2**16, 2**16))
    with pytest.raises(RunError, match=r"f32\.gguf will take 0\.\d MiB, and 0\.1 MiB are free there"):
        written(tmp_path, tiny("llama"))
    assert not list(tmp_path.iterdir())


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(RequestError, match=r"pip install topwork\[gguf\]"):
        package.gguf_package()


def _base() -> Any:
    model = tiny("llama")
    return model, as_base(model, byte_level(), "tiny", lambda _: None)


def test_read_back_by_llama_cpp_says_how_far_the_file_is_from_us(tmp_path):
    model, base = _base()
    answers = answers_of(base, [ids.tolist() for ids in prompts((3, 9))], None, 4)
    file = written(tmp_path, model).path
    found = read_back(file, answers, byte_level(), ["hello 12", "é\n"])
    assert (found.reader, found.answers, found.positions, found.texts_equal) == ("llama.cpp", 2, 8, 2)
    assert found.agreed == 8
    assert found.answers_equal == 2
    assert found.largest_difference < 1e-4
    assert (found.chats, found.chats_equal) == (3, 3)
    assert "2 of 2 greedy answers as ours" in str(found)
    another = byte_level()
    another.chat_template = FIN
    assert read_back(file, [], another).chats_equal == 0
    assert found.as_dict()["positions"] == 8
    other = [Answer(each.prompt, each.tokens, each.logprobs.roll(1, -1)) for each in answers]
    assert read_back(file, other).largest_difference > 0.1


def test_where_llama_cpp_is_not_installed_the_structure_is_read_and_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(readback, "is_installed", lambda: False)
    file = written(tmp_path, tiny("llama"), "q8_0").path
    found = read_back(file, [])
    assert found.reader == "gguf"
    assert found.weights == 21
    assert "xllamacpp is not installed" in str(found)
    data = bytearray(file.read_bytes())
    data[-64:] = b"\xff" * 64
    file.write_bytes(data)
    with pytest.raises(RunError, match="NaN or infinity in"):
        read_back(file, [])


def test_a_file_that_llama_cpp_does_not_load_is_an_error(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(RunError, match="does not load"):
        LlamaCpp(tmp_path / "x.gguf")


def test_a_byte_fallback_tokenizer_with_a_template_makes_a_whole_file(tmp_path):
    tokenizer = with_byte_fallback()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    file = written(tmp_path, tiny("llama", vocab_size=416), tokenizer=tokenizer).path
    assert _key(file, "tokenizer.ggml.model") == "llama"
    assert _key(file, "llama.vocab_size") == 416
    assert LlamaCpp(file, 64).rendered([{"role": "user", "content": "the"}]).endswith("the</s>")


def test_smollm2_itself_says_in_llama_cpp_what_it_says_here(tmp_path):
    config = ModelConfig(model_name_or_path="smollm2-135m", dtype="float32", device="cpu")
    base = load_base(config, lambda _: None)
    lazy, file = open_lazily(find_source(config, lambda _: None)), tmp_path / "x.gguf"
    found = write_gguf_model(lazy, base.tokenizer, None, file, "f16", lambda _: None)
    assert (found.architecture, found.fell_back, found.notes) == ("llama", {}, ())
    prompt = ChatTemplate(base.tokenizer).prompt_ids([Message("user", "What is the capital of France?")])
    read = read_back(file, answers_of(base, [prompt], None, 5), base.tokenizer, ["What is 12 + 3?"])
    assert (read.weights, read.agreed, read.answers_equal, read.texts_equal) == (272, 5, 1, 1)
    assert read.mean_difference < 0.05  # what rounding inputs to float16 brings at its outliers is 0.003
