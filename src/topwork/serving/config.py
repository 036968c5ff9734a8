"""What a server may be told: serve.yaml, strict and typed. Free of torch and of the web, so that it reads in a blink.

model: {model_name_or_path: smollm2-135m}
adapters: {support: runs/support, sql: adapters/sql}
engine: {batch_size: 32}
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from topwork.common.options import Options
from topwork.models.config import ModelConfig
from topwork.quantization.config import QuantizationConfig


class EngineConfig(Options):
    batch_size: int = Field(default=64, ge=1)
    """Sequences that run together."""
    max_batch_tokens: int = Field(default=512, ge=1)
    """Tokens of a pass: those that are decoded, and parts of prompts that are read beside them."""
    kv_tokens: int | None = Field(default=None, ge=1)
    """Tokens whose keys and values are held, of all sequences together; chosen from free memory when left out."""
    max_waiting: int = Field(default=256, ge=0)
    """Answers that may wait for their turn; one more is refused with 429."""


class LimitsConfig(Options):
    body_bytes: int = Field(default=4 * 2**20, ge=1024)
    """The longest body of a request."""
    json_depth: int = Field(default=64, ge=4)
    """How deep objects and lists may stand in one another."""
    header_seconds: float = Field(default=10.0, gt=0)
    """How long the head of a request may take to arrive."""
    body_seconds: float = Field(default=30.0, gt=0)
    """How long its body may take."""
    request_seconds: float = Field(default=600.0, gt=0)
    """How long an answer may take, waiting included; one that takes longer is ended."""
    idle_seconds: float = Field(default=30.0, gt=0)
    """How long a connection stays open with nothing asked."""
    connections: int = Field(default=1024, ge=1)
    """Connections that are open at once; one more is answered with 503."""
    max_tokens: int | None = Field(default=None, ge=1)
    """The most tokens of an answer, whatever is asked for; left out, what the context has room for."""
    default_max_tokens: int | None = Field(default=None, ge=1)
    """Of a chat's answer where the request does not say; left out, what the context has room for."""
    choices: int = Field(default=16, ge=1)
    """The most choices (`n`, or prompts times `n`) of a request."""
    grace_seconds: float = Field(default=30.0, ge=0)
    """How long running answers may go on after the server was told to end."""


class RouteConfig(Options):
    """A name that requests may give as their model, and the arms that it stands for."""

    name: str


class TenantConfig(Options):
    """Who may ask: a key's hash, and what it may do."""

    name: str


class ServeConfig(Options):
    model: ModelConfig
    """The base: what `load_base` takes, or a run's folder, whose adapter and chat template come along."""
    quantization: QuantizationConfig = Field(default_factory=QuantizationConfig)
    """The base in fewer bits; left out, it is held in model.dtype, or as a run held it."""
    served_model_name: str | None = None
    """What requests call the base; left out, its own name, without its folders."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """Name -> folder: PEFT's, or a run's."""
    adapters_folder: str | None = None
    """The one folder from below which adapters may be loaded while the server runs; left out, none may."""
    chat_template: str | None = None
    """`chatml`, `plain`, a Jinja file; left out, the run's, or the tokenizer's own."""
    fold_system: bool | None = None
    """A system message goes to the head of the first user turn; left out, as the run had it."""
    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 is every one of this machine's."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free one."""
    cors_origins: list[str] = Field(default_factory=list)
    """Web pages of other origins that may ask, such as https://example.org; * is any."""
    engine: EngineConfig = Field(default_factory=EngineConfig)
    """How much runs at once."""
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    """What a request may cost."""
    routes: list[RouteConfig] = Field(default_factory=list)
    """Names that stand for several adapters: A/B."""
    tenants: list[TenantConfig] = Field(default_factory=list)
    """Who may ask; left out, everyone who reaches the address."""
    state_folder: str | None = None
    """Where what was loaded while the server ran is kept for its next start; left out, nowhere."""

    @field_validator("adapters", mode="before")
    @classmethod
    def _a_list_too(cls, value: Any) -> Any:
        """vLLM's way: [{name, path}, …]."""
        if not isinstance(value, list):
            return value
        named: dict[str, str] = {}
        for entry in value:
            if not isinstance(entry, Mapping) or not {"name", "path"} <= entry.keys():
                raise ValueError("expected name: path, or a list of {name, path}")
            if entry["name"] in named:
                raise ValueError(f"{entry['name']!r} is given twice")
            named[entry["name"]] = entry["path"]
        return named

    @model_validator(mode="after")
    def _names_are_apart(self) -> Self:
        seen: dict[str, str] = {} if self.served_model_name is None else {self.served_model_name: "the base"}
        for name, what in [*((n, "an adapter") for n in self.adapters), *((r.name, "a route") for r in self.routes)]:
            if name in seen:
                raise ValueError(f"{name!r} is the name of {seen[name]} and of {what}; requests could not tell them")
            seen[name] = what
        return self
