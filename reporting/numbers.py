"""Numbers as people read them."""


def number(value: float) -> str:
    """Return two or three digits, more where there are more before the point."""
    size = float(f"{abs(value):.3g}")
    if size < 1:
        return f"{value:.2g}"
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2}f}"
