"""Chunk mailbox (policy to servo) and committed-prefix slot (servo to policy).

Both are slots whose record is a header and an array of actions [H, A] float64, row-major; the newest wins.
Create, attach and pass them on as `slots` says.
"""

import os
from typing import NamedTuple

import numpy as np

from libc.stdint cimport int64_t, uint64_t

from chatvla_edge.runtime.realtime cimport c_now_ns
from chatvla_edge.runtime.slots cimport reading

from chatvla_edge.runtime.segments import create as create_segment
from chatvla_edge.runtime.slots import body_bytes


class PostedChunk(NamedTuple):
    """A chunk as it lay in the mailbox; ``actions[i]`` is due at ``tau_observation + (i + first_step) * dt``.

    ``actions``: [n, A] float64, a copy. ``tau_observation``, ``dt``: s of trajectory time. Stamps: host time in ns,
    where ``captured_ns`` is that of the observation.
    """

    sequence: int
    published_ns: int
    captured_ns: int
    epoch: int
    tau_observation: float
    first_step: int
    dt: float
    actions: np.ndarray


class Prefix(NamedTuple):
    """What the servo is committed to: ``actions`` [H, A] float64, row 0 due at ``tau`` (s), ``dt`` s between rows.

    ``mask``: [H] float64, 1 committed ... 0 free.
    """

    sequence: int
    published_ns: int
    captured_ns: int
    epoch: int
    tau: float
    dt: float
    actions: np.ndarray
    mask: np.ndarray


CELLS = 3  # newest, being written, being read: see `Slot.create`


def chunk_bytes(horizon: int, action_dim: int) -> int:
    """Payload of a mailbox cell. Raises ValueError for an empty shape."""
    if horizon < 1 or action_dim < 1:
        raise ValueError(f"a chunk of shape {(horizon, action_dim)}; expected at least one action of one component")
    return sizeof(ChunkHeader) + 8 * horizon * action_dim


def prefix_bytes(horizon: int, action_dim: int) -> int:
    """Payload of a prefix cell. Raises ValueError for an empty shape."""
    if horizon < 1 or action_dim < 1:
        raise ValueError(f"a prefix of shape {(horizon, action_dim)}; expected at least one action of one component")
    return sizeof(PrefixHeader) + 8 * horizon * (action_dim + 1)


cdef class ChunkMailbox(CellSegment):
    """Policy to servo: the newest chunk of up to ``horizon`` actions of ``action_dim`` components; newest wins."""

    @classmethod
    def create(cls, name: str, horizon: int, action_dim: int) -> ChunkMailbox:
        """A new, empty mailbox, mapped for reading."""
        fd = create_segment(
            name, "chunk mailbox", (horizon, action_dim, CELLS), body_bytes(chunk_bytes(horizon, action_dim), CELLS)
        )
        try:
            return cls.attach(fd, horizon, action_dim)
        finally:
            os.close(fd)

    @classmethod
    def attach(cls, int fd, size_t horizon, size_t action_dim, write: bool = False) -> ChunkMailbox:
        """Map the mailbox behind an inherited descriptor; see `Slot.attach`."""
        cdef ChunkMailbox mailbox = cls.__new__(cls)
        mailbox.map_cells(
            fd, "write" if write else "read", "chunk mailbox", (horizon, action_dim, CELLS),
            chunk_bytes(horizon, action_dim), CELLS,
        )
        mailbox.box = ChunkBox(cells=mailbox.cells, horizon=horizon, action_dim=action_dim)
        return mailbox

    def publish(
        self,
        const double[:, ::1] actions,
        *,
        epoch: int,
        tau_observation: float,
        first_step: int,
        dt: float,
        captured_ns: int,
    ) -> int:
        """Post a chunk: ``actions`` [n, A] float64, 1 <= n <= horizon. Returns its sequence number.

        ``captured_ns`` is the host time of the observation that it answers; the other fields as in `PostedChunk`.
        """
        cdef uint64_t number
        cdef ChunkHeader header = ChunkHeader(
            epoch=epoch, sequence=0, tau_observation=tau_observation, dt=dt, first_step=first_step,
            rows=actions.shape[0],
        )
        self.must_write()
        if actions.shape[0] == 0 or actions.shape[1] == 0:
            raise ValueError(f"{self.name}: an empty chunk; expected 1 action or more")
        number = 0
        if actions.shape[1] == <Py_ssize_t>self.box.action_dim:
            number = c_publish_chunk(&self.box, &header, &actions[0, 0], c_now_ns(), captured_ns)
        if number == 0:
            raise ValueError(
                f"{self.name}: a chunk of shape {(actions.shape[0], actions.shape[1])}; the mailbox takes up to "
                f"{(self.box.horizon, self.box.action_dim)}"
            )
        return number

    def take(self, uint64_t seen = 0) -> PostedChunk | None:
        """The newest chunk, or None when there is none or its sequence number is ``seen``. Raises SlotBusyError."""
        cdef ChunkHeader header
        cdef Stamp stamp
        actions = np.empty((self.box.horizon, self.box.action_dim))
        cdef double[:, ::1] rows = actions
        cdef int outcome = c_take_chunk(&self.box, &seen, &header, &rows[0, 0], &stamp)
        found = reading(self.name, outcome, &stamp)
        if found is None:
            return None
        return PostedChunk(
            *found, header.epoch, header.tau_observation, header.first_step, header.dt, actions[: header.rows]
        )


