"""Plans: what travels as JSON arrives equal, and what no servo can run on is refused by the name of its field."""

from dataclasses import replace

import pytest
from support.virtual_rig import joint_plan

from chatvla_edge.runtime import device_plan, servo_plan
from chatvla_edge.runtime.device_plan import DevicePlan
from chatvla_edge.runtime.servo_plan import ArmPlan, DirectAxis, PoseAction
from chatvla_edge.runtime.servo_records import (
    COMMAND,
    LATCHING,
    MODE,
    REASONS,
    STATE,
    STATUS,
    names,
    telemetry,
)


def test_plans_travel_as_json():
    plan = joint_plan(arms=2, mode="rtc", tau_jerk=None)
    assert servo_plan.from_json(servo_plan.to_json(plan)) == plan
    device = DevicePlan.of(plan.arms[0], 250.0, hold=None)
    assert device_plan.from_json(device_plan.to_json(device)) == device


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 5.0}, "rate is 5.0"),
        ({"arms": ()}, "0 arms"),
        ({"approach_speed": 0.0}, "approach_speed is 0.0"),
        ({"margin": 1.5}, "margin is 1.5"),
        ({"chunk_budget": 0.0}, "chunk_budget is 0.0"),
        ({"gap": 0.001}, "gap is 0.001"),
    ],
)
def test_a_plan_that_cannot_run_names_its_field(change, message):
    with pytest.raises(ValueError, match=message):
        replace(joint_plan(), **change)


def arm(**changes):
    return replace(joint_plan().arms[0], **changes)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda: arm(direct=(DirectAxis(0, 0), DirectAxis(1, 1))), r"axes \[0, 1\] are driven"),
        (lambda: arm(direct=tuple(DirectAxis(0, i) for i in range(3))), r"axes \[0, 0, 0\] are driven"),
        (lambda: arm(direct=tuple(DirectAxis(i, i + 1) for i in range(3))), "component 3 of 3"),
        (lambda: arm(direct=tuple(DirectAxis(i, i, scale=0.0) for i in range(3))), "scale 0"),
        (lambda: arm(pose=PoseAction(0, "rot6d_rows")), "needs the arm's chain"),
        (lambda: arm(state_budget=0.001), "shorter than a tick"),
    ],
)
def test_an_arm_that_cannot_be_driven_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(joint_plan(), arms=(changed(),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 2000.0}, "rate is 2000.0"),
        ({"silence": 0.001}, "silence 0.001"),
        ({"velocity": (1.0,)}, "velocity has 1 numbers"),
        ({"jerk": (1.0, 0.0, 1.0)}, "jerk is"),
        ({"reach": 0.0}, "reach above 0"),
    ],
)
def test_a_device_that_cannot_run_names_its_field(change, message):
    with pytest.raises(ValueError, match=message):
        replace(DevicePlan.of(joint_plan().arms[0], 500.0), **change)


def test_unknown_fields_and_infinities_are_refused():
    text = servo_plan.to_json(joint_plan())
    with pytest.raises(ValueError, match="speeed"):
        servo_plan.from_json(text[:-1] + ',"speeed":1}')
    with pytest.raises(ValueError, match="finite"):
        servo_plan.from_json(text.replace('"chunk_budget":1.0', '"chunk_budget":Infinity'))


def test_records_are_whole_words_and_their_bits_have_names():
    for record in (MODE, COMMAND, STATE, STATUS, telemetry(14, 14)):
        assert record.itemsize % 8 == 0
    assert names(LATCHING, REASONS) == (
        "stop", "brake", "no_lease", "estop", "state_stale", "arm_fault", "limits", "stalled",
    )  # fmt: skip
    assert isinstance(joint_plan().arms[0], ArmPlan)
