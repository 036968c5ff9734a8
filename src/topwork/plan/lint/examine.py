"""From a recipe, or from data that are loaded already, to what the rules look at."""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from topwork.common.errors import DataError
from topwork.data.chat.chosen import adds_bos
from topwork.data.chat.template import ChatTemplate, stop_ids
from topwork.data.config import DataConfig, Sources, paths_of
from topwork.data.conversations import BadRow, Conversation
from topwork.data.examples import Data, Example
from topwork.data.files.sources import with_held_out
from topwork.data.parts import Part, read_parts
from topwork.plan.lint.examined import EMPTY, Examined, Facts, Sequences, Side
from topwork.recipe.recipe import Recipe

AT_ONCE = 500
"""Conversations that are rendered together: enough for the tokenizer's threads, few enough for their texts' memory."""
STREAMED = 100_000
"""Rows that are looked at of a set that is streamed, because it may be larger than memory."""


def examine(recipe: Recipe, tokenizer: Any, context_length: int, trainable: int | None) -> Examined:
    """Read and encode everything that a recipe names. A bad row is kept as such and never ends it.

    Raises DataError for what cannot be read at all.
    """
    config = with_held_out(recipe.data)
    template = template_of(config, tokenizer)
    first = STREAMED if config.streaming else None
    limits = [limit for limit in (config.max_rows, first) if limit is not None]
    train = _side("train", config.train, config, min(limits, default=None))
    evaluation = None if config.eval is None else _side("eval", config.eval, config, first)
    scored = recipe.evaluation.data
    asked = None if scored is None else config.reading(scored)
    test = None if asked is None else _side("test", asked.train, asked, first)
    found = Examined(
        recipe, tokenizer, facts_of(tokenizer, template), template, context_length,
        min(config.max_length, context_length - recipe.adapter.virtual_tokens), train, evaluation, test, trainable,
        only_first=first if first is not None and train.rows >= first else None,
    )  # fmt: skip
    try:
        template.survey(train.conversations)  # by these alone, as in training
        train = _encoded(train, template, config)
        template.survey(evaluation.conversations if evaluation else ())
        evaluation = None if evaluation is None else _encoded(evaluation, template, config)
    except DataError as error:
        return replace(found, refused=str(error))
    return replace(found, train=train, eval=evaluation)


def examine_loaded(recipe: Recipe, data: Data, tokenizer: Any, room: int, trainable: int | None) -> Examined:
    """The same of what `load_data` gave; its rows are used as they are, and nothing is read or encoded again.

    Rows that were dropped, and sequences that were cut, are no longer there. `room` is what the context has for text.
    """
    config, limit = recipe.data, min(recipe.data.max_length, room)
    cut = limit if config.too_long in ("truncate", "split") else None
    train = _loaded("train", called(config.train), data.train_conversations, data.train, cut)
    named = "the validation split" if config.eval is None else called(config.eval)
    named = "the rows held out" if data.summary.held_out else named
    evaluation = _loaded("eval", named, data.eval_conversations, data.eval, cut) if data.eval else None
    return Examined(
        recipe, tokenizer, facts_of(tokenizer, data.template), data.template, room, limit, train, evaluation, None,
        trainable,
    )  # fmt: skip


def template_of(config: DataConfig, tokenizer: Any) -> ChatTemplate:
    """The template that training takes."""
    return ChatTemplate.from_config(tokenizer, config)


def facts_of(tokenizer: Any, template: ChatTemplate) -> Facts:
    """What a tokenizer and a template say."""
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()), None)
    try:
        ends = frozenset(stop_ids(template))
    except DataError:  # it renders no conversation at all, which encoding tells
        ends = frozenset({tokenizer.eos_token_id} - {None})
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = {**added, **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))}
    return Facts(
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, adds_bos(tokenizer), ends,
        {text: index for text, index in special.items() if text.strip()}, own,
    )  # fmt: skip


