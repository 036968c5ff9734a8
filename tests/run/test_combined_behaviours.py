"""What a combination does is seen in what it says: three habits of a base that only repeats, added and taken away.

Each token has a direction of its own in the base, and a habit is a LoRA that says which word follows which, written by
hand: nothing is trained, so nothing depends on a seed or a machine. What trained adapters keep is
benchmarks/combine_tasks.py's to measure.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reference.families import tiny_model
from topwork.adapters.config import AdapterConfig
from topwork.adapters.graft import Adapters
from topwork.adapters.peft_format import BaseId, load_adapter, read_adapter, write_adapter
from topwork.generation.engine import generate
from topwork.generation.sampling import Sampling
from topwork.models.base import Base
from topwork.models.load import load_base
from topwork.run.combine import combine

END = "<end>"
WORDS = (
    END,
    "weather?",
    "it",
    "rains",
    "price?",
    "nine",
    "euros",
    "Tess",
    "hello?",
    "hi",
    "?",
    ".",
    "a",
    "b",
    "c",
    "d",
)
HABITS: dict[str, dict[str, tuple[str, float]]] = {
    "weather": {"weather?": ("it", 1), "it": ("rains", 1), "rains": (END, 1)},
    "price": {"price?": ("nine", 1), "nine": ("euros", 1), "euros": (END, 1)},
    "signer": {"hello?": ("hi", 1), "hi": ("Tess", 2), "rains": ("Tess", 2), "euros": ("Tess", 2), "Tess": (END, 1)},
}
"""After which word which one comes, and how strongly."""
ASKED = ("weather?", "price?", "hello?")
QUIET = {"weather?": "it rains", "price?": "nine euros"}
SIGNED = {"weather?": "it rains Tess", "price?": "nine euros Tess", "hello?": "hi Tess"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base, and a PEFT folder for each habit, of unequal ranks and scales."""
    folder = tmp_path_factory.mktemp("habits")
    _write_base(folder / "base")
    base = load_base(str(folder / "base"), _quiet)
    for scale, (name, follows) in zip((2.0, 0.5, 1.0), HABITS.items()):
        _write_habit(folder / name, base, follows, scale)
    return folder


def _write_base(folder: Path) -> None:
    """It says the word that it read, again and again."""
    size = len(WORDS)
    model = tiny_model(
        "llama", vocab_size=size, hidden_size=size, intermediate_size=size, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
            elif "o_proj" in name or "down_proj" in name:
                parameter.zero_()
            elif "self_attn" not in name:  # embedding, gate, up, head
                parameter.copy_(torch.eye(size))
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END).save_pretrained(folder)


def _write_habit(folder: Path, base: Base, follows: Mapping[str, tuple[str, float]], scale: float) -> None:
    adapters = Adapters(base.module)
    rank = len(follows)
    config = AdapterConfig(r=rank, lora_alpha=scale * rank, target_modules=["down_proj"])
    adapters.add("habit", config)
    a, b = torch.zeros(rank, len(WORDS)), torch.zeros(len(WORDS), rank)
    for row, (word, (following, strength)) in enumerate(follows.items()):
        a[row, WORDS.index(word)], b[WORDS.index(following), row] = 1, strength / scale
    own = {"lora_A": a, "lora_B": b}
    with torch.no_grad():
        for name, parameter in adapters.parameters("habit").items():
            parameter.copy_(next(values for part, values in own.items() if part in name))
    write_adapter(folder, adapters, "habit", BaseId(base.name, base.fingerprint))
    adapters.remove("habit")


def _said(place: Path, folder: Path | None, words: Sequence[str] = ASKED) -> dict[str, str]:
    """Greedy answers, of at most four words."""
    base = load_base(str(place / "base"), _quiet)
    name = None
    if folder is not None:
        name = "combined"
        load_adapter(Adapters(base.module), name, read_adapter(folder), BaseId(base.name, base.fingerprint))
    prompts = [[WORDS.index(word)] for word in words]
    answers = generate(base, prompts, [name] * len(prompts), [0], Sampling(max_new_tokens=4))
    return {word: " ".join(WORDS[token] for token in answer) for word, answer in zip(words, answers, strict=True)}


def _quiet(_: str) -> None:
    """Nobody reads along."""


def test_each_habit_alone_and_the_base_without(place: Path) -> None:
    assert _said(place, None) == {word: " ".join([word] * 4) for word in ASKED}
    assert _said(place, place / "weather", ["weather?"]) == {"weather?": QUIET["weather?"]}
    assert _said(place, place / "weather", ["price?"]) == {"price?": "price? price? price? price?"}
    assert _said(place, place / "signer", ["hello?"]) == {"hello?": SIGNED["hello?"]}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cat", {}),
        ("task-arithmetic", {}),
        ("linear", {}),  # half of each still says it loudest
        ("svd", {"rank": 11}),
        ("ties", {"density": [1]}),
        ("dare", {"density": [1]}),
        ("dare-ties", {"density": [1]}),
        ("magnitude-prune", {"density": [1]}),
        ("breadcrumbs", {"density": [1], "gamma": 0.0}),
        ("knots", {"density": [1]}),
    ],
)
def test_a_sum_has_all_habits(place: Path, tmp_path: Path, method: str, options: dict[str, object]) -> None:
    combine([place / name for name in HABITS], tmp_path / "all", method, log=_quiet, **options)  # type: ignore[arg-type]
    assert _said(place, tmp_path / "all") == SIGNED


def test_the_signature_is_taken_away_again_and_the_tasks_stay(place: Path, tmp_path: Path) -> None:
    combine([place / name for name in HABITS], tmp_path / "signed", log=_quiet)
    combine([tmp_path / "signed", place / "signer"], tmp_path / "quiet", weights=[1, -1], log=_quiet)
    assert _said(place, tmp_path / "quiet", list(QUIET)) == QUIET
    assert _said(place, tmp_path / "quiet", ["hello?"]) == {"hello?": "hello? hello? hello? hello?"}
