"""Sequence-checked cells in shared memory: what servo and device loops call without the GIL and without allocation.

    from chatvla_edge.runtime.slots cimport Cells, Stamp, Slot, c_publish, c_read_latest
    cdef Cells cells = slot.cells          # plain data; keep `slot` alive while it is used
    with nogil:
        outcome = c_read_latest(&cells, seen, &record, &stamp)

One layout serves all: an array of cells, written in turn by **one** writer. Publication ``number`` (1, 2, ...) goes to
cell ``number % count``. A latest-value slot is read at the newest cell, a ring at all of them.

    cell:   guard | published_ns | captured_ns | payload, whole words      (guard: 2n - 1 while n is written, 2n after)
    latest: the last completed number, 0 before the first

**Why a reader never sees a torn value.** The protocol is Boehm's sequence lock ("Can seqlocks get along with
programming language memory models?", MSPC 2012), one per cell:

    writer                                      reader
    W1 guard = 2n - 1        relaxed            R0 n = latest             acquire
    W2 fence                 release            R1 guard == 2n ?          acquire
    W3 payload               relaxed words      R2 payload                relaxed words
    W4 guard = 2n            release            R3 fence                  acquire
    W5 latest = n            release            R4 guard == 2n ?          relaxed

1. R1 reads 2n from W4, so everything of publication n happens before R2: the payload is n's or newer. (R0 reading n
   from W5 says the same; either pair would do, and both cost one instruction.)
2. Should a word read in R2 be newer, written in W3 of publication m > n, then fence W2 synchronises with fence R3
   through that word, W1 of m happens before R4, and R4 reads 2m - 1 or later: rejected. Even guards only grow (a
   restarted writer included, see `c_recover`), so 2n cannot come back.
3. W5 after W4, R1 after R0: whoever reads ``latest == n`` finds guard >= 2n, so a value that stands is had at once.

On Arm each of these counts: without W2 the payload may become visible before the odd guard; without R3 a payload word
may be loaded after the second look at the guard (an acquire load in R4 would not do: it orders what follows it). x86-64
keeps stores in order and loads in order, so there the fences cost nothing (they bind the compiler only), and **no test
on x86 can show that one is missing**. The protocol is therefore also checked exhaustively on a model of C11's
release/acquire views (tests/runtime/test_memory_model.py), where each missing order is seen to do its harm.
Payload words are relaxed atomics, frames included: no data race in C11's sense is left to reason about.

**Why a killed writer costs nothing.** Killed between W1 and W4 it leaves an odd guard in a cell that is not the latest;
``latest`` still names a whole one. With three cells (the default of a slot) a reader has a full period to copy before
its cell is written again.
"""

from libc.stdint cimport int64_t, uint64_t

from chatvla_edge.runtime.segments cimport Segment

cdef extern from "atomics.h" nogil:
    uint64_t load_relaxed(const uint64_t *word)
    uint64_t load_acquire(const uint64_t *word)
    void store_relaxed(uint64_t *word, uint64_t value)
    void store_release(uint64_t *word, uint64_t value)
    void fence_acquire()
    void fence_release()
    void words_to_shared(uint64_t *shared, const void *source, size_t nbytes)
    void words_from_shared(void *target, const uint64_t *shared, size_t nbytes)

# Outcomes of a read. CELL_BUSY: a writer went round the whole array during each of READ_ATTEMPTS copies, which a rig's
# rates do not allow; what then stands in the target is of no use, so read into scratch and keep the last good value.
cdef enum:
    CELL_BUSY = -2
    CELL_EMPTY = -1
    CELL_SAME = 0
    CELL_NEW = 1

cdef enum:
    CELL_WORDS = 3       # guard and stamps, before the payload
    LINE_WORDS = 8       # a cache line on x86-64 and Cortex-A; cells start on one, so no two share any
    READ_ATTEMPTS = 4

cdef struct Cells:
    uint64_t *latest
    uint64_t *first
    uint64_t stride      # words from one cell to the next
    uint64_t count
    uint64_t nbytes      # payload of one cell