cdef class PrefixSlot(CellSegment):
    """Servo to policy: the actions that will be executed whatever the next chunk says."""

    @classmethod
    def create(cls, name: str, horizon: int, action_dim: int) -> PrefixSlot:
        """A new, empty prefix slot, mapped for reading."""
        fd = create_segment(
            name, "prefix slot", (horizon, action_dim, CELLS), body_bytes(prefix_bytes(horizon, action_dim), CELLS)
        )
        try:
            return cls.attach(fd, horizon, action_dim)
        finally:
            os.close(fd)

    @classmethod
    def attach(cls, int fd, size_t horizon, size_t action_dim, write: bool = False) -> PrefixSlot:
        """Map the prefix slot behind an inherited descriptor; see `Slot.attach`."""
        cdef PrefixSlot slot = cls.__new__(cls)
        slot.map_cells(
            fd, "write" if write else "read", "prefix slot", (horizon, action_dim, CELLS),
            prefix_bytes(horizon, action_dim), CELLS,
        )
        slot.box = PrefixBox(cells=slot.cells, horizon=horizon, action_dim=action_dim)
        return slot

    def publish(
        self, const double[:, ::1] actions, const double[::1] mask, *, epoch: int, tau: float, dt: float
    ) -> int:
        """Publish ``actions`` [H, A] and ``mask`` [H], both float64 and of the slot's full horizon."""
        cdef PrefixHeader header = PrefixHeader(epoch=epoch, tau=tau, dt=dt)
        cdef int64_t now = c_now_ns()
        self.must_write()
        found = (actions.shape[0], actions.shape[1], mask.shape[0])
        expected = (self.box.horizon, self.box.action_dim, self.box.horizon)
        if found != expected:
            raise ValueError(f"{self.name}: actions {found[:2]} with mask ({found[2]},); expected {expected[:2]}")
        return c_publish_prefix(&self.box, &header, &actions[0, 0], &mask[0], now, now)

    def read(self) -> Prefix | None:
        """The newest committed prefix, None before the first. Raises SlotBusyError."""
        cdef PrefixHeader header
        cdef Stamp stamp
        actions = np.empty((self.box.horizon, self.box.action_dim))
        mask = np.empty(self.box.horizon)
        cdef double[:, ::1] rows = actions
        cdef double[::1] weights = mask
        cdef int outcome = c_read_prefix(&self.box, &header, &rows[0, 0], &weights[0], &stamp)
        found = reading(self.name, outcome, &stamp)
        if found is None:
            return None
        return Prefix(*found, header.epoch, header.tau, header.dt, actions, mask)
