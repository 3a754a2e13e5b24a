"""Any V4L2 camera that delivers YUYV or MJPEG: webcams, and the ZED without its SDK (`zed_uvc`).

Buffers carry the kernel's own count and CLOCK_MONOTONIC, so `sequence` and `captured_ns` need no guessing: for a UVC
camera the stamp is the start of the frame on the bus, after exposure and readout.

Never run on hardware: these machines have no V4L2 device, not even a virtual one. The layout of every structure is
compared with the kernel's header, the conversions with OpenCV and Pillow, and the streaming with a model of the
kernel's side.
"""

import ctypes
import errno
import io
import mmap
import os
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from chatvla_edge.drivers.cameras import pixels, v4l2
from chatvla_edge.drivers.errors import (
    DeviceLostError,
    DeviceNotFoundError,
    DeviceUnsuitableError,
    MissingLibraryError,
)
from chatvla_edge.drivers.protocols import CameraHealth, Frame, Image, Options

BUFFERS = 4
SETTLE_SECONDS = 2.0
GONE = {errno.ENODEV, errno.EIO, errno.ENXIO, errno.EPIPE}
Lock = float | Literal["auto", "freeze"]


class UvcOptions(Options):
    """Options of a rig file.

    ``device``: best a path under `/dev/v4l/by-id` or `by-path`, since numbers change with the order of plugging.
    ``pixels``: what the camera is asked for; MJPEG needs the extra `jpeg`, saves bus and costs a decoder and artefacts.
    ``exposure`` (100 us), ``white_balance`` (kelvin): `auto`, `freeze` (automatic for 2 s, then held), or a number.
    ``gain``: a number of the camera's own, with a fixed exposure.
    """

    device: Path
    pixels: Literal["YUYV", "MJPG"] = "YUYV"
    exposure: Lock = "auto"
    white_balance: Lock = "auto"
    gain: float | None = Field(default=None, ge=0)


