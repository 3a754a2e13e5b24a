"""A switch on a GPIO line, by the kernel's character device (libgpiod 2).

Wired so that a broken wire stops: the switch closes the line to its active level, the bias pulls it to the other one.
Tested against a stand-in of the library's interface; not run on a GPIO chip.
"""

import contextlib
from importlib import import_module
from typing import Any, ClassVar, Literal

from chatvla_edge.drivers.errors import DeviceNotFoundError, MissingLibraryError
from chatvla_edge.drivers.protocols import Options


class GpioOptions(Options):
    """Options of the driver `gpio`.

    Attributes:
        line: number of the line on the chip, or its name (`gpioinfo` lists them).
        chip: the chip's device file.
        active: the level at which motion is allowed.
        bias: what the line is pulled to while the switch is open; `as_is` where a resistor on the board does that.
    """

    line: int | str
    chip: str = "/dev/gpiochip0"
    active: Literal["high", "low"] = "high"
    bias: Literal["pull_up", "pull_down", "as_is"] = "as_is"


class Gpio:
    """A line that is held as an input for as long as it is open."""

    OPTIONS: ClassVar[type[Options]] = GpioOptions

    def __init__(self, options: GpioOptions) -> None:
        self.options = options
        self._request: Any = None
        self._active: Any = None

    def open(self) -> None:
        """Take the line. Raises MissingLibraryError, DeviceNotFoundError."""
        try:
            gpiod, line = import_module("gpiod"), import_module("gpiod.line")
        except ImportError as error:
            raise MissingLibraryError(
                f"a GPIO switch needs the module `gpiod` 2: pip install 'chatvla-edge[switch]' ({error})"
            ) from error
        if not hasattr(gpiod, "request_lines"):
            raise MissingLibraryError(
                "found libgpiod 1's module `gpiod`, expected version 2: pip install 'chatvla-edge[switch]'"
            )
        options = self.options
        settings = gpiod.LineSettings(
            direction=line.Direction.INPUT, bias=line.Bias[options.bias.upper()], active_low=options.active == "low"
        )
        try:
            self._request = gpiod.request_lines(options.chip, consumer="chatvla-edge", config={options.line: settings})
        except (OSError, ValueError) as error:
            raise DeviceNotFoundError(
                f"line {options.line} of {options.chip}: {error}. See `gpioinfo`; the user needs the group of the chip."
            ) from error
        self._active = line.Value.ACTIVE

    def enabled(self) -> bool:
        """Whether the line has its active level now."""
        if self._request is None:
            return False
        try:
            return bool(self._request.get_value(self.options.line) == self._active)
        except Exception:  # noqa: BLE001  # whatever it is, the level is not known
            return False

    def close(self) -> None:
        """Let go of the line."""
        if self._request is not None:
            with contextlib.suppress(OSError):
                self._request.release()
            self._request = None
