"""A base as transformers builds it: its config, its modules without weights, what an adapter trains in one in memory.
Where a base's sizes are enough, `base.py` and `count.py` tell them without torch."""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel, __version__

from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import adapted_layers, plan_adapter
from topwork.adapters.module_copy import parameters_of
from topwork.common.errors import ModelError, did_you_mean
from topwork.common.os_errors import why
from topwork.models.config import ModelConfig
from topwork.models.config_files import ConfigFile, find_config
from topwork.models.skeleton import skeleton
from topwork.models.vocabulary import planned_growth
from topwork.plan.count import ParameterCount, counted


def base_skeleton(model: ModelConfig, grown: bool = True) -> PreTrainedModel:
    """`skeleton` of the base that a recipe names; `grown`, with rows for the tokens that are new. Raises ModelError."""
    known = config_of(model.model_name_or_path, model.revision, model.trust_remote_code)
    text = known.get_text_config()
    if grown and (growth := planned_growth(model, text.vocab_size)) is not None:
        text.vocab_size = growth.rows
    return skeleton(known, model.trust_remote_code)


def config_of(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """transformers' config of a model by any of its names (`models/config_files.py`). Raises ModelError."""
    found = find_config(name, revision)
    if found.shipped:
        given = found.values()
        return AutoConfig.for_model(given.pop("model_type"), **given)
    try:
        if found.hub_id is not None:  # by its name, under which the code lies that it may come with
            return AutoConfig.from_pretrained(found.hub_id, revision=revision, trust_remote_code=trust_remote_code)
        path = Path(str(found.file))
        if found.is_gguf:
            return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError, StrictDataclassError) as error:
        told = _unknown_type(found) or why(error)
        raise ModelError(f"{found.name} does not hold a model config that transformers knows: {told}") from error


def count_built(model: PreTrainedModel, config: AdapterConfig) -> ParameterCount:
    """What `config` would train in `model`, which may hold other adapters already. Raises AdapterError where the config
    does not fit the model."""
    trained = {path: planned.trained for path, planned in plan_adapter(model, config).items()}
    return counted(trained, _own_parameters(model))


def _own_parameters(model: PreTrainedModel) -> int:
    """The base's parameters, tied ones once (`parameters()` gives each tensor once)."""
    grafted = {id(p) for layer in adapted_layers(model).values() for p in layer.adapters.parameters()}
    return sum(count for key, count in parameters_of(model).items() if key not in grafted)


def _unknown_type(found: ConfigFile) -> str | None:
    """What is wrong with a model type that nobody knows."""
    given = None if found.is_gguf else found.values().get("model_type")
    if given is None or given in CONFIG_MAPPING:
        return None
    near = did_you_mean(given, CONFIG_MAPPING)
    return f"its model_type is {given!r}, which transformers {__version__} lacks (a newer one may have it){near}"
