"""One observation: the newest frames that belong together, the state, and the trajectory time at which it was so."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.runtime.slots import Ring

Rows = NDArray[np.void]


@dataclass(frozen=True)
class Seen:
    """One camera's newest frame."""

    sequence: int
    captured_ns: int
    received_ns: int


def spread(frames: Mapping[str, Seen]) -> int:
    """Time between the oldest and the newest capture, ns."""
    times = [frame.captured_ns for frame in frames.values()]
    return max(times) - min(times)


class TrajectoryClock:
    """tau at a host time, out of the servo's telemetry. ``rows``: how many ticks back a frame may lie."""

    def __init__(self, ring: Ring, dtype: np.dtype[np.void], rows: int) -> None:
        self._ring = ring
        self._rows = np.zeros(rows, dtype)

    def at(self, host_ns: int) -> float | None:
        """tau (s) at host time ``host_ns``; None before the first tick, and for a time before the kept ones."""
        got = self._ring.last(self._rows)
        if got == 0:
            return None
        rows = self._rows[len(self._rows) - got :]
        times, taus = rows["tick_ns"], rows["tau"]
        if host_ns < times[0]:
            return None
        if host_ns >= times[-1]:
            return float(taus[-1] + rows["tau_rate"][-1] * 1e-9 * (host_ns - int(times[-1])))
        return float(np.interp(float(host_ns - int(times[0])), (times - times[0]).astype(np.float64), taus))


class StateHistory:
    """One device's positions at a host time, out of its ring."""

    def __init__(self, ring: Ring, dtype: np.dtype[np.void], axes: int, rows: int) -> None:
        self._ring = ring
        self._axes = axes
        self._rows = np.zeros(rows, dtype)
        self._stamps = np.zeros((rows, 3), np.int64)

    def newest(self) -> tuple[NDArray[np.float64], int] | None:
        """Positions [axes] and their host time; None before the first."""
        got = self._ring.last(self._rows[-1:], self._stamps[-1:])
        if got == 0:
            return None
        return np.array(self._rows["q"][-1, : self._axes]), int(self._stamps[-1, 2])

    def at(self, host_ns: int) -> NDArray[np.float64] | None:
        """Positions [axes] at ``host_ns``, interpolated; the newest where it is later; None for a time not kept."""
        got = self._ring.last(self._rows, self._stamps)
        if got == 0:
            return None
        first = len(self._rows) - got
        times, places = self._stamps[first:, 2], self._rows["q"][first:, : self._axes]
        after = int(np.searchsorted(times, host_ns))
        if after == 0:
            return np.array(places[0]) if times[0] == host_ns else None
        if after == got:
            return np.array(places[-1])
        span = int(times[after] - times[after - 1])
        share = (host_ns - int(times[after - 1])) / span if span else 1.0
        between: NDArray[np.float64] = (1 - share) * places[after - 1] + share * places[after]
        return between
