"""A chat template's Jinja, compiled."""

from typing import Any


def compiled(tokenizer: Any, jinja: str) -> Any:
    """As transformers does it, with its filters and functions; by the tokenizer itself where it is one that does
    without transformers (`models/light_tokenizer.py`). Raises jinja2's TemplateSyntaxError."""
    own = getattr(tokenizer, "compiled_template", None)
    if own is not None:
        return own(jinja)
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(jinja)
