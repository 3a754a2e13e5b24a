# cython: annotation_typing=False
"""The last word before a device: joint commands leave this module inside every limit, or they do not change.

The limiter trusts nobody: not the policy, not the tracker in front of it, not the clock that it is called with. It
knows no chunk, no driver and no rig; it is given numbers at construction, refuses those that make no sense, and then
turns a stream of wanted positions into a stream of commands whose finite differences obey position, velocity,
acceleration, jerk and step limits, whose tool point stays in a box and out of spheres, and from which the arm can
always stop. `limits.pxd` types this file; the same source runs interpreted (for coverage and mutation) and compiled.

How "always stop" is kept. Beside its state every joint carries a certified *stop*: a finite list of accelerations
that ends at rest and on which every limit was checked before the step that it belongs to was sent. A wanted step is
taken only if a new stop can be certified behind it. If not, the command moves as far towards the want as can be
certified; in the worst case it follows the stop it already carries, whose remainder is certified by construction.
Nothing here depends on a search finding its optimum: a poor search costs speed, never safety.

Discrete time. Commands are samples of a fixed ``period``; with T that period in seconds the quantities limited are
the backward differences that Franka's own checks use (libfranka ``rate_limiting.h``)::

    v[k] = (q[k] - q[k-1]) / T        a[k] = (v[k] - v[k-1]) / T        j[k] = (a[k] - a[k-1]) / T

Units: radians for revolute joints, metres for a gripper's width, seconds; host time in nanoseconds.
"""

from array import array
from collections.abc import Sequence

from cython.cimports.libc.math import ceil, cos, fabs, floor, isfinite, sin, sqrt  # type: ignore[import-untyped]

# What a command can be clipped for, in the order of the counters and of the bits that `tick` returns.
KINDS = (
    "position",  # wanted beyond a joint's range
    "velocity",  # wanted faster than the joint may go here (per-step limit included)
    "acceleration",
    "jerk",
    "braking",  # the wanted step is within limits, but no stop could be certified behind it
    "workspace",  # the tool point would leave the box or enter a sphere, now or while stopping
    "nonfinite",  # NaN or infinity was wanted: all joints brake
    "time",  # the clock went back, stood, or jumped
    "following",  # the arm is further from the command than allowed: all joints brake
)
POSITION = 0
VELOCITY = 1
ACCELERATION = 2
JERK = 3
BRAKING = 4
WORKSPACE = 5
NONFINITE = 6
TIME = 7
FOLLOWING = 8

# Limits are aimed inside by this share: the closed forms of a stop and its execution differ in rounding.
SLACK = 2e-6
# A command is known to half a unit in its last place, 2^-53 of its size, and a third difference sums eight of them; as
# much again for the judge's own arithmetic. Divided by dt, dt^2 and dt^3 this is what rounding can add to a measured
# velocity, acceleration and jerk.
GRAIN = 2.0**-49
# A limit of which rounding takes more than this share cannot be kept at this period.
WORST_GRAIN = 0.01
# Likewise for positions (rad or m): a stop of hundreds of steps accumulates about 1e-13.
EDGE = 1e-9
# A command within this distance of the want (rad or m) is not reported as clipped.
UNNOTICED = 1e-8
# Counts of a stop that do not fit are corrected this often; 98 % fit at once, and one in 10^4 not even then.
TRIES = 12
# The step search halves its interval this often: 1/512 of the accelerations that jerk leaves open is fine enough.
HALVINGS = 9
# Times beyond this (146 years in ns) are a broken clock, and their sums would leave 64 bits.
HORIZON = 1 << 62
# Answers of the clock check.
ADVANCE = 0
REPEAT = 1
BRAKE = 2
# Joints per limiter: an arm and its gripper, with room.
MOST_JOINTS = 16
# The same for an approach, which ends the sooner the finer it is.
CLOSINGS = 16
# Pieces a stop is cut into where one ball around it does not clear the workspace.
PIECES = 8

# What `plan_stop` writes: three phases (ramp to the holding acceleration, hold, ramp to zero) and their extremes.
STEPS_1 = 0
STEPS_2 = 1
STEPS_3 = 2
SLOPE_1 = 3  # acceleration change per step, rad/s^2
SLOPE_3 = 4
HOLD = 5  # acceleration of phase 2, rad/s^2
AHEAD = 6  # furthest displacement upwards from the start, rad, >= 0
BEHIND = 7  # furthest displacement downwards, rad, <= 0
FASTEST = 8  # highest velocity of any sample, start included, rad/s
SLOWEST = 9  # lowest (most negative) velocity, rad/s
END = 10  # displacement at rest, rad
RAMPED = 11  # displacement at the end of phase 1, rad
ENTRY = 12  # velocity at the start of phase 2, rad/s
EXIT = 13  # velocity at the end of phase 2, rad/s
STOP_SIZE = 14


