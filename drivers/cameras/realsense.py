"""RealSense cameras through librealsense: D4xx and D5xx with a current pyrealsense2, the L515 with 2.54.2.

Colour only. The colour sensor is opened by itself, not through a pipeline: a pipeline composes sets of frames, pairs a
new one with another stream's previous one and so delivers it twice (195-357 sets for 119-180 frames, measured), and
cannot be fed by a software device. Live devices, recordings (.bag, .db3) and the software device take one path here.

Never run on hardware. Run in the tests: recordings made by the installed library, and the software device, whose frames
come through the same queue as a camera's. The tests pass with 2.54.2, 2.57.7 and 2.59.1; releases that write `.bag`
deliver a frame of a looped recording again now and then, which is counted and not handed out.

What librealsense does, and what follows:

- The RGB modules of the D4xx do not tell what their automatic exposure has found (librealsense#2549, #5035, #9437), so
  it cannot be frozen there: `exposure` and `gain` are given as numbers. Where a sensor tells it, `freeze` works.
- Stamps come in three domains: the device's counter (converted by `DeviceClock`), the wall clock (`WallClock`), and the
  wall clock at arrival, which says no more than our own.
- "Frame didn't arrive", "failed to set power state", a `stop` that hangs: after a failed start the device is reset
  once, waited for 5 s, and started again. The rest is its process's: to open again, or to be killed.
"""

import ctypes
import time
from datetime import timedelta
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from chatvla_edge.drivers.cameras.clock import DeviceClock, WallClock
from chatvla_edge.drivers.errors import (
    DeviceLostError,
    DeviceNotFoundError,
    DeviceUnsuitableError,
    MissingLibraryError,
)
from chatvla_edge.drivers.protocols import CameraHealth, Frame, Image, Options

INSTALL = "pip install 'chatvla-edge[realsense]'"
INTEL = "8086"
L515_PRODUCTS = ("0b3d", "0b64")
L515_LAST_SDK = (2, 54)
L515_SMALL_COLOUR_FIRMWARE = (1, 5, 8, 1)  # 640x480 and 640x360 came with it (librealsense#9539, #8017)
USB_DEVICES = Path("/sys/bus/usb/devices")

RESET_SECONDS = 5.0
COUNTER_WRAPS_NS = 2**32 * 1000  # the hardware clock is a 32-bit counter of microseconds
QUEUE = 2  # frames: the newest, and one that came while it was fetched
SETTLE_SECONDS = 2.0  # of automatic exposure before `freeze`


class RealSenseOptions(Options):
    """Options of a rig file.

    ``serial``: which camera, needed where several are connected. ``file``: a recording to play instead, ``loop``: for
    ever. ``usb2``: whether a camera that has fallen back to USB 2 is refused. ``exposure`` and ``gain``: `auto`,
    `freeze` (automatic for 2 s, then held; exposure and gain together), or a number in the sensor's own unit (exposure:
    100 us in RGB modules, 1 us in stereo modules). ``white_balance``: `auto`, `freeze`, or kelvin. ``global_time``:
    whether librealsense brings stamps to the wall clock, which costs it control transfers.
    """

    serial: str | None = None
    file: Path | None = None
    loop: bool = False
    usb2: Literal["refuse", "allow"] = "refuse"
    exposure: float | Literal["auto", "freeze"] = "auto"
    gain: float | None = Field(default=None, ge=0)
    white_balance: float | Literal["auto", "freeze"] = "auto"
    global_time: bool = True
    reset: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> "RealSenseOptions":
        if self.file is not None and self.serial is not None:
            raise ValueError("found both serial and file, expected a camera or a recording")
        if self.loop and self.file is None:
            raise ValueError("found loop without a file to play")
        if self.gain is not None and not isinstance(self.exposure, float):
            raise ValueError("found a fixed gain beside an automatic exposure, expected exposure as a number, too")
        return self


def sdk() -> Any:
    """The module pyrealsense2. Raises MissingLibraryError."""
    try:
        return _sdk()
    except ModuleNotFoundError as error:
        if error.name != "pyrealsense2":
            raise
        raise MissingLibraryError(
            f"found no module pyrealsense2, expected it for a RealSense camera: {INSTALL}"
        ) from None
    except ImportError as error:
        # The wheel needs libusb from the system; the package libusb-package of our extra brings one of the same name.
        found = find_spec("libusb_package") if "libusb" in str(error) else None
        for folder in (found.submodule_search_locations or ()) if found else ():
            ctypes.CDLL(str(Path(folder) / "libusb-1.0.so"), ctypes.RTLD_GLOBAL)
            return _sdk()
        raise MissingLibraryError(
            f"found pyrealsense2, but its library does not load: {error}. Install the library that it names "
            f"(libusb: apt-get install libusb-1.0-0, or {INSTALL})"
        ) from error


