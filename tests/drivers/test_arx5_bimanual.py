"""Two ARX arms, fourteen axes, as the runtime drives them: servo and one process per arm at 500 Hz, each with the real
arx5-interface on a bus of its own.
"""

from dataclasses import replace

import numpy as np
import pytest
from support.process_rig import ProcessRig
from support.virtual_rig import joint_plan

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.standins.can import CanBus, environment
from chatvla_edge.drivers.standins.motors import START
from chatvla_edge.runtime.servo_plan import AxisLimits

pytest.importorskip("arx5_interface", reason="arx5-interface is not installed (extra `arx`)")
pytestmark = pytest.mark.slow

RATE = 500.0
HOME = np.array([*(START[motor] for motor in (1, 2, 4, 5, 6, 7)), START[8] * 0.088 / 5.03] * 2)
SWING = np.array([0.2] * 6 + [0.01]).tolist() * 2
ROWS = np.arange(50)


def plan():
    bounds = registry.create("arms", "arx5", {"model": "R5"}).bounds()
    limits = AxisLimits(
        lower=tuple(bounds.lower),
        upper=tuple(bounds.upper),
        velocity=(2.0,) * 6 + (0.2,),
        acceleration=(15.0,) * 6 + (2.0,),
        jerk=(500.0,) * 6 + (100.0,),
    )
    rig = joint_plan(arms=2, axes=7, rate=RATE, gap=0.25, approach_speed=0.3)
    return replace(rig, arms=tuple(replace(arm, limits=limits, state_budget=0.3) for arm in rig.arms))


def wave(tau):
    due = tau + ROWS * 0.02
    return HOME + np.sin(1.5 * due)[:, None] * SWING


def test_fourteen_axes_at_the_buses_own_pace(tmp_path, monkeypatch):
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    with CanBus(tmp_path, "can0") as left, CanBus(tmp_path, "can1") as right:
        drivers = [("arx5", {"interface": name, "model": "R5", "gravity": [0, 0, 0]}) for name in ("can0", "can1")]
        with ProcessRig(plan(), drivers=drivers) as rig:
            assert [rig.device_doing(arm) for arm in (0, 1)] == ["idle", "idle"]
            assert set(left.tell()["kp"].values()) == {0.0}  # nothing is stiff before it is armed
            rig.start_tracking(wave)
            before = [bus.tell()["frames"] for bus in (left, right)]
            ticks = int(rig.status["tick"])
            rig.run_policy(wave, 2.5)
            ticks = int(rig.status["tick"]) - ticks
            exchanges = [(bus.tell()["frames"] - was) / 7 for bus, was in zip((left, right), before, strict=True)]
            assert rig.doing == "tracking"
            assert rig.violations() == {}
            rows = rig.telemetry()[-500:]
            assert np.abs(rows["measured"] - rows["limited"]).max() < 0.1
            # Servo and buses at one pace, in ticks of the servo: the machine's own stalls hit both.
            assert min(exchanges) > 0.8 * ticks
            lag = np.abs(rows["measured"] - rows["limited"]).max()
            print(f"\n{ticks} ticks, {exchanges} exchanges in 2.5 s; lag {lag:.3f}")

            # One bus dies: its arm is lost, the other stops too, and nothing moves again by itself.
            right.tell(dead=True)
            rig.until(lambda: "driver" in rig.device_faults(1), "the loss")
            rig.until(lambda: rig.doing == "standing", "rest")
            assert "arm_fault" in rig.reasons
            right.tell(dead=False)
            frames = right.tell()["frames"]
            rig.until(lambda: right.tell()["frames"] > frames + 700, "the bus that lives again")
            told = left.tell()["target"]
            rig.run_policy(wave, 0.3)
            assert left.tell()["target"] == told
            assert rig.device_doing(1) == "stopped"
            assert rig.violations() == {}
