"""Franka FR3 through `franky`, the fallback for `franka-rs`: libfranka with a torque controller of its own at 1 kHz.

A command is a write into that controller's reference. Unlike `franka-rs` it can set the load, and it has no generator
between the target and the torques: what it is told it pulls towards, so the rig's limits are all that smooths.
Wheels are x86-64 only; one wheel speaks one FCI version (10 on PyPI). Never in one process with `pylibfranka`.
"""

import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from chatvla_edge.drivers.arms import franka_limits
from chatvla_edge.drivers.arms.packets import PacketClock
from chatvla_edge.drivers.errors import (
    DeviceFaultError,
    DeviceLostError,
    DeviceNotFoundError,
    DeviceUnsuitableError,
    MissingLibraryError,
)
from chatvla_edge.drivers.protocols import ArmState, AxisBounds, Manners, Options

Positive = Annotated[float, Field(gt=0)]
Joints = tuple[float, float, float, float, float, float, float]
ZEROS = (0.0,) * 9
ENDING = 2.0  # s within which a motion that is stopped is over


class FrankyOptions(Options):
    """One arm.

    Attributes:
        address: of its control box.
        realtime: `enforce` or `ignore`, as for `franka_rs`.
        stiffness: Nm/rad; the damping is critical.
        contact, collision: Nm at which a joint reports a contact, and ends the motion.
        load: kg beyond the tool that Desk knows, with its centre (m, in the flange's frame) and inertia (kg m2, row by
            row); 0 kg is set too.
    """

    address: str
    realtime: Literal["enforce", "ignore"] = "enforce"
    stiffness: Joints = (600.0, 600.0, 600.0, 600.0, 250.0, 150.0, 50.0)
    contact: Positive = 40.0
    collision: Positive = 40.0
    load: Annotated[float, Field(ge=0)] = 0.0
    load_centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    load_inertia: tuple[float, float, float, float, float, float, float, float, float] = ZEROS


class Franky:
    """One arm, seven axes `joint1` to `joint7`, rad. While no motion runs, `state` waits for the arm's next packet."""

    OPTIONS: ClassVar[type[Options]] = FrankyOptions
    MANNERS: ClassVar[Manners] = Manners(
        stop="brake",
        on_open="no motion; sets the load and the thresholds of its reflexes",
        on_close="ends the motion; the arm's own controller holds it",
        on_death="20 lost packets (20 ms): the arm brakes by itself and holds",
        pacing="device",
    )

    def __init__(self, options: FrankyOptions) -> None:
        self.options = options
        self._library: Any = None
        self._robot: Any = None
        self._tracker: Any = None
        self._fault = ""
        self._told: list[float] | None = None
        self._clock = PacketClock(0)

    @property
    def axes(self) -> Sequence[str]:
        """`joint1` to `joint7`."""
        return franka_limits.AXES

    def bounds(self) -> AxisBounds:
        """The FR3's: the wheels of this library speak to no other."""
        return franka_limits.BOUNDS["fr3"]

    # ---------------------------------------------------------------------------------------------------- open, close

    def open(self, rate: float) -> None:
        """Connect, set load and thresholds; nothing moves."""
        try:
            import franky
        except ImportError as error:
            raise MissingLibraryError(f"{error}; pip install franky-control") from error
        options = self.options
        self._library = franky
        self._fault, self._clock = "", PacketClock(time.monotonic_ns())
        mode = franky.RealtimeConfig.Ignore if options.realtime == "ignore" else franky.RealtimeConfig.Enforce
        try:
            self._robot = franky.Robot(options.address, realtime_config=mode)
            if not self._robot.has_errors:
                self._robot.set_load(options.load, list(options.load_centre), list(options.load_inertia))
                contact, collision = [options.contact] * 7, [options.collision] * 7
                self._robot.set_collision_behavior(contact, collision, contact[:6], collision[:6])
        except (franky.RealtimeException, franky.IncompatibleVersionException) as error:
            raise DeviceUnsuitableError(f"{options.address}: {error}") from error
        except franky.Exception as error:
            raise DeviceNotFoundError(
                f"{options.address}: {error}; check the address, brakes open in Desk, FCI active, nobody else connected"
            ) from error

    def close(self) -> None:
        """End the motion and let go."""
        if self._robot is not None and self._tracker is not None:
            self.stop()
        self._robot = None

    # ------------------------------------------------------------------------------------------------------ while open

    def command(self, position: npt.NDArray[np.float64]) -> None:
        """Set the reference. The first one begins the motion, with the reference where the arm is."""
        if len(position) != franka_limits.JOINTS or not np.isfinite(position).all():
            raise ValueError(f"{self.options.address}: found the command {position}, expected seven finite numbers")
        if self._fault:
            return  # `state` says so; the arm has stopped by itself
        robot = self._opened()
        try:
            if self._tracker is None:
                self._tracker = self._library.JointImpedanceTracker(robot, stiffness=np.array(self.options.stiffness))
            self._told = position.tolist()
            self._tracker.set_target(np.array(position))
        except (self._library.Exception, self._library.ControlException) as error:
            self._tracker, self._told, self._fault = None, None, str(error)

    def state(self) -> ArmState:
        """The newest that the arm sent. Raises DeviceLostError where it sends no more."""
        asked = time.monotonic_ns()
        robot = self._opened()
        if self._tracker is not None and not robot.is_in_control:
            self._notice()
        try:
            said = robot.state
            robot_ms = round(1000 * said.time.to_sec())
        except self._library.Exception as error:
            raise DeviceLostError(f"{self.options.address}: {error}; check the cable and the control box") from error
        if self._tracker is None:
            self._clock.waited(robot_ms, asked)
        else:
            self._clock.look(robot_ms, asked, time.monotonic_ns())
        mode = str(said.robot_mode).rpartition(".")[2]
        well = mode.lower() in ("idle", "move")
        return ArmState(
            position=np.asarray(said.q).tolist(),
            captured_ns=self._clock.captured_ns,
            sequence=self._clock.sequence,
            velocity=np.asarray(said.dq).tolist(),
            effort=np.asarray(said.tau_J).tolist(),
            target=self._told,
            fault=self._fault or ("" if well else f"the arm is in mode {mode}"),
        )

    def stop(self) -> None:
        """End the motion, 0.5 s: the arm brakes and holds by itself."""
        robot, tracker = self._opened(), self._tracker
        self._tracker = self._told = None
        if tracker is None:
            return
        try:
            tracker.stop()
        except (self._library.Exception, self._library.ControlException) as error:
            # A motion that is preempted has ended because it was told to.
            if "preempted" not in str(error).lower():
                self._fault = str(error)
        end = time.monotonic() + ENDING
        while robot.is_in_control and time.monotonic() < end:
            time.sleep(0.002)

    def _notice(self) -> None:
        """The motion has ended by itself: keep why."""
        self._tracker = self._told = None
        try:
            self._opened().join_motion()
        except (self._library.Exception, self._library.ControlException) as error:
            self._fault = str(error)
        self._fault = self._fault or "the motion has ended by itself"

    def clear(self) -> None:
        """End a reflex; nothing moves."""
        robot = self._opened()
        try:
            recovered = robot.recover_from_errors()
        except self._library.Exception as error:
            raise DeviceFaultError(f"{self.options.address}: {error}; open Desk, release the stop button") from error
        if recovered is False or robot.has_errors:
            raise DeviceFaultError(f"{self.options.address}: still has errors; open Desk, release the stop button")
        self._fault = ""

    def _opened(self) -> Any:
        if self._robot is None:
            raise DeviceLostError(f"{self.options.address}: is not open")
        return self._robot
