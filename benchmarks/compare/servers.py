"""How each server is started, asked and stopped. All of its processes share one core."""

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.attacks.server import family, proportional_mb
from benchmarks.compare.environments import FOLDER, HERE, ROOT, python
from benchmarks.compare.models import Setting

#: Times in seconds: until the first answer, for a stop, of a test request, also during the start.
START_S, STOP_S, PROBE_S, FIRST_PROBE_S = 120.0, 10.0, 60.0, 3.0
SERVER_CORE, CLIENT_CORE = 0, 1
#: The system call on x86-64, and the slice of a session that is preferred to others.
SCHED_SETATTR, SLICE_NS = 314, 500_000

PEERS = HERE / "peers"
Head = dict[str, str]


@dataclass(frozen=True)
class Server:
    """A way to serve a model. `query` has {budget_ms}; only pcae-serve knows of budgets."""

    name: str
    environment: str
    command: Callable[[Setting, int], list[str]]
    path: str = "/classify"
    query: Callable[[Setting, float], str] = lambda setting, budget_ms: ""
    form: Callable[[bytes], tuple[Head, bytes]] = lambda image: (
        {"Content-Type": "application/octet-stream"}, image
    )  # fmt: skip
    index: Callable[[Any], int] = lambda answer: int(answer["index"])

    def request(self, setting: Setting, port: int, image: bytes, budget_s: float) -> bytes:
        """Return a whole HTTP request for one image."""
        head, body = self.form(image)
        lines = [
            f"POST {self.path}{self.query(setting, 1e3 * budget_s)} HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            *(f"{name}: {value}" for name, value in head.items()),
            f"Content-Length: {len(body)}",
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


# --- configurations


def _pcae(setting: Setting, port: int) -> list[str]:
    command = [python("pcae"), "-m", "pcae_serve", "--port", str(port), "--threads", "1"]
    command += ["--bundle", str(setting.folder / "bundle"), "--no-access-log"]
    return [*command, "--cache-dir", str(cache_of(setting))]


def cache_of(setting: Setting) -> Path:
    """Return the folder of pcae-serve's measured latency profile."""
    return FOLDER / "cache" / setting.model


def _plain(setting: Setting, port: int) -> list[str]:
    return [python("plain"), "-m", "uvicorn", "plain:app", "--port", str(port), "--no-access-log"]


def _litserve(setting: Setting, port: int) -> list[str]:
    return [python("litserve"), str(PEERS / "litserve_app.py"), str(port)]


def _mosec(setting: Setting, port: int) -> list[str]:
    return [python("mosec"), str(PEERS / "mosec_app.py"), "--port", str(port), "--timeout", "60000",
            "--capacity", "1024", "--address", "127.0.0.1"]  # fmt: skip


def _triton(setting: Setting, port: int) -> list[str]:
    root = Path(python("triton")).parents[1] / "lib" / "python3.11" / "site-packages" / "pytriton"
    binary, backends = root / "tritonserver" / "bin" / "tritonserver", FOLDER / "triton-backends"
    stub = root / "tritonserver" / "python_backend_stubs" / "3.11" / "triton_python_backend_stub"
    if not backends.exists():  # the backend and the stub of this Python, in one folder
        shutil.copytree(root / "tritonserver" / "backends", backends)
        shutil.copy(stub, backends / "python")
    return [str(binary), "--model-repository", str(PEERS / "triton"), "--http-port", str(port),
            "--backend-directory", str(backends), "--allow-grpc=false", "--allow-metrics=false",
            "--http-address", "127.0.0.1", "--log-info=false"]  # fmt: skip


def _bentoml(setting: Setting, port: int) -> list[str]:
    return [python("bentoml"), "-m", "bentoml", "serve", "bentoml_app:Classifier",
            "--port", str(port), "--host", "127.0.0.1"]  # fmt: skip


def _ray(setting: Setting, port: int) -> list[str]:
    return [python("ray"), str(PEERS / "ray_app.py"), str(port)]


def _triton_form(image: bytes) -> tuple[Head, bytes]:
    """Return the Open Inference Protocol's binary form: JSON, then the length and the image."""
    size = {"binary_data_size": len(image) + 4}
    tensor = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": size}
    wanted = [{"name": "index", "parameters": {"binary_data": False}}]
    text = json.dumps({"inputs": [tensor], "outputs": wanted}).encode()
    head = {"Content-Type": "application/octet-stream"}
    head["Inference-Header-Content-Length"] = str(len(text))
    return head, text + len(image).to_bytes(4, "little") + image


def _file_form(field: str) -> Callable[[bytes], tuple[Head, bytes]]:
    boundary = "compare0123456789"

    def form(image: bytes) -> tuple[Head, bytes]:
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="i.jpg"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        )
        body = head.encode() + image + f"\r\n--{boundary}--\r\n".encode()
        return {"Content-Type": f"multipart/form-data; boundary={boundary}"}, body

    return form


