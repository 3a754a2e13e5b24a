"""Log-linear histograms in fixed memory, recorded without the GIL: HDR's layout with 32 steps per octave.

    from chatvla_edge.runtime.histogram cimport Histogram, c_record
    cdef Counts counts = histogram.counts       # plain data; keep `histogram` alive while it is used

A value up to 31 has a bucket of its own; above, an octave is cut into 32, so a percentile is at most 1/32 (3.1 %) above
the value that it stands for. Values are nanoseconds in this house, and the range ends at 2^36 ns (68 s): more counts as
that. One writer; a percentile taken by another thread meanwhile may miss what is being counted, no more.
"""

from libc.stdint cimport int64_t, uint64_t

cdef enum:
    STEP_BITS = 5
    STEPS = 1 << STEP_BITS       # buckets per octave
    TOP_BIT = 36
    BUCKETS = (TOP_BIT - STEP_BITS + 1) * STEPS

cdef struct Counts:
    uint64_t total
    int64_t largest
    int64_t sum
    uint64_t bucket[BUCKETS]

cdef extern from *:
    int clz "__builtin_clzll"(unsigned long long value) noexcept nogil


cdef inline int bucket_of(int64_t value) noexcept nogil:
    """The bucket of ``value``: below 0 the first, beyond the range the last."""
    cdef int shift
    if value < STEPS:
        return 0 if value < 0 else <int>value
    if value >= <int64_t>1 << TOP_BIT:
        return BUCKETS - 1
    shift = 63 - clz(<unsigned long long>value) - STEP_BITS
    return (shift << STEP_BITS) + <int>(value >> shift)


cdef inline int64_t bucket_top(int bucket) noexcept nogil:
    """The largest value that ``bucket`` counts."""
    cdef int shift
    if bucket < STEPS:
        return bucket
    shift = (bucket >> STEP_BITS) - 1
    return ((<int64_t>(bucket - (shift << STEP_BITS)) + 1) << shift) - 1


cdef inline void c_record(Counts *counts, int64_t value) noexcept nogil:
    """Count one value."""
    counts.bucket[bucket_of(value)] += 1
    counts.total += 1
    counts.sum += value
    if value > counts.largest:
        counts.largest = value


cdef inline int64_t c_percentile(const Counts *counts, double share) noexcept nogil:
    """The smallest bucket top below which at least ``share`` (0 to 1) of the values lie; 0 for none."""
    cdef uint64_t wanted = <uint64_t>(share * counts.total)
    cdef uint64_t seen = 0
    cdef int bucket
    if counts.total == 0:
        return 0
    if wanted < share * counts.total or wanted == 0:
        wanted += 1
    for bucket in range(BUCKETS):
        seen += counts.bucket[bucket]
        if seen >= wanted:
            return min(bucket_top(bucket), counts.largest)
    return counts.largest


cdef inline void c_merge(Counts *into, const Counts *other) noexcept nogil:
    cdef int bucket
    into.total += other.total
    into.sum += other.sum
    into.largest = max(into.largest, other.largest)
    for bucket in range(BUCKETS):
        into.bucket[bucket] += other.bucket[bucket]


cdef class Histogram:
    cdef Counts counts
