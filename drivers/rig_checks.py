"""What no single field of a rig can say: lists as long as the arm has axes, poses inside limits, rates that agree.

Each problem names the YAML path of the value that is to be changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from chatvla_edge.drivers.errors import DriverError
from chatvla_edge.drivers.protocols import AxisBounds

if TYPE_CHECKING:
    from chatvla_edge.drivers.rig import Arm, Camera, Rig

GRIPPER = "gripper"
PER_AXIS = ("lower", "upper", "velocity", "acceleration", "jerk", "step", "lag")
SLACK = 1e-9  # a limit copied from the vendor's page is not beyond it


class Problem(NamedTuple):
    """One thing that is wrong."""

    path: tuple[str | int, ...]
    message: str


def bounds_of(driver: Any) -> AxisBounds | None:
    """The vendor's limits, or None where the driver knows them only once it is open."""
    try:
        bounds: AxisBounds = driver.bounds()
    except DriverError:
        return None
    return bounds


def problems(rig: "Rig", drivers: Mapping[str, Any]) -> Iterator[Problem]:
    """Everything that does not fit together. ``drivers``: the arms' drivers, not opened; those that could be made."""
    for name, camera in rig.cameras.items():
        yield from _camera(("cameras", name), camera)
    for name, arm in rig.arms.items():
        if name in drivers:
            yield from _axes(("arms", name), arm, drivers[name])
        yield from _arm_rates(("arms", name), arm, rig)
    yield from _grippers(rig, drivers)
    yield from _servo(rig)
    shared = sorted(set(rig.cores.servo) & {*rig.cores.policy, *rig.cores.cameras})
    if shared:
        yield Problem(("cores", "servo"), f"shares CPU {shared[0]} with policy or cameras; give the servo its own")
    for kind in ("servo", "devices", "policy", "cameras"):
        for index, core in enumerate(getattr(rig.cores, kind)):
            if core < 0:
                yield Problem(("cores", kind, index), f"found CPU {core}, expected 0 or more")


def _camera(path: tuple[str, ...], camera: "Camera") -> Iterator[Problem]:
    if camera.max_age <= 1 / camera.rate:
        yield Problem(
            (*path, "max_age"),
            f"found {camera.max_age:g} s, expected more than the {1 / camera.rate:.3g} s from frame to frame",
        )
    native = camera.native
    if native is None:
        return
    if (native.height, native.width) == (camera.height, camera.width):
        yield Problem((*path, "native"), "is the size of the frames themselves; leave it out")
    # Both sizes are whole pixels, so the shapes may differ by the rounding of the smaller one.
    elif abs(native.width * camera.height - camera.width * native.height) > max(native.height, native.width) / 2:
        yield Problem(
            (*path, "native"),
            f"found {native.height}x{native.width} for frames of {camera.height}x{camera.width}, expected the same "
            f"shape: the policy would be shown a stretched picture",
        )


def _axes(path: tuple[str, ...], arm: "Arm", driver: Any) -> Iterator[Problem]:
    """What is said per axis, against the axes and limits of the driver."""
    axes = tuple(driver.axes)
    limits = (*path, "limits")
    wrong = False
    rows = [((*limits, name), getattr(arm.limits, name)) for name in PER_AXIS]
    rows += [((*path, "home"), arm.home), ((*path, "park"), arm.park)]
    for place, row in rows:
        if row is not None and len(row) != len(axes):
            wrong = True
            yield Problem(place, f"found {len(row)} numbers, expected {len(axes)}: one for each of {', '.join(axes)}")
    if wrong:
        return
    bounds = bounds_of(driver)
    for name in ("lower", "upper", "velocity"):
        if getattr(arm.limits, name) is None and bounds is None:
            wrong = True
            yield Problem((*limits, name), f"found null, expected {len(axes)} numbers: {arm.driver} names none itself")
    for name in ("velocity", "acceleration", "jerk", "step", "lag"):
        for i, value in enumerate(getattr(arm.limits, name) or ()):
            if not value > 0:
                yield Problem((*limits, name, i), f"found {value:g} for {axes[i]}, expected more than 0")
    if bounds is not None:
        yield from _within_bounds(limits, arm, axes, bounds)
    if not wrong:
        yield from _poses(path, arm, axes, *range_of(arm, bounds))


def range_of(arm: "Arm", bounds: AxisBounds | None) -> tuple[Sequence[float], Sequence[float]]:
    """Lowest and highest position of each axis: the rig's where it says so, else the vendor's."""
    lower = arm.limits.lower if arm.limits.lower is not None or bounds is None else bounds.lower
    upper = arm.limits.upper if arm.limits.upper is not None or bounds is None else bounds.upper
    assert lower is not None
    assert upper is not None
    return lower, upper


def _within_bounds(limits: tuple[str, ...], arm: "Arm", axes: Sequence[str], bounds: AxisBounds) -> Iterator[Problem]:
    for name in ("lower", "upper", "velocity", "acceleration", "jerk"):
        ours, vendors = getattr(arm.limits, name), getattr(bounds, name)
        if ours is None or vendors is None:
            continue
        for i, (our, vendor) in enumerate(zip(ours, vendors, strict=True)):
            if name == "lower" and our < vendor - SLACK:
                yield Problem(
                    (*limits, name, i), f"found {our:g} for {axes[i]}, expected {vendor:g} or more, the vendor's limit"
                )
            if name != "lower" and our > vendor + SLACK:
                yield Problem(
                    (*limits, name, i), f"found {our:g} for {axes[i]}, expected {vendor:g} or less, the vendor's limit"
                )


