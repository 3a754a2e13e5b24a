"""Histograms against numpy's percentiles: never below, at most 1/32 above."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatvla_edge.runtime.histogram import SNAPSHOT, TOPS, Histogram

VALUES = st.lists(st.integers(0, 2**36 - 1), min_size=1, max_size=200)


def of(values):
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


@settings(deadline=None, max_examples=200)
@given(VALUES, st.floats(0, 1))
def test_a_percentile_is_at_most_a_32nd_too_high(values, share):
    exact = int(np.quantile(values, share, method="inverted_cdf"))
    found = of(values).percentile(share)
    assert exact <= found <= exact + exact // 32 + 1


def test_buckets_tile_the_range():
    assert len(TOPS) == 1024
    assert TOPS[0] == 0
    assert TOPS[-1] == 2**36 - 1
    assert (np.diff(TOPS) > 0).all()
    for value in (0, 1, 31, 32, 33, 63, 64, 1000, 2**20, 2**36 - 1):
        counted = np.nonzero(of([value]).snapshot()["bucket"])[0]
        assert value <= TOPS[counted[0]]
        assert counted[0] == 0 or value > TOPS[counted[0] - 1]


@pytest.mark.parametrize(("value", "bucket"), [(-5, 0), (2**36, 1023), (2**62, 1023)])
def test_values_beyond_the_range_count_at_its_ends(value, bucket):
    histogram = of([value])
    assert histogram.snapshot()["bucket"][bucket] == 1
    assert histogram.total == 1


@given(VALUES, VALUES)
@settings(deadline=None, max_examples=50)
def test_merging_is_recording_both(first, second):
    merged = of(first)
    merged.merge(of(second))
    assert merged.snapshot() == of(first + second).snapshot()
    assert merged.largest == max(first + second)
    assert merged.mean == pytest.approx(np.mean(first + second))


def test_a_snapshot_travels():
    histogram = of([5, 500, 50_000])
    copy = Histogram.of(histogram.snapshot().tobytes())
    assert copy.snapshot() == histogram.snapshot()
    histogram.clear()
    assert histogram.total == 0
    assert histogram.percentile(0.99) == 0
    with pytest.raises(ValueError, match=f"expected {SNAPSHOT.itemsize}"):
        Histogram.of(b"short")
    with pytest.raises(ValueError, match="share is"):
        histogram.percentile(1.5)
