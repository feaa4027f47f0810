"""A request with a first answer, wherever its life may end: that answer is never lost."""

import asyncio
import re
import threading
from asyncio import FIRST_COMPLETED
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.runtime import latency_profile
from pcae_serve.runtime import service as services
from pcae_serve.runtime.replacement import Replacement
from pcae_serve.runtime.requests import InferenceRequest, InferenceResult
from pcae_serve.runtime.servable import Servable
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings
from tests.support.apps import serving
from tests.support.bundles import write_bundle
from tests.support.images import image_bytes
from tests.support.unsure import CALIBRATION, FIRST, SECOND, Unsure

MakeSettings = Callable[..., Settings]
Call = asyncio.Task[InferenceResult]


@pytest.fixture
def calibrated(tmp_path: Any) -> Bundle:
    changes = {"schema_version": 3, "calibration": CALIBRATION}
    return load_bundle(write_bundle(tmp_path / "calibrated", **changes))


@pytest.fixture
def engine() -> Any:
    engine = Unsure()
    yield engine
    engine.open.set()


async def classify(service: Service, budget_ms: float = 60_000, **more: Any) -> InferenceResult:
    arrival_s = asyncio.get_running_loop().time()
    with service.offer(InferenceRequest(arrival_s, budget_ms, **more)) as offered:
        return await offered.run(image_bytes())


def run(
    scenario: Callable[[Service], Awaitable[InferenceResult]],
    settings: Settings,
    bundle: Bundle,
    engine: Unsure,
    make_engine: Any = None,
) -> tuple[InferenceResult, str]:
    """Return the result of a scenario, and the metrics at its end, when nothing is left behind."""

    async def whole() -> tuple[InferenceResult, str]:
        service = Service(settings, bundle, [engine], make_engine)
        await service.start()
        result = await scenario(service)
        engine.open.set()
        while service.unanswered:
            await asyncio.sleep(0.005)
        assert service._resources.memory.used_bytes == 0
        await service.stop()
        return result, service.metrics.exposition()[0].decode()

    return asyncio.run(whole())


async def looking(service: Service, engine: Unsure, budget_ms: float = 60_000) -> Call:
    """Return the call of a request whose second look has begun, and does not end."""
    engine.shut()
    call = asyncio.create_task(classify(service, budget_ms))
    await asyncio.to_thread(engine.entered.wait, 20)
    return call


def is_first(result: InferenceResult) -> bool:
    return (result.tier.name, result.looks, int(result.vector.argmax())) == ("fast", 1, FIRST)


@pytest.fixture
def quick_first(settings: MakeSettings) -> Settings:
    return settings(policy="fixed:fast", watchdog_s=20)


def test_a_second_look_replaces_the_first_answer(
    calibrated: Bundle, engine: Unsure, quick_first: Settings
) -> None:
    result, counts = run(classify, quick_first, calibrated, engine)
    assert (result.tier.name, result.looks) == ("full", 2)
    assert int(result.vector.argmax()) == SECOND
    assert result.reason.startswith("a second look: on tier 'fast' the first class was only")
    assert result.total_s == pytest.approx(
        result.decode_s + result.queue_s + result.compute_s, abs=0.05
    )
    assert 'pcae_second_looks_total{changed="true",tier="full"} 1.0' in counts
    assert 'pcae_requests_total{outcome="in_time"} 1.0' in counts
    assert "pcae_accuracy_debt_total 0.0" in counts


@pytest.mark.parametrize(
    ("more", "fields"),
    [({"max_looks": 1}, {}), ({}, {"max_looks": 1}), ({"tier": "fast"}, {})],
)
def test_a_request_that_may_run_once_runs_once(
    calibrated: Bundle,
    engine: Unsure,
    settings: MakeSettings,
    more: dict[str, Any],
    fields: dict[str, Any],
) -> None:
    chosen = settings(policy="fixed:fast", **fields)
    result, _ = run(lambda service: classify(service, **more), chosen, calibrated, engine)
    assert is_first(result)


def test_a_bundle_without_calibration_runs_every_image_once(
    small_bundle: Bundle, engine: Unsure, quick_first: Settings
) -> None:
    result, _ = run(classify, quick_first, small_bundle, engine)
    assert is_first(result)
    assert result.reason.startswith("chosen by policy")


def test_at_the_deadline_the_first_answer_is_sent(
    calibrated: Bundle, engine: Unsure, quick_first: Settings
) -> None:
    async def scenario(service: Service) -> InferenceResult:
        return await (await looking(service, engine, budget_ms=3000))

    result, counts = run(scenario, quick_first, calibrated, engine)
    assert is_first(result)
    assert result.met_budget
    assert 2.5 < result.total_s < 3.0
    assert 'pcae_requests_total{outcome="in_time"} 1.0' in counts
    # `full` is 0.1 more accurate; half of the images gain, 0.2 each
    [debt] = re.findall(r"^pcae_accuracy_debt_total (\S+)", counts, re.MULTILINE)
    assert float(debt) == pytest.approx(0.2)


def test_a_client_that_leaves_during_its_second_look_leaves_nothing_behind(
    calibrated: Bundle, engine: Unsure, quick_first: Settings
) -> None:
    async def scenario(service: Service) -> InferenceResult:
        call = await looking(service, engine)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert service.unanswered == 0
        engine.open.set()
        return await classify(service)

    result, counts = run(scenario, quick_first, calibrated, engine)
    assert result.looks == 2
    assert 'pcae_requests_total{outcome="cancelled"} 1.0' in counts


