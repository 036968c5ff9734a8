"""The base of every part's options: strict, frozen, documented under each field, free of torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
"""A seed that torch, numpy and Python take alike."""


class Options(BaseModel):
    """Unknown keys are refused; the docstring under a field is its help text, in the CLI and in the JSON schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
