import pytest
import torch

from pcae_training.sample_rng import SampleRng, drop_path_factors, generator


def test_a_sample_draws_the_same_whoever_has_it() -> None:
    whole = SampleRng(seed=3, step=7, batch_size=8)
    for purpose in ("mask", "crop"):
        parts = [
            SampleRng(3, 7, 8, start, start + 2).uniform(purpose, 5) for start in range(0, 8, 2)
        ]
        assert torch.equal(torch.cat(parts), whole.uniform(purpose, 5))
    assert SampleRng(3, 7, 8, 4, 8).draw_shared("budget") == whole.draw_shared("budget")


def test_what_came_before_makes_no_difference() -> None:
    one, other = SampleRng(0, 1, 4), SampleRng(0, 1, 4)
    one.uniform("crop", 9)
    torch.manual_seed(5)
    assert torch.equal(one.uniform("mask", 3), other.uniform("mask", 3))


@pytest.mark.parametrize("other", [SampleRng(1, 0, 4), SampleRng(0, 1, 4)])
def test_seed_step_and_purpose_each_make_other_numbers(other: SampleRng) -> None:
    numbers = SampleRng(0, 0, 4).uniform("mask", 6)
    assert not torch.equal(numbers, other.uniform("mask", 6))
    assert not torch.equal(numbers, SampleRng(0, 0, 4).uniform("crop", 6))


def test_numbers_are_even_in_the_unit_interval() -> None:
    numbers = torch.cat(
        [SampleRng(0, step, 64).uniform("mask", 49).flatten() for step in range(50)]
    )
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.mean() == pytest.approx(0.5, abs=3 * 0.2887 / len(numbers) ** 0.5)
    shared = [SampleRng(0, step, 4).draw_shared("budget") for step in range(400)]
    assert 0.45 < sum(shared) / 400 < 0.55


def test_generators_depend_on_every_part_of_the_key() -> None:
    keys = [(1, 2, "a"), (2, 1, "a"), (1, 2, "b"), (12, "a"), (1, "2", "a")]
    firsts = {torch.rand((), generator=generator(*key)).item() for key in keys}
    assert len(firsts) == len(keys)


def test_drop_path_keeps_the_expected_value() -> None:
    assert drop_path_factors(SampleRng(0, 0, 4), 12, 0.0, torch.device("cpu")) is None
    factors = drop_path_factors(SampleRng(0, 0, 4000), 3, 0.4, torch.device("cpu"))
    assert factors is not None
    assert factors.shape == (3, 2, 4000)
    for block, keep in enumerate((1.0, 0.8, 0.6)):  # the rate rises along the blocks
        values = factors[block]
        expected = [1.0] if keep == 1 else [0.0, 1 / keep]
        assert sorted(set(values.flatten().tolist())) == pytest.approx(expected)
        assert (values > 0).float().mean() == pytest.approx(keep, abs=0.03)
    assert not torch.equal(factors[2, 0], factors[2, 1])  # each branch by itself
