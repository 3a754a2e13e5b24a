"""Franka FR3 and Panda (FER) through `franka-rs`, whose Rust thread owns the 1 kHz packet clock.

A command is one write into that thread's target, so it may come at any rate up to 1 kHz; its generator follows under a
share of the arm's own limits, which is to be wider than the rig's. The motion begins with the first command, where the
arm was last told to be, and ends with `stop`. A reflex ends it too, and only `clear` makes the next one possible.
"""

import threading
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

# What the arm itself says it does; all else is a reason not to move.
WELL = {"idle", "move"}


class FrankaRsOptions(Options):
    """One arm.

    Attributes:
        address: of its control box.
        realtime: `enforce` needs a PREEMPT_RT kernel and the right to SCHED_FIFO; `ignore` goes without, for a
            simulator: a real arm ends a motion after 20 late commands.
        generation: `fr3` or `fer` (the Panda); another arm is then refused. None takes the one that answers.
        tracking: `impedance`: the library's torques, soft against what it meets; `robot`: the arm's own controller.
        share: of the arm's velocity, acceleration and jerk limits that the library's generator may use: more than the
            rig's own limits, and little enough that a step beside a lost packet is not too steep for the arm.
        stiffness, damping: of `impedance`, Nm/rad and Nms/rad; None takes the library's.
        contact, collision: Nm at which a joint reports a contact, and ends the motion.
        tool_mass: kg of tool and load as set in Desk, checked at `open`; None for no check. This library cannot set it.
    """

    address: str
    realtime: Literal["enforce", "ignore"] = "enforce"
    generation: Literal["fr3", "fer"] | None = None
    tracking: Literal["impedance", "robot"] = "impedance"
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    stiffness: Joints | None = None
    damping: Joints | None = None
    contact: Positive = 40.0
    collision: Positive = 40.0
    tool_mass: Annotated[float, Field(ge=0)] | None = None


