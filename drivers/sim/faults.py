"""Faults on purpose, for simulated devices: planned in the rig file, or switched on and off while the rig runs.

A switch is a file that holds the word of the present fault, or nothing; `switch` writes it, in one write, so a device
process never reads half a word.
"""

import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from pydantic import Field

from chatvla_edge.drivers.protocols import Options

WORD_BYTES = 32  # what is read and written at a time
LOOK_SECONDS = 0.01  # how often a call that hangs looks whether it still has to


class PlannedFault(Options):
    """A fault that begins ``after`` seconds of being open and lasts ``lasts`` seconds; null for ever."""

    after: float = Field(ge=0)
    lasts: float | None = Field(default=None, gt=0)


class Faults:
    """Which fault is present, if any. ``planned``: (word, after s, lasts s); ``words``: what a switch may say."""

    def __init__(
        self,
        planned: Sequence[tuple[str, float, float | None]],
        switch: Path | None,
        words: Collection[str],
        now: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._planned = planned
        self._switch = switch
        self._words = frozenset(words)
        self._now = now
        self._file: int | None = None
        self._begin_ns: int | None = None

    def start(self) -> None:
        """The device is being opened: planned faults count from the first time on. Raises OSError."""
        if self._begin_ns is None:
            self._begin_ns = self._now()
        if self._switch is not None and self._file is None:
            self._file = os.open(self._switch, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def present(self) -> str:
        """The word of the present fault, "" for none. Raises ValueError for a switch that says another word."""
        if self._file is not None and (word := os.pread(self._file, WORD_BYTES, 0).strip(b" \0\n").decode()):
            if word not in self._words:
                raise ValueError(f"{self._switch}: found {word!r}, expected one of: {', '.join(sorted(self._words))}")
            return word
        if self._begin_ns is None:
            return ""
        seconds = 1e-9 * (self._now() - self._begin_ns)
        for word, after, lasts in self._planned:
            if after <= seconds and (lasts is None or seconds < after + lasts):
                return word
        return ""

    def suffer(self) -> str:
        """`present`, after what no caller gets away from: ``hang`` returns when it is over, ``crash`` never."""
        word = self.present()
        if word == "crash":
            os.abort()  # as a vendor library's uncaught exception does
        while word == "hang":
            time.sleep(LOOK_SECONDS)
            word = self.present()
        return word

    def stop(self) -> None:
        """The device is closed. May be called twice."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def switch(file: Path, word: str) -> None:
    """Make ``word`` the present fault of the device that looks at ``file``; "" ends it. Raises ValueError, OSError."""
    text = word.encode()
    if len(text) > WORD_BYTES:
        raise ValueError(f"found the fault {word!r}, expected at most {WORD_BYTES} letters")
    target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(target, text.ljust(WORD_BYTES), 0)
    finally:
        os.close(target)
