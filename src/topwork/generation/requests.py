"""What the engine is asked for, and what it tells."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from topwork.generation.sampling import Sampling

Ended = Literal["stop", "length", "cancelled", "failed"]


class Constraint(Protocol):
    """What may come next of one answer (`generation/grammar.py`). It belongs to one request and moves with it."""

    def allowed(self) -> "np.ndarray | None":
        """A bit for each token of the vocabulary (int32 words, lowest bit first): whether it may come next. None where
        all may."""
        ...

    def accept(self, token: int) -> None:
        """This token came."""
        ...

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        ...


@dataclass(frozen=True)
class Request:
    """A prompt's token ids, the adapter that is to go on with them, the tokens that end it, and how the others are
    chosen.

    adapter     a grafted adapter's name; None is the bare base
    constraint  what its tokens have to obey
    salt        requests of different salts share no cached prompts (a tenant's own)
    share       whose turn it is, where several wait: those of one share stand in one line, the lines take turns
    """

    prompt: Sequence[int]
    adapter: str | None = None
    stop_ids: Collection[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    constraint: Constraint | None = None
    salt: str = ""
    share: str = ""


@dataclass(frozen=True)
class Event:
    """What a step brought for the request of this id: a token, its end, or both.

    ended        None while it goes on; "stop" at a stop token (which is not told) or where its constraint is complete;
                 "length" with the last token that its Sampling or the model's context has room for; "cancelled";
                 "failed", with `error`
    logprob      the token's log-probability before temperature and cuts, where the Sampling asks for it
    likeliest    as many (token, log-probability) as it asks for, likeliest first
    began        when its prompt began to be read, as time.monotonic has it; told with its first token
    """

    id: int
    token: int | None = None
    ended: Ended | None = None
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()
    began: float | None = None
    error: str | None = None
