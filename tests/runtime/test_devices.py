"""The device's own enforcement, in virtual time: it follows only what it may, and on its own it only reduces."""

import numpy as np
import pytest
from support.limit_oracle import Bounds, violations
from support.virtual_rig import LEASE_NS, START_NS, joint_plan

from chatvla_edge.drivers.protocols import ArmState
from chatvla_edge.runtime.device_plan import DevicePlan
from chatvla_edge.runtime.devices import DeviceLoop
from chatvla_edge.runtime.pages import Lease
from chatvla_edge.runtime.rig_segments import RigSegments
from chatvla_edge.runtime.servo_records import COMMAND, DEVICE_DOING, DEVICE_FAULTS, STATE, names
from chatvla_edge.runtime.slots import Slot

AXES = 2
PERIOD = 2_000_000


class Arm:
    """A driver that remembers what it was told and is wherever it was told to be."""

    def __init__(self, start):
        self.q = np.array(start)
        self.told = []
        self.stops = 0
        self.fault = ""
        self.target = None
        self.broken = None
        self.clock = lambda: START_NS

    def command(self, position):
        if self.broken == "command":
            raise OSError("bus off")
        self.q = position.copy()
        self.told.append(self.q)

    def state(self):
        if self.broken == "state":
            raise OSError("bus off")
        return ArmState(self.q, self.clock(), 0, target=self.target, fault=self.fault)

    def stop(self):
        self.stops += 1


class Bench:
    """A device loop with a hand-made servo and supervisor."""

    def __init__(self, start=(0.1, -0.2), **changes):
        plan = joint_plan(axes=AXES)
        self.segments = RigSegments.create(plan)
        wires = self.segments.device_wires(0)
        self.lease = Lease.attach(wires.lease, write=True)
        self.commands = Slot.attach(wires.command, COMMAND.itemsize, write=True)
        self.plan = DevicePlan.of(plan.arms[0], 500.0, **changes)
        self.driver = Arm(start)
        self.loop = DeviceLoop(self.plan, wires, self.driver)
        self.now = START_NS
        self.driver.clock = lambda: self.now
        self.granting = True
        self.record = np.zeros((), COMMAND)
        self.record["axes"] = AXES
        self.record["q"][:AXES] = start

    def send(self, **fields):
        self.record["tick"] += 1
        for name, value in fields.items():
            if name in ("q", "dq", "ddq"):
                self.record[name][:AXES] = value
            else:
                self.record[name] = value
        self.commands.publish(self.record, self.now)

    def cycle(self):
        self.now += PERIOD
        if self.granting:
            self.lease.grant_until(self.now + LEASE_NS)
        self.loop.cycle(self.now)

    def seconds(self, seconds, send=None):
        for _ in range(round(seconds * 1e9 / PERIOD)):
            if send is not None:
                send()
            self.cycle()

    @property
    def state(self):
        read = np.zeros((), STATE)
        Slot.attach(self.segments.states[0].fd, STATE.itemsize).read_into(read)
        return read

    @property
    def doing(self):
        return DEVICE_DOING[int(self.state["doing"])]

    @property
    def faults(self):
        return set(names(self.state["faults"], DEVICE_FAULTS))

    def follow(self):
        """Arm, stand for a moment, and move both axes from rest to about 0.5 rad/s, within the limits."""
        self.send(moving=0, arming=0)
        self.cycle()
        dt = PERIOD * 1e-9
        ramp = [0.8 * k for k in range(1, 7)]
        v, q = 0.0, self.record["q"][:AXES].copy()
        for a in [0.0] * 5 + ramp + [4.8] * 45 + ramp[-2::-1] + [0.0] * 5:
            v += a * dt
            q = q + v * dt
            self.send(moving=1, arming=1, q=q, dq=v, ddq=a)
            self.cycle()
        assert self.doing == "following"
        assert self.faults == set()

    def violations(self):
        limits = self.plan
        bounds = Bounds(
            np.array(limits.lower),
            np.array(limits.upper),
            np.array(limits.velocity),
            np.array(limits.acceleration),
            np.array(limits.jerk),
            PERIOD,
        )
        told = np.array(self.driver.told)
        ticks = START_NS + PERIOD * np.arange(1, len(told))
        return {kind: n for kind, n in violations(bounds, told[0], START_NS, ticks, told[1:]).items() if n}


def test_nothing_is_sent_before_the_servo_moves():
    bench = Bench()
    bench.seconds(0.1)
    bench.send(moving=0, arming=0)
    bench.seconds(0.1)
    assert bench.driver.told == []
    assert bench.doing == "idle"
    np.testing.assert_array_equal(bench.state["q"][:AXES], (0.1, -0.2))


