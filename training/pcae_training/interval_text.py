"""Shares and differences with their 95 % intervals, as text in percent and in points."""

Interval = tuple[float, float]


def percent(value: float, interval: Interval, unit: str = "", digits: int = 2) -> str:
    """Return a share in [0, 1] as text: 90.12 % [89.25, 90.98], with `unit` " %"."""
    low, high = (f"{100 * bound:.{digits}f}" for bound in interval)
    return f"{100 * value:.{digits}f}{unit} [{low}, {high}]"


def points(value: float, interval: Interval) -> str:
    """Return a difference of two shares as text: +0.40 [-0.10, +0.90] points."""
    low, high = (f"{100 * bound:+.2f}" for bound in interval)
    return f"{100 * value:+.2f} [{low}, {high}] points"
