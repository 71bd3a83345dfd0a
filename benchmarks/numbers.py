"""Numbers in the tables of benchmarks."""

from reporting.numbers import number


def count(value: int) -> str:
    """Return a whole number with its thousands apart."""
    return f"{value:,}"


def percent(value: float) -> str:
    """Return a share in percent."""
    return f"{number(100 * value)} %"


def gigabytes(value: float) -> str:
    """Return bytes as 10^9 bytes, without the unit."""
    return f"{value / 1e9:.2f}"


def megabytes(value: float) -> str:
    """Return bytes as 10^6 bytes, without the unit."""
    return number(value / 1e6)
