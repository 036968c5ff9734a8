"""Numbers as the report words them."""

import pytest

from topwork.reporting import wording


@pytest.mark.parametrize(
    ("worded", "expected"),
    [
        (wording.count(999), "999"), (wording.count(9999), "9,999"), (wording.count(48_000), "48 k"),
        (wording.count(999_950), "1000 k"), (wording.count(4_884_480), "4.88 M"), (wording.count(1.35e11), "135 B"),
        (wording.count(61.23), "61.2"), (wording.size(512), "512 B"), (wording.size(3 * 2**29), "1.5 GiB"),
        (wording.duration(4.84), "4.8 s"), (wording.duration(301.2), "5 min 01 s"),
        (wording.duration(7500), "2 h 05 min"), (wording.share(0.0), "0.0 %"), (wording.share(0.0012), "0.12 %"),
        (wording.share(0.713), "71.3 %"), (wording.points(-0.05), "−5.0"), (wording.points(0.713), "+71.3"),
        (wording.loss(0.4123), "0.412"), (wording.loss(0.01234), "0.0123"),
    ],
)  # fmt: skip
def test_numbers_read_well(worded: str, expected: str) -> None:
    assert worded == expected


def test_wilson_interval_against_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20, the score method without continuity correction.
    assert wording.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wording.wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
