"""A chunk: actions [H, A] with the observation's place on the trajectory, and what can be wrong with one.

``actions[i]`` is due at ``tau_observation + (i + first_step) * dt`` in trajectory time. ``first_step``
comes from the manifest: -1 where the first predicted action is the previous command, as in the public training code.

A chunk is accepted whole or not at all. Every refusal has a name and a counter, because a robot that quietly ignores
its policy looks exactly like one that has nothing to do.
"""

from dataclasses import dataclass

from libc.math cimport fabs

import numpy as np

VERDICT_NAMES = (
    "accepted",
    "unanchored",  # before the first reset: there is no held position to move away from
    "malformed",  # rows, dt, first_step or tau_observation out of any sensible range
    "old_epoch",  # predicted for an instruction or an arming that has ended
    "future_epoch",  # of an epoch the servo was not told about
    "future",  # observed at a tau that has not been reached
    "out_of_order",  # observed before one that was already accepted
    "stale",  # every action was due already
    "early",  # sync: observed before the first n actions of the chunk before were executed
    "not_finite",  # NaN, inf, or a number so large that arithmetic on it could overflow
    "degenerate_rotation",  # the two vectors of a rot6d are zero or parallel
)
COUNTER_NAMES = (*VERDICT_NAMES, "short", "superseded", "evicted", "seams", "starved_ticks")

# The mailbox's view of ChunkHeader.
HEADER_DTYPE = np.dtype(
    [
        ("epoch", "<u8"),
        ("sequence", "<u8"),
        ("tau_observation", "<f8"),
        ("dt", "<f8"),
        ("first_step", "<i4"),
        ("rows", "<i4"),
    ]
)
assert HEADER_DTYPE.itemsize == sizeof(ChunkHeader) == 40
assert len(VERDICT_NAMES) == VERDICTS

# No joint, metre or gripper unit comes near; sums and products of a few such numbers stay far from overflow.
cdef double LARGEST = 1e6


cdef int header_verdict(const ChunkHeader *header, int horizon) noexcept nogil:
    """ACCEPTED or MALFORMED, by the header alone: what it claims must be safe to read and to compute with."""
    if not 1 <= header.rows <= horizon:
        return MALFORMED
    if not -horizon <= header.first_step <= horizon:
        return MALFORMED
    if not (1e-4 <= header.dt <= 10 and fabs(header.tau_observation) < 1e12):
        return MALFORMED
    return ACCEPTED


cdef int rows_verdict(const double *actions, int count) noexcept nogil:
    """ACCEPTED or NOT_FINITE. The comparison is false for NaN."""
    cdef int i
    for i in range(count):
        if not fabs(actions[i]) <= LARGEST:
            return NOT_FINITE
    return ACCEPTED


@dataclass(frozen=True)
class Chunk:
    """A chunk as the policy hands it over: ``actions`` [H, A] float64 in the units of the manifest, seconds of tau."""

    actions: np.ndarray
    tau_observation: float
    dt: float
    first_step: int
    epoch: int = 0
    sequence: int = 0

    def due(self):
        """[H] float64: the tau at which each action is due."""
        return self.tau_observation + (np.arange(len(self.actions)) + self.first_step) * self.dt

    def header(self):
        """The header as one record of HEADER_DTYPE."""
        header = np.zeros((), HEADER_DTYPE)
        header["epoch"], header["sequence"] = self.epoch, self.sequence
        header["tau_observation"], header["dt"] = self.tau_observation, self.dt
        header["first_step"], header["rows"] = self.first_step, len(self.actions)
        return header