@pytest.mark.parametrize("fault", ["raises", "not finite"])
def test_a_second_look_that_fails_costs_no_answer(
    calibrated: Bundle, engine: Unsure, quick_first: Settings, fault: str
) -> None:
    async def scenario(service: Service) -> InferenceResult:
        call = await looking(service, engine)
        if fault == "raises":
            engine.fails = RuntimeError("out of memory")
        else:
            engine.finite = False
        engine.open.set()
        return await call

    result, counts = run(scenario, quick_first, calibrated, engine)
    assert is_first(result)
    assert 'pcae_requests_total{outcome="in_time"} 1.0' in counts
    assert 'pcae_requests_total{outcome="failed"} 0.0' in counts


def test_a_second_look_that_hangs_costs_no_answer(
    calibrated: Bundle, engine: Unsure, settings: MakeSettings
) -> None:
    async def scenario(service: Service) -> InferenceResult:
        return await (await looking(service, engine))

    chosen = settings(policy="fixed:fast", watchdog_s=0.2)
    result, _ = run(scenario, chosen, calibrated, engine)
    assert is_first(result)


@pytest.mark.parametrize("end", ["drain", "reload"])
def test_what_waits_is_sent_when_the_bundle_goes(
    calibrated: Bundle,
    engine: Unsure,
    quick_first: Settings,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    """The device is busy with another first look, so that the second look has not begun."""
    if end == "reload":  # without trials, which would need the device
        monkeypatch.setattr(services, "load_replacement", replaced)

    async def scenario(service: Service) -> InferenceResult:
        servable = service._current
        assert isinstance(servable, Servable)
        engine.firsts = threading.Semaphore(0)
        call, other = (asyncio.create_task(classify(service)) for _ in range(2))
        while not servable._driver.scheduler._queue:  # the other request, decoded
            await asyncio.sleep(0.005)
        engine.firsts.release()
        while not any(each.first_answer for each in servable._offered.values()):
            await asyncio.sleep(0.005)
        assert not call.done()
        if end == "drain":
            service.drain()
        else:
            await service.reload()
            assert service._current is not servable
        done, _ = await asyncio.wait({call, other}, timeout=5, return_when=FIRST_COMPLETED)
        engine.firsts.release(100)
        assert done == {call}
        assert is_first(await other)
        return call.result()

    result, counts = run(scenario, quick_first, calibrated, engine, lambda *_: Unsure())
    assert is_first(result)
    assert 'pcae_requests_total{outcome="in_time"} 2.0' in counts


def replaced(old: Servable, *_: Any) -> Replacement:
    """Return the same bundle with another engine."""
    engine = Unsure()
    profile = latency_profile.load(old.bundle, engine, old.settings.cache_dir, 0.1)
    return Replacement(old.bundle, [engine], profile)


def test_a_second_look_that_runs_during_a_reload_still_answers(
    calibrated: Bundle,
    engine: Unsure,
    quick_first: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(services, "load_replacement", replaced)

    async def scenario(service: Service) -> InferenceResult:
        call = await looking(service, engine)
        await service.reload()
        await asyncio.sleep(0.05)
        assert not call.done()
        engine.open.set()
        return await asyncio.wait_for(call, 5)

    result, counts = run(scenario, quick_first, calibrated, engine, lambda *_: Unsure())
    assert (result.tier.name, result.looks) == ("full", 2)
    assert 'pcae_requests_total{outcome="in_time"} 1.0' in counts


def test_what_waits_is_sent_at_the_end(
    calibrated: Bundle,
    engine: Unsure,
    quick_first: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(services, "BATCH_S", 0.1)

    async def scenario(service: Service) -> InferenceResult:
        call = await looking(service, engine)
        service.refuse_unanswered()
        return await asyncio.wait_for(call, 5)

    result, _ = run(scenario, quick_first, calibrated, engine)
    assert is_first(result)


def test_memory_that_is_needed_is_taken_from_first_answers(
    calibrated: Bundle, engine: Unsure, quick_first: Settings
) -> None:
    async def scenario(service: Service) -> InferenceResult:
        call = await looking(service, engine)
        memory = service._resources.memory
        assert memory.used_bytes == 3 * calibrated.image_size**2
        with memory.reserve() as more:
            assert more.try_resize(memory.limit_bytes)
            return await asyncio.wait_for(call, 5)

    result, _ = run(scenario, quick_first, calibrated, engine)
    assert is_first(result)


def test_each_image_of_a_batch_has_its_own_looks(
    calibrated: Bundle, engine: Unsure, quick_first: Settings
) -> None:
    service = Service(quick_first, calibrated, [engine])
    with serving(service) as client:
        files = [("image", ("i.png", image_bytes(), "image/png")) for _ in range(3)]
        reply = client.post("/classify/batch?budget_ms=30000", files=files)
        answers = [each["answer"] for each in reply.json()["results"]]
        looks = {(each["looks"], each["first_tier"], each["tier"]) for each in answers}
        assert looks == {(2, "fast", "full")}
        assert client.get("/tiers").json()["max_looks"] == 2
        one = client.post("/classify?budget_ms=30000&max_looks=1", content=image_bytes()).json()
        assert (one["looks"], one["first_tier"], one["tier"]) == (1, None, "fast")
        # softmax of 0.25, 0, 0, 0: the logits divided by the temperature
        assert one["confidence"] == one["predictions"][0]["probability"]
        assert one["confidence"] == pytest.approx(np.exp(0.25) / (np.exp(0.25) + 3), abs=1e-5)
        infer = client.post("/v2/models/test/infer", content=image_bytes(), headers=ALONE).json()
        assert infer["parameters"]["looks"] == "2"
        for wrong in ("0", "3", "x"):
            refused = client.post(f"/classify?max_looks={wrong}", content=image_bytes())
            assert refused.status_code == 422
            assert "max_looks" in refused.json()["detail"]


ALONE = {"Inference-Header-Content-Length": "0"}
