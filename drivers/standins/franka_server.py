"""The process behind `FrankaStandIn`: franka-sim's own server with a model, and with faults.

Run by the path of this file and by an interpreter that has franka-sim, which need not have this package.
"""

import logging
import os
import sys
import threading
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import control  # type: ignore[import-not-found]

# Of MuJoCo Menagerie's FR3: what a URDF does not say of its joints.
ARMATURE, DAMPING, FRICTION = 0.1, 1.0, 0.1


def model(folder: Path) -> Path:
    """The FR3 that franka-sim brings, without the meshes that it does not bring, as MuJoCo's XML."""
    import franka_sim
    import mujoco

    tree = ET.parse(Path(franka_sim.__file__).parent / "models" / "fr3.urdf")  # noqa: S314  (of an installed package)
    for link in tree.getroot().iter("link"):
        for part in (*link.findall("visual"), *link.findall("collision")):
            link.remove(part)
    urdf = folder / "fr3.urdf"
    tree.write(urdf)
    spec = mujoco.MjSpec.from_file(str(urdf))
    for joint in spec.joints:
        joint.armature, joint.damping, joint.frictionloss = ARMATURE, DAMPING, FRICTION
    spec.compile()
    path = folder / "fr3.xml"
    path.write_text(spec.to_xml())
    return path


def listening(port: int) -> bool:
    """Whether somebody does; asked of the kernel, since a connection would be taken for a client."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


def main() -> int:
    """Serve until killed."""
    parser = control.arguments("A Franka arm's control box.")
    parser.add_argument("--port", type=int, default=1337)
    parser.add_argument("--strict", action="store_true", help="20 lost packets end a motion, as on the arm")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    folder = options.control.parent
    os.environ["FR3_MJCF"] = str(model(folder))
    from franka_sim import FrankaSimServer

    server = FrankaSimServer(
        host="127.0.0.1",
        port=options.port,
        enable_gripper=False,
        enforce_comm_constraints=options.strict,
        enforce_motion_limits=True,
    )

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        if "reflex" in message:
            server._abort_with_error(int(message["reflex"]), "told to")
        if "lose" in message:
            counting = server.comm  # of this connection
            counting.command_received = lambda _number: False
            threading.Timer(float(message["lose"]), lambda: vars(counting).pop("command_received", None)).start()
        if "limits" in message:
            server.enforce_motion_limits = server.motion_limits.enforce = bool(message["limits"])
        state = server.robot_state.state
        return {
            "q": [float(value) for value in state["q"]],
            "success_rate": float(state["control_command_success_rate"]),  # franka-sim counts it packet by packet
        }

    def begin() -> None:
        control.until(lambda: listening(options.port), 60.0)
        control.begin(options, answer)

    threading.Thread(target=begin, daemon=True).start()
    server.start()  # in the main thread: it takes the signals
    return 0


if __name__ == "__main__":
    sys.exit(main())
