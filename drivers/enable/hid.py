"""A key or button of an input device (a foot switch, a stop button on USB), by the kernel's evdev interface.

The kernel is asked which keys are down (EVIOCGKEY), so no event can be missed and a device that was unplugged answers
with an error. Needs no library. Tested against a stand-in of that call; not run on an input device.
"""

import fcntl
import os
from typing import ClassVar

from pydantic import Field

from chatvla_edge.drivers.errors import DeviceNotFoundError
from chatvla_edge.drivers.protocols import Options

# linux/input.h
KEY_MAX = 0x2FF
BYTES = KEY_MAX // 8 + 1
_IOC_READ = 2


def _request(number: int, size: int) -> int:
    """linux/ioctl.h: a read of ``size`` bytes of the input class."""
    return _IOC_READ << 30 | size << 16 | ord("E") << 8 | number


EVIOCGKEY = _request(0x18, BYTES)
EVIOCGBIT_KEY = _request(0x21, BYTES)  # which keys the device has


class HidOptions(Options):
    """Options of the driver `hid`.

    Attributes:
        device: its file; one below /dev/input/by-id stays the same.
        key: its number in linux/input-event-codes.h (`evtest` shows it): 304 is the first button of a gamepad.
        held: true where motion is allowed while it is held; false for a stop button, which allows it while it is not.
    """

    device: str
    key: int = Field(ge=0, le=KEY_MAX)
    held: bool = True


class Hid:
    """One key of one device."""

    OPTIONS: ClassVar[type[Options]] = HidOptions

    def __init__(self, options: HidOptions) -> None:
        self.options = options
        self._file: int | None = None

    def open(self) -> None:
        """Connect. Raises DeviceNotFoundError for what cannot be opened, or has no such key."""
        device, key = self.options.device, self.options.key
        try:
            self._file = os.open(device, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            has = self._keys(EVIOCGBIT_KEY)
        except OSError as error:
            self.close()
            raise DeviceNotFoundError(
                f"{device}: {error.strerror}. Is it plugged in, is the user of group `input`?"
            ) from error
        if not has[key // 8] >> key % 8 & 1:
            self.close()
            raise DeviceNotFoundError(f"{device} has no key {key}; `evtest {device}` shows those it has")

    def enabled(self) -> bool:
        """Whether the key is held, or not, as the options want it."""
        if self._file is None:
            return False
        try:
            down = self._keys(EVIOCGKEY)
        except OSError:
            return False
        return bool(down[self.options.key // 8] >> self.options.key % 8 & 1) == self.options.held

    def close(self) -> None:
        """Let go."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _keys(self, request: int) -> bytes:
        assert self._file is not None
        return fcntl.ioctl(self._file, request, bytes(BYTES))
