"""From a request's fields to what the engine is asked: token ids, stop tokens, how to draw, what to obey."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from secrets import randbits
from typing import Any

from topwork.common.seeds import hashed
from topwork.data.chat.template import ChatTemplate, stop_ids
from topwork.data.conversations import Message, RowProblem, read_messages
from topwork.generation.grammar import Grammars
from topwork.generation.requests import Constraint
from topwork.generation.sampling import Sampling
from topwork.generation.tools import ToolUse, read_choice, read_specs
from topwork.models.base import Base
from topwork.serving.config import LimitsConfig
from topwork.serving.errors import ApiError, refusal
from topwork.serving.openai import Asked, ChatMessage, ChatRequest, CompletionRequest, RefusalPart, SchemaFormat

LONG = 20_000
"""Characters of text from which a request is read in another thread, so that others' answers go on meanwhile."""
COMPLETION_TOKENS = 16
"""OpenAI's default of a completion, where a chat's is what the context has room for."""
BEFORE = 8
"""Tokens of a prompt that the text of its answer may hang on."""
RESERVED = frozenset({
    "conversation", "messages", "tools", "documents", "chat_template", "tokenize", "tokenizer_kwargs",
    "add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "bos_token", "eos_token", "pad_token", "unk_token",
})  # fmt: skip
"""What a chat template reads that is not the request's to say."""


