"""The loop of a device's process: the newest command to the vendor library at the device's own pace, the state back.

A driver is an arm of `drivers.protocols`: `command`, `state` and `stop` are called here, under the GIL of a process
that nothing else shares.

What is enforced here is enforced natively, before the driver is asked anything, and whatever the rest of the rig does:

- nothing is sent before the first arming that began while this process watched, nor by a lease that has expired;
- a lease that expires, or the emergency stop, leaves the servo ``longest_stop`` to bring the arm to rest within its
  limits; then this process brakes by itself, holds, and after ``hold`` takes the stop action;
- a servo that is silent for ``silence``, or sends what no servo sends, is not waited for: this process brakes from the
  last good command at once, with the acceleration and jerk of the limits, and holds;
- an arm that does not answer for as long is braked likewise; when it answers again it is held where it is found, not
  sent to where commands that it never heard would have brought it;
- all of this stays until the next arming. On its own a device only ever reduces.

A driver that raises counts as a fault of the arm: its stop action is tried, and the servo, which reads the fault in the
state slot, stops the other arms. What is wrong stands in the state in words for as long as it is wrong: an arm with a
fault is not armed.
"""

from libc.math cimport NAN, isfinite
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy, memset

import logging

import numpy as np

from chatvla_edge.runtime.histogram cimport Histogram, c_record
from chatvla_edge.runtime.limits cimport HOLD, SLOPE_1, SLOPE_3, STEPS_1, STEPS_2, STEPS_3, plan_stop
from chatvla_edge.runtime.pages cimport c_lease_valid, c_stop_raised
from chatvla_edge.runtime.realtime cimport c_now_ns, c_sleep_until_ns
from chatvla_edge.runtime.servo_records cimport (
    DEVICE_BRAKING, DEVICE_FOLLOWING, DEVICE_HOLDING, DEVICE_IDLE, DEVICE_STOPPED, FAULT_ARM, FAULT_COMMAND,
    FAULT_DRIVER, FAULT_ESTOP, FAULT_LEASE, FAULT_SILENCE, FAULT_UNANSWERED, WORDS,
)
from chatvla_edge.runtime.slots cimport CELL_NEW, c_publish, c_read_latest, load_relaxed, store_relaxed

from chatvla_edge.runtime.servo_records import COMMAND, STATE

log = logging.getLogger(__name__)

# A command may be this much further from the last one than the velocity limit allows in the time between them.
cdef double STRIDE = 1.5
cdef int64_t NEVER = -1


