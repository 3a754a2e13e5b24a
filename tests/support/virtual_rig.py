"""A rig in one process and in virtual time: a servo that is ticked by hand, arms that lag, an operator and a policy.

Nothing here sleeps. A tick is one call, so a scenario of minutes runs in a moment and the same way each time.
"""

from dataclasses import replace

import numpy as np

from chatvla_edge.runtime.mailbox import ChunkMailbox
from chatvla_edge.runtime.pages import Lease
from chatvla_edge.runtime.rig_segments import RigSegments
from chatvla_edge.runtime.servo import Servo
from chatvla_edge.runtime.servo_plan import ArmPlan, AxisLimits, DirectAxis, FusionPlan, ServoPlan
from chatvla_edge.runtime.servo_records import (
    COMMAND,
    DEVICE_DOING,
    MODE,
    REASONS,
    SERVO_DOING,
    STATE,
    WANTED,
    names,
    telemetry,
)
from chatvla_edge.runtime.slots import Slot
from support import limit_oracle

START_NS = 1_000_000_000  # a second after boot: always in the past, so a lease until then is one that may be granted
LEASE_NS = 100_000_000


def joint_plan(arms=1, axes=3, rate=500.0, mode="blend", **changes):
    """A plan of ``arms`` arms whose action components are their joints, in order."""
    limits = AxisLimits(
        lower=(-2.0,) * axes,
        upper=(2.0,) * axes,
        velocity=(2.0,) * axes,
        acceleration=(15.0,) * axes,
        jerk=(500.0,) * axes,
    )
    plan = ServoPlan(
        rate=rate,
        components=("joint",) * (arms * axes),
        horizon=50,
        arms=tuple(
            ArmPlan(
                name=f"arm{arm}",
                limits=limits,
                direct=tuple(DirectAxis(axis=i, component=arm * axes + i) for i in range(axes)),
            )
            for arm in range(arms)
        ),
        fusion=FusionPlan(mode=mode),
    )
    return replace(plan, **changes)


