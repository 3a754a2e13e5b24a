"""Chunk mailbox and committed-prefix slot, as the servo uses them without the GIL; the protocol is that of `slots.pxd`.

    from chatvla_edge.runtime.chunks cimport ChunkHeader
    from chatvla_edge.runtime.mailbox cimport ChunkBox, c_take_chunk
    cdef ChunkBox box = mailbox.box             # keep `mailbox` alive while it is used
    if c_take_chunk(&box, &seen, &header, actions, &stamp) == CELL_NEW: ...
"""

from libc.stdint cimport int64_t, uint64_t

from chatvla_edge.runtime.chunks cimport ChunkHeader
from chatvla_edge.runtime.slots cimport (
    CELL_BUSY, CELL_EMPTY, CELL_NEW, CELL_SAME, READ_ATTEMPTS, Cells, CellSegment, Stamp,
    c_begin, c_commit, c_enter, c_latest, c_next, c_stamp, c_unchanged, words_from_shared, words_to_shared,
)

cdef struct ChunkBox:
    Cells cells
    uint64_t horizon     # rows there is room for
    uint64_t action_dim

cdef struct PrefixHeader:
    uint64_t epoch
    double tau           # s, trajectory time of row 0
    double dt            # s of trajectory time between rows

cdef struct PrefixBox:
    Cells cells
    uint64_t horizon
    uint64_t action_dim


cdef inline uint64_t c_publish_chunk(
    const ChunkBox *box, const ChunkHeader *header, const double *actions, int64_t published_ns, int64_t captured_ns
) noexcept nogil:
    """Publish a chunk of ``header.rows`` rows; newest wins. Returns its number, 0 when it does not fit the box.

    The header's ``sequence`` is written here: it is that number.
    """
    cdef ChunkHeader numbered = header[0]
    cdef uint64_t number
    cdef uint64_t *payload
    if not 1 <= header.rows <= <int64_t>box.horizon:
        return 0
    number = c_next(&box.cells)
    numbered.sequence = number
    payload = c_begin(&box.cells, number, published_ns, captured_ns)
    words_to_shared(payload, &numbered, sizeof(ChunkHeader))
    words_to_shared(
        payload + sizeof(ChunkHeader) // 8, actions, <uint64_t>header.rows * box.action_dim * sizeof(double)
    )
    c_commit(&box.cells, number)
    return number


cdef inline int c_take_chunk(
    const ChunkBox *box, uint64_t *seen, ChunkHeader *header, double *actions, Stamp *stamp
) noexcept nogil:
    """Copy the newest chunk if its number is not ``seen``, and remember it there.

    ``actions`` has room for ``horizon * action_dim``; the first ``header.rows`` rows are the chunk's. Returns
    CELL_NEW, _SAME, _EMPTY or _BUSY; _BUSY too for a header that does not fit the box (memory that was damaged).
    """
    cdef uint64_t number
    cdef const uint64_t *payload
    cdef int _attempt
    for _attempt in range(READ_ATTEMPTS):
        number = c_latest(&box.cells)
        if number == 0:
            return CELL_EMPTY
        if number == seen[0]:
            return CELL_SAME
        payload = c_enter(&box.cells, number)
        if payload is NULL:
            continue
        c_stamp(payload, number, stamp)
        words_from_shared(header, payload, sizeof(ChunkHeader))
        # Not yet known to be whole, so checked before it says how much to copy.
        if not 1 <= header.rows <= <int64_t>box.horizon:
            continue
        words_from_shared(
            actions, payload + sizeof(ChunkHeader) // 8, <uint64_t>header.rows * box.action_dim * sizeof(double)
        )
        if c_unchanged(payload, number):
            seen[0] = number
            return CELL_NEW
    return CELL_BUSY


cdef inline uint64_t c_publish_prefix(
    const PrefixBox *box, const PrefixHeader *header, const double *prefix, const double *mask,
    int64_t published_ns, int64_t captured_ns
) noexcept nogil:
    """Publish a committed prefix: ``prefix`` [horizon, action_dim], ``mask`` [horizon] (1 committed ... 0 free)."""
    cdef uint64_t number = c_next(&box.cells)
    cdef uint64_t *payload = c_begin(&box.cells, number, published_ns, captured_ns)
    cdef uint64_t mask_at = sizeof(PrefixHeader) // 8
    words_to_shared(payload, header, sizeof(PrefixHeader))
    words_to_shared(payload + mask_at, mask, box.horizon * sizeof(double))
    words_to_shared(payload + mask_at + box.horizon, prefix, box.horizon * box.action_dim * sizeof(double))
    c_commit(&box.cells, number)
    return number


cdef inline int c_read_prefix(
    const PrefixBox *box, PrefixHeader *header, double *prefix, double *mask, Stamp *stamp
) noexcept nogil:
    """Copy the newest committed prefix. Returns CELL_NEW, _EMPTY or _BUSY."""
    cdef uint64_t number
    cdef uint64_t mask_at = sizeof(PrefixHeader) // 8
    cdef const uint64_t *payload
    cdef int _attempt
    for _attempt in range(READ_ATTEMPTS):
        number = c_latest(&box.cells)
        if number == 0:
            return CELL_EMPTY
        payload = c_enter(&box.cells, number)
        if payload is NULL:
            continue
        c_stamp(payload, number, stamp)
        words_from_shared(header, payload, sizeof(PrefixHeader))
        words_from_shared(mask, payload + mask_at, box.horizon * sizeof(double))
        words_from_shared(prefix, payload + mask_at + box.horizon, box.horizon * box.action_dim * sizeof(double))
        if c_unchanged(payload, number):
            return CELL_NEW
    return CELL_BUSY


cdef class ChunkMailbox(CellSegment):
    cdef ChunkBox box

cdef class PrefixSlot(CellSegment):
    cdef PrefixBox box
