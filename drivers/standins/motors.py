"""The motors of an ARX arm in software: each answers in its own protocol and moves as a driven mass with damping.

What is told as feed-forward torque is taken to balance the arm's weight exactly, so nothing here shows that it does.
A motor that hears nothing more goes on with what it was told last.
"""

from chatvla_edge.drivers.arms import can_motors
from chatvla_edge.drivers.arms.can_motors import Family, Target

STEP = 0.001  # s; the stiffest joint swings at 6 Hz
MOTORS: dict[str, dict[int, Family]] = {
    "L5": {1: "damiao", 2: "damiao", 4: "damiao", 5: "damiao", 6: "damiao", 7: "damiao", 8: "damiao"},
    "X5": {1: "ec", 2: "ec", 4: "ec", 5: "damiao", 6: "damiao", 7: "damiao", 8: "damiao"},
}
# Off zero: the vendor's library takes an arm whose joints all read exactly zero for one that is not there. The gripper
# stands half open. rad at the motor.
START = {1: 0.1, 2: 0.4, 4: 0.5, 5: -0.2, 6: 0.1, 7: -0.1, 8: 2.5}
INERTIA = {1: 0.05, 2: 0.05, 4: 0.05, 5: 0.02, 6: 0.02, 7: 0.012, 8: 0.003}  # kg m2
STICTION = 0.05  # Nm; without it a damped joint would follow the 0.01 rad/s to which a velocity of zero is rounded
LIMP = Target(0.0, 0.0, 0.0, 0.0, 0.0)


class Motor:
    """One motor. ``now``: host time, s."""

    def __init__(self, number: int, family: Family, now: float, position: float | None = None) -> None:
        self.number = number
        self.family = family
        self.position = START.get(number, 0.0) if position is None else position
        self.velocity = 0.0
        self.inertia = INERTIA.get(number, 0.02)
        self.target = LIMP
        self.enabled = family == "ec"
        self.error = 0
        self.load = 0.0  # Nm from outside
        self.stuck = False
        self.silent = False
        self.then = now

    def advance(self, now: float) -> None:
        """Move on to ``now``."""
        left = min(now - self.then, 0.25)
        self.then = now
        if self.stuck:
            self.velocity = 0.0
            return
        target = self.target if self.enabled and not self.error else LIMP
        while left > 0:
            step = min(left, STEP)
            left -= step
            push = target.kp * (target.position - self.position) + self.load
            if abs(self.velocity) < 0.02 and abs(push + target.kd * target.velocity) < STICTION:
                self.velocity = 0.0
                continue
            # The damping is taken at the end of the step, or a stiff damper would swing up.
            self.velocity = (self.velocity + step / self.inertia * (push + target.kd * target.velocity)) / (
                1 + step / self.inertia * (target.kd + 0.02)
            )
            self.position += self.velocity * step

    @property
    def torque(self) -> float:
        """Nm that it exerts beyond what balances the weight."""
        if not self.enabled or self.error:
            return 0.0
        target = self.target
        return target.kp * (target.position - self.position) + target.kd * (target.velocity - self.velocity)

    def hear(self, data: bytes, now: float) -> tuple[int, bytes] | None:
        """Take a frame that is addressed to it and return its answer (id, data), None for silence."""
        self.advance(now)
        if self.silent:
            return None
        if self.family == "ec":
            if data[0] >> 5 == 7:
                return can_motors.ec_position_reply(self.number, self.position) if data[1] == 1 else None
            if len(data) == 8 and data[0] >> 5 == 0:
                self.target = can_motors.ec_target(data)
            return can_motors.ec_reply(self.number, self.error, self.position, self.velocity, self.torque / 1.96)
        if len(data) != 8:
            return None
        if data == can_motors.ENABLE:
            self.enabled = True
            self.target = LIMP
        elif data == can_motors.DISABLE:
            self.enabled = False
        elif data == can_motors.CLEAR:
            if self.error:
                self.error, self.enabled = 0, False
        elif data == can_motors.ZERO:
            self.position = 0.0
        else:
            self.target = can_motors.damiao_target(data)
        status = self.error or (can_motors.DAMIAO_ENABLED if self.enabled else can_motors.DAMIAO_DISABLED)
        return can_motors.damiao_reply(self.number, status, self.position, self.velocity, self.torque)
