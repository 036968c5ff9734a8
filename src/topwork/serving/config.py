"""What a server may be told: serve.yaml, strict and typed. Free of torch and of the web, so that it reads in a blink.

model: {model_name_or_path: smollm2-135m}
adapters: {support: runs/support, sql: adapters/sql}
engine: {batch_size: 32}
"""

from collections.abc import Mapping
from ipaddress import ip_address
from typing import Annotated, Any, Self

from pydantic import AfterValidator, AliasChoices, Field, field_validator, model_validator

from topwork.common.options import Options
from topwork.common.paths import plain_path
from topwork.models.config import ModelConfig
from topwork.quantization.config import QuantizationConfig
from topwork.serving.backends.vllm_config import VllmConfig

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What arms, routes and tenants may be called: it goes into headers, labels and lines of a log."""


def _digest(value: str) -> str:
    if len(value) != 64 or not all(letter in "0123456789abcdef" for letter in value.lower()):
        raise ValueError("expected a SHA-256, 64 hexadecimal digits; `topwork serve-key NAME` makes a key and its hash")
    return value.lower()


Digest = Annotated[str, AfterValidator(_digest)]


class EngineConfig(Options):
    batch_size: int = Field(default=64, ge=1)
    """Sequences that run together."""
    max_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a pass: those that are decoded, and parts of prompts that are read beside them; left out, what the
    engine takes at once."""
    kv_tokens: int | None = Field(default=None, ge=1)
    """Tokens whose keys and values are held, of all sequences together; chosen from free memory when left out."""
    resident_adapters: int | None = Field(default=None, ge=1)
    """Adapters in memory at once: the one asked for longest ago leaves, and is read again when it is asked for. Left
    out, all."""
    adapters_bytes: int | None = Field(default=None, ge=1)
    """The same by their memory."""
    max_waiting: int = Field(default=256, ge=0)
    """Answers that may wait for their turn; one more is refused with 429."""


class LimitsConfig(Options):
    body_bytes: int = Field(default=4 * 2**20, ge=1024)
    """The longest body of a request."""
    header_seconds: float = Field(default=10.0, gt=0)
    """How long the head of a request may take to arrive."""
    body_seconds: float = Field(default=30.0, gt=0)
    """How long its body may take."""
    request_seconds: float = Field(default=600.0, gt=0)
    """How long an answer may take, waiting included; one that takes longer is ended."""
    unread_seconds: float = Field(default=60.0, gt=0)
    """How long a client may leave what it is sent unread."""
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


class ArmConfig(Options):
    """One of the answers that a route may give."""

    name: str = Field(pattern=NAME)
    """In the header x-topwork-arm, in figures and feedback."""
    model: str | None = Field(default=None, validation_alias=AliasChoices("model", "adapter"))
    """Who answers: an adapter's name; left out, the base."""
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Its share of the requests, beside the other arms' weights; 0 gives it none."""


class RouteConfig(Options):
    """A name that requests may give as their model, and the arms that it stands for."""

    name: str = Field(pattern=NAME)
    """What requests call it."""
    arms: list[ArmConfig] = Field(min_length=1, max_length=16)
    """Who may answer; the others are compared with the first."""
    sticky: str = Field(default="user", pattern=r"^(user|key|none|header:[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64})$")
    """What always meets the same arm: the request's `user`, the `key` it came with, a header (`header:x-session`), or
    `none`. A request without it is dealt an arm by chance."""
    salt: str | None = None
    """Another one deals anew who meets which arm; left out, the route's name."""

    @model_validator(mode="after")
    def _arms_are_apart(self) -> Self:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"two arms of {self.name!r} have one name; figures and feedback could not tell them")
        if not any(arm.weight for arm in self.arms):
            raise ValueError(f"all arms of {self.name!r} have weight 0; somebody has to answer")
        return self


