"""A simulated camera: a picture that moves, at its native rate, each with its number and time readable in it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import Field

from chatvla_edge.drivers.errors import DeviceLostError, DeviceNotFoundError, DeviceUnsuitableError
from chatvla_edge.drivers.protocols import CameraHealth, Frame, Image, Options
from chatvla_edge.drivers.sim import stamp
from chatvla_edge.drivers.sim.faults import LOOK_SECONDS, Faults, PlannedFault

CameraFault = Literal["silent", "frozen", "slow", "black", "error", "unplugged", "clock_step", "hang", "crash"]
"""silent: no frames; frozen: new frames with new stamps show the old picture; slow: a quarter of the rate; black: black
pictures; error: `read` raises what no driver promises; unplugged: the stream ends and cannot be opened; clock_step:
capture times are a second behind; hang: calls do not return; crash: the process aborts."""

SLOW = 4  # every how-manieth frame a slow camera delivers
STEP_NS = 1_000_000_000
SQUARE = 8  # the moving square's side is this part of the height


class PlannedCameraFault(PlannedFault):
    """One fault of a camera."""

    kind: CameraFault


class SimCameraOptions(Options):
    """Options of the driver `sim_camera`.

    Attributes:
        latency: from exposure to arrival, s.
        seed: of the background.
        faults: planned ones.
        fault_switch: a file that says the present fault, see `drivers/sim/faults.py`.
    """

    latency: float = Field(default=0.03, ge=0, le=1)
    seed: int = Field(default=0, ge=0)
    faults: tuple[PlannedCameraFault, ...] = ()
    fault_switch: Path | None = None


class PacedCamera:
    """A camera that is asked for its picture when one is due, and all that may be wrong with it.

    Whoever derives from it says what is seen (`_start`, `_see`); rate, numbers and faults are the same for all.
    """

    def __init__(
        self,
        options: SimCameraOptions,
        now: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.options = options
        self._now, self._sleep = now, sleep
        planned = [(fault.kind, fault.after, fault.lasts) for fault in options.faults]
        self._faults = Faults(planned, options.fault_switch, get_args(CameraFault), now)
        self._image: Image | None = None
        self._open = False

    def open(self, height: int, width: int, rate: float) -> None:
        """Start the stream. Raises DeviceNotFoundError while unplugged, and what `_start` raises."""
        self._faults.start()
        if self._faults.suffer() == "unplugged":
            raise DeviceNotFoundError("found no camera: it is unplugged on purpose (a simulated camera)")
        self._period_ns = round(1e9 / rate)
        self._latency_ns = round(1e9 * self.options.latency)
        self._start(height, width)
        self._image = None
        self._begin_ns = self._now()
        self._last = -1
        self._health = CameraHealth()
        self._open = True

    def read(self, timeout: float) -> Frame:
        """The newest frame, waited for at most ``timeout`` s. Raises TimeoutError, DeviceLostError."""
        end_ns = self._now() + round(1e9 * timeout)
        while True:
            fault = self._faults.suffer()
            if fault == "unplugged":
                self._open = False
            if not self._open:
                raise DeviceLostError("the stream has ended (a simulated camera). Close it and open it again.")
            if fault == "error":
                raise RuntimeError("an error on purpose (a simulated camera)")
            now_ns = self._now()
            due = (now_ns - self._begin_ns - self._latency_ns) // self._period_ns
            if fault == "slow":
                due -= due % SLOW
            if due > self._last and fault != "silent":
                return self._frame(due, fault)
            if now_ns >= end_ns:
                raise TimeoutError(f"no frame within {timeout} s (a simulated camera)")
            next_ns = self._begin_ns + self._latency_ns + (self._last + 1) * self._period_ns
            wait = min(max(next_ns - now_ns, 0), end_ns - now_ns) * 1e-9
            # A camera that is silent or slow, or whose switch may be thrown, is asked again before long.
            self._sleep(max(min(wait, LOOK_SECONDS), 1e-4))

    def health(self) -> CameraHealth:
        """What was counted."""
        return self._health

    def close(self) -> None:
        """Stop the stream."""
        self._faults.stop()
        self._open = False

    def _start(self, height: int, width: int) -> None:
        raise NotImplementedError

    def _see(self, number: int, due_ns: int) -> tuple[Image, int]:
        """The picture number ``number`` of the instant ``due_ns``, and the host time that it really shows."""
        raise NotImplementedError

    def _facts(self) -> dict[str, str | int | float | bool]:
        return {}

    def _frame(self, number: int, fault: str) -> Frame:
        captured_ns = self._begin_ns + number * self._period_ns
        if self._image is None or fault not in ("frozen", "black"):
            self._image, captured_ns = self._see(number, captured_ns)
        image = np.zeros_like(self._image) if fault == "black" else self._image
        health = self._health
        self._health = CameraHealth(health.frames + 1, health.lost + number - self._last - 1, facts=self._facts())
        self._last = number
        if fault == "clock_step":
            captured_ns -= STEP_NS
        return Frame(image, captured_ns, self._now(), number, "device")


class SimCamera(PacedCamera):
    """A square moves over a background of coloured waves; the stamp (`drivers/sim/stamp.py`) is in the top eighth."""

    OPTIONS: ClassVar[type[Options]] = SimCameraOptions

    def _start(self, height: int, width: int) -> None:
        if height < stamp.SMALLEST[0] or width < stamp.SMALLEST[1]:
            least = "x".join(map(str, stamp.SMALLEST))
            raise DeviceUnsuitableError(f"found {height}x{width} for a sim_camera, expected at least {least}")
        self._background = _waves(height, 2 * width, self.options.seed)
        self._canvas = np.empty((height, width, 3), np.uint8)

    def _see(self, number: int, due_ns: int) -> tuple[Image, int]:
        image = self._canvas
        height, width = image.shape[:2]
        left = 3 * number % width
        image[:] = self._background[:, left : left + width]
        side = height // SQUARE
        top = height // SQUARE + 2 * number % (height - side - height // SQUARE)
        across = 5 * number % (width - side)
        image[top : top + side, across : across + side] = (250, 200, 40)
        stamp.write(image, number, due_ns)
        return image, due_ns


def _waves(height: int, width: int, seed: int) -> npt.NDArray[np.uint8]:
    """A background [H, W, 3] that goes on seamlessly from its right edge to its left, twice over."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    channels = [
        128 + 90 * np.sin(2 * np.pi * (2 * turns * x / width + y / height) + phase)
        for turns, phase in zip((1, 2, 3), random.uniform(0, 2 * np.pi, 3), strict=True)
    ]
    return np.stack(channels, axis=-1).astype(np.uint8)
