"""RealSense recordings and a software device, made by the installed library: for trying things out without a camera.

A `.bag` is written by releases before 2.58, a `.db3` from then on: `suffix` tells.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from chatvla_edge.drivers.cameras.realsense import sdk, sdk_version
from chatvla_edge.drivers.protocols import Image

BITS = 32
BLOCK = 8  # pixels


def suffix() -> str:
    """What a recording of the installed release is called."""
    return ".db3" if sdk_version(sdk()) >= (2, 58) else ".bag"


def stamped(number: int, height: int, width: int) -> Image:
    """A moving pattern `[height, width, 3]` that carries its number; see `stamp`."""
    rows, columns = np.arange(height, dtype=np.uint8)[:, None], np.arange(width, dtype=np.uint8)[None, :]
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0] = rows + columns
    image[..., 1] = rows * 3 + np.uint8(number & 255)
    image[..., 2] = columns * 2 - np.uint8(number & 255)
    for bit in range(BITS):
        place = slice(bit * BLOCK, (bit + 1) * BLOCK)
        image[:BLOCK, place] = 255 * (number >> bit & 1)
    return image


def stamp(image: Image) -> int:
    """The number that `stamped` put into a picture, even one that was compressed."""
    middles = image[BLOCK // 2, BLOCK // 2 : BITS * BLOCK : BLOCK, 1] > 127
    return int(sum(1 << bit for bit, on in enumerate(middles) if on))


class SoftwareCamera:
    """A device of the library whose frames are pushed by hand.

    Attributes:
        device: the `software_device`.
    """

    def __init__(self, height: int, width: int, rate: int, *, usb: str = "3.2", serial: str = "1") -> None:
        self.rs = rs = sdk()
        self.height, self.width = height, width
        self.device = rs.software_device()
        info = rs.camera_info
        facts = {
            info.name: "Stand-in camera",
            info.serial_number: serial,
            info.usb_type_descriptor: usb,
            info.firmware_version: "1.0.0.0",
        }
        for key, value in facts.items():
            self.device.register_info(key, value)
        self.sensor = self.device.add_sensor("RGB Camera")
        self._profile = self.sensor.add_video_stream(self._stream(rate)).as_video_stream_profile()

    def _stream(self, rate: int) -> Any:
        rs, intrinsics = self.rs, self.rs.intrinsics()
        intrinsics.width, intrinsics.height = self.width, self.height
        intrinsics.ppx, intrinsics.ppy = self.width / 2, self.height / 2
        intrinsics.fx = intrinsics.fy = float(self.width)
        intrinsics.model, intrinsics.coeffs = rs.distortion.none, [0.0] * 5
        stream = rs.video_stream()
        stream.type, stream.index, stream.uid, stream.fmt = rs.stream.color, 0, 1, rs.format.rgb8
        stream.width, stream.height, stream.fps, stream.bpp = self.width, self.height, rate, 3
        stream.intrinsics = intrinsics
        return stream

    def push(self, number: int, stamp_ms: float, image: Image | None = None, domain: str = "hardware_clock") -> None:
        """One frame into the library."""
        frame = self.rs.software_video_frame()
        frame.pixels = stamped(number, self.height, self.width) if image is None else image
        frame.stride, frame.bpp = self.width * 3, 3
        frame.timestamp, frame.domain = stamp_ms, getattr(self.rs.timestamp_domain, domain)
        frame.frame_number, frame.profile = number, self._profile
        self.sensor.on_video_frame(frame)


def record(path: Path, frames: int, height: int = 480, width: int = 640, rate: int = 30) -> None:
    """Write a recording of `stamped` pictures, numbers 1 to ``frames``. Takes as long as it will play.

    librealsense paces playback by the moments of recording, so the frames are pushed at their rate.
    """
    for _ in recording(path, frames, height, width, rate):
        pass


def recording(path: Path, frames: int, height: int = 480, width: int = 640, rate: int = 30) -> Iterator[int]:
    """Like `record`; yields each number when its frame is written, so that its caller can leave frames out or wait."""
    camera = SoftwareCamera(height, width, rate)
    recorder = camera.rs.recorder(str(path), camera.device)
    sensor = recorder.query_sensors()[0]
    sensor.open(sensor.get_stream_profiles()[0])
    sensor.start(lambda frame: None)
    pictures = [stamped(number, height, width) for number in range(1, frames + 1)] if frames <= 120 else None
    start = time.monotonic()
    for number in range(1, frames + 1):
        time.sleep(max(0.0, start + number / rate - time.monotonic()))
        camera.push(number, 1e6 + 1e3 * number / rate, pictures[number - 1] if pictures else None)
        yield number
    sensor.stop()
    sensor.close()
