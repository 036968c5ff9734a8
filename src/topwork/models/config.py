"""What a recipe may say about the base model."""

from typing import Literal, Self

from pydantic import Field, model_validator

from topwork.common.options import Options


class ModelConfig(Options):
    model_name_or_path: str
    """An alias (`smollm2-135m`), a Hub id, a local folder, or a `.gguf` file."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    """The type in which the frozen base is held and multiplied; `auto` takes the checkpoint's."""
    revision: str | None = None
    """A branch, tag or commit on the Hub."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships. Off unless you ask for it."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    new_tokens: list[str] = Field(default_factory=list)
    """Tokens that the tokenizer gets beside its own, each read as one wherever it stands in a text. Embedding and head
    get a row for each, which begins as the mean of the others and is trained."""
    tokenizer_name_or_path: str | None = None
    """Another tokenizer than the base's own, a folder or a Hub id: the base's with further tokens. Those beyond the
    base's rows are new tokens."""
    vocabulary_size: int | None = Field(None, ge=1)
    """How many rows embedding and head have at least, as an adapter needs it whose vocabulary grew elsewhere."""
    pad_to_multiple_of: int | None = Field(None, ge=1)
    """Round the rows of embedding and head up to a multiple of this, as some cards and servers like it."""

    @model_validator(mode="after")
    def _each_token_once(self) -> Self:
        wrong = next((token for token in self.new_tokens if not token or self.new_tokens.count(token) > 1), None)
        if wrong is not None:
            raise ValueError(f"new_tokens names {wrong!r} {'more than once' if wrong else 'as a token'}")
        return self

    @property
    def grows(self) -> bool:
        """Whether it may ask for more rows than the base's weights have."""
        asked = (self.new_tokens, self.tokenizer_name_or_path, self.vocabulary_size, self.pad_to_multiple_of)
        return any(asked)