class TenantConfig(Options):
    """Who may ask: a key's hash, and what it may do."""

    name: str = Field(pattern=NAME)
    """In logs, figures and feedback."""
    key_sha256: list[Digest] = Field(min_length=1, max_length=8)
    """The SHA-256 of its key in hexadecimal, never the key (`topwork serve-key NAME` makes both); a list while one key
    takes over from another."""
    models: list[str] = Field(default_factory=lambda: ["*"])
    """The adapters and routes that it may use and see, and the base by its name; `team-*` is all that begin so."""
    admin: bool = False
    """May use all models, load and unload adapters, change routes, and see figures."""
    metrics: bool = False
    """May read /metrics, as an admin may."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Left out, any number."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Of prompts and answers together; left out, any number."""
    concurrent: int | None = Field(default=None, ge=1)
    """Requests that are answered or wait at once; left out, any number."""
    shared_prompts: str | None = None
    """Tenants that say the same here share cached prompts, and so may tell by the time what others asked."""

    @field_validator("key_sha256", mode="before")
    @classmethod
    def _one_too(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class FeedbackConfig(Options):
    answers_remembered: int = Field(default=50_000, ge=1)
    """The last so many answers may be voted on, some 400 bytes of memory each."""
    comment_characters: int = Field(default=2000, ge=0)
    """The longest comment."""


class ServeConfig(Options):
    model: ModelConfig
    """The base: what `load_base` takes, or a run's folder, whose adapter and chat template come along."""
    quantization: QuantizationConfig = Field(default_factory=QuantizationConfig)
    """The base in fewer bits; left out, it is held in model.dtype, or as a run held it."""
    served_model_name: str | None = None
    """What requests call the base; left out, its own name, without its folders."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """Name -> folder: PEFT's, or a run's."""
    force: bool = False
    """Load adapters that were trained on another base than this, with a warning."""
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
    allowed_hosts: list[str] = Field(default_factory=list)
    """Host names under which it may be asked where it listens to its own machine alone (a proxy's), beside localhost; *
    is any. A web page can point a name of its own at this machine."""
    cors_origins: list[str] = Field(default_factory=list)
    """Web pages of other origins that may ask, such as https://example.org; * is any."""
    engine: EngineConfig = Field(default_factory=EngineConfig)
    """How much runs at once."""
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    """What a request may cost."""
    routes: list[RouteConfig] = Field(default_factory=list)
    """Names that stand for several adapters: A/B."""
    tenants: list[TenantConfig] = Field(default_factory=list)
    """Who may ask; left out, everyone who reaches the address, which then has to be this machine's own."""
    no_auth: bool = False
    """Everyone who reaches the address may ask and load adapters, though other machines do."""
    feedback: FeedbackConfig = Field(default_factory=FeedbackConfig)
    """Votes on answers."""
    vllm: VllmConfig | None = None
    """Stand before a vLLM, which has the base and the adapters, instead of running them here (`--engine vllm`)."""
    state_folder: str | None = None
    """Where what was loaded while the server ran is kept for its next start; left out, nowhere."""

    @field_validator("adapters_folder", "state_folder")
    @classmethod
    def _from_home(cls, value: str | None) -> str | None:
        """A file's ~ is no shell's: without this it would be a folder of that name."""
        return None if value is None else plain_path(value)

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

    @model_validator(mode="after")
    def _tenants_are_apart(self) -> Self:
        names = [tenant.name for tenant in self.tenants]
        keys = [key for tenant in self.tenants for key in tenant.key_sha256]
        if len(set(names)) < len(names) or len(set(keys)) < len(keys):
            raise ValueError("two tenants have one name or one key; nobody could tell who asks")
        return self

    @model_validator(mode="after")
    def _strangers_need_keys(self) -> Self:
        if not (self.tenants or self.no_auth or of_this_machine(self.host)):
            raise ValueError(
                f"host {self.host!r} is reached from other machines, and without tenants whoever reaches it may ask "
                "and load adapters; give tenants their keys (`topwork serve-key NAME`), or --set no_auth=true"
            )
        return self


def of_this_machine(host: str) -> bool:
    """Whether this address is reached from this machine alone."""
    if host.lower() in ("localhost", "localhost."):
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
