"""What a merged model is compared on, and the tokenizer that goes with it: all that is read before the weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from topwork.common.errors import TopworkError
from topwork.data.chat.template import ChatTemplate, stop_ids
from topwork.data.config import DataConfig
from topwork.data.examples import Data, load_data
from topwork.models.tokenizer import open_tokenizer
from topwork.run.folder import data_of
from topwork.run.given import Given
from topwork.run.own_rows import load_own

Log = Callable[[str], None]


@dataclass(frozen=True)
class Inputs:
    """The tokenizer, what its folder gets as a chat template (None: its own), the tokens that end a turn, sequences of
    token ids, and where they are from, for people."""

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    end_ids: list[int]
    sequences: list[list[int]]
    source: str


def merge_inputs(adapter: Given, count: int, data: str | None, log: Log) -> Inputs:
    """Up to `count` sequences: of `data`; else a run's held-out rows, then its training rows; else, for an adapter
    alone and where a run's rows are gone, texts that Topwork brings. Raises DataError for `data` that is not there."""
    tokenizer, context_length = open_tokenizer(adapter.model, log)
    if adapter.recipe is None:
        tokenizer = own_tokenizer(adapter.folder, tokenizer, log)
        config = DataConfig(train=data or "")
    else:
        config = data_of(adapter.place, adapter.recipe)
        config = config.reading(data) if data is not None else config
    template = ChatTemplate.from_config(tokenizer, config)
    ends = sorted(stop_ids(template))
    bare = Inputs(tokenizer, template.jinja, ends, [], "")
    if not count:
        return bare
    if adapter.recipe is None and data is None:
        return _of_topwork(bare, count, " (--data names rows like those that the adapter was trained on)")
    seed = adapter.recipe.training.seed if adapter.recipe else 0
    try:
        loaded = _loaded(config, tokenizer, context_length, seed, whole=data is not None)
    except (TopworkError, OSError) as error:
        if data is not None:
            raise
        brought = _of_topwork(bare, count, ", as the run's own rows cannot be read")
        log(f"compared on {brought.source} ({str(error).splitlines()[0]}); --data names others")
        return brought
    rows = [example.tokens.tolist() for example in islice(chain(loaded.eval, loaded.train), count)]
    source = data or f"{min(len(loaded.eval), count)} held-out and {max(0, len(rows) - len(loaded.eval))} training rows"
    return Inputs(tokenizer, loaded.template.jinja, sorted(stop_ids(loaded.template)), rows, source)


def _loaded(config: DataConfig, tokenizer: PreTrainedTokenizerBase, room: int, seed: int, whole: bool) -> Data:
    """The rows that were named, `whole`, or of a run's own those that are there."""
    if whole:
        return load_data(config, tokenizer, room, seed, lambda _: None)
    return load_own(config, tokenizer, room, seed)


def _of_topwork(bare: Inputs, count: int, why: str) -> Inputs:
    texts = [list(bare.tokenizer(text).input_ids) for text in TEXTS[:count]]
    return replace(bare, sequences=texts, source=f"{len(texts)} texts that Topwork brings{why}")


def own_tokenizer(folder: Path, base: PreTrainedTokenizerBase, log: Log) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside an adapter, whose chat template is the one that it was trained with; the base's
    where there is none that can be read."""
    if not (folder / "tokenizer_config.json").is_file():
        return base
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        log(f"the tokenizer in {folder} cannot be read ({str(error).splitlines()[0]}); the base's is taken")
        return base
    if len(found) > len(base):
        log(f"the adapter's tokenizer has {len(found)} tokens, the base's {len(base)}; the adapter's is written")
    found.model_max_length = min(found.model_max_length, base.model_max_length)
    return found


TEXTS = (
    "The old lighthouse keeper climbed the stairs every evening, lit the lamp and wrote the weather into his book.",
    "Once upon a time there was a little girl named Lily. She loved to play in the park with her dog.",
    "Water boils at 100 degrees Celsius at sea level. On a high mountain it boils sooner, because the air is thinner.",
    "Question: What is the capital of France?\nAnswer: The capital of France is Paris.",
    "def area(width, height):\n    \"\"\"Width times height.\"\"\"\n    return width * height\n",
    '{"name": "kettle", "price": 24.9, "tags": ["kitchen", "steel"], "in_stock": true}',
    "Dear Sir or Madam,\n\nmy order 4711 has not arrived yet. Could you tell me where it is?\n\nKind regards",
    "SELECT city, COUNT(*) FROM orders WHERE total > 100 GROUP BY city ORDER BY 2 DESC;",
    "Translate to German: Good morning, how are you today?\nGuten Morgen, wie geht es Ihnen heute?",
    "If a train leaves at 9:15 and travels for two and a half hours, it arrives at 11:45.",
    "Der Fluss fließt langsam durch das Tal, und am Abend steigt Nebel aus den Wiesen.",
    "La bibliothèque ouvre à neuf heures, sauf le lundi, où elle reste fermée toute la journée.",
    "El mercado está lleno de fruta, pan y flores los sábados por la mañana.",
    "The committee approved the budget, although two members objected that the schools would receive too little.",
    "Ingredients: 200 g flour, 2 eggs, 300 ml milk, a pinch of salt. Mix, let it rest, and fry thin pancakes.",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer.",
    "| year | sales |\n|------|-------|\n| 2023 | 1,204 |\n| 2024 | 1,377 |",
    "Review: The battery lasts two days, but the screen is too dark outside. Three stars.",
    "Photosynthesis turns carbon dioxide and water into sugar and oxygen with the energy of light.",
    "<html><body><h1>Welcome</h1><p>This page is under construction.</p></body></html>",
    "He opened the door slowly. \"Is anybody there?\" he asked. Nobody answered, but a floorboard creaked.",
    "The heart pumps about five litres of blood a minute through the body of an adult at rest.",
    "for i in range(10):\n    if i % 2 == 0:\n        print(i, 'is even')\n",
    "Terms: payment within 30 days; late payments bear interest at 5 percent above the base rate.",
)  # fmt: skip
"""Plain texts of several kinds and languages, for adapters of which nobody knows what they were trained on."""
