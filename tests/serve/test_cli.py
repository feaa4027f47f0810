"""The installed command, as a process with a real socket."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest

from pcae_serve.cli import start
from pcae_serve.scheduling.event_log import replay
from tests.support.images import image_bytes
from tests.support.server_process import COMMAND, server


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


def test_sigterm_is_heard_before_anything_is_loaded() -> None:
    """PID 1 of a container hears only signals that it has a handler for."""
    with subprocess.Popen((*COMMAND, "--port", "0"), stderr=subprocess.PIPE) as process:
        status = Path(f"/proc/{process.pid}/status")
        handled = 1 << (signal.SIGTERM - 1)
        while not handled & int(re.findall(r"SigCgt:\s(\w+)", status.read_text())[0], 16):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=10)
    assert process.returncode == 0
    assert b"listening" not in told  # by then it is the server that takes signals


def test_what_stands_at_the_start_is_not_looked_through_by_the_collector(bundle_dir: Path) -> None:
    flags = ["--bundle", str(bundle_dir), "--backend", "simulated", "--port", "0"]
    script = (
        "import gc; from pcae_serve.cli import start; from pcae_serve.api.server import Server;"
        " Server.run = lambda self, sockets: print(gc.get_freeze_count());"
        f" start({flags})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert int(done.stdout) > 10_000, done.stderr


def test_several_devices_and_an_event_log(bundle_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    flags = ("--bundle", str(bundle_dir), "--backend", "simulated", "--profile-s", "0.1")
    more = ("--device", "cuda:0,cuda:1", "--policy", "nexus:fastest", "--event-log", str(log))
    with server(*flags, *more, cache=tmp_path) as (url, process):
        tiers = httpx2.get(f"{url}/tiers").json()
        assert (tiers["device"], tiers["policy"]) == ("cuda:0, cuda:1", "nexus:fastest")
        answer = httpx2.post(f"{url}/classify", content=image_bytes()).json()
        assert answer["tier"] == "fast"
        assert "policy 'nexus:fast' chose it" in answer["reason"]
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=10)
    replayed = replay(log)
    assert replayed.setup.devices == 2
    assert replayed.events >= 3
    assert replayed.difference is None


def test_answers_on_a_kept_connection_are_not_held_back(bundle_dir: Path, tmp_path: Path) -> None:
    flags = ("--bundle", str(bundle_dir), "--backend", "simulated", "--profile-s", "0.1")
    with server(*flags, cache=tmp_path) as (url, _), httpx2.Client() as client:
        took_s = [client.get(f"{url}/livez").elapsed.total_seconds() for _ in range(20)]
    assert min(took_s[10:]) < 0.03, took_s  # with Nagle's algorithm: 0.04 each


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


def test_a_policy_that_does_not_exist(bundle_dir: Path) -> None:
    flags = ("--port", "0", "--bundle", str(bundle_dir), "--backend", "simulated")
    for policy, word in (("clairvoyant", "greedy"), ("fixed:turbo", "fast, balanced, full")):
        code, line = failed(*flags, "--policy", policy)
        assert code == 1
        assert policy.removeprefix("fixed:") in line
        assert word in line


def test_an_event_log_that_cannot_be_written(bundle_dir: Path, tmp_path: Path) -> None:
    flags = ("--port", "0", "--bundle", str(bundle_dir), "--backend", "simulated")
    code, line = failed(*flags, "--event-log", str(tmp_path))
    assert code == 1
    assert str(tmp_path) in line


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--port", "99999"), "--port"),
        (("--budget-ms", "-1"), "--budget-ms"),
        (("--device", "gpu"), "--device"),
        (("--device", "cuda:0,cuda:0"), "--device: cuda:0 is named twice"),
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


def test_the_commands_are_told_and_the_first_word_chooses(
    bundle_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(["--help"]) == 0
    told = capsys.readouterr().out
    assert "pcae-serve simulate" in told
    assert "pcae-serve replay URL" in told
    assert "--port" in told
    assert start(["simulate", "--help"]) == 0
    assert "--queue-limit" in (told := capsys.readouterr().out)
    assert "--port" not in told
    assert start(["replay", "--help"]) == 0
    assert "--pin" in capsys.readouterr().out
    for words in (["serve", "--port", "99999"], ["--port", "99999"]):
        assert start(words) == 2
        assert "--port" in capsys.readouterr().err


def test_the_servers_variables_do_not_reach_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PCAE_PORT", "none")
    assert start(["replay", "http://127.0.0.1:9", "--rate", "5"]) == 1
    assert "no pcae-serve answers" in capsys.readouterr().err


def test_serving_loads_nothing_that_only_the_commands_need() -> None:
    loaded = loaded_by(["--version-of-nothing"])
    assert "pcae_serve.commands.serve" in loaded
    tops = {name.partition(".")[0] for name in loaded}
    assert not tops & {"matplotlib", "rich", "scipy", "pyarrow"}
    assert "pcae_serve.loadtest" not in loaded
    assert not loaded & {
        "pcae_serve.commands.replay",
        "pcae_serve.commands.simulate",
        "pcae_serve.commands.classify",
    }


def test_classifying_loads_no_server() -> None:
    """It is to answer quickly: half its time went into what serving needs."""
    loaded = loaded_by(["classify", "--url", "http://127.0.0.1:9", "none.png"])
    assert "pcae_serve.client" in loaded
    assert not loaded & {"fastapi", "uvicorn", "prometheus_client", "pcae_serve.settings"}


def loaded_by(argv: list[str]) -> set[str]:
    """Modules of a fresh interpreter once it has run a command."""
    code = f"from pcae_serve.cli import start; start({argv!r}); import sys; print(*sys.modules)"
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, timeout=60)
    return set(done.stdout.split())


@pytest.mark.parametrize("command", ["simulate", "replay"])
def test_a_missing_extra(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    url = ["http://127.0.0.1:9", "--rate", "5"] if command == "replay" else []
    assert start([command, *url]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'pcae-serve[simulate]'" in line
    assert command in line