def _sdk() -> Any:
    module = import_module("pyrealsense2")
    # A build from source puts the binding one level deeper.
    return module if hasattr(module, "context") else import_module("pyrealsense2.pyrealsense2")


def sdk_version(rs: Any) -> tuple[int, ...]:
    """Version of the binding, (2, 59, 1, ...); (0,) where it does not say."""
    try:
        text = version("pyrealsense2")
    except PackageNotFoundError:
        text = str(getattr(rs, "__version__", "0"))
    return numbers(text)


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of a dotted version, as far as they go."""
    found = []
    for part in text.split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found) or (0,)


def l515_on_usb(devices: Path = USB_DEVICES) -> bool:
    """Whether the kernel sees an L515 on USB; librealsense after 2.54 does not."""
    for vendor in devices.glob("*/idVendor"):
        product = vendor.with_name("idProduct")
        if vendor.read_text().strip() == INTEL and product.is_file() and product.read_text().strip() in L515_PRODUCTS:
            return True
    return False


class RealSense:
    """The colour stream of a RealSense camera, or of a recording of one."""

    OPTIONS = RealSenseOptions

    def __init__(self, options: RealSenseOptions) -> None:
        self.options = options
        self._rs: Any = None
        self._sensor: Any = None
        self._playback: Any = None
        self._forget()

    def _forget(self) -> None:
        self._queue: Any = None
        self._profile: Any = None
        self._frame: Any = None
        self._last: int | None = None
        self._base = self._longest = 0
        self._domain: Any = None
        self._device_clock = DeviceClock(COUNTER_WRAPS_NS)
        self._wall_clock = WallClock()
        self._frames = self._lost = self._repeated = self._domain_changes = 0
        self._facts: dict[str, str | int | float | bool] = {}

    # ------------------------------------------------------------------------------------------------------------ open

    def open(self, height: int, width: int, rate: float) -> None:
        """Start the colour stream; a live one that does not start is reset once, which takes 5 s more."""
        self.close()
        self._forget()
        self._rs = sdk()
        self._rate = rate
        if self.options.file is not None:
            self._start(self._recording(self.options.file), height, width, rate)
            return
        device = self._device()
        try:
            self._start(device, height, width, rate)
        except RuntimeError as first:
            self.close()
            if not self.options.reset:
                raise DeviceLostError(f"{self._name(device)} does not start: {first}") from first
            self._start_after_reset(device, first, height, width, rate)
        self._expose(height, width)

    def _recording(self, file: Path) -> Any:
        if not file.is_file():
            raise DeviceNotFoundError(f"found no recording {file}")
        try:
            device = self._rs.context().load_device(str(file))
        except RuntimeError as error:
            raise DeviceUnsuitableError(
                f"{file} cannot be played by pyrealsense2 {_dotted(sdk_version(self._rs))}: {error}; .bag is played by "
                "every release, .db3 from 2.58"
            ) from error
        self._playback = device.as_playback()
        self._playback.set_real_time(True)
        return device

    def _connected(self) -> list[Any]:
        """Every device that the library sees."""
        # Kept: a device outlives its context badly (librealsense#4212).
        self._context = self._rs.context()
        return list(self._context.query_devices())

    def _device(self) -> Any:
        devices = self._connected()
        serial = self.options.serial
        wanted = [device for device in devices if serial in (None, self._info(device, "serial_number"))]
        if len(wanted) == 1:
            return wanted[0]
        installed = _dotted(sdk_version(self._rs))
        if not wanted and l515_on_usb() and sdk_version(self._rs)[:2] > L515_LAST_SDK:
            raise DeviceUnsuitableError(
                f"found an L515 on USB and pyrealsense2 {installed}, expected 2.54.x: librealsense has dropped the "
                "L515 after it. Install pyrealsense2==2.54.2.5684 (x86-64, Python 3.11 at most; elsewhere build 2.54.2 "
                "from source) into an environment of its own, and name its interpreter as this camera's `python`"
            )
        found = ", ".join(self._name(device) for device in devices) or "no RealSense camera"
        asked = f"number {serial}" if serial else "one camera, or its serial in the options"
        raise DeviceNotFoundError(f"found {found} (pyrealsense2 {installed}), expected {asked}")

    def _start_after_reset(self, device: Any, first: RuntimeError, height: int, width: int, rate: float) -> None:
        name = self._name(device)
        try:
            device.hardware_reset()
            time.sleep(RESET_SECONDS)
            self._start(self._device(), height, width, rate)
        except (RuntimeError, DeviceNotFoundError) as second:
            self.close()
            raise DeviceLostError(
                f"{name} does not start ({first}), nor after a reset ({second}): unplug it, use its own USB 3 cable "
                "and no hub, and look into dmesg"
            ) from second

    def _start(self, device: Any, height: int, width: int, rate: float) -> None:
        usb = self._info(device, "usb_type_descriptor")
        if self._playback is None and usb.startswith("2") and self.options.usb2 == "refuse":
            raise DeviceUnsuitableError(
                f"{self._name(device)} is connected by USB {usb}, expected USB 3: use another port or cable; it then "
                "offers fewer sizes and rates. `usb2: allow` takes it as it is"
            )
        self._sensor, self._profile = self._choose(device, height, width, rate)
        if self._sensor.supports(self._rs.option.global_time_enabled) and self._playback is None:
            self._sensor.set_option(self._rs.option.global_time_enabled, float(self.options.global_time))
        self._queue = self._rs.frame_queue(QUEUE)
        self._sensor.open(self._profile)
        self._sensor.start(self._queue)
        self._facts |= {
            "device": self._info(device, "name"),
            "serial": self._info(device, "serial_number"),
            "firmware": self._info(device, "firmware_version"),
            "usb": usb,
            "sdk": _dotted(sdk_version(self._rs)),
            "exposure": "auto",
        }

    def _choose(self, device: Any, height: int, width: int, rate: float) -> tuple[Any, Any]:
        """The sensor and its RGB profile, read from the device."""
        offered = {}
        for sensor in device.query_sensors():
            for profile in sensor.get_stream_profiles():
                if profile.stream_type() != self._rs.stream.color or profile.format() != self._rs.format.rgb8:
                    continue
                video = profile.as_video_stream_profile()
                shape = (video.width(), video.height(), profile.fps())
                if shape == (width, height, rate):
                    return sensor, profile
                offered[shape] = True
        shapes = ", ".join(f"{wide}x{high} at {fps}" for wide, high, fps in sorted(offered)) or "no RGB stream"
        raise DeviceUnsuitableError(
            f"{self._name(device)} offers {shapes}, expected {width}x{height} at {rate:g}"
            f"{self._l515_hint(device, width)}"
        )

    def _l515_hint(self, device: Any, width: int) -> str:
        firmware = self._info(device, "firmware_version")
        if "L515" in self._info(device, "name") and width <= 640 and numbers(firmware) < L515_SMALL_COLOUR_FIRMWARE:
            return f"; the L515 has it from firmware 1.5.8.1, found {firmware or 'none'}: update it with rs-fw-update"
        return ""

    def _name(self, device: Any) -> str:
        return " ".join((self._info(device, "name") or "a RealSense", self._info(device, "serial_number"))).rstrip()

    def _info(self, device: Any, which: str) -> str:
        info = getattr(self._rs.camera_info, which)
        return str(device.get_info(info)) if device.supports(info) else ""

    # -------------------------------------------------------------------------------------------------------- exposure

    def _expose(self, height: int, width: int) -> None:
        """Fix what the options fix. Raises DeviceUnsuitableError where the sensor cannot."""
        option = self._rs.option
        exposure, balance = self.options.exposure, self.options.white_balance
        if "freeze" in (exposure, balance):
            self._settle()
        if exposure == "freeze":
            found = self._told("actual_exposure"), self._told("gain_level")
            default = self._sensor.get_option(option.exposure), self._sensor.get_option(option.gain)
            if None in found or found == default:
                self._cannot_freeze("exposure and gain")
            self._fix(option.enable_auto_exposure, {option.exposure: found[0], option.gain: found[1]})
            self._facts["exposure"] = f"frozen at {found[0]:g}, gain {found[1]:g}"
        elif isinstance(exposure, float):
            values = {option.exposure: exposure}
            if self.options.gain is not None:
                values[option.gain] = self.options.gain
            self._fix(option.enable_auto_exposure, values)
            self._facts["exposure"] = f"fixed at {exposure:g}"
        if balance == "freeze":
            kelvin = self._told("white_balance")
            if kelvin in (None, self._sensor.get_option(option.white_balance)):
                self._cannot_freeze("white balance")
            self._fix(option.enable_auto_white_balance, {option.white_balance: kelvin})
        elif isinstance(balance, float):
            self._fix(option.enable_auto_white_balance, {option.white_balance: balance})

    def _settle(self) -> None:
        end = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < end:
            try:
                self.read(end - time.monotonic())
            except TimeoutError as error:
                raise DeviceLostError(f"{self._facts['device']} sends no frames to find its exposure from") from error

    def _told(self, what: str) -> float | None:
        """What the newest frame's metadata says."""
        key = getattr(self._rs.frame_metadata_value, what)
        return float(self._frame.get_frame_metadata(key)) if self._frame.supports_frame_metadata(key) else None

    def _cannot_freeze(self, what: str) -> None:
        raise DeviceUnsuitableError(
            f"{self._facts['device']} does not tell the {what} that its automatic control has found (RGB modules never "
            "do), so it cannot be frozen; expected a number in the options, which realsense-viewer helps to find"
        )

    def _fix(self, automatic: Any, values: dict[Any, Any]) -> None:
        for option, value in values.items():
            if not self._sensor.supports(option):
                raise DeviceUnsuitableError(f"{self._facts['device']} has no control {option}, expected to set it")
            bounds = self._sensor.get_option_range(option)
            if not bounds.min <= value <= bounds.max:
                raise DeviceUnsuitableError(
                    f"{self._facts['device']}: found {option} {value:g}, expected {bounds.min:g} to {bounds.max:g}"
                )
        if self._sensor.supports(automatic):
            self._sensor.set_option(automatic, 0.0)
        for option, value in values.items():
            self._sensor.set_option(option, float(value))

    # ------------------------------------------------------------------------------------------------------------ read

    def read(self, timeout: float) -> Frame:
        """The newest frame. A recording that is over is DeviceLostError, as an unplugged camera is in the end."""
        if self._queue is None:
            raise DeviceLostError("the camera is not open")
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            # A recording is asked now and then whether it is over.
            wait = left if self._playback is None else min(left, 2 / self._rate)
            try:
                frame = self._queue.wait_for_frame(max(1, round(1000 * wait)))
            except RuntimeError:
                self._look_at_the_end()
                continue
            received_ns = time.monotonic_ns()
            while newer := self._queue.poll_for_frame():
                frame = newer
            number = frame.get_frame_number()
            if number == self._last:
                self._repeated += 1
                continue
            return self._delivered(frame, number, received_ns)
        raise TimeoutError

    def _look_at_the_end(self) -> None:
        """Play again, or say that it is over. A recording's thread reports its end after its last frame."""
        if self._playback is None or self._playback.current_status() != self._rs.playback_status.stopped:
            return
        if not self.options.loop:
            raise DeviceLostError(f"the recording {self.options.file} is over")
        if self._frames == 0:
            raise DeviceLostError(f"the recording {self.options.file} holds no colour frame")
        self._sensor.stop()
        self._sensor.close()
        self._playback.seek(timedelta(0))
        self._sensor.open(self._profile)
        self._sensor.start(self._queue)
        # The last frame of this turn may have been missed; the longest turn so far says where it ends.
        self._longest = max(self._longest, self._last or 0)
        self._lost += self._longest - (self._last or 0)
        self._base += self._longest
        self._last = 0
        self._device_clock.restart()

    def _delivered(self, frame: Any, number: int, received_ns: int) -> Frame:
        if self._last is not None and number < self._last:
            self._base += self._last  # the counter began anew: ours goes on
        elif self._last is not None:
            self._lost += number - self._last - 1
        self._last = number
        self._frame = frame
        captured_ns, clock = self._captured(frame, received_ns)
        self._frames += 1
        image: Image = np.asanyarray(frame.get_data())
        return Frame(image, captured_ns, received_ns, self._base + number, clock)

    def _captured(self, frame: Any, received_ns: int) -> tuple[int, Literal["device", "arrival"]]:
        domain = frame.get_frame_timestamp_domain()
        if self._domain not in (None, domain):
            self._domain_changes += 1
            self._device_clock.restart()
        if self._domain != domain:
            self._domain = domain
            self._facts["clock"] = str(domain).removeprefix("timestamp_domain.")
        stamp_ns = round(1e6 * frame.get_timestamp())
        if self._playback is not None or domain == self._rs.timestamp_domain.hardware_clock:
            return self._device_clock.captured_ns(stamp_ns, received_ns), "device"
        if domain == self._rs.timestamp_domain.global_time:
            return self._wall_clock.captured_ns(stamp_ns, received_ns), "device"
        return received_ns, "arrival"

    # ------------------------------------------------------------------------------------------------------------ rest

    def health(self) -> CameraHealth:
        """Counts; `clock_steps` includes changes of the stamps' domain."""
        steps = self._device_clock.steps + self._wall_clock.steps + self._domain_changes
        return CameraHealth(self._frames, self._lost, self._repeated, steps, self._facts)

    def close(self) -> None:
        """Stop. librealsense has hung here, too."""
        sensor, self._sensor, self._queue, self._frame = self._sensor, None, None, None
        if sensor is not None:
            for ending in (sensor.stop, sensor.close):
                try:
                    ending()
                except RuntimeError:  # not started, not opened, or gone: nothing is left to end
                    continue
        self._playback = None


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
