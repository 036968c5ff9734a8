"""How to load what a card is of: a piece of code or a command for each reader, right for this very adapter."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from topwork.reporting.card_facts import ranks
from topwork.reporting.card_source import CardSource
from topwork.reporting.markdown import code, fenced, text
from topwork.reporting.readers import section

PLACE, BASE = "OWNER/NAME", "BASE_MODEL"
"""What stands for a repository that has no name yet, and for a base that is not on the Hub."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be (vLLM 0.32)."""
DTYPES = ("bfloat16", "float16", "float32")
QUESTION = "Your question"
VIRTUAL = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")


@dataclass(frozen=True)
class Use:
    """A reader, what is to be known first, and code or a command in Markdown; empty where it reads nothing of this."""

    reader: str
    note: str
    block: str


def uses(source: CardSource) -> list[Use]:
    """How each reader loads it, in the order in which people look for them."""
    if source.kind == "gguf":
        return _llama_cpp_files(source)
    if source.kind == "model":
        return [_transformers_model(source), _vllm_model(source), _llama_cpp_model(source)]
    return [_peft(source), _vllm(source), _llama_cpp(source)]


def only_merged(adapter: Mapping[str, Any]) -> str | None:
    """Why readers of plain LoRA (vLLM 0.32, llama.cpp) read nothing of an adapter; None where they do."""
    kind = adapter.get("peft_type")
    if kind != "LORA":
        return f"it reads LoRA alone, and this is {kind or adapter.get('topwork_method')}"
    if adapter.get("use_dora"):
        return "it reads no DoRA"
    if modules := adapter.get("modules_to_save"):
        return f"it reads no modules that were trained whole ({', '.join(map(str, modules))})"
    if adapter.get("trainable_token_indices"):
        return "it knows no rows of single tokens"
    if adapter.get("bias", "none") != "none" or adapter.get("lora_bias"):
        return "it reads no biases"
    return None


def to_be_folded(adapter: Mapping[str, Any]) -> list[str]:
    """What of an adapter some version of vLLM overlooks or refuses, and `topwork export` folds, pads or finds out."""
    alpha, targets = adapter.get("lora_alpha"), adapter.get("target_modules")
    named = {name.rpartition(".")[2] for name in targets} if isinstance(targets, list) else set()
    told = {
        "rsLoRA's scale": adapter.get("use_rslora"),
        "alphas by module": adapter.get("alpha_pattern"),
        "ranks by module": adapter.get("rank_pattern"),
        "an alpha that is no whole number": isinstance(alpha, float) and not alpha.is_integer(),
        "targets as an expression": isinstance(targets, str),
        "a beginning taken out of the base": adapter.get("init_lora_weights") not in (None, True, False, "gaussian"),
        "a head or an embedding, which may be tied": named & {"lm_head", "embed_tokens", "wte", "embed_out"},
    }
    return [name for name, there in told.items() if there]


def _peft(source: CardSource) -> Use:
    if not source.adapter.get("peft_type"):
        note = "PEFT has no form for this method; fold it into its base and load that: "
        return Use("transformers", note + "`topwork merge RUN OUT`", "")
    place, bits = _place(source), _bits(source)
    lines = [
        "import torch",
        *(["from huggingface_hub import hf_hub_download"] if source.template and not source.tokenizer else []),
        "from peft import PeftModel",
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{', BitsAndBytesConfig' if bits else ''}",
        "",
        *bits,
        f"base = AutoModelForCausalLM.from_pretrained({quoted(source.base or BASE)}{_options(source, bool(bits))})",
        *_grown(source),
        f"model = PeftModel.from_pretrained(base, {quoted(place)}).eval()",
        *_tokenizer(source),
        *_asking(source),
    ]
    return Use("transformers and PEFT", _base_note(source), fenced("\n".join(lines), "python"))


def _grown(source: CardSource) -> list[str]:
    """Rows for new tokens, as many as the adapter's own tokenizer has, before PEFT looks for them."""
    if not source.tokenizer or not section(source.recipe, "model").get("new_tokens"):
        return []
    return [f"base.resize_token_embeddings(len(AutoTokenizer.from_pretrained({quoted(_place(source))})))"]


