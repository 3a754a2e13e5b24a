"""Simulated arms and grippers: axes that follow their commands as a servo of limited strength does.

Each axis is a first- or second-order position servo whose acceleration, speed and range end where the device's do.
Time is the host's: every call first lets the device's own 1 ms cycles catch up with it.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from chatvla_edge.drivers.errors import DeviceFaultError, DeviceLostError, DeviceNotFoundError
from chatvla_edge.drivers.protocols import ArmState, AxisBounds, Manners, Options
from chatvla_edge.drivers.sim.bodies import BODIES, Body, BodyName
from chatvla_edge.drivers.sim.faults import Faults, PlannedFault

Array = npt.NDArray[np.float64]

CYCLE_NS = 1_000_000  # the simulated controller's own
CATCH_UP = 1000  # cycles at most per call: a process that slept longer finds its arm where it would be after a second

ArmFault = Literal["silent", "frozen", "nan", "error", "unplugged", "fault", "hang", "crash"]
"""silent: no answer reaches the host and no command the arm, which holds; frozen: answers go on, the axes stand still;
nan: positions are not numbers; error: calls raise what no driver promises; unplugged: the connection is gone and no new
one is made; fault: the arm reports a fault and stands until `clear`; hang: calls do not return; crash: the process
aborts."""


class PlannedArmFault(PlannedFault):
    """One fault of an arm."""

    kind: ArmFault


class SimArmOptions(Options):
    """Options of the drivers `sim_arm` and `sim_gripper`.

    Attributes:
        body: whose axes, ranges and speeds.
        start: `[axes]` rad or m where the axes stand at first; null for the body's own.
        order: 1: the speed heads for what the distance asks; 2: a critically damped spring.
        lag: how far (s) a moving axis is behind its target.
        delay: how long (s) a command is on its way to the motors.
        noise: standard deviation of a measured position, rad or m.
        seed: of the noise.
        object_width: what stands between the fingers, m; null for nothing.
        faults: planned ones.
        fault_switch: a file that says the present fault, see `drivers/sim/faults.py`.
    """

    body: BodyName
    start: tuple[float, ...] | None = None
    order: Literal[1, 2] = 1
    lag: float = Field(default=0.02, ge=0.004, le=1)
    delay: float = Field(default=0.0, ge=0, le=1)
    noise: float = Field(default=0.0, ge=0, le=0.1)
    seed: int = Field(default=0, ge=0)
    object_width: float | None = Field(default=None, gt=0)
    faults: tuple[PlannedArmFault, ...] = ()
    fault_switch: Path | None = None

    @model_validator(mode="after")
    def _start_fits(self) -> "SimArmOptions":
        body = BODIES[self.body]
        if self.start is not None:
            if len(self.start) != len(body.axes):
                raise ValueError(f"start has {len(self.start)} numbers, expected {len(body.axes)}: one per axis")
            for axis, low, at, high in zip(body.axes, body.lower, self.start, body.upper, strict=True):
                if not low <= at <= high:
                    raise ValueError(f"start has {axis} at {at}, expected {low} to {high}")
        return self


class Servos:
    """The axes of a body, stepped in cycles of 1 ms."""

    def __init__(self, body: Body, start: Sequence[float], order: int, lag: float) -> None:
        self.lower = np.array(body.lower)
        self.upper = np.array(body.upper)
        self.speed = np.array(body.velocity)
        self.strength = np.array(body.strength)
        self.order = order
        self.stiffness = 1 / lag if order == 1 else 2 / lag  # a critically damped spring lags by 2 / its frequency
        self.position: Array = np.array(start, np.float64)
        self.velocity: Array = np.zeros_like(self.position)
        self.target: Array = self.position.copy()
        self.contact: float | None = None  # the last axis closes no further than this

    def step(self) -> None:
        """One cycle."""
        dt = 1e-9 * CYCLE_NS
        away = self.target - self.position
        if self.order == 1:
            pull = (self.stiffness * away - self.velocity) / dt
        else:
            pull = self.stiffness**2 * away - 2 * self.stiffness * self.velocity
        np.minimum(pull, self.strength, out=pull)
        np.maximum(pull, -self.strength, out=pull)
        velocity = self.velocity + dt * pull
        np.minimum(velocity, self.speed, out=velocity)
        np.maximum(velocity, -self.speed, out=velocity)
        position = self.position + dt * velocity
        np.minimum(position, self.upper, out=position)
        np.maximum(position, self.lower, out=position)
        if self.contact is not None and position[-1] < self.contact:
            position[-1] = self.contact
        # An axis that met its end, or an object, has the speed it really had.
        self.velocity = (position - self.position) / dt
        self.position = position

    @property
    def touches(self) -> bool:
        """Whether the last axis presses on the object."""
        return self.contact is not None and bool(self.position[-1] <= self.contact and self.target[-1] < self.contact)


class FaultyArm:
    """An arm's life and its faults on purpose; whoever derives from it says how its axes are read and driven."""

    def __init__(
        self, name: str, planned: Sequence[PlannedArmFault], switch: Path | None, now: Callable[[], int]
    ) -> None:
        self._name = name
        self._now = now
        self._faults = Faults(
            [(fault.kind, fault.after, fault.lasts) for fault in planned], switch, get_args(ArmFault), now
        )
        self._state: ArmState | None = None
        self._open = False
        self._faulted = False

    def open(self, rate: float) -> None:
        """Connect; ``rate`` changes nothing. Raises DeviceNotFoundError, DeviceLostError as its faults want it."""
        self._faults.start()
        fault = self._faults.suffer()
        if fault == "unplugged":
            raise DeviceNotFoundError(f"found no {self._name}: it is unplugged on purpose (simulated)")
        if fault == "silent":
            raise DeviceLostError(f"{self._name}: no answer, on purpose (simulated)")
        self._connect()
        self._open = True
        self.state()

    def state(self) -> ArmState:
        """The newest answer, at once. Raises DeviceLostError."""
        fault = self._suffer()
        self._pass(moving=fault != "frozen")
        if fault == "silent" and self._state is not None:
            return self._state  # the same answer again, as old as it is
        state = self._read()
        if fault == "nan":
            state = replace(state, position=[float("nan")] * len(state.position))
        if self._faulted:
            state = replace(state, fault="a fault on purpose (simulated)")
        self._state = state
        return state

    def command(self, position: npt.NDArray[np.float64]) -> None:
        """Head for ``position`` [axes]. Raises DeviceLostError, ValueError for what is not finite."""
        fault = self._suffer()
        self._pass(moving=fault != "frozen")
        target = np.array(position, np.float64)
        axes = len(self._state.position) if self._state is not None else 0
        if target.shape != (axes,) or not np.isfinite(target).all():
            raise ValueError(f"{self._name}: found the command {target.tolist()}, expected {axes} finite numbers")
        if fault != "silent" and not self._faulted:
            self._send(target)

    def stop(self) -> None:
        """Hold: brake as hard as the axes can, and stay."""
        self._pass(moving=self._suffer() != "frozen")
        self._hold()

    def clear(self) -> None:
        """End a fault. Raises DeviceFaultError while it is still being injected."""
        if self._suffer() == "fault":
            raise DeviceFaultError(f"{self._name}: the fault on purpose is still there (simulated)")
        self._faulted = False

    def close(self) -> None:
        """Let go; the axes hold."""
        self._faults.stop()
        self._open = False

    def _suffer(self) -> str:
        """The present fault, after what it does to every call."""
        fault = self._faults.suffer()
        if fault == "unplugged":
            self._open = False
        if not self._open:
            raise DeviceLostError(f"{self._name}: no connection (simulated). Close it and open it again.")
        if fault == "error":
            raise RuntimeError("an error on purpose (simulated)")
        if fault == "fault" and not self._faulted:
            self._faulted = True
            self._hold()
        return fault

    def _connect(self) -> None:
        raise NotImplementedError

    def _pass(self, moving: bool) -> None:
        """Time has passed; ``moving``: whether the axes took part in it."""

    def _read(self) -> ArmState:
        raise NotImplementedError

    def _send(self, target: Array) -> None:
        raise NotImplementedError

    def _hold(self) -> None:
        """Head for where the axes come to rest if they brake now."""
        raise NotImplementedError


