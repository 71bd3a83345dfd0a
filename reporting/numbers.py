"""Numbers as people read them."""


def number(value: float) -> str:
    """Return two or three digits, more where there are more before the point."""
    size = float(f"{abs(value):.3g}")
    if size < 1:
        return f"{value:.2g}"
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2}f}"


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
