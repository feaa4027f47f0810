"""Tables of the log's results: medians over the rounds, and ranges."""

from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from benchmarks.compare.log import Entry, Log
from benchmarks.compare.models import Setting

Value = Callable[[Entry], float | None]


def tables(log: Log) -> str:
    """Return all tables as Markdown."""
    results = [entry for entry in log.under("") if entry.get("done")]
    parts = []
    for row, columns in COLUMNS.items():
        for setting in dict.fromkeys(e["setting"] for e in results if e["row"] == row):
            chosen = [e for e in results if (e["row"], e["setting"]) == (row, setting)]
            parts.append(f"## {row}, {setting}\n\n" + "\n".join(_table(chosen, columns)) + "\n")
    return "\n".join([*parts, *_ladder(log)])


def _ladder(log: Log) -> Iterable[str]:
    """Yield a table of all rates that were tried with adaptive tiers, with the tiers' accuracy."""
    prefix = "trial/capacity/"
    tried = [e for e in log.under(prefix) if "pcae-serve-auto" in e["key"] and not e["void"]]
    if not tried:
        return
    model = tried[0]["key"].removeprefix(prefix).partition("@")[0]
    top1 = Setting(model, "full").accuracies()
    names = list(top1)
    yield f"## adaptive tiers, {model}: every rate that was tried\n"
    yield (
        "| requests/s | in time | answers: mean top-1 of their tiers | " + " | ".join(names) + " |"
    )
    yield "| --- |" * 1 + " --- |" * (len(names) + 2)
    for entry in sorted(tried, key=lambda e: float(e["rate"])):
        mix = entry["tiers"]
        mean = sum(top1[name] * n for name, n in mix.items()) / sum(mix.values())
        shares = [f"{mix.get(name, 0) / sum(mix.values()):.2f}" for name in names]
        (within,) = entry["within"].values()
        yield f"| {entry['rate']:.1f} | {within:.3f} | {mean:.4f} | " + " | ".join(shares) + " |"


def _table(entries: list[Entry], columns: dict[str, tuple[Value, int]]) -> Iterable[str]:
    yield "| server | rounds | " + " | ".join(columns) + " |"
    yield "| --- |" * 1 + " --- |" * (len(columns) + 1)
    for server in dict.fromkeys(entry["server"] for entry in entries):
        rounds = [entry for entry in entries if entry["server"] == server]
        cells = [
            spread([value(entry) for entry in rounds], digits) for value, digits in columns.values()
        ]
        yield f"| {server} | {len(rounds)} | " + " | ".join(cells) + " |"


def spread(values: list[float | None], digits: int) -> str:
    """Return "median (smallest to largest)"; "none" without a value."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    text = f"{median(known):.{digits}f}"
    if len(known) > 1:
        text += f" ({min(known):.{digits}f} to {max(known):.{digits}f})"
    return text


def at(*path: str) -> Value:
    """Return a function that reads a nested value; None if a part of the path is missing."""

    def read(entry: Entry) -> float | None:
        found: Any = entry
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return None if found is None else float(found)

    return read


def over(value: Value, other: Value) -> Value:
    """Return a function that divides two values."""

    def divide(entry: Entry) -> float | None:
        a, b = value(entry), other(entry)
        return None if a is None or not b else a / b

    return divide


COLUMNS: dict[str, dict[str, tuple[Value, int]]] = {
    "capacity": {
        "3x, requests/s": (at("capacity", "3"), 1),
        "8x": (at("capacity", "8"), 1),
        "50x": (at("capacity", "50"), 1),
        "top-1 of answers at 8x": (at("at", "8", "right"), 3),
    },
    "overload": {
        "offered/s": (at("rate"), 0),
        "goodput/s": (at("goodput"), 1),
        "p99 of answers, ms": (at("answered_ms", "99"), 0),
        "refused, p50 ms": (at("refused_ms", "50"), 1),
        "p99 ms": (at("refused_ms", "99"), 1),
        "recovery, s": (at("recovery_s"), 2),
        "peak MB": (at("peak_mb"), 0),
        "MB after": (at("after_mb"), 0),
    },
    "overhead": {
        "p50 over decode and engine, ms": (at("over_p50_ms"), 2),
        "p99 over them, ms": (at("over_p99_ms"), 2),
        "CPU over them, ms": (at("over_cpu_ms"), 2),
        "CPU per request, ms": (at("cpu_ms"), 2),
    },
    "accuracy": {
        f"{load}: {name}": (at("loads", load, value), 3)
        for load in ("0.5", "1.0", "1.5")
        for name, value in (("right in time", "right_in_time"), ("in time", "in_time"))
    },
    "client-gone": {"share computed": (at("share"), 2)},
    "efficiency": {
        "images/s": (at("rate"), 1),
        "engine's": (at("bare"), 1),
        "ratio": (over(at("rate"), at("bare")), 3),
    },
    "cold": {
        "first answer, s": (at("start_s"), 2),
        "without a profile, s": (at("start_without_profile_s"), 2),
        "MB at rest": (at("rest_mb"), 0),
        "MB peak": (at("peak_mb"), 0),
        "packages, MB": (at("install_mb"), 0),
    },
}