class SimArm(FaultyArm):
    """An arm of nothing but numbers. It starts where its options say, in every new process again."""

    OPTIONS: ClassVar[type[Options]] = SimArmOptions
    MANNERS: ClassVar[Manners] = Manners(
        stop="hold",
        on_open="stands at its start position, without motion",
        on_close="holds the last command; a later open finds it there",
        on_death="is gone, and stands at its start position when it is opened again",
        pacing="host",
    )

    def __init__(self, options: SimArmOptions, now: Callable[[], int] = time.monotonic_ns) -> None:
        super().__init__(options.body, options.faults, options.fault_switch, now)
        self.options = options
        self.body = BODIES[options.body]
        start = self.body.start if options.start is None else options.start
        self._servos = Servos(self.body, start, options.order, options.lag)
        self._servos.contact = options.object_width
        self._random = np.random.default_rng(options.seed)
        self._coming: deque[tuple[int, Array]] = deque()
        self._cycle = 0  # host time in device cycles

    @property
    def axes(self) -> Sequence[str]:
        """Names of the axes."""
        return self.body.axes

    def bounds(self) -> AxisBounds:
        """The limits of the device that this one stands for."""
        return self.body.bounds()

    def _connect(self) -> None:
        if self._cycle == 0:
            self._cycle = self._now() // CYCLE_NS - 1

    def _read(self) -> ArmState:
        servos = self._servos
        position = servos.position
        if self.options.noise:
            position = position + self.options.noise * self._random.standard_normal(position.shape)
        return ArmState(
            position=position.tolist(),
            captured_ns=self._cycle * CYCLE_NS,
            sequence=self._cycle,
            velocity=servos.velocity.tolist(),
            target=servos.target.tolist(),
        )

    def _send(self, target: Array) -> None:
        self._coming.append((self._now() // CYCLE_NS + round(1e9 * self.options.delay / CYCLE_NS), target))

    def _hold(self) -> None:
        servos = self._servos
        self._coming.clear()
        servos.target = servos.position + np.sign(servos.velocity) * servos.velocity**2 / (2 * servos.strength)

    def _pass(self, moving: bool) -> None:
        """Let the device's cycles catch up with the host's time."""
        until = self._now() // CYCLE_NS
        servos = self._servos
        for cycle in range(max(self._cycle, until - CATCH_UP), until):
            while self._coming and self._coming[0][0] <= cycle:
                servos.target = self._coming.popleft()[1]
            if moving:
                servos.step()
        self._cycle = max(self._cycle, until)


class SimGripper(SimArm):
    """A gripper that is a device of its own."""

    MANNERS: ClassVar[Manners] = Manners(
        stop="keep_force",
        on_open="stands at its start position, without motion",
        on_close="keeps what it holds",
        on_death="is gone, and stands at its start position when it is opened again",
        pacing="host",
    )

    def stop(self) -> None:
        """Stay; what is held stays held, since the target inside of it stays."""
        self._pass(moving=self._suffer() != "frozen")
        if not self._servos.touches:
            self._hold()

    def holds(self) -> bool | None:
        """Whether it presses on the object of its options."""
        return self._servos.touches
