"""What an answer has to obey: JSON, a JSON schema, a regular expression, one of some texts, tool calls."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from topwork.generation.requests import Constraint


class Grammars:
    """Makes constraints for one tokenizer. May be used from several threads; a constraint belongs to one request.

    vocabulary  columns of the logits, which may be more than the tokenizer has tokens
    stop_ids (of each method)  the tokens that end the answer: they may come when what it obeys is complete, not before
    All methods raise RequestError for what cannot be held, in bounded time.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        raise NotImplementedError

    def json_object(self, stop_ids: Collection[int]) -> Constraint:
        """Any JSON object."""
        raise NotImplementedError

    def json_schema(self, schema: Mapping[str, Any] | bool, stop_ids: Collection[int]) -> Constraint:
        """JSON by a schema; one with keywords that cannot be held is refused by their name."""
        raise NotImplementedError

    def regex(self, pattern: str, stop_ids: Collection[int]) -> Constraint:
        """Text that a regular expression matches whole."""
        raise NotImplementedError

    def choice(self, options: Sequence[str], stop_ids: Collection[int]) -> Constraint:
        """One of these texts."""
        raise NotImplementedError


def check_json(text: str, schema: Mapping[str, Any] | bool) -> str | None:
    """Why a finished text is no JSON that obeys the schema; None where it does."""
    raise NotImplementedError