def _tokenizer(source: CardSource) -> list[str]:
    """With the chat template that the adapter was trained with, wherever it stands."""
    if source.tokenizer:
        return [f"tokenizer = AutoTokenizer.from_pretrained({quoted(_place(source))})"]
    base = f"tokenizer = AutoTokenizer.from_pretrained({quoted(source.base or BASE)})"
    if not source.template:
        return [base]
    template = f'hf_hub_download({quoted(_place(source))}, "chat_template.jinja")'
    return [base, f"tokenizer.chat_template = open({template}).read()"]


def _transformers_model(source: CardSource) -> Use:
    place = quoted(_place(source))
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained({place}, dtype="auto").eval()',
        f"tokenizer = AutoTokenizer.from_pretrained({place})",
        *_asking(source),
    ]
    return Use("transformers", "", fenced("\n".join(lines), "python"))


def _vllm(source: CardSource) -> Use:
    if source.adapter.get("peft_type") in VIRTUAL:
        return Use("vLLM", "Not at all: vLLM knows no learned tokens before the text, and they cannot be merged.", "")
    reason, needed = only_merged(source.adapter), max(ranks(source), default=1)
    rank = next((rank for rank in VLLM_RANKS if rank >= needed), None)
    if rank is None:
        reason = reason or f"its rank {needed} is over the largest that vLLM takes, {VLLM_RANKS[-1]}"
    if reason:
        note = f"Not as it is: {text(reason)}. Fold it into its base, and serve the result as a model of its own:"
        return Use("vLLM", note, _shell(_download(source), _merge(source), f"vllm serve {_word(_merged_name(source))}"))
    note, place, before = f"Requests name the model {code(source.name)}. {_base_note(source)}", _place(source), []
    if folded := to_be_folded(source.adapter):
        note += f"It has {' and '.join(folded)}, so that it is written anew for vLLM first:"
        place = f"{_word(source.name)}-vllm"
        before = [_download(source), f"topwork export {_word(source.name)} {place} --format vllm{_model(source)}"]
    own = section(source.recipe, "data").get("chat_template") if source.recipe else source.template
    if own and not folded:
        before = [f"hf download {place} chat_template.jinja --local-dir ."]
    template = f" --chat-template {f'{place}/' if folded else ''}chat_template.jinja" if own else ""
    command = f"vllm serve {source.base or BASE} --enable-lora --max-lora-rank {rank}"
    command += f" --lora-modules {_word(source.name)}={place}{_base_options(source)}{template}"
    return Use("vLLM", " ".join(f"{note} {_held_note(source)}".split()), _shell(*before, command))


def _base_options(source: CardSource) -> str:
    model = section(source.recipe, "model")
    revision = f" --revision {_word(str(model['revision']))}" if model.get("revision") else ""
    return revision + (" --trust-remote-code" if model.get("trust_remote_code") else "")


def _held_note(source: CardSource) -> str:
    """The weights that it meets here may be others than it was trained on."""
    held = section(source.recipe, "quantization")
    bits = "4 bits" if held.get("load_in_4bit") else "8 bits" if held.get("load_in_8bit") else ""
    return f"In training the base was held in {bits}; here the adapter meets its 16-bit weights." if bits else ""


def _vllm_model(source: CardSource) -> Use:
    return Use("vLLM", "", _shell(f"vllm serve {_place(source)}"))


def _llama_cpp(source: CardSource) -> Use:
    """llama.cpp knows one alpha for all modules, so that the scale has to be folded whatever the method."""
    if source.adapter.get("peft_type") in VIRTUAL:
        note = "Not at all: it knows no learned tokens before the text, and they cannot be merged."
        return Use("llama.cpp and Ollama", note, "")
    name, model = _word(source.name), _model(source)
    if only_merged(source.adapter):
        note = "It reads plain LoRA alone, so this is folded into its base:"
        export = f"topwork export {name} {name}-gguf --format gguf --type q8_0{model}"
        return Use("llama.cpp", note, _shell(_download(source), export, f"llama-server -m {name}-gguf/*.gguf --jinja"))
    lines = [
        _download(source),
        f"topwork export {name} {name}-gguf --format gguf-adapter{model}",
        f"topwork export {source.base or BASE} base-gguf --format gguf",
        f"llama-server -m base-gguf/*.gguf --lora {name}-gguf/*.gguf --jinja",
    ]
    note = "Its files hold one scale for all modules, which `topwork export` folds into the weights."
    return Use("llama.cpp", f"{note} {_held_note(source)}".strip(), _shell(*lines))


