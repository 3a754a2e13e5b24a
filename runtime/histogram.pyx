"""Histograms of lateness, cost and age for Python: record, merge, percentiles, and a snapshot to publish or plot.

The layout and its error are stated in `histogram.pxd`, which is also what loops without the GIL use.
"""

from libc.string cimport memcpy, memset

import numpy as np

# What a snapshot looks like in a slot, so that another process can read percentiles without stopping the writer.
SNAPSHOT = np.dtype([("total", "<u8"), ("largest", "<i8"), ("sum", "<i8"), ("bucket", "<u8", BUCKETS)])
assert SNAPSHOT.itemsize == sizeof(Counts)

TOPS = np.array([bucket_top(bucket) for bucket in range(BUCKETS)])
TOPS.setflags(write=False)


cdef class Histogram:
    """Counts of int64 values (ns), 8 kB, never growing."""

    def __cinit__(self):
        memset(&self.counts, 0, sizeof(Counts))

    @staticmethod
    def of(const unsigned char[::1] snapshot) -> Histogram:
        """The histogram behind the bytes of a `SNAPSHOT`. Raises ValueError for another size."""
        cdef Histogram histogram = Histogram()
        if snapshot.shape[0] != sizeof(Counts):
            raise ValueError(f"a snapshot of {snapshot.shape[0]} bytes; expected {sizeof(Counts)}")
        memcpy(&histogram.counts, &snapshot[0], sizeof(Counts))
        return histogram

    def record(self, value: int) -> None:
        """Count one value; below 0 counts as 0, beyond 2^36 as that."""
        c_record(&self.counts, value)

    def merge(self, Histogram other not None) -> None:
        """Add what ``other`` has counted."""
        c_merge(&self.counts, &other.counts)

    def clear(self) -> None:
        """Forget everything."""
        memset(&self.counts, 0, sizeof(Counts))

    def percentile(self, share: float) -> int:
        """The value that ``share`` (0 to 1) of all lie at or below, at most 1/32 too high; 0 before the first."""
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}; expected 0 to 1")
        return c_percentile(&self.counts, share)

    def snapshot(self):
        """A copy as one record of `SNAPSHOT`; ``bucket`` [1024] counts values up to ``TOPS`` [1024]."""
        copy = np.zeros((), SNAPSHOT)
        cdef unsigned char[::1] view = np.atleast_1d(copy).view(np.uint8)
        memcpy(&view[0], &self.counts, sizeof(Counts))
        return copy

    @property
    def total(self) -> int:
        """How many values were counted."""
        return self.counts.total

    @property
    def largest(self) -> int:
        """The largest value, exactly."""
        return self.counts.largest

    @property
    def mean(self) -> float:
        """Mean of all values, exactly; 0 before the first."""
        return <double>self.counts.sum / <double>self.counts.total if self.counts.total else 0.0
