"""The ladder: the tiers of a bundle by name and accuracy, the cheapest first.

It knows no seconds: what a tier costs is the forecast's to say.
"""

from dataclasses import dataclass

from pcae_serve.errors import StartError


@dataclass(frozen=True)
class TierTable:
    """Tiers are counted as the bundle orders them."""

    names: tuple[str, ...]
    accuracy: tuple[float, ...]  # 0..1; agreement with the full model where none was measured

    def index(self, name: str) -> int:
        """Which tier has this name."""
        if name not in self.names:
            raise StartError(f"no tier is named {name!r}; there are {', '.join(self.names)}")
        return self.names.index(name)