cdef class DeviceGate:
    """The decisions of one device. ``plan``: a `DevicePlan`; ``wires``: a `DeviceWires`."""

    def __init__(self, plan, wires):
        cdef Py_ssize_t i
        self.plan = plan
        self.lease = Lease.attach(wires.lease)
        self.estop = EmergencyStop.attach(wires.estop)
        self.command_slot = Slot.attach(wires.command, COMMAND.itemsize)
        self.lease_page = self.lease.page
        self.stop_page = self.estop.page
        self.command_cells = self.command_slot.cells
        self.axes = plan.axes
        self.period_ns = plan.period_ns
        self.period = 1e-9 * self.period_ns
        self.silence_ns = round(1e9 * plan.silence)
        self.longest_stop_ns = round(1e9 * plan.longest_stop)
        self.hold_ns = NEVER if plan.hold is None else round(1e9 * plan.hold)
        self.reach = plan.reach
        memset(&self.command, 0, sizeof(CommandRecord))
        memset(&self.state, 0, sizeof(StateRecord))
        for i in range(self.axes):
            self.lower[i] = plan.lower[i]
            self.upper[i] = plan.upper[i]
            self.velocity[i] = plan.velocity[i]
            self.top[i] = plan.acceleration[i]
            self.change[i] = plan.jerk[i] * self.period
            self.target[i] = NAN
            self.state.q[i] = NAN
            self.state.sent[i] = NAN
            self.state.target[i] = NAN
        self.doing = DEVICE_IDLE
        self.state.axes = self.axes

    cdef int c_step(self, int64_t now_ns) noexcept nogil:
        """One cycle at host time ``now_ns``. Returns an Act; for ACT_COMMAND the position stands in `target`."""
        cdef bint estop = c_stop_raised(&self.stop_page)
        cdef bint allowed = c_lease_valid(&self.lease_page, now_ns) and not estop
        cdef bint moved = self._hear(now_ns)
        if allowed:
            self.forbidden_ns = 0
        elif self.forbidden_ns == 0:
            self.forbidden_ns = now_ns

        if self.doing == DEVICE_IDLE or self.doing == DEVICE_STOPPED or self.doing == DEVICE_HOLDING:
            if (
                allowed and self.started and self.command.moving and self.command.arming > self.barred
                and now_ns - self.heard_ns <= self.silence_ns and not load_relaxed(&self.quitting)
            ):
                self.barred = self.command.arming - 1
                self.faults = 0
                self.lost = False
                memset(self.state.words, 0, WORDS)
                self.state.arming = self.command.arming
                if self._fits(&self.command, now_ns):
                    self.doing = DEVICE_FOLLOWING
                else:
                    self.barred = self.command.arming
                    self.faults = 1 << FAULT_COMMAND
        if self.doing == DEVICE_FOLLOWING:
            if not self.command.moving:
                self.doing = DEVICE_IDLE  # the servo lets go, which it does at rest only
                self.barred = self.state.arming
            elif load_relaxed(&self.quitting):
                self._brake(0)
            elif now_ns - self.heard_ns > self.silence_ns:
                self._brake(1 << FAULT_SILENCE)
            elif self.forbidden_ns and now_ns - self.forbidden_ns >= self.longest_stop_ns:
                self._brake(1 << FAULT_ESTOP if estop else 1 << FAULT_LEASE)
            elif self.answered_ns and now_ns - self.answered_ns > self.silence_ns:
                self._brake(1 << FAULT_UNANSWERED)
        if self.doing == DEVICE_BRAKING or self.doing == DEVICE_HOLDING:
            if self.answered_ns and now_ns - self.answered_ns > self.silence_ns:
                self.lost = True
                self.faults |= 1 << FAULT_UNANSWERED
            elif self.lost or (self.doing == DEVICE_HOLDING and self._apart()):
                self._stay(now_ns)
        # A command taken in this cycle is this cycle's step; a step of the stop on top of it would be two.
        if self.doing == DEVICE_BRAKING and not moved and self._braked():
            self.doing = DEVICE_HOLDING
            self.held_ns = now_ns
        if self.doing == DEVICE_HOLDING and self.hold_ns >= 0 and now_ns - self.held_ns >= self.hold_ns:
            self.doing = DEVICE_STOPPED
            return ACT_STOP
        if self.doing == DEVICE_IDLE or self.doing == DEVICE_STOPPED:
            return ACT_NOTHING
        return ACT_COMMAND

    cdef bint _hear(self, int64_t now_ns) noexcept nogil:
        """Take the newest command, if there is one and it is one. True where it moved the target."""
        cdef Stamp stamp
        cdef Py_ssize_t i
        cdef bint moved = False
        if c_read_latest(&self.command_cells, self.seen, &self.scratch, &stamp) != CELL_NEW:
            return False
        self.seen = stamp.sequence
        if not self.started:
            # An arming that began before this process did is none of its business: it does not know where the arm was
            # meant to be. A restarted device waits for the operator.
            self.started = True
            self.barred = self.scratch.arming
        if self.doing == DEVICE_FOLLOWING and self.scratch.moving:
            # A servo arms anew only at rest and from where the arm was told to be, so this too must fit.
            if not self._fits(&self.scratch, now_ns):
                self._brake(1 << FAULT_COMMAND)
                return False
            moved = True
            for i in range(self.axes):
                self.target[i] = self.scratch.q[i]
                self.speed[i] = self.scratch.dq[i]
                self.acceleration[i] = self.scratch.ddq[i]
            self.state.arming = self.scratch.arming
            self.state.tick = self.scratch.tick
        self.command = self.scratch
        self.heard_ns = now_ns
        return moved

    cdef bint _fits(self, const CommandRecord *command, int64_t now_ns) noexcept nogil:
        """Whether the arm may be told this next; adopts it as the target when it is the first."""
        cdef Py_ssize_t i
        cdef bint first = self.doing != DEVICE_FOLLOWING
        cdef double seconds = 1e-9 * (now_ns - self.heard_ns) + self.period
        cdef double away, allowed
        if command.axes != <uint64_t>self.axes:
            return False
        for i in range(self.axes):
            if first:
                away = command.q[i] - self.state.q[i]
                allowed = self.reach
            else:
                away = command.q[i] - self.target[i]
                allowed = STRIDE * self.velocity[i] * seconds
            # Written so that NaN fails.
            if not (-allowed <= away <= allowed and self.lower[i] <= command.q[i] <= self.upper[i]):
                return False
            if not (isfinite(command.dq[i]) and isfinite(command.ddq[i])):
                return False
        if first:
            for i in range(self.axes):
                self.target[i] = command.q[i]
                self.speed[i] = command.dq[i]
                self.acceleration[i] = command.ddq[i]
            self.state.tick = command.tick
        return True

    cdef void _brake(self, uint64_t fault) noexcept nogil:
        """Begin the stop of each axis from the last command that went out, at this device's own period."""
        cdef Py_ssize_t i, k
        self.faults |= fault
        self.barred = self.state.arming
        self.doing = DEVICE_BRAKING
        for i in range(self.axes):
            if not plan_stop(
                self.speed[i], self.acceleration[i], self.top[i], self.change[i], self.period, self.stops, i * 14
            ):
                for k in range(14):
                    self.stops[i * 14 + k] = 0  # none found: stands from here

    cdef bint _apart(self) noexcept nogil:
        """Whether an axis is further from where it is held than a first command may lead."""
        cdef Py_ssize_t i
        for i in range(self.axes):
            if not -self.reach <= self.state.q[i] - self.target[i] <= self.reach and isfinite(self.state.q[i]):
                return True
        return False

    cdef void _stay(self, int64_t now_ns) noexcept nogil:
        """Hold the arm where it is found: it answers again after commands that it may never have heard, or something
        keeps it from where it is held, and when that lets go it must not spring there."""
        cdef Py_ssize_t i
        self.lost = False
        self.doing = DEVICE_HOLDING
        self.held_ns = now_ns
        for i in range(self.axes):
            if isfinite(self.state.q[i]):
                self.target[i] = min(max(self.state.q[i], self.lower[i]), self.upper[i])
            self.speed[i] = 0
            self.acceleration[i] = 0

    cdef bint _braked(self) noexcept nogil:
        """One period of that stop; True once every axis has come to rest."""
        cdef Py_ssize_t i
        cdef double *stop
        cdef bint still = True
        for i in range(self.axes):
            stop = &self.stops[i * 14]
            if stop[STEPS_1] > 0:
                stop[STEPS_1] -= 1
                self.acceleration[i] += stop[SLOPE_1]
            elif stop[STEPS_2] > 0:
                stop[STEPS_2] -= 1
                self.acceleration[i] = stop[HOLD]
            elif stop[STEPS_3] > 0:
                stop[STEPS_3] -= 1
                self.acceleration[i] += stop[SLOPE_3]
            else:
                self.acceleration[i] = 0
                self.speed[i] = 0
                continue
            still = False
            self.speed[i] += self.acceleration[i] * self.period
            self.target[i] = min(
                max(self.target[i] + self.speed[i] * self.period, self.lower[i]), self.upper[i]
            )
        return still


