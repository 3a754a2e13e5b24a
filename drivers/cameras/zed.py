"""ZED cameras: through Stereolabs' SDK (`zed`), or as the UVC camera that a ZED also is (`zed_uvc`).

**The SDK's calls were never run**: the SDK needs a vendor's download and an NVIDIA GPU, for SVO files, too, and no
stand-in exists. They are written against the published binding (stereolabs/zed-python-api 5.4, `src/pyzed/sl.pyx`);
the tests drive them with a model of it. `grab` waits for a frame without a limit of ours and has hung after a replug
(zed-sdk#716): the camera's process is there to be killed.

The `pyzed` on PyPI is another project's; the SDK's own comes from `/usr/local/zed/get_python_api.py`.

A ZED's stamp is the wall clock at which the picture lay in the host's memory; its way there took 2 or 3 frame periods
(documentation of `get_timestamp`), so `captured_ns` lies `transport_periods` before it.
"""

import time
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from chatvla_edge.drivers.cameras import pixels
from chatvla_edge.drivers.cameras.clock import DeviceClock, WallClock
from chatvla_edge.drivers.cameras.uvc import Uvc, UvcOptions
from chatvla_edge.drivers.errors import (
    DeviceLostError,
    DeviceNotFoundError,
    DeviceUnsuitableError,
    DriverError,
    MissingLibraryError,
)
from chatvla_edge.drivers.protocols import CameraHealth, Frame, Options

View = Literal["left", "right", "side_by_side"]

# mode of the SDK: width of one eye, height, rates
MODES: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "HD2K": (2208, 1242, (15,)),
    "HD1080": (1920, 1080, (15, 30)),
    "HD720": (1280, 720, (15, 30, 60)),
    "VGA": (672, 376, (15, 30, 60, 100)),
}

GET_API = "python /usr/local/zed/get_python_api.py"

# What `open` may answer, and what to do; anything else is a lost device.
NOT_FOUND = ("CAMERA_NOT_DETECTED", "CAMERA_DETECTION_ISSUE", "SENSORS_NOT_AVAILABLE")
UNSUITABLE = {
    "NO_GPU_COMPATIBLE": "the SDK needs an NVIDIA GPU, even for pictures; `zed_uvc` needs none",
    "NOT_ENOUGH_GPU_MEMORY": "give the policy less, or use `zed_uvc`",
    "INVALID_RESOLUTION": "the camera has no such mode",
    "LOW_USB_BANDWIDTH": "use its own USB 3 port and cable, or a smaller mode",
    "CALIBRATION_FILE_NOT_AVAILABLE": "run ZED Calibration or ZED Diagnostic once, online",
    "INVALID_CALIBRATION_FILE": "run ZED Calibration",
    "INVALID_SVO_FILE": "the file is no SVO of this SDK",
    "SVO_UNSUPPORTED_COMPRESSION": "convert the file with ZED SVOEditor",
    "INVALID_FIRMWARE": "update it with ZED Explorer",
    "NVIDIA_DRIVER_OUT_OF_DATE": "update the driver",
    "INCOMPATIBLE_SDK_VERSION": "install the SDK and its Python API anew, from one release",
    "CORRUPTED_SDK_INSTALLATION": "install the SDK anew",
}


def mode_of(height: int, width: int, rate: float, view: View) -> tuple[str, int]:
    """The SDK's mode for pictures of that size, and the width of one eye. Raises DeviceUnsuitableError."""
    eye = width // 2 if view == "side_by_side" else width
    for name, (wide, high, rates) in MODES.items():
        if (wide, high) == (eye, height) and rate in rates and (view != "side_by_side" or width % 2 == 0):
            return name, eye
    factor = 2 if view == "side_by_side" else 1
    offered = ", ".join(
        f"{factor * wide}x{high} at {'/'.join(map(str, rates))}" for wide, high, rates in MODES.values()
    )
    raise DeviceUnsuitableError(f"a ZED offers {offered} ({view}), expected {width}x{height} at {rate:g}")


