"""A switch in the loop from a serial port's transmit to its receive line: what is sent comes back while it is closed.

Each look sends a byte that nobody can guess and counts what came back of those before. A cut wire, a short to any level
and an adapter that was unplugged all read as released; only a loop that is closed now does not. Two contacts of the
switch suffice, TX on one and RX on the other.
"""

import contextlib
import secrets
import time
from collections import deque
from collections.abc import Callable
from importlib import import_module
from typing import Any, ClassVar

from pydantic import Field

from chatvla_edge.drivers.errors import DeviceNotFoundError, MissingLibraryError
from chatvla_edge.drivers.protocols import Options

WAITING = 8  # bytes on their way; more means that nothing comes back


class SerialLoopOptions(Options):
    """Options of the driver `serial_loop`.

    Attributes:
        port: the serial port; one below /dev/serial/by-id stays the same.
        baud: its speed.
        max_age: how long ago (s) the last byte that came back may have been sent: the time to notice a release, and
            longer than two looks and the adapter's latency (16 ms for FTDI's, unless it is set to 1).
    """

    port: str
    baud: int = Field(default=115200, ge=9600)
    max_age: float = Field(default=0.08, ge=0.02, le=0.5)


class SerialLoop:
    """One port and its loop. It is certain from the third look on: a line that always says the same may guess once."""

    OPTIONS: ClassVar[type[Options]] = SerialLoopOptions

    def __init__(self, options: SerialLoopOptions, now: Callable[[], int] = time.monotonic_ns) -> None:
        self.options = options
        self._now = now
        self._port: Any = None
        self._sent: deque[tuple[int, int]] = deque(maxlen=WAITING)  # byte, host time
        self._good_ns = 0
        self._streak = 0  # bytes that came back in a row

    def open(self) -> None:
        """Connect. Raises MissingLibraryError, DeviceNotFoundError."""
        try:
            serial = import_module("serial")
        except ImportError as error:
            raise MissingLibraryError(
                f"a serial switch needs the module `serial`: pip install 'chatvla-edge[switch]' ({error})"
            ) from error
        try:
            self._port = serial.Serial(self.options.port, self.options.baud, timeout=0, write_timeout=0, exclusive=True)
        except (OSError, ValueError) as error:  # SerialException is an OSError
            raise DeviceNotFoundError(
                f"{self.options.port}: {error}. Is it plugged in, is the user of group `dialout`?"
            ) from error
        self._sent.clear()
        self._streak = 0

    def enabled(self) -> bool:
        """Whether a byte that was sent a moment ago has come back."""
        if self._port is None:
            return False
        now = self._now()
        try:
            for byte in self._port.read(4 * WAITING):
                self._take(byte)
            byte = secrets.randbelow(256)
            self._port.write(bytes([byte]))
            self._sent.append((byte, now))
        except Exception:  # noqa: BLE001  # whatever it is, the loop is not known to be closed
            return False
        return self._streak >= 2 and now - self._good_ns <= round(1e9 * self.options.max_age)

    def close(self) -> None:
        """Let go."""
        if self._port is not None:
            with contextlib.suppress(Exception):
                self._port.close()
            self._port = None

    def _take(self, byte: int) -> None:
        """A byte that came back proves the loop at the time when it was sent. What was sent before it is lost."""
        for index, (sent, then) in enumerate(self._sent):
            if sent == byte:
                # A gap is no streak: what was skipped did not come back.
                self._good_ns, self._streak = then, self._streak + 1 if index == 0 else 1
                for _ in range(index + 1):
                    self._sent.popleft()
                return
        self._streak = 0  # noise, or somebody else's bytes
        self._sent.clear()
