"""What the process of an arm or gripper starts with: a driver of the registry."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.protocols import Arm, ArmState


class Untouched:
    """An arm that is looked at and never told anything: a dry run, or one that its own controller drives."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm

    def open(self, rate: float) -> None:
        """The arm's."""
        self.arm.open(rate)

    def state(self) -> ArmState:
        """The arm's; where it heads for is none of ours."""
        return replace(self.arm.state(), target=None)

    def command(self, position: NDArray[np.float64]) -> None:
        """Not sent."""

    def stop(self) -> None:
        """Not sent."""

    def close(self) -> None:
        """The arm's."""
        self.arm.close()


def arm(driver: str, options: dict[str, Any], dry: bool) -> "Arm | Untouched":
    """An arm or gripper, not opened; ``dry``: one that nothing is sent to."""
    chosen: Arm = registry.create("arms", driver, options)
    return Untouched(chosen) if dry else chosen
