"""One camera in a process of its own, killable at any instant, and what runs in it.

    segments = CameraSegments.create("top", 480, 640)
    camera = start_camera(segments, "realsense", {"serial": "123"}, rate=30)

A fresh interpreter in a session of its own reads one JSON line from its standard input, opens the driver and publishes
each frame, newest first, at the camera's own rate. SIGTERM, or the death of the process that started it, ends it.

The loop runs on a thread; the main thread waits for signals and watches the loop, since a vendor's call may never come
back. Should such a call even keep the interpreter's lock, the kernel's alarm ends the process.

    what happens                                          what follows
    no frame for `SILENT` (0.5 s or 5 periods)            state `silent`; no frame, so its age tells the policy, too
    no frame for `LOST` (2 s or 10 periods), device lost,
    or `frozen_s` of pictures that are equal bit by bit   closed, opened again after 0.2, 0.5, 1, 2, 4 s; then exit 1
    library missing, device unsuitable                    exit 3: another attempt would find the same
    a driver's call that does not return                  exit 4, with the call's name, after `HANG` (or `OPENING`)
    an interpreter that stands still                      SIGALRM after `FROZEN_INTERPRETER`

The last words stand on stderr. Who started the process starts it again, or not.
"""

import contextlib
import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.errors import (
    DeviceFaultError,
    DeviceLostError,
    DeviceNotFoundError,
    DeviceUnsuitableError,
    MissingLibraryError,
)
from chatvla_edge.drivers.protocols import Camera, CameraHealth, Frame
from chatvla_edge.drivers.rig import Native
from chatvla_edge.runtime import realtime
from chatvla_edge.runtime.bundle import Resize
from chatvla_edge.runtime.camera_frames import CameraSegments, FrameWriter
from chatvla_edge.runtime.preprocessing import Pipeline

log = logging.getLogger(__name__)

SIGNALS = {signal.SIGTERM, signal.SIGINT}
LOOK_SECONDS = 0.25
WAIT = 0.1  # s: the longest time between two heartbeats while no frame comes
SILENT, SILENT_PERIODS = 0.5, 5
LOST, LOST_PERIODS = 2.0, 10
BACKOFF = (0.2, 0.5, 1.0, 2.0, 4.0)
GOOD_SECONDS = 10.0  # of streaming, after which earlier failures are forgotten
OPENING = 45.0  # s: `open` may take 10, and may reset the device before it
HANG = 3.0  # s: `read` waits for 0.1
LEAVE = 1.0  # s for `close`
FROZEN_INTERPRETER = 10  # s
GAVE_UP, NO_USE, HUNG = 1, 3, 4  # exit codes


# ---------------------------------------------------------------------------------------------- in whoever starts them


def start_camera(
    segments: CameraSegments,
    driver: str,
    options: dict[str, Any],
    rate: float,
    *,
    native: Native | None = None,
    frozen_s: float | None = 1.0,
    priority: int | None = None,
    cpus: Sequence[int] | None = None,
    python: Path | None = None,
    stderr: int | IO[Any] | None = None,
) -> "subprocess.Popen[bytes]":
    """The process of one camera.

    ``driver``: a name of the registry's cameras, or ``module:class``. ``native``: what the device delivers, where that
    is not the size of the slot; each frame is then scaled before it is published. ``frozen_s``: how long pictures may
    be equal bit by bit, None for a source that may show the same for ever. ``priority``: of SCHED_FIFO, None leaves the
    scheduler alone. ``cpus``: None for any. ``python``: another interpreter with this package, where a vendor's SDK
    needs it.
    """
    fds = (segments.frame.fd, segments.status.fd)
    spec = {
        "name": segments.name,
        "driver": driver,
        "options": options,
        "height": segments.height,
        "width": segments.width,
        "native": None if native is None else native.model_dump(),
        "rate": rate,
        "frozen_s": frozen_s,
        "fds": fds,
        "priority": priority,
        "cpus": None if cpus is None else list(cpus),
        "parent": os.getpid(),
    }
    child = subprocess.Popen(  # noqa: S603  # an interpreter of the rig's owner, our own module
        [str(python or sys.executable), "-m", "chatvla_edge.runtime.camera_process"],
        stdin=subprocess.PIPE,
        stderr=stderr,
        pass_fds=fds,
        start_new_session=True,
    )
    assert child.stdin is not None
    # One that died at once has said why on stderr; its exit status tells, not a broken pipe here.
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(json.dumps(spec).encode())
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    return child