def plan_stop(v: float, a: float, top: float, change: float, dt: float, out: "array[float]", at: int) -> bool:
    """Write the stop that begins at velocity ``v`` and acceleration ``a``: a near time-optimal list of accelerations.

    ``top`` bounds |a| (rad/s^2), ``change`` bounds |a[k] - a[k-1]| (rad/s^2 per step), ``dt`` is the period (s).
    Three phases of whole steps: ramp from ``a`` to the holding acceleration, hold, ramp to zero. With the step counts
    fixed, "velocity ends at zero" is linear in the holding acceleration, so the end is exact and nothing is iterated
    but the counts. ``out[at:]`` receives STOP_SIZE numbers. Returns False when no such list was found.
    """
    # Released at full jerk, does the joint end up moving upwards or downwards? That side is braked.
    n = float(ceil(fabs(a) / change))
    side = 1.0
    if v + dt * a * (n - 1.0) / 2.0 < 0.0:
        side = -1.0
    v = side * v
    a = side * a
    pace = v / dt
    n1 = max(1.0, float(ceil(fabs(a + top) / change)))
    n3 = max(1.0, float(ceil(top / change)))
    n2 = float(ceil((pace + a * (n1 - 1.0) / 2.0) / top - (n1 + n3) / 2.0))
    if n2 < 0.0:
        # That acceleration is not reached: the peak of two ramps at full jerk, in real numbers, gives the counts.
        peak = sqrt(max(0.0, change * (pace - a / 2.0) + a * a / 2.0))
        n1 = max(1.0, float(ceil(fabs(a + peak) / change)))
        n3 = max(1.0, float(ceil(peak / change)))
        n2 = 0.0
    hold = 0.0
    found = False
    for _ in range(TRIES):
        hold = (pace + a * (n1 - 1.0) / 2.0) / ((n1 + n3) / 2.0 + n2)
        if a + hold < -n1 * change and n3 > 1.0:
            # Already braking harder than this list would hold: hold it half a step less, or release it earlier.
            if n2 > 0.0:
                n2 -= 1.0
                n3 += 1.0
            else:
                n1 += 1.0
                n3 -= 1.0
        elif fabs(a + hold) > n1 * change:
            n1 += 1.0
        elif fabs(hold) > n3 * change:
            n3 += 1.0
        elif fabs(hold) > top:
            n2 += 1.0
        else:
            found = True
            break
    if not found:
        return False
    down = (a + hold) / n1
    up = hold / n3
    entry = v + dt * (a * n1 - down * n1 * (n1 + 1.0) / 2.0)
    leave = entry - dt * hold * n2
    ramped = dt * (n1 * v + dt * (a * n1 * (n1 + 1.0) / 2.0 - down * n1 * (n1 + 1.0) * (n1 + 2.0) / 6.0))
    held = dt * (n2 * entry - dt * hold * n2 * (n2 + 1.0) / 2.0)
    last = dt * (n3 * leave - dt * (hold * n3 * (n3 + 1.0) / 2.0 - up * n3 * (n3 + 1.0) * (n3 + 2.0) / 6.0))
    end = ramped + held + last
    fastest = max(v, entry)
    if a > down > 0.0:
        # Velocity still rises until the ramp crosses zero.
        m = min(n1, float(floor(a / down)))
        fastest = max(fastest, v + dt * (a * m - down * m * (m + 1.0) / 2.0))
    behind = min(0.0, end)
    if v < 0.0:
        # Still moving the other way: displacement is lowest at the last sample with a velocity below zero.
        # (The ramp reaches zero velocity by the choice of side; the clamp is for rounding where it only touches it.)
        root = sqrt(max(0.0, (a - down / 2.0) * (a - down / 2.0) + 2.0 * down * pace))
        m = min(n1, float(floor(-2.0 * pace / (a - down / 2.0 + root))))
        behind = min(behind, dt * (m * v + dt * (a * m * (m + 1.0) / 2.0 - down * m * (m + 1.0) * (m + 2.0) / 6.0)))
    out[at + STEPS_1] = n1
    out[at + STEPS_2] = n2
    out[at + STEPS_3] = n3
    out[at + SLOPE_1] = -side * down
    out[at + SLOPE_3] = side * up
    out[at + HOLD] = -side * hold
    out[at + END] = side * end
    out[at + RAMPED] = side * ramped
    out[at + ENTRY] = side * entry
    out[at + EXIT] = side * leave
    if side > 0.0:
        out[at + AHEAD] = max(0.0, end)
        out[at + BEHIND] = behind
        out[at + FASTEST] = fastest
        out[at + SLOWEST] = min(v, 0.0)
    else:
        out[at + AHEAD] = -behind
        out[at + BEHIND] = min(0.0, -end)
        out[at + FASTEST] = max(-v, 0.0)
        out[at + SLOWEST] = -fastest
    return True


