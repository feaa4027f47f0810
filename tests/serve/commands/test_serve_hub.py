"""`pcae-serve --bundle hf://…` as a process: endpoint, cache and offline mode by variables."""

import os
import subprocess
from pathlib import Path

import httpx2
import pytest

from pcae_serve.bundle.reader import demo_path, load_bundle
from tests.support.hub import Hub
from tests.support.server_process import ANY_PORT, COMMAND, ready

NAME = "hf://me/demo"


def command(cache: Path) -> list[str]:
    flags = ("--bundle", NAME, "--cache-dir", str(cache), "--backend", "simulated")
    return [*COMMAND, *ANY_PORT, *flags]


def variables(hub: Hub, home: Path, **changes: str) -> dict[str, str]:
    given = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    return dict(os.environ) | given | changes


@pytest.mark.slow
def test_a_bundle_by_name_then_without_network(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("me/demo", demo_path()).commit("main")
    for offline in ("0", "1"):
        log = tmp_path / f"log{offline}"
        env = variables(hub, tmp_path / "home", HF_HUB_OFFLINE=offline)
        with log.open("w") as stderr:
            process = subprocess.Popen(
                command(tmp_path / "cache"), stderr=stderr, env=env, text=True
            )
            with ready(process, log) as url:
                tiers = [tier["name"] for tier in httpx2.get(f"{url}/tiers").json()["tiers"]]
        assert set(tiers) == {tier.name for tier in load_bundle(demo_path()).tiers}
        assert f"bundle {NAME}, commit {commit}" in log.read_text()
        hub.requests.clear()
    assert "offline mode is on (HF_HUB_OFFLINE); the copy in the cache is used" in log.read_text()


def test_a_bundle_that_cannot_be_fetched_is_one_line(hub: Hub, tmp_path: Path) -> None:
    env = variables(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    done = subprocess.run(command(tmp_path), env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    start = f"pcae-serve: {NAME}: offline mode is on (HF_HUB_OFFLINE), and it is not in the cache "
    assert line == f"{start}{tmp_path / 'home' / 'hub'}"
