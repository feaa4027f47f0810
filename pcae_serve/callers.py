"""Callers: who sends requests, by API key or by address, and the terms of a key."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from math import inf

from pcae_serve.keys_file import KeyLine

#: Bits of an IPv6 address that identify a network, which is one caller: a host has many addresses.
NETWORK_BITS = 64

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: Labels of keys without a name.
_LABEL = re.compile(r"(admin-)?key-\d+")


@dataclass(frozen=True)
class Caller:
    """The owner of an API key, or of several keys of one name."""

    name: str  # reveals nothing of the key
    weight: float = 1.0  # of its share of a busy server
    rate: float | None = None  # images per second at most; None: no limit


def of_key_lines(lines: Sequence[KeyLine], label: str = "key") -> list[Caller]:
    """Return the caller of each line of a keys file; `label` and the line number name the unnamed.

    Keys of one name are one caller, so that a key can be replaced without a gap. Raises ValueError
    with the line if an option is not valid, a key is there twice or as a name, or keys of one name
    have different terms.
    """
    _require_distinct(lines)
    known = dict[str, Caller]()
    callers = []
    for line in lines:
        name = line.options.get("name")
        if name is not None and (not _NAME.fullmatch(name) or _LABEL.fullmatch(name)):
            raise ValueError(
                f"line {line.number}: name= takes 1 to 64 letters, digits, '.', '_' and '-', except"
                " key-NUMBER, which names keys without a name"
            )
        caller = Caller(
            name or f"{label}-{line.number}",
            _positive(line, "weight", 1e6) or 1.0,
            _positive(line, "rate", inf),
        )
        if known.setdefault(caller.name, caller) != caller:
            raise ValueError(
                f"line {line.number}: keys of one name are one caller; give this one the same"
                " weight= and rate= as the key of that name above"
            )
        callers.append(caller)
    return callers


def _require_distinct(lines: Sequence[KeyLine]) -> None:
    """Raise ValueError if a key is there twice, or is also a name, which logs and metrics show."""
    first = dict[str, int]()
    for line in lines:
        if first.setdefault(line.key, line.number) != line.number:
            raise ValueError(f"line {line.number}: the key of line {first[line.key]} again")
    for line in lines:
        if line.options.get("name") in first:
            raise ValueError(
                f"line {line.number}: name= is a key, and names appear in logs and metrics"
            )


def of_address(host: str) -> str:
    """Return the caller at an address: an IPv4 address or an IPv6 network; "" if it is neither."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ip_network((address, NETWORK_BITS), strict=False))
    return str(address)


def _positive(line: KeyLine, option: str, most: float) -> float | None:
    """Return the number that an option of a line has, or None if it is absent."""
    if (text := line.options.get(option)) is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 1e-6 <= value <= most or value == inf:
        at_most = "" if most == inf else f" and at most {most:,.0f}"
        raise ValueError(
            f"line {line.number}: {option}= must be a number of at least 0.000001{at_most}"
        )
    return value