cdef class DeviceLoop:
    """The loop around one driver; `run` it in the device's own process."""

    def __init__(self, plan, wires, driver):
        self.gate = DeviceGate(plan, wires)
        self.driver = driver
        self.state_slot = Slot.attach(wires.state, STATE.itemsize, write=True)
        self.history_ring = Ring.attach(wires.history, STATE.itemsize, wires.history_rows, write=True)
        self.position = np.zeros(plan.axes)
        self.handed = self.position
        memset(&self.lateness, 0, sizeof(Counts))
        memset(&self.cost, 0, sizeof(Counts))

    def run(self, cycles=None):
        """Cycle at absolute deadlines until ``cycles`` are done, or `quit` has brought the arm to its stop action."""
        cdef uint64_t left = <uint64_t>-1 if cycles is None else cycles
        cdef int64_t deadline = c_now_ns()
        cdef int64_t now, skipped
        while left > 0:
            with nogil:
                c_sleep_until_ns(deadline)
                now = c_now_ns()
                c_record(&self.lateness, now - deadline)
                skipped = (now - deadline) // self.gate.period_ns
                if skipped > 0:
                    self.overruns += <uint64_t>skipped
                    deadline += skipped * self.gate.period_ns
                deadline += self.gate.period_ns
            self.cycle(now)
            c_record(&self.cost, c_now_ns() - now)
            left -= 1
            if load_relaxed(&self.gate.quitting) and self.gate.doing in (DEVICE_IDLE, DEVICE_HOLDING, DEVICE_STOPPED):
                break
        if load_relaxed(&self.gate.quitting):
            self.driver.stop()

    def cycle(self, int64_t now_ns):
        """One cycle at host time ``now_ns``; returns what the device does with its arm, by DEVICE_DOING's position."""
        cdef int act
        with nogil:
            act = self.gate.c_step(now_ns)
        self._drive(act)
        if load_relaxed(&self.gate.clearing) and self.gate.doing in (DEVICE_IDLE, DEVICE_HOLDING, DEVICE_STOPPED):
            self._clear()
        self._measure(now_ns)
        return self.gate.doing

    def quit(self):
        """Let `run` brake, hold, take the stop action and return; from any thread."""
        store_relaxed(&self.gate.quitting, 1)

    def clear(self):
        """Let `run` ask the driver to end the arm's fault, as soon as no command flows; from any thread."""
        store_relaxed(&self.gate.clearing, 1)

    def _clear(self):
        cdef DeviceGate gate = self.gate
        store_relaxed(&gate.clearing, 0)
        try:
            self.driver.clear()
            log.info("%s: cleared, on the operator's word", gate.plan.name)
        except Exception as error:
            log.exception("%s: the fault stays", gate.plan.name)
            self._tell(f"clear: {type(error).__name__}: {error}")

    def histograms(self):
        """Copies of ``lateness`` (of wake-ups) and ``cost`` (of a cycle, driver included), in ns."""
        return {"lateness": copied(&self.lateness), "cost": copied(&self.cost)}

    cdef int _drive(self, int act) except -1:
        cdef Py_ssize_t i
        cdef DeviceGate gate = self.gate
        try:
            if act == ACT_COMMAND:
                for i in range(gate.axes):
                    self.handed[i] = gate.target[i]
                self.driver.command(self.position)
                for i in range(gate.axes):
                    gate.state.sent[i] = gate.target[i]
            elif act == ACT_STOP:
                self.driver.stop()
        except Exception as error:
            self._give_up("command" if act == ACT_COMMAND else "stop", error)
        return 0

    def _give_up(self, call, error):
        """The driver raised: no further command until the next arming, and the stop action once, as far as it goes."""
        cdef DeviceGate gate = self.gate
        self._tell(f"{call}: {type(error).__name__}: {error}")
        if not gate.faults & 1 << FAULT_DRIVER:
            log.exception("%s: the driver's %s failed", gate.plan.name, call)
        gate.faults |= 1 << FAULT_DRIVER
        gate.barred = max(gate.barred, gate.state.arming)
        if gate.doing != DEVICE_STOPPED:
            gate.doing = DEVICE_STOPPED
            try:
                self.driver.stop()
            except Exception:
                log.exception("%s: the driver's stop failed too", gate.plan.name)

    cdef int _tell(self, str words) except -1:
        """What is wrong now, into the state; cut off where it is longer than there is room for."""
        cdef bytes text = words.encode()[:WORDS]
        self.gate.state.faulty = True
        memset(self.gate.state.words, 0, WORDS)
        memcpy(self.gate.state.words, <const char *>text, len(text))
        return 0

    cdef int _measure(self, int64_t now_ns) except -1:
        cdef Py_ssize_t i
        cdef DeviceGate gate = self.gate
        cdef StateRecord *state = &gate.state
        try:
            found = self.driver.state()
            position, velocity, effort, target = found.position, found.velocity, found.effort, found.target
            for i in range(gate.axes):
                state.q[i] = position[i]
                state.dq[i] = NAN if velocity is None else velocity[i]
                state.effort[i] = NAN if effort is None else effort[i]
                state.target[i] = NAN if target is None else target[i]
            self.captured_ns = gate.answered_ns = found.captured_ns
            fault = found.fault
            state.faulty = False
        except Exception as error:
            # The stamp stays that of the last good state, so that what is published grows old.
            self._give_up("state", error)
        else:
            if fault:
                self._tell(fault)
                if not gate.faults & 1 << FAULT_ARM:
                    gate.faults |= 1 << FAULT_ARM
                    if gate.doing == DEVICE_FOLLOWING:
                        gate._brake(0)
        state.doing = gate.doing
        state.faults = gate.faults
        c_publish(&self.state_slot.cells, state, now_ns, self.captured_ns)
        c_publish(&self.history_ring.cells, state, now_ns, self.captured_ns)
        return 0


cdef Histogram copied(const Counts *counts):
    cdef Histogram histogram = Histogram()
    histogram.counts = counts[0]
    return histogram
