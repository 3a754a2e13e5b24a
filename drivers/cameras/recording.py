"""A recording played as if it were live: a folder of pictures, a video, or a RealSense file.

Frames are due at the camera's rate, from `open` on. What was due and not read in time is gone and counted, as with a
camera; `captured_ns` is the moment at which a frame was due. RealSense files go to their own driver.

A video needs OpenCV (the extra `calibration`), pictures need Pillow (`jpeg`). Compressed recordings are not what the
camera saw, bit by bit: to compare numbers, use PNG.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from chatvla_edge.drivers.cameras.realsense import RealSense, RealSenseOptions
from chatvla_edge.drivers.errors import (
    DeviceLostError,
    DeviceNotFoundError,
    DeviceUnsuitableError,
    MissingLibraryError,
)
from chatvla_edge.drivers.protocols import CameraHealth, Frame, Image, Options

PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
REALSENSE = (".bag", ".db3")


class RecordingOptions(Options):
    """``source``: a folder, a video file, or a RealSense file. ``loop``: for ever; the numbers count on."""

    source: Path
    loop: bool = False


class Source(Protocol):
    """Pictures in their order; `None` for a length that is found out by reading."""

    def picture(self, index: int) -> Image | None:
        """`[H, W, 3]` RGB, its own until the next call; None behind the last. Indices grow, or begin again at 0."""

    def close(self) -> None:
        """Let go."""


class Recording:
    """Plays a recording."""

    OPTIONS = RecordingOptions

    def __init__(self, options: RecordingOptions) -> None:
        self.options = options
        self._delegate: RealSense | None = None
        self._source: Source | None = None
        self._now: Callable[[], int] = time.monotonic_ns
        self._sleep: Callable[[float], None] = time.sleep
        self._forget()

    def _forget(self) -> None:
        self._next: tuple[int, Image] | None = None  # number from 0, picture: decoded before it is due
        self._number = -1  # handed out last
        self._turn_at = 0  # number of the first frame of this turn
        self._frames = self._lost = 0

    def open(self, height: int, width: int, rate: float) -> None:
        """Look at the first picture; it must have the size that the rig states, and a video its rate."""
        self.close()
        self._forget()
        source = self.options.source
        if not source.exists():
            raise DeviceNotFoundError(f"found no recording {source}")
        if source.suffix in REALSENSE:
            self._delegate = RealSense(RealSenseOptions(file=source, loop=self.options.loop))
            self._delegate.open(height, width, rate)
            return
        self._source = Folder(source) if source.is_dir() else Video(source, rate)
        first = self._source.picture(0)
        if first is None or first.shape != (height, width, 3):
            found = "no picture" if first is None else f"{first.shape[1]}x{first.shape[0]}"
            self.close()
            raise DeviceUnsuitableError(f"{source} holds {found}, expected {width}x{height}: record or convert it so")
        self._next = (0, first)
        self._period_ns = round(1e9 / rate)
        self._start = self._now()

    def _due(self, number: int) -> int:
        return self._start + number * self._period_ns

    def read(self, timeout: float) -> Frame:
        """The newest frame that is due."""
        if self._delegate is not None:
            return self._delegate.read(timeout)
        if self._source is None:
            raise DeviceLostError(f"{self.options.source} is not open")
        until = self._now() + round(1e9 * timeout)
        number, image = self._prepared()
        self._sleep(max(0, min(self._due(number), until) - self._now()) * 1e-9)
        if self._now() < self._due(number):
            raise TimeoutError
        received_ns = self._now()
        self._lost += number - self._number - 1
        self._number, self._next = number, None
        self._frames += 1
        return Frame(image, self._due(number), received_ns, number + 1, "device")

    def _prepared(self) -> tuple[int, Image]:
        """The frame to hand out next, decoded: the next one, or the newest that is due where that is later."""
        newest = (self._now() - self._start) // self._period_ns
        number = max(self._number + 1, newest)
        if self._next is None or self._next[0] < number:
            self._next = self._decoded(number)
        return self._next

    def _decoded(self, number: int) -> tuple[int, Image]:
        assert self._source is not None
        image = self._source.picture(number - self._turn_at)
        if image is None and not self.options.loop:
            raise DeviceLostError(f"the recording {self.options.source} is over")
        if image is None:
            self._turn_at = number
            image = self._source.picture(0)
        if image is None:
            raise DeviceLostError(f"{self.options.source} cannot be read again")
        return number, image

    def health(self) -> CameraHealth:
        """Counts."""
        if self._delegate is not None:
            return self._delegate.health()
        return CameraHealth(self._frames, self._lost, 0, 0, {"recording": str(self.options.source)})

    def close(self) -> None:
        """Close the file."""
        for open_one in (self._delegate, self._source):
            if open_one is not None:
                open_one.close()
        self._delegate = self._source = None


def natural(path: Path) -> list[str | int]:
    """`frame2` before `frame10`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


class Folder:
    """The pictures of a folder by the numbers in their names."""

    def __init__(self, folder: Path) -> None:
        self._open = _pillow()
        self._files = sorted((path for path in folder.iterdir() if path.suffix.lower() in PICTURES), key=natural)

    def picture(self, index: int) -> Image | None:
        """See `Source`."""
        if index >= len(self._files):
            return None
        try:
            with self._open(self._files[index]) as picture:
                return np.asarray(picture.convert("RGB"))
        except OSError as error:
            raise DeviceLostError(f"{self._files[index]} cannot be read: {error}") from error

    def close(self) -> None:
        """See `Source`."""


class Video:
    """A video file, decoded by OpenCV."""

    def __init__(self, file: Path, rate: float) -> None:
        try:
            import cv2
        except ModuleNotFoundError:
            raise MissingLibraryError(
                "found no module cv2, expected OpenCV for a video: pip install 'chatvla-edge[calibration]', or give a "
                "folder of pictures"
            ) from None
        self._cv2: Any = cv2
        self._file = file
        self._video = cv2.VideoCapture(str(file))
        found = self._video.get(cv2.CAP_PROP_FPS)
        if not self._video.isOpened() or found <= 0:
            raise DeviceUnsuitableError(f"{file} is no video that OpenCV can decode, nor a folder or RealSense file")
        if abs(found - rate) > 0.01 * rate:
            raise DeviceUnsuitableError(f"{file} has {found:g} frames per second, expected {rate:g}")
        self._at = 0  # index of the frame that is decoded next

    def picture(self, index: int) -> Image | None:
        """See `Source`; pictures between the last one and this are passed over."""
        if index < self._at:
            self._video.release()
            self._video = self._cv2.VideoCapture(str(self._file))
            self._at = 0
        while self._at < index:
            if not self._video.grab():
                return None
            self._at += 1
        good, picture = self._video.read()
        self._at += 1
        return np.asarray(self._cv2.cvtColor(picture, self._cv2.COLOR_BGR2RGB), np.uint8) if good else None

    def close(self) -> None:
        """See `Source`."""
        self._video.release()


def _pillow() -> Any:
    try:
        from PIL import Image as Pictures
    except ModuleNotFoundError:
        raise MissingLibraryError(
            "found no module PIL, expected Pillow for a folder of pictures: pip install 'chatvla-edge[jpeg]'"
        ) from None
    return Pictures.open
