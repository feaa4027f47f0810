"""Tables of the results of `recipes.py`, as Markdown."""

from collections.abc import Iterator
from itertools import combinations
from statistics import mean, stdev
from typing import Any

from scipy.stats import t

#: Readouts with 1,000 labels, and encoders that are compared.
READOUTS = {"knn": "5-NN", "ridge": "ridge", "rbf": "RBF kernel"}
ENCODERS = (
    "untrained", "judged-features", "judged-mae-decoder-2", "judged-mae", "judged-mae-time",
    "judged-pixels", "judged-pixels-random",
)  # fmt: skip


def row(record: dict[str, Any]) -> list[str]:
    """Return the cells of a result in the table."""
    shares = record["chosen_on"]
    trained = "loss" in record
    return [
        record["name"],
        f"{record['loss']:.3f}" if trained else "",
        f"{100 * shares['knn']:.1f}",
        f"{100 * shares['ridge']:.1f}",
        f"{record['rank']:.1f}",
        f"{record['train_cpu_s']:.0f}" if record.get("train_cpu_s") else "",
    ]


def table(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the results as Markdown."""
    yield "| run | loss | 5-NN | ridge | rank | CPU s |"
    yield "| --- " * 6 + "|"
    for record in found.values():
        if "chosen_on" in record:
            yield f"| {' | '.join(row(record))} |"
    yield ""
    yield "| targets | constant | by position | by image | loss of a constant | by position |"
    yield "| --- " * 6 + "|"
    for record in found.values():
        if "targets" in record:
            shares = [f"{share:.3f}" for share in record["targets"].values()]
            yield f"| {record['name']} | {' | '.join(shares)} |"
    yield ""
    yield from judged(found)


def judged(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the comparison on the 8,000 images: means over the draws, by seed, and differences."""
    shares: dict[str, dict[str, dict[int, float]]] = {}
    for record in found.values():
        if "few_labels" in record and "seed" in record:
            label = record.get("label", "untrained")
            for readout in READOUTS:
                values = [draw[readout] for draw in record["few_labels"]]
                by_seed = shares.setdefault(label, {}).setdefault(readout, {})
                by_seed[record["seed"]] = 100 * sum(values) / len(values)
    yield f"| encoder | seeds | {' | '.join(READOUTS.values())} |"
    yield "| --- " * 5 + "|"
    present = [label for label in ENCODERS if label in shares]
    for label in present:
        cells = [
            ", ".join(f"{share:.1f}" for share in by.values()) for by in shares[label].values()
        ]
        seeds = ", ".join(map(str, shares[label]["knn"]))
        yield f"| `{label}` | {seeds} | {' | '.join(cells)} |"
    yield ""
    yield f"| points, 95 % over seeds | seeds | {' | '.join(READOUTS.values())} |"
    yield "| --- " * 5 + "|"
    for first, second in combinations(reversed(present), 2):
        pairs = [
            [
                shares[first][name][seed] - share
                for seed, share in by.items()
                if seed in shares[first][name]
            ]
            for name, by in shares[second].items()
        ]
        if len(pairs[0]) > 1:
            cells = [interval(gains) for gains in pairs]
            yield f"| `{first}` against `{second}` | {len(pairs[0])} | {' | '.join(cells)} |"


def interval(gains: list[float]) -> str:
    """Return the mean of paired differences and its 95 % interval by Student's t."""
    half = t.ppf(0.975, len(gains) - 1) * stdev(gains) / len(gains) ** 0.5
    return f"{mean(gains):+.2f} ± {half:.2f}"
