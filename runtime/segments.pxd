"""A mapped segment, as the extensions that lay something into it see it."""

from libc.stdint cimport uint64_t

# A segment begins with HEADER_WORDS words: magic, kind, size, three numbers of geometry, the writer's pid, a spare one.
cdef enum:
    HEADER_WORDS = 8
    WRITER_PID_WORD = 6

cdef class Segment:
    # Mapped from the first line of the object's life to the last; nothing unmaps it earlier, so a loop without the GIL
    # may use what lies behind `words` as long as somebody holds the object.
    cdef uint64_t *words
    cdef size_t mapped_bytes
    cdef readonly str name
    cdef readonly int fd
    cdef readonly bint writable
    cdef int lock_fd

    cdef int map_segment(self, int fd, str mode, str kind, tuple geometry, size_t body_bytes) except -1
