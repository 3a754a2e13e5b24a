"""A world of two arms with two axes each, for the tests of how worlds are shared."""

import numpy as np


class PlainWorld:
    dt = 0.002
    arms = {"left": (0, 2), "right": (2, 4)}  # noqa: RUF012

    def __init__(self, start=0.0):
        self.axes = np.full(4, start)

    def step(self, targets):
        self.axes = self.axes + np.clip(targets - self.axes, -self.dt, self.dt)  # 1 rad/s

    def position(self):
        return self.axes

    def scene(self):
        return self.axes.copy()

    def tell(self, message):
        if message.get("reset") is not None:
            self.axes = np.full(4, float(message["reset"]))
        return {"axes": self.axes.tolist()}


class Failing:
    def __init__(self):
        raise ValueError("no such\ntable")


class Painter:
    """A picture whose grey is the first axis."""

    facts = {"painter": "plain"}  # noqa: RUF012

    def draw(self, scene, height, width):
        return np.full((height, width, 3), round(100 * scene[0]), np.uint8)
