"""The arms and cameras of a shared world (`drivers/sim/world.py`); each world derives its own two from these."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from chatvla_edge.drivers.errors import DeviceUnsuitableError
from chatvla_edge.drivers.protocols import ArmState, Image, Manners, Options
from chatvla_edge.drivers.sim.arm import FaultyArm, PlannedArmFault
from chatvla_edge.drivers.sim.camera import PacedCamera, SimCameraOptions
from chatvla_edge.drivers.sim.world import Link, WorldSpec

Array = npt.NDArray[np.float64]

WORLD_MANNERS = Manners(
    stop="hold",
    on_open="stands where the world has it, without motion",
    on_close="holds the last command; the world ends when it has had no device for 5 s",
    on_death="holds the last command; the world ends when it has had no device for 5 s",
    pacing="device",
)


class WorldArmOptions(Options):
    """What the arm of every world may be told.

    Attributes:
        world: the world's name: devices with the same name, of the same user, share one.
        faults: planned ones.
        fault_switch: a file that says the present fault, see `drivers/sim/faults.py`.
    """

    world: str = Field(default="world", pattern=r"^[a-z0-9_-]{1,40}$")
    faults: tuple[PlannedArmFault, ...] = ()
    fault_switch: Path | None = None


class WorldCameraOptions(SimCameraOptions):
    """What the camera of every world may be told; ``world`` as for its arms."""

    world: str = Field(default="world", pattern=r"^[a-z0-9_-]{1,40}$")
    latency: float = Field(default=0.0, ge=0, le=1)


class WorldArm(FaultyArm):
    """One arm of a world. The world's own cycle paces it: a command is a target for its next step."""

    MANNERS: ClassVar[Manners] = WORLD_MANNERS

    def __init__(
        self, name: str, spec: WorldSpec, options: WorldArmOptions, now: Callable[[], int] = time.monotonic_ns
    ) -> None:
        super().__init__(f"{spec.name}.{name}", options.faults, options.fault_switch, now)
        self._arm, self._spec = name, spec
        self._link: Link | None = None
        self._held: Array | None = None

    def close(self) -> None:
        """Let go; the arm holds."""
        super().close()
        if self._link is not None:
            self._link.close()
            self._link = None

    def tell(self, **message: Any) -> dict[str, Any]:
        """A word to the world, as its own documentation says; the answer. Raises ValueError, DeviceLostError."""
        assert self._link is not None
        return self._link.tell(**message)

    def _connect(self) -> None:
        if self._link is not None:
            self._link.close()
        self._link = Link(self._spec, "arm", self._arm)

    def _pass(self, moving: bool) -> None:
        """A motor that is dead on purpose is told to stay where it is."""
        if moving:
            self._held = None
        elif self._held is None:
            self._held = np.array(self._read().position)
            assert self._link is not None
            self._link.send(self._held)

    def _read(self) -> ArmState:
        assert self._link is not None
        now = self._link.now()
        first, last = self._link.arms[self._arm]
        return ArmState(
            position=now.position[first:last].tolist(),
            captured_ns=now.time_ns,
            sequence=now.sequence,
            velocity=now.velocity[first:last].tolist(),
            target=now.target[first:last].tolist(),
        )

    def _send(self, target: Array) -> None:
        if self._held is None:
            assert self._link is not None
            self._link.send(target)

    def _hold(self) -> None:
        self._send(np.array(self._read().position))


class Artist(Protocol):
    """Draws a world from its scene, in the camera's process."""

    def draw(self, scene: Array, height: int, width: int) -> Image:
        """`[H, W, 3]` RGB, the caller's until the next call."""

    @property
    def facts(self) -> dict[str, str | int | float | bool]:
        """What is to be said about the pictures."""


class WorldCamera(PacedCamera):
    """A camera of a world. It draws when a frame is asked for; what it cannot draw in time is lost, and counted."""

    def __init__(
        self,
        spec: WorldSpec,
        options: WorldCameraOptions,
        artist: Callable[[], Artist],
        now: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(options, now, sleep)
        self._spec = spec
        self._artist = artist
        self._drawer: Artist | None = None
        self._link: Link | None = None
        self._seconds = 0.0  # a picture takes, smoothed

    def close(self) -> None:
        """Stop the stream."""
        super().close()
        if self._link is not None:
            self._link.close()
            self._link = None

    def _start(self, height: int, width: int) -> None:
        if self._link is not None:
            self._link.close()
        self._link = Link(self._spec, "camera", "camera")
        self._size = (height, width)
        if self._drawer is None:
            self._drawer = self._artist()
        if self._drawer.draw(self._link.now().scene, height, width).shape != (height, width, 3):
            raise DeviceUnsuitableError(f"the world {self._spec.name!r} does not draw pictures of {height}x{width}")

    def _see(self, number: int, due_ns: int) -> tuple[Image, int]:
        assert self._link is not None
        assert self._drawer is not None
        world = self._link.now()
        begin = time.perf_counter()
        image = self._drawer.draw(world.scene, *self._size)
        taken = time.perf_counter() - begin
        self._seconds += (taken - self._seconds) * (0.1 if self._seconds else 1.0)
        return image, world.time_ns

    def _facts(self) -> dict[str, str | int | float | bool]:
        assert self._drawer is not None
        return {"picture_ms": round(1e3 * self._seconds, 2), **self._drawer.facts}
