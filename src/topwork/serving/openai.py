"""What a request may say: OpenAI's fields, vLLM's that are worth taking, and what clients send that changes nothing.

The classes are the OpenAPI document's too, so they say what is true: a field that would change the answer and is not
supported may only have the value that changes nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

INT64 = 2**63
TOKENS = 2**31 - 1


class Body(BaseModel):
    """Unknown fields are refused before (`reading.checked`)."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class Inner(BaseModel):
    """An object in a body; what else it says is not looked at."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, protected_namespaces=())


def _few_biases(value: Any) -> Any:
    """Before each of them is looked at."""
    if isinstance(value, Mapping) and len(value) > 1024:
        raise ValueError("at most 1024 tokens can be biased")
    return value


def _token_keys(value: dict[str, float]) -> dict[str, float]:
    if wrong := next((key for key in value if not (key.isascii() and key.isdigit() and len(key) <= 9)), None):
        raise ValueError(f"expected token ids as keys, not {wrong[:32]!r}")
    return value


def _whole(value: Any) -> Any:
    """2.0 is a whole number, as JSON has them; a list of such too."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list) and any(isinstance(one, float | list) for one in value):
        return [_whole(one) for one in value]
    return value


Whole = BeforeValidator(_whole)
Token = Annotated[int, Field(ge=0, le=TOKENS)]
StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Stop = StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)]
Bias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(_few_biases),
    AfterValidator(_token_keys),
    Field(max_length=1024, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Inner):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Inner):
    name: Annotated[str, Field(min_length=1, max_length=64)] = "answer"
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class TextFormat(Inner):
    type: Literal["text"]


class ObjectFormat(Inner):
    type: Literal["json_object"]


class SchemaFormat(Inner):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class Asked(Body):
    """What chat and completions share."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """The base, an adapter or a route, as /v1/models calls them."""
    max_tokens: Annotated[int, Field(ge=1, le=TOKENS), Whole] | None = None
    """The most tokens of an answer; it ends before where the model's context is full."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the likeliest token; left out, 1."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """0 takes the likeliest token, as OpenAI's does."""
    n: Annotated[int, Field(ge=1, le=128), Whole] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-INT64, le=INT64 - 1), Whole] | None = None
    """The same seed and request give the same answer; choice i of n draws by the seed and i."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    """Routes may stick to it."""
    response_format: ResponseFormat | None = None
    top_k: Annotated[int, Field(ge=-1, le=TOKENS), Whole] | None = None
    """-1 and 0 are all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64, fail_fast=True), Whole] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=TOKENS), Whole] | None = None
    """Before so many no token ends the answer."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Requests of different salts share no cached prompts."""
    return_token_ids: bool | None = None
    include_stop_str_in_output: bool | None = None

    # What changes nothing here, whatever it says
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    request_id: str | None = None
    priority: Annotated[int, Whole] | None = None

    # What would change the answer, and may only say that it does not
    use_beam_search: Literal[False] | None = None
    length_penalty: Literal[1] | None = None
    skip_special_tokens: Literal[True] | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    prompt_logprobs: None = None
    truncate_prompt_tokens: None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    structured_outputs: None = None


class TextPart(Inner):
    type: Literal["text"]
    text: str


class RefusalPart(Inner):
    type: Literal["refusal"]
    refusal: str


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class CalledFunction(Inner):
    name: Annotated[str, Field(min_length=1, max_length=128)]
    arguments: str | dict[str, Any] = "{}"


class SaidCall(Inner):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """What else a message says is given to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    """Text, or a list of text parts; images, sound and files are not taken."""
    name: str | None = None
    tool_calls: Annotated[list[SaidCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: str | None = None


class Function(Inner):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Inner):
    type: Literal["function"]
    function: Function


class NamedFunction(Inner):
    name: str


class NamedTool(Inner):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Asked):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=TOKENS), Whole] | None = None
    """OpenAI's newer name for max_tokens; goes before it."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), Whole] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    """What the chat template reads beside the messages, such as enable_thinking."""
    continue_final_message: bool | None = None
    """The answer goes on with the last message, which is the assistant's."""
    add_generation_prompt: bool | None = None
    """May only be false together with continue_final_message."""
    reasoning_effort: str | None = None
    """Given to the chat template."""

    prediction: dict[str, Any] | None = None
    verbosity: str | None = None

    modalities: list[Literal["text"]] | None = None
    echo: Literal[False] | None = None
    add_special_tokens: Literal[False] | None = None
    audio: None = None
    web_search_options: None = None
    functions: None = None
    function_call: Literal["none"] | None = None
    chat_template: None = None
    documents: None = None


Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]


class CompletionRequest(Asked):
    """`POST /v1/completions`."""

    prompt: Annotated[
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)],
        Whole,
    ]
    """Text, token ids, or a list of either."""
    logprobs: Annotated[int, Field(ge=0, le=20), Whole] | None = None
    echo: bool | None = None
    """The prompt stands before each answer."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer puts its BOS before a prompt that is text; left out, as it does."""

    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


_FORMAT = "give response_format: {type: json_schema, json_schema: {name, schema}}"
UNSUPPORTED = {
    "use_beam_search": "there is no beam search; leave it out",
    "length_penalty": "it belongs to beam search, which there is not; leave it out",
    "skip_special_tokens": "special tokens are never part of the text; take return_token_ids to see them",
    "spaces_between_special_tokens": "leave it out",
    "prompt_logprobs": "a prompt's tokens are not scored; leave it out",
    "truncate_prompt_tokens": "send a shorter prompt",
    "guided_json": _FORMAT,
    "guided_regex": _FORMAT,
    "guided_choice": _FORMAT,
    "guided_grammar": _FORMAT,
    "structured_outputs": _FORMAT,
    "modalities": "answers are text; leave it out",
    "echo": "leave it out",
    "add_special_tokens": "the chat template writes all special tokens; leave it out",
    "audio": "answers are text; leave it out",
    "web_search_options": "there is no web search here; leave it out",
    "functions": "give tools, its successor",
    "function_call": "give tool_choice, its successor",
    "chat_template": "a template can't come with a request; start the server with --chat-template",
    "documents": "put them into the messages",
    "best_of": "give n, and choose among the choices",
    "suffix": "the model doesn't fill in; leave it out",
}
"""Fields that are known and not supported -> what to do."""


class LoadAdapter(Body):
    """`POST /v1/load_lora_adapter`, as vLLM's."""

    lora_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}$")]
    """What requests call it."""
    lora_path: Annotated[str, Field(min_length=1, max_length=1024)]
    """Its folder, below the one that the server was started with."""
    load_inplace: bool = False
    """Replace an adapter of this name; what runs goes on with the one that it began with."""
    base_model_name: str | None = None
    is_3d_lora_weight: Literal[False] = False


class UnloadAdapter(Body):
    """`POST /v1/unload_lora_adapter`, as vLLM's."""

    lora_name: Annotated[str, Field(min_length=1, max_length=128)]
    lora_int_id: Annotated[int, Whole] | None = None