def _pcae_index(answer: Any) -> int:
    return int(answer["predictions"][0]["index"])


SERVERS = {
    server.name: server
    for server in (
        Server(
            "pcae-serve", "pcae", _pcae, index=_pcae_index,
            query=lambda setting, ms: f"?tier={setting.tier}&top_k=1&budget_ms={ms:.3f}",
        ),
        Server(
            "pcae-serve-auto", "pcae", _pcae, index=_pcae_index,
            query=lambda setting, ms: f"?top_k=1&budget_ms={ms:.3f}",
        ),
        Server("plain", "plain", _plain),
        Server("litserve", "litserve", _litserve, path="/predict"),
        Server("mosec", "mosec", _mosec, path="/inference"),
        Server(
            "triton", "triton", _triton, path="/v2/models/vit/infer", form=_triton_form,
            index=lambda answer: int(answer["outputs"][0]["data"][0]),
        ),
        Server("bentoml", "bentoml", _bentoml, form=_file_form("image")),
        Server("ray", "ray", _ray),
    )
}  # fmt: skip


# --- processes


class Running:
    """A started server.

    start_s: from the start of the process to the first answer. rest_mb: its memory then.
    """

    def __init__(
        self, server: Server, setting: Setting, process: subprocess.Popen[bytes], port: int
    ) -> None:
        self.server, self.setting, self.port = server, setting, port
        self.process = process
        self.start_s = self.rest_mb = 0.0
        self.nice = 0

    def pause(self) -> None:
        """Stop all processes, so that they take no time from the server that is measured."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, which: signal.Signals) -> None:
        for pid in family(self.process.pid):
            with suppress(OSError):
                os.kill(pid, which)

    def request(self, image: bytes, budget_s: float) -> bytes:
        return self.server.request(self.setting, self.port, image, budget_s)

    def cpu_s(self) -> float:
        """Return the CPU time of all processes, in steps of 10 ms; ended threads count too."""
        ticks = 0
        for pid in family(self.process.pid):
            with suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])  # user, system
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        """Return the proportional set size of all processes."""
        return sum(map(proportional_mb, family(self.process.pid)))

    def peak_mb(self) -> float:
        """Return the sum of the processes' largest resident sizes: shared pages count again."""
        total = 0.0
        for pid in family(self.process.pid):
            with suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                found = re.search(r"VmHWM:\s+(\d+)", status)
                total += int(found[1]) / 1e3 if found else 0.0
        return total

    def wait_until_idle(self, timeout_s: float = 60.0) -> float:
        """Wait until the server takes less than a fifth of its core; return the seconds.

        LitServe polls its queue, and takes up to a tenth when idle.
        """
        begin_s, spent_s = time.monotonic(), self.cpu_s()
        while time.monotonic() - begin_s < timeout_s:
            time.sleep(0.25)
            before_s, spent_s = spent_s, self.cpu_s()
            if spent_s - before_s < 0.05:
                break
        return time.monotonic() - begin_s

    def probe(
        self, image: bytes, budget_s: float, timeout_s: float = PROBE_S
    ) -> tuple[int, float, bytes]:
        """Send one request on a new connection. Return status, seconds and body; 0: no answer."""
        begin_s = time.monotonic()
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout_s) as connection:
                connection.sendall(self.request(image, budget_s))
                received = b""
                while part := connection.recv(65_536):
                    received += part
                    head, found, body = received.partition(b"\r\n\r\n")
                    length = re.search(rb"(?i)content-length: *(\d+)", head)
                    if found and length and len(body) >= int(length[1]):
                        return int(head[9:12]), time.monotonic() - begin_s, body
        except OSError:
            pass
        return 0, time.monotonic() - begin_s, b""


