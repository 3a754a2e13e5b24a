"""Whether a rig has what the runtime needs of it, and whether a bundle's policy can drive it."""

from collections.abc import Iterator
from pathlib import Path

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.rig import Rig
from chatvla_edge.runtime.arm_model import ArmModelError, load_arm, read_arm
from chatvla_edge.runtime.bundle import JointPositions, Manifest, RigNeeds
from chatvla_edge.runtime.bundle.fit import check_rig

GRIPPER = "gripper"


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
        joints = _joints(rig, name)
        if len(model.joints) != len(joints):
            yield (
                f"arms.{name}.chain: found {arm.chain} with {len(model.joints)} joints, expected {len(joints)}: "
                f"{arm.driver} drives {', '.join(joints)}"
            )


def bundle_problems(rig: Rig, manifest: Manifest, where: str) -> Iterator[str]:
    """Why the policy of a bundle cannot drive a rig: cameras, rate, arms, joints, grippers, kinematics."""
    cameras = {name: (camera.height, camera.width) for name, camera in rig.cameras.items()}
    semantics = manifest.semantics
    # The sizes of action and state follow from their parts, which are compared one by one below.
    head = manifest.geometry.head
    try:
        check_rig(manifest, RigNeeds(cameras, head.action_dim, head.state_dim, rig.policy.rate), where)
    except ValueError as error:
        yield str(error)
    commanded: set[str] = set()
    for side, parts in (("action", semantics.action), ("state", semantics.state)):
        for part in parts:
            at = f"{where}: {side}: {part.arm}.{part.kind}"
            arm = rig.arms.get(part.arm)
            if arm is None:
                arms = ", ".join(name for name, one in rig.arms.items() if one.of is None)
                yield f"{at}: the rig has no arm {part.arm!r}, expected one of: {arms}"
            elif isinstance(part, JointPositions):
                joints = _joints(rig, part.arm)
                if tuple(part.joints) != joints:
                    yield f"{at}: found {', '.join(part.joints)}, expected the rig's {', '.join(joints)}"
                commanded.add(part.arm)
            elif part.kind == "gripper":
                gripper = _gripper(rig, part.arm)
                if gripper is None:
                    yield f"{at}: the rig has no gripper on {part.arm!r}"
                commanded.add(gripper or part.arm)
            else:
                if arm.chain is None:
                    yield f"{at}: a pose needs kinematics; state arms.{part.arm}.chain"
                commanded.add(part.arm)
    for name in rig.arms:
        if name not in commanded:
            yield f"{where}: action: nothing commands the rig's {name!r}; take it out of the rig file"


def _joints(rig: Rig, name: str) -> tuple[str, ...]:
    arm = rig.arms[name]
    axes = registry.create("arms", arm.driver, arm.options).axes
    return tuple(axis for axis in axes if axis != GRIPPER)


def _gripper(rig: Rig, name: str) -> str | None:
    """The device that has the gripper of an arm."""
    if rig.arms[name].gripper is not None:
        return name
    return next((other for other, arm in rig.arms.items() if arm.of == name), None)
