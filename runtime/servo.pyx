"""The servo: one loop per rig, without the GIL, from chunks to limited commands at native rate.

A tick, in this order:

    gate         time, mode, lease, emergency stop, the arms' states: every reason not to move
    chunk        the newest chunk from the mailbox into the fused trajectory
    tau          trajectory time towards the wanted rate: 0 for any reason, the operator's speed else
    fuse         the fused action at tau, or the first target during an approach
    kinematics   action -> axis targets, one arm after the other; or the axes of a pose of the plan, home or park
    track        jerk-limited
    limit        the last word; or every axis brakes by itself
    command      one slot per arm
    state        the arms' state slots
    report       committed prefix, status, telemetry

No reason ever means "no command": tau ramps to 0 along the path, then the last command is repeated. All arms share one
tau, so what stops one stops all. Reasons in LATCHING outlast their cause: only an arming ends them, and the motion
after an arming is an approach: tau stands while the arms go to the newest chunk's first due action at a share of their
limits. To a pose they go in the same way, and what comes after it is an approach again.

`c_tick` computes from what it is given and from shared memory; it reads the clock to account for its own cost only, so
that a test can tick through hours of virtual time in seconds. It allocates nothing and touches no Python object.
"""

from libc.math cimport NAN
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

import numpy as np

from chatvla_edge.runtime.arm_servo cimport NOT_STANDING, ArmServo
from chatvla_edge.runtime.chunk_inbox cimport NOTHING_TAKEN
from chatvla_edge.runtime.chunks cimport ACCEPTED
from chatvla_edge.runtime.fusion cimport SAMPLE_STARVED, SAMPLE_UNANCHORED
from chatvla_edge.runtime.histogram cimport Counts, Histogram, c_record
from chatvla_edge.runtime.limits cimport FOLLOWING, NONFINITE
from chatvla_edge.runtime.pages cimport c_lease_valid, c_stop_raised
from chatvla_edge.runtime.realtime cimport c_now_ns, c_sleep_until_ns
from chatvla_edge.runtime.servo_records cimport (
    BECAUSE_APPROACH, BECAUSE_ARM_FAULT, BECAUSE_BRAKE, BECAUSE_CHUNK_STALE, BECAUSE_DAMAGED_MODE, BECAUSE_ESTOP,
    BECAUSE_HOLD, BECAUSE_HOME, BECAUSE_LIMITS, BECAUSE_NO_LEASE, BECAUSE_PARK, BECAUSE_REST, BECAUSE_STALLED,
    BECAUSE_START_REFUSED, BECAUSE_STARVED, BECAUSE_STATE_STALE, BECAUSE_STOP, BECAUSE_UNARMED, BECAUSE_UNREACHABLE,
    GIVEN_ESTOP, GIVEN_LEASE, GIVEN_QUIT,
    SERVO_APPROACHING, SERVO_BRAKING, SERVO_IDLE, SERVO_STANDING, SERVO_STOPPING, SERVO_TRACKING, StatusRecord,
    WANT_BRAKE, WANT_HOLD, WANT_HOME, WANT_PARK, WANT_REST, WANT_STOP, WANT_TRACK,
)
from chatvla_edge.runtime.servo_reports cimport (
    STEP_CHUNK, STEP_COMMAND, STEP_FUSE, STEP_GATE, STEP_KINEMATICS, STEP_LIMIT, STEP_REPORT, STEP_STATE, STEP_TAU,
    STEP_TRACK,
)
from chatvla_edge.runtime.slots cimport CELL_NEW, Stamp, c_read_latest, load_relaxed, store_relaxed

from chatvla_edge.runtime.arm_servo import ArmServo as make_arm
from chatvla_edge.runtime.chunk_inbox import ChunkInbox as make_inbox
from chatvla_edge.runtime.fusion import Fusion as make_fusion
from chatvla_edge.runtime.knots import ActionLayout
from chatvla_edge.runtime.mailbox import ChunkMailbox
from chatvla_edge.runtime.servo_records import COMMAND, MODE, STATE, STATUS
from chatvla_edge.runtime.servo_reports import ServoReports as make_reports
from chatvla_edge.runtime.tau import TauClock as make_clock

