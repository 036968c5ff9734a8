"""Which of transformers' auto classes reads a config as a causal language model."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from topwork.common.errors import ModelError
from topwork.models.structures.table import WRAPPERS


def auto_class(config: PretrainedConfig) -> Any:
    """The one for a config: models that read pictures too are read whole, and their text part is what is run. Raises
    ModelError, which names the kind of model in one line, where there is none."""
    if config.model_type in WRAPPERS:
        return AutoModelForImageTextToText
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if own_code or type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping:
        why = (
            "it reads pictures too, and of such models the text part of "
            f"{', '.join(sorted(WRAPPERS))} can be trained; give one of these, or the language model alone"
        )
    else:
        why = "transformers has none of this type; give a model that continues text (llama, qwen, mistral, gemma …)"
    raise ModelError(f"no causal language model can be built from this {config.model_type!r} config: {why}")
