"""An arm of six joints that moves in the plane of the table, seen from above.

Joints 1 and 2 carry two links of equal length, joint 3 turns the hand. Joints 4 to 6 do not show from above: a real
arm levels its tool with them, and here they follow joints 1 and 2 as such an arm's would, so that all six move.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LINK = 0.42  # m, both links
JOINTS = 6
# The ranges of an ARX R5; the game uses a part of them.
LOWER = np.array([-3.14, -0.05, -0.1, -1.6, -1.57, -2.0])
UPPER = np.array([2.618, 3.5, 3.2, 1.55, 1.57, 2.0])


@dataclass(frozen=True)
class PlanarArm:
    """One arm. base: x, y (m); side: +1 has its elbow on the right of the line to its hand, -1 on the left.

    Joint 1 is 0 when the upper link points up the table (+y); joint 2 is 0 when the arm is stretched.
    """

    base: tuple[float, float]
    side: int

    def joints(self, x: Array | float, y: Array | float) -> Array:
        """Joint angles [..., 6] (rad) that put the hand at (x, y), pointing up the table.

        A point beyond reach is replaced by the nearest one within, in the same direction.
        """
        dx, dy = np.asarray(x, np.float64) - self.base[0], np.asarray(y, np.float64) - self.base[1]
        stretch = np.clip(np.hypot(dx, dy) / (2 * LINK), 0.1, 0.999)
        q2 = 2 * np.arccos(stretch)
        q1 = np.arctan2(dy, dx) - np.pi / 2 - self.side * q2 / 2
        q3 = self.side * q1 + q2
        return np.stack([q1, q2, q3, 1.2 * stretch - 0.6, 0.4 * q1, 0.3 * q2], axis=-1)

    def points(self, q: Array) -> Array:
        """Base, elbow and hand of joint angles [6], each (x, y) in m: [3, 2]."""
        base = np.array(self.base)
        return np.stack([base, base + _link(q[0]), self.hand(q)])

    def hand(self, q: Array) -> Array:
        """Where the hand of joint angles [..., 6] is, [..., 2] m."""
        q = np.asarray(q, np.float64)
        hand: Array = np.array(self.base) + _link(q[..., 0]) + _link(q[..., 0] + self.side * q[..., 1])
        return hand

    def heading(self, q: Array) -> float:
        """Direction in which the hand points, rad from +y, anticlockwise."""
        return float(q[0] + self.side * (q[1] - q[2]))


def _link(angle: Array) -> Array:
    """One link at an angle from +y, [..., 2]."""
    return LINK * np.stack([-np.sin(angle), np.cos(angle)], axis=-1)
