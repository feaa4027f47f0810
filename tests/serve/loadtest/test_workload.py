from pathlib import Path

import numpy as np
import pytest

from pcae_serve.errors import StartError
from pcae_serve.loadtest import workload
from pcae_serve.loadtest.workload import (
    MIXES,
    SILENCE_S,
    TRACES,
    arrivals,
    budgets,
    load,
    make,
    statistics,
)

FULL_S = 0.010


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("rate", [3.0, 250.0])
def test_every_trace_has_the_rate_asked_for(trace: str, rate: float) -> None:
    times_s = arrivals(trace, rate, 2000, seed=1)
    assert times_s.shape == (2000,)
    assert times_s[0] == 0
    assert (np.diff(times_s) >= 0).all()
    assert times_s[-1] == pytest.approx(1999 / rate, abs=1e-6)


@pytest.mark.parametrize(("trace", "cv2"), [("poisson", 1), ("gamma-2", 2), ("gamma-4", 4)])
def test_gaps_vary_as_named(trace: str, cv2: float) -> None:
    assert statistics(arrivals(trace, 100.0, 50_000, seed=0)).gap_cv2 == pytest.approx(cv2, rel=0.1)


def test_gaps_of_gamma_8_vary_as_named() -> None:  # its sample is the widest
    cv2 = [statistics(arrivals("gamma-8", 100.0, 50_000, seed=i)).gap_cv2 for i in range(4)]
    assert np.mean(cv2) == pytest.approx(8, rel=0.05)


def test_the_ramp_rises_from_a_fifth_to_nine_fifths() -> None:
    tenths, _ = np.histogram(arrivals("ramp", 100.0, 50_000, seed=0), bins=10)
    assert tenths / 5000 == pytest.approx(np.linspace(0.28, 1.72, 10), abs=0.08)


def test_the_flash_is_four_times_what_is_around_it() -> None:
    twentieths, _ = np.histogram(arrivals("flash", 100.0, 50_000, seed=0), bins=20)
    expected = np.full(20, 1 / 1.3)
    expected[9:11] *= 4
    assert twentieths / 2500 == pytest.approx(expected, rel=0.08)
    assert pytest.approx(expected.max()) == workload.FLASH_PEAK


def test_the_recorded_trace_stays_bursty_once_its_silences_are_cut() -> None:
    whole = arrivals("azure-code", 8818 / 1061.374, 8819, seed=3)  # as fast as recorded
    seen = statistics(whole)
    assert seen.gap_cv2 == pytest.approx(9.05, abs=0.01)
    assert seen.peak == pytest.approx(61, abs=12)  # windows lie elsewhere
    assert 5 < seen.dispersion < 15
    assert 8 < np.diff(whole).max() <= SILENCE_S


def test_the_recorded_trace_is_vendored_whole_with_its_source() -> None:
    folder = Path(workload.__file__).parent / "traces"
    recorded = np.array((folder / "azure_llm_code.txt").read_text().split(), dtype=float)
    assert len(recorded) == 8819
    assert recorded[[0, 1, -1]].tolist() == [0, 0.052, 3435.948056]
    assert statistics(recorded).gap_cv2 == pytest.approx(173, abs=0.1)
    assert all(word in (folder / "README.md").read_text() for word in ("CC-BY 4.0", "Splitwise"))


def test_the_recorded_trace_goes_on_from_its_start_after_its_end() -> None:
    gaps = np.diff(arrivals("azure-code", 10.0, 8818 + 200, seed=5))
    assert gaps[:199] == pytest.approx(gaps[8818:], abs=2e-6)


def test_a_seed_picks_the_window_of_the_recorded_trace() -> None:
    one, other = (arrivals("azure-code", 10.0, 100, seed=i) for i in (0, 1))
    assert not np.allclose(one, other)


