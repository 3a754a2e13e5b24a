"""Why the vendor's `arx-r5-sdk` is no driver here: to construct it is to move the arm (docs/decisions.md)."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from chatvla_edge.drivers.standins.can import CanBus, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("arx_r5_sdk") is None,
        reason="arx-r5-sdk is not installed (a source release that wants cmake, libkdl-parser and liborocos-kdl)",
    ),
]


def test_its_constructor_drives_every_joint_to_zero(tmp_path):
    """Should a release end this, a driver may be written."""
    library = Path(find_spec("arx_r5_sdk").origin).parent / "lib"
    script = "import arx_r5_sdk; arx_r5_sdk.SingleArm({'can_port': 'can0', 'type': 0, 'num_joints': 7, 'dt': 0.05})"
    with CanBus(tmp_path, "can0") as bus:
        before = bus.tell()["position"]
        assert abs(before["4"]) > 0.4
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | environment(tmp_path) | {"LD_LIBRARY_PATH": str(library)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=True,
        )
        after = bus.tell()["position"]
    assert all(abs(after[joint]) < 0.05 for joint in "124567")
