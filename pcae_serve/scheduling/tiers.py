"""Table of a bundle's tiers: names and accuracies, cheapest first."""

from dataclasses import dataclass

from pcae_serve.errors import StartError


@dataclass(frozen=True)
class TierTable:
    """Tier i has names[i] and accuracy[i]; the order is the bundle's."""

    names: tuple[str, ...]
    accuracy: tuple[float, ...]  # 0..1; agreement with the full model if accuracy is not measured

    def index(self, name: str) -> int:
        """Return the position of the tier with this name. Raise StartError if there is none."""
        if name not in self.names:
            raise StartError(f"no tier is named {name!r}; the tiers are {', '.join(self.names)}")
        return self.names.index(name)
