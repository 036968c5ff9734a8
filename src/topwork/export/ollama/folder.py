"""A folder for `ollama create`: the Modelfile beside the GGUF files that it names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from topwork.common.errors import RequestError, RunError
from topwork.common.files import write_text
from topwork.data.chat.rendering import Renderer, TemplateRejects
from topwork.data.chat.template import ChatTemplate, stop_ids
from topwork.data.conversations import Message
from topwork.export.gguf.llama_cpp import LlamaCpp, is_installed
from topwork.export.ollama.evaluator import form_text, ollama_text
from topwork.export.ollama.form import INSTEAD, TemplateForm, compare, talk, template_form
from topwork.export.ollama.go_template import go_template
from topwork.export.ollama.modelfile import Modelfile, parsed, stands_in_modelfile

MODELFILE = "Modelfile"
CONTEXT = 4096
"""num_ctx where nothing asks for more: Ollama reserves memory for all of it."""


@dataclass(frozen=True)
class Asking:
    """How a model is to be asked.

    system       the message that all rows it learned from shared, or None
    longest      the longest sequence it learned from, in tokens; 0 where that is not known
    context      the longest sequence its base takes
    fold_system  whether system messages stood in the first user turn in training (data.fold_system)
    temperature  0 is greedy, as scores are measured here
    """

    system: str | None
    longest: int
    context: int
    fold_system: bool = False
    temperature: float = 0.0

    @property
    def num_ctx(self) -> int:
        return min(self.context, max(CONTEXT, self.longest))


@dataclass(frozen=True)
class Prepared:
    """A Modelfile that lacks its files: `chats` are the conversations that its TEMPLATE was held to the chat template
    on."""

    chat: ChatTemplate
    template: str
    system: str | None
    parameters: Mapping[str, str | int | float | Sequence[str]]
    chats: Sequence[Sequence[Message]]

    def write(self, folder: Path, model: str, adapter: str | None) -> None:
        """Write `folder`/Modelfile for two files that stand in the folder, and read it again."""
        file = Modelfile(model, adapter, self.template, self.parameters, self.system)
        write_text(folder / MODELFILE, file.text())
        found = parsed((folder / MODELFILE).read_text("utf-8"))
        systems = [value for name, value in found if name == "SYSTEM"]
        if ("TEMPLATE", self.template) not in found or systems != ([] if self.system is None else [self.system]):
            raise RunError(f"{MODELFILE} reads otherwise than it was written. This is a defect of the export")

    def check_prompts(self, model: Path) -> int:
        """Hold what llama.cpp, which runs in Ollama, cuts the TEMPLATE's text into to the tokens that training had.
        Returns on how many conversations; 0 where llama.cpp is not installed. Raises RunError where they differ."""
        if not is_installed():
            return 0
        reader = LlamaCpp(model)
        for messages in self.chats:
            theirs, ours = reader.tokens(ollama_text(self.template, messages)), self.chat.prompt_ids(messages)
            if theirs != ours:
                raise RunError(
                    f"Ollama would cut a prompt into {len(theirs)} other tokens than the {len(ours)} of training "
                    f"({theirs[:8]} … where that had {ours[:8]} …). Nothing was written; this is a defect of the export"
                )
        return len(self.chats)


def prepared(
    tokenizer: Any, template: str | None, asking: Asking, log: Callable[[str], None],
    rows: Sequence[Sequence[Message]] = (),
) -> Prepared:  # fmt: skip
    """What does not need the weights: the TEMPLATE, held to the chat template on conversations of its own making and on
    `rows`, prompts that it learned from.

    template  Jinja; None for the tokenizer's own

    Raises RequestError for a chat template that the TEMPLATE cannot say, naming where they differ.
    """
    chat = ChatTemplate(tokenizer, template, asking.fold_system)
    form = template_form(chat.renderer, form_text)
    _check_system(form, asking.system)
    chats = [*_chats(form, asking.system), *([replace(m, content=m.content.strip()) for m in row] for row in rows)]
    compare(chat.renderer, form, form_text, chats)
    for told in _notes(chat.renderer, form):
        log(told)
    written, system = _with_default(form, asking.system)
    parameters: dict[str, str | int | float | Sequence[str]] = {
        "stop": [tokenizer.decode([number]) for number in sorted(stop_ids(chat))],
        "num_ctx": asking.num_ctx, "temperature": asking.temperature, "repeat_penalty": 1,
    }  # fmt: skip
    return Prepared(chat, go_template(written), system, parameters, chats)


def _chats(form: TemplateForm, system: str | None) -> list[list[Message]]:
    """With and without a system message, one turn and several, words that meet no white space at their ends."""
    texts = ["What is the order's number?", "4711", "And the product?\n\nIn one word.", "kettle", 'Thanks: "{}" ü 😀']
    found = [talk(*texts[:1]), talk(*texts[:3]), talk(*texts)]
    if form.system is not None:
        found += [talk(*texts[:1], system=system or "Answer in one word."), talk(*texts, system=system or "Be brief.")]
    return found


def _check_system(form: TemplateForm, system: str | None) -> None:
    if system is not None and form.system is None:
        raise RequestError(
            "the rows that this was trained on share a system message, and their chat template puts it where an Ollama "
            f"TEMPLATE cannot; {INSTEAD}"
        )


def _with_default(form: TemplateForm, system: str | None) -> tuple[TemplateForm, str | None]:
    """A shared system message that a Modelfile's SYSTEM cannot say goes into the TEMPLATE, which has escapes."""
    if system is None or stands_in_modelfile(system):
        return form, system
    if form.system is None or form.joined:
        return form, system
    turn = form.system.before + system + form.system.behind
    return replace(form, default=turn), None


def _notes(renderer: Renderer, form: TemplateForm) -> list[str]:
    """Where Ollama may yet write another prompt than training did."""
    notes = []
    spaced = talk("  a \n", " b ", " c ")
    try:
        if renderer.render(spaced, None, True) != form_text(form, spaced):
            notes.append("the chat template takes white space off messages, which Ollama does not; send them without")
    except TemplateRejects:
        pass
    if form.system is None:
        notes.append("the TEMPLATE takes no system message: Ollama answers one with an error")
    notes.append("the TEMPLATE has no tools: Ollama answers requests that bring some with an error")
    return notes
