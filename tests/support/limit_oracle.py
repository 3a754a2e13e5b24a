"""What the vendors' formulas say of a finished command stream: written by other means than the limiter.

The limiter plans forward, one joint at a time, in closed forms. Here whole streams are judged backwards with numpy:
finite differences, libfranka's velocity formulas as they stand in ``rate_limiting.h`` (numbers and all), and the tool
point from modified Denavit-Hartenberg tables. Nothing is taken from the module under test, and no tolerance is given.
"""

import itertools
from dataclasses import dataclass, field

import numpy as np

NS = 1_000_000_000
HORIZON_NS = 1 << 62


@dataclass(frozen=True)
class Bounds:
    """Limits of one arm. ``velocity_at(q [k, n])`` gives lower and upper velocity bounds [k, n] where they vary."""

    lower: np.ndarray
    upper: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    jerk: np.ndarray
    period_ns: int
    gap_ns: int = 100_000_000
    step: np.ndarray | None = None
    velocity_at: object = None
    tool: object = None  # q [k, n] -> [k, 3] m
    box: np.ndarray | None = None  # [2, 3]
    spheres: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))


def fr3_velocity(q):
    """libfranka computeLower/UpperLimitsJointVelocity without their tolerance: rad -> rad/s, [k, 7] -> two [k, 7]."""
    root = lambda x: np.sqrt(np.maximum(0.0, x))  # noqa: E731
    upper = [
        np.minimum(2.62, np.maximum(0.0, -0.30 + root(12.0 * (2.75010 - q[:, 0])))),
        np.minimum(2.62, np.maximum(0.0, -0.20 + root(5.17 * (1.79180 - q[:, 1])))),
        np.minimum(2.62, np.maximum(0.0, -0.20 + root(7.00 * (2.90650 - q[:, 2])))),
        np.minimum(2.62, np.maximum(0.0, -0.30 + root(8.00 * (-0.1458 - q[:, 3])))),
        np.minimum(5.26, np.maximum(0.0, -0.35 + root(34.0 * (2.81010 - q[:, 4])))),
        np.minimum(4.18, np.maximum(0.0, -0.35 + root(11.0 * (4.52050 - q[:, 5])))),
        np.minimum(5.26, np.maximum(0.0, -0.35 + root(34.0 * (3.01960 - q[:, 6])))),
    ]
    lower = [
        np.maximum(-2.62, np.minimum(0.0, 0.30 - root(12.0 * (2.750100 + q[:, 0])))),
        np.maximum(-2.62, np.minimum(0.0, 0.20 - root(5.17 * (1.791800 + q[:, 1])))),
        np.maximum(-2.62, np.minimum(0.0, 0.20 - root(7.00 * (2.906500 + q[:, 2])))),
        np.maximum(-2.62, np.minimum(0.0, 0.30 - root(8.00 * (3.048100 + q[:, 3])))),
        np.maximum(-5.26, np.minimum(0.0, 0.35 - root(34.0 * (2.810100 + q[:, 4])))),
        np.maximum(-4.18, np.minimum(0.0, 0.35 - root(11.0 * (-0.54092 + q[:, 5])))),
        np.maximum(-5.26, np.minimum(0.0, 0.35 - root(34.0 * (3.019600 + q[:, 6])))),
    ]
    return np.stack(lower, 1), np.stack(upper, 1)


# a (m), d (m), alpha (rad): modified Denavit-Hartenberg, Panda and FR3; the last row is the flange.
FRANKA_DH = [
    (0.0, 0.333, 0.0),
    (0.0, 0.0, -np.pi / 2),
    (0.0, 0.316, np.pi / 2),
    (0.0825, 0.0, np.pi / 2),
    (-0.0825, 0.384, -np.pi / 2),
    (0.0, 0.0, np.pi / 2),
    (0.088, 0.0, np.pi / 2),
    (0.0, 0.107, 0.0),
]


