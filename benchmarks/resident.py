"""What a process holds that opened a bundle and answered one query: the robot's side, where torch is never imported."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chatvla_edge.benchmarks.method import once
from chatvla_edge.runtime.bundle import open_bundle
from chatvla_edge.runtime.engines.onnxruntime import Threads
from chatvla_edge.runtime.policy import Policy
from chatvla_edge.runtime.resident import resident

INSTRUCTION = "Solve the equation and point out the correct answer."


@dataclass(frozen=True)
class Resident:
    """Bytes of a process (before: with its libraries, before the bundle), and seconds of opening and of the engines.

    `file` counts mapped pages of the bundle, which the kernel may drop and read again; `anonymous` does not shrink.
    verify_s: every digest checked; load_s: engines and buffers.
    """

    before: int
    rss: int
    anonymous: int
    file: int
    peak: int
    verify_s: float
    load_s: float


def measure(bundle: Path, threads: int) -> Resident:
    """Load `bundle` in a process of its own and let it answer once."""
    program = "import sys; from chatvla_edge.benchmarks.resident import tell; tell(sys.argv[1], int(sys.argv[2]))"
    answer = subprocess.check_output([sys.executable, "-c", program, bundle, str(threads)], text=True)  # noqa: S603
    return Resident(**json.loads(answer))


def tell(path: str, threads: int) -> None:
    """Print what this process holds: the body of `measure`'s process."""
    before = resident()["resident"]
    bundle, verify_s = once(lambda: open_bundle(path))
    policy, load_s = once(lambda: Policy(bundle.path, bundle.manifest, Threads(threads)))
    frames = [np.zeros((camera.height, camera.width, 3), np.uint8) for camera in bundle.manifest.cameras]
    state = np.zeros(bundle.manifest.geometry.head.state_dim, np.float32)
    policy.query(frames, state, INSTRUCTION, policy.noise(0))
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported on the robot's side, and with it its memory")
    held = resident()
    held["rss"] = held.pop("resident")
    found = {"before": before, **held, "verify_s": verify_s, "load_s": load_s}
    sys.stdout.write(json.dumps(found))
