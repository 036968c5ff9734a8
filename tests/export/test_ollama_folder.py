"""The Modelfile: what Ollama's parser makes of it, the tokens that end an answer, the one that begins a text."""

from pathlib import Path
from typing import Any

import gguf
import pytest

from data.family_tokenizers import build_tokenizer
from models.tiny_gguf import byte_level_vocabulary, tiny_llama, write_gguf
from reference.families import tiny_model
from topwork.common.errors import RequestError, RunError
from topwork.data.chat.template import ChatTemplate
from topwork.data.conversations import Message
from topwork.export.gguf.llama_cpp import LlamaCpp
from topwork.export.gguf.model import write_gguf_model
from topwork.export.ollama.bos import leave_bos_to_template
from topwork.export.ollama.evaluator import ollama_text
from topwork.export.ollama.folder import Asking, Prepared, prepared
from topwork.export.ollama.modelfile import Modelfile, parsed
from topwork.models.lazy import LazyModel, LazyTensor


def written(folder: Path, asking: Asking, log: Any = lambda _: None, tokenizer: Any = None, **more: Any) -> list[Any]:
    """A Modelfile's commands as Ollama's parser gives them."""
    made = prepared(tokenizer or build_tokenizer("smollm2", None), None, asking, log, **more)
    made.write(folder, "base.gguf", "adapter.gguf")
    return parsed((folder / "Modelfile").read_text("utf-8"))


def ready(jinja: str, asking: Asking = Asking(None, 0, 512), log: Any = lambda _: None) -> Prepared:
    """For a chat template."""
    return prepared(build_tokenizer("smollm2", None), jinja, asking, log)


def test_a_modelfile_says_how_a_run_is_asked(tmp_path: Path) -> None:
    told: list[str] = []
    found = written(tmp_path, Asking("Answer in JSON.", longest=6000, context=8192), told.append)
    assert found[0] == ("FROM", "./base.gguf")
    assert found[1] == ("ADAPTER", "./adapter.gguf")
    assert found[3:] == [
        ("SYSTEM", "Answer in JSON."), ("stop", "<|im_end|>"), ("num_ctx", "6000"), ("temperature", "0"),
        ("repeat_penalty", "1"),
    ]  # fmt: skip
    chat = ChatTemplate(build_tokenizer("smollm2", None))
    asked = [Message("system", "Answer in JSON."), Message("user", "4711?")]
    assert ollama_text(dict(found)["TEMPLATE"], asked) == chat.renderer.render(asked, None, True)
    assert any("Ollama answers requests that bring some with an error" in line for line in told)


@pytest.mark.parametrize(("longest", "context", "expected"), [(0, 8192, 4096), (0, 512, 512), (9000, 8192, 8192)])
def test_the_context_is_no_more_than_is_needed(tmp_path: Path, longest: int, context: int, expected: int) -> None:
    assert ("num_ctx", str(expected)) in written(tmp_path, Asking(None, longest, context))


def test_a_system_message_that_the_parser_would_change_goes_into_the_template(tmp_path: Path) -> None:
    """A zero-width joiner (as in many emoji) does not print, and Ollama's parser drops it."""
    system = 'Say "\u200d" and """'
    found = written(tmp_path, Asking(system, 0, 512))
    assert "SYSTEM" not in dict(found)
    asked = [Message("system", system), Message("user", "a")]
    expected = ChatTemplate(build_tokenizer("smollm2", None)).renderer.render(asked, None, True)
    assert ollama_text(dict(found)["TEMPLATE"], asked[1:]) == expected