def sdk() -> Any:
    """The module pyzed.sl of the SDK. Raises MissingLibraryError."""
    found = find_spec("pyzed")
    if found is None:
        raise MissingLibraryError(
            f"found no module pyzed, expected the ZED SDK's: install the SDK, then {GET_API} (not the pyzed of PyPI)"
        )
    # The namesake is a single file, and importing it may fail for reasons of its own: it is not imported at all.
    if not any(list(Path(folder).glob("sl.*")) for folder in _folders(found)):
        raise MissingLibraryError(
            "found a module pyzed without pyzed.sl: the package of that name on PyPI is another project's. "
            f"`pip uninstall pyzed`, then install the ZED SDK's own: {GET_API}"
        )
    try:
        module = import_module("pyzed.sl")
    except ImportError as error:
        raise MissingLibraryError(
            f"found the SDK's pyzed, but it does not load: {error}. SDK, CUDA, Python and NumPy must fit each other: "
            f"run {GET_API} with this interpreter ({'NumPy 2 since SDK 5' if 'numpy' in str(error) else 'same CUDA'})"
        ) from error
    except ValueError as error:  # what a binding built for another NumPy raises: "numpy.dtype size changed"
        raise MissingLibraryError(
            f"found the SDK's pyzed, built for another NumPy ({error}); run {GET_API} with this interpreter, or give "
            "the camera an environment of its own and name its interpreter as `python`"
        ) from error
    if not hasattr(getattr(module, "Camera", None), "get_sdk_version"):
        raise MissingLibraryError(f"found a module pyzed.sl that is not the ZED SDK's: remove it, then {GET_API}")
    return module


def _folders(spec: ModuleSpec) -> list[str]:
    return list(spec.submodule_search_locations or ())


class ZedOptions(Options):
    """Options of a rig file.

    ``serial``: which camera. ``svo``: a recording of the SDK's instead, ``loop``: for ever. ``rectified``: whether the
    SDK removes distortion with the factory's calibration. ``exposure`` (percent of the frame period), ``gain`` (0-100)
    and ``white_balance`` (kelvin): `auto`, `freeze`, or numbers. ``transport_periods``: frame periods from exposure to
    the SDK's stamp.
    """

    serial: int | None = None
    svo: Path | None = None
    loop: bool = False
    view: View = "left"
    rectified: bool = True
    exposure: float | Literal["auto", "freeze"] = "auto"
    gain: float | None = Field(default=None, ge=0, le=100)
    white_balance: float | Literal["auto", "freeze"] = "auto"
    transport_periods: float = Field(default=2.5, ge=0, le=10)

    @model_validator(mode="after")
    def _consistent(self) -> "ZedOptions":
        if self.svo is not None and self.serial is not None:
            raise ValueError("found both serial and svo, expected a camera or a recording")
        if self.loop and self.svo is None:
            raise ValueError("found loop without an svo to play")
        if self.gain is not None and not isinstance(self.exposure, float):
            raise ValueError("found a fixed gain beside an automatic exposure, expected exposure as a number, too")
        return self


