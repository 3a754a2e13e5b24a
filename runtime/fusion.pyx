"""The fused trajectory: a function of tau, made of the chunks that arrive.

    fused(tau) = base(tau) + offset(tau)

The base is what the mode says: the newest chunk (``switch``, ``blend``, ``rtc``), the ACT average of all chunks that
have an action due (``ensemble``), or one chunk at a time to its n-th action (``sync``). Wherever the base changes, the
offset (fade.pyx) takes up the difference and fades. What the modes differ in is thus only their base, and whether a
seam may step: ``switch`` alone lets it.

Invariants:
- Fused is a function of tau alone between two advances of tau. A chunk that arrives while the robot stands is used
  from the first tick on which tau moves; until then the output does not change by a bit.
- A chunk is used from the first tau at which one of its actions is due, and no action is due at any other tau than its
  header says (sync: see below). Nothing is trimmed by counting or by the clock of the host.
- Memory is allocated once. A slot that a tick may still read is never overwritten.

``sync`` waits until the robot stands at the end of the path, takes one chunk that was observed there, and executes
exactly its first n actions, action i reached at tau + (i + 1) * dt from the position held: as the authors' scripts
send one command per step, first one included. tau_observation and first_step do not trim it, because nothing is late
for a robot that waits.

ACT's ensemble weights are exp(-m i) with i = 0 for the oldest prediction (Zhao et al. 2023, Algorithm 2): the oldest
has the highest weight, and a smaller m brings new observations in faster. Averaged rotations are orthonormalised;
for predictions within 20 degrees of each other that is within a degree of the chordal mean.
"""

from libc.math cimport INFINITY, exp, expm1, fmax, isfinite
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from typing import NamedTuple

import numpy as np

from chatvla_edge.runtime.chunks cimport (
    ACCEPTED, DEGENERATE_ROTATION, EARLY, FUTURE, FUTURE_EPOCH, OLD_EPOCH, OUT_OF_ORDER, STALE, UNANCHORED, VERDICTS,
    ChunkHeader, header_verdict, rows_verdict,
)
from chatvla_edge.runtime.fade cimport fade_advance, fade_apply, fade_capture, fade_clear, fade_stand
from chatvla_edge.runtime.history cimport history_add, history_at
from chatvla_edge.runtime.knots cimport ROT6D, ActionLayout, Knots, knots_prepare, knots_sample
from chatvla_edge.runtime.rot6d cimport orthonormalise

from chatvla_edge.runtime.chunks import COUNTER_NAMES, VERDICT_NAMES

MODES = ("switch", "blend", "ensemble", "rtc", "sync")
SCHEDULES = ("smooth", "exp", "linear", "hard")

# Observations carry a tau that was read from this clock; a microsecond covers the rounding of its transport.
cdef double TAU_NOISE = 1e-6

# After `fade` seconds of tau a triple pole at 8 / fade has 1.4 % of its offset left; a single one at 4 / fade, 1.8 %.
cdef double FADE_POLES = 8
cdef double GRIPPER_POLES = 4


class Fused(NamedTuple):
    """One sample: ``value`` [A], ``rate`` [A] per second of tau, and what the servo must know about it."""

    value: np.ndarray
    rate: np.ndarray
    seam: bool
    starved: bool
    holding: bool


class CommittedPrefix(NamedTuple):
    """``actions`` [H, A] and ``mask`` [H] for the sampler; ``committed``: how many rows stand fixed (mask 1)."""

    actions: np.ndarray
    mask: np.ndarray
    committed: int


