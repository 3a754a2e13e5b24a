"""An enabling switch that is a file: motion is allowed while it says `on`. For trials and tests without a switch."""

from pathlib import Path
from typing import ClassVar

from chatvla_edge.drivers.errors import DeviceNotFoundError
from chatvla_edge.drivers.protocols import Options


class SimSwitchOptions(Options):
    """Options of the driver `sim_switch`; ``file``: which file."""

    file: Path


class SimSwitch:
    """One file. It is looked at each time, so it may be written, replaced and removed as one likes."""

    OPTIONS: ClassVar[type[Options]] = SimSwitchOptions

    def __init__(self, options: SimSwitchOptions) -> None:
        self.options = options
        self._open = False

    def open(self) -> None:
        """Raises DeviceNotFoundError where there is no such file."""
        if not self.options.file.is_file():
            raise DeviceNotFoundError(f"found no {self.options.file}; `echo on >` it to allow motion")
        self._open = True

    def enabled(self) -> bool:
        """Whether the file says `on`."""
        if not self._open:
            return False
        try:
            return self.options.file.read_bytes().strip() == b"on"
        except OSError:
            return False

    def close(self) -> None:
        """Let go."""
        self._open = False
