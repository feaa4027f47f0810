"""Limits are changed in a process of their own: they hold for the rest of its life."""

import subprocess
import sys

import pytest

from pcae_serve import descriptors


def test_the_soft_limit_becomes_the_hard_limit() -> None:
    code = """
import resource
from pcae_serve.descriptors import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128))
print(raise_descriptor_limit(), resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "128 (128, 128)\n", done.stderr


def test_connections_are_fewer_than_descriptors() -> None:
    code = """
import resource
from pcae_serve.descriptors import connection_capacity
for limit in (1024, 64):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    print([connection_capacity(wanted) for wanted in (0, 10, 100_000)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "[(896, 128), (10, 128), (896, 128)]",
        "[(32, 32), (10, 54), (32, 32)]",
    ], done.stderr


def test_the_default_is_not_all_that_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "raise_descriptor_limit", lambda: 65_536)
    wanted = (0, 10_000, 100_000)
    capacities = [descriptors.connection_capacity(each)[0] for each in wanted]
    assert capacities == [4096, 10_000, 65_408]
