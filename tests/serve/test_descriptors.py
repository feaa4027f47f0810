"""The limit is raised in a process of its own: it cannot be lowered for the rest of the suite."""

import subprocess
import sys


def test_the_soft_limit_becomes_the_hard_limit() -> None:
    code = """
import resource
from pcae_serve.descriptors import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128))
print(raise_descriptor_limit(), resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "128 (128, 128)\n", done.stderr
