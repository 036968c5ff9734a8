"""What drops at random: of the seed, the module and the source alone, each entry with the chance it should have."""

import math

import pytest
import torch

from topwork.common.errors import RequestError
from topwork.merging.combine import masks
from topwork.merging.combine.entrywise import chances

DRAWS = 40_000
FAR = 5
"""Standard errors; the seed is given, so a test passes always or never."""


def test_they_depend_on_nothing_else() -> None:
    deltas = torch.zeros(2, 50, 41)
    shares, contents = (0.3, 0.6), ("a", "b")

    def drawn(order: tuple[int, ...] = (0, 1), seed: int = 0, path: str = "layers.0") -> torch.Tensor:
        made = [masks.generator(seed, path, contents[i]) for i in order]
        return masks.at_random(deltas, [shares[i] for i in order], made)

    first = drawn()
    assert torch.equal(drawn((1, 0)), first.flip(0))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(drawn(), first)
    finally:
        torch.set_num_threads(before)
    for other in (drawn(seed=1), drawn(path="layers.1")):
        assert 0.3 < (other == first).double().mean() < 0.7
    # the two sources' draws have nothing to do with one another
    both = (first[0] & first[1]).double().mean()
    assert abs(both - 0.18) < FAR * math.sqrt(0.18 * 0.82 / first[0].numel())


def test_the_bits_of_one_mask() -> None:
    """A combination made again elsewhere, or by a later release, is the same."""
    found = masks.at_random(torch.zeros(1, 2, 16), [0.5], [masks.generator(7, "model.layers.0.q_proj", "content")])
    assert "".join(str(int(bit)) for bit in found.flatten()) == "11111100001010110100101101100001"


@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
def test_the_share_that_is_kept(density: float) -> None:
    found = masks.at_random(torch.zeros(1, 200, DRAWS // 200), [density], [masks.generator(0, "layer", "a")])
    kept = float(found.double().mean())
    assert abs(kept - density) < FAR * math.sqrt(density * (1 - density) / DRAWS)


def test_a_density_of_one_keeps_all() -> None:
    deltas = torch.randn(1, 50, 40)
    assert masks.at_random(deltas, [1.0], [masks.generator(0, "layer", "a")]).all()
    assert masks.by_rank(deltas, [1.0], [masks.generator(0, "layer", "a")]).all()


def test_large_entries_stay_likelier() -> None:
    deltas = torch.linspace(-1, 1, 8)[torch.randperm(8)].repeat(1, DRAWS // 8, 1)
    expected = chances(deltas[0], 0.4, 0.2)[0]
    found = masks.by_rank(deltas, [0.4], [masks.generator(0, "layer", "a")], 0.2)[0].double().mean(0)
    assert sorted(round(float(value), 4) for value in expected) == [
        0.2, 0.2571, 0.3143, 0.3714, 0.4286, 0.4857, 0.5429, 0.6,
    ]  # fmt: skip
    assert ((found - expected).abs() < FAR * (0.25 / (DRAWS / 8)) ** 0.5).all()


def test_chances_that_are_none() -> None:
    with pytest.raises(RequestError, match="epsilon"):
        masks.by_rank(torch.zeros(1, 2, 2), [0.1], [masks.generator(0, "layer", "a")])
    with pytest.raises(RequestError, match="density"):
        masks.at_random(torch.zeros(1, 2, 2), [0.0], [masks.generator(0, "layer", "a")])
