"""LeRobot's action-queue loop, as a peer of the servo: written anew from its public source, at the same rate.

What its `lerobot-rollout` does per tick (huggingface/lerobot at 7427f318, August 2026: `rollout/strategies/base.py`
and `core.py`, `policies/rtc/action_queue.py`, `utils/action_interpolator.py`, `utils/cycle_timer.py`), with its
asynchronous engine, in which a thread of the same process computes the chunks:

1. the robot's observation, a dict with an entry per joint, under the robot's lock; handed to the policy thread;
2. where the interpolated actions are used up: the next action out of a tensor `[H, A]` under the queue's lock, cloned,
   and `multiplier` tensors interpolated between it and the one before;
3. a dict of that action with an `.item()` per joint, sent under the robot's lock;
4. `time.sleep` until the tick's deadline, which is reckoned from the tick that took an action out of the queue.

Left out, in its favour: cameras, processors, telemetry, its own bookkeeping. The robot is a dict. Nothing limits or
blends, which the servo's tick does. It uses torch tensors as the original does, so it needs torch.
"""

import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.runtime import realtime

HORIZON = 50


class Queue:
    """Actions of the newest chunk that have not been taken."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rows: Any = None
        self.next = 0

    def take(self) -> Any:
        """The next action `[A]`, None where there is none."""
        with self.lock:
            if self.rows is None or self.next >= len(self.rows):
                return None
            action = self.rows[self.next]
            self.next += 1
            return action.clone()

    def replace(self, rows: Any) -> None:
        """A new chunk `[H, A]`; what was left of the old one is dropped."""
        with self.lock:
            self.rows = rows.clone()
            self.next = 0


class Robot:
    """A robot without a bus: positions are where they were sent."""

    def __init__(self, joints: int) -> None:
        self.lock = threading.Lock()
        self.position = {f"joint_{i}.pos": 0.0 for i in range(joints)}

    def observe(self) -> dict[str, float]:
        """Every joint's position."""
        with self.lock:
            return dict(self.position)

    def send(self, action: dict[str, float]) -> None:
        """Be there."""
        with self.lock:
            self.position = dict(action)


def run(
    joints: int, action_rate: float, multiplier: int, seconds: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Run it. Per tick the lateness behind its own deadline and the work, s; and the rate that it held, 1/s.

    Commands go out at ``action_rate * multiplier``. Raises ImportError without torch.
    """
    import torch

    robot, queue = Robot(joints), Queue()
    keys = list(robot.position)
    interval = 1e9 / (action_rate * multiplier)
    ticks = round(seconds * action_rate * multiplier)
    late, work = np.empty(ticks), np.empty(ticks)
    seen: dict[str, float] = {}
    buffer: list[Any] = []
    before: Any = None
    place = done = 0
    start = deadline = float(realtime.now_ns())
    first = start
    for tick in range(ticks):
        begun = realtime.now_ns()
        late[tick] = max(0.0, begun - deadline)
        if place >= len(buffer):
            start, done = float(begun), 0
        observed = robot.observe()
        seen.update(observed)
        if place >= len(buffer):
            _ = np.array([observed[key] for key in keys], np.float32)
            action = queue.take()
            if action is None:  # stands for the policy's thread, once in a second
                queue.replace(torch.randn(HORIZON, joints))
                action = queue.take()
            buffer = [action] if before is None else [
                before + i / multiplier * (action - before) for i in range(1, multiplier)
            ] + [action.clone()]  # fmt: skip
            before, place = action.clone(), 0
        sent = buffer[place]
        place += 1
        robot.send({key: sent[i].item() for i, key in enumerate(keys)})
        done += 1
        deadline = start + done * interval
        now = realtime.now_ns()
        work[tick] = now - begun
        if deadline > now:
            time.sleep((deadline - now) * 1e-9)
    held = ticks / ((realtime.now_ns() - first) * 1e-9)
    return late * 1e-9, work * 1e-9, held