@dataclass(frozen=True)
class Prepared:
    """A request in tokens; its choices are the prompts' in order, `per_prompt` of each.

    samplings, constraints  one for each choice
    stops                   stop strings
    shown                   special tokens that are text all the same
    """

    prompts: Sequence[Sequence[int]]
    per_prompt: int
    stop_ids: Collection[int]
    samplings: Sequence[Sampling]
    constraints: Sequence[Constraint | None]
    stops: Sequence[str] = ()
    include_stop: bool = False
    shown: Collection[int] = ()
    use: ToolUse | None = None
    goes_on: bool = True
    """Whether the answer is one text with its prompt."""
    texts: Sequence[str] = field(default=(), repr=False)
    """The prompts' texts, where they are to be repeated."""

    @property
    def choices(self) -> int:
        """How many answers are asked for."""
        return len(self.samplings)

    @property
    def prompt_tokens(self) -> int:
        """Each prompt counts once, however many choices it has."""
        return sum(map(len, self.prompts))

    def prompt_of(self, choice: int) -> Sequence[int]:
        """The prompt that a choice goes on with."""
        return self.prompts[choice // self.per_prompt]

    def goes_on_from(self, choice: int) -> Sequence[int]:
        """The tokens whose text the answer's goes on with; a chat's answer begins a text of its own."""
        return self.prompt_of(choice)[-BEFORE:] if self.goes_on else ()


class Reader:
    """Reads requests for one base. May be used from several threads."""

    def __init__(self, base: Base, limits: LimitsConfig) -> None:
        self.base, self.limits = base, limits
        self.vocabulary = int(base.module.config.get_text_config().vocab_size)
        self._eos = _eos(base)

    @cached_property
    def grammars(self) -> Grammars:
        """Made when first asked for: what it needs is loaded then."""
        return Grammars(self.base.tokenizer, self.vocabulary)

    def chat(self, asked: ChatRequest, template: ChatTemplate) -> Prepared:
        """Raises ApiError (400) that names the field."""
        if template.jinja is None:
            raise ApiError(
                400, "this model has no chat template, so it can't be put messages to; ask /v1/completions, or start "
                "the server with --chat-template", "messages",
            )  # fmt: skip
        variables = _variables(asked)
        messages = _messages(asked.messages)
        with refusal("tools"):
            specs = read_specs([tool.model_dump(exclude_none=True) for tool in asked.tools or ()])
        with refusal("tool_choice"):
            given = asked.tool_choice
            choice = read_choice(given if given is None or isinstance(given, str) else given.model_dump(), specs)
        use = ToolUse(template, specs, choice, asked.parallel_tool_calls is not False)
        with refusal("messages"):
            prompt = use.prompt_ids(messages, variables, bool(asked.continue_final_message))
        ends = self._ends(asked, stop_ids(template))
        logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(400, "top_logprobs goes with logprobs: true", "top_logprobs")
        most = asked.max_completion_tokens or asked.max_tokens or self.limits.default_max_tokens
        samplings = self._samplings(asked, [prompt], most, logprobs, "messages")
        constraints = [self._constraint(asked, ends, use) for _ in samplings]
        return Prepared(
            [prompt], asked.n or 1, ends, samplings, constraints, _stops(asked), bool(asked.include_stop_str_in_output),
            use.shown, use, bool(asked.continue_final_message),
        )  # fmt: skip

    def completion(self, asked: CompletionRequest) -> Prepared:
        """Raises ApiError (400) that names the field."""
        if asked.echo and asked.logprobs is not None:
            raise ApiError(400, "logprobs of the prompt (echo) are not to be had; leave one of them out", "logprobs")
        prompts, texts = self._prompts(asked)
        ends = self._ends(asked, self._eos)
        most = asked.max_tokens if asked.max_tokens is not None else COMPLETION_TOKENS
        samplings = self._samplings(asked, prompts, most, asked.logprobs, "prompt")
        constraints = [self._constraint(asked, ends, None) for _ in samplings]
        return Prepared(
            prompts, asked.n or 1, ends, samplings, constraints, _stops(asked), bool(asked.include_stop_str_in_output),
            texts=texts,
        )  # fmt: skip

    def _prompts(self, asked: CompletionRequest) -> tuple[list[list[int]], list[str]]:
        """Token ids, and the texts where they are to be repeated."""
        given: Any = asked.prompt
        several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        special = asked.add_special_tokens is not False
        prompts = [self._ids(one, special) if isinstance(one, str) else self._checked(one) for one in several]
        if not asked.echo:
            return prompts, []
        return prompts, [one if isinstance(one, str) else self.base.text(list(one)) for one in several]

    def _ids(self, text: str, special: bool) -> list[int]:
        return list(self.base.tokenizer(text, add_special_tokens=special, return_attention_mask=False)["input_ids"])

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        if wrong := next((token for token in tokens if token >= self.vocabulary), None):
            raise ApiError(400, f"prompt has the token {wrong}; this model's are 0 to {self.vocabulary - 1}", "prompt")
        return list(tokens)

    def _ends(self, asked: Asked, usual: Collection[int]) -> frozenset[int]:
        own = frozenset(asked.stop_token_ids or ())
        if wrong := next((token for token in own if token >= self.vocabulary), None):
            told = f"stop_token_ids has {wrong}; this model's tokens are 0 to {self.vocabulary - 1}"
            raise ApiError(400, told, "stop_token_ids")
        return own if asked.ignore_eos else own | frozenset(usual) | self._eos

    def _samplings(
        self, asked: Asked, prompts: Sequence[Sequence[int]], most: int | None, logprobs: int | None, param: str
    ) -> list[Sampling]:
        """One for each choice. Raises ApiError for a prompt that leaves no room, and for too many choices."""
        count = asked.n or 1
        if count * len(prompts) > self.limits.choices:
            field = "n" if count > self.limits.choices or len(prompts) == 1 else param
            told = f"{count * len(prompts)} answers are asked for, and one request may ask for {self.limits.choices}"
            raise ApiError(400, told, field)
        for prompt in prompts:
            self._check_room(len(prompt), param)
        seed = asked.seed if asked.seed is not None else randbits(63)
        made = []
        for prompt in prompts:
            room = self.base.context_length - len(prompt)
            new = min(most or room, self.limits.max_tokens or room, room)
            for choice in range(count):
                made.append(
                    self._sampling(asked, seed if choice == 0 else hashed(seed, choice, bits=63), new, logprobs)
                )
        return made

    def _sampling(self, asked: Asked, seed: int, most: int, logprobs: int | None) -> Sampling:
        bias = tuple(sorted((int(token), value) for token, value in (asked.logit_bias or {}).items()))
        if bias and bias[-1][0] >= self.vocabulary:
            told = f"logit_bias has the token {bias[-1][0]}; this model's are 0 to {self.vocabulary - 1}"
            raise ApiError(400, told, "logit_bias")
        if (asked.min_tokens or 0) > most:
            raise ApiError(400, f"min_tokens is {asked.min_tokens}, and the answer may have {most}", "min_tokens")
        return Sampling(
            max_new_tokens=most,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=asked.top_p or 1.0,
            seed=seed,
            # OpenAI's range of top_p begins at 0, the likeliest alone
            top_k=1 if asked.top_p == 0 else max(0, asked.top_k or 0),
            min_p=asked.min_p or 0.0,
            repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
            presence_penalty=asked.presence_penalty or 0.0,
            frequency_penalty=asked.frequency_penalty or 0.0,
            bias=bias,
            min_new_tokens=asked.min_tokens or 0,
            logprobs=logprobs,
        )

    def _check_room(self, length: int, param: str) -> None:
        if length >= self.base.context_length:
            raise ApiError(
                400, f"the prompt has {length} tokens, and this model's context is {self.base.context_length} with the "
                "answer; send fewer", param, "context_length_exceeded",
            )  # fmt: skip
        if length == 0:
            raise ApiError(400, "the prompt has no tokens; send some text", param)

    def _constraint(self, asked: Asked, ends: Collection[int], use: ToolUse | None) -> Constraint | None:
        """A call that has to come goes before a format."""
        if use is not None:
            with refusal("tools"):
                constraint = use.constraint(self.grammars, ends)
            if constraint is not None:
                return constraint
        wanted = asked.response_format
        if wanted is None or wanted.type == "text":
            return None
        with refusal("response_format"):
            if isinstance(wanted, SchemaFormat):
                return self.grammars.json_schema(wanted.json_schema.schema_, ends)
            return self.grammars.json_object(ends)


def is_long(asked: Asked) -> bool:
    """Whether reading it takes so long that others would wait."""
    if asked.response_format is not None and asked.response_format.type != "text":
        return True
    if isinstance(asked, ChatRequest):
        return bool(asked.tools) or sum(_length(message) for message in asked.messages) > LONG
    prompt = asked.prompt if isinstance(asked, CompletionRequest) else ""
    return (len(prompt) if isinstance(prompt, str) else sum(len(p) for p in prompt if not isinstance(p, int))) > LONG


def _length(message: ChatMessage) -> int:
    content = message.content
    return len(content) if isinstance(content, str) else sum(len(_part(part)) for part in content or ())


def _part(part: Any) -> str:
    return str(part.refusal if isinstance(part, RefusalPart) else part.text)


def _messages(given: Sequence[ChatMessage]) -> Sequence[Message]:
    """As the template is given them."""
    plain = []
    for message in given:
        values = message.model_dump(exclude_none=True)
        if not isinstance(message.content, str | None):
            values["content"] = "".join(_part(part) for part in message.content)
        plain.append(values)
    try:
        return read_messages(plain, "messages")
    except RowProblem as problem:
        raise ApiError(400, str(problem), "messages") from problem


def _variables(asked: ChatRequest) -> Mapping[str, Any]:
    """What the template reads beside messages and tools."""
    variables = dict(asked.chat_template_kwargs or {})
    if wrong := next((name for name in variables if name in RESERVED), None):
        raise ApiError(
            400,
            f"chat_template_kwargs may not have {wrong!r}; it is set by the server",
            f"chat_template_kwargs.{wrong}",
        )
    if asked.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", asked.reasoning_effort)
    last = asked.messages[-1].role
    if asked.continue_final_message and (last != "assistant" or asked.add_generation_prompt):
        told = f"it goes on with the assistant's last message, and the last is the {last}'s"
        if last == "assistant":
            told = "add_generation_prompt would open another turn; leave it out"
        raise ApiError(400, f"continue_final_message: {told}", "continue_final_message")
    if asked.add_generation_prompt is False and not asked.continue_final_message:
        told = "add_generation_prompt: false goes with continue_final_message: true; else nobody's turn is open"
        raise ApiError(400, told, "add_generation_prompt")
    return variables


def _stops(asked: Asked) -> Sequence[str]:
    return () if asked.stop is None else (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)


def _eos(base: Base) -> frozenset[int]:
    """The tokenizer's, and those that the model's own settings name."""
    found: list[Any] = [base.tokenizer.eos_token_id]
    for config in (getattr(base.module, "generation_config", None), base.module.config.get_text_config()):
        own = getattr(config, "eos_token_id", None)
        found += own if isinstance(own, list) else [own]
    return frozenset(token for token in found if isinstance(token, int))
