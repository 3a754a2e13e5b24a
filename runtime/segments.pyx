"""Memory that the processes of one rig share: sealed memfd segments, inherited by file descriptor.

A segment has no name in any file system: nothing in /dev/shm can be swept away by a logout, collide with a second
daemon, or be left behind by a crash. It lives as long as somebody holds its descriptor or a mapping of it. The
supervisor creates it and hands the descriptor down (``subprocess.Popen(..., pass_fds=[slot.fd])``); the child attaches
by the same number.

Its size is sealed: no process that holds the descriptor can shrink it under a mapping, which would turn the servo's
next read into SIGBUS.

Readers map it read-only. A writer's mapping comes with an exclusive lock on the segment, so that a second writer is
refused (a restarted camera process while the old one still hangs in its driver, say) and a killed one leaves no lock.
"""

import fcntl
import os

from libc.errno cimport errno
from libc.stdint cimport uint64_t

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    const int PROT_READ
    const int PROT_WRITE
    const int MAP_SHARED
    const int MAP_POPULATE

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from "atomics.h" nogil:
    uint64_t load_relaxed(const uint64_t *word)
    void store_relaxed(uint64_t *word, uint64_t value)

MAGIC = 0x31_45_56_43  # "CVE1": layout 1; another layout gets another number, so that old and new never mix
KINDS = ("slot", "ring", "chunk mailbox", "prefix slot", "heartbeats", "lease", "emergency stop")
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def create(name: str, kind: str, geometry: tuple[int, int, int], body_bytes: int) -> int:
    """A new sealed segment of ``body_bytes`` zero bytes behind its header. Returns its descriptor (close-on-exec).

    ``kind`` is one of `KINDS`; ``geometry`` are the three numbers that the other side has to agree with.
    """
    size = HEADER_WORDS * 8 + body_bytes
    header = (MAGIC, KINDS.index(kind), size, *geometry, 0, 0)
    fd = os.memfd_create(f"chatvla-edge {name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        # Whole before the descriptor is handed to anybody; passing it through exec orders this write for the child.
        os.pwrite(fd, b"".join(word.to_bytes(8, "little") for word in header), 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


cdef class Segment:
    """One mapped segment. ``mode``: ``read``, ``write`` (exclusive) or ``share`` (many writers of single words).

    Attributes: ``fd`` (hand it to children with ``pass_fds``), ``name``, ``writable``.
    """

    def __cinit__(self):
        self.fd = -1
        self.lock_fd = -1

    def __dealloc__(self):
        if self.words is not NULL:
            munmap(self.words, self.mapped_bytes)
        if self.fd >= 0:
            close(self.fd)
        if self.lock_fd >= 0:
            close(self.lock_fd)

    def fileno(self) -> int:
        """The descriptor, for ``pass_fds``."""
        return self.fd

    @property
    def writer_pid(self) -> int:
        """Process id of the last exclusive writer, 0 before the first. It may be dead."""
        return load_relaxed(self.words + WRITER_PID_WORD)

    cdef int map_segment(self, int fd, str mode, str kind, tuple geometry, size_t body_bytes) except -1:
        cdef int protection
        cdef void *base
        cdef size_t size = HEADER_WORDS * 8 + body_bytes
        self.name = check(fd, kind, geometry, size)
        self.fd = os.dup(fd)
        self.writable = mode != "read"
        # Opened anew rather than dup'ed: a lock belongs to the open file, and the inherited one is shared with every
        # other process that was given the descriptor; and a reader's file allows no mapping that writes.
        opened = os.open(f"/proc/self/fd/{fd}", (os.O_RDWR if self.writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            if mode == "write":
                self.lock_fd = os.dup(opened)
                lock(opened, self.name)
            protection = PROT_READ | PROT_WRITE if self.writable else PROT_READ
            # Populated now, so that the first tick takes no page faults.
            base = mmap(NULL, size, protection, MAP_SHARED | MAP_POPULATE, opened, 0)
            if base == <void *>-1:
                raise OSError(errno, f"{self.name}: mapping {size} bytes failed: {os.strerror(errno)}")
        finally:
            os.close(opened)
        self.words = <uint64_t *>base
        self.mapped_bytes = size
        if mode == "write":
            store_relaxed(self.words + WRITER_PID_WORD, os.getpid())
        return 0


def lock(fd: int, name: str) -> None:
    """Take the segment's writer lock; it goes with the process, however that ends."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = int.from_bytes(os.pread(fd, 8, WRITER_PID_WORD * 8), "little")
        raise BlockingIOError(
            f"{name} has a writer already (process {pid}); a second one would tear its values. End that process first."
        ) from None


def check(fd: int, kind: str, geometry: tuple[int, int, int], size: int) -> str:
    """The name of the segment behind ``fd``, if it is of this kind, geometry and size.

    Raises ValueError that says what was found and expected, OSError for a closed descriptor.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"descriptor {fd} is no shared segment ({os.strerror(error.errno)}); "
            "start this process with pass_fds=[segment.fd] and give it that number",
        ) from None
    if seals & SEALS != SEALS:
        raise ValueError(f"descriptor {fd} is a memfd that can still shrink (seals {seals:#x}); expected a sealed one")
    name = os.readlink(f"/proc/self/fd/{fd}").removeprefix("/memfd:chatvla-edge ").removesuffix(" (deleted)")
    header = os.pread(fd, HEADER_WORDS * 8, 0)
    words = [int.from_bytes(header[at:at + 8], "little") for at in range(0, len(header), 8)]
    if len(words) < HEADER_WORDS or words[0] != MAGIC or words[1] >= len(KINDS):
        raise ValueError(f"descriptor {fd} ({name}) holds no segment of this layout; both sides must run one version")
    found = (KINDS[words[1]], tuple(words[3:6]), words[2])
    if found != (kind, geometry, size) or os.fstat(fd).st_size != size:
        raise ValueError(
            f"{name} (descriptor {fd}): found a {found[0]} of geometry {found[1]} and {found[2]} bytes, expected a "
            f"{kind} of geometry {geometry} and {size} bytes; both processes must read the same rig file"
        )
    return name
