"""The default memory budget, from made-up control groups."""

import logging
import os
from pathlib import Path

import pytest

from pcae_serve.runtime import machine_memory
from tests.support.control_groups import group

GIB = 1 << 30


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "1073741824\n"}, GIB),  # a container with its own name space
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/a/b\n", {"a/memory.max": f"{GIB}\n", "a/b/memory.max": "max\n"}, GIB),
        ("0::/a/b\n", {"a/memory.max": f"{4 * GIB}\n", "a/b/memory.max": f"{GIB}\n"}, GIB),
        ("0::/../../outside\n", {"memory.max": f"{GIB}\n"}, GIB),
        ("0::/a\n", {"unified/a/memory.max": f"{GIB}\n"}, GIB),  # both versions are mounted
        ("4:memory:/docker/x\n", {"memory/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        (
            "4:memory:/a\n",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/a/memory.limit_in_bytes": f"{GIB}\n",
            },
            GIB,
        ),
        ("1:cpu:/x\n", {"cpu/x/memory.limit_in_bytes": f"{GIB}\n"}, None),
    ],
)
def test_the_memory_limit_of_a_group(
    tmp_path: Path, membership: str, files: dict[str, str], limit: int | None
) -> None:
    assert machine_memory.read_limit(*group(tmp_path, membership, files)) == limit


@pytest.mark.parametrize(
    ("limit", "resident", "expected"),
    [
        (2 * GIB, 300_000_000, int(0.8 * 2 * GIB) - 300_000_000),
        (None, 300_000_000, 5 * GIB - 300_000_000),  # half of the machine's
        (9223372036854771712, 0, 5 * GIB),  # version 1 without a limit
        (GIB // 2, 400_000_000, machine_memory.LEAST_BYTES),
    ],
)
def test_the_default_leaves_room_for_what_is_in_use(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    limit: int | None,
    resident: int,
    expected: int,
) -> None:
    pages = {"SC_PHYS_PAGES": 10 * GIB // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    monkeypatch.setattr(machine_memory, "read_limit", lambda: limit)
    monkeypatch.setattr(machine_memory, "resident_bytes", lambda: resident)
    with caplog.at_level(logging.INFO):
        assert machine_memory.default_budget_bytes() == expected
    assert f"{expected / 1e6:,.0f} MB (--memory-mb)" in caplog.text
    assert ("little is left" in caplog.text) == (expected == machine_memory.LEAST_BYTES)


def test_a_setting_replaces_the_default(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert machine_memory.budget_bytes(1500.0) == 1_500_000_000
    assert "1,500 MB" in caplog.text


def test_this_process_uses_some_memory() -> None:
    assert machine_memory.resident_bytes() > 1_000_000
