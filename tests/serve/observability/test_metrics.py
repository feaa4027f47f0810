import asyncio
import contextlib
import math
import re
import threading
import time
from collections.abc import Callable
from inspect import isfunction
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import Output, Pixels
from pcae_serve.errors import RequestError, TooLarge, UnreadableImage, UnsupportedType
from pcae_serve.observability.metrics import STAGES, WASTE, Failure, Metrics, Reload
from pcae_serve.observability.outcomes import MISSED, Outcome
from pcae_serve.runtime import refusals
from pcae_serve.runtime.service import Service
from pcae_serve.scheduling.events import Reject, Remove
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.settings import Settings
from pcae_serve.version import __version__
from tests.support.inference import infer

MakeSettings = Callable[..., Settings]
OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"


def samples(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    """Values by name and labels' values in the order of the labels, as Prometheus reads them."""
    content, media_type = metrics.exposition()
    assert media_type.startswith("text/plain")
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(content.decode()):
        for sample in family.samples:
            key = tuple(sample.labels[label] for label in sorted(sample.labels))
            found.setdefault(sample.name, {})[key] = sample.value
    return found


def read(metrics: Metrics, name: str) -> dict[str, float]:
    """A series' values by its only label, or by "" where it has none."""
    return {"".join(labels): value for labels, value in samples(metrics).get(name, {}).items()}


def answered(metrics: Metrics, tier: str, **changes: Any) -> None:
    """An answer in time by the best tier allowed, but for what `changes` say."""
    values = {
        "decode_s": 0.004,
        "queue_s": 0.001,
        "compute_s": 0.03,
        "total_s": 0.04,
        "in_time": True,
        "degraded": False,
        "accuracy": 0.8,
        "best_accuracy": 0.8,
    }
    metrics.record_answer(tier, **(values | changes))


def test_every_series_is_there_from_the_start() -> None:
    metrics = Metrics(["fast", "full"])
    assert read(metrics, "pcae_requests_total") == dict.fromkeys(Outcome, 0)
    assert read(metrics, "pcae_compute_seconds_total") == {"fast": 0, "full": 0}
    assert read(metrics, "pcae_wasted_compute_seconds_total") == dict.fromkeys(WASTE, 0)
    assert read(metrics, "pcae_reloads_total") == dict.fromkeys(Reload, 0)
    assert read(metrics, "pcae_accuracy_sum_total") == {"": 0}
    found = samples(metrics)
    for tier in ("fast", "full"):
        assert all(found["pcae_stage_seconds_count"][stage, tier] == 0 for stage in STAGES)
        assert all(found["pcae_engine_failures_total"][kind, tier] == 0 for kind in Failure)
        assert found["pcae_answers_total"]["true", tier] == 0
        assert found["pcae_tier_disabled"][tier,] == 0
    assert found["process_resident_memory_bytes"][()] > 1e6
    assert found["process_open_fds"][()] > 0


def test_nothing_tells_when_a_series_was_made() -> None:
    assert not [name for name in samples(Metrics(["fast"])) if name.endswith("_created")]
    plain = CollectorRegistry()
    Counter("others", "Somebody else's, in this process.", registry=plain)
    assert b"others_created" in generate_latest(plain)  # theirs to decide


def test_tiers_of_another_bundle_join_those_there() -> None:
    metrics = Metrics(["fast", "full"])
    answered(metrics, "full")
    metrics.add_tiers(["full", "tiny"])
    answered(metrics, "gone")  # of a bundle before: counted, not lost
    found = samples(metrics)["pcae_answers_total"]
    assert {tier: count for (degraded, tier), count in found.items() if degraded == "false"} == {
        "fast": 0,
        "full": 1,
        "tiny": 0,
        "gone": 1,
    }


def test_an_answer_is_counted_by_stage_and_tier() -> None:
    metrics = Metrics(["fast", "full"])
    answered(metrics, "full", compute_s=0.03)
    answered(metrics, "full", compute_s=30.0, in_time=False, degraded=True)
    found = samples(metrics)
    assert found["pcae_stage_seconds_count"]["compute", "full"] == 2
    assert found["pcae_stage_seconds_sum"]["compute", "full"] == pytest.approx(30.03)
    assert found["pcae_stage_seconds_sum"]["queue", "full"] == pytest.approx(0.002)
    borders = {
        float(border): count
        for (border, stage, tier), count in found["pcae_stage_seconds_bucket"].items()
        if (stage, tier) == ("compute", "full")
    }
    assert (min(borders), sorted(borders)[-2]) == (0.001, 10)
    assert (borders[0.02], borders[0.05], borders[10], borders[math.inf]) == (0, 1, 1, 2)
    assert found["pcae_answers_total"] == {
        ("false", "fast"): 0,
        ("true", "fast"): 0,
        ("false", "full"): 1,
        ("true", "full"): 1,
    }


def test_accuracy_counts_over_answers_in_time() -> None:
    metrics = Metrics(["fast", "full"])
    answered(metrics, "full", accuracy=0.9, best_accuracy=0.9)
    answered(metrics, "fast", accuracy=0.8, best_accuracy=0.9, degraded=True)
    answered(metrics, "fast", accuracy=0.8, best_accuracy=0.8)  # pinned: nothing is owed
    answered(metrics, "fast", accuracy=0.8, best_accuracy=0.9, in_time=False)
    assert read(metrics, "pcae_accuracy_sum_total")[""] == pytest.approx(2.5)
    assert read(metrics, "pcae_accuracy_debt_total")[""] == pytest.approx(0.1)


@pytest.mark.parametrize("odd", [math.nan, -1.0])
def test_an_odd_accuracy_spoils_no_counter(odd: float) -> None:
    metrics = Metrics(["fast"])
    answered(metrics, "fast", accuracy=odd, best_accuracy=odd)
    answered(metrics, "fast", accuracy=0.9, best_accuracy=0.8)  # better than the last tier
    assert read(metrics, "pcae_accuracy_sum_total")[""] == pytest.approx(0.9)
    assert read(metrics, "pcae_accuracy_debt_total")[""] == 0


def test_a_batch_is_counted_by_size_and_by_how_well_it_was_predicted() -> None:
    metrics = Metrics(["fast", "full"])
    metrics.record_batch("full", 0.3, batch=6, late=0, cancelled=0, padding=2, predicted_s=0.2)
    metrics.record_batch("full", 0.1, batch=1, late=0, cancelled=0, padding=0)
    metrics.record_batch(
        "fast", 0.0, batch=5, late=0, cancelled=0, padding=0, predicted_s=1
    )  # it failed
    found = samples(metrics)
    assert found["pcae_batch_size_sum"] == {("fast",): 0, ("full",): 7}
    assert found["pcae_batch_size_count"] == {("fast",): 0, ("full",): 2}
    assert found["pcae_prediction_error_ratio_sum"]["full",] == pytest.approx(1.5)
    assert found["pcae_prediction_error_ratio_count"] == {("fast",): 0, ("full",): 1}


def test_gauges_are_asked_at_each_scrape_and_can_be_pointed_elsewhere() -> None:
    metrics, queue = Metrics(["fast"]), [1, 2, 3]
    assert read(metrics, "pcae_ready") == {"": 0}
    metrics.watch(lambda: len(queue), lambda: 0.25, lambda: True)
    queue.append(4)
    names = ("pcae_queue_depth", "pcae_predicted_wait_seconds", "pcae_ready")
    assert [read(metrics, name)[""] for name in names] == [4, 0.25, 1]
    metrics.watch(lambda: 0, lambda: 0.5, lambda: False)
    assert [read(metrics, name)[""] for name in names] == [0, 0.5, 0]


def test_a_gauge_that_cannot_be_read_costs_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> float:
        raise RuntimeError("no forecast now")

    metrics = Metrics(["fast"])
    metrics.watch(lambda: 7, broken, lambda: True)
    assert math.isnan(read(metrics, "pcae_predicted_wait_seconds")[""])
    assert read(metrics, "pcae_queue_depth") == {"": 7}
    assert "pcae_predicted_wait_seconds cannot be read" in caplog.text


def test_what_serves_what_is_told_once() -> None:
    metrics = Metrics(["fast"])
    metrics.set_build_info(bundle="one", backend="cuda")
    metrics.set_build_info(bundle="other", backend="cuda")
    [(labels, value)] = samples(metrics)["pcae_build_info"].items()
    assert value == 1
    assert __version__ in labels
    assert "other" in labels
    assert "one" not in labels


def test_failures_breakers_reloads_and_limits() -> None:
    metrics = Metrics(["fast", "full"])
    metrics.record_failure("full", Failure.TIMEOUT)
    metrics.set_tier_disabled("full", True)
    metrics.set_tier_disabled("fast", True)
    metrics.set_tier_disabled("fast", False)
    metrics.record_reload(Reload.FAILED)
    metrics.set_limits(max_batch=32, queue_limit=256)
    found = samples(metrics)
    failures = found["pcae_engine_failures_total"]
    assert {key for key, count in failures.items() if count} == {("timeout", "full")}
    assert found["pcae_tier_disabled"] == {("fast",): 0, ("full",): 1}
    assert read(metrics, "pcae_reloads_total") == {"done": 0, "failed": 1}
    assert (found["pcae_max_batch"][()], found["pcae_queue_limit"][()]) == (32, 256)


def test_every_series_is_documented() -> None:
    text = OPERATIONS.read_text()
    cells = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `pcae_")]
    documented = {name.strip(" `"): set(re.findall(r"`(\w+)`", labels)) for name, labels in cells}
    metrics = Metrics(["fast"])
    metrics.callers.add(["web"])
    content, _ = metrics.exposition()
    served: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(content.decode()):
        if family.name.startswith("pcae_"):
            name = family.name + "_total" * (family.type == "counter")
            labels = {label for sample in family.samples for label in sample.labels}
            served[name] = labels - {"le"}
    served["pcae_build_info"] = documented["pcae_build_info"]  # whatever `build_info` is told
    assert documented == served
    for word in (*WASTE, *STAGES, *Failure, *Reload):
        assert f"`{word}`" in text
    used = set(re.findall(r"\bpcae_\w+", "".join(re.findall("```promql(.*?)```", text, re.DOTALL))))
    assert used <= set(samples(Metrics(["fast"])))


#: Every refusal, as it may be made.
REFUSALS = {
    "rejected": [
        refusals.rejected(Reject(1, why, 0.1, 1.0), Request(1, 0.0, 0.005, (0,)), "fast", 256)
        for why in get_args(get_type_hints(Reject)["why"])
    ],
    "queue_full": [refusals.queue_full(256, 1)],
    "rate_limited": [refusals.rate_limited(5.0, 0.2)],
    "beyond_burst": [refusals.beyond_burst(5.0, 6)],
    "upload_timeout": [refusals.upload_timeout(30)],
    "upload_too_slow": [refusals.upload_too_slow(1e4)],
    "upload_dropped": [refusals.upload_dropped()],
    "uploads_full": [refusals.uploads_full(1024)],
    "memory_full": [refusals.memory_full()],
    "over_memory": [refusals.over_memory(2, 1)],
    "expired_before_decoded": [refusals.expired_before_decoded(5)],
    "expired_in_queue": [refusals.expired_in_queue(5)],
    "dropped": [refusals.dropped("pace")],
    "tiers_disabled": [refusals.tiers_disabled(["fast"], 15)],
    "nothing_works": [refusals.nothing_works(15)],
    "no_engine": [refusals.no_engine()],
    "device_lost": [refusals.device_lost()],
    "batch_failed": [refusals.batch_failed()],
    "batch_not_started": [refusals.batch_not_started()],
    "out_of_memory": [refusals.out_of_memory()],
    "starting": [refusals.starting()],
    "stopping": [refusals.stopping()],
    "stopped": [refusals.stopped()],
}


def test_every_outcome_is_documented_with_its_statuses_and_other_places() -> None:
    named = [n for n, f in vars(refusals).items() if get_type_hints_of(f) is refusals.Refusal]
    assert set(REFUSALS) == set(named)
    statuses: dict[str, set[int]] = {outcome: set() for outcome in Outcome}
    for refusal in chain.from_iterable(REFUSALS.values()):
        statuses[refusal.outcome].add(refusal.error.status)
    statuses["in_time"] = statuses["late"] = {200}
    statuses["cancelled"] = {499}
    statuses["unreadable"] = {e.status for e in (UnreadableImage, TooLarge, UnsupportedType)}

    text = OPERATIONS.read_text().partition("## Outcomes")[2].partition("## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    table = {row[0].strip("`"): row for row in rows if len(row) == 4 and row[0].startswith("`")}
    found = {word: set(map(int, row[1].split(", "))) for word, row in table.items()}
    assert found == statuses
    also = {word: row[2] for word, row in table.items()}
    reasons = {f"rejected_{why}": why for why in get_args(get_type_hints(Reject)["why"])}
    reasons |= {why: why for why in get_args(get_type_hints(Remove)["why"])}
    for word, place in also.items():
        action = "Reject" if word.startswith("rejected_") else "Remove"
        logged = f"event log `{action}`, `{reasons[word]}`" if word in reasons else ""
        assert (logged in place) if logged else ("`Re" not in place), word
        assert (f"wasted compute `{word}`" in place) == (word in WASTE), word


def get_type_hints_of(function: object) -> object:
    """What a function of `refusals` returns."""
    own = isfunction(function) and function.__module__ == refusals.__name__
    return get_type_hints(function)["return"] if own else None


def test_two_services_in_one_process_do_not_add_up() -> None:
    one, other = Metrics(["fast"]), Metrics(["fast"])
    one.record_request(Outcome.IN_TIME)
    assert read(one, "pcae_requests_total")["in_time"] == 1
    assert read(other, "pcae_requests_total")["in_time"] == 0


def test_no_second_is_wasted_twice() -> None:
    metrics = Metrics(["fast", "full"])
    metrics.record_batch("full", 8.0, batch=6, late=3, cancelled=1, padding=2)
    metrics.record_batch("full", 1.0, batch=1, late=0, cancelled=0, padding=0)
    assert read(metrics, "pcae_compute_seconds_total") == {"fast": 0, "full": 9}
    wasted = read(metrics, "pcae_wasted_compute_seconds_total")
    assert wasted == {"late": 3, "cancelled": 1, "padding": 2}


class Bucketed:
    """An engine that fills every batch up to four, and fails or dawdles when told to."""

    name, version, device, threads = "bucketed", "1", "cpu", 0
    sizes = (1,)

    def terminate(self) -> None:
        """It is let through, not stopped."""

    def close(self) -> None:
        """Nothing to give back."""

    def __init__(self) -> None:
        self.fails, self.seconds, self.entered = False, 0.002, threading.Event()

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        self.entered.set()
        if self.fails:
            raise RuntimeError("out of memory")
        time.sleep(self.seconds)
        return Output(np.zeros((len(pixels), 4), np.float32), (), padding=4 - len(pixels) % 4)


def test_every_end_of_a_request_is_counted_once(
    small_bundle: Bundle, settings: MakeSettings
) -> None:
    engine = Bucketed()
    service = Service(settings(profile_s=0.05), small_bundle, [engine])

    async def ask(budget_ms: float, body: bytes | None = None, upload_s: float = 0.0) -> None:
        with contextlib.suppress(RequestError):
            await infer(service, budget_ms, body, upload_s=upload_s)

    async def scenario() -> None:
        await ask(1000)  # before the start
        await service.start()
        await ask(10_000)
        await ask(0.001)
        await ask(10_000, b"no image")
        await ask(200, upload_s=9)  # it uploads too long
        engine.seconds = 0.5
        await ask(400)  # nobody could know
        engine.fails = True
        await ask(10_000)
        engine.fails = False
        engine.entered.clear()
        leaving = asyncio.create_task(ask(10_000))
        await asyncio.to_thread(engine.entered.wait, 20)
        leaving.cancel()
        while not read(service.metrics, "pcae_wasted_compute_seconds_total")["cancelled"]:
            await asyncio.sleep(0.02)
        await service.stop()

    asyncio.run(scenario())
    ends = read(service.metrics, "pcae_requests_total")
    assert {end: count for end, count in ends.items() if count} == {
        "draining": 1,
        "in_time": 1,
        "rejected_budget": 1,
        "unreadable": 1,
        "expired": 1,
        "late": 1,
        "failed": 1,
        "cancelled": 1,
    }
    spent = read(service.metrics, "pcae_compute_seconds_total")
    wasted = read(service.metrics, "pcae_wasted_compute_seconds_total")
    total_s = sum(spent.values())
    assert total_s >= 1.0  # two batches of half a second, and a short one in time
    assert wasted["padding"] == pytest.approx(0.75 * total_s)  # of each batch, three rows in four
    assert wasted["late"] >= 0.125
    assert wasted["cancelled"] >= 0.125
    assert wasted["late"] + wasted["cancelled"] < 0.25 * total_s


def test_what_an_autoscaler_goes_by() -> None:
    metrics = Metrics(["fast", "full"])
    metrics.set_accuracy_range(0.1)
    for outcome in (*MISSED, Outcome.IN_TIME, Outcome.REJECTED_BUDGET, Outcome.CANCELLED):
        metrics.record_request(outcome)  # the last two are the callers' doing
    times = {"decode_s": 0.0, "queue_s": 0.0, "compute_s": 0.0, "total_s": 0.0}
    metrics.record_answer(
        "fast", **times, in_time=True, degraded=True, accuracy=0.8, best_accuracy=0.9
    )
    totals = metrics.totals()
    assert (totals.in_time, totals.missed) == (1, len(MISSED))
    assert totals.accuracy_debt == pytest.approx(0.1)
    assert "pcae_accuracy_range 0.1" in metrics.exposition()[0].decode()
