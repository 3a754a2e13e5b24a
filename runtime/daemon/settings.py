"""What one run is asked to be."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatvla_edge.drivers.rig import Rig

Kind = Literal["live", "dry", "shadow"]


@dataclass(frozen=True)
class Settings:
    """``bundle``: the directory itself, so that a link switched meanwhile changes nothing for a policy that restarts;
    ``given``: the path that it was named by. ``kind``: `dry` does everything but send commands to an arm; `shadow` does
    not even ask to: the operator's own controller drives, and `arm` is refused. ``duration``: s, None for ever.
    ``folder``: of the session's log; ``frame_rate``: pictures per second and camera in the log. ``arm_at_once``: for
    demos on simulated rigs only.
    """

    rig: Rig
    bundle: Path
    folder: Path
    instruction: str = ""
    kind: Kind = "live"
    duration: float | None = None
    record: bool = True
    frame_rate: float = 30.0
    rotate_bytes: int = 2**30
    threads: int = 1
    realtime: bool = True
    arm_at_once: bool = False
    given: Path | None = None
