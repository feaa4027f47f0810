"""Round the numbers of a record, so that its files hold no more digits than were measured."""

from typing import Any


def rounded(value: Any) -> Any:
    """Return nested lists and mappings with numbers of six digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