cdef struct Stamp:
    uint64_t sequence
    int64_t published_ns  # host time at which the writer published
    int64_t captured_ns   # host time at which the content was true, as the writer says


# ------------------------------------------------------------------------------------------------------ writer's side

cdef inline uint64_t *c_begin(
    const Cells *cells, uint64_t number, int64_t published_ns, int64_t captured_ns
) noexcept nogil:
    """Open the cell of publication ``number``; returns its payload. W1 and W2 above."""
    cdef uint64_t *cell = cells.first + (number % cells.count) * cells.stride
    store_relaxed(cell, 2 * number - 1)
    fence_release()
    store_relaxed(cell + 1, <uint64_t>published_ns)
    store_relaxed(cell + 2, <uint64_t>captured_ns)
    return cell + CELL_WORDS


cdef inline void c_commit(const Cells *cells, uint64_t number) noexcept nogil:
    """Close that cell and make it the latest. W4 and W5."""
    store_release(cells.first + (number % cells.count) * cells.stride, 2 * number)
    store_release(cells.latest, number)


cdef inline uint64_t c_next(const Cells *cells) noexcept nogil:
    """The number of the next publication. Relaxed: only this writer changes `latest`."""
    return load_relaxed(cells.latest) + 1


cdef inline uint64_t c_publish(
    const Cells *cells, const void *record, int64_t published_ns, int64_t captured_ns
) noexcept nogil:
    """Publish ``cells.nbytes`` bytes; never waits. Returns the sequence number. The caller is the only writer."""
    cdef uint64_t number = c_next(cells)
    words_to_shared(c_begin(cells, number, published_ns, captured_ns), record, cells.nbytes)
    c_commit(cells, number)
    return number


cdef inline void c_recover(const Cells *cells) noexcept nogil:
    """What a new writer does first: complete what a killed one left between W4 and W5.

    Its payload is whole, so the value need not be lost; and were the number used again, one even guard would stand for
    two values. A cell left odd needs nothing: its number was never seen, is taken again, and no reader accepts odd.
    """
    cdef uint64_t number = load_relaxed(cells.latest) + 1
    if load_acquire(cells.first + (number % cells.count) * cells.stride) == 2 * number:
        store_release(cells.latest, number)


# ------------------------------------------------------------------------------------------------------ reader's side

cdef inline const uint64_t *c_enter(const Cells *cells, uint64_t number) noexcept nogil:
    """The payload of publication ``number``, or NULL when its cell holds another or is being written. R1."""
    cdef const uint64_t *cell = cells.first + (number % cells.count) * cells.stride
    if load_acquire(cell) != 2 * number:
        return NULL
    return cell + CELL_WORDS


cdef inline bint c_unchanged(const uint64_t *payload, uint64_t number) noexcept nogil:
    """Whether all that was loaded since `c_enter` belongs to publication ``number``. R3 and R4."""
    fence_acquire()
    return load_relaxed(payload - CELL_WORDS) == 2 * number


cdef inline void c_stamp(const uint64_t *payload, uint64_t number, Stamp *stamp) noexcept nogil:
    stamp.sequence = number
    stamp.published_ns = <int64_t>load_relaxed(payload - 2)
    stamp.captured_ns = <int64_t>load_relaxed(payload - 1)


cdef inline bint c_read_cell(const Cells *cells, uint64_t number, void *record, Stamp *stamp) noexcept nogil:
    """Copy publication ``number``; False when it is not there any more. ``stamp`` may be NULL."""
    cdef const uint64_t *payload = c_enter(cells, number)
    cdef Stamp scratch
    if payload is NULL:
        return False
    c_stamp(payload, number, stamp if stamp is not NULL else &scratch)
    words_from_shared(record, payload, cells.nbytes)
    return c_unchanged(payload, number)


