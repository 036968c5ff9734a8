"""Numbers as people read them."""

import math


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def count(value: float) -> str:
    """1234567 -> '1.23 M'; whole up to 9,999."""
    for limit, divisor, name in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{_three_digits(value / divisor)} {name}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def whole(value: float) -> str:
    """1234567 -> '1,234,567'."""
    return f"{value:,.0f}"


def number(value: float) -> str:
    """At most two decimals, without zeros at the end: '3.6', '0.25', '12'; small ones keep two digits."""
    return f"{value:,.2f}".rstrip("0").rstrip(".") if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def size(size_bytes: float) -> str:
    """Bytes with binary prefixes."""
    for limit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size_bytes >= limit:
            return f"{_three_digits(size_bytes / limit)} {name}"
    return f"{size_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Two leading units: '2 h 05 min', '5 min 01 s', '4.8 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def share(value: float) -> str:
    """0.4321 -> '43.2 %'; small shares keep two digits."""
    percent = 100 * value
    return f"{percent:.1f} %" if percent == 0 or abs(percent) >= 1 else f"{percent:.2g} %"


def points(difference: float) -> str:
    """A difference of two shares, signed, in percentage points."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def loss(value: float) -> str:
    """Three decimals, more for small losses."""
    return f"{value:.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


def wilson(value: float, rows: float, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share measured on `rows` rows (Wilson 1927); unlike ±z·s it stays inside 0..1."""
    spread = 1 + z * z / rows
    middle = (value + z * z / (2 * rows)) / spread
    half = z / spread * math.sqrt(value * (1 - value) / rows + z * z / (4 * rows * rows))
    return max(0.0, middle - half), min(1.0, middle + half)