def _llama_cpp_model(source: CardSource) -> Use:
    name = _word(source.name)
    export = f"topwork export {name} {name}-gguf --format gguf"
    return Use("llama.cpp", "", _shell(_download(source), export, f"llama-server -m {name}-gguf/*.gguf --jinja"))


def _llama_cpp_files(source: CardSource) -> list[Use]:
    name, figures = _word(source.name), section(source.made, "figures")
    listed = ", ".join(map(code, source.files))
    file = str(figures.get("file") or next(iter(source.files), "*.gguf"))
    if not source.gguf_adapter:
        serve, note = f"llama-server -m {name}/{_word(file)} --jinja", f"{listed}."
    else:
        base = f"{name}/{_word(str(figures['model']))}" if figures.get("model") else "BASE.gguf"
        serve = f"llama-server -m {base} --lora {name}/{_word(file)} --jinja"
        note = f"{listed}: an adapter goes on a GGUF of its base, {code(source.base or source.local)}."
    found = [Use("llama.cpp", note, _shell(_download(source), serve))]
    if source.made.get("format") == "ollama":
        create = f"ollama create {name} -f {name}/Modelfile"
        found.append(Use("Ollama", "", _shell(_download(source), create, f"ollama run {name}")))
    return found


def _merge(source: CardSource) -> str:
    return f"topwork merge {_word(source.name)} {_word(_merged_name(source))}{_model(source)}"


def _model(source: CardSource) -> str:
    """How commands are told the base, where the adapter's own name for it leads nowhere."""
    return "" if source.base else f" --model {BASE}"


def _merged_name(source: CardSource) -> str:
    return f"{source.name}-merged"


def _download(source: CardSource) -> str:
    return f"hf download {_place(source)} --local-dir {_word(source.name)}"


def _base_note(source: CardSource) -> str:
    return "" if source.base else f"`{BASE}` stands for the base model, {code(source.local)}, which is not on the Hub."


def _place(source: CardSource) -> str:
    return source.repo or PLACE


def _word(value: str) -> str:
    """One word of a shell's line."""
    return shlex.quote(value)


def _shell(*lines: str) -> str:
    return fenced("\n".join(line for line in lines if line), "sh")


def quoted(value: str) -> str:
    """A text as Python writes it, in double quotes."""
    return json.dumps(value, ensure_ascii=False)


def _options(source: CardSource, quantized: bool) -> str:
    """What the base is loaded with."""
    model = section(source.recipe, "model")
    dtype = str(model.get("dtype") or "")
    found = f", dtype=torch.{dtype}" if dtype in DTYPES else ', dtype="auto"'
    found += f", revision={quoted(str(model['revision']))}" if model.get("revision") else ""
    found += ", trust_remote_code=True" if model.get("trust_remote_code") else ""
    return found + (", quantization_config=bits" if quantized else "")


def _bits(source: CardSource) -> list[str]:
    """The base as training held it, where bitsandbytes holds it so."""
    held = section(source.recipe, "quantization")
    if held.get("load_in_8bit"):
        return ["bits = BitsAndBytesConfig(load_in_8bit=True)"]
    if not held.get("load_in_4bit") or held.get("block_size", 64) != 64:
        return []
    kind, twice = str(held.get("bnb_4bit_quant_type", "nf4")), bool(held.get("bnb_4bit_use_double_quant", True))
    dtype = section(source.recipe, "model").get("dtype")
    return [
        "bits = BitsAndBytesConfig(",
        f"    load_in_4bit=True, bnb_4bit_quant_type={quoted(kind)}, bnb_4bit_use_double_quant={twice},",
        f"    bnb_4bit_compute_dtype=torch.{dtype if dtype in DTYPES else 'bfloat16'},",
        ")",
    ]


def _asking(source: CardSource) -> list[str]:
    """One question, rendered as training rendered it."""
    if source.recipe and not source.template:  # plain text
        ask = ['inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)']
    else:
        system = source.result.get("system")
        turns = [("system", system)] if isinstance(system, str) and system else []
        shown = [*turns, ("user", QUESTION)]
        ask = [
            "",
            "messages = [",
            *(f'    {{"role": "{role}", "content": {quoted(content)}}},' for role, content in shown),
            "]",
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ").to(model.device)",
        ]
    return [
        *ask,
        "answer = model.generate(**inputs, max_new_tokens=256, do_sample=False)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
