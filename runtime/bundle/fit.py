"""Whether a bundle fits the machine it lies on and the rig it shall move: asked before a byte of a stage is read."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from .errors import EXPORT, refusal
from .manifest import Manifest


@dataclass(frozen=True)
class Machine:
    """What a computer can run.

    Attributes:
        targets: names of targets, `cpu` or `orin-jp72`.
        engines: the installed engine libraries, kind -> version.
        sm: the GPU's compute capability, 87 for 8.7; None without one.
        jetpack: `7.2`; None on anything but a Jetson.
    """

    targets: Collection[str]
    engines: Mapping[str, str]
    sm: int | None = None
    jetpack: str | None = None


@dataclass(frozen=True)
class RigNeeds:
    """What a rig gives to a policy and takes from it.

    Attributes:
        cameras: name -> (height, width) of the frames. A camera that the policy does not know is no error: rigs record
            more than a policy looks at.
        action_dim, state_dim: components of an action and of a state.
        rate_hz: the rate of actions; None where the rig takes any.
    """

    cameras: Mapping[str, tuple[int, int]]
    action_dim: int
    state_dim: int
    rate_hz: float | None = None


def check_machine(manifest: Manifest, machine: Machine, where: str) -> None:
    """Raise a `BundleError` where the stages cannot run on the machine."""
    target = manifest.target
    do = "Export the checkpoint for this machine, or use the machine the bundle was made for."
    if target.name not in machine.targets:
        runs = ", ".join(sorted(machine.targets)) or "none"
        raise refusal(where, found=f"the target {target.name}", expected=f"one that runs here: {runs}", do=do)
    if target.sm and machine.sm not in target.sm:
        found = f"stages for compute capability {', '.join(map(_capability, target.sm))}"
        here = "a machine without GPU" if machine.sm is None else f"{_capability(machine.sm)}, this GPU's"
        raise refusal(where, found=found, expected=here, do=do)
    if target.jetpack is not None and machine.jetpack != target.jetpack:
        here = f"{machine.jetpack}, this machine's" if machine.jetpack else "a machine without JetPack"
        raise refusal(where, found=f"stages for JetPack {target.jetpack}", expected=here, do=do)
    engine = target.engine
    version = machine.engines.get(engine.kind)
    if version is None or not engine.accepts(version):
        raise refusal(
            where,
            found=f"stages for {engine.kind} {engine.range} (lowered with {engine.lowered_with})",
            expected=f"{engine.kind} {version}, the one installed here"
            if version
            else f"no {engine.kind}: none is here",
            do=f"Install a {engine.kind} that fits, or export the checkpoint with the one that is here.",
        )


def _capability(sm: int) -> str:
    return f"{sm // 10}.{sm % 10}"


def check_rig(manifest: Manifest, rig: RigNeeds, where: str) -> None:
    """Raise a `BundleError` where the rig gives or takes other numbers than the policy."""
    for camera in manifest.cameras:
        size = rig.cameras.get(camera.name)
        if size is None:
            there = ", ".join(sorted(rig.cameras)) or "none"
            raise refusal(
                where,
                found=f"the camera {camera.name!r}",
                expected=f"one of the rig's cameras: {there}",
                do="Name the cameras in the rig file as the export did, or export for this rig.",
            )
        if tuple(size) != (camera.height, camera.width):
            raise refusal(
                where,
                found=f"frames of {camera.height} x {camera.width} from the camera {camera.name!r}",
                expected=f"{size[0]} x {size[1]} (height x width), as the rig file says",
                do="Set the camera to the size that the policy was exported with, or export for this rig.",
            )
    head = manifest.geometry.head
    for what, found, expected in (
        ("action", head.action_dim, rig.action_dim),
        ("state", head.state_dim, rig.state_dim),
    ):
        if found != expected:
            raise refusal(where, found=f"{found} {what} components", expected=f"{expected}, as the rig has", do=EXPORT)
    rate = manifest.timing.rate_hz
    if rig.rate_hz is not None and not math.isclose(rate, rig.rate_hz, rel_tol=1e-9):
        raise refusal(
            where, found=f"actions at {rate} Hz", expected=f"{rig.rate_hz} Hz, as the rig file says", do=EXPORT
        )