def test_what_is_sent_is_the_command():
    bench = Bench()
    bench.follow()
    np.testing.assert_array_equal(bench.driver.told[-1], bench.record["q"][:AXES])
    assert int(bench.state["tick"]) == int(bench.record["tick"])
    assert bench.violations() == {}


def test_nothing_is_sent_without_a_lease():
    bench = Bench()
    bench.granting = False
    bench.send(moving=0)
    bench.cycle()
    bench.seconds(0.1, lambda: bench.send(moving=1, arming=1))
    assert bench.driver.told == []


def test_a_device_that_starts_into_a_motion_waits_for_the_next_arming():
    bench = Bench()
    bench.seconds(0.1, lambda: bench.send(moving=1, arming=4))
    assert bench.driver.told == []
    bench.seconds(0.1, lambda: bench.send(moving=1, arming=5))
    assert bench.doing == "following"


def test_a_silent_servo_is_not_waited_for():
    bench = Bench(silence=0.05, hold=0.2)
    bench.follow()
    sent = len(bench.driver.told)
    bench.seconds(0.2)
    assert bench.faults == {"silence"}
    assert bench.doing == "holding"
    assert len(bench.driver.told) == sent + 100  # every cycle, the last position at the end
    assert (bench.driver.told[-1] == bench.driver.told[-2]).all()
    # The silence itself repeats the last command, which is a stop without a ramp that no receiver can take back:
    # from the first braking cycle on, the ramp begins at the last command's speed and keeps the limits.
    ramp = np.array(bench.driver.told[sent + 25 :])
    v = np.diff(ramp, axis=0) / (PERIOD * 1e-9)
    a = np.diff(v, axis=0) / (PERIOD * 1e-9)
    assert np.abs(v).max() <= 0.6
    assert np.abs(a).max() <= bench.plan.acceleration[0] * 1.001
    bench.seconds(0.3)
    assert bench.doing == "stopped"
    assert bench.driver.stops == 1


def test_a_servo_that_comes_back_is_not_followed_before_an_arming():
    bench = Bench(silence=0.05)
    bench.follow()
    bench.seconds(0.2)
    held = bench.driver.told[-1]
    bench.seconds(0.1, lambda: bench.send())
    assert (bench.driver.told[-1] == held).all()
    assert bench.faults == {"silence"}
    bench.seconds(0.1, lambda: bench.send(arming=2, q=held, dq=0, ddq=0))
    assert bench.doing == "following"
    assert bench.faults == set()


@pytest.mark.parametrize("cause", ["lease", "estop"])
def test_the_servo_may_end_its_stop_and_no_more(cause):
    bench = Bench(longest_stop=0.3, hold=0.2)
    bench.follow()
    if cause == "lease":
        bench.granting = False
        bench.lease.revoke()
    else:
        bench.segments.estop.raise_stop()
    step = bench.record["dq"][0] * PERIOD * 1e-9

    def go_on():  # a servo that ignores both
        bench.send(q=bench.record["q"][:AXES] + step)

    bench.seconds(0.29, go_on)
    assert bench.doing == "following"
    bench.seconds(0.2, go_on)
    assert bench.doing == "holding"
    assert bench.faults == {cause}
    assert bench.violations() == {}
    bench.seconds(0.3, go_on)
    assert bench.driver.stops == 1
    assert bench.doing == "stopped"


@pytest.mark.parametrize(
    "bad",
    [
        {"q": (np.nan, 0.0)},
        {"q": (np.inf, 0.0)},
        {"q": (1.9, 0.0)},  # a teleport
        {"q": (2.5, 0.0)},  # beyond the range
        {"dq": (np.nan, 0.0)},
        {"axes": 3},
    ],
)
def test_a_command_that_is_none_is_not_sent(bad):
    bench = Bench()
    bench.follow()
    bench.send(**bad)
    bench.seconds(0.3)
    assert bench.faults == {"command"}
    assert bench.doing == "holding"
    assert bench.violations() == {}


def test_a_first_command_far_from_the_arm_is_refused():
    bench = Bench(reach=0.1)
    bench.send(moving=0)
    bench.cycle()
    bench.seconds(0.1, lambda: bench.send(moving=1, arming=1, q=(0.3, -0.2)))
    assert bench.driver.told == []
    assert bench.faults == {"command"}


@pytest.mark.parametrize("call", ["command", "state"])
def test_a_driver_that_raises_is_stopped_and_reported(call):
    bench = Bench()
    bench.follow()
    bench.driver.broken = call
    bench.seconds(0.1, lambda: bench.send())
    assert "driver" in bench.faults
    assert bench.driver.stops == 1
    assert bench.doing == "stopped"
    assert bench.state["words"] == f"{call}: OSError: bus off".encode()
    assert bench.state["faulty"] == (call == "state")  # its command is not tried again, so nothing is wrong now


