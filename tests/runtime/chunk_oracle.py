"""An independent account of what the servo should do with chunks: plain numpy, whole histories, no state machine.

It knows the definition only: actions[i] is due at tau_observation + (i + first_step) * dt. From the list of chunks
that had arrived by each tick it computes which chunk is in use and what is due, without the runtime's queue, slots or
incremental bookkeeping.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Arrival:
    """A chunk and the servo's state when it came: the tick it was pushed on and the tau before that tick."""

    chunk: object
    tick: int
    tau: float
    epoch: int


def due(chunk) -> np.ndarray:
    return np.array([chunk.tau_observation + (i + chunk.first_step) * chunk.dt for i in range(len(chunk.actions))])


def verdict(arrivals: list[Arrival], index: int, horizon: int) -> str:
    """What becomes of arrival ``index``, given all before it (blend, switch, rtc, ensemble)."""
    arrival = arrivals[index]
    chunk = arrival.chunk
    if not 1 <= len(chunk.actions) <= horizon:
        return "malformed"
    if chunk.epoch != arrival.epoch:
        return "old_epoch" if chunk.epoch < arrival.epoch else "future_epoch"
    if chunk.tau_observation > arrival.tau + 1e-6:
        return "future"
    for earlier in range(index):
        other = arrivals[earlier].chunk
        if (
            other.epoch == chunk.epoch
            and other.tau_observation > chunk.tau_observation
            and verdict(arrivals, earlier, horizon) == "accepted"
        ):
            return "out_of_order"
    if due(chunk)[-1] < arrival.tau:
        return "stale"
    if not np.isfinite(chunk.actions).all():
        return "not_finite"
    return "accepted"


def linear(chunk, tau: float) -> np.ndarray:
    """[A]: the chunk at tau, by np.interp over the due times; held past the ends."""
    times = due(chunk)
    return np.array([np.interp(tau, times, column) for column in np.asarray(chunk.actions).T])


def newest(accepted: list, tau: float):
    """The newest accepted chunk that has an action due by tau, or None."""
    ready = [chunk for chunk in accepted if due(chunk)[0] <= tau]
    return ready[-1] if ready else None


def act_average(accepted: list, tau: float, m: float) -> np.ndarray | None:
    """ACT Algorithm 2, as its temporal aggregation does it: all predictions for one instant, the oldest first."""
    rows = [linear(chunk, tau) for chunk in accepted if due(chunk)[0] <= tau <= due(chunk)[-1]]
    if not rows:
        return None
    weights = np.array([math.exp(-m * i) for i in range(len(rows))])
    return (np.array(rows) * weights[:, None]).sum(0) / weights.sum()