# Reading


def called(named: Sources) -> str:
    """Sources by their names alone; those on disk without their folders."""
    return ", ".join(Path(each).name if Path(each).exists() else each for each in paths_of(named))


def _side(name: str, named: Sources, config: DataConfig, max_rows: int | None) -> Side:
    """Rows and conversations; what was read from the files themselves is let go."""
    parts: list[Part] = read_parts(config, named, max_rows)
    return Side(
        name, called(named), sum(len(part.rows) for part in parts),
        [row for part in parts for row in part.conversations], [row for part in parts for row in part.bad],
        formats=tuple(dict.fromkeys(part.format.sentence for part in parts)),
        remarks=tuple(dict.fromkeys(remark for part in parts for remark in part.notes)),
        notes=[(row.source, note) for part in parts for row in part.conversations for note in row.notes],
    )  # fmt: skip


def _encoded(side: Side, template: ChatTemplate, config: DataConfig) -> Side:
    """The side with its sequences; rows that the template refuses are bad from now on."""
    bad, notes, gathered = list(side.bad), list(side.notes), _Gathered()
    for start in range(0, len(side.conversations), AT_ONCE):
        chunk = side.conversations[start : start + AT_ONCE]
        encoded, refused = template.encode_all(chunk, config.train_on)
        named = {row.source for row in refused}
        bad += refused
        for number, (row, sequences) in enumerate(zip(chunk, encoded), start):
            if row.source in named:
                continue
            if not any(any(sequence.weights) for sequence in sequences):
                bad.append(BadRow(row.source, "nothing to learn: no token of it carries a weight"))
                continue
            for sequence in sequences:
                gathered.add(number, sequence.tokens, sequence.weights)
            notes += [(row.source, note) for note in dict.fromkeys(n for s in sequences for n in s.notes)]
    return replace(side, bad=bad, notes=notes, sequences=gathered.sequences())


class _Gathered:
    """Sequences on their way into four arrays, which grow where they are: nothing of it is held twice."""

    def __init__(self) -> None:
        self.tokens, self.weights = bytearray(), bytearray()
        self.lengths: list[int] = []
        self.rows: list[int] = []

    def add(self, row: int, tokens: Any, weights: Any) -> None:
        self.tokens += np.asarray(tokens, np.int32).data
        self.weights += np.asarray(weights, np.float32).data
        self.lengths.append(len(tokens))
        self.rows.append(row)

    def sequences(self) -> Sequences:
        if not self.rows:
            return EMPTY
        bounds = np.concatenate(([0], np.cumsum(self.lengths))).astype(np.int64)
        tokens, weights = np.frombuffer(self.tokens, np.int32), np.frombuffer(self.weights, np.float32)
        return Sequences(tokens, weights, bounds, np.asarray(self.rows, np.int32))


def _loaded(
    name: str, named: str, conversations: Sequence[Conversation], examples: Sequence[Example], cut: int | None
) -> Side:
    """Conversations are chats alone there: a row of plain text is known by a digest of its tokens in its text's place.

    cut  sequences of so many tokens are pieces of something longer, whose beginning or end is elsewhere or nowhere
    """
    known = {row.source: number for number, row in enumerate(conversations)}
    texts: dict[str, Any] = {}
    for example in examples:
        if example.source not in known:
            texts.setdefault(example.source, blake2b(digest_size=12)).update(example.tokens.tobytes())
    rows = [*conversations, *(Conversation((), None, name, "text", text.hexdigest()) for name, text in texts.items())]
    known = {row.source: number for number, row in enumerate(rows)}
    pieces = {example.source for example in examples if cut is not None and len(example.tokens) >= cut}
    gathered = _Gathered()
    for example in examples:
        if example.source not in pieces:
            gathered.add(known[example.source], example.tokens, example.weights)
    return Side(name, named, len(rows), rows, sequences=gathered.sequences())
