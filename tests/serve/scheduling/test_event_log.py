"""A live run's event log, and what a fresh machine makes of it."""

import asyncio
import contextlib
import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.errors import PcaeError, RequestError, StartError
from pcae_serve.runtime.service import Service
from pcae_serve.scheduling.event_log import Recorder, Setup, replay
from pcae_serve.scheduling.events import Arrived, Decoded, Dispatch, Event, SetTimer, Timer
from pcae_serve.scheduling.latency import Seconds
from pcae_serve.settings import Settings
from tests.support.inference import infer
from tests.support.scheduler_views import ALL, LINES, TIER_TABLE, waiting

MakeSettings = Callable[..., Settings]
SETUP = Setup(
    policy="greedy",
    waiting_price=0.1,
    tier_table=TIER_TABLE,
    seconds=[{b: Seconds(o + b * i, o + b * i) for b in (1, 32)} for o, i in LINES],
    max_batch=32,
    queue_limit=256,
    devices=1,
)


def quick(tier: Tier, batch: int) -> float:
    """10, 20 and 40 ms for the three tiers, and a tenth more for each further image."""
    return tier.macs * 1e-5 * (0.9 + 0.1 * batch)


async def crowd(service: Service, count: int) -> None:
    """Clients with budgets of all kinds, some of whom leave; more than the server can serve."""
    draw = random.Random(0)

    async def client(delay_s: float, budget_ms: float, leaves: bool) -> None:
        await asyncio.sleep(delay_s)
        min_tier = draw.choice((None, None, "balanced"))
        answer = infer(service, budget_ms, min_tier=min_tier)
        with contextlib.suppress(TimeoutError, RequestError):
            await asyncio.wait_for(answer, 0.02 if leaves else 20)

    await asyncio.gather(
        *(
            client(draw.uniform(0, 0.4), draw.choice((5, 60, 150, 400)), draw.random() < 0.1)
            for _ in range(count)
        )
    )


@pytest.mark.parametrize(
    ("policy", "devices"), [("greedy", 1), ("nexus:best", 1), ("slackfit", 2), ("pace", 1)]
)
def test_a_live_run_replayed_gives_the_same_actions(
    small_bundle: Bundle, settings: MakeSettings, tmp_path: Path, policy: str, devices: int
) -> None:
    log = tmp_path / "events.jsonl"

    async def live() -> None:
        engines = [SimulatedEngine(small_bundle, f"cuda:{i}", quick) for i in range(devices)]
        flags = {"policy": policy, "waiting_price": 0.3, "max_batch": 8, "profile_s": 0.1}
        chosen = settings(event_log=log, **flags)
        service = Service(chosen, small_bundle, engines)
        await service.start()
        await crowd(service, 60)
        await service.stop()

    asyncio.run(live())
    replayed = replay(log)
    assert replayed.difference is None
    assert replayed.events >= 60  # of a request that is refused at once there is but one
    assert replayed.events == len(log.read_text().splitlines()) - 1
    assert (replayed.setup.policy, replayed.setup.devices) == (policy, devices)
    assert replayed.setup.waiting_price == 0.3
    told = log.read_text()
    for name in (
        "Arrived",
        "Decoded",
        "ClientLeft",
        "Done",
        "Dispatch",
        "Reject",
        "BatchAccounted",
    ):
        assert f'["{name}",' in told


def record(path: Path, *events: Event, setup: Setup = SETUP) -> None:
    """What a machine does with these events, on file."""
    recorder, machine = Recorder(path), setup.scheduler(setup.latency())
    recorder.begin(setup)
    for event in events:
        recorder.record(event, machine.handle(event))
    recorder.close()


def arrivals(*budgets_s: float) -> list[Event]:
    return [Arrived(request.arrival_s, request) for request in waiting(*budgets_s)]


def test_a_file_says_itself_what_it_is_and_has_a_line_an_event(tmp_path: Path) -> None:
    record(path := tmp_path / "log", *arrivals(0.01, 1 / 3), Timer(1.0))
    head, *lines = map(json.loads, path.read_text().splitlines())
    assert Setup.model_validate(head) == SETUP
    assert [line[0][0] for line in lines] == ["Arrived", "Arrived", "Timer"]
    [refuse] = lines[0][1]
    assert refuse[0] == "Reject"
    assert refuse[1]["why"] == "budget"
    request = lines[1][0][1]["request"]
    assert (request["deadline_s"], request["tiers"]) == (1 / 3, list(ALL))  # to the bit


