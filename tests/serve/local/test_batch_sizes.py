"""The batch size of a run: sizes take turns, then the fastest is used, for each tier."""

from collections import Counter

from pcae_serve.local.batch_sizes import TRIALS, BatchSizes


def run(sizes: BatchSizes, tier: int, image_s: dict[int, float], batches: int) -> list[int]:
    chosen = []
    for _ in range(batches):
        size = sizes.choose()
        sizes.learn(tier, size, size * image_s[size])
        chosen.append(size)
    return chosen


def test_sizes_take_turns_and_the_fastest_is_used() -> None:
    chosen = run(BatchSizes(32), 0, {8: 0.9, 16: 0.7, 32: 1.0}, 30)
    # the tier is not known before the first batch is done
    assert Counter(chosen[: 3 * TRIALS + 1]) >= Counter({8: TRIALS, 16: TRIALS, 32: TRIALS})
    assert set(chosen[3 * TRIALS + 1 :]) == {16}


def test_one_slow_batch_decides_nothing() -> None:
    sizes = BatchSizes(32)
    for number in range(30):
        size = sizes.choose()
        slow = 5 if number < 3 else 1  # the machine had other work
        sizes.learn(0, size, slow * size * {8: 0.5, 16: 0.7, 32: 1.0}[size])
    assert sizes.choose() == 8


def test_each_tier_has_its_own() -> None:
    sizes = BatchSizes(32)
    run(sizes, 0, {8: 0.5, 16: 0.7, 32: 1.0}, 20)
    run(sizes, 1, {8: 0.9, 16: 0.7, 32: 0.4}, 20)
    assert sizes.choose() == 32
    run(sizes, 0, {8: 0.5, 16: 0.7, 32: 1.0}, 1)
    assert sizes.choose() == 8


def test_batches_before_the_first_answer_are_not_all_trials() -> None:
    """Nothing may be known yet when the next size is chosen: the largest one then."""
    sizes = BatchSizes(32)
    assert [sizes.choose() for _ in range(3 * TRIALS + 2)][-2:] == [32, 32]


def test_a_small_or_a_fixed_size_stays() -> None:
    assert {BatchSizes(4).choose() for _ in range(20)} == {4}
    fixed = BatchSizes(32, ())
    assert run(fixed, 0, {32: 1.0}, 10) == [32] * 10


def test_the_last_batch_of_a_run_is_not_a_trial() -> None:
    sizes = BatchSizes(32)
    run(sizes, 0, {8: 0.9, 16: 0.7, 32: 1.0}, 20)
    sizes.learn(0, 3, 1e-6)
    assert sizes.choose() == 16
