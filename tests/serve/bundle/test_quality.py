import pytest

from pcae_serve.bundle.quality import difference_margins, wilson_interval


def test_wilsons_interval() -> None:
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # a textbook's
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1), abs=1e-4)


def test_newcombes_interval_of_a_difference() -> None:
    shares = (56 / 70, 48 / 80)
    margins = difference_margins(shares, [wilson_interval(shares[0], 70), wilson_interval(0.6, 80)])
    assert shares[0] - shares[1] - margins[0][1] == pytest.approx(0.0524, abs=1e-4)  # his own
    assert shares[0] - shares[1] + margins[1][0] == pytest.approx(0.3339, abs=1e-4)