class VirtualRig:
    """``plan`` with arms that start at ``start`` [axes of all arms] and follow their commands at once, or as told."""

    def __init__(self, plan, start=None):
        self.plan = plan
        self.segments = RigSegments.create(plan, telemetry_rows=200_000)
        wires = self.segments.servo_wires
        self.lease = Lease.attach(wires.lease, write=True)
        self.mode_slot = Slot.attach(wires.mode, MODE.itemsize, write=True)
        self.policy = ChunkMailbox.attach(wires.chunks, plan.horizon, len(plan.components), write=True)
        self.state_slots = [Slot.attach(state, STATE.itemsize, write=True) for _, state in wires.arms]
        self.rows = self.segments.telemetry.reader()
        self.now = START_NS
        self.period = plan.period_ns
        self.mode = np.zeros((), MODE)
        self.mode["speed"] = 1.0
        self.granting = True
        self.silent = set()  # arms that publish no state
        self.states = [np.zeros((), STATE) for _ in plan.arms]
        self.pace = 1.0  # share of the way to its command that an arm makes in a tick
        at = 0
        for arm, state in zip(plan.arms, self.states, strict=True):
            state["axes"] = arm.axes
            for field in ("q", "dq", "effort", "sent"):
                state[field] = np.nan
            state["q"][: arm.axes] = 0.0 if start is None else start[at : at + arm.axes]
            at += arm.axes
        self.commands = [[] for _ in plan.arms]
        self.sent_at = [[] for _ in plan.arms]
        self.statuses = []
        self.publish_states()
        self.servo = Servo(plan, wires)

    # ------------------------------------------------------------------------------------------------ the supervisor

    def want(self, wanted, *, speed=None, arm=False, epoch=None):
        """Publish what is wanted; ``arm``: with a new arming."""
        self.mode["wanted"] = WANTED.index(wanted)
        self.mode["arming"] += arm
        if speed is not None:
            self.mode["speed"] = speed
        if epoch is not None:
            self.mode["epoch"] = epoch
        self.mode_slot.publish(self.mode)

    # ---------------------------------------------------------------------------------------------------- the policy

    def post(self, actions, *, dt=0.02, first_step=0, tau=None, epoch=None, observed_ns=None):
        """Publish a chunk observed now unless told."""
        rows = np.atleast_2d(np.asarray(actions, dtype=np.float64))
        return self.policy.publish(
            np.ascontiguousarray(rows),
            epoch=int(self.mode["epoch"]) if epoch is None else epoch,
            tau_observation=self.tau if tau is None else tau,
            first_step=first_step,
            dt=dt,
            captured_ns=self.now if observed_ns is None else observed_ns,
        )

    # ------------------------------------------------------------------------------------------------------ the arms

    def publish_states(self):
        for arm, (state, slot) in enumerate(zip(self.states, self.state_slots, strict=True)):
            if arm not in self.silent:
                slot.publish(state, self.now)

    def _move_arms(self):
        for slot, state, plan in zip(self.segments.commands, self.states, self.plan.arms, strict=True):
            read = np.zeros((), COMMAND)
            slot.read_into(read)
            if read["moving"]:
                n = plan.axes
                state["q"][:n] += self.pace * (read["q"][:n] - state["q"][:n])
                state["sent"][:n] = read["q"][:n]
                state["doing"] = DEVICE_DOING.index("following")
                state["arming"], state["tick"] = read["arming"], read["tick"]
            else:
                state["doing"] = DEVICE_DOING.index("idle")

    # ------------------------------------------------------------------------------------------------------ the time

    def tick(self, ticks=1):
        """That many ticks; returns the status of the last."""
        for _ in range(ticks):
            self.now += self.period
            if self.granting:
                self.lease.grant_until(self.now + LEASE_NS)
            self.servo.tick(self.now)
            self.statuses.append(self.servo.read_status())
            for arm, slot in enumerate(self.segments.commands):
                read = np.zeros((), COMMAND)
                slot.read_into(read)
                if read["moving"]:
                    self.commands[arm].append(read["q"][: self.plan.arms[arm].axes].copy())
                    self.sent_at[arm].append(self.now)
            self._move_arms()
            self.publish_states()
        return self.statuses[-1]

    def seconds(self, seconds):
        return self.tick(round(seconds * 1e9 / self.period))

    def until(self, done, at_most=20.0):
        """Tick until ``done()``; fails after ``at_most`` seconds of virtual time."""
        for _ in range(round(at_most * 1e9 / self.period)):
            self.tick()
            if done():
                return self.statuses[-1]
        raise AssertionError(f"not within {at_most} s: {self.doing}, {self.reasons}")

    # ------------------------------------------------------------------------------------------------- what it is like

    @property
    def status(self):
        return self.servo.read_status()

    @property
    def tau(self):
        return float(self.status["tau"])

    @property
    def doing(self):
        return SERVO_DOING[int(self.status["doing"])]

    @property
    def reasons(self):
        return set(names(self.status["reasons"], REASONS))

    @property
    def latched(self):
        return set(names(self.status["latched"], REASONS))

    def command(self, arm=0):
        return self.commands[arm][-1]

    def telemetry(self):
        """Every row since the last call."""
        rows = np.zeros(200_000, telemetry(len(self.plan.components), self.plan.axes))
        return rows[: self.rows.read(rows)]

    def start_tracking(self, actions, **post):
        """Arm, post (again and again, as a policy does), approach; returns with tau running."""
        self.want("track", arm=True)
        self.tick()

        def tracking():
            if len(self.statuses) % 50 == 1:
                self.post(actions, **post)
            return self.doing == "tracking"

        self.until(tracking)

    def violations(self):
        """Limits that any arm's command stream broke, by kind, as the oracle sees it; {} for none."""
        found = {}
        for arm, plan in enumerate(self.plan.arms):
            limits = plan.limits
            bounds = limit_oracle.Bounds(
                np.array(limits.lower),
                np.array(limits.upper),
                np.array(limits.velocity),
                np.array(limits.acceleration),
                np.array(limits.jerk),
                self.period,
                gap_ns=round(1e9 * self.plan.gap),
            )
            sent, at = np.array(self.commands[arm]), np.array(self.sent_at[arm])
            if len(sent):
                counts = limit_oracle.violations(bounds, sent[0], int(at[0]), at[1:], sent[1:])
                found.update({f"{plan.name} {kind}": n for kind, n in counts.items() if n})
        return found