cdef inline uint64_t c_latest(const Cells *cells) noexcept nogil:
    """Sequence number of the newest publication, 0 before the first: one load, to ask whether there is news."""
    return load_acquire(cells.latest)


cdef inline int c_read_latest(const Cells *cells, uint64_t seen, void *record, Stamp *stamp) noexcept nogil:
    """Copy the newest publication unless its number is ``seen``. Returns CELL_NEW, _SAME, _EMPTY or _BUSY."""
    cdef uint64_t number
    cdef int _attempt
    for _attempt in range(READ_ATTEMPTS):
        number = c_latest(cells)
        if number == 0:
            return CELL_EMPTY
        if number == seen:
            return CELL_SAME
        if c_read_cell(cells, number, record, stamp):
            return CELL_NEW
    return CELL_BUSY


cdef inline size_t c_ring_read(
    const Cells *cells, uint64_t *cursor, uint64_t *dropped, void *records, Stamp *stamps, size_t rows
) noexcept nogil:
    """Up to ``rows`` records after number ``cursor``, oldest first, without a gap between them.

    ``cursor`` moves to the last one read; ``dropped`` grows by the records that were overwritten before the first of
    this batch, so that read + dropped = cursor at any time. ``stamps`` may be NULL. Returns the number of rows.
    """
    cdef uint64_t newest = c_latest(cells)
    cdef uint64_t lost, seen
    cdef size_t got = 0
    cdef int attempts = 0
    if newest > cells.count and cursor[0] < newest - cells.count:
        lost = newest - cells.count - cursor[0]
        dropped[0] += lost
        cursor[0] += lost
    while got < rows and cursor[0] < newest and attempts < READ_ATTEMPTS:
        if c_read_cell(
            cells, cursor[0] + 1, <char *>records + got * cells.nbytes, stamps + got if stamps is not NULL else NULL
        ):
            cursor[0] += 1
            got += 1
        elif got:
            break  # the gap belongs before the next batch
        else:
            # Overwritten under our hands. A writer that is running would win the race for the oldest record again, so
            # leave an eighth of the ring between us; one that died in this cell costs this record only.
            attempts += 1
            lost = 1
            seen = newest
            newest = c_latest(cells)
            if newest != seen and newest > cells.count and cursor[0] + 1 < newest - cells.count + cells.count // 8:
                lost = newest - cells.count + cells.count // 8 - cursor[0]
            dropped[0] += lost
            cursor[0] += lost
    return got


cdef inline size_t c_ring_last(const Cells *cells, void *records, Stamp *stamps, size_t rows) noexcept nogil:
    """The newest records, in order, without a gap, at the **end** of a buffer of ``rows``. Returns how many.

    Fewer than ``rows`` when so many were not written yet, or the oldest were overwritten during the copy.
    """
    cdef uint64_t newest, have
    cdef size_t got, row
    cdef int _attempt
    for _attempt in range(READ_ATTEMPTS):
        newest = c_latest(cells)
        have = min(<uint64_t>rows, min(newest, cells.count))
        got = 0
        while got < have:
            # Newest first: the writer comes from behind, so what it takes from us is the far end only.
            row = rows - 1 - got
            if not c_read_cell(
                cells, newest - got, <char *>records + row * cells.nbytes, stamps + row if stamps is not NULL else NULL
            ):
                break
            got += 1
        if got or newest == 0:
            return got
    return 0


# ------------------------------------------------------------------------------------------------------ Python handles

cdef class CellSegment(Segment):
    cdef Cells cells

    cdef int map_cells(self, int fd, str mode, str kind, tuple geometry, size_t record_bytes, size_t count) except -1
    cdef int must_write(self) except -1

cdef class Slot(CellSegment):
    pass

cdef class Ring(CellSegment):
    pass

cdef class RingReader:
    cdef readonly Ring ring
    cdef readonly uint64_t cursor
    cdef readonly uint64_t dropped

# A read's outcome as Python sees it: a Reading, None when there is nothing new, SlotBusyError.
cdef object reading(str name, int outcome, const Stamp *stamp)
