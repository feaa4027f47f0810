"""A real server process on a real socket, and what can go wrong: engines, clients, signals, disks.

Nothing that was accepted is lost: every request gets exactly one answer.
"""

import asyncio
import contextlib
import os
import re
import resource
import select
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest

from pcae_serve.bundle.reader import demo_path, load_bundle
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
from tests.support import faulty
from tests.support.bundles import write_bundle
from tests.support.faulty_server import ADMIN, Running, serving
from tests.support.http_server import read_all
from tests.support.images import image_bytes


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for all tests that leave it well."""
    with serving(
        tmp_path_factory.mktemp("faults"),
        *("--watchdog-s", "0.4", "--upload-s", "0.5"),
        HEAD_S="1",
        RETRY_S="1.5",
    ) as running:
        yield running


def test_an_engine_that_raises_costs_its_batch_and_is_made_anew(running: Running) -> None:
    before = running.log.count("made")
    failed = running.ask(faulty.RAISE)
    assert (failed.status_code, failed.json()["title"]) == (500, "Inference failed")
    assert "assert" not in failed.text  # what a library says is for the log
    assert running.ask().status_code == 200
    assert running.log.count("made") == before + 1


def test_numbers_that_are_none_are_no_answer(running: Running) -> None:
    assert running.ask(faulty.NAN).status_code == 500
    assert running.ask().status_code == 200
    assert "not finite" in running.log


def test_a_tier_that_goes_on_failing_leaves_routing_and_comes_back(running: Running) -> None:
    for _ in range(3):
        assert running.ask(faulty.NAN, "tier=balanced&budget_ms=5000").status_code == 500
    gone = running.ask(200, "tier=balanced&budget_ms=5000")
    assert gone.status_code == 503, gone.text
    assert "'balanced' is failing and out of rotation" in gone.json()["detail"]
    assert int(gone.headers["retry-after"]) >= 1
    told = running.get("/tiers").json()["tiers"]
    assert {tier["name"]: tier["in_service"] for tier in told}["balanced"] is False
    assert running.ask(200, "min_tier=balanced&budget_ms=5000").json()["tier"] == "full"
    assert running.get("/readyz").status_code == 200
    running.until(lambda: running.ask(200, "tier=balanced&budget_ms=5000").status_code == 200)


def test_with_every_tier_gone_the_server_is_not_ready_until_one_is_back(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    with serving(tmp_path, BROKEN=str(broken)) as running:
        broken.touch()
        for tier in ("fast", "balanced", "full"):
            for _ in range(3):
                assert running.ask(200, f"tier={tier}&budget_ms=5000").status_code == 500
        assert running.get("/readyz").status_code == 503
        assert running.ask().status_code == 503
        assert running.get("/livez").status_code == 200
        broken.unlink()
        running.until(lambda: running.get("/readyz").status_code == 200)
        assert running.ask().status_code == 200


def test_an_engine_that_hangs_is_told_to_end(running: Running) -> None:
    assert running.ask(faulty.HANG).status_code == 500
    running.until(lambda: running.ask().status_code == 200)
    assert "did not return within 0.4 s" in running.log
    assert running.get("/livez").status_code == 200


def test_a_batch_that_comes_back_too_late_does_not_excuse_the_next_one(running: Running) -> None:
    """What was answered as hung is told once; a failure after it is one of its own."""
    assert running.ask(faulty.SLOW).status_code == 500
    running.until(lambda: running.ask().status_code == 200)
    assert running.ask(faulty.RAISE).status_code == 500


def test_batches_that_come_back_too_late_take_their_tier_out_of_routing(running: Running) -> None:
    """As on a GPU, where nothing ends a batch before its time."""
    for _ in range(3):
        assert running.ask(faulty.SLOW, "tier=fast&budget_ms=5000").status_code == 500
        running.until(lambda: running.ask(200, "tier=full&budget_ms=5000").status_code == 200)
    assert "tier fast is out of rotation" in running.log
    running.until(lambda: running.ask(200, "tier=fast&budget_ms=5000").status_code == 200)


def test_an_engine_that_cannot_be_made_again_wedges_nothing(tmp_path: Path) -> None:
    missing = tmp_path / "nomake"
    with serving(tmp_path, NOMAKE=str(missing)) as running:
        missing.touch()
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(running.ask(faulty.RAISE).status_code))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert set(answers) <= {500, 503}
        assert running.get("/readyz").status_code == 503
        missing.unlink()
        running.process.send_signal(signal.SIGHUP)  # whichever makes one first
        running.until(lambda: running.get("/readyz").status_code == 200)
        assert [running.ask().status_code for _ in range(3)] == [200] * 3
        assert "pcae_queue_depth 0.0" in running.get("/metrics").text


def test_a_request_behind_another_on_its_connection_gets_its_answer(tmp_path: Path) -> None:
    """The time that a head may take is no time for the body of the request before."""
    with (
        serving(tmp_path, "--upload-s", "1", HEAD_S="0.5", READ_S="0.5", LINGER_S="0.5") as running,
        running.raw() as client,
    ):
        client.sendall(
            b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
            b"POST /classify?budget_ms=60000 HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: 9\r\n\r\n"
        )
        answers = b""
        while part := client.recv(4096):
            answers += part
        assert answers.count(b"HTTP/1.1 200 ") == 1
        assert answers.count(b"HTTP/1.1 408 ") == 1

        with socket.socket() as deaf:  # it asks and asks, and reads nothing
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((running.host, running.port))
            deaf.settimeout(60)
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                _ask_for_ever(deaf)


def _ask_for_ever(connection: socket.socket) -> None:
    for _ in range(2000):
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
        time.sleep(0.01)


def test_uploads_that_a_stop_cuts_off_are_told_so(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "--drain-s", "0.5") as running,
        running.raw() as one,
        running.raw() as many,
    ):
        for client, path in ((one, "/classify"), (many, "/classify/batch")):
            head = (
                f"POST {path}?budget_ms=60000 HTTP/1.1\r\nHost: localhost\r\n"
                "Content-Length: 999\r\n"
            )
            client.sendall(head.encode() + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n")
        running.until(lambda: "pcae_uploads 2.0" in running.get("/metrics").text)
        running.process.send_signal(signal.SIGTERM)
        assert one.recv(4096).startswith(b"HTTP/1.1 503 ")  # by the service: the drain is over
        assert not select.select([many], [], [], 0.1)[0]
        assert many.recv(4096).startswith(
            b"HTTP/1.1 503 "
        )  # 2 s later, when its connection is cut off
        assert running.process.wait(60) == 0
    assert "Traceback" not in running.log


def test_a_new_engine_that_hangs_leaves_the_old_one_serving(tmp_path: Path) -> None:
    keys, hangs = tmp_path / "admin", tmp_path / "hangs"
    keys.write_text(ADMIN)
    flags = ("--admin-keys-file", str(keys), "--watchdog-s", "0.5")
    with serving(tmp_path, *flags, HANGS=str(hangs), TERMINATE_S="0.8") as running:
        hangs.touch()
        admin = {"X-API-Key": ADMIN}
        refused = httpx2.post(f"{running.url}/admin/reload", headers=admin, timeout=60)
        assert refused.status_code == 422
        assert "did not return" in refused.json()["detail"]
        time.sleep(1.2)  # what is not told to end is given up by then
        assert running.get("/livez").status_code == 200
        assert running.ask().status_code == 200


def test_clocks_that_jump_change_nothing(running: Running) -> None:
    answers = [running.ask(faulty.JUMP, "budget_ms=20000") for _ in range(3)]
    answers += [running.ask() for _ in range(5)]
    assert all(answer.json()["met_budget"] for answer in answers)


def test_a_body_that_dribbles_is_cut_off(running: Running) -> None:
    with running.raw() as slow:
        head = (
            b"POST /classify?budget_ms=60000 HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: 99999\r\n\r\n"
        )
        slow.sendall(head)
        for _ in range(3):
            slow.sendall(b"x" * 10)
            time.sleep(0.1)
        assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
    assert running.ask().status_code == 200


def test_clients_that_send_no_body_do_not_keep_others_out(tmp_path: Path) -> None:
    """Neither the queue nor the uploads are theirs: a client that sends at once is answered."""
    head = b"POST /%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
    head += b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    paths = (
        b"classify?budget_ms=3600000",
        b"classify?budget_ms=5000&tier=full",
        b"classify/batch?budget_ms=5000",
        b"v2/models/test/infer",
    )
    with (
        serving(tmp_path, "--queue-limit", "4", "--max-uploads", "16") as running,
        contextlib.ExitStack() as stack,
    ):
        idle = [stack.enter_context(running.raw()) for _ in range(60)]
        for i, connection in enumerate(idle):
            connection.sendall(head % paths[i % len(paths)])
        running.until(lambda: "pcae_uploads 16.0" in running.get("/metrics").text)
        assert "pcae_queue_depth 0.0" in running.get("/metrics").text
        time.sleep(0.3)  # a client is dropped only if it has had time to send
        assert [running.ask().status_code for _ in range(20)] == [200] * 20
        metrics = running.get("/metrics").text
        [failed] = re.findall(r'requests_total{outcome="upload_failed"} ([0-9.]+)', metrics)
        assert float(failed) >= 1


def test_a_head_that_dribbles_is_cut_off(running: Running) -> None:
    with running.raw() as slow, pytest.raises((ConnectionResetError, BrokenPipeError)):
        _dribble(slow, "GET /livez HTTP/1.1\r\nX-Slow: " + "x" * 2000)
    assert running.ask().status_code == 200


def _dribble(connection: socket.socket, text: str) -> None:
    for character in text:
        connection.sendall(character.encode())
        time.sleep(0.02)


def test_a_thousand_idle_connections_are_let_be_and_then_closed(running: Running) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    allowed, _ = resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE)
    assert allowed >= min(hard, 65_536)
    with contextlib.ExitStack() as stack:
        idle = list[socket.socket]()
        for i in range(1000):
            idle.append(stack.enter_context(running.raw()))
            if i % 2:  # half of them have asked before
                idle[-1].sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert all(connection.recv(12) == b"HTTP/1.1 200" for connection in idle[1::2])
        assert running.ask().status_code == 200
        for connection in idle:
            while connection.recv(4096):
                pass  # to the end: closed by the server
    open_files = len(list(Path(f"/proc/{running.process.pid}/fd").iterdir()))
    assert open_files < 100


def test_clients_that_leave_at_every_stage_cost_nobody_anything(running: Running) -> None:
    body = image_bytes()
    head = (
        "POST /classify?budget_ms=5000 HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    message = head.encode() + body
    for cut in (0, 10, len(head), len(head) + 20, len(message)):
        for linger_s in (0.0, 0.003):
            with running.raw() as client:
                client.sendall(message[:cut])
                time.sleep(linger_s)
    assert [running.ask().status_code for _ in range(5)] == [200] * 5
    running.until(lambda: "pcae_queue_depth 0.0" in running.get("/metrics").text)
    [left] = re.findall(r'outcome="cancelled"} ([0-9.]+)', running.get("/metrics").text)
    assert float(left) >= 1
    assert "Traceback" not in running.log.split("device-side assert triggered")[-1]


def test_a_call_that_never_comes_back_fails_livez_and_the_exit_does_not_wait(
    tmp_path: Path,
) -> None:
    with serving(tmp_path, "--watchdog-s", "1", TERMINATE_S="0.5") as running:
        waiting: list[int] = []
        others = [
            threading.Thread(target=lambda: waiting.append(running.ask().status_code))
            for _ in range(3)
        ]
        stuck = threading.Thread(target=lambda: waiting.append(running.ask(70).status_code))
        stuck.start()
        running.until(lambda: "the engine hangs" in running.log)
        for other in others:
            other.start()
        for thread in (stuck, *others):
            thread.join(60)
        assert sorted(waiting) == [500, 503, 503, 503]
        assert running.get("/livez").status_code == 503
        assert running.get("/readyz").status_code == 503
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 1


@contextmanager
def load(running: Running, clients: int = 6) -> Iterator[Counter[str]]:
    """Clients that ask one image after the other, until the end; what came of all they sent."""
    outcomes: Counter[str] = Counter()
    done = threading.Event()

    def client(level: int) -> None:
        with httpx2.Client(timeout=60) as session:
            while not done.is_set():
                try:
                    answer = session.post(
                        f"{running.url}/classify?budget_ms=20000", content=image_bytes(level)
                    )
                except httpx2.ConnectError:
                    outcomes["not connected"] += 1  # nothing was accepted
                    return
                except httpx2.TransportError as error:
                    outcomes[f"lost: {error!r}"] += 1
                    return
                outcomes[str(answer.status_code)] += 1
                if answer.status_code == 503:
                    if "retry-after" not in answer.headers:
                        outcomes["taken, and cut off"] += 1
                    return

    threads = [threading.Thread(target=client, args=(200 + i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        done.set()
        for thread in threads:
            thread.join(60)


def test_sigterm_under_load_answers_what_was_accepted(tmp_path: Path) -> None:
    with serving(tmp_path) as running, load(running) as outcomes:
        running.until(lambda: outcomes["200"] > 30)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(60) == 0
    lost = {outcome: n for outcome, n in outcomes.items() if outcome.startswith("lost")}
    assert not lost
    assert outcomes["500"] == outcomes["taken, and cut off"] == 0


def test_connections_that_are_kept_get_an_answer_that_ends_them_while_the_server_drains(
    tmp_path: Path,
) -> None:
    body = image_bytes()
    ask = (
        f"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    slow = ("--min-upload-kb-s", "0.001")
    with serving(tmp_path, *slow) as running, contextlib.ExitStack() as stack:
        kept = [stack.enter_context(running.raw()) for _ in range(24)]
        upload = stack.enter_context(running.raw())
        for connection in kept:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = connection.recv(4096)
            while not answer.endswith(b"}"):
                answer += connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"connection: close" not in answer
        upload.sendall(ask.replace(b"/classify", b"/classify?budget_ms=60000") + body[:-1])
        running.until(lambda: "pcae_uploads 1.0" in running.get("/metrics").text)
        running.process.send_signal(signal.SIGTERM)
        running.until(lambda: running.get("/readyz").status_code == 503)
        for connection in kept:
            connection.sendall(ask + body)
            answer = read_all(connection)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"urn:pcae-serve:draining" in answer
            assert b"connection: close" in answer
        upload.sendall(body[-1:])
        answer = read_all(upload)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in answer
        assert running.process.wait(60) == 0


def test_a_drain_is_bounded_and_not_ready_from_its_first_moment(tmp_path: Path) -> None:
    with serving(tmp_path, "--watchdog-s", "60", "--drain-s", "2", BATCH_S="0.5") as running:
        hanging = threading.Thread(target=_quiet, args=(running,))
        hanging.start()
        running.until(lambda: "the engine hangs" in running.log)
        begin_s = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        running.until(lambda: running.get("/readyz").status_code == 503)
        assert running.get("/livez").status_code == 200
        refused = running.ask()
        assert (refused.status_code, refused.json()["title"]) == (503, "Server is shutting down")
        assert running.process.wait(30) == 0  # long before the watchdog
        assert time.monotonic() - begin_s > 2
        hanging.join(60)


def _quiet(running: Running) -> None:
    with contextlib.suppress(httpx2.TransportError):
        running.ask(faulty.HANG, "budget_ms=60000")


def test_a_reload_under_load_drops_nobody(tmp_path: Path) -> None:
    keys = tmp_path / "admin"
    keys.write_text(f"# who may reload\n{ADMIN}\n")
    keys.chmod(0o600)
    admin = {"Authorization": f"Bearer {ADMIN}"}
    with (
        serving(tmp_path, "--admin-keys-file", str(keys)) as running,
        load(running) as outcomes,
    ):
        digest = running.get("/tiers").json()["digest"]
        running.until(lambda: outcomes["200"] > 20)

        folder = tmp_path / "served"
        shutil.rmtree(folder)
        write_bundle(folder, name="second", labels=["a", "b", "c", "d"])
        running.process.send_signal(signal.SIGHUP)
        running.until(lambda: running.get("/tiers").json()["digest"] != digest)
        assert running.ask(250).json()["predictions"][0]["label"] == "d"

        (folder / "models" / "vit" / "elastic.onnx").write_bytes(b"tampered")
        refused = httpx2.post(f"{running.url}/admin/reload", headers=admin, timeout=60)
        assert refused.status_code == 422
        assert "the old bundle stays in service" in refused.json()["detail"]
        assert running.ask(250).json()["predictions"][0]["label"] == "d"
        running.process.send_signal(signal.SIGHUP)
        running.until(lambda: running.log.count("reload failed, the old bundle stays") == 2)
        assert running.ask(250).json()["predictions"][0]["label"] == "d"

        (folder / "models" / "vit" / "elastic.onnx").unlink()
        os.mkfifo(folder / "models" / "vit" / "elastic.onnx")
        refused = httpx2.post(f"{running.url}/admin/reload", headers=admin, timeout=60)
        assert refused.status_code == 422
        assert "a FIFO, not a regular file" in refused.json()["detail"]

        shutil.rmtree(folder)
        write_bundle(folder, name="third", labels=["e", "f", "g", "h"])
        done = httpx2.post(f"{running.url}/admin/reload", headers=admin, timeout=60)
        assert (done.status_code, done.json()["bundle"]) == (200, "third")
        assert running.ask(250).json()["predictions"][0]["label"] == "h"
        served = outcomes["200"]
        running.until(lambda: outcomes["200"] > served + 20)
    assert set(outcomes) == {"200"}, outcomes


def test_a_full_disk_costs_the_cache_and_nothing_else(tmp_path: Path) -> None:
    with serving(tmp_path, limits={resource.RLIMIT_FSIZE: 0}) as running:
        assert running.ask().status_code == 200
        large = image_bytes(kind="BMP", size=(900, 700))  # beyond what is usually kept in memory
        answer = httpx2.post(f"{running.url}/classify?budget_ms=9000", files={"image": large})
        assert answer.status_code == 200
        running.process.send_signal(signal.SIGTERM)
        log = running.log_at_the_end()
    assert "cannot cache the latency profile" in log
    assert not list((tmp_path / "cache").rglob("*.json"))


def test_onnx_runtime_ends_a_batch_when_it_is_told_to() -> None:
    """Not only the stand-in: the real engine ends a long batch, which would return otherwise."""
    demo = load_bundle(demo_path())
    engine = OnnxRuntimeEngine(demo, threads=1)
    pixels = np.zeros((512, demo.image_size, demo.image_size, 3), np.uint8)

    async def scenario() -> None:
        run = asyncio.create_task(asyncio.to_thread(engine.run, demo.tiers[-1], pixels))
        await asyncio.sleep(0.3)
        assert not run.done()
        engine.terminate()
        with pytest.raises(Exception, match=r"[Tt]erminat"):
            await run

    asyncio.run(scenario())
    assert engine.run(demo.tiers[0], pixels[:1]).vectors.shape == (1, 10)
