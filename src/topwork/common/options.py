"""The base of every part's options: strict, frozen, documented under each field, free of torch."""

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Unknown keys are refused; the docstring under a field is its help text, in the CLI and in the JSON schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
