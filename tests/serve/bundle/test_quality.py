import pytest

from pcae_serve.bundle.quality import wilson_interval


def test_wilsons_interval() -> None:
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # a textbook's
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1), abs=1e-4)