# --------------------------------------------------------------------------------------------------------- in the child


class Capture:
    """The loop around one driver.

    Attributes:
        call: the driver's call that is under way, and since when (host time, s); None between calls.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.call: tuple[str, float] | None = None
        self.failure: BaseException | None = None
        self._spec = spec
        self._leave = threading.Event()
        frame_fd, status_fd = spec["fds"]
        self._writer = FrameWriter(frame_fd, status_fd, spec["height"], spec["width"])
        self._frozen_s: float | None = spec["frozen_s"]
        self._size = spec["height"], spec["width"]  # what the driver is asked for
        self._scaled: Pipeline | None = None
        if (native := spec["native"]) is not None:
            self._size = native["height"], native["width"]
            step = Resize(step="resize", height=spec["height"], width=spec["width"], filter=native["filter"])
            self._scaled = Pipeline([step], height=native["height"], width=native["width"], patches=False)
        period = 1 / spec["rate"]
        self._silent = max(SILENT, SILENT_PERIODS * period)
        self._lost = max(LOST, LOST_PERIODS * period)
        self._camera = _driver(spec["driver"], spec["options"])
        self._arrivals: deque[float] = deque(maxlen=max(3, round(spec["rate"])))
        self._before = CameraHealth()  # of the openings that are over
        self._health = CameraHealth()
        self._facts: dict[str, Any] = {}
        self._frames = self._identical = self._opened = 0

    def leave(self) -> None:
        """Ask the loop to end."""
        self._leave.set()

    def run(self) -> None:
        """Until `leave`, or until the camera is given up; then `failure` says why."""
        try:
            if self._spec["priority"] is not None:
                cpus = None if self._spec["cpus"] is None else set(self._spec["cpus"])
                for grant in realtime.enter(self._spec["priority"], cpus):
                    log.info("%s: %s, %s", grant.what, "obtained" if grant.obtained else "refused", grant.detail)
            elif self._spec["cpus"] is not None:
                realtime.pin(set(self._spec["cpus"]))
            self._ladder()
        except BaseException as error:  # noqa: BLE001  # raised again by the main thread
            self.failure = error

    def _ladder(self) -> None:
        failures = 0
        while not self._leave.is_set():
            began = time.monotonic()
            try:
                self._stream()
            except (DeviceLostError, DeviceNotFoundError, DeviceFaultError) as error:
                if time.monotonic() - began > GOOD_SECONDS:
                    failures = 0
                if failures == len(BACKOFF):
                    raise
                log.warning("%s; opening again in %g s", error, BACKOFF[failures])
                self._rest(BACKOFF[failures])
                failures += 1

    def _rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._leave.is_set() and time.monotonic() < end:
            self._tell("lost")
            self._leave.wait(WAIT)

    def _stream(self) -> None:
        """Open, publish until asked to leave, close. Raises DriverError."""
        spec = self._spec
        self._arrivals.clear()
        self._identical = 0
        self._tell("opening")
        try:
            self._called("open", self._camera.open, *self._size, spec["rate"])
            self._opened += 1
            last = time.monotonic()
            while not self._leave.is_set():
                try:
                    frame = self._called("read", self._camera.read, WAIT)
                except TimeoutError:
                    since = time.monotonic() - last
                    self._learn()
                    self._tell("silent" if since > self._silent else "streaming")
                    if since > self._lost:
                        raise DeviceLostError(
                            f"no new frame for {since:.1f} s, expected {spec['rate']:g} a second"
                        ) from None
                else:
                    last = time.monotonic()
                    self._publish(frame)
        finally:
            self._learn()
            self._before = _sum(self._before, self._health)
            self._health = CameraHealth()
            self._called("close", self._camera.close)

    def _called(self, name: str, call: Any, *arguments: Any) -> Any:
        self.call = (name, time.monotonic())
        try:
            return call(*arguments)
        finally:
            self.call = None

    def _publish(self, frame: Frame) -> None:
        image, sequence = frame.image, frame.sequence
        if self._scaled is not None:
            image = self._scaled.picture(image)
        differs = self._writer.publish(image, frame.captured_ns, frame.received_ns, sequence, frame.clock)
        self._frames += 1
        self._identical = 0 if differs else self._identical + 1
        self._arrivals.append(frame.received_ns * 1e-9)
        self._learn()
        self._tell("streaming")
        if self._frozen_s is not None and self._identical > self._frozen_s * self._spec["rate"]:
            raise DeviceLostError(
                f"{self._identical} pictures in a row are equal bit by bit while their numbers count on to {sequence}: "
                "the sensor or its link stands still"
            )

    def _learn(self) -> None:
        self._health = self._camera.health()
        facts = dict(self._health.facts)
        if facts and facts != self._facts:
            self._facts = facts
            self._writer.facts(facts)

    def _tell(self, state: str) -> None:
        counts = _sum(self._before, self._health)
        self._writer.status(
            state,
            self._rate() if state == "streaming" else 0.0,
            frames=self._frames,
            lost=counts.lost,
            repeated=counts.repeated,
            clock_steps=counts.clock_steps,
            identical=self._identical,
            opened=self._opened,
        )

    def _rate(self) -> float:
        if len(self._arrivals) < 3:
            return 0.0
        return (len(self._arrivals) - 1) / max(self._arrivals[-1] - self._arrivals[0], 1e-9)


def _sum(one: CameraHealth, other: CameraHealth) -> CameraHealth:
    return CameraHealth(
        one.frames + other.frames,
        one.lost + other.lost,
        one.repeated + other.repeated,
        one.clock_steps + other.clock_steps,
        other.facts,
    )


def _driver(name: str, options: dict[str, Any]) -> Camera:
    if ":" not in name:
        camera: Camera = registry.create("cameras", name, options)
        return camera
    module, _, attribute = name.partition(":")
    driver = getattr(import_module(module), attribute)
    chosen: Camera = driver(driver.OPTIONS.model_validate(options))
    return chosen


def attend(spec: dict[str, Any]) -> int:
    """Run the loop on a thread and watch it until it ends. Returns the exit code."""
    # Blocked before the thread is made, so that no signal interrupts a vendor's system call: only sigtimedwait sees it.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    capture = Capture(spec)
    thread = threading.Thread(target=capture.run, name="capture", daemon=True)
    thread.start()
    end: float | None = None
    while thread.is_alive():
        signal.alarm(FROZEN_INTERPRETER)
        if signal.sigtimedwait(SIGNALS, LOOK_SECONDS) is not None or os.getppid() != spec["parent"]:
            capture.leave()
            end = time.monotonic() + LEAVE
        if end is not None:
            thread.join(LOOK_SECONDS)
        if end is not None and time.monotonic() > end:
            return 0  # what close() could not end, the process's end does
        if (call := capture.call) is not None:
            name, since = call
            allowed = {"open": OPENING, "close": OPENING}.get(name, HANG)
            if time.monotonic() - since > allowed:
                faulthandler.dump_traceback()
                log.error("%s() of the driver %s has not returned for %g s", name, spec["driver"], allowed)
                return HUNG
    if capture.failure is None:
        return 0
    if isinstance(capture.failure, (MissingLibraryError, DeviceUnsuitableError)):
        log.error("%s", capture.failure)
        return NO_USE
    if isinstance(capture.failure, (DeviceLostError, DeviceNotFoundError, DeviceFaultError)):
        log.error("given up after %d attempts: %s", len(BACKOFF) + 1, capture.failure)
        return GAVE_UP
    raise capture.failure


def main() -> None:
    """``python -m chatvla_edge.runtime.camera_process`` with one JSON spec on standard input."""
    spec = json.load(sys.stdin)
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s camera {spec['name']} %(message)s")
    status = attend(spec)
    # Not by the interpreter's way out: a vendor's threads and destructors have hung there.
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