def test_the_first_action_that_differs_is_told(tmp_path: Path) -> None:
    record(path := tmp_path / "log", *arrivals(9.0, 0.01, 0.01))
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"why":"budget"', '"why":"full"')
    path.write_text("".join(lines))
    replayed = replay(path)
    assert replayed.events == 2
    assert replayed.difference is not None
    assert replayed.difference.line == 3
    assert "full" in replayed.difference.expected
    assert "budget" in replayed.difference.got
    assert "Arrived" in replayed.difference.event


def test_another_policy_acts_in_another_way(tmp_path: Path) -> None:
    record(path := tmp_path / "log", *arrivals(9.0), Decoded(0.0, 0))
    assert '"tier":2' in path.read_text()
    path.write_text(path.read_text().replace('"policy":"greedy"', '"policy":"fixed:fast"'))
    assert replay(path).difference is not None


def test_a_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
    record(path := tmp_path / "log", *arrivals(9.0, 9.0))
    path.write_bytes(path.read_bytes()[:-5])
    assert replay(path).events == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not an event log"),
        ("hello\n", "not an event log"),
        ("{}\n", "not an event log of this version: policy"),
        ("SETUP[1]\n", "line 2"),
        ('SETUP[["Danced",{}],[]]\n', "line 2"),
        ('SETUP[["Timer",{"when":1}],[]]\n', "line 2"),
        ('SETUP[["Done",{"now_s":1.0,"device":0,"seconds":1.0}],[]]\n', "line 2"),
        ('SETUP[["Done",{"now_s":1.0,"device":7,"seconds":1.0}],[]]\n', "line 2"),
        ('SETUP[["Timer",{"now_s":"soon"}],[]]\n', "line 2"),
        ('SETUP[["Timer",{"now_s":NaN}],[]]\n', "NaN is not a JSON number"),
        ("SETUP" + "[" * 100_000 + "\n", "levels deep"),
        ("SETUP" + " " * 5_000_000 + "\n", "line 2 has more than 4000000 bytes"),
        (
            '{"policy":"pace","waiting_price":0,"tier_table":{"names":["a"],"accuracy":[0.5]},"seconds":[],'
            '"max_batch":1000000000,"queue_limit":1,"devices":1}\n',
            "max_batch",
        ),
    ],
)
def test_what_is_no_event_log_is_told_in_one_line(tmp_path: Path, content: str, words: str) -> None:
    head = SETUP.model_dump_json() + "\n"
    (path := tmp_path / "log").write_text(content.replace("SETUP", head))
    with pytest.raises(PcaeError, match=words) as raised:
        replay(path)
    assert "\n" not in str(raised.value)


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PcaeError, match="cannot read"):
        replay(tmp_path / "nowhere")


def test_an_unknown_policy_in_a_log(tmp_path: Path) -> None:
    setup = SETUP.model_copy(update={"policy": "clairvoyant"})
    (path := tmp_path / "log").write_text(setup.model_dump_json() + "\n")
    with pytest.raises(StartError, match="clairvoyant"):
        replay(path)


def test_a_place_that_cannot_be_written_is_told_at_start(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot write"):
        Recorder(tmp_path / "nowhere" / "log")


def full_disk() -> Path:
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("no /dev/full here")
    return device


def test_a_full_disk_ends_the_log_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(full_disk())
    recorder.begin(SETUP)
    actions: list[Any] = [Dispatch(0, 0, tuple(range(32))), SetTimer(1.0)]
    for i in range(2000):
        recorder.record(Timer(float(i)), actions)
    recorder.close()
    recorder.close()
    assert [record.getMessage() for record in caplog.records] == [
        "the event log /dev/full ends: No space left on device"
    ]


def test_a_disk_that_is_full_only_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(full_disk())
    recorder.begin(SETUP)
    recorder.close()
    assert len(caplog.records) == 1


def test_what_an_idle_device_uses_is_what_answers_are_compared_with() -> None:
    """One image takes 0.1, 0.2 and 0.4 s; 5 points lie between two tiers."""
    latency = SETUP.latency()
    for policy, price, wanted in [
        ("pace", 0.0, 0.90),
        ("pace", 2.6, 0.85),  # 200 ms more are not worth 5 points
        ("pace+drop", 6.0, 0.80),
        ("greedy", 6.0, 0.90),  # does not consider the price
    ]:
        setup = SETUP.model_copy(update={"policy": policy, "waiting_price": price})
        assert setup.idle_accuracy(ALL, latency) == wanted
    margin = ((0.06,) * 3,) * 3
    close = {"tier_table": dataclasses.replace(TIER_TABLE, margin=margin), "policy": "pace"}
    setup = SETUP.model_copy(update=close)
    assert setup.counted_accuracy(ALL) == {0: 0.80, 1: 0.85, 2: 0.85}
    assert setup.idle_accuracy(ALL, latency) == 0.85
