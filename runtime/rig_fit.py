"""Whether a rig has what the runtime needs of it, and whether a bundle's policy can drive it."""

from collections.abc import Callable, Iterator
from pathlib import Path

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.rig import Rig
from chatvla_edge.runtime.arm_model import ArmModelError, load_arm, read_arm
from chatvla_edge.runtime.bundle import Manifest
from chatvla_edge.runtime.bundle.fit import check_rig
from chatvla_edge.runtime.daemon import mapping


def chain_problems(rig: Rig) -> Iterator[str]:
    """Chains that the runtime does not know, or that have another number of joints than the device has axes."""
    for name, arm in rig.arms.items():
        if arm.chain is None:
            continue
        try:
            model = read_arm(Path(arm.chain)) if arm.chain.endswith(".urdf") else load_arm(arm.chain)
        except (ArmModelError, OSError) as error:
            yield f"arms.{name}.chain: {error}"
            continue
        axes = registry.create("arms", arm.driver, arm.options).axes
        joints = [axis for axis in axes if axis != mapping.GRIPPER]
        if len(model.joints) != len(joints):
            yield (
                f"arms.{name}.chain: found {arm.chain} with {len(model.joints)} joints, expected {len(joints)}: "
                f"{arm.driver} drives {', '.join(joints)}"
            )


def bundle_problems(rig: Rig, manifest: Manifest, where: str) -> Iterator[str]:
    """Why the policy of a bundle cannot drive a rig: what the daemon would refuse to start with, at most once each."""
    judges: tuple[Callable[[], object], ...] = (
        lambda: check_rig(manifest, mapping.needs(rig, manifest), where),
        lambda: mapping.servo_plan(rig, manifest),
        lambda: mapping.StateReader(rig, manifest),
    )
    said: set[str] = set()
    for judge in judges:
        try:
            judge()
        except ValueError as error:
            if str(error) not in said:
                said.add(str(error))
                yield str(error)