@contextmanager
def serving(server: Server, setting: Setting, logs: Path, nice: int = 0) -> Iterator[Running]:
    """Run a server until the block ends. Raise SystemExit if it does not answer in time.

    nice: its priority against the programs of other sessions, as `prefer` sets it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT) if server.environment == "pcae" else str(PEERS),
        "COMPARE_MODEL": str(setting.description),
        "COMPARE_TIER": setting.tier,
        "OMP_NUM_THREADS": "1",
        "BENTOML_DO_NOT_TRACK": "True",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if server.environment == "triton":
        packages = Path(python("triton")).parents[1] / "lib" / "python3.11" / "site-packages"
        environment["PYTHONPATH"] += f":{packages}"
        environment["LD_LIBRARY_PATH"] = f"{packages}/nvidia_pytriton.libs"
        environment["PATH"] = f"{Path(python('triton')).parent}:{environment['PATH']}"
    image = setting.images()[0]
    logs.mkdir(parents=True, exist_ok=True)
    begin_s = time.monotonic()
    with (logs / f"{server.name}.log").open("wb") as log:
        process = subprocess.Popen(
            server.command(setting, port), env=environment, cwd=PEERS, stdout=log, stderr=log,
            preexec_fn=lambda: _pin_and_lead(nice),
        )  # fmt: skip
    running = Running(server, setting, process, port)
    running.nice = nice
    try:
        while True:
            status, _, _ = running.probe(image, PROBE_S, FIRST_PROBE_S)
            if status == 200:
                break
            if process.poll() is not None or time.monotonic() - begin_s > START_S:
                text = (logs / f"{server.name}.log").read_text(errors="replace")
                raise SystemExit(f"{server.name} did not start:\n{text[-2000:]}")
            time.sleep(0.02)
        running.start_s = time.monotonic() - begin_s
        yield running
    finally:
        _stop(process)


def _pin_and_lead(nice: int) -> None:
    os.sched_setaffinity(0, {SERVER_CORE})
    os.setsid()
    prefer(nice)


def prefer(nice: int) -> None:
    """Set the priority of this session against others (-20 to 19); 0 leaves it as it is.

    Linux groups the processes of a session and shares a core between the groups. A short slice
    makes the session run as soon as it wakes, and what is left of the core goes to the others. With
    two foreign programs on two cores, a thread that wakes is late by 0.5 ms at p99, for 6 without.
    Raise OSError if that needs a right that this process lacks.
    """
    if not nice:
        return
    Path("/proc/self/autogroup").write_text(str(nice))
    normal_policy = 0
    attributes = struct.pack("=IIQiIQQQ", 48, normal_policy, 0, 0, 0, SLICE_NS, 0, 0)
    library = ctypes.CDLL(None, use_errno=True)
    if library.syscall(SCHED_SETATTR, 0, attributes, 0):
        raise OSError(ctypes.get_errno(), "sched_setattr")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and every process that it started."""
    members = family(process.pid)
    for pid in members:
        with suppress(OSError):
            os.kill(pid, signal.SIGCONT)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    for pid in members:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
