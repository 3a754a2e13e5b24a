"""The streams of a rig: what comes from where, how often, how old it may be. Derived from the rig, said nowhere else.

Daemon, `status` and recorder ask the same three questions of a stream: is it alive, is it fresh, does it keep its rate.
"""

from dataclasses import dataclass
from typing import Literal

from chatvla_edge.drivers.rig import Rig

ALIVE_PERIODS = 10  # silent for longer, a stream counts as dead (openpilot's rule)
ON_RATE = 0.9  # of its rate


@dataclass(frozen=True)
class Stream:
    """One stream. ``rate`` per second, ``max_age`` s; ``required``: whether motion depends on it."""

    role: Literal["cameras", "arms"]
    device: str
    rate: float
    max_age: float
    required: bool

    @property
    def name(self) -> str:
        """The device's place in the rig file: a camera may be called as an arm is."""
        return f"{self.role}.{self.device}"

    def alive(self, silent: float) -> bool:
        """Whether something came at all lately; ``silent``: seconds since anything did."""
        return silent <= max(ALIVE_PERIODS / self.rate, self.max_age)

    def fresh(self, age: float) -> bool:
        """Whether its newest may be acted upon; ``age``: seconds since it was captured."""
        return age <= self.max_age

    def on_rate(self, count: int, seconds: float) -> bool:
        """Whether ``count`` arrivals in ``seconds`` are what it promises; the one in between is given to it."""
        return count + 1 >= ON_RATE * self.rate * seconds


def streams(rig: Rig) -> dict[str, Stream]:
    """Every stream of a rig by name, `cameras.top`, cameras first."""
    cameras = (Stream("cameras", name, one.rate, one.max_age, one.required) for name, one in rig.cameras.items())
    arms = (Stream("arms", name, one.rate, one.max_age, True) for name, one in rig.arms.items())
    return {stream.name: stream for stream in (*cameras, *arms)}