class FrankaRs:
    """One arm, seven axes `joint1` to `joint7`, rad. Its hand, where it has one, is not driven here.

    While no motion runs, `state` waits for the arm's next packet, 1 ms.
    """

    OPTIONS: ClassVar[type[Options]] = FrankaRsOptions
    MANNERS: ClassVar[Manners] = Manners(
        stop="brake",
        on_open="no motion; sets the thresholds of its reflexes",
        on_close="ends the motion; the arm's own controller holds it",
        on_death="20 lost packets (20 ms): the arm brakes by itself and holds",
        pacing="device",
    )

    def __init__(self, options: FrankaRsOptions) -> None:
        self.options = options
        self._library: Any = None
        self._robot: Any = None
        self._motion: Any = None
        self._ending: threading.Thread | None = None
        self._generation: str | None = None
        self._fault = ""
        self._clock = PacketClock(0)
        self._mode = ""
        self._said: Any = None

    @property
    def axes(self) -> Sequence[str]:
        """`joint1` to `joint7`."""
        return franka_limits.AXES

    def bounds(self) -> AxisBounds:
        """Of the generation that answered; before `open` of the one in the options, or the narrower of both."""
        generation = self._generation or self.options.generation
        return franka_limits.BOUNDS[generation] if generation else franka_limits.narrower()

    # ---------------------------------------------------------------------------------------------------- open, close

    def open(self, rate: float) -> None:
        """Connect, find out which arm it is, set the thresholds; nothing moves."""
        try:
            import franka
        except ImportError as error:
            raise MissingLibraryError(f"{error}; pip install 'chatvla-edge[franka]'") from error
        if not hasattr(franka, "JointTargets"):
            raise MissingLibraryError(
                f"found {franka.__file__}, expected the module of franka-rs: pip uninstall the other `franka`"
            )
        options = self.options
        self._library = franka
        try:
            self._robot = franka.Robot(options.address, realtime=options.realtime)
        except franka.FrankaError as error:
            raise self._refused(error) from error
        generation = franka_limits.GENERATIONS.get(self._robot.fci_version)
        if generation is None or options.generation not in (None, generation):
            found = generation or f"FCI {self._robot.fci_version}"
            self.close()
            raise DeviceUnsuitableError(
                f"{options.address}: found {found}, expected {options.generation or 'fr3 or fer'}: limits differ"
            )
        self._generation = generation
        try:
            state = self._robot.read_once()
            if options.tool_mass is not None and abs(state.m_total - options.tool_mass) > 0.05:
                raise DeviceUnsuitableError(
                    f"{options.address}: found a tool and load of {state.m_total:.2f} kg in the control box, expected"
                    f" {options.tool_mass:.2f}: set mass, centre and inertia in Desk; wrong ones move the arm by itself"
                )
            torque = ([options.contact] * 7, [options.collision] * 7)
            force = ([options.contact] * 6, [options.collision] * 6)
            if state.robot_mode == "idle":
                self._robot.set_collision_behavior_simple(*torque, *force)
        except franka.FrankaError as error:
            self.close()
            raise DeviceLostError(f"{options.address}: {error}") from error
        except DeviceUnsuitableError:
            self.close()
            raise
        self._fault, self._clock = "", PacketClock(time.monotonic_ns())

    def _refused(self, error: Exception) -> Exception:
        text = f"{self.options.address}: {error}"
        if "realtime" in str(error).lower() or "scheduling" in str(error).lower():
            return DeviceUnsuitableError(f"{text}; expected a PREEMPT_RT kernel and rtprio (docs: realtime)")
        if "version" in str(error).lower():
            return DeviceUnsuitableError(f"{text}; expected FCI 5 (Panda) or 10 (FR3): update the system image")
        return DeviceNotFoundError(f"{text}; check the address, brakes open in Desk, FCI active, nobody else connected")

    def close(self) -> None:
        """End the motion, at rest where it was last told to be, and let go."""
        if self._motion is not None:
            self.stop()
        if self._ending is not None:
            self._ending.join(4.0)
        self._motion = self._robot = self._ending = None

    # ------------------------------------------------------------------------------------------------------ while open

    def command(self, position: npt.NDArray[np.float64]) -> None:
        """Set the target. The first one begins the motion, which takes some 10 ms."""
        if len(position) != franka_limits.JOINTS or not np.isfinite(position).all():
            raise ValueError(f"{self.options.address}: found the command {position}, expected seven finite numbers")
        if self._fault:
            return  # `state` says so; the arm has stopped by itself
        self._settled()
        if self._ending is not None:
            raise DeviceFaultError(f"{self.options.address}: the motion before has not ended yet")
        if self._motion is None:
            self._begin()
        try:
            self._motion.move_to(position)
        except self._library.FrankaError:
            self._notice()

    def _begin(self) -> None:
        robot = self._opened()
        options = self.options
        impedance = {"joint_stiffness": options.stiffness, "joint_damping": options.damping}
        try:
            self._motion = robot.joint_targets(
                fraction=options.share,
                backend=options.tracking,
                **(impedance if options.tracking == "impedance" else {}),
            )
        except self._library.ControlException as error:
            self._fault = _words(error)
            raise DeviceFaultError(f"{options.address}: {self._fault}") from error
        except self._library.FrankaError as error:
            raise DeviceFaultError(f"{options.address}: cannot begin a motion: {error}") from error

    def state(self) -> ArmState:
        """The newest that the arm sent; while a motion ends (0.3 s) the last one before. Raises DeviceLostError."""
        asked = time.monotonic_ns()
        robot = self._opened()
        self._settled()
        if self._motion is not None and self._ending is None and not self._motion.running:
            self._notice()
        try:
            if self._motion is None:
                said = robot.read_once()
                self._clock.waited(round(1000 * said.time), asked)
            elif self._ending is None:
                said = self._motion.state()
                self._clock.look(round(1000 * said.time), asked, time.monotonic_ns())
            else:
                said = self._said  # the library gives none until the motion has ended
        except self._library.FrankaError as error:
            raise DeviceLostError(f"{self.options.address}: {error}; check the cable and the control box") from error
        self._said = said
        self._mode = said.robot_mode
        return ArmState(
            position=said.q.tolist(),
            captured_ns=self._clock.captured_ns,
            sequence=self._clock.sequence,
            velocity=said.dq.tolist(),
            effort=said.tau_J.tolist(),
            target=said.q_d.tolist(),
            fault=self._fault or ("" if self._mode in WELL else f"the arm is in mode {self._mode}"),
        )

    def _settled(self) -> None:
        """Take note of a stop that has ended its motion."""
        if self._ending is not None and not self._ending.is_alive():
            self._motion = self._ending = None

    def stop(self) -> None:
        """Come to rest at the last target and end the motion, in the background; the arm then holds by itself."""
        motion = self._motion
        if motion is None or self._ending is not None:
            return
        self._ending = threading.Thread(target=self._end, args=(motion,), name="stop", daemon=True)
        self._ending.start()

    def _end(self, motion: Any) -> None:
        try:
            motion.stop()
        except self._library.ControlException as error:
            # A motion that is preempted has ended because it was told to.
            if "preempted" not in str(error).lower():
                self._fault = _words(error)
        except self._library.FrankaError as error:
            self._fault = str(error)

    def _notice(self) -> None:
        """The motion has ended by itself: keep why."""
        motion, self._motion = self._motion, None
        self._end(motion)
        self._fault = self._fault or "the motion has ended by itself"

    def clear(self) -> None:
        """End a reflex; nothing moves."""
        robot = self._opened()
        self._settled()
        if self._motion is not None:
            raise DeviceFaultError(f"{self.options.address}: moves; stop it first")
        try:
            robot.automatic_error_recovery()
            mode = robot.read_once().robot_mode
        except self._library.FrankaError as error:
            raise DeviceFaultError(f"{self.options.address}: {error}; open Desk, release the stop button") from error
        if mode not in WELL:
            raise DeviceFaultError(
                f"{self.options.address}: is in mode {mode} still; release the stop button, open Desk"
            )
        self._fault = ""

    def _opened(self) -> Any:
        if self._robot is None:
            raise DeviceLostError(f"{self.options.address}: is not open")
        return self._robot


def _words(error: Exception) -> str:
    """What a ControlException says: the reflex's reason and flags beside the library's sentence."""
    said = [str(error)]
    reason = getattr(error, "reason", None)
    flags = getattr(error, "errors", None)
    said += [str(reason)] if reason and str(reason) not in said[0] else []
    said += [", ".join(map(str, flags))] if flags and not all(str(flag) in said[0] for flag in flags) else []
    return "; ".join(said)