cdef class Fusion:
    """Chunks in, one target per tau out. All memory is allocated here.

    ``layout``: the action components [A]; ``horizon``: the most rows a chunk may have (H); ``mode``: one of MODES;
    ``cubic``: cubic or linear between actions; ``fade``, ``gripper_fade``: seconds of tau in which a seam's offset
    fades to under 2 %; ``ensemble_decay``: ACT's m, per chunk; ``capacity``: chunks an ensemble averages at most;
    ``sync_actions``: n of the sync mode; ``prefix_schedule``: the soft mask's shape (prefix.py); ``history``: seconds
    of tau of past output kept for committed prefixes.
    Raises ValueError for values out of range.
    """

    def __cinit__(
        self,
        ActionLayout layout not None,
        int horizon,
        *,
        mode="blend",
        bint cubic=True,
        double fade=0.5,
        double gripper_fade=0.1,
        double ensemble_decay=0.01,
        int capacity=8,
        int sync_actions=0,
        prefix_schedule="smooth",
        double history=1.0,
    ):
        cdef int A = layout.size
        cdef int i, per_slot
        cdef double *cursor
        if not 1 <= horizon <= 1024:
            raise ValueError(f"horizon is {horizon}; expected 1 to 1024 actions")
        if mode not in MODES:
            raise ValueError(f"fusion mode {mode!r}; expected one of {', '.join(MODES)}")
        if not (0 <= fade <= 10 and 0 <= gripper_fade <= 10):
            raise ValueError(f"fade {fade} s, gripper_fade {gripper_fade} s; expected 0 to 10 s")
        if not (0 <= ensemble_decay <= 100):
            raise ValueError(f"ensemble_decay is {ensemble_decay}; expected 0 to 100")
        if not 1 <= capacity <= 64:
            raise ValueError(f"capacity is {capacity}; expected 1 to 64 chunks")
        if mode == "sync" and not 1 <= sync_actions <= horizon:
            raise ValueError(f"sync_actions is {sync_actions}; sync mode executes 1 to {horizon} actions of a chunk")
        if prefix_schedule not in SCHEDULES:
            raise ValueError(f"prefix_schedule {prefix_schedule!r}; expected one of {', '.join(SCHEDULES)}")
        if not (0 < history <= 60):
            raise ValueError(f"history is {history} s; expected up to 60 s")
        self.layout = layout
        self.horizon = horizon
        self.mode = MODES.index(mode)
        # The other modes use one chunk; a few more may wait for their first action to come due.
        self.capacity = capacity if self.mode == ENSEMBLE else 4
        self.sync_actions = sync_actions
        self.schedule = SCHEDULES.index(prefix_schedule)
        self.anchored = False
        self.orphaned = False
        self.stood = True
        self.tau_now = 0
        self.newest_observation = -INFINITY
        memset(&self.counters, 0, sizeof(self.counters))
        smooth = self.mode == BLEND or self.mode == ENSEMBLE or self.mode == RTC
        self.fade.pole = FADE_POLES / fade if smooth and fade > 0 else 0
        self.fade.gripper_pole = GRIPPER_POLES / gripper_fade if smooth and gripper_fade > 0 else 0
        self.ahead.pole = self.fade.pole
        self.ahead.gripper_pole = self.fade.gripper_pole

        # Slots: those in use (capacity), those waiting (capacity + 1), and the held position (the last slot).
        self.slot_count = 2 * self.capacity + 2
        self.history.spacing = 0.004
        self.history.size = <int>(history / self.history.spacing) + 2
        per_slot = 2 * (horizon + 1) * A
        self.slots = <Knots *>calloc(self.slot_count, sizeof(Knots))
        self.played = <bint *>calloc(self.slot_count, sizeof(bint))
        self.queue = <int *>calloc(self.capacity + 1, sizeof(int))
        self.active = <int *>calloc(self.capacity, sizeof(int))
        self.chosen = <int *>calloc(self.capacity, sizeof(int))
        self.weights = <double *>calloc(self.capacity, sizeof(double))
        self.memory = <double *>calloc(
            <size_t>self.slot_count * per_slot + 12 * A + <size_t>self.history.size * (A + 1), sizeof(double)
        )
        if (self.slots == NULL or self.played == NULL or self.queue == NULL or self.active == NULL
                or self.chosen == NULL or self.weights == NULL or self.memory == NULL):
            raise MemoryError
        cursor = self.memory
        for i in range(self.slot_count):
            self.slots[i].cubic = cubic
            self.slots[i].actions = cursor
            self.slots[i].slopes = cursor + (horizon + 1) * A
            cursor += per_slot
        self.fused = cursor
        self.fused_rate = cursor + A
        self.base = cursor + 2 * A
        self.base_rate = cursor + 3 * A
        self.part = cursor + 4 * A
        self.part_rate = cursor + 5 * A
        self.fade.offset = cursor + 6 * A
        self.fade.rate = cursor + 7 * A
        self.fade.curve = cursor + 8 * A
        self.ahead.offset = cursor + 9 * A
        self.ahead.rate = cursor + 10 * A
        self.ahead.curve = cursor + 11 * A
        cursor += 12 * A
        self.history.tau = cursor
        self.history.values = cursor + self.history.size
        for i in range(self.capacity):
            self.weights[i] = exp(-ensemble_decay * i)

    def __dealloc__(self):
        free(self.slots)
        free(self.played)
        free(self.queue)
        free(self.active)
        free(self.chosen)
        free(self.weights)
        free(self.memory)

    # ------------------------------------------------------------------------------------------ what the servo calls

    cdef int c_reset(self, uint64_t epoch, double tau, const double *position) noexcept nogil:
        """Forget every chunk and hold ``position`` [A] at ``tau``. 0, or -1 where it is no position.

        For arming and for whatever else moved the robot by other means than this trajectory. The position is the last
        commanded one, or the measured one.
        """
        cdef int A = self.layout.size
        cdef Knots *hold = &self.slots[self.slot_count - 1]
        if rows_verdict(position, A) != ACCEPTED or not isfinite(tau):
            return -1
        memcpy(hold.actions, position, A * sizeof(double))
        hold.tau_first = hold.tau_last = tau
        hold.dt = 1
        hold.rows = 1
        hold.sequence = 0
        if knots_prepare(hold, self.layout):
            self.anchored = False
            return -1
        while self.queued:
            self._unqueue(0)
        self.active[0] = self.slot_count - 1
        self.active_count = 1
        self.orphaned = False
        self.epoch_now = epoch
        self.tau_now = tau
        self.newest_observation = -INFINITY
        fade_clear(&self.fade, A)
        memcpy(self.fused, hold.actions, A * sizeof(double))
        memset(self.fused_rate, 0, A * sizeof(double))
        self.history.count = 0
        self.history.next = 0
        history_add(&self.history, A, tau, self.fused)
        self.stood = True
        self.anchored = True
        return 0

    cdef int c_set_epoch(self, uint64_t epoch) noexcept nogil:
        """A new epoch (another instruction): chunks of older ones are dropped from now on. 0, or -1 if it is not newer.

        What is being executed stays as the path on which tau ramps to 0; the first chunk of the new epoch continues
        from wherever the robot is by then.
        """
        if epoch <= self.epoch_now:
            return -1
        self.epoch_now = epoch
        while self.queued:
            self._unqueue(0)
        self.newest_observation = -INFINITY
        self.orphaned = True
        return 0

    cdef int c_push(self, const ChunkHeader *header, const double *actions) noexcept nogil:
        """Take a chunk (``actions`` [header.rows, A], copied) or refuse it, counted either way. Returns a Verdict.

        Call it before tau advances in a tick, so that the chunk is used in that tick.
        """
        cdef int verdict = self._verdict(header, actions)
        cdef int A = self.layout.size
        cdef int slot, rows
        cdef Knots *knots
        if verdict == ACCEPTED:
            slot = self._free_slot()
            knots = &self.slots[slot]
            rows = header.rows
            knots.dt = header.dt
            knots.sequence = header.sequence
            if self.mode == SYNC:
                rows = min(rows, self.sync_actions)
                memcpy(knots.actions, self.fused, A * sizeof(double))
                memcpy(knots.actions + A, actions, <size_t>rows * A * sizeof(double))
                knots.rows = rows + 1
                knots.tau_first = self.tau_now
            else:
                memcpy(knots.actions, actions, <size_t>rows * A * sizeof(double))
                knots.rows = rows
                knots.tau_first = header.tau_observation + header.first_step * header.dt
            knots.tau_last = knots.tau_first + (knots.rows - 1) * knots.dt
            if knots_prepare(knots, self.layout):
                verdict = DEGENERATE_ROTATION
            else:
                self._make_room(header.tau_observation)
                self.queue[self.queued] = slot
                self.queued += 1
                self.played[slot] = False
                self.newest_observation = header.tau_observation
                self.orphaned = False
                if header.rows < self.horizon:
                    self.counters.short_chunks += 1
        self.counters.verdict[verdict] += 1
        return verdict

    cdef double c_path_end(self) noexcept nogil:
        """Where the clock must be at rest: the last due action; -inf when the path has been called off."""
        if self.orphaned or not self.anchored:
            return -INFINITY
        return self._last_due()

    cdef int c_sample(self, double tau, double *value, double *rate) noexcept nogil:
        """``value`` [A] and its rate [A] per second of tau. Returns SampleFlags.

        A tau that has not moved (or went back, or is NaN) gives the last output again, bit for bit.
        """
        cdef int A = self.layout.size
        cdef int flags = 0
        if not self.anchored:
            return SAMPLE_UNANCHORED | SAMPLE_STARVED
        if tau > self.tau_now:
            if self._move(tau):
                flags |= SAMPLE_SEAM
            self.stood = False
        else:
            self.stood = True
        memcpy(value, self.fused, A * sizeof(double))
        memcpy(rate, self.fused_rate, A * sizeof(double))
        if self.active[0] == self.slot_count - 1:
            flags |= SAMPLE_HOLDING
        if self.orphaned or self.tau_now >= self._last_due():
            flags |= SAMPLE_STARVED
            self.counters.starved_ticks += 1
        return flags

    cdef int c_committed_prefix(self, double tau_observation, int first_step, double dt, int rows,
                                double expected_delay, double *prefix, double *mask) noexcept nogil:
        """What a chunk observed at ``tau_observation`` must begin with. Fills prefix [rows, A] and mask [rows].

        Row i is the fused trajectory at the tau at which that chunk's action i will be due: what was sent where that
        lies in the past, the present plan (offset included) where it lies ahead. ``expected_delay``: seconds of tau
        from the observation to the chunk's arrival (host delay times the rate). Returns d, the committed rows: those
        due before the arrival and one more, because the servo interpolates toward the action after the arrival.
        The mask is that of prefix.py under the ``prefix_schedule`` chosen; all zero where there is no plan to
        commit to: before the first chunk, after a new epoch, and in sync mode.
        """
        cdef int A = self.layout.size
        cdef int i, row, count, survivors, committed = 0, overlap = 0
        cdef double due, arrival, c, at, last = self._last_due()
        memset(mask, 0, rows * sizeof(double))
        if not self.anchored:
            memset(prefix, 0, <size_t>rows * A * sizeof(double))
            return 0
        if not expected_delay > 0:
            expected_delay = 0
        arrival = tau_observation + expected_delay
        memcpy(self.ahead.offset, self.fade.offset, A * sizeof(double))
        memcpy(self.ahead.rate, self.fade.rate, A * sizeof(double))
        memcpy(self.ahead.curve, self.fade.curve, A * sizeof(double))
        count = self._choose(self.tau_now, self.tau_now)
        if count:  # a chunk waits for tau to move: the plan is what it will have become by then
            self._base_of(self.chosen, count, self.tau_now, self.base, self.base_rate)
            fade_capture(&self.ahead, self.layout, self.fused, self.fused_rate, self.base, self.base_rate)
        else:
            count = self.active_count
            memcpy(self.chosen, self.active, count * sizeof(int))
        at = self.tau_now
        for row in range(rows):
            due = tau_observation + (row + first_step) * dt
            if due <= self.tau_now:
                history_at(&self.history, self.layout, due, self.tau_now, self.fused, prefix + row * A)
            else:
                fade_advance(&self.ahead, self.layout, due - at)
                at = due
                # An ensemble loses the chunks that will have ended by then, but never its last one.
                survivors = 0
                for i in range(count):
                    if self.slots[self.chosen[i]].tau_last >= due or count == 1:
                        self.chosen[survivors] = self.chosen[i]
                        survivors += 1
                if survivors:
                    count = survivors
                self._base_of(self.chosen, count, due, self.base, self.base_rate)
                fade_apply(&self.ahead, self.layout, self.base, self.base_rate, prefix + row * A, self.part_rate)
            if due <= last + TAU_NOISE:
                overlap += 1
            if due < arrival + dt - TAU_NOISE:
                committed += 1
        if self.orphaned or self.queued == 0 or self.mode == SYNC:
            return 0
        committed = min(committed, overlap)
        for row in range(overlap):
            c = (<double>overlap - row) / (overlap - committed + 1)
            if row < committed:
                mask[row] = 1
            elif self.schedule == SMOOTH:
                mask[row] = c * c * c * (10 - 15 * c + 6 * c * c)
                mask[row] *= mask[row]
            elif self.schedule == EXP:
                mask[row] = c * expm1(c) / expm1(1.0)
            elif self.schedule == LINEAR:
                mask[row] = c
        return committed

    cdef uint64_t c_sequence(self) noexcept nogil:
        """The mailbox number of the newest chunk in use; 0 while none is."""
        return self.slots[self.active[self.active_count - 1]].sequence if self.anchored else 0

    # ----------------------------------------------------------------------------------------------------- the inside

    cdef int _verdict(self, const ChunkHeader *header, const double *actions) noexcept nogil:
        cdef double last_due
        cdef int verdict
        if not self.anchored:
            return UNANCHORED
        verdict = header_verdict(header, self.horizon)
        if verdict != ACCEPTED:
            return verdict
        if header.epoch < self.epoch_now:
            return OLD_EPOCH
        if header.epoch > self.epoch_now:
            return FUTURE_EPOCH
        if header.tau_observation > self.tau_now + TAU_NOISE:
            return FUTURE
        if header.tau_observation < self.newest_observation:
            return OUT_OF_ORDER
        if self.mode == SYNC:
            if header.tau_observation < self.tau_now - TAU_NOISE:
                return EARLY
            if (self.queued and self.played[self.queue[self.queued - 1]] and not self.orphaned
                    and self.tau_now < self._last_due()):
                return EARLY
        else:
            last_due = header.tau_observation + (header.first_step + header.rows - 1) * header.dt
            if last_due < self.tau_now:
                return STALE
        return rows_verdict(actions, header.rows * self.layout.size)

    cdef int _free_slot(self) noexcept nogil:
        """A slot that is neither queued nor in use; the counts of __cinit__ guarantee one."""
        cdef int slot, i
        cdef bint taken
        for slot in range(self.slot_count - 1):
            taken = False
            for i in range(self.queued):
                taken = taken or self.queue[i] == slot
            for i in range(self.active_count):
                taken = taken or self.active[i] == slot
            if not taken:
                return slot
        return 0

    cdef void _make_room(self, double tau_observation) noexcept nogil:
        """Take out of the queue what a chunk of this observation replaces."""
        if self.mode == SYNC:
            while self.queued:
                self._unqueue(0)
        elif self.queued and tau_observation == self.newest_observation and self.mode == ENSEMBLE:
            # Observed at the same tau: the robot stood. Two votes for one look would count standing still as evidence.
            self._unqueue(self.queued - 1)
        elif self.queued > self.capacity:
            if self.mode == ENSEMBLE and self.played[self.queue[0]]:
                self.counters.evicted += 1
            self._unqueue(0)

    cdef void _unqueue(self, int place) noexcept nogil:
        """Take a chunk out of the queue. Its memory stays untouched while it is in use."""
        cdef int i
        if not self.played[self.queue[place]]:
            self.counters.superseded += 1
        self.queued -= 1
        for i in range(place, self.queued):
            self.queue[i] = self.queue[i + 1]

    cdef double _last_due(self) noexcept nogil:
        cdef double last
        cdef int i
        if self.queued == 0:
            return -INFINITY if self.orphaned else self.tau_now
        last = self.slots[self.queue[self.queued - 1]].tau_last
        if self.mode == ENSEMBLE:
            for i in range(self.queued):
                last = fmax(last, self.slots[self.queue[i]].tau_last)
        return last

    cdef int _choose(self, double begun, double unfinished) noexcept nogil:
        """The slots that make the base, oldest first, into ``chosen``; 0 where nothing changes.

        Those whose first action is due by ``begun`` and, in an ensemble, whose last is not due before ``unfinished``.
        """
        cdef int i, count = 0
        cdef const Knots *knots
        if self.mode == ENSEMBLE:
            for i in range(self.queued):
                knots = &self.slots[self.queue[i]]
                if knots.tau_first <= begun and unfinished <= knots.tau_last:
                    if count == self.capacity:  # one more is queued than may be averaged: the oldest gives way
                        for count in range(self.capacity - 1):
                            self.chosen[count] = self.chosen[count + 1]
                        count = self.capacity - 1
                    self.chosen[count] = self.queue[i]
                    count += 1
        else:
            for i in range(self.queued - 1, -1, -1):
                if self.slots[self.queue[i]].tau_first <= begun:
                    self.chosen[0] = self.queue[i]
                    count = 1
                    break
        if count == self.active_count:
            for i in range(count):
                if self.chosen[i] != self.active[i]:
                    return count
            return 0
        return count

    cdef void _base_of(self, const int *slots, int count, double tau, double *value, double *rate) noexcept nogil:
        cdef int A = self.layout.size
        cdef int i, n
        cdef double weight, total = 0
        knots_sample(&self.slots[slots[0]], self.layout, tau, value, rate)
        if count == 1:
            return
        for n in range(count):
            total += self.weights[n]
        weight = self.weights[0] / total
        for i in range(A):
            value[i] *= weight
            rate[i] *= weight
        for n in range(1, count):
            knots_sample(&self.slots[slots[n]], self.layout, tau, self.part, self.part_rate)
            weight = self.weights[n] / total
            for i in range(A):
                value[i] += weight * self.part[i]
                rate[i] += weight * self.part_rate[i]
        for i in range(A):
            if self.layout.kind[i] == ROT6D and orthonormalise(value + i, rate + i):
                # Predictions that cancel out have no mean: the newest of them.
                memcpy(value + i, self.part + i, 6 * sizeof(double))
                memcpy(rate + i, self.part_rate + i, 6 * sizeof(double))

    cdef bint _move(self, double tau) noexcept nogil:
        """Advance the output to tau. True where the base changed.

        A change is made at the tau before the step wherever both sides have actions there: a chunk that ends within
        the step still moves at its start, and past its end it would have stopped. Only a chunk whose first action
        comes due within the step enters at the step's end.
        """
        cdef bint changed = False
        cdef int count = self._choose(self.tau_now, tau)
        if count:
            self._base_of(self.chosen, count, self.tau_now, self.base, self.base_rate)
            self._change(count, tau)
            changed = True
        fade_advance(&self.fade, self.layout, tau - self.tau_now)
        self._base_of(self.active, self.active_count, tau, self.base, self.base_rate)
        fade_apply(&self.fade, self.layout, self.base, self.base_rate, self.fused, self.fused_rate)
        count = self._choose(tau, tau)
        if count:
            self._base_of(self.chosen, count, tau, self.base, self.base_rate)
            self._change(count, tau)
            fade_apply(&self.fade, self.layout, self.base, self.base_rate, self.fused, self.fused_rate)
            changed = True
        self.tau_now = tau
        history_add(&self.history, self.layout.size, tau, self.fused)
        return changed

    cdef void _change(self, int count, double tau) noexcept nogil:
        """The chosen slots become the base; the offset takes up the difference to what is fused now."""
        cdef int place
        # A robot that stands has no velocity to keep, whatever the slope of the path it stands on: its way in tau
        # starts along the new base, and continuity in host time is the clock's, whose rate is near 0.
        fade_capture(&self.fade, self.layout, self.fused, self.fused_rate, self.base, self.base_rate)
        if self.stood:
            fade_stand(&self.fade, self.layout)
        memcpy(self.active, self.chosen, count * sizeof(int))
        self.active_count = count
        for place in range(count):
            self.played[self.active[place]] = True
        self.counters.seams += 1
        # What lies before the oldest chunk in use, and what an ensemble has outlived, will never be used again.
        while self.queued and self.queue[0] != self.active[0]:
            if self.mode == ENSEMBLE and self.slots[self.queue[0]].tau_last >= tau:
                self.counters.evicted += 1
            self._unqueue(0)

    # -------------------------------------------------------------------------------- the same, for tests and plots

    def reset(self, position, *, uint64_t epoch=0, double tau=0.0):
        """Forget every chunk and hold ``position`` [A]. Raises ValueError where it is no position."""
        cdef double[::1] data = self._checked(position, 1)
        if self.c_reset(epoch, tau, &data[0]):
            raise ValueError(f"{np.asarray(position).tolist()} at tau {tau} is no position to hold")

    def set_epoch(self, uint64_t epoch):
        """A new epoch. Raises ValueError if it is not newer."""
        if self.c_set_epoch(epoch):
            raise ValueError(f"epoch {epoch} is not newer than {self.epoch_now}")

    def push(self, chunk):
        """Take or refuse a Chunk; returns the verdict's name (chunks.VERDICT_NAMES)."""
        cdef double[:, ::1] rows = np.ascontiguousarray(chunk.actions, dtype=np.float64)
        cdef ChunkHeader header
        if rows.shape[1] != self.layout.size:
            raise ValueError(f"actions have {rows.shape[1]} components; the layout has {self.layout.size}")
        header.epoch = chunk.epoch
        header.sequence = chunk.sequence
        header.tau_observation = chunk.tau_observation
        header.dt = chunk.dt
        header.first_step = chunk.first_step
        header.rows = <int>rows.shape[0]
        return VERDICT_NAMES[self.c_push(&header, &rows[0, 0] if rows.shape[0] else NULL)]

    def path_end(self):
        """Where the clock must be at rest, s of tau; -inf when the path has been called off."""
        return self.c_path_end()

    def sample(self, double tau):
        """The fused target at tau. Raises RuntimeError before the first reset."""
        value = np.empty(self.layout.size)
        rate = np.empty(self.layout.size)
        cdef double[::1] v = value
        cdef double[::1] r = rate
        cdef int flags = self.c_sample(tau, &v[0], &r[0])
        if flags & SAMPLE_UNANCHORED:
            raise RuntimeError("sampled before reset: there is no position to hold")
        return Fused(value, rate, bool(flags & SAMPLE_SEAM), bool(flags & SAMPLE_STARVED), bool(flags & SAMPLE_HOLDING))

    def committed_prefix(self, double tau_observation, int first_step, double dt, double expected_delay):
        """What a chunk observed at ``tau_observation`` must begin with: [H, A] and its soft mask [H]."""
        actions = np.empty((self.horizon, self.layout.size))
        mask = np.empty(self.horizon)
        cdef double[:, ::1] a = actions
        cdef double[::1] m = mask
        committed = self.c_committed_prefix(
            tau_observation, first_step, dt, self.horizon, expected_delay, &a[0, 0], &m[0]
        )
        return CommittedPrefix(actions, mask, committed)

    def _checked(self, values, int dimensions):
        array = np.ascontiguousarray(values, dtype=np.float64)
        if array.ndim != dimensions or array.shape[array.ndim - 1] != self.layout.size:
            raise ValueError(f"found shape {array.shape}; the layout has {self.layout.size} components")
        return array

    @property
    def epoch(self):
        return self.epoch_now

    @property
    def sequence(self):
        """The mailbox number of the newest chunk in use; 0 while none is."""
        return self.c_sequence()

    @property
    def counts(self):
        """Every verdict and event so far, by name (chunks.COUNTER_NAMES)."""
        values = [self.counters.verdict[i] for i in range(<int>VERDICTS)]
        values += [self.counters.short_chunks, self.counters.superseded, self.counters.evicted]
        values += [self.counters.seams, self.counters.starved_ticks]
        return dict(zip(COUNTER_NAMES, values, strict=True))
