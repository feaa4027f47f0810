"""The same server in replicas of Ray Serve: `serve run pcae_serve.integrations.ray:app`.

    client -> Ray's proxy -> a replica: this server's own ASGI app, with its queue and its batches

Ray places replicas, counts them and brings back those that die. Batches and deadlines stay inside
the app, which knows budgets: Ray's own queue must stay empty, so a replica takes more requests at
once than the app does, and what is too much is refused by the app, at once and with a reason.
Settings are the PCAE_* variables, as everywhere. This is the one module that knows Ray.
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingContext
from starlette.types import ASGIApp

from pcae_serve.api import proxy_delay
from pcae_serve.api.app import create_app
from pcae_serve.api.auth import Keys
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.engines.base import Engine, run_directly
from pcae_serve.engines.loader import load_configured_engine
from pcae_serve.errors import StartError, one_line
from pcae_serve.observability import logs
from pcae_serve.observability.logs import RequestId
from pcae_serve.observability.metrics import Tally
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings

#: More than `queue_limit` (256): what is too much reaches the app, which says when to come back.
MAX_ONGOING = 512
#: Where every replica holds that many, so many wait at each proxy; the rest is refused there.
MAX_QUEUED = 64
#: A replica's answers to what is in hand at the end, longer than the largest budget.
SHUTDOWN_S = 60.0

#: One more replica where answers lack this share of what separates the best tier from the worst,
DEBT_SHARE = 0.25
#: or this share of the requests misses its deadline because of the load,
MISSED_SHARE = 0.02
#: or the work in hand takes this share of the default budget.
WAIT_SHARE = 0.5
#: One less only where every signal is below this share of its limit.
CALM = 0.25


class Replica:
    """A process that serves one bundle; Ray's proxies hand it requests."""

    def __init__(self) -> None:
        settings = Settings()
        cores = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0)) or 1
        # Ray counts cores but confines nobody to them
        mine = {"threads": settings.threads or cores}
        mine |= {"decode_threads": settings.decode_threads or cores}
        self._settings = settings = settings.model_copy(update=mine)
        logs.configure(settings.log_format, settings.log_level)
        keys, admin_keys = Keys.read(settings.api_keys_file), Keys.read(settings.admin_keys_file)
        served = load_bundle(settings.bundle or demo_path())
        loaded = [self._engine(served, i) for i in range(len(settings.devices))]
        self._failures = list[BaseException]()
        self._service = Service(settings, served, loaded, self._engine)
        self._signals = Signals(self._service)
        app = create_app(self._service, self._failures.append, keys, admin_keys)
        self._app = proxy_delay.SubtractDelay(RequestId(app, access_log=settings.access_log))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    async def check_health(self) -> None:
        """The first one lasts until requests are taken: no replica gets any before."""
        while self._service.latency is None:
            if self._failures:
                raise StartError(f"the latencies cannot be measured: {one_line(self._failures[0])}")
            await asyncio.sleep(0.05)
        self._service.require_alive()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return self._signals.read()

    def _engine(
        self, served: Bundle, device: int, through: Callable[[Engine], Engine] = run_directly
    ) -> Engine:
        return load_configured_engine(
            self._settings, served, self._settings.devices[device], through
        )


class Signals:
    """What a replica tells the autoscaler: each is 1 where one more replica is wanted."""

    def __init__(self, service: Service) -> None:
        self._service, self._last = service, Tally(0, 0, 0)

    def read(self) -> dict[str, float]:
        """Of the time since the last reading, but the wait, which is of now."""
        now, last = self._service.metrics.tally(), self._last
        self._last = now
        in_time, missed = now.in_time - last.in_time, now.missed - last.missed
        debt = (now.owed - last.owed) / in_time if in_time else 0.0
        offered, span = in_time + missed, self._service.accuracy_range
        budget_s = self._service.settings.budget_ms / 1e3
        return {
            "debt": debt / (DEBT_SHARE * span) if span else 0.0,
            "missed": missed / offered / MISSED_SHARE if offered else 0.0,
            "wait": self._service.predicted_wait_s / (WAIT_SHARE * budget_s),
        }


def replicas_wanted(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """One more where any signal asks for it, one less where all are calm. Ray waits its delays.

    Not by a ratio, as for requests in flight: half the debt does not mean twice the machines.
    """
    now = context.target_num_replicas
    told = context.aggregated_metrics or {}
    most = max((_mean(told.get(name)) for name in ("debt", "missed", "wait")), default=0.0)
    if most >= 1:
        return now + 1, {}
    return (now - 1 if most < CALM else now), {}


def _mean(values: Mapping[Any, float] | None) -> float:
    """Over the replicas; a wait that cannot be told is left out."""
    known = [value for value in (values or {}).values() if math.isfinite(value)]
    return sum(known) / len(known) if known else 0.0


deployment = serve.deployment(
    serve.ingress()(Replica),
    name="pcae-serve",
    ray_actor_options={"num_cpus": 1},
    max_ongoing_requests=MAX_ONGOING,
    max_queued_requests=MAX_QUEUED,
    graceful_shutdown_timeout_s=SHUTDOWN_S,
    graceful_shutdown_wait_loop_s=0.5,
    health_check_period_s=5,
    health_check_timeout_s=30,
    autoscaling_config={
        "min_replicas": 1,
        "max_replicas": 4,
        "look_back_period_s": 15,  # it must exceed the 10 s between two readings
        "upscale_delay_s": 10,  # accuracy absorbs seconds, replicas absorb minutes
        "downscale_delay_s": 300,
        "policy": {"policy_function": "pcae_serve.integrations.ray:replicas_wanted"},
    },
)
app = deployment.bind()