class Uvc:
    """A V4L2 camera with memory-mapped buffers."""

    OPTIONS: type[Options] = UvcOptions

    def __init__(self, options: UvcOptions) -> None:
        self.options = options
        self._node: v4l2.Node | None = None
        self._maps: list[mmap.mmap] = []
        self._forget()

    def _forget(self) -> None:
        self._image: Image = np.empty((0, 0, 3), np.uint8)
        self._format = v4l2.PixelFormat()
        self._column = 0
        self._last: int | None = None
        self._frames = self._lost = self._broken = 0
        self._facts: dict[str, str | int | float | bool] = {}

    # ------------------------------------------------------------------------------------------------------------ open

    def open(self, height: int, width: int, rate: float) -> None:
        """Start the stream; with `freeze`, 2 s later."""
        self._open(height, width, rate, width, 0)

    def _open(self, height: int, width: int, rate: float, device_width: int, column: int) -> None:
        """Start a stream of ``device_width`` and hand out ``width`` pixels of it from ``column``."""
        self.close()
        self._forget()
        if self.options.pixels == "MJPG":
            _pillow()
        node = self._node = self._found(str(self.options.device))
        self._column = column
        self._image = np.empty((height, width, 3), np.uint8)
        try:
            self._introduce(node)
            self._negotiate(node, height, device_width, rate)
            self._expose(node, warm=False)
            self._stream(node)
            if "freeze" in (self.options.exposure, self.options.white_balance):
                self._settle()
                self._expose(node, warm=True)
        except OSError as error:
            self.close()
            raise DeviceLostError(f"{self.options.device}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def _found(self, path: str) -> v4l2.Node:
        try:
            return self._node_at(path)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM):
                raise DeviceUnsuitableError(
                    f"{path} may not be opened by this user, expected membership of the group `video`"
                ) from error
            if error.errno == errno.EBUSY:
                raise DeviceLostError(f"{path} is in use by another program") from error
            here = ", ".join(sorted(map(str, Path("/dev").glob("video*")))) or "no /dev/video*"
            raise DeviceNotFoundError(f"{path}: {error.strerror}; found {here}") from error

    def _node_at(self, path: str) -> v4l2.Node:
        return v4l2.Node(path)

    def _introduce(self, node: v4l2.Node) -> None:
        found = v4l2.Capability()
        node.ioctl(v4l2.QUERYCAP, found)
        own = found.device_caps if found.capabilities & v4l2.CAP_DEVICE_CAPS else found.capabilities
        self._facts |= {
            "device": found.card.decode("utf-8", "replace"),
            "bus": found.bus_info.decode("utf-8", "replace"),
        }
        needed = v4l2.CAP_VIDEO_CAPTURE | v4l2.CAP_STREAMING
        if own & needed != needed:
            raise DeviceUnsuitableError(
                f"{self.options.device} ({self._facts['device']}) does not stream video (capabilities {own:#x}); a "
                "camera has several nodes, expected its first (index 0)"
            )

    def _negotiate(self, node: v4l2.Node, height: int, width: int, rate: float) -> None:
        asked = v4l2.Format(type=v4l2.VIDEO_CAPTURE)
        picture = asked.fmt.pix
        picture.width, picture.height, picture.field = width, height, v4l2.FIELD_ANY
        picture.pixelformat = v4l2.fourcc(self.options.pixels)
        node.ioctl(v4l2.S_FMT, asked)
        got = (picture.width, picture.height, picture.pixelformat)
        if got != (width, height, v4l2.fourcc(self.options.pixels)):
            raise DeviceUnsuitableError(
                f"{self.options.device} offers {self._offered(node)} in {self.options.pixels}, expected "
                f"{width}x{height} at {rate:g}"
            )
        self._format = v4l2.PixelFormat.from_buffer_copy(picture)
        parameters = v4l2.StreamParameters(type=v4l2.VIDEO_CAPTURE)
        interval = parameters.parm.capture.timeperframe
        interval.numerator, interval.denominator = 1000, round(1000 * rate)
        node.ioctl(v4l2.S_PARM, parameters)
        found = interval.denominator / interval.numerator if interval.numerator else 0.0
        if abs(found - rate) > 0.01 * rate:
            raise DeviceUnsuitableError(
                f"{self.options.device} offers {self._offered(node)} in {self.options.pixels} and answers {found:g} "
                f"for {width}x{height} at {rate:g}"
            )

    def _offered(self, node: v4l2.Node) -> str:
        code = v4l2.fourcc(self.options.pixels)
        shapes = []
        for index in range(64):
            size = v4l2.FrameSize(index=index, pixel_format=code)
            try:
                node.ioctl(v4l2.ENUM_FRAMESIZES, size)
            except OSError:
                break
            if size.type != v4l2.DISCRETE:
                least, most = size.numbers[0:6:3], size.numbers[1:6:3]
                return f"any size from {least[0]}x{least[1]} to {most[0]}x{most[1]}"
            rates = self._rates(node, code, size.numbers[0], size.numbers[1])
            shapes.append(f"{size.numbers[0]}x{size.numbers[1]} at {'/'.join(f'{rate:g}' for rate in rates) or '?'}")
        return ", ".join(shapes) or "nothing"

    def _rates(self, node: v4l2.Node, code: int, width: int, height: int) -> list[float]:
        rates = []
        for index in range(32):
            interval = v4l2.FrameInterval(index=index, pixel_format=code, width=width, height=height)
            try:
                node.ioctl(v4l2.ENUM_FRAMEINTERVALS, interval)
            except OSError:
                break
            if interval.type != v4l2.DISCRETE or not interval.fractions[0].numerator:
                break
            rates.append(interval.fractions[0].denominator / interval.fractions[0].numerator)
        return rates

    def _stream(self, node: v4l2.Node) -> None:
        wanted = v4l2.RequestBuffers(count=BUFFERS, type=v4l2.VIDEO_CAPTURE, memory=v4l2.MMAP)
        node.ioctl(v4l2.REQBUFS, wanted)
        if wanted.count < 2:
            raise DeviceLostError(f"{self.options.device} gives {wanted.count} buffers, expected 2 at least")
        for index in range(wanted.count):
            buffer = v4l2.Buffer(index=index, type=v4l2.VIDEO_CAPTURE, memory=v4l2.MMAP)
            node.ioctl(v4l2.QUERYBUF, buffer)
            self._maps.append(node.map(buffer.length, buffer.m.offset))
            node.ioctl(v4l2.QBUF, buffer)
        node.ioctl(v4l2.STREAMON, ctypes.c_int(v4l2.VIDEO_CAPTURE))

    # -------------------------------------------------------------------------------------------------------- exposure

    def _expose(self, node: v4l2.Node, *, warm: bool) -> None:
        """Set what the options fix. ``warm``: the automatic has run, and `freeze` may take its values."""
        options = self.options
        if options.exposure != "auto" and (warm or options.exposure != "freeze"):
            # First read, then manual: switching alone returns some cameras to their last manual value.
            value = self._control(node, v4l2.EXPOSURE_ABSOLUTE) if options.exposure == "freeze" else options.exposure
            self._set(node, v4l2.EXPOSURE_AUTO, v4l2.EXPOSURE_MANUAL)
            self._set(node, v4l2.EXPOSURE_ABSOLUTE, value)
            self._facts["exposure"] = value
        elif not warm:
            self._automatic_exposure(node)
            self._facts["exposure"] = "auto"
        if options.gain is not None:
            self._set(node, v4l2.GAIN, options.gain)
        balance = options.white_balance
        if balance != "auto" and (warm or balance != "freeze"):
            value = self._control(node, v4l2.WHITE_BALANCE_TEMPERATURE) if balance == "freeze" else balance
            self._set(node, v4l2.AUTO_WHITE_BALANCE, 0)
            self._set(node, v4l2.WHITE_BALANCE_TEMPERATURE, value)
            self._facts["white_balance"] = value
        elif not warm and self._knows(node, v4l2.AUTO_WHITE_BALANCE):
            self._set(node, v4l2.AUTO_WHITE_BALANCE, 1)

    def _automatic_exposure(self, node: v4l2.Node) -> None:
        """Whatever a program before has left; and never a longer exposure than the rate allows."""
        if self._knows(node, v4l2.EXPOSURE_AUTO):
            self._set(node, v4l2.EXPOSURE_AUTO, v4l2.EXPOSURE_APERTURE_PRIORITY)
        if self._knows(node, v4l2.EXPOSURE_AUTO_PRIORITY):
            self._set(node, v4l2.EXPOSURE_AUTO_PRIORITY, 0)

    def _query(self, node: v4l2.Node, control: int) -> v4l2.QueryControl | None:
        query = v4l2.QueryControl(id=control)
        try:
            node.ioctl(v4l2.QUERYCTRL, query)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return None
        return None if query.flags & v4l2.CTRL_FLAG_DISABLED else query

    def _knows(self, node: v4l2.Node, control: int) -> bool:
        return self._query(node, control) is not None

    def _control(self, node: v4l2.Node, control: int) -> float:
        if not self._knows(node, control):
            raise DeviceUnsuitableError(f"{self.options.device} has no control {control:#x} to freeze")
        found = v4l2.Control(id=control)
        node.ioctl(v4l2.G_CTRL, found)
        return float(found.value)

    def _set(self, node: v4l2.Node, control: int, value: float) -> None:
        query = self._query(node, control)
        if query is None:
            raise DeviceUnsuitableError(f"{self.options.device} has no control {control:#x}, expected to set {value:g}")
        if not query.minimum <= value <= query.maximum:
            raise DeviceUnsuitableError(
                f"{self.options.device}: found {query.name.decode('utf-8', 'replace')} {value:g}, expected "
                f"{query.minimum} to {query.maximum}"
            )
        node.ioctl(v4l2.S_CTRL, v4l2.Control(id=control, value=round(value)))

    def _settle(self) -> None:
        end = time.monotonic() + SETTLE_SECONDS
        while (left := end - time.monotonic()) > 0:
            try:
                self.read(left)
            except TimeoutError as error:
                raise DeviceLostError(f"{self.options.device} sends no frames to find its exposure from") from error

    # ------------------------------------------------------------------------------------------------------------ read

    def read(self, timeout: float) -> Frame:
        """The newest frame; broken and short ones are passed over and counted as lost by their numbers."""
        node = self._node
        if node is None:
            raise DeviceLostError(f"{self.options.device} is not open")
        end = time.monotonic() + timeout
        try:
            while (left := end - time.monotonic()) > 0:
                if not node.wait(left):
                    break
                buffer = self._newest(node)
                received_ns = time.monotonic_ns()
                if buffer is None:
                    continue
                try:
                    whole = self._fill(buffer)
                finally:
                    node.ioctl(v4l2.QBUF, buffer)
                if whole:
                    return self._delivered(buffer, received_ns)
                self._broken += 1
        except OSError as error:
            if error.errno in GONE:
                raise DeviceLostError(f"{self.options.device}: {os.strerror(error.errno or 0)}: unplugged?") from error
            raise
        raise TimeoutError

    def _newest(self, node: v4l2.Node) -> v4l2.Buffer | None:
        """The last of the buffers that are ready; the earlier ones go back."""
        newest: v4l2.Buffer | None = None
        while True:
            buffer = v4l2.Buffer(type=v4l2.VIDEO_CAPTURE, memory=v4l2.MMAP)
            try:
                node.ioctl(v4l2.DQBUF, buffer)
            except BlockingIOError:
                return newest
            if newest is not None:
                node.ioctl(v4l2.QBUF, newest)
            newest = buffer

    def _fill(self, buffer: v4l2.Buffer) -> bool:
        """Convert into our picture; False for a frame that did not arrive whole."""
        if buffer.flags & v4l2.BUF_FLAG_ERROR:
            return False
        memory = self._maps[buffer.index]
        if self.options.pixels == "YUYV":
            line = self._format.bytesperline or 2 * self._format.width
            if buffer.bytesused < line * self._format.height:
                return False
            pixels.yuyv_to_rgb(memory, line, self._column, self._image)
            return True
        return self._decode(memoryview(memory)[: buffer.bytesused])

    def _decode(self, data: memoryview) -> bool:
        try:
            # A context, so that the picture lets go of the buffer's memory before the buffer is returned.
            with data, _pillow().open(io.BytesIO(data)) as picture:
                decoded = np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError):  # what Pillow raises for pictures that are cut or garbled
            return False
        if decoded.shape != (self._format.height, self._format.width, 3):
            return False
        np.copyto(self._image, decoded[:, self._column : self._column + self._image.shape[1]])
        return True

    def _delivered(self, buffer: v4l2.Buffer, received_ns: int) -> Frame:
        if self._last is not None:
            self._lost += max(0, buffer.sequence - self._last - 1)
        self._last = buffer.sequence
        self._frames += 1
        clock: Literal["device", "arrival"] = "arrival"
        captured_ns = received_ns
        if buffer.flags & v4l2.BUF_FLAG_TIMESTAMP_MASK == v4l2.BUF_FLAG_TIMESTAMP_MONOTONIC:
            clock = "device"
            stamp = buffer.timestamp.tv_sec * 1_000_000_000 + buffer.timestamp.tv_usec * 1000
            captured_ns = min(stamp, received_ns)
        return Frame(self._image, captured_ns, received_ns, int(buffer.sequence), clock)

    # ------------------------------------------------------------------------------------------------------------ rest

    def health(self) -> CameraHealth:
        """Counts. `broken` among the facts: frames that arrived with an error or cut short."""
        facts = self._facts | {"broken": self._broken} if self._broken else self._facts
        return CameraHealth(self._frames, self._lost, 0, 0, facts)

    def close(self) -> None:
        """Stop and unmap."""
        node, self._node = self._node, None
        maps, self._maps = self._maps, []
        if node is None:
            return
        try:
            node.ioctl(v4l2.STREAMOFF, ctypes.c_int(v4l2.VIDEO_CAPTURE))
        except OSError:  # unplugged: there is nothing to stop
            pass
        finally:
            for memory in maps:
                memory.close()
            node.close()


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise MissingLibraryError(
            "found no module PIL, expected Pillow for MJPEG frames and picture files: pip install 'chatvla-edge[jpeg]'"
        ) from None
    return Image