def _poses(
    path: tuple[str, ...], arm: "Arm", axes: Sequence[str], lower: Sequence[float], upper: Sequence[float]
) -> Iterator[Problem]:
    for i, axis in enumerate(axes):
        if not lower[i] < upper[i]:
            yield Problem(
                (*path, "limits", "lower", i),
                f"found {lower[i]:g} for {axis}, expected less than {upper[i]:g}, its upper",
            )
            return
    for name in ("home", "park"):
        for i, value in enumerate(getattr(arm, name) or ()):
            if not lower[i] <= value <= upper[i]:
                yield Problem(
                    (*path, name, i),
                    f"found {value:g} for {axes[i]}, expected {lower[i]:g} to {upper[i]:g}, the limits of the rig",
                )
    if arm.gripper is not None and axes[-1] == GRIPPER:
        for name in ("closed", "open"):
            value = getattr(arm.gripper, name)
            if not lower[-1] <= value <= upper[-1]:
                yield Problem(
                    (*path, "gripper", name),
                    f"found {value:g}, expected {lower[-1]:g} to {upper[-1]:g}, the limits of the axis",
                )
    box = arm.limits.workspace.box
    if box is not None and not all(low < high for low, high in zip(box[:3], box[3:], strict=True)):
        yield Problem((*path, "limits", "workspace", "box"), f"found {box}, expected x, y, z at least, then at most")
    for i, (*_, radius) in enumerate(arm.limits.workspace.keep_out):
        if not radius > 0:
            yield Problem((*path, "limits", "workspace", "keep_out", i), f"found the radius {radius:g}, expected > 0")


def _arm_rates(path: tuple[str, ...], arm: "Arm", rig: "Rig") -> Iterator[Problem]:
    if arm.rate > rig.servo.rate:
        yield Problem(
            (*path, "rate"),
            f"found {arm.rate:g} commands per second, expected at most the servo's {rig.servo.rate:g}: "
            f"there is nothing new in between",
        )
    slowest = max(1 / arm.rate, 1 / rig.servo.rate)
    if arm.max_age <= 2 * slowest:
        yield Problem(
            (*path, "max_age"),
            f"found {arm.max_age:g} s, expected more than two periods of the slower of device and servo, "
            f"{2 * slowest:.3g} s",
        )
    if arm.chain is None and (arm.limits.workspace.box is not None or arm.limits.workspace.keep_out):
        yield Problem((*path, "chain"), "found none, expected the arm's kinematics: its workspace needs them")


def _grippers(rig: "Rig", drivers: Mapping[str, Any]) -> Iterator[Problem]:
    """Which arm has which gripper."""
    mounted: dict[str, str] = {}
    for name, arm in rig.arms.items():
        path = ("arms", name)
        if arm.gripper is not None and arm.gripper.closed == arm.gripper.open:
            yield Problem(
                (*path, "gripper", "open"), f"found {arm.gripper.open:g}, where it is closed, too; expected another"
            )
        if name in drivers:
            axes = tuple(drivers[name].axes)
            if axes[-1] == GRIPPER and arm.gripper is None:
                yield Problem((*path, "gripper"), "found none, expected where the axis `gripper` is closed and open")
            if axes[-1] != GRIPPER and arm.gripper is not None:
                yield Problem((*path, "gripper"), f"found one, but the axes of {arm.driver} are {', '.join(axes)}")
            if axes == (GRIPPER,) and arm.of is None:
                yield Problem((*path, "of"), "found none, expected the arm that this gripper is mounted on")
            if axes != (GRIPPER,) and arm.of is not None:
                yield Problem((*path, "of"), f"found {arm.of!r}, but this is an arm with {len(axes)} axes, no gripper")
        if arm.of is None:
            continue
        others = [other for other in rig.arms if other != name and rig.arms[other].of is None]
        if arm.of not in others:
            yield Problem((*path, "of"), f"found {arm.of!r}, expected one of: {', '.join(others) or 'none'}")
        elif arm.of in mounted:
            yield Problem((*path, "of"), f"found {arm.of!r}, which has the gripper {mounted[arm.of]!r} already")
        elif rig.arms[arm.of].gripper is not None:
            yield Problem((*path, "of"), f"found {arm.of!r}, which has a gripper of its own")
        mounted.setdefault(arm.of, name)


def _servo(rig: "Rig") -> Iterator[Problem]:
    servo, policy = rig.servo, rig.policy
    if policy.rate > servo.rate:
        yield Problem(
            ("policy", "rate"), f"found {policy.rate:g} actions per second, expected at most the servo's {servo.rate:g}"
        )
    if servo.chunk_max_age < policy.cycle:
        yield Problem(
            ("servo", "chunk_max_age"),
            f"found {servo.chunk_max_age:g} s, expected at least policy.cycle, {policy.cycle:g} s: "
            f"every chunk would be too old before the next one comes",
        )
    if (servo.fusion == "sync") != (servo.sync_actions > 0):
        expected = "1 or more with the fusion `sync`" if servo.fusion == "sync" else "0 without the fusion `sync`"
        yield Problem(("servo", "sync_actions"), f"found {servo.sync_actions}, expected {expected}")
