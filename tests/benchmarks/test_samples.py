"""The statistics on made-up samples whose truth is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatvla_edge.benchmarks.samples import (
    Samples,
    curve,
    difference,
    median_interval,
    noise_floor,
    ratio,
)


def rounds_of(seed: int, typical: float, *, spread: float = 0.02, count: int = 41) -> list[np.ndarray]:
    """Rounds of a machine that is up to twice as slow at times: the same times in all rounds of one `weather`."""
    weather = np.random.default_rng(99).uniform(1, 2, count)
    chance = np.random.default_rng(seed)
    return [typical * slow * np.exp(chance.normal(0, spread, 20)) for slow in weather]


def a(name: str, seed: int, typical: float = 1e-3, **more) -> Samples:
    return Samples.of(name, *rounds_of(seed, typical, **more))


def test_the_same_against_itself_holds_1_and_is_no_difference():
    found = ratio(a("A", 1), a("A'", 2))
    assert found.low <= 1 <= found.high
    assert not found.difference
    assert found.text == "within noise"


@pytest.mark.parametrize("truth", [1, 1.2])
def test_the_interval_covers_the_truth_as_often_as_it_says(truth):
    inside = 0
    for seed in range(200):
        found = ratio(a("B", 2 * seed, truth * 1e-3), a("A", 2 * seed + 1))
        inside += found.low <= truth <= found.high
    assert inside >= 180  # 95 % of 200 is 190; fewer than 180 has a probability below 1e-6


def test_a_fifth_more_is_found_though_the_machine_wanders_by_twice():
    noise = noise_floor(a("A", 1), a("A'", 2))
    found = ratio(a("B", 3, 1.2e-3), a("A", 1), noise=noise)
    assert found.difference
    assert found.low > 1.1
    assert found.value == pytest.approx(1.2, rel=0.02)
    assert found.text.startswith("1.2")


def test_what_is_smaller_than_the_noise_is_called_noise():
    # A/A was 5 % off, so 3 % cannot be told, however narrow its own interval is.
    noise = noise_floor(a("A", 1, 1.05e-3), a("A'", 2))
    found = ratio(a("B", 3, 1.03e-3), a("A", 1), noise=noise)
    assert not found.low <= 1 <= found.high
    assert not found.difference
    assert found.text.startswith("within noise (A/A ±5")


def test_too_few_rounds_are_called_too_few():
    found = ratio(a("B", 3, 5e-3, count=3), a("A", 1, count=3))
    assert not found.difference
    assert "too few rounds (3)" in found.text


def test_a_ratio_and_its_reciprocal_agree():
    one, other = a("A", 1, count=10), a("B", 2, 3e-3, count=10)
    assert ratio(one, other).value * ratio(other, one).value == pytest.approx(1)
    assert ratio(one, other).low * ratio(other, one).high == pytest.approx(1)


def test_a_tail_is_compared_by_its_own_quantile():
    calm = Samples.of("calm", *[np.linspace(1, 2, 100)] * 9)
    spiky = Samples.of("spiky", *[np.r_[np.linspace(1, 2, 90), np.full(10, 9.0)]] * 9)
    assert ratio(spiky, calm).value < 1.2
    assert ratio(spiky, calm, quantile=0.99).value > 4
    assert difference(spiky, calm, quantile=0.99).value == pytest.approx(9 - 1.99, abs=0.01)


@pytest.mark.parametrize(("count", "confidence"), [(1, 0.0), (3, 0.75), (5, 0.9375), (6, 0.96875)])
def test_few_values_give_their_whole_range_and_say_its_confidence(count, confidence):
    found = median_interval(np.arange(count))
    assert (found.low, found.high) == (0, count - 1)
    assert found.confidence == pytest.approx(confidence)


@given(st.integers(6, 1500))
def test_the_interval_is_confident_enough_and_not_wider_than_it_must_be(count):
    found = median_interval(np.arange(count))
    assert found.confidence >= 0.949
    assert found.low <= found.value <= found.high
    assert found.high - found.low <= 2 * 1.96 * np.sqrt(count) / 2 + 3


def test_the_normal_approximation_continues_the_exact_ranks():
    exact, approximate = (median_interval(np.arange(count)) for count in (400, 401))
    assert approximate.low - exact.low in (0, 1)


def test_a_percentile_needs_the_samples_that_carry_it():
    assert Samples.of("x", np.arange(99)).quantile(0.99) is None
    assert Samples.of("x", np.arange(100)).quantile(0.99) is not None
    assert Samples.of("x", [7.0]).quantile(0.5) == 7
    assert max(q for q, _ in curve(np.arange(100)) if q < 1) == 0.99


def test_samples_from_elsewhere_are_brought_to_their_unit():
    found = Samples.of("cyclictest", [1, 2, 3], [4, 5], scale=1e-6)
    assert found.unit == "s"
    assert found.by_round() == pytest.approx([2e-6, 4.5e-6])


@pytest.mark.parametrize("rounds", [[], [[1.0], []], [[1.0, np.nan]], [[np.inf]]])
def test_empty_and_broken_samples_are_refused(rounds):
    with pytest.raises(ValueError, match="x: found"):
        Samples.of("x", *rounds)


def test_what_makes_no_pairs_is_refused():
    with pytest.raises(ValueError, match="same number of rounds"):
        ratio(a("A", 1, count=5), a("B", 1, count=6))
    with pytest.raises(ValueError, match="in the same unit"):
        ratio(Samples.of("A", [1]), Samples.of("B", [1], unit="B"))
    with pytest.raises(ValueError, match="use `difference`"):
        ratio(Samples.of("A", [0]), Samples.of("B", [1]))