# Three arrivals each; another numpy or machine that draws otherwise makes records incomparable.
@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        ("azure-code", [0.012619, 4.89941, 9.989815]),
        ("poisson", [0.007223, 5.29431, 9.972645]),
        ("gamma-2", [0.008677, 4.923286, 9.941562]),
        ("gamma-4", [0.006636, 5.008729, 9.982471]),
        ("gamma-8", [0.002132, 4.918519, 9.989971]),
        ("ramp", [0.035607, 6.977554, 9.980354]),
        ("flash", [0.00939, 5.092276, 9.967439]),
    ],
)
def test_a_seed_gives_the_same_times_everywhere(trace: str, expected: list[float]) -> None:
    seen = arrivals(trace, 100.0, 1000, seed=7)[[1, 500, 998]]
    assert seen == pytest.approx(expected, abs=2e-6)  # a last digit may round otherwise


def test_a_seed_gives_the_same_budgets_everywhere() -> None:
    multiples = budgets("mixed", 1.0, 8, seed=7).astype(int)
    assert multiples.tolist() == [8, 3, 3, 3, 8, 8, 50, 8]


@pytest.mark.parametrize(
    ("mix", "shares"),
    [
        ("mixed", {0.03: 0.3, 0.08: 0.5, 0.5: 0.2}),
        ("single", {0.08: 1}),
        ("loose", {0.08: 0.5, 0.5: 0.5}),
        ("12.5", {0.125: 1}),
        ("2:1, 4:3", {0.02: 0.25, 0.04: 0.75}),
    ],
)
def test_budgets_come_in_the_shares_of_the_mix(mix: str, shares: dict[float, float]) -> None:
    seconds, counts = np.unique(budgets(mix, FULL_S, 20_000, seed=0), return_counts=True)
    assert seconds.tolist() == list(shares)
    assert counts / 20_000 == pytest.approx(list(shares.values()), abs=0.02)


def test_gaps_and_budgets_are_independent() -> None:
    made = make("poisson", "loose", 100.0, 20_001, FULL_S, seed=0)
    gaps = np.diff(made.times_s)
    for shifted in (made.budgets_s[:-1], made.budgets_s[1:]):
        assert abs(np.corrcoef(gaps, shifted)[0, 1]) < 0.03


@pytest.mark.parametrize("trace", ["azure-code", "gamma-8"])
def test_a_saved_workload_is_loaded_bit_for_bit(trace: str, tmp_path: Path) -> None:
    made = make(trace, "mixed", 300.0, 500, full_s=0.0123456789, seed=2)
    made.save(tmp_path / "saved.csv")
    assert (tmp_path / "saved.csv").read_text().startswith("arrival_s,budget_ms\n0.000000,")
    for again in (
        load(tmp_path / "saved.csv"),
        make(str(tmp_path / "saved.csv"), "single", None, 500, FULL_S, seed=0),
    ):
        assert again.times_s.tolist() == made.times_s.tolist()
        assert again.budgets_s.tolist() == made.budgets_s.tolist()


def test_a_trace_of_ones_own_is_cut_and_paced_and_keeps_its_budgets(tmp_path: Path) -> None:
    trace = written(tmp_path / "own.csv", "arrival_s,budget_ms\n100,40\n101,50\n104,60\n900,70\n")
    made = make(trace, "mixed", 10.0, 3, FULL_S, seed=0)
    assert made.times_s.tolist() == [0, 0.05, 0.2]
    assert made.budgets_s.tolist() == [0.04, 0.05, 0.06]


