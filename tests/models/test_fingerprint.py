"""A fingerprint tells bases apart and does not see in what type one was loaded."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from topwork.models.fingerprint import fingerprint


class Tied(nn.Module):
    """Two names for one weight, or two weights of the same values."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding.from_pretrained(torch.randn(300, 16, generator=generator), freeze=False)
        self.head = nn.Linear(16, 300, bias=False)
        self.head.weight = self.embed.weight if tied else nn.Parameter(self.embed.weight.detach().clone())
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("table", torch.ones(3))


def test_the_same_in_every_float_type() -> None:
    assert fingerprint(Tied()) == fingerprint(Tied().to(torch.bfloat16)) == fingerprint(Tied().to(torch.float64))
    assert fingerprint(Tied()).startswith("sha256:")
    assert len(fingerprint(Tied())) == 7 + 64


def test_bf16_checkpoint_read_as_float32(small_llama: Path, tmp_path: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(small_llama, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert whole.dtype == torch.float32
    assert fingerprint(whole) == fingerprint(half) == fingerprint(AutoModelForCausalLM.from_pretrained(small_llama))


def test_tied_weights_count_once() -> None:
    assert fingerprint(Tied()) != fingerprint(Tied(tied=False))
    alone = Tied()
    del alone.head
    assert fingerprint(alone) == fingerprint(Tied())


@pytest.mark.parametrize("place", [(0, 0), (299, 15)])
def test_other_values_give_another(place: tuple[int, int]) -> None:
    changed = Tied()
    with torch.no_grad():
        changed.embed.weight[place] += 1.0
    assert fingerprint(changed) != fingerprint(Tied())


def test_a_small_change_everywhere_is_seen() -> None:
    changed = Tied()
    with torch.no_grad():
        changed.embed.weight.add_(torch.randn(300, 16) * 1e-3)
    assert fingerprint(changed) != fingerprint(Tied())


def test_names_and_shapes_count() -> None:
    renamed, reshaped = Tied(), Tied()
    renamed.factor = renamed.scale
    del renamed.scale
    reshaped.scale = nn.Parameter(torch.tensor([2.0]))
    assert len({fingerprint(module) for module in (Tied(), renamed, reshaped)}) == 3


def test_neither_buffers_nor_layout_nor_freezing_count() -> None:
    changed = Tied().requires_grad_(False)
    changed.table.add_(1)
    transposed = changed.embed.weight.detach().T.contiguous().T
    assert not transposed.is_contiguous()
    changed.embed.weight = changed.head.weight = nn.Parameter(transposed)
    assert fingerprint(changed) == fingerprint(Tied())


def test_weights_are_not_copied() -> None:
    """A weight of 2^50 values of one stored number: any copy of it would fail."""
    huge = nn.Module()
    huge.weight = nn.Parameter(torch.ones(1).expand(2**25, 2**25))
    assert fingerprint(huge).startswith("sha256:")
