"""The command `pcae-serve`: in this process, or as one with a real socket."""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from pcae_serve.cli import COMMANDS, start
from pcae_serve.commands.serve import listen
from pcae_serve.observability import logs
from pcae_serve.scheduling.event_log import replay
from tests.support.images import image_bytes
from tests.support.server_process import COMMAND, log_of, server

Failed = Callable[..., tuple[int, str]]


@pytest.fixture
def failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Failed:
    """Run a start that fails, in this process; return its exit code and its one line."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(logs, "configure", lambda format, level: None)

    def run(*flags: str) -> tuple[int, str]:
        code = start(flags)
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("pcae-serve: ")
        return code, line

    return run


def test_a_server_on_a_real_socket_answers_and_stops(bundle_dir: Path, tmp_path: Path) -> None:
    flags = ("--bundle", str(bundle_dir), "--backend", "simulated", "--profile-s", "0.5")
    with server(*flags, cache=tmp_path) as (url, process):
        answer = httpx2.post(f"{url}/classify?tier=fast", content=image_bytes(250)).json()
        assert answer["predictions"][0]["label"] == "bright"
        assert httpx2.post(f"{url}/classify", content=b"").status_code == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) in (0, -signal.SIGTERM)


def test_sigterm_ends_a_process_that_is_still_loading() -> None:
    """PID 1 of a container only gets signals that it has a handler for."""
    with subprocess.Popen((*COMMAND, "--port", "0"), stderr=subprocess.PIPE) as process:
        status = Path(f"/proc/{process.pid}/status")
        handled = 1 << (signal.SIGTERM - 1)
        while not handled & int(re.findall(r"SigCgt:\s(\w+)", status.read_text())[0], 16):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"listening" not in log  # from then on the server itself handles signals


def test_objects_of_the_start_are_excluded_from_garbage_collection(bundle_dir: Path) -> None:
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
        assert "chosen by policy 'nexus:fast'" in answer["reason"]
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    replayed = replay(log)
    assert replayed.setup.devices == 2
    assert replayed.events >= 3
    assert replayed.difference is None


def test_nagles_algorithm_is_off() -> None:
    """With it on, answers on a kept connection come 40 ms late."""

    async def no_delay() -> int:
        accepted = asyncio.Queue[asyncio.StreamWriter]()
        with listen("127.0.0.1", 0) as listener:
            server = await asyncio.start_server(
                lambda _, writer: accepted.put_nowait(writer), sock=listener
            )
            _, client = await asyncio.open_connection(*listener.getsockname())
            served = await accepted.get()
            found = served.get_extra_info("socket").getsockopt(
                socket.IPPROTO_TCP, socket.TCP_NODELAY
            )
            client.close()
            served.close()
            server.close()
            await server.wait_closed()
        return int(found)

    assert asyncio.run(no_delay())


def test_the_address_is_logged_and_a_free_port_can_be_selected(
    bundle_dir: Path, tmp_path: Path
) -> None:
    flags = ("--bundle", str(bundle_dir), "--backend", "simulated", "--profile-s", "0.1")
    with server(*flags, cache=tmp_path) as (url, _):
        assert int(url.removeprefix("http://127.0.0.1:")) > 0
        assert httpx2.get(f"{url}/livez", timeout=60).json() == {"status": "alive"}


def test_a_client_that_leaves_puts_no_traceback_in_the_log(
    bundle_dir: Path, tmp_path: Path
) -> None:
    flags = ("--bundle", str(bundle_dir), "--backend", "simulated", "--profile-s", "0.5")
    with server(*flags, cache=tmp_path) as (url, process):
        for length in (9999, 10):  # it leaves while uploading, and after that
            with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
                head = (
                    "POST /classify HTTP/1.1\r\nHost: localhost\r\n"
                    f"Content-Length: {length}\r\n\r\n"
                )
                connection.sendall(head.encode() + bytes(10))
        assert httpx2.post(f"{url}/classify", content=image_bytes()).status_code == 200
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    assert "Traceback" not in log_of(tmp_path).read_text()


def test_a_taken_port(bundle_dir: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        command = (*COMMAND, "--port", port, "--bundle", str(bundle_dir))
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("pcae-serve: ")
    assert port in line
    assert line.endswith("choose another --port")


def test_an_address_of_another_machine(failed: Failed) -> None:
    code, line = failed("--host", "203.0.113.9", "--port", "0", "--open-access")
    assert code == 1
    assert "cannot listen on 203.0.113.9:0: " in line
    assert "--port" not in line


def test_a_missing_bundle(tmp_path: Path, failed: Failed) -> None:
    code, line = failed("--port", "0", "--bundle", str(tmp_path / "nowhere"))
    assert code == 1
    assert "no bundle" in line


def test_a_tampered_bundle(bundle_dir: Path, tmp_path: Path, failed: Failed) -> None:
    tampered = tmp_path / "tampered"
    shutil.copytree(bundle_dir, tampered)
    (tampered / "models" / "vit" / "model.safetensors").write_bytes(b"weighty")
    code, line = failed("--port", "0", "--bundle", str(tampered))
    assert code == 1
    assert "model.safetensors" in line


def test_a_graph_that_does_not_load(bundle_dir: Path, failed: Failed) -> None:
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
    bundle_dir: Path, flags: tuple[str, ...], word: str, failed: Failed
) -> None:
    code, line = failed("--port", "0", "--bundle", str(bundle_dir), *flags)
    assert code == 1
    assert re.search(word, line)


def test_a_policy_that_does_not_exist(bundle_dir: Path, failed: Failed) -> None:
    flags = ("--port", "0", "--bundle", str(bundle_dir), "--backend", "simulated")
    for policy, word in (("clairvoyant", "greedy"), ("fixed:turbo", "fast, balanced, full")):
        code, line = failed(*flags, "--policy", policy)
        assert code == 1
        assert policy.removeprefix("fixed:") in line
        assert word in line


def test_an_event_log_that_cannot_be_written(
    bundle_dir: Path, tmp_path: Path, failed: Failed
) -> None:
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
def test_a_wrong_flag(flags: tuple[str, ...], word: str, failed: Failed) -> None:
    code, line = failed(*flags)
    assert code == 2
    assert word in line


def test_a_wrong_variable(failed: Failed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCAE_BUDGET_MS", "soon")
    code, line = failed()
    assert code == 2
    assert line.startswith("pcae-serve: PCAE_BUDGET_MS: ")


def test_the_first_word_chooses_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*words: str, code: int = 0) -> str:
        assert start(words) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    server = shown("--help")
    assert server.startswith("usage: pcae-serve [COMMAND] [options]")
    assert all(re.search(rf"^  {name} +\w", server, re.MULTILINE) for name in ("serve", *COMMANDS))
    assert re.search(r"^network and access:\n  --host HOST", server, re.MULTILINE)
    assert "--bundle DIR" in server
    assert "--queue-limit" in shown("simulate", "--help")
    assert "--pin" in shown("replay", "--help")
    assert shown("classify", "--help").startswith("usage: pcae-serve classify [options] FILE...")
    for words in (("serve", "--port", "99999"), ("--port", "99999")):
        assert "--port" in shown(*words, code=2)


def test_an_unknown_variable_is_logged(bundle_dir: Path, tmp_path: Path) -> None:
    flags = ("--bundle", str(bundle_dir), "--backend", "simulated", "--port", "0")
    environment = os.environ | {"PCAE_BUDGT_MS": "5", "PCAE_CACHE_DIR": str(tmp_path)}
    with subprocess.Popen(
        (*COMMAND, *flags), stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "PCAE_" in line)
        process.kill()
    assert "did you mean PCAE_BUDGET_MS?" in line


def test_the_servers_variables_do_not_reach_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PCAE_PORT", "none")
    assert start(["replay", "http://127.0.0.1:9", "--rate", "5", "--ready-s", "0"]) == 1
    assert "no pcae-serve answers" in capsys.readouterr().err


def test_version_loads_no_server() -> None:
    assert not loaded_by(["--version"]) & {"fastapi", "uvicorn", "pcae_serve.settings"}


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
    """Importing the server would double the time of a call."""
    loaded = loaded_by(["classify", "--url", "http://127.0.0.1:9", "none.png"])
    assert "pcae_serve.client" in loaded
    assert not loaded & {"fastapi", "uvicorn", "prometheus_client", "pcae_serve.settings"}


def loaded_by(argv: list[str]) -> set[str]:
    """Return the modules of a fresh interpreter once it has run a command."""
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
    assert "pip install '.[simulate]'" in line
    assert command in line