def franka_pose(q):
    """Flange pose [k, 4, 4] of joint angles [k, 7], by Craig's DH matrices."""
    q = np.atleast_2d(q)
    theta = np.concatenate([q, np.zeros((len(q), 1))], axis=1)
    pose = np.broadcast_to(np.eye(4), (len(q), 4, 4))
    for (a, d, alpha), angle in zip(FRANKA_DH, theta.T, strict=True):
        c, s, ca, sa = np.cos(angle), np.sin(angle), np.cos(alpha), np.sin(alpha)
        link = np.zeros((len(q), 4, 4))
        link[:, 0, 0], link[:, 0, 1], link[:, 0, 3] = c, -s, a
        link[:, 1, 0], link[:, 1, 1], link[:, 1, 2], link[:, 1, 3] = s * ca, c * ca, -sa, -d * sa
        link[:, 2, 0], link[:, 2, 1], link[:, 2, 2], link[:, 2, 3] = s * sa, c * sa, ca, d * ca
        link[:, 3, 3] = 1
        pose = pose @ link
    return pose


def franka_flange(q):
    return franka_pose(q)[:, :3, 3]


def advances(bounds, start_ns, ticks):
    """For each tick time: 'step', 'brake', 'repeat' or 'restart', from the documented contract, in Python integers."""
    kinds = []
    last, early = start_ns, bounds.period_ns - bounds.period_ns // 8
    due = start_ns + early
    for tick in map(int, ticks):
        if tick < last or tick > HORIZON_NS:
            last = min(max(tick, 0), HORIZON_NS)
            due = last + early
            kinds.append("brake")
            continue
        elapsed, last = tick - last, tick
        if elapsed > bounds.gap_ns:
            due = tick + early
            kinds.append("restart")
        elif tick < due:
            kinds.append("repeat")
        else:
            due = max(due + bounds.period_ns, tick + early)
            kinds.append("step")
    return np.array(kinds)


def violations(bounds, start, start_ns, ticks, commands):
    """Count broken limits by kind: ``commands`` [k, n] sent at ``ticks`` [k] (ns), from rest at ``start``."""
    kinds = advances(bounds, start_ns, ticks)
    found = dict.fromkeys(
        ["nonfinite", "position", "velocity", "acceleration", "jerk", "step", "workspace", "repeat"], 0
    )
    found["nonfinite"] = int((~np.isfinite(commands)).sum())
    found["position"] = int(((commands < bounds.lower) | (commands > bounds.upper)).sum())
    before = np.vstack([start, commands[:-1]])
    still = (kinds == "repeat") | (kinds == "restart")
    found["repeat"] = int((commands[still] != before[still]).sum())
    dt = bounds.period_ns / NS
    edges = [0, *(np.nonzero(kinds == "restart")[0] + 1), len(commands)]
    for begin, end in itertools.pairwise(edges):
        moved = commands[begin:end][~still[begin:end]]
        if not len(moved):
            continue
        rest = start if begin == 0 else commands[begin - 1]
        q = np.vstack([rest, rest, rest, moved])
        v = np.diff(q, axis=0) / dt
        a = np.diff(v, axis=0) / dt
        j = np.diff(a, axis=0) / dt
        fastest, slowest = bounds.velocity, -bounds.velocity
        found["velocity"] += int(((v > fastest) | (v < slowest)).sum())
        if bounds.velocity_at is not None:
            for side in (q[:-1], q[1:]):
                slowest, fastest = bounds.velocity_at(side)
                found["velocity"] += int(((v > fastest) | (v < slowest)).sum())
        found["acceleration"] += int((np.abs(a) > bounds.acceleration).sum())
        found["jerk"] += int((np.abs(j) > bounds.jerk).sum())
        if bounds.step is not None:
            found["step"] += int((np.abs(np.diff(q, axis=0)) > bounds.step).sum())
    if bounds.tool is not None:
        point = bounds.tool(commands)
        if bounds.box is not None:
            found["workspace"] += int(((point < bounds.box[0]) | (point > bounds.box[1])).any(axis=1).sum())
        for *centre, radius in bounds.spheres:
            found["workspace"] += int((np.linalg.norm(point - centre, axis=1) < radius).sum())
    return found