# As LATCHING in servo_records.pyx, and those of them for which the path is left: every axis brakes by itself.
cdef uint64_t LATCHING_BITS = (
    1 << BECAUSE_STOP | 1 << BECAUSE_BRAKE | 1 << BECAUSE_NO_LEASE | 1 << BECAUSE_ESTOP | 1 << BECAUSE_STATE_STALE
    | 1 << BECAUSE_ARM_FAULT | 1 << BECAUSE_LIMITS | 1 << BECAUSE_STALLED
)
cdef uint64_t BRAKING_BITS = 1 << BECAUSE_BRAKE | 1 << BECAUSE_ESTOP | 1 << BECAUSE_LIMITS | 1 << BECAUSE_STALLED
cdef uint64_t POSE_BITS = 1 << BECAUSE_HOME | 1 << BECAUSE_PARK
# A pose needs no chunk, and what is new in the path meanwhile is found by an approach.
cdef uint64_t HOLDING_BITS = 1 << BECAUSE_HOLD | POSE_BITS
cdef uint64_t OF_CHUNKS_BITS = 1 << BECAUSE_STARVED | 1 << BECAUSE_CHUNK_STALE


cdef class Servo:
    """A rig's servo. ``plan``: a `ServoPlan`; ``wires``: a `ServoWires` of segments of matching shape.

    Raises ValueError for a plan or segments that do not fit, BlockingIOError where another servo writes already.
    """

    def __init__(self, plan, wires):
        cdef int i
        cdef size_t H = plan.horizon
        cdef size_t A = len(plan.components)
        if len(wires.arms) != len(plan.arms):
            raise ValueError(f"wires for {len(wires.arms)} arms; the plan has {len(plan.arms)}")
        self.plan = plan
        self.actions = <int>A
        self.axes = plan.axes
        self.period_ns = plan.period_ns
        self.period = 1e-9 * self.period_ns
        self.gap_ns = round(1e9 * plan.gap)
        self.chunk_budget_ns = round(1e9 * plan.chunk_budget)
        self.rest_ticks = round(plan.rest * plan.rate)
        self.approach_speed = plan.approach_speed

        self.lease = Lease.attach(wires.lease)
        self.estop = EmergencyStop.attach(wires.estop)
        self.mode_slot = Slot.attach(wires.mode, MODE.itemsize)
        self.lease_page = self.lease.page
        self.stop_page = self.estop.page
        self.mode_cells = self.mode_slot.cells
        self.inbox = make_inbox(ChunkMailbox.attach(wires.chunks, H, A), plan.fusion.mode == "sync")
        self.reports = make_reports(plan, wires)
        self.arms = [
            make_arm(
                arm, Slot.attach(command, COMMAND.itemsize, write=True), Slot.attach(state, STATE.itemsize),
                period_ns=self.period_ns, action_dim=A, margin=plan.margin, gap_ns=self.gap_ns,
            )
            for arm, (command, state) in zip(plan.arms, wires.arms, strict=True)
        ]
        self.arm_count = len(self.arms)
        for i in range(self.arm_count):
            self.arm[i] = <void *>self.arms[i]
        fusion = plan.fusion
        self.fusion = make_fusion(
            ActionLayout(plan.components, plan.gripper_range), H, mode=fusion.mode, cubic=fusion.cubic,
            fade=fusion.fade, gripper_fade=fusion.gripper_fade, ensemble_decay=fusion.ensemble_decay,
            capacity=fusion.capacity, sync_actions=fusion.sync_actions, prefix_schedule=fusion.prefix_schedule,
        )
        self.clock = make_clock(
            max_acceleration=plan.tau_acceleration, longest_tick=2 * self.period,
            **({} if plan.tau_jerk is None else {"max_jerk": plan.tau_jerk}),
        )

        self.fused = self.reports.fused
        self.fused_rate = <double *>calloc(A, sizeof(double))
        if self.fused_rate is NULL:
            raise MemoryError
        memset(&self.status, 0, sizeof(StatusRecord))
        self.standing = True
        self.approach = True
        for i in range(self.arm_count):
            (<ArmServo>self.arm[i]).read_state()

    def __dealloc__(self):
        free(self.fused_rate)

    # ---------------------------------------------------------------------------------------------------- the tick

    cdef void c_tick(self, int64_t tick_ns, int64_t now_ns) noexcept nogil:
        """One tick for the deadline ``tick_ns`` at host time ``now_ns``; ``tick_ns`` grows by whole periods."""
        cdef int64_t begun = c_now_ns(), mark = begun
        cdef uint64_t reasons
        cdef double wanted_rate
        cdef int i, clipped = 0
        self.status.tick += 1

        reasons = self._gate(tick_ns, now_ns)
        mark = self.reports.account(STEP_GATE, mark)

        reasons |= self._take_chunk(now_ns)
        mark = self.reports.account(STEP_CHUNK, mark)

        if self.moving:
            wanted_rate = self._wanted_rate(reasons)
            self.clock.c_advance(self.period, wanted_rate, self.fusion.c_path_end())
            mark = self.reports.account(STEP_TAU, mark)

            reasons |= self._fuse()
            mark = self.reports.account(STEP_FUSE, mark)

            if self.posing:
                self._head(reasons)
            else:
                for i in range(self.arm_count):
                    if not (<ArmServo>self.arm[i]).aim(self.fused):
                        reasons |= 1 << BECAUSE_UNREACHABLE
            if reasons & 1 << BECAUSE_UNREACHABLE:
                self.status.unreachable_ticks += 1
            mark = self.reports.account(STEP_KINEMATICS, mark)

            for i in range(self.arm_count):
                (<ArmServo>self.arm[i]).track()
            mark = self.reports.account(STEP_TRACK, mark)

            clipped = self._limit(tick_ns)
            mark = self.reports.account(STEP_LIMIT, mark)
        else:
            wanted_rate = 0

        for i in range(self.arm_count):
            (<ArmServo>self.arm[i]).publish(self.status.tick, self.moving, self.status.arming, tick_ns, now_ns)
        mark = self.reports.account(STEP_COMMAND, mark)

        for i in range(self.arm_count):
            (<ArmServo>self.arm[i]).read_state()
        mark = self.reports.account(STEP_STATE, mark)

        self._report(tick_ns, now_ns, reasons, wanted_rate, clipped)
        mark = self.reports.account(STEP_REPORT, mark)
        c_record(&self.reports.cost, mark - begun)
        self.reports.row.cost_ns = mark - begun
        self.last_tick_ns = tick_ns

    cdef uint64_t _gate(self, int64_t tick_ns, int64_t now_ns) noexcept nogil:
        """Every reason not to move that is known before the chunks; arms the robot where the mode asks for it."""
        cdef uint64_t bits = 0, given = 1 << GIVEN_LEASE
        cdef uint64_t wanted, arming = self.status.arming
        cdef bint asked
        cdef Stamp stamp
        cdef int i
        if c_read_latest(&self.mode_cells, self.mode_seen, &self.mode_scratch, &stamp) == CELL_NEW:
            self.mode = self.mode_scratch
            self.mode_seen = stamp.sequence
        wanted = self.mode.wanted
        if load_relaxed(&self.quitting):
            given |= 1 << GIVEN_QUIT
        if self.mode_seen == 0 or given & 1 << GIVEN_QUIT:
            wanted = WANT_REST
        elif wanted > WANT_PARK or not 0 < self.mode.speed <= 1:
            wanted = WANT_STOP
            bits |= 1 << BECAUSE_DAMAGED_MODE
        asked = self.mode.arming > arming and (
            wanted == WANT_HOLD or wanted == WANT_TRACK or wanted == WANT_HOME or wanted == WANT_PARK
        )
        if asked:
            arming = self.mode.arming

        if not c_lease_valid(&self.lease_page, now_ns):
            bits |= 1 << BECAUSE_NO_LEASE
            given = given & ~(1 << GIVEN_LEASE)
        if c_stop_raised(&self.stop_page):
            bits |= 1 << BECAUSE_ESTOP
            given |= 1 << GIVEN_ESTOP
        self.reports.row.given = given
        for i in range(self.arm_count):
            bits |= (<ArmServo>self.arm[i]).condition(now_ns, arming)
        if asked and not bits & LATCHING_BITS:
            bits |= self._arm(tick_ns)
        elif self.moving and tick_ns - self.last_tick_ns > self.gap_ns:
            bits |= 1 << BECAUSE_STALLED

        if wanted == WANT_REST:
            bits |= 1 << BECAUSE_REST
            if self.moving and self.standing and self.clock.state.rate == 0:
                self.moving = False
        elif wanted == WANT_HOLD:
            bits |= 1 << BECAUSE_HOLD
        elif wanted == WANT_STOP:
            bits |= 1 << BECAUSE_STOP
        elif wanted == WANT_BRAKE:
            bits |= 1 << BECAUSE_BRAKE
        elif wanted == WANT_HOME:
            bits |= 1 << BECAUSE_HOME
        elif wanted == WANT_PARK:
            bits |= 1 << BECAUSE_PARK
        if not self.moving:
            bits |= 1 << BECAUSE_UNARMED
        else:
            bits |= self.status.latched & LATCHING_BITS
            if self.mode.epoch > self.status.epoch and self.fusion.c_set_epoch(self.mode.epoch) == 0:
                self.status.epoch = self.mode.epoch
                self.inbox.has_chunk = False
        self.braking = (bits & BRAKING_BITS) != 0
        if self.braking:
            # The path is left; only an arming finds it again, and that begins at rest.
            self.clock.state.rate = 0
            self.clock.state.acceleration = 0
        self.status.wanted = wanted
        self.status.mode = self.mode_seen
        return bits

    cdef uint64_t _arm(self, int64_t tick_ns) noexcept nogil:
        """Begin anew at rest where the arms are. 0, or why not."""
        cdef int i
        # Beginning at rest in the middle of a motion would be a step: first stop.
        if not self.standing or self.clock.state.rate != 0:
            return 1 << BECAUSE_UNARMED
        for i in range(self.arm_count):
            if not (<ArmServo>self.arm[i]).start(tick_ns - self.period_ns):
                self.moving = False
                return 1 << BECAUSE_START_REFUSED
        for i in range(self.arm_count):
            (<ArmServo>self.arm[i]).locate(self.fused)
            (<ArmServo>self.arm[i]).slow(self.approach_speed)
        if self.fusion.c_reset(self.mode.epoch, self.clock.state.tau, self.fused):
            self.moving = False
            return 1 << BECAUSE_START_REFUSED
        self.moving = True
        self.approach = True
        self.inbox.has_chunk = False
        self.stood = 0
        self.answered_ns = tick_ns
        self.status.arming = self.mode.arming
        self.status.epoch = self.mode.epoch
        self.status.latched = 0
        self.status.clipped_kinds = 0
        return 0

    cdef uint64_t _take_chunk(self, int64_t now_ns) noexcept nogil:
        """The newest chunk into the fused trajectory; what its age or absence means."""
        cdef int verdict = self.inbox.take(self.fusion, now_ns)
        if verdict != NOTHING_TAKEN:
            self.status.last_verdict = <uint64_t>verdict
            if verdict == ACCEPTED:
                self.status.chunks_taken += 1
            else:
                self.status.chunks_refused += 1
            if verdict == ACCEPTED or not self.moving:  # unarmed there is no path yet that could take one
                self.answered_ns = now_ns
        if not self.inbox.has_chunk:
            return 1 << BECAUSE_STARVED
        if now_ns - self.inbox.observed_ns > self.chunk_budget_ns:
            return 1 << BECAUSE_CHUNK_STALE
        if self.approach and not self.inbox.ahead(self.fusion, self.clock.state.tau):
            return 1 << BECAUSE_STARVED
        return 0

    cdef double _wanted_rate(self, uint64_t reasons) noexcept nogil:
        """The rate that tau shall have, and whether this tick belongs to an approach."""
        cdef bint ready
        cdef double rate = 0 if reasons else self.mode.speed
        self.stood = self.stood + 1 if self.clock.state.rate == 0 else 0
        if not self.approach and self.stood and self.standing and (
            reasons & HOLDING_BITS or self.stood > self.rest_ticks
        ):
            self.approach = True
            rate = 0  # from the next tick on, whose reasons know that it is one
        # From the second tick on: the first command of an arming is where the arm is.
        ready = self.approach and self.stood > 1
        self.approaching = ready and rate > 0
        self.posing = ready and reasons & POSE_BITS and not reasons & ~(POSE_BITS | OF_CHUNKS_BITS)
        return 0 if self.approach else rate

    cdef uint64_t _fuse(self) noexcept nogil:
        """The action wanted now, into `fused`."""
        cdef int flags, i
        for i in range(self.arm_count):
            (<ArmServo>self.arm[i]).slow(self.approach_speed if self.approach else 1.0)
        if self.approaching:
            memcpy(self.fused, self.inbox.due(self.clock.state.tau, True), self.actions * sizeof(double))
            return 1 << BECAUSE_APPROACH
        if self.approach:
            # Nothing to go to, or a reason not to: there is no path to stop along, so the axes brake and stay.
            for i in range(self.arm_count):
                (<ArmServo>self.arm[i]).locate(self.fused)
            return 0
        flags = self.fusion.c_sample(self.clock.state.tau, self.fused, self.fused_rate)
        if flags & SAMPLE_UNANCHORED:
            return 1 << BECAUSE_LIMITS
        return 1 << BECAUSE_STARVED if flags & SAMPLE_STARVED else 0

    cdef void _head(self, uint64_t reasons) noexcept nogil:
        """Axis targets of the pose that is wanted."""
        cdef int i
        self.there = True
        for i in range(self.arm_count):
            if not (<ArmServo>self.arm[i]).head((reasons & 1 << BECAUSE_PARK) != 0):
                self.there = False

    cdef int _limit(self, int64_t tick_ns) noexcept nogil:
        """Tracked to limited for all arms, or all brake. Bits of limits.KINDS."""
        cdef int i, one, clipped = 0
        self.standing = True
        for i in range(self.arm_count):
            if self.braking or (self.approach and not self.approaching and not self.posing):
                one = (<ArmServo>self.arm[i]).brake(tick_ns)
            else:
                one = (<ArmServo>self.arm[i]).limit(tick_ns)
            if one & NOT_STANDING:
                self.standing = False
            clipped |= one & (NOT_STANDING - 1)
        if clipped:
            self.status.clipped_ticks += 1
            self.status.clipped_kinds |= <uint64_t>clipped
            if clipped & 1 << NONFINITE:
                self.status.nonfinite_ticks += 1
            # The limiter brakes that arm already; with the next tick all do.
            if clipped & (1 << NONFINITE | 1 << FOLLOWING):
                self.status.latched |= 1 << BECAUSE_LIMITS
        if self.approaching:
            self._finish_approach()
        return clipped

    cdef void _finish_approach(self) noexcept nogil:
        """Let tau run from here once every arm is at the first target, or as near as the limits let it come."""
        cdef int i
        if not self.standing:
            for i in range(self.arm_count):
                if not (<ArmServo>self.arm[i]).arrived():
                    return
        # The path begins anew at the first target, with the newest chunk ahead of it.
        self.fusion.c_reset(self.status.epoch, self.clock.state.tau, self.fused)
        self.fusion.c_push(&self.inbox.header, self.inbox.rows)
        self.approach = False
        self.stood = 0

    cdef uint64_t _doing(self, double wanted_rate) noexcept nogil:
        if not self.moving:
            return SERVO_IDLE
        if self.braking and not self.standing:
            return SERVO_BRAKING
        if self.approaching or (self.posing and not (self.there and self.standing)):
            return SERVO_APPROACHING
        if self.clock.state.rate > 0 and wanted_rate > 0:
            return SERVO_TRACKING
        if self.clock.state.rate > 0 or not self.standing:
            return SERVO_STOPPING
        return SERVO_STANDING

    cdef void _report(
        self, int64_t tick_ns, int64_t now_ns, uint64_t reasons, double wanted_rate, int clipped
    ) noexcept nogil:
        """Status, telemetry and committed prefix of this tick."""
        cdef StatusRecord *status = &self.status
        cdef double *arms = self.reports.tracked
        cdef double left
        cdef Py_ssize_t i, at = 0
        status.tick_ns = tick_ns
        status.doing = self._doing(wanted_rate)
        status.standing = self.standing and self.clock.state.rate == 0
        status.posed = status.wanted if self.moving and self.posing and self.there and self.standing else 0
        status.reasons = reasons
        if self.moving:
            status.latched |= reasons
        status.tau = self.clock.state.tau
        status.tau_rate = self.clock.state.rate
        status.speed = self.mode.speed
        left = self.fusion.c_path_end() - status.tau
        status.path_left = left if left > 0 else 0
        if self.inbox.sync and self.moving and self.inbox.has_chunk and left > 0:
            self.answered_ns = now_ns
            status.owed_ns = -1
        else:
            status.owed_ns = self.answered_ns
        status.chunk = self.fusion.c_sequence()
        status.chunk_age_ns = now_ns - self.inbox.observed_ns if self.inbox.has_chunk else -1
        for i in range(self.arm_count):
            status.state_age_ns[i] = (<ArmServo>self.arm[i]).age_ns(now_ns)
            status.arm_faults[i] = (<ArmServo>self.arm[i]).faults()
            self.reports.row.states[i] = (<ArmServo>self.arm[i]).state_number()
            at += (<ArmServo>self.arm[i]).report(
                arms + at, arms + self.axes + at, arms + 2 * self.axes + at, arms + 3 * self.axes + at
            )
        self.reports.publish_prefix(self.fusion, status, self.inbox.delay, now_ns)
        self.reports.publish_status(status, now_ns)
        if self.inbox.has_chunk:
            memcpy(self.reports.raw, self.inbox.due(status.tau, False), self.actions * sizeof(double))
        else:
            for i in range(self.actions):
                self.reports.raw[i] = NAN
        self.reports.row.mode = self.mode_seen
        self.reports.row.wish = self.mode
        self.reports.row.looked_at = self.inbox.seen
        self.reports.publish_telemetry(status, clipped, now_ns)

    # ---------------------------------------------------------------------------------------------------- the loop

    cdef void c_run(self, int64_t first_ns, uint64_t ticks) noexcept nogil:
        """Tick at absolute deadlines from ``first_ns`` on, until ``ticks`` are done or `quit` has brought it to rest.

        A deadline that passed while the loop could not run is skipped and counted: late ticks one after the other
        would move the arms faster than time passes.
        """
        cdef int64_t deadline = first_ns
        cdef int64_t now, skipped
        while ticks > 0 and not (load_relaxed(&self.quitting) and not self.moving):
            c_sleep_until_ns(deadline)
            now = c_now_ns()
            c_record(&self.reports.lateness, now - deadline)
            skipped = (now - deadline) // self.period_ns
            if skipped > 0:
                self.status.overruns += <uint64_t>skipped
                deadline += skipped * self.period_ns
            self.c_tick(deadline, now)
            deadline += self.period_ns
            ticks -= 1

    # --------------------------------------------------------------------------- what processes, tests and plots use

    def run(self, ticks=None):
        """Run the loop on this thread, without the GIL, until `quit` or ``ticks`` ticks."""
        cdef uint64_t most = <uint64_t>-1 if ticks is None else ticks
        cdef int64_t first = c_now_ns() + self.period_ns
        with nogil:
            self.c_run(first, most)

    def tick(self, int64_t tick_ns, now_ns=None):
        """One tick for the deadline ``tick_ns`` at host time ``now_ns`` (the deadline unless given)."""
        cdef int64_t now = tick_ns if now_ns is None else now_ns
        with nogil:
            self.c_tick(tick_ns, now)

    def quit(self):
        """Let `run` return once the arms have come to rest along their path; from any thread."""
        store_relaxed(&self.quitting, 1)

    def read_status(self):
        """The status as of the last tick, one record of `servo_records.STATUS`."""
        copy = np.zeros((), STATUS)
        cdef unsigned char[::1] view = np.atleast_1d(copy).view(np.uint8)
        memcpy(&view[0], &self.status, sizeof(StatusRecord))
        return copy

    def histograms(self):
        """Copies: ``lateness``, ``cost``, ``chunk_age``, and one for each of STEP_NAMES, in ns."""
        age = Histogram()
        (<Histogram>age).counts = self.inbox.age
        return {**self.reports.histograms(), "chunk_age": age}

    def clear_histograms(self):
        """Forget what was counted so far: benchmarks leave their first ticks out."""
        self.reports.clear()
        memset(&self.inbox.age, 0, sizeof(Counts))
