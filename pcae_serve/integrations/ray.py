"""Ray Serve deployment: `serve run pcae_serve.integrations.ray:app`.

    client -> Ray's proxy -> replica: the ASGI app of this server, with its own queue and batches

Ray places, scales and restarts replicas. Batching and deadlines stay inside the app, which knows
the budgets. Ray's own queue must stay empty, so a replica accepts more requests at once than the
app admits, and the app rejects the excess at once, with a reason. Settings are the PCAE_*
variables.
"""

import asyncio
import math
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingContext
from starlette.types import ASGIApp

from pcae_serve.api import proxy_delay
from pcae_serve.api.app import create_app
from pcae_serve.api.auth import read_keys
from pcae_serve.api.browser_access import browser_access
from pcae_serve.errors import StartError, one_line
from pcae_serve.observability import logs
from pcae_serve.observability.logs import RequestId
from pcae_serve.observability.metrics import Totals
from pcae_serve.runtime.build import build_service
from pcae_serve.runtime.service import Service, State
from pcae_serve.settings import Settings

#: Requests per replica. Larger than `queue_limit` (256), so that the app rejects the excess,
#: with Retry-After.
MAX_ONGOING = 512
#: Requests that wait at each proxy once all replicas are full; Ray rejects further ones.
MAX_QUEUED = 64
#: Seconds that a replica has to answer its requests when it stops; more than the largest budget.
SHUTDOWN_S = 60.0

#: Scale up if the mean accuracy lost to cheaper tiers exceeds this share of the range between the
#: best tier and the worst.
DEBT_SHARE = 0.25
#: Scale up if a larger share of the requests misses its deadline because of load.
MISSED_SHARE = 0.02
#: Scale up if the predicted wait exceeds this share of the default budget.
WAIT_SHARE = 0.5
#: Scale down only if every signal is below this share of its limit.
CALM = 0.25


class Replica:
    """A Ray Serve replica: one process that serves one bundle."""

    def __init__(self) -> None:
        settings = Settings()
        cpus = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 0)) or 1
        # Ray accounts for CPUs but does not restrict a process to them
        threads = {"threads": settings.threads or cpus}
        threads |= {"decode_threads": settings.decode_threads or cpus}
        settings = settings.model_copy(update=threads)
        logs.configure(settings.log_format, settings.log_level)
        keys, admin_keys = read_keys(settings)
        self._failures = list[BaseException]()
        self._service = build_service(settings)
        self._signals = Signals(self._service)
        app = create_app(self._service, self._failures.append, keys, admin_keys)
        checked = browser_access(app, settings, proxied=True)
        self._app = proxy_delay.SubtractDelay(RequestId(checked, access_log=settings.access_log))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    async def check_health(self) -> None:
        """Raise if the replica cannot serve. The first call waits until requests are admitted."""
        while self._service.state is State.STARTING:
            if self._failures:
                raise StartError(f"cannot measure latencies: {one_line(self._failures[0])}")
            await asyncio.sleep(0.05)
        self._service.require_alive()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return self._signals.read()


class Signals:
    """A replica's autoscaling signals; a signal of 1 or more asks for one more replica."""

    def __init__(self, service: Service) -> None:
        self._service, self._last = service, Totals(0, 0, 0)

    def read(self) -> dict[str, float]:
        """Return the signals since the last reading; `wait` is the current value."""
        now, last = self._service.metrics.totals(), self._last
        self._last = now
        in_time, missed = now.in_time - last.in_time, now.missed - last.missed
        debt = (now.accuracy_debt - last.accuracy_debt) / in_time if in_time else 0.0
        offered, span = in_time + missed, self._service.accuracy_range
        budget_s = self._service.settings.budget_ms / 1e3
        return {
            "debt": debt / (DEBT_SHARE * span) if span else 0.0,
            "missed": missed / offered / MISSED_SHARE if offered else 0.0,
            "wait": self._service.predicted_wait_s / (WAIT_SHARE * budget_s),
        }


def replicas_wanted(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Return one replica more if any signal asks for it, one less if all are low.

    Ray applies its delays. The signals are not ratios of capacity, unlike requests in flight: half
    the accuracy debt does not mean half the replicas.
    """
    now = context.target_num_replicas
    signals = context.aggregated_metrics or {}
    highest = max((_mean(signals.get(name)) for name in ("debt", "missed", "wait")), default=0.0)
    if highest >= 1:
        return now + 1, {}
    return (now - 1 if highest < CALM else now), {}


def _mean(values: Mapping[Any, float] | None) -> float:
    """Return the mean over the replicas, without values that are not finite."""
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
