"""Which chat template a model is put to: its own, one that ships here, or a file; and variables that a recipe sets."""

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from topwork.common.errors import DataError, did_you_mean
from topwork.common.paths import missed, plain_path
from topwork.data.chat.compiled import compiled

RAW = "raw"
_SHIPPED = Path(__file__).parents[1] / "templates"
_RENDERERS = frozenset({"self", "messages", "raise_exception", "strftime_now", "generation"})


def jinja_of(tokenizer: Any, template: str | None) -> str | None:
    """The template's Jinja; None where the tokenizer has none. Raises DataError for a file that is not there."""
    if template is None:
        own = getattr(tokenizer, "chat_template", None)
        return _of_several(own) if isinstance(own, dict) else own
    if "{{" in template or "{%" in template:
        return template
    shipped = {path.stem: path for path in _SHIPPED.glob("*.jinja")}
    path = shipped.get(template, Path(plain_path(template)))
    if not path.is_file():
        raise DataError(
            f"data.chat_template is {template!r}, which is no file{did_you_mean(template, shipped) or missed(path)}; "
            f"expected {', '.join(sorted(shipped))}, or a Jinja file"
        )
    try:
        jinja = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"the chat template {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    return "{{- bos_token }}" + jinja if template in shipped and adds_bos(tokenizer) else jinja


def _of_several(named: Mapping[str, str]) -> str:
    """A tokenizer's templates as one: `tool_use` where there are tools, as transformers chooses, else `default`."""
    default = named.get("default") or next(iter(named.values()))
    if named.get("tool_use", default) == default:
        return default
    for_tools, without = (text.removesuffix("\n") for text in (named["tool_use"], default))
    return f"{{% if tools %}}\n{for_tools}{{% else %}}\n{without}{{% endif %}}"


def is_raw(jinja: str | None) -> bool:
    """Whether it is the shipped template that puts prompt and completion one after the other."""
    return jinja is not None and jinja.endswith((_SHIPPED / f"{RAW}.jinja").read_text("utf-8"))


def raw_jinja(tokenizer: Any, separator: str) -> str:
    """The template that puts prompt and completion one after the other."""
    jinja = jinja_of(tokenizer, RAW)
    assert jinja is not None
    return _set(jinja, {"separator": separator})


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS before a plain text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def with_variables(tokenizer: Any, jinja: str | None, variables: Mapping[str, Any]) -> str | None:
    """The template with other defaults for what it reads beside the messages, so that whoever renders it has them, a
    chat or a server of others too; what a request says itself goes before.

    Raises DataError for a variable that the template does not read, or that is not to be set.
    """
    from jinja2 import TemplateSyntaxError, meta, nodes

    if not variables:
        return jinja
    if jinja is None:
        raise DataError("data.chat_template_kwargs sets variables of a chat template, and this model has none")
    check_variables(tokenizer, variables, "data.chat_template_kwargs: ")
    try:
        parsed = compiled(tokenizer, jinja).environment.parse(jinja)
    except TemplateSyntaxError as error:
        raise DataError(f"the chat template is no valid Jinja: line {error.lineno}: {error.message}") from error
    read = meta.find_undeclared_variables(parsed) - not_to_be_set(tokenizer)
    own = {name.name for name in parsed.find_all(nodes.Name) if name.ctx == "store"}
    for name in variables:
        if name not in read:
            known = f"; it reads {', '.join(sorted(read - own))}" if read - own else ", nor any other"
            raise DataError(
                f"data.chat_template_kwargs sets {name!r}, which the chat template never reads"
                f"{did_you_mean(name, sorted(read))}{known}"
            )
    _refuse_quoted(variables)
    return _set(jinja, variables)


def _refuse_quoted(variables: Mapping[str, Any]) -> None:
    """Raises DataError for the words true and false as text: templates take both for true, or for neither."""
    for name, value in variables.items():
        if isinstance(value, str) and value.lower() in ("true", "false"):
            raise DataError(
                f"data.chat_template_kwargs sets {name} to the text {value!r}, which is no {value.lower()} to a "
                f"template; write it without quotes: {{{name}: {value.lower()}}}"
            )


def check_variables(tokenizer: Any, variables: Mapping[str, Any], where: str = "") -> None:
    """Raises DataError for names that the renderer or the tokenizer gives to the template."""
    for name in variables:
        if name in not_to_be_set(tokenizer):
            raise DataError(
                f"{where}the template's variable {name!r} is not to be set from outside; leave it out, and give only "
                "what the template reads beside messages and tools, as enable_thinking"
            )


def not_to_be_set(tokenizer: Any) -> frozenset[str]:
    """The names that the renderer or the tokenizer gives to a template."""
    own = signature(tokenizer.apply_chat_template).parameters
    return frozenset(own) | frozenset(tokenizer.special_tokens_map) | _RENDERERS


def _set(jinja: str, variables: Mapping[str, Any]) -> str:
    """The line feed after the last block is Jinja's to drop, and what follows begins a line as before."""
    defaults = (
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in variables.items()
    )
    return "".join(defaults) + "\n" + jinja


def _literal(value: Any) -> str:
    """A value of YAML as Jinja writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(str(key))}: {_literal(each)}' for key, each in value.items())}}}"
    text = str(value)
    for letter, written in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(letter, written)
    return f"'{text}'"
