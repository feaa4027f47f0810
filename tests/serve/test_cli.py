"""The installed command, as a process with a real socket."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.serve.conftest import image_bytes

COMMAND = (sys.executable, "-m", "pcae_serve")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(*flags: str, cache: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A running pcae-serve; its address once it is ready."""
    port = free_port()
    command = (*COMMAND, "--port", str(port), "--cache-dir", str(cache), *flags)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with ready(process, f"http://127.0.0.1:{port}") as url:
        yield url, process


@contextmanager
def ready(process: subprocess.Popen[str], url: str) -> Iterator[str]:
    """Wait until the server that `process` starts takes requests; end it afterwards."""
    try:
        for _ in range(600):
            try:
                if httpx2.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx2.TransportError:
                assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        else:
            pytest.fail(f"{url} is not ready after 30 s")
        yield url
    finally:
        process.kill()
        process.communicate()


def failed(*flags: str, **environment: str) -> tuple[int, str]:
    """Exit code and the one line of a start that fails."""
    done = subprocess.run(
        (*COMMAND, *flags),
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
    )
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("pcae-serve: ")
    return done.returncode, lines[0]


def test_a_server_on_a_real_socket_answers_and_stops(bundle_dir: Path, tmp_path: Path) -> None:
    flags = ("--bundle", str(bundle_dir), "--backend", "simulated", "--profile-s", "0.5")
    with server(*flags, cache=tmp_path) as (url, process):
        answer = httpx2.post(f"{url}/classify?tier=fast", content=image_bytes(250)).json()
        assert answer["predictions"][0]["label"] == "bright"
        assert httpx2.post(f"{url}/classify", content=b"").status_code == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) in (0, -signal.SIGTERM)


def test_the_address_is_told_and_a_free_port_can_be_asked_for(
    bundle_dir: Path, tmp_path: Path
) -> None:
    flags = ("--bundle", str(bundle_dir), "--backend", "simulated", "--profile-s", "0.1")
    command = (*COMMAND, "--port", "0", "--cache-dir", str(tmp_path), *flags)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "http://127.0.0.1:" in line)
        url = line.split("listening on ")[1].split(",")[0]
        assert httpx2.get(f"{url}/livez", timeout=20).json() == {"status": "alive"}
        process.kill()


def test_a_client_that_leaves_puts_no_traceback_in_the_log(
    bundle_dir: Path, tmp_path: Path
) -> None:
    flags = ("--bundle", str(bundle_dir), "--backend", "simulated", "--profile-s", "0.5")
    with server(*flags, cache=tmp_path) as (url, process):
        for length in (9999, 10):  # it leaves while uploading, and after that
            with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
                head = f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
                connection.sendall(head.encode() + bytes(10))
        assert httpx2.post(f"{url}/classify", content=image_bytes()).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    assert "Traceback" not in log


def test_a_taken_port(bundle_dir: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        code, line = failed("--port", str(port), "--bundle", str(bundle_dir))
    assert code == 1
    assert str(port) in line


def test_a_missing_bundle(tmp_path: Path) -> None:
    code, line = failed("--port", "0", "--bundle", str(tmp_path / "nowhere"))
    assert code == 1
    assert "no bundle" in line


def test_a_tampered_bundle(bundle_dir: Path, tmp_path: Path) -> None:
    tampered = tmp_path / "tampered"
    shutil.copytree(bundle_dir, tampered)
    (tampered / "models" / "vit" / "model.safetensors").write_bytes(b"weighty")
    code, line = failed("--port", "0", "--bundle", str(tampered))
    assert code == 1
    assert "model.safetensors" in line


def test_a_graph_that_does_not_load(bundle_dir: Path) -> None:
    pytest.importorskip("onnxruntime")
    code, line = failed("--port", "0", "--bundle", str(bundle_dir))
    assert code == 1
    assert "elastic.onnx" in line


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--backend", "cuda", "--device", "cpu"), "--device cuda:0"),
        (("--backend", "tensorrt", "--device", "cpu"), "--device cuda:0"),
        (("--backend", "onnxruntime", "--device", "cuda:0"), "--backend cuda"),
        (("--device", "cuda:4095"), "NVIDIA driver|there is no cuda:4095"),
    ],
)
def test_a_backend_and_a_device_that_do_not_go_together(
    bundle_dir: Path, flags: tuple[str, ...], word: str
) -> None:
    code, line = failed("--port", "0", "--bundle", str(bundle_dir), *flags)
    assert code == 1
    assert re.search(word, line)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--port", "99999"), "--port"),
        (("--budget-ms", "-1"), "--budget-ms"),
        (("--device", "gpu"), "--device"),
        (("--backend", "torch"), "--backend"),
    ],
)
def test_a_wrong_flag(flags: tuple[str, ...], word: str) -> None:
    code, line = failed(*flags)
    assert code == 2
    assert word in line


def test_a_wrong_variable() -> None:
    code, line = failed(PCAE_BUDGET_MS="soon")
    assert code == 2
    assert "budget" in line
