"""The price of waiting: the accuracy that a batch gains, minus the response time that it costs.

    gain    accuracy points per image over each request's cheapest tier. A difference inside its
            own interval is none. Requests that allow no cheaper tier neither gain nor cause delay.
    delay   seconds per image over the floor tier, times every request that waits for them: those of
            the batch, those queued behind it, and those that arrive until the queue is empty, at
            most until the longest horizon.

If requests stay queued behind a batch, its tier is judged as if it stayed in use: the queue empties
at its pace, and if the load is more than it can serve, it gains only for the share of the requests
that it can serve while the others run on the floor tier. Otherwise the batch is judged by itself,
and the queue empties at the pace of the floor tier. If second looks are possible, a tier's gain is
always judged by that share, as that of the second looks is, and both are added. A slower tier
therefore costs little on an idle device, and far more than its own time near saturation.
"""

from collections.abc import Iterable, Mapping

from pcae_serve.scheduling.policies.outlook import Batch, Outlook
from pcae_serve.scheduling.request_queue import Request
from pcae_serve.scheduling.tiers import TierTable

#: Price of the default policy, in accuracy points per 100 ms of response time.
DEFAULT_PRICE = 0.1
#: Accuracy per second of response time at a price of 1 point per 100 ms.
ACCURACY_PER_S = 0.01 / 0.1
#: Least accuracy to divide by.
LEAST_ACCURACY = 1e-9


class WaitingPrice:
    """Chooses among batches by accuracy and response time; 0: waiting is free."""

    def __init__(self, tier_table: TierTable, points_per_100_ms: float = 0.0) -> None:
        self._tier_table, self._measured = tier_table, dict(enumerate(tier_table.accuracy))
        self._per_s = points_per_100_ms * ACCURACY_PER_S
        self._counted: dict[tuple[int, ...], Mapping[int, float]] = {}  # by allowed tiers

    def __bool__(self) -> bool:
        return self._per_s > 0

    def relative_gain(self, request: Request, tier: int, floor: int) -> float:
        """Return the accuracy gained by running a request on `tier`, relative to its cheapest tier.

        floor: the cheapest tier that may run now. A request that is pinned to `tier` gains nothing.
        """
        accuracy, cheapest = self._accuracy(request, floor)
        return accuracy[tier] / max(accuracy[cheapest], LEAST_ACCURACY) - 1

    def look_gain(self, outlook: Outlook, batch: Batch) -> float:
        """Return what second looks are expected to gain per image after a batch."""
        view, first = outlook.view, batch.tier
        if view.escalations is None:
            return 0.0
        tiers = [tier for tier in outlook.tiers if tier > first]
        requests = batch.requests(view)
        rate = outlook.arrival_rate
        first_s = max(outlook.image_s(first), view.forecast.p50(first, batch.size) / batch.size)
        plan = view.escalations.plan(first, tiers, view.forecast, rate, first_s)
        if plan is None:
            return 0.0
        until_s = view.now_s + batch.busy_s + view.forecast.p99(plan.second, 1)
        may = sum(
            request.max_looks > 1 and plan.second in request.tiers and request.deadline_s >= until_s
            for request in requests
        )
        return plan.gain * may / len(requests)

    def best(self, outlook: Outlook, floor: Batch, better: Iterable[Batch]) -> Batch:
        """Return the batch with the greatest value; the floor has none, and wins ties.

        better: batches on other tiers, the cheapest first.
        """
        best, best_value, most_gain = floor, self.look_gain(outlook, floor), 0.0
        for batch in better:
            gain = self._gain(outlook, batch)
            if gain <= most_gain:
                continue  # a faster tier is as accurate
            most_gain = gain
            value = gain * _sustained_share(outlook, batch) - self._per_s * _delay_s(outlook, batch)
            value += self.look_gain(outlook, batch)
            if value > best_value:
                best, best_value = batch, value
        return best

    def _gain(self, outlook: Outlook, batch: Batch) -> float:
        """Return the accuracy gained per image of a batch, of those that allow a cheaper tier."""
        total, choosing = 0.0, 0
        for request in batch.requests(outlook.view):
            accuracy, cheapest = self._accuracy(request, outlook.floor)
            if cheapest < batch.tier:
                total += accuracy[batch.tier] - accuracy[cheapest]
                choosing += 1
        return total / choosing if choosing else 0.0

    def _accuracy(self, request: Request, floor: int) -> tuple[Mapping[int, float], int]:
        """Return accuracies by tier, and the cheapest tier that the request can run on."""
        tiers, cheapest = request.tiers, max(floor, request.tiers[0])
        if not self:
            return self._measured, cheapest
        if cheapest not in tiers:
            tiers = tuple(sorted((cheapest, *tiers)))
        if tiers not in self._counted:
            self._counted[tiers] = self._tier_table.counted(tiers)
        return self._counted[tiers], cheapest


def _sustained_share(outlook: Outlook, batch: Batch) -> float:
    """Return the share of the requests that the load allows on the batch's tier, if it goes on."""
    if _waiting_behind(outlook, batch) == 0 and outlook.view.escalations is None:
        return 1.0
    rate = outlook.arrival_rate
    image_s, floor_s = outlook.image_s(batch.tier), outlook.floor_image_s
    if rate * image_s <= 1 or image_s <= floor_s:
        return 1.0
    return max(0.0, (1 / rate - floor_s) / (image_s - floor_s))


def _delay_s(outlook: Outlook, batch: Batch) -> float:
    """Return the response time that an image of the batch costs all requests, over the floor."""
    forecast, size, floor = outlook.view.forecast, batch.size, outlook.floor
    behind, rate = _waiting_behind(outlook, batch), outlook.arrival_rate
    floor_size = min(size, outlook.steady)
    batch_s = forecast.p50(batch.tier, size)
    more_s = batch_s / size - forecast.p50(floor, floor_size) / floor_size
    image_s = outlook.floor_image_s
    if behind:
        image_s = max(image_s, outlook.image_s(batch.tier))
    # until the queue is empty, if it ever is
    busy_s = longest_s = outlook.horizons[-1].within_s
    if rate * image_s < 1:
        busy_s = min(longest_s, (batch_s + behind * image_s) / (1 - rate * image_s))
    return max(0.0, more_s) * (size + behind + rate * busy_s)


def _waiting_behind(outlook: Outlook, batch: Batch) -> float:
    """Return the queued requests that the batch does not hold, per device."""
    return (len(outlook.view.queue) - batch.size) / outlook.view.devices