def test_rows_that_were_learned_are_compared() -> None:
    rows = [[Message("user", " a "), Message("assistant", "b"), Message("user", "c")]]
    made = prepared(build_tokenizer("smollm2", None), None, Asking(None, 0, 512), lambda _: None, rows)
    assert len(made.chats) == 6
    jinja = "{% for m in messages %}[{{ m.role }}]{{ m.content | replace('47', 'X') }}[end]{% endfor %}[assistant]"
    rows = [[Message("user", "about 47")]]
    with pytest.raises(RequestError, match=r"otherwise than the chat template does"):
        prepared(build_tokenizer("smollm2", None), jinja, Asking(None, 0, 512), lambda _: None, rows)


def test_a_shared_system_message_that_has_no_place_is_refused() -> None:
    jinja = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}[end]{% endfor %}[assistant]"
    )
    told: list[str] = []
    ready(jinja, log=told.append)
    assert any("takes no system message" in line for line in told)
    with pytest.raises(RequestError, match="puts it where an Ollama TEMPLATE cannot"):
        ready(jinja, Asking("Be brief.", 0, 512))


def test_white_space_that_a_template_takes_off_is_told() -> None:
    jinja = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]{% endfor %}[assistant]"
    told: list[str] = []
    ready(jinja, log=told.append)
    assert any("takes white space off messages" in line for line in told)


@pytest.mark.parametrize("text", ['a """ b', "a\u200db"])
def test_what_a_modelfile_cannot_say_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="three quotation marks, or characters that do not print"):
        Modelfile("a.gguf", None, "x", {"stop": [text]}).text()


def test_texts_that_end_in_quotation_marks_come_back() -> None:
    assert ("TEMPLATE", 'a "b"') in parsed(Modelfile("a.gguf", None, 'a "b"', {}).text())


def test_the_file_leaves_bos_to_the_template(tmp_path: Path) -> None:
    """llama.cpp reads `<|im_start|>` out of the text as the token; it must not put another in front."""
    model, prompt = tiny_llama(), "<|im_start|>hello"
    vocabulary = byte_level_vocabulary() | {"tokenizer.ggml.add_bos_token": True}
    path = write_gguf(tmp_path / "model.gguf", model, vocabulary)
    hello = vocabulary["tokenizer.ggml.tokens"].index("hello")
    assert LlamaCpp(path).tokens(prompt) == [1, 1, hello]
    assert leave_bos_to_template(path)
    assert not leave_bos_to_template(path)
    assert LlamaCpp(path).tokens(prompt) == [1, hello]


def test_a_file_that_does_not_say_is_refused_where_llama_cpp_would_add_bos(tmp_path: Path) -> None:
    without = {key: value for key, value in byte_level_vocabulary().items() if key != "tokenizer.ggml.add_bos_token"}
    assert not leave_bos_to_template(write_gguf(tmp_path / "a.gguf", tiny_llama(), without))
    path = write_gguf(tmp_path / "b.gguf", tiny_llama(), without | {"tokenizer.ggml.pre": "llama-bpe"})
    with pytest.raises(RequestError, match="does not say whether a text begins with the BOS token"):
        leave_bos_to_template(path)


def test_llama_cpp_cuts_prompts_as_training_did(tmp_path: Path) -> None:
    """And not, where the file puts a BOS of its own in front."""
    tokenizer = build_tokenizer("smollm2", None)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    tensors = {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.clone) for name, tensor in model.state_dict().items()
    }
    lazy = LazyModel("tiny", None, model.config.to_dict(), tensors)
    write_gguf_model(lazy, tokenizer, None, tmp_path / "base.gguf", "f16", lambda _: None)
    made = prepared(tokenizer, None, Asking("Answer in JSON.", 0, 512), lambda _: None)
    assert made.check_prompts(tmp_path / "base.gguf") == 5
    reader = gguf.GGUFReader(tmp_path / "base.gguf", "r+")
    field = reader.get_field("tokenizer.ggml.add_bos_token")
    field.parts[field.data[0]][0] = True
    reader.data.flush()
    with pytest.raises(RunError, match=r"Ollama would cut a prompt into .* other tokens"):
        made.check_prompts(tmp_path / "base.gguf")