class Limiter:
    """Limits the command stream of one arm (its joints, then its gripper if it has one), at most 16 axes.

    Per-joint sequences of equal length n: ``lower`` and ``upper`` (rad or m), ``velocity`` (rad/s), ``acceleration``
    (rad/s^2), ``jerk`` (rad/s^3), each finite and positive; ``step`` bounds the change of one command (rad) and
    ``lag`` the distance between command and measured position (rad), both infinite unless given. ``period_ns`` is the
    command period. A pause of more than ``gap_ns`` between ticks means that the arm has come to rest where it was
    told last, and the stream restarts from there at zero velocity.

    ``curve`` is a position-dependent velocity bound, four sequences (offset rad/s, deceleration rad/s^2, lower and
    upper reference rad): v <= sqrt(2 * deceleration * (upper - q)) - offset, mirrored below; deceleration 0 means
    none. It is the form in which Franka publishes the FR3's.

    The workspace needs the chain of the first m <= n joints: ``origins`` (m x 12: rotation row by row, then
    translation, of each joint in its parent at zero), ``axes`` (m x 3 unit vectors), ``tip`` (3, tool point in the
    last joint's frame, m); ``box`` is (lower x y z, upper x y z) and ``spheres`` a sequence of (x, y, z, radius) to
    keep out of, all in the arm's base frame, m. Only the tool point is watched, not the elbow.

    Raises ValueError for anything non-finite, empty or contradictory.

    Use: `reset`, then each period write ``wanted`` (and ``measured``, NaN where unknown) and call `tick`; ``command``
    holds the answer. ``tick_ns`` is the *deadline* of the tick, not the instant of its wake-up.
    """

    def __init__(
        self,
        lower: Sequence[float],
        upper: Sequence[float],
        velocity: Sequence[float],
        acceleration: Sequence[float],
        jerk: Sequence[float],
        period_ns: int,
        *,
        step: Sequence[float] | None = None,
        lag: Sequence[float] | None = None,
        gap_ns: int = 100_000_000,
        curve: Sequence[Sequence[float]] | None = None,
        origins: Sequence[Sequence[float]] = (),
        axes: Sequence[Sequence[float]] = (),
        tip: Sequence[float] = (0.0, 0.0, 0.0),
        box: Sequence[float] | None = None,
        spheres: Sequence[Sequence[float]] = (),
    ) -> None:
        n = len(lower)
        if not 1 <= n <= MOST_JOINTS:
            raise ValueError(f"limits for {n} joints; expected 1 to {MOST_JOINTS}")
        if not 100_000 <= period_ns <= 100_000_000:
            raise ValueError(f"period_ns is {period_ns}; expected 100 us to 100 ms, in nanoseconds")
        if not period_ns < gap_ns <= 10_000_000_000:
            raise ValueError(f"gap_ns is {gap_ns}; expected more than one period ({period_ns}) and at most 10 s")
        nothing = [float("inf")] * n
        self.joints = n
        self.dt = period_ns * 1e-9
        self.period_ns = period_ns
        # A tick may come an eighth of a period early; the schedule in `_clock` keeps the long-run rate exact.
        self.early_ns = period_ns - period_ns // 8
        self.gap_ns = gap_ns
        self.lower = _finite("lower", lower, n)
        self.upper = _finite("upper", upper, n)
        for i in range(n):
            if not self.lower[i] + 4.0 * EDGE < self.upper[i]:
                raise ValueError(f"joint {i}: lower {self.lower[i]} is not below upper {self.upper[i]}")
        velocities = _positive("velocity", velocity, n)
        steps = _positive("step", nothing if step is None else step, n)
        self.velocity = array("d", [min(velocities[i], steps[i] / self.dt) for i in range(n)])
        self.top = _finite_positive("acceleration", acceleration, n)
        self.change = _finite_positive("jerk", jerk, n)
        for i in range(n):
            grain = GRAIN * max(fabs(self.lower[i]), fabs(self.upper[i])) / self.dt
            if grain / self.dt / self.dt > WORST_GRAIN * self.change[i]:
                raise ValueError(
                    f"jerk of joint {i}: {self.change[i]} is lost in rounding at a period of {period_ns} ns"
                )
            self.velocity[i] = self.velocity[i] * (1.0 - SLACK) - grain
            # Twice the share: where acceleration is a whole number of jerk steps, the quotient must not round above it.
            self.top[i] = self.top[i] * (1.0 - 2.0 * SLACK) - grain / self.dt
            self.change[i] = self.change[i] * self.dt * (1.0 - SLACK) - grain / self.dt
            if not (self.velocity[i] > 0.0 and isfinite(self.velocity[i]) and self.top[i] > 0.0):
                raise ValueError(f"joint {i}: velocity and acceleration limits must be finite and above rounding")
        self.lag = _positive("lag", nothing if lag is None else lag, n)
        offset, deceleration, low, high = [[0.0] * n] * 4 if curve is None else curve
        self.curve_offset = _finite("curve offset", offset, n)
        self.curve_gain = array("d", [2.0 * x for x in _finite("curve deceleration", deceleration, n)])
        self.curve_lower = _finite("curve lower", low, n)
        self.curve_upper = _finite("curve upper", high, n)
        if min(min(self.curve_gain), min(self.curve_offset)) < 0.0:
            raise ValueError("curve: offset and deceleration must not be negative")

        m = len(origins)
        if m != len(axes) or m > n:
            raise ValueError(f"chain: {m} origins and {len(axes)} axes for {n} joints")
        if m == 0 and (box is not None or len(spheres) > 0):
            raise ValueError("a workspace needs the chain: give origins, axes and tip")
        self.links = m
        self.origins = array("d", [x for row in origins for x in _finite("origin", row, 12)])
        self.axes = array("d", [x for row in axes for x in _finite("axis", row, 3)])
        self.tip = _finite("tip", tip, 3)
        for i in range(m):
            length = sum(self.axes[3 * i + k] * self.axes[3 * i + k] for k in range(3))
            if fabs(length - 1.0) > 1e-6:
                raise ValueError(f"axis of joint {i} has length^2 {length}; expected a unit vector")
        self.guarded = box is not None or len(spheres) > 0
        # Without a box the tool point may be anywhere that a float can name.
        self.box = _finite("box", [-1e9] * 3 + [1e9] * 3 if box is None else box, 6)
        for k in range(3):
            if not self.box[k] < self.box[3 + k]:
                raise ValueError(f"box: {self.box[k]} is not below {self.box[3 + k]} on axis {'xyz'[k]}")
        self.balls = len(spheres)
        self.spheres = array("d", [x for row in spheres for x in _finite("sphere", row, 4)])
        for i in range(self.balls):
            if self.spheres[4 * i + 3] <= 0.0:
                raise ValueError(f"sphere {i} has radius {self.spheres[4 * i + 3]}; expected more than 0")
        # How far the tool point can be from each joint's axis, whatever the joints behind it do: the speed of the
        # tool point is at most the sum of these times the joint speeds.
        self.reach = array("d", [0.0] * n)
        span = _norm(self.tip)
        for i in range(m - 1, -1, -1):
            self.reach[i] = span
            span += _norm(self.origins[12 * i + 9 : 12 * i + 12])

        self.wanted = array("d", [float("nan")] * n)
        self.measured = array("d", [float("nan")] * n)
        self.command = array("d", [float("nan")] * n)
        self.speed = array("d", [0.0] * n)
        self.acceleration = array("d", [0.0] * n)
        self.before = array("d", [0.0] * n)
        self.pace = array("d", [0.0] * n)
        self.next_command = array("d", [0.0] * n)
        self.next_speed = array("d", [0.0] * n)
        self.next_acceleration = array("d", [0.0] * n)
        self.pick = array("d", [0.0] * n)
        self.angles = array("d", [0.0] * n)
        self.counts = array("q", [0] * (len(KINDS) * n))
        self.stops = array("d", [0.0] * (MOST_JOINTS * STOP_SIZE))
        self.fresh = array("d", [0.0] * (MOST_JOINTS * STOP_SIZE))
        self.ready = False
        self.last_ns = 0
        self.due_ns = 0

    def reset(self, position: Sequence[float], tick_ns: int) -> None:
        """Begin at rest at ``position`` (rad or m, one per joint) at host time ``tick_ns``.

        Raises ValueError, and leaves the limiter without a command, when the position is outside the limits.
        """
        for i, start in enumerate(_same_length("position", position, self.joints)):
            self.wanted[i] = start
        refused = self.start(tick_ns)
        if refused:
            reasons = [kind for bit, kind in enumerate(KINDS) if refused >> bit & 1]
            raise ValueError(f"cannot start at {list(position)}: outside limits ({', '.join(reasons)})")

    def start(self, tick_ns: int) -> int:
        """Begin at rest at ``wanted``; returns 0, or the bits (by KINDS) why not, and is then not ready."""
        refused = 0
        self.ready = False
        if tick_ns < 0 or tick_ns > HORIZON:
            refused = 1 << TIME
        for i in range(self.joints):
            self.command[i] = self.wanted[i]
            if not isfinite(self.wanted[i]):
                refused |= 1 << NONFINITE
            elif self.wanted[i] < self.lower[i] or self.wanted[i] > self.upper[i]:
                refused |= 1 << POSITION
            self.angles[i] = self.wanted[i]
        if self.guarded and not refused & 1 << NONFINITE and not self._holds(0.0):
            refused |= 1 << WORKSPACE
        if refused:
            return refused
        self._rest()
        self.last_ns = tick_ns
        self.due_ns = tick_ns + self.early_ns
        self.ready = True
        return 0

    def tick(self, tick_ns: int) -> int:
        """One period: ``wanted`` in, ``command`` out. Returns the bits of KINDS it was clipped for; -1 before `start`.

        Every bit is also counted per joint in ``counts`` (kind-major: ``counts[kind * joints + joint]``).
        """
        if not self.ready:
            return -1
        step = self._clock(tick_ns)
        if step != ADVANCE:
            self._count_all(TIME)
            if step == BRAKE:
                self._follow_stops()
            return 1 << TIME
        clipped = 0
        for i in range(self.joints):
            if not isfinite(self.wanted[i]):
                clipped |= 1 << NONFINITE
                self.counts[NONFINITE * self.joints + i] += 1
            if fabs(self.measured[i] - self.command[i]) > self.lag[i]:
                clipped |= 1 << FOLLOWING
                self.counts[FOLLOWING * self.joints + i] += 1
        if clipped:
            self._follow_stops()
            return clipped
        for i in range(self.joints):
            clipped |= self._choose(i)
        if self.guarded and not self._contained():
            clipped |= 1 << WORKSPACE
            self._count_all(WORKSPACE)
            self._retreat()
        self._commit()
        return clipped

    def brake(self, tick_ns: int) -> int:
        """One period of stopping, as hard as the limits allow: every joint follows its certified stop.

        Returns the bits as `tick` does; -1 before `start`. Each joint stops by itself: a stop along the path is made
        by slowing trajectory time, before this module.
        """
        if not self.ready:
            return -1
        step = self._clock(tick_ns)
        if step != REPEAT:
            self._follow_stops()
        if step != ADVANCE:
            self._count_all(TIME)
            return 1 << TIME
        return 0

    def standing(self) -> bool:
        """Whether every joint is at rest."""
        still = True
        for i in range(self.joints):
            still = still and self.speed[i] == 0.0 and self.acceleration[i] == 0.0
        return still

    def _clock(self, tick_ns: int) -> int:
        """What the tick's time allows: a step, the same command again, or only braking.

        ``due_ns`` is a schedule of one step per period with an eighth of a period of jitter, so that bunched ticks
        cannot move the arm faster than the limits allow in real time.
        """
        if tick_ns < self.last_ns or tick_ns > HORIZON:
            self.last_ns = min(max(tick_ns, 0), HORIZON)
            self.due_ns = self.last_ns + self.early_ns
            return BRAKE
        elapsed = tick_ns - self.last_ns
        self.last_ns = tick_ns
        if elapsed > self.gap_ns:
            self._rest()
            self.due_ns = tick_ns + self.early_ns
            return REPEAT
        if tick_ns < self.due_ns:
            return REPEAT
        self.due_ns = max(self.due_ns + self.period_ns, tick_ns + self.early_ns)
        return ADVANCE

    def _rest(self) -> None:
        """Stand at ``command``: no velocity, no acceleration, nothing left of any stop."""
        for i in range(self.joints):
            self.speed[i] = 0.0
            self.acceleration[i] = 0.0
            self.before[i] = self.command[i]
            self.pace[i] = 0.0
            for k in range(STOP_SIZE):
                self.stops[i * STOP_SIZE + k] = 0.0

    def _count_all(self, kind: int) -> None:
        for i in range(self.joints):
            self.counts[kind * self.joints + i] += 1

    def _choose(self, i: int) -> int:
        """Write the next state of joint ``i`` and the stop behind it; returns the bits it was clipped for."""
        q = self.command[i]
        v = self.speed[i]
        a = self.acceleration[i]
        dt = self.dt
        top = self.top[i]
        change = self.change[i]
        wanted = self.wanted[i]
        target = min(max(wanted, self.lower[i] + EDGE), self.upper[i] - EDGE)
        asked = (target - q) / dt
        pick = (min(max(asked, -self.velocity[i]), self.velocity[i]) - v) / dt
        pick = min(max(pick, -top, a - change), top, a + change)
        pace = (target - self.before[i]) / dt
        lean = (pace - self.pace[i]) / dt
        lost = fabs(self.before[i] - q) > UNNOTICED
        self.before[i] = target
        self.pace[i] = pace
        if lost and pick != (asked - v) / dt:
            # Neither was the last want reached nor can this one be. Running after it as fast as possible would swing
            # about it for ever. (A want within reach is taken: who went on from our state is not to be fought.)
            pick = self._approach(i, target, pace, lean)

        clipped = 0
        if wanted < self.lower[i] or wanted > self.upper[i]:
            clipped |= 1 << POSITION
        if fabs(asked) > self.velocity[i]:
            clipped |= 1 << VELOCITY
        if fabs((asked - v) / dt) > top:
            clipped |= 1 << ACCELERATION
        if fabs((asked - v) / dt - a) > change:
            clipped |= 1 << JERK

        if pick == (asked - v) / dt:
            # Within reach: the command is the want itself, to the last bit.
            self.next_command[i] = target
            self.next_speed[i] = asked
            self.next_acceleration[i] = pick
            certified = self._certify(i)
        else:
            certified = self._attempt(i, pick)
        if not certified:
            clipped |= 1 << BRAKING
            self._search(i, pick)
        self.pick[i] = self.next_acceleration[i]
        if fabs(self.next_command[i] - wanted) <= UNNOTICED:
            return 0
        for kind in range(BRAKING + 1):
            if clipped >> kind & 1:
                self.counts[kind * self.joints + i] += 1
        return clipped

    def _approach(self, i: int, target: float, pace: float, lean: float) -> float:
        """The acceleration from which joint ``i``, braking at once, would come to rest with its target.

        The target moves at ``pace`` (rad/s) and ``lean`` (rad/s^2); what is faster than the joint can be is a jump,
        which has no pace.
        """
        if fabs(pace) > self.velocity[i]:
            pace = 0.0
        if fabs(lean) > self.top[i]:
            lean = 0.0
        low = max(-self.top[i], self.acceleration[i] - self.change[i])
        high = min(self.top[i], self.acceleration[i] + self.change[i])
        if self._overshoot(i, high, target, pace, lean) <= 0.0:
            return high
        for _ in range(CLOSINGS):
            middle = (low + high) / 2.0
            if self._overshoot(i, middle, target, pace, lean) > 0.0:
                high = middle
            else:
                low = middle
        return low

    def _overshoot(self, i: int, a: float, target: float, pace: float, lean: float) -> float:
        """Where joint ``i`` comes to rest relative to its moving target if it takes ``a`` now and brakes then, rad."""
        at = i * STOP_SIZE
        v = self.speed[i] + a * self.dt
        q = self.command[i] + v * self.dt
        if not plan_stop(v - pace, a - lean, self.top[i], self.change[i], self.dt, self.fresh, at):
            return q - target
        return q + self.fresh[at + END] - target

    def _search(self, i: int, refused: float) -> None:
        """Towards the acceleration ``refused``, as far as a stop can be certified; at worst the stop carried along."""
        self._step_stop(i)
        good = self.next_acceleration[i]
        bad = refused
        found = False
        for _ in range(HALVINGS):
            middle = (good + bad) / 2.0
            if self._attempt(i, middle):
                good = middle
                found = True
            else:
                bad = middle
        if not (found and self._attempt(i, good)):
            self._step_stop(i)

    def _attempt(self, i: int, a: float) -> bool:
        """Write the next state of joint ``i`` under acceleration ``a``; True if a stop behind it is certified."""
        self.next_acceleration[i] = a
        self.next_speed[i] = self.speed[i] + a * self.dt
        self.next_command[i] = self.command[i] + self.next_speed[i] * self.dt
        return self._certify(i)

    def _certify(self, i: int) -> bool:
        """Plan a stop behind the next state of joint ``i`` into ``fresh``; True if all of it obeys the limits."""
        at = i * STOP_SIZE
        q = self.next_command[i]
        if not plan_stop(
            self.next_speed[i], self.next_acceleration[i], self.top[i], self.change[i], self.dt, self.fresh, at
        ):
            return False
        # All comparisons are of the form that NaN fails.
        if not (self.fresh[at + FASTEST] <= self.velocity[i] and -self.velocity[i] <= self.fresh[at + SLOWEST]):
            return False
        if not (self.lower[i] + EDGE <= q + self.fresh[at + BEHIND]):
            return False
        if not (q + self.fresh[at + AHEAD] <= self.upper[i] - EDGE):
            return False
        if self.curve_gain[i] > 0.0:
            return self._under_curve(i, 1.0) and self._under_curve(i, -1.0)
        return True

    def _under_curve(self, i: int, side: float) -> bool:
        """Whether the fresh stop of joint ``i`` stays under the velocity curve of the upper (1) or lower (-1) side."""
        at = i * STOP_SIZE
        gain = self.curve_gain[i]
        offset = self.curve_offset[i]
        if side > 0.0:
            room = self.curve_upper[i] - self.next_command[i]
            fastest = self.fresh[at + FASTEST]
            furthest = self.fresh[at + AHEAD]
        else:
            room = self.next_command[i] - self.curve_lower[i]
            fastest = -self.fresh[at + SLOWEST]
            furthest = -self.fresh[at + BEHIND]
        if fastest <= 0.0:
            return True
        # The curve falls towards the limit, so its value at the furthest point bounds the whole stop: the usual case.
        if (fastest + offset) * (fastest + offset) <= gain * (room - furthest):
            return True
        # Else phase by phase, which is worth it on the side on which the stop ends; on the other it is on its way back.
        hold = -side * self.fresh[at + HOLD]
        ramped = max(0.0, side * self.fresh[at + RAMPED])
        if hold <= 0.0 or (fastest + offset) * (fastest + offset) > gain * (room - ramped):
            return False
        # While holding, the distance under the curve is smallest at one speed (or at an end of the phase).
        entry = side * self.fresh[at + ENTRY]
        leave = side * self.fresh[at + EXIT]
        if gain > 2.0 * hold:
            closest = 2.0 * hold * offset / (gain - 2.0 * hold)
            if leave < closest < entry:
                passed = ramped + (entry * entry - closest * closest) / (2.0 * hold)
                if (closest + offset) * (closest + offset) > gain * (room - passed):
                    return False
        return (leave + offset) * (leave + offset) <= gain * (room - furthest)

    def _step_stop(self, i: int) -> None:
        """Write the next state of joint ``i`` along the stop it carries, and what is left of that stop."""
        at = i * STOP_SIZE
        for k in range(STOP_SIZE):
            self.fresh[at + k] = self.stops[at + k]
        a = self.acceleration[i]
        v = 0.0
        if self.stops[at + STEPS_1] > 0.0:
            self.fresh[at + STEPS_1] -= 1.0
            a += self.stops[at + SLOPE_1]
            v = self.speed[i] + a * self.dt
            self.fresh[at + RAMPED] -= v * self.dt
        elif self.stops[at + STEPS_2] > 0.0:
            self.fresh[at + STEPS_2] -= 1.0
            a = self.stops[at + HOLD]
            v = self.speed[i] + a * self.dt
            self.fresh[at + RAMPED] = 0.0
            self.fresh[at + ENTRY] = v
        elif self.stops[at + STEPS_3] > 0.0:
            self.fresh[at + STEPS_3] -= 1.0
            a += self.stops[at + SLOPE_3]
            v = self.speed[i] + a * self.dt
            self.fresh[at + RAMPED] = 0.0
            self.fresh[at + HOLD] = a
            self.fresh[at + ENTRY] = v
            self.fresh[at + EXIT] = v
        else:
            a = 0.0
        self.next_acceleration[i] = a
        self.next_speed[i] = v
        self.next_command[i] = self.command[i] + v * self.dt
        self.fresh[at + END] -= v * self.dt
        self.fresh[at + AHEAD] = max(0.0, self.fresh[at + AHEAD] - v * self.dt)
        self.fresh[at + BEHIND] = min(0.0, self.fresh[at + BEHIND] - v * self.dt)

    def _follow_stops(self) -> None:
        for i in range(self.joints):
            self._step_stop(i)
        self._commit()

    def _commit(self) -> None:
        for i in range(self.joints):
            self.command[i] = self.next_command[i]
            self.speed[i] = self.next_speed[i]
            self.acceleration[i] = self.next_acceleration[i]
            for k in range(STOP_SIZE):
                self.stops[i * STOP_SIZE + k] = self.fresh[i * STOP_SIZE + k]

    def _retreat(self) -> None:
        """Give up part of the joints' wishes, and at last all of them, until tool point and stop stay in the workspace.

        What is left at the end are the stops carried along, all of one tick: together they were certified.
        """
        scale = 0.5
        for _ in range(3):
            agreed = True
            for i in range(self.joints):
                self._step_stop(i)
                a = self.next_acceleration[i]
                if agreed and self.pick[i] != a:
                    agreed = self._attempt(i, a + scale * (self.pick[i] - a))
            if agreed and self._contained():
                return
            scale *= 0.5
        for i in range(self.joints):
            self._step_stop(i)

    def _contained(self) -> bool:
        """Whether the tool point stays in the workspace in the next state and all along the fresh stops behind it.

        Samples are covered by balls: no point of a stop is further from the sample's tool point than the joints
        travel times their reach.
        """
        radius = 0.0
        longest = 0.0
        for i in range(self.links):
            at = i * STOP_SIZE
            up = self.fresh[at + AHEAD]
            down = self.fresh[at + BEHIND]
            self.angles[i] = self.next_command[i] + (up + down) / 2.0
            radius += self.reach[i] * (up - down) / 2.0
            longest = max(longest, self.fresh[at + STEPS_1] + self.fresh[at + STEPS_2] + self.fresh[at + STEPS_3])
        if self._holds(radius):
            return True
        begin = 0.0
        for piece in range(PIECES):
            finish = float(floor(longest * (piece + 1.0) / PIECES))
            radius = 0.0
            for i in range(self.links):
                at = i * STOP_SIZE
                fastest = max(self.fresh[at + FASTEST], -self.fresh[at + SLOWEST])
                self.angles[i] = self.next_command[i] + self._travelled(i, begin)
                radius += self.reach[i] * fastest * self.dt * (finish - begin)
            if not self._holds(radius):
                return False
            begin = finish
        return True

    def _travelled(self, i: int, steps: float) -> float:
        """Displacement of joint ``i`` after ``steps`` steps of its fresh stop, rad."""
        at = i * STOP_SIZE
        dt = self.dt
        k = min(steps, self.fresh[at + STEPS_1])
        left = steps - k
        if left <= 0.0:
            return dt * (
                k * self.next_speed[i]
                + dt
                * (
                    self.next_acceleration[i] * k * (k + 1.0) / 2.0
                    + self.fresh[at + SLOPE_1] * k * (k + 1.0) * (k + 2.0) / 6.0
                )
            )
        hold = self.fresh[at + HOLD]
        k = min(left, self.fresh[at + STEPS_2])
        left -= k
        travelled = self.fresh[at + RAMPED] + dt * (k * self.fresh[at + ENTRY] + dt * hold * k * (k + 1.0) / 2.0)
        k = min(left, self.fresh[at + STEPS_3])
        return travelled + dt * (
            k * self.fresh[at + EXIT]
            + dt * (hold * k * (k + 1.0) / 2.0 + self.fresh[at + SLOPE_3] * k * (k + 1.0) * (k + 2.0) / 6.0)
        )

    def _holds(self, radius: float) -> bool:
        """Whether a ball of ``radius`` (m) about the tool point at ``angles`` is in the box and out of every sphere.

        The chain is walked from the tool back to the base, which turns one vector per joint instead of a frame. It
        is this module's own forward kinematics: a check shares nothing with what it checks.
        """
        x = self.tip[0]
        y = self.tip[1]
        z = self.tip[2]
        for back in range(self.links):
            i = self.links - 1 - back
            ax = self.axes[3 * i]
            ay = self.axes[3 * i + 1]
            az = self.axes[3 * i + 2]
            c = cos(self.angles[i])
            s = sin(self.angles[i])
            along = (ax * x + ay * y + az * z) * (1.0 - c)
            u = x * c + (ay * z - az * y) * s + ax * along
            v = y * c + (az * x - ax * z) * s + ay * along
            w = z * c + (ax * y - ay * x) * s + az * along
            o = 12 * i
            x = self.origins[o] * u + self.origins[o + 1] * v + self.origins[o + 2] * w + self.origins[o + 9]
            y = self.origins[o + 3] * u + self.origins[o + 4] * v + self.origins[o + 5] * w + self.origins[o + 10]
            z = self.origins[o + 6] * u + self.origins[o + 7] * v + self.origins[o + 8] * w + self.origins[o + 11]
        if (
            x - radius < self.box[0]
            or y - radius < self.box[1]
            or z - radius < self.box[2]
            or x + radius > self.box[3]
            or y + radius > self.box[4]
            or z + radius > self.box[5]
        ):
            return False
        for b in range(self.balls):
            u = x - self.spheres[4 * b]
            v = y - self.spheres[4 * b + 1]
            w = z - self.spheres[4 * b + 2]
            if sqrt(u * u + v * v + w * w) < self.spheres[4 * b + 3] + radius:
                return False
        return True


def _same_length(name: str, values: Sequence[float], n: int) -> list[float]:
    if len(values) != n:
        raise ValueError(f"{name} has {len(values)} numbers; expected {n}")
    return [float(value) for value in values]


def _finite(name: str, values: Sequence[float], n: int) -> "array[float]":
    checked = _same_length(name, values, n)
    if not all(isfinite(x) for x in checked):
        raise ValueError(f"{name} must be finite, found {checked}")
    return array("d", checked)


def _positive(name: str, values: Sequence[float], n: int) -> "array[float]":
    checked = _same_length(name, values, n)
    # Written so that NaN is refused too.
    if not all(value > 0.0 for value in checked):
        raise ValueError(f"{name} must be positive, found {checked}")
    return array("d", checked)


def _finite_positive(name: str, values: Sequence[float], n: int) -> "array[float]":
    return _positive(name, _finite(name, values, n), n)


def _norm(vector: Sequence[float]) -> float:
    return float(sqrt(sum(x * x for x in vector)))