def test_a_state_that_cannot_be_read_grows_old():
    bench = Bench()
    bench.follow()
    bench.driver.broken = "state"
    bench.cycle()
    slot = bench.segments.states[0]
    captured = slot.read()[1].captured_ns
    bench.seconds(0.1)
    assert slot.read()[1].captured_ns == captured


def test_a_fault_of_the_arm_brakes_and_is_reported():
    bench = Bench()
    bench.follow()
    bench.driver.fault = "motor 3: over-temperature"
    step = bench.record["dq"][0] * PERIOD * 1e-9
    bench.seconds(0.3, lambda: bench.send(q=bench.record["q"][:AXES] + step))
    assert bench.faults == {"arm"}
    assert bench.doing == "holding"
    assert bench.violations() == {}
    assert (bench.state["faulty"], bench.state["words"]) == (1, b"motor 3: over-temperature")

    # It cools down: the fault is over, its stop is not, and what it was can still be read until the next arming.
    bench.driver.fault = ""
    bench.seconds(0.1)
    assert (bench.state["faulty"], bench.state["words"]) == (0, b"motor 3: over-temperature")
    assert bench.faults == {"arm"}
    bench.send(arming=2, q=bench.driver.q)
    bench.cycle()
    assert (bench.state["faulty"], bench.state["words"], bench.faults) == (0, b"", set())


def test_words_of_a_fault_are_cut_off_and_not_the_state():
    bench = Bench()
    bench.driver.fault = "ü" * 100
    bench.cycle()
    assert bench.state["words"] == ("ü" * 64).encode()
    assert bench.state["axes"] == AXES


def test_where_the_vendor_heads_for_stands_beside_what_was_sent():
    bench = Bench()
    bench.follow()
    assert np.isnan(bench.state["target"][:AXES]).all()
    bench.driver.target = (0.5, -0.25)
    bench.cycle()
    np.testing.assert_array_equal(bench.state["target"][:AXES], (0.5, -0.25))
    np.testing.assert_array_equal(bench.state["sent"][:AXES], bench.driver.q)


def test_history_keeps_every_state():
    bench = Bench()
    bench.follow()
    rows = np.zeros(64, STATE)
    assert bench.segments.histories[0].last(rows) == 64
    assert (np.diff(rows["tick"]) == 1).all()


def test_an_arm_that_answers_again_is_held_where_it_is_found():
    bench = Bench()
    bench.follow()
    # The bus is dead: nothing reaches the arm, and its last answer grows old.
    found, then = bench.driver.q.copy(), bench.now
    bench.driver.clock = lambda: then
    bench.driver.command = lambda position: bench.driver.told.append(position.copy())
    q, v = bench.record["q"][:AXES].copy(), bench.record["dq"][:AXES].copy()
    for _ in range(300):
        q += v * PERIOD * 1e-9
        bench.send(q=q, ddq=0)
        bench.cycle()
    assert bench.faults == {"unanswered"}
    assert bench.doing == "holding"
    # Stopped within limits from its last command, for the sake of an arm that hears and cannot speak.
    assert (bench.driver.told[-1] > found + 0.04).all()
    assert bench.violations() == {}
    # It answers again. One command may have gone out before that is known; none after it leads away from there.
    bench.driver.clock = lambda: bench.now
    bench.cycle()
    for _ in range(20):
        bench.cycle()
        np.testing.assert_array_equal(bench.driver.told[-1], found)
    assert bench.doing == "holding"


def test_a_fault_of_the_arm_is_ended_on_the_operators_word_and_only_while_no_command_flows():
    bench = Bench()
    cleared = []
    bench.driver.clear = lambda: cleared.append(True)
    bench.follow()
    bench.loop.clear()
    bench.send()
    bench.cycle()
    assert bench.doing == "following"
    assert cleared == []
    bench.send(moving=0)
    bench.seconds(0.01)
    assert cleared == [True]


def test_a_fault_that_cannot_be_ended_leaves_the_loop_running():
    bench = Bench()

    def clear():
        raise OSError("the button is pressed")

    bench.driver.clear = clear
    bench.cycle()
    bench.loop.clear()
    bench.cycle()
    assert bench.doing == "idle"
    assert bench.faults == set()


def test_an_arm_that_is_kept_away_from_where_it_is_held_does_not_spring_there_when_it_is_freed():
    bench = Bench(reach=0.03, hold=None)
    bench.follow()
    blocked = bench.driver.q.copy()
    bench.driver.command = lambda position: bench.driver.told.append(position.copy())
    q, v = bench.record["q"][:AXES].copy(), bench.record["dq"][:AXES].copy()
    for _ in range(30):
        q += v * PERIOD * 1e-9
        bench.send(q=q, ddq=0)
        bench.cycle()
    bench.granting = False
    bench.lease.revoke()
    bench.seconds(1.5)
    assert bench.doing == "holding"
    np.testing.assert_array_equal(bench.driver.told[-1], blocked)