class Zed:
    """A ZED through the SDK; never run, see the module."""

    OPTIONS = ZedOptions

    def __init__(self, options: ZedOptions) -> None:
        self.options = options
        self._sl: Any = None
        self._camera: Any = None
        self._forget()

    def _forget(self) -> None:
        self._wall_clock = WallClock()
        self._device_clock = DeviceClock()
        self._frames = self._broken = self._base = 0
        self._last: int | None = None
        self._lost = self._repeated = 0
        self._facts: dict[str, str | int | float | bool] = {}

    def open(self, height: int, width: int, rate: float) -> None:
        """Open by the SDK, without depth; it may take seconds."""
        self.close()
        self._forget()
        mode, _ = mode_of(height, width, rate, self.options.view)
        sl = self._sl = sdk()
        parameters = sl.InitParameters()
        parameters.camera_resolution = getattr(sl.RESOLUTION, mode)
        parameters.camera_fps = int(rate)
        parameters.depth_mode = sl.DEPTH_MODE.NONE
        parameters.sdk_verbose = 0
        parameters.open_timeout_sec = 8.0
        if self.options.svo is not None:
            if not self.options.svo.is_file():
                raise DeviceNotFoundError(f"found no recording {self.options.svo}")
            parameters.set_from_svo_file(str(self.options.svo))
            parameters.svo_real_time_mode = True
        elif self.options.serial is not None:
            parameters.set_from_serial_number(self.options.serial)
        camera = sl.Camera()
        answer = camera.open(parameters)
        # Codes below SUCCESS are warnings.
        if answer.value > sl.ERROR_CODE.SUCCESS.value:
            camera.close()
            raise refusal(answer.name, str(self.options.svo or self.options.serial or "ZED"))
        self._camera = camera
        information = camera.get_camera_information()
        resolution = information.camera_configuration.resolution
        factor = 2 if self.options.view == "side_by_side" else 1
        if (factor * resolution.width, resolution.height) != (width, height):
            self.close()
            raise DeviceUnsuitableError(
                f"the ZED gives {factor * resolution.width}x{resolution.height}, expected {width}x{height}"
            )
        self._period_ns = round(1e9 / rate)
        self._mat = sl.Mat()
        self._view = getattr(sl.VIEW, view_name(self.options.view, self.options.rectified))
        self._image = np.empty((height, width, 3), np.uint8)
        self._facts |= {
            "device": str(information.camera_model),
            "serial": str(information.serial_number),
            "sdk": str(sl.Camera.get_sdk_version()),
            "exposure": str(self.options.exposure),
        }
        if self.options.svo is None:
            self._expose()

    def _expose(self) -> None:
        """Fix what the options fix. The SDK tells the automatic's values, so they can be frozen after some frames."""
        settings, options = self._sl.VIDEO_SETTINGS, self.options
        if "freeze" in (options.exposure, options.white_balance):
            for _ in range(max(1, round(2e9 / self._period_ns))):
                self.read(0.0)
        if options.exposure == "auto":
            self._set(settings.AEC_AGC, 1)
        else:
            frozen = options.exposure == "freeze"
            exposure = self._get(settings.EXPOSURE) if frozen else options.exposure
            gain = self._get(settings.GAIN) if frozen else options.gain
            self._set(settings.AEC_AGC, 0)
            self._set(settings.EXPOSURE, exposure)
            if gain is not None:
                self._set(settings.GAIN, gain)
        if options.white_balance == "auto":
            self._set(settings.WHITEBALANCE_AUTO, 1)
        else:
            kelvin = options.white_balance
            kelvin = self._get(settings.WHITEBALANCE_TEMPERATURE) if kelvin == "freeze" else kelvin
            self._set(settings.WHITEBALANCE_AUTO, 0)
            self._set(settings.WHITEBALANCE_TEMPERATURE, kelvin)

    def _set(self, setting: Any, value: Any) -> None:
        answer = self._camera.set_camera_settings(setting, round(value))
        if answer.value > self._sl.ERROR_CODE.SUCCESS.value:
            raise DeviceUnsuitableError(f"the ZED does not take {setting.name} {value:g}: {answer.name}")

    def _get(self, setting: Any) -> float:
        answer, value = self._camera.get_camera_settings(setting)
        if answer.value > self._sl.ERROR_CODE.SUCCESS.value:
            raise DeviceUnsuitableError(f"the ZED does not tell {setting.name}: {answer.name}")
        return float(value)

    def read(self, timeout: float) -> Frame:
        """The newest frame. ``timeout`` cannot be kept: `grab` waits by itself, and says when it gives up."""
        if self._camera is None:
            raise DeviceLostError("the ZED is not open")
        codes = self._sl.ERROR_CODE
        answer = self._camera.grab()
        if answer.name == "END_OF_SVOFILE_REACHED" and self.options.loop:
            self._camera.set_svo_position(0)
            self._base += self._last or 0
            self._last = 0
            self._device_clock.restart()
            answer = self._camera.grab()
        received_ns = time.monotonic_ns()
        if answer.name == "END_OF_SVOFILE_REACHED":
            raise DeviceLostError(f"the recording {self.options.svo} is over")
        if answer.name in ("CORRUPTED_FRAME", "CAMERA_REBOOTING"):
            self._broken += 1
            raise TimeoutError(answer.name)
        if answer.value > codes.SUCCESS.value:
            raise DeviceLostError(f"the ZED does not grab: {answer.name}")
        answer = self._camera.retrieve_image(self._mat, self._view, self._sl.MEM.CPU)
        if answer.value > codes.SUCCESS.value:
            raise DeviceLostError(f"the ZED does not give its picture: {answer.name}")
        pixels.bgra_to_rgb(self._mat.get_data(), self._image)
        number = self._number()
        if self._last is not None and number <= self._last:
            self._repeated += 1
            raise TimeoutError("the SDK gave a frame again")
        self._lost += 0 if self._last is None else number - self._last - 1
        self._last = number
        self._frames += 1
        stamp_ns = int(self._camera.get_timestamp(self._sl.TIME_REFERENCE.IMAGE).get_nanoseconds())
        return Frame(self._image, self._captured(stamp_ns, received_ns), received_ns, self._base + number, "device")

    def _number(self) -> int:
        """Of this frame: the SDK counts what it dropped, and the place in a recording."""
        if self.options.svo is not None:
            return int(self._camera.get_svo_position()) + 1
        return self._frames + 1 + int(self._camera.get_frame_dropped_count())

    def _captured(self, stamp_ns: int, received_ns: int) -> int:
        if self.options.svo is not None:
            return self._device_clock.captured_ns(stamp_ns, received_ns)
        transport_ns = round(self.options.transport_periods * self._period_ns)
        return self._wall_clock.captured_ns(stamp_ns - transport_ns, received_ns)

    def health(self) -> CameraHealth:
        """Counts."""
        steps = self._wall_clock.steps + self._device_clock.steps
        return CameraHealth(self._frames, self._lost, self._repeated, steps, self._facts)

    def close(self) -> None:
        """Close by the SDK."""
        camera, self._camera = self._camera, None
        if camera is not None:
            camera.close()


