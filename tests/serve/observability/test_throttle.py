"""Floods of one event in the log."""

import logging

import pytest

from pcae_serve.observability.throttle import INTERVAL_S, Throttle


def test_one_record_per_interval_with_the_number_of_those_skipped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = 5.0
    throttle = Throttle(logging.getLogger("test"), lambda: now_s)
    for _ in range(100):
        throttle.warning("limit of %d", 3)
    now_s += INTERVAL_S
    for _ in range(2):
        throttle.warning("limit of %d", 4)
    assert caplog.messages == ["limit of 3", "limit of 4 (99 more since the last record)"]
