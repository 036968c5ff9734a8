"""What a recipe may say about what is learned: a name, or a name with the objective's own options."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainSerializer

from topwork.common.options import Options


class SftConfig(Options):
    """`sft`: the log-likelihood of the learned tokens."""

    name: Literal["sft"] = "sft"
    """The log-likelihood of the learned tokens, each times its weight."""


def _named(value: Any) -> Any:
    """`objective: sft` is short for `objective: {name: sft}`."""
    return {"name": value} if isinstance(value, str) else value


def _short(config: Options) -> Any:
    """The other way: the name alone where the options are what they are without being named."""
    options = config.model_dump(exclude_defaults=True)
    name = config.model_dump()["name"]
    return {"name": name, **options} if options else name


ObjectiveConfig = Annotated[SftConfig, BeforeValidator(_named), PlainSerializer(_short)]
"""One of the objectives; a second one makes this a union that `name` tells apart."""
