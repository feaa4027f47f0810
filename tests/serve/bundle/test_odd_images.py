"""Every odd image through the HTTP application: the status, a line of why, what it may cost."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.reader import load_bundle
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.errors import RequestError
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings
from tests.support.apps import problem, serving
from tests.support.bundles import write_bundle
from tests.support.odd_images import CASES, Odd

ROOT = Path(__file__).parents[3]
SMALL = Preprocess(image_size=8, resize=9, mean=(0.5,) * 3, std=(0.5,) * 3)

#: What may be mutated: small files of every type.
VALID = {
    name: body
    for name, (make, status) in CASES.items()
    if status == 200 and name != "jpeg-large" and len(body := make()) < 20_000
}

pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")  # as preprocess has it


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("odd")
    served = load_bundle(write_bundle(folder / "bundle"))
    engine = SimulatedEngine(served, seconds=lambda tier, batch: tier.macs * 1e-7)
    with serving(Service(Settings(cache_dir=folder, profile_s=0.1), served, [engine])) as client:
        yield client


@pytest.mark.parametrize("name", CASES)
def test_status(client: TestClient, name: str) -> None:
    case: Odd = CASES[name]
    response = client.post("/classify?budget_ms=20000", content=case.make())
    if case.status == 200:
        assert response.status_code == 200, response.text
        assert response.json()["predictions"]
    else:
        document = problem(response, case.status)
        assert 10 < len(document["detail"]) < 300


def test_there_are_enough() -> None:
    assert len(CASES) >= 60
    assert {case.status for case in CASES.values()} == {200, 400, 413, 415}


def test_no_case_is_expensive() -> None:
    """CPU time of each case, and peak memory of all, in a process of its own."""
    code = """
import resource, sys, time
from pcae_serve.errors import RequestError
from pcae_serve.bundle.preprocess import Preprocess
from tests.support.odd_images import CASES
bodies = [(name, make()) for name, (make, _) in CASES.items()]
preprocess = Preprocess(224, 256, (0.5,) * 3, (0.5,) * 3)
def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
before = memory("VmRSS")
for name, body in bodies:
    begin = time.process_time()
    try:
        preprocess(body)
    except RequestError:
        pass
    took = time.process_time() - begin
    assert took < 1.5, f"{name} took {took:.1f} s"
print(memory("VmHWM") - before)
"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 200, f"{done.stdout} MB at the peak"


def answers(body: bytes) -> None:
    """Check that a body gives pixels or a RequestError with a one-line detail."""
    try:
        pixels = SMALL(body, max_pixels=300_000)
    except RequestError as error:
        refused = error
    else:
        assert pixels.shape == (8, 8, 3)
        assert pixels.dtype == np.uint8
        return
    assert refused.status in (400, 413, 415)
    assert refused.detail
    assert "\n" not in refused.detail


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(VALID)), share=st.floats(0, 1))
def test_cut_off_anywhere(name: str, share: float) -> None:
    body = VALID[name]
    answers(body[: int(share * len(body))])


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(VALID)))
def test_bytes_changed_anywhere(data: st.DataObject, name: str) -> None:
    body = bytearray(VALID[name])
    for _ in range(data.draw(st.integers(1, 8))):
        # half of the changes go to the header, which matters most
        end = data.draw(st.sampled_from([min(64, len(body)), len(body)]))
        body[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    answers(bytes(body))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(VALID)))
def test_a_part_repeated(data: st.DataObject, name: str) -> None:
    body = VALID[name]
    start = data.draw(st.integers(0, len(body) - 1))
    part = body[start : start + data.draw(st.integers(1, 64))]
    answers(body[:start] + part * data.draw(st.integers(2, 200)) + body[start:])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(sorted({body[:12] for body in VALID.values()})))
def test_anything_behind_magic(tail: bytes, magic: bytes) -> None:
    answers(magic + tail)