def test_a_trace_without_budgets_gets_them_from_the_mix(tmp_path: Path) -> None:
    trace = written(tmp_path / "own.csv", "arrival_s\n5\n5\n7.5\n")
    made = make(trace, "single", None, 100, FULL_S, seed=0)
    assert made.times_s.tolist() == [0, 0, 2.5]
    assert made.budgets_s.tolist() == [0.08, 0.08, 0.08]
    with pytest.raises(StartError, match="line 1: no column budget_ms"):
        load(Path(trace))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the header must be"),
        ("time,budget\n1,2\n", "line 1: the header must be"),
        ("arrival_s,budget_ms\n", "contains no requests"),
        ("arrival_s,budget_ms\n1,20\n0.5,20\n", "line 3: earlier than the line above"),
        ("arrival_s,budget_ms\n1,20\n2,0\n", "line 3: a budget must be"),
        ("arrival_s,budget_ms\n1,20\n2,-4\n", "line 3: a budget must be"),
        ("arrival_s,budget_ms\n1,20\ninf,20\n", "line 3: 'inf,20' must be two finite numbers"),
        ("arrival_s,budget_ms\nnan,20\n", "line 2: 'nan,20' must be two finite numbers"),
        ("arrival_s,budget_ms\n1,20\n2\n", "line 3: '2' must be two finite numbers"),
        ("arrival_s\n0\n1e15\n", "line 3: times are limited to 1e\\+07 s"),
        ("arrival_s\n1\nsoon\n", "line 3: 'soon' must be a finite number"),
    ],
)
def test_a_damaged_trace_is_named_by_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=message) as caught:
        load(Path(written(tmp_path / "own.csv", text)))
    assert "own.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_trace_that_is_missing_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"cannot read the trace .*none\.csv"):
        make(str(tmp_path / "none.csv"), "mixed", None, 10, FULL_S, seed=0)
    (tmp_path / "own.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StartError, match=r"cannot read the trace .*own\.csv"):
        load(tmp_path / "own.csv")


def test_the_error_for_an_unknown_trace_lists_the_names() -> None:
    with pytest.raises(StartError) as caught:
        arrivals("gamma-3", 10.0, 10, seed=0)
    assert all(name in str(caught.value) for name in ("'gamma-3'", *TRACES))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mix", ["", "tight", "3:", ":1", "3:0.5:1", "3,,8"])
def test_the_error_for_an_unknown_mix_lists_the_names(mix: str) -> None:
    with pytest.raises(StartError) as caught:
        budgets(mix, FULL_S, 10, seed=0)
    assert all(name in str(caught.value) for name in (repr(mix), *MIXES))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mix", ["0", "-3", "3:0,8:1", "3:-1,8:2", "nan", "inf", "8:inf"])
def test_a_mix_takes_numbers_above_0_only(mix: str) -> None:
    with pytest.raises(StartError, match="must be a number above 0"):
        budgets(mix, FULL_S, 10, seed=0)


@pytest.mark.parametrize(
    ("rate", "count", "seed", "message"),
    [
        (0.0, 10, 0, "rate 0.0 must be"),
        (float("nan"), 10, 0, "rate nan must be"),
        (None, 10, 0, "needs a rate"),
        (10.0, 0, 0, "not 0"),
        (10.0, 10, -1, "seed -1 must be"),
    ],
)
def test_invalid_numbers_are_rejected(
    rate: float | None, count: int, seed: int, message: str
) -> None:
    with pytest.raises(StartError, match=message):
        make("poisson", "mixed", rate, count, FULL_S, seed)


@pytest.mark.parametrize("trace", TRACES)
def test_a_workload_of_one(trace: str) -> None:
    assert arrivals(trace, 10.0, 1, seed=0).tolist() == [0]


def test_statistics_of_a_trace_counted_by_hand() -> None:
    seen = statistics(np.array([7.0, 7.5, 7.75, 9.0, 10.25]))  # windows of 3, 0, 1 and a last 1
    assert seen.rate == pytest.approx(4 / 3.25)
    assert seen.gap_cv2 == pytest.approx(np.var([0.5, 0.25, 1.25, 1.25]) / 0.8125**2)
    assert seen.dispersion == pytest.approx(np.var([3, 0, 1]) / (4 / 3))
    assert seen.peak == 3
    assert statistics(np.array([0.0, 0.5]), window_s=0.1).peak == pytest.approx(10)


def test_statistics_need_two_different_times() -> None:
    for times_s in ([1.0], [1.0, 1.0]):
        with pytest.raises(StartError, match="two different times"):
            statistics(np.array(times_s))