def view_name(view: View, rectified: bool) -> str:
    """The SDK's name of a view."""
    return f"{view.upper()}{'' if rectified else '_UNRECTIFIED'}"


def refusal(code: str, which: str) -> DriverError:
    """What `open` answered as one of our errors."""
    if code in NOT_FOUND:
        return DeviceNotFoundError(f"found no ZED where {which} was expected ({code}): look at cable and power")
    if code in UNSUITABLE:
        return DeviceUnsuitableError(f"{which} cannot be opened ({code}): {UNSUITABLE[code]}")
    return DeviceLostError(f"{which} cannot be opened ({code})")


class ZedUvcOptions(UvcOptions):
    """Those of `uvc`, always YUYV, and ``view``: which eye, as the sensor sees it (not rectified)."""

    pixels: Literal["YUYV"] = "YUYV"
    view: View = "left"


class ZedUvc(Uvc):
    """A ZED without its SDK: both eyes side by side as YUYV, of which the wanted one is converted."""

    OPTIONS: type[Options] = ZedUvcOptions
    options: ZedUvcOptions

    def open(self, height: int, width: int, rate: float) -> None:
        """Start the stream of both eyes."""
        _, eye = mode_of(height, width, rate, self.options.view)
        self._open(height, width, rate, 2 * eye, eye if self.options.view == "right" else 0)
