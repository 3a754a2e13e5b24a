"""One arm inside the servo's tick. The servo decides when; this knows how an action becomes this arm's command.

    action --aim--> targets --track--> tracked --limit--> limited --publish--> command slot

The order of the calls is the servo's (`servo.pyx`). Everything is allocated at construction.
"""

from libc.math cimport NAN, isfinite
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

import numpy as np

from chatvla_edge.runtime.rotations cimport decode_rotation, encode_rotation
from chatvla_edge.runtime.servo_records cimport (
    BECAUSE_ARM_FAULT, BECAUSE_STATE_STALE, DEVICE_BRAKING, DEVICE_FOLLOWING, DEVICE_HOLDING, CommandRecord,
    StateRecord,
)
from chatvla_edge.runtime.slots cimport CELL_NEW, c_publish, c_read_latest

from chatvla_edge.runtime.limits import Limiter as make_limiter
from chatvla_edge.runtime.rotations import CODEC_SIZES, codec_number

# Near enough to the first target (rad, m) to let tau run: a null-space posture may creep for longer than anybody waits.
cdef double ARRIVED = 1e-3
# Likewise for a pose, of arms that stand: a stop ends short of a limit by what is made good in one period.
cdef double POSED = 5e-3


cdef class ArmServo:
    """``plan``: an `ArmPlan`; ``command_slot`` attached for writing, ``state_slot`` for reading.

    Raises ValueError for limits or an action mapping that make no sense.
    """

    def __init__(self, plan, Slot command_slot not None, Slot state_slot not None, *, int64_t period_ns,
                 int action_dim, double margin, int64_t gap_ns):
        cdef int i
        limits = plan.limits
        model = plan.model()
        guarded = limits.box is not None or len(limits.spheres) > 0
        chain = {}
        if guarded:
            tool = model.tool if plan.pose is None or plan.pose.flange_to_tool is None else plan.pose.flange_to_tool
            chain = {"origins": model.origins, "axes": model.axes, "tip": tool[9:]}
        self.plan = plan
        self.axes = len(limits.lower)
        self.limiter = make_limiter(
            limits.lower, limits.upper, limits.velocity, limits.acceleration, limits.jerk, period_ns,
            step=limits.step, lag=limits.lag, gap_ns=gap_ns, curve=limits.curve, box=limits.box,
            spheres=limits.spheres, **chain,
        )
        self.tracker = Tracker(
            limits.lower, limits.upper, *(
                margin * np.array(bound) for bound in (limits.velocity, limits.acceleration, limits.jerk)
            ), period_ns,
        )
        self.command_slot = command_slot
        self.state_slot = state_slot
        self.command_cells = command_slot.cells
        self.state_cells = state_slot.cells
        self.budget_ns = round(1e9 * plan.state_budget)
        self.has_state = False
        memset(&self.command, 0, sizeof(CommandRecord))
        memset(&self.state, 0, sizeof(StateRecord))
        self.command.axes = self.axes

        self.chain = 0
        if plan.pose is not None:
            if model is None:
                raise ValueError(f"arm {plan.name}: a pose needs the arm's chain")
            self.kinematics = Kinematics(model, flange_to_tool=plan.pose.flange_to_tool)
            self.chain = len(model.joints)
            self.pose_at = plan.pose.component
            self.codec = codec_number(plan.pose.codec)
            if not 0 <= self.pose_at <= action_dim - 3 - CODEC_SIZES[self.codec]:
                raise ValueError(f"arm {plan.name}: the pose from component {self.pose_at} leaves the action")
        for i in range(self.axes):
            self.home[i] = NAN if plan.home is None else plan.home[i]
            self.park[i] = NAN if plan.park is None else plan.park[i]
        self.directs = len(plan.direct)
        for i, axis in enumerate(plan.direct):
            self.direct_axis[i] = axis.axis
            self.direct_component[i] = axis.component
            self.direct_scale[i] = axis.scale
            self.direct_offset[i] = axis.offset

    cdef void read_state(self) noexcept nogil:
        # Into scratch, so that a copy which failed (a writer racing round all cells) leaves the last good state.
        cdef Stamp stamp
        cdef uint64_t seen = self.stamp.sequence if self.has_state else 0
        if c_read_latest(&self.state_cells, seen, &self.scratch, &stamp) == CELL_NEW:
            self.state = self.scratch
            self.stamp = stamp
            self.has_state = True

    cdef int64_t age_ns(self, int64_t now_ns) noexcept nogil:
        return now_ns - self.stamp.captured_ns if self.has_state else -1

    cdef uint64_t state_number(self) noexcept nogil:
        return self.stamp.sequence if self.has_state else 0

    cdef uint64_t faults(self) noexcept nogil:
        return self.state.faults if self.has_state else 0

    cdef uint64_t condition(self, int64_t now_ns, uint64_t arming) noexcept nogil:
        cdef uint64_t bits = 0
        cdef bint known = self.has_state and self.state.axes == <uint64_t>self.axes
        if not known or now_ns - self.stamp.captured_ns > self.budget_ns:
            bits |= 1 << BECAUSE_STATE_STALE
        # A fault of an earlier arming has been answered by the operator's arming since, unless it is still there.
        if self.has_state and (self.state.faulty or (self.state.faults and self.state.arming == arming)):
            bits |= 1 << BECAUSE_ARM_FAULT
        return bits

    cdef bint start(self, int64_t tick_ns) noexcept nogil:
        """The place to go on from is what the arm was told last, if it still heads there, else where it is.

        A vendor's controller refuses (Franka) or jumps (a position loop under gravity) where the first command is not
        the one that it holds.
        """
        cdef Py_ssize_t i
        cdef bint held = (
            self.state.doing == DEVICE_FOLLOWING or self.state.doing == DEVICE_BRAKING
            or self.state.doing == DEVICE_HOLDING
        )
        for i in range(self.axes):
            self.limiter.wanted[i] = self.state.sent[i] if held and isfinite(self.state.sent[i]) else self.state.q[i]
        if self.limiter.start(tick_ns):
            return False
        for i in range(self.axes):
            self.tracker.target[i] = self.limiter.command[i]
            self.solved[i] = self.limiter.command[i]
        self.tracker.rest()
        return True

    cdef void locate(self, double *action) noexcept nogil:
        cdef int i
        cdef double pose[12]
        cdef double angles[MOST_AXES]
        if self.chain:
            for i in range(self.chain):
                angles[i] = self.limiter.command[i]
            self.kinematics.forward(angles, pose)
            for i in range(3):
                action[self.pose_at + i] = pose[9 + i]
            encode_rotation(self.codec, pose, action + self.pose_at + 3)
        for i in range(self.directs):
            action[self.direct_component[i]] = (
                self.limiter.command[self.direct_axis[i]] - self.direct_offset[i]
            ) / self.direct_scale[i]

    cdef bint aim(self, const double *action) noexcept nogil:
        cdef int i
        cdef bint reached = True
        cdef double pose[12]
        if self.chain:
            for i in range(3):
                pose[9 + i] = action[self.pose_at + i]
            if decode_rotation(self.codec, action + self.pose_at + 3, pose) == 0:
                reached = self.kinematics.solve(pose, self.solved)
            else:
                reached = False  # the last target stands
            for i in range(self.chain):
                self.tracker.target[i] = self.solved[i]
        for i in range(self.directs):
            self.tracker.target[self.direct_axis[i]] = (
                self.direct_scale[i] * action[self.direct_component[i]] + self.direct_offset[i]
            )
        return reached

    cdef bint head(self, bint parked) noexcept nogil:
        cdef Py_ssize_t i
        cdef double wanted
        cdef bint there = True
        for i in range(self.axes):
            wanted = self.park[i] if parked else self.home[i]
            # Where the plan has no such pose, the arm stays where it is.
            self.tracker.target[i] = wanted if isfinite(wanted) else self.limiter.command[i]
            self.solved[i] = self.limiter.command[i]  # the next search for joint angles begins here
            there = there and -POSED <= self.limiter.command[i] - self.tracker.target[i] <= POSED
        return there

    cdef void slow(self, double scale) noexcept nogil:
        self.tracker.slow(scale)

    cdef void track(self) noexcept nogil:
        self.tracker.step()

    cdef bint arrived(self) noexcept nogil:
        cdef Py_ssize_t i
        cdef double away
        for i in range(self.axes):
            away = self.tracker.position[i] - self.tracker.target[i]
            if not -ARRIVED <= away <= ARRIVED:
                return False
        return True

    cdef int limit(self, int64_t tick_ns) noexcept nogil:
        cdef Py_ssize_t i
        cdef int clipped
        for i in range(self.axes):
            self.limiter.wanted[i] = self.tracker.position[i]
            self.limiter.measured[i] = self.state.q[i] if self.has_state else NAN
        clipped = self.limiter.tick(tick_ns)
        if clipped:
            self.tracker.adopt(self.limiter)
        return clipped if self.limiter.standing() else clipped | NOT_STANDING

    cdef int brake(self, int64_t tick_ns) noexcept nogil:
        cdef int clipped = self.limiter.brake(tick_ns)
        self.tracker.adopt(self.limiter)
        return clipped if self.limiter.standing() else clipped | NOT_STANDING

    cdef void publish(
        self, uint64_t tick, bint moving, uint64_t arming, int64_t tick_ns, int64_t now_ns
    ) noexcept nogil:
        cdef Py_ssize_t i
        self.command.tick = tick
        self.command.moving = moving
        self.command.arming = arming
        self.command.due_ns = tick_ns
        for i in range(self.axes):
            self.command.q[i] = self.limiter.command[i]
            self.command.dq[i] = self.limiter.speed[i]
            self.command.ddq[i] = self.limiter.acceleration[i]
        c_publish(&self.command_cells, &self.command, now_ns, tick_ns)

    cdef Py_ssize_t report(self, double *tracked, double *limited, double *sent, double *measured) noexcept nogil:
        cdef Py_ssize_t i
        for i in range(self.axes):
            tracked[i] = self.tracker.position[i]
            limited[i] = self.limiter.command[i]
            sent[i] = self.state.sent[i] if self.has_state else NAN
            measured[i] = self.state.q[i] if self.has_state else NAN
        return self.axes
