"""Replays: the recorded inputs of every tick give the recorded commands again, and whatever was changed is found."""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest
from support.daemon_rig import DaemonRig, on_a_machine_that_runs
from support.virtual_rig import VirtualRig, joint_plan
from typer.testing import CliRunner

from chatvla_edge.runtime import servo_plan
from chatvla_edge.runtime.arm_model import load_arm
from chatvla_edge.runtime.commands import app
from chatvla_edge.runtime.daemon import log_file, replay_policy, ros
from chatvla_edge.runtime.daemon.log_file import STAMPS, Channel, LogWriter
from chatvla_edge.runtime.daemon.replay import TOLERANCE, Replay, build, replay
from chatvla_edge.runtime.kinematics import Kinematics
from chatvla_edge.runtime.rotations import encode
from chatvla_edge.runtime.servo import Servo
from chatvla_edge.runtime.servo_plan import ArmPlan, AxisLimits, PoseAction, ServoPlan
from chatvla_edge.runtime.servo_records import STATE, telemetry

STAMPED = np.dtype([*STAMPS, *STATE.descr])
HORIZON, DT = 50, 0.02


class RecordedRig(VirtualRig):
    """A virtual rig that keeps what a session's log would hold."""

    def __init__(self, plan, start=None):
        self.state_rows = [[] for _ in plan.arms]
        self.reports = []
        self.kept_rows = np.zeros(0, telemetry(len(plan.components), plan.axes))
        super().__init__(plan, start)

    def publish_states(self):
        for arm, (state, slot) in enumerate(zip(self.states, self.state_slots, strict=True)):
            if arm not in self.silent:
                row = np.zeros((), STAMPED)
                row["sequence"] = slot.publish(state, self.now)
                row["captured_ns"] = row["published_ns"] = self.now
                for name in STATE.names:
                    row[name] = state[name]
                self.state_rows[arm].append(row)

    def post(self, actions, **changes):
        chunk = np.array(actions, np.float32)
        tau = self.tau
        number = super().post(chunk, tau=tau, **changes)
        self.reports.append(
            {
                "query": len(self.reports),
                "chunk": number,
                "tau": tau,
                "epoch": int(changes.get("epoch", self.mode["epoch"])),
                "frames": {"top": {"captured_ns": self.now}},
                "actions": base64.b64encode(chunk.astype("<f4").tobytes()).decode(),
            }
        )
        return number

    def save(self, folder, *, plan=None, rows=None, numbers=None, without_state=None, later_ns=0, batch=100):
        """The session's log.

        ``rows``: of the ticks, if not all; ``numbers``: of the chunks that are in it, if not all.
        """
        about = {"plan": servo_plan.to_json(self.plan if plan is None else plan), "build": json.dumps(build())}
        log = LogWriter(folder, about)
        log.declare(Channel.rows("/ticks", self.rows_read().dtype))
        log.declare(Channel.json("/policy"))
        for arm in self.plan.arms:
            log.declare(Channel.rows(f"/state/{arm.name}", STAMPED))
        log.reopen()
        kept = (self.rows_read() if rows is None else rows).copy()
        kept["tick_ns"] += later_ns
        states = [np.array(mine) for mine in self.state_rows]
        if without_state is not None:
            states[0] = np.delete(states[0], without_state)
        for mine in states:
            mine["captured_ns"] += later_ns
        reports = [report for report in self.reports if numbers is None or report["chunk"] in numbers]
        since = -(10**18)
        for first in range(0, len(kept), batch):  # as the recorder does: ticks first, then what they acted upon
            part = kept[first : first + batch]
            until = int(part["tick_ns"][-1])
            log.write("/ticks", part.tobytes(), until)
            for arm, mine in zip(self.plan.arms, states, strict=True):
                begin, end = np.searchsorted(mine["captured_ns"], [since, until], "right")
                if begin < end:
                    log.write(f"/state/{arm.name}", mine[begin:end].tobytes(), until)
            for report in reports:
                at = report["frames"]["top"]["captured_ns"] + later_ns
                if since < at <= until:
                    log.write_json("/policy", {**report, "frames": {"top": {"captured_ns": at}}}, at)
            since = until
        log.close()
        return folder

    def rows_read(self):
        """Telemetry of everything so far."""
        self.kept_rows = np.concatenate([self.kept_rows, self.telemetry()])
        return self.kept_rows


def wave(rig, phase=0.0):
    """[H, A] along a slow wave, from where tau is."""
    times = rig.tau + DT * np.arange(HORIZON)
    return 0.3 * np.sin(times[:, None] + phase + 0.2 * np.arange(len(rig.plan.components)))


def drive(rig, seconds):
    """Post as a policy of 10 Hz does."""
    for _ in range(round(seconds * 10)):
        rig.post(wave(rig))
        rig.seconds(0.1)


def session_of_everything(**changes):
    """Whatever an operator and a bad day can do to two arms."""
    rig = RecordedRig(joint_plan(arms=2, rate=125.0, **changes), start=np.full(6, 0.1))
    rig.pace = 0.3
    rig.tick(5)
    rig.want("rest")
    rig.post(wave(rig))  # nobody is armed: refused
    rig.seconds(0.2)
    rig.want("track", arm=True)
    drive(rig, 3)
    rig.want("track", speed=0.4)
    drive(rig, 1)
    rig.want("hold")
    drive(rig, 1)
    rig.want("track", speed=1.0, epoch=1)
    rig.post(wave(rig), epoch=0)  # of an epoch that is over: refused
    rig.tick(3)
    drive(rig, 2)
    rig.granting = False
    drive(rig, 0.5)
    rig.granting = True
    rig.want("track", arm=True)
    drive(rig, 2)
    rig.segments.estop.raise_stop()
    drive(rig, 0.5)
    rig.segments.estop.clear(rig.segments.estop.count)
    rig.want("track", arm=True)
    drive(rig, 2)
    rig.silent.add(1)
    drive(rig, 0.5)
    rig.silent.clear()
    rig.want("track", arm=True)
    drive(rig, 2)
    rig.now += 3 * rig.period  # deadlines that were skipped
    drive(rig, 1)
    rig.servo.quit()
    rig.seconds(1)
    return rig


@pytest.mark.parametrize("mode", ["switch", "blend", "ensemble", "rtc", "sync"])
def test_every_command_comes_out_again_to_the_bit(mode, tmp_path):
    plan = joint_plan().fusion
    sync = {"sync_actions": 25} if mode == "sync" else {}
    rig = session_of_everything(fusion=replace(plan, mode=mode, **sync))
    found = replay(rig.save(tmp_path))
    assert found.same_build
    assert found.complete
    assert found.equal
    assert found.different == {}
    assert found.stops == []
    assert found.moving > 1000
    assert found.compared == 6 * found.ticks


def test_an_arm_that_is_told_poses_comes_out_again_too(tmp_path):
    model, start = load_arm("fr3"), np.array([0.0, -0.785, 0.0, -2.356, 0.0, 1.571, 0.785])
    names = ("lower", "upper", "velocity", "acceleration", "jerk")
    limits = AxisLimits(**{name: tuple(getattr(model, name).tolist()) for name in names})
    arm = ArmPlan("fr3", limits, pose=PoseAction(0, "rot6d_rows"), chain="fr3")
    rig = RecordedRig(
        ServoPlan(rate=250.0, components=("xyz",) * 3 + ("rot6d",) * 6, horizon=HORIZON, arms=(arm,)), start=start
    )
    rotation, position = Kinematics(model).tool_pose(start)
    rig.tick(3)
    rig.want("track", arm=True)
    for _ in range(20):
        angle = rig.tau + DT * np.arange(HORIZON)
        xyz = position + 0.05 * np.stack([np.cos(angle) - 1, np.sin(angle), 0 * angle], axis=1)
        rig.post(np.hstack([xyz, np.tile(encode("rot6d_rows", rotation), (HORIZON, 1))]))
        rig.seconds(0.1)
    assert np.ptp(np.array(rig.commands[0]), axis=0).max() > 0.02
    found = replay(rig.save(tmp_path))
    assert found.complete
    assert found.different == {}


@pytest.fixture(scope="module")
def recorded():
    return session_of_everything()


def test_a_log_of_another_day_and_another_machine(recorded, tmp_path):
    found = replay(recorded.save(tmp_path, later_ns=10**17))
    assert found.complete
    assert found.equal


@pytest.mark.parametrize("batch", [1, 7, 4000])
def test_inputs_may_stand_behind_their_ticks(recorded, tmp_path, batch):
    found = replay(recorded.save(tmp_path, batch=batch))
    assert found.complete
    assert found.equal


def altered(plan, **limits):
    arm = plan.arms[1]
    return replace(plan, arms=(plan.arms[0], replace(arm, limits=replace(arm.limits, **limits))))


def test_one_altered_limit_is_found(recorded, tmp_path):
    plan = altered(recorded.plan, acceleration=(15.0, 14.9, 15.0))
    recorded.save(tmp_path, plan=plan)
    found = replay(tmp_path)
    assert not found.equal
    assert found.complete
    assert found.first["limited"]["axis"] == "arm1.1"
    first = found.first["limited"]
    rows = log_file.rows(tmp_path, "/ticks")
    row = rows[rows["tick"] == first["tick"]][0]
    assert row["limited"][4] == first["recorded"] != first["replayed"]
    assert Replay(tmp_path, recorded.plan).run().equal  # with the plan that it was recorded by


def forgiving(session):
    """Replayed as if by another build."""
    again = Replay(session)
    again.found.same_build = False
    return again.run()


def test_one_bit_of_one_command_is_found_and_another_build_forgives_it(recorded, tmp_path):
    rows = recorded.rows_read().copy()
    place = int(np.argmax(rows["doing"] == 3)) + 100
    rows["limited"][place, 2] = np.nextafter(rows["limited"][place, 2], 9)
    recorded.save(tmp_path, rows=rows)
    found = replay(tmp_path)
    assert found.different == {"limited": 1}
    assert found.first["limited"]["tick"] == rows["tick"][place]
    assert forgiving(tmp_path).equal


def test_another_build_is_not_forgiven_more_than_the_tolerance(recorded, tmp_path):
    rows = recorded.rows_read().copy()
    rows["limited"][1000, 2] += 3 * TOLERANCE
    assert forgiving(recorded.save(tmp_path, rows=rows)).different == {"limited": 1}


def test_ticks_that_are_missing_end_the_comparison_and_are_told(recorded, tmp_path):
    rows = recorded.rows_read()
    found = replay(recorded.save(tmp_path, rows=rows[(rows["tick"] < 1000) | (rows["tick"] >= 1010)]))
    assert found.equal
    assert not found.complete
    assert found.replayed == 999
    assert [stop["tick"] for stop in found.stops] == [1010]


def test_a_log_that_begins_before_the_first_arming_is_whole(recorded, tmp_path):
    found = replay(recorded.save(tmp_path, rows=recorded.rows_read()[20:]))
    assert found.complete
    assert found.equal


def test_a_log_that_begins_later_compares_nothing(recorded, tmp_path):
    found = replay(recorded.save(tmp_path, rows=recorded.rows_read()[500:]))
    assert found.replayed == 0
    assert found.stops[0]["tick"] == 501


def test_a_chunk_that_is_missing_ends_the_comparison_and_is_told(recorded, tmp_path):
    found = replay(recorded.save(tmp_path, numbers=set(range(1, 1000)) - {9}))
    assert found.equal
    assert not found.complete
    assert found.stops[0]["why"] == "chunk 9 is not in the log"


def test_a_state_that_is_missing_ends_the_comparison_and_is_told(recorded, tmp_path):
    found = replay(recorded.save(tmp_path, without_state=900))
    assert found.equal
    assert not found.complete
    assert "the state of arm0" in found.stops[0]["why"]


def test_a_servo_started_anew_is_compared_from_its_first_tick_on(tmp_path):
    rig = RecordedRig(joint_plan(rate=125.0))
    rig.tick(3)
    rig.want("track", arm=True)
    drive(rig, 2)
    rig.servo.quit()
    rig.seconds(1)
    rig.servo = None  # its segments stay
    rig.servo = Servo(rig.plan, rig.segments.servo_wires)
    rig.want("rest")
    rig.tick(3)
    rig.want("track", arm=True)
    drive(rig, 2)
    rows = rig.rows_read()
    assert (rows["tick"] == 1).sum() == 2
    found = replay(rig.save(tmp_path, rows=np.delete(rows, 200)))
    assert found.equal
    assert len(found.stops) == 1
    assert found.replayed == 200 + len(rows) - int(np.argmax(rows["tick"][1:] == 1)) - 1


def test_an_old_log_says_what_it_lacks(tmp_path):
    log = LogWriter(tmp_path, {"plan": servo_plan.to_json(joint_plan())})
    old = np.dtype([("tick", "<u8"), ("tick_ns", "<i8")])
    log.declare(Channel.rows("/ticks", old))
    log.reopen()
    log.write("/ticks", np.zeros(3, old).tobytes(), 1)
    log.close()
    with pytest.raises(ValueError, match="the ticks lack mode, wanted"):
        replay(tmp_path)


def test_the_command_says_equal_or_where_not(recorded, tmp_path):
    run = CliRunner().invoke
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    same = run(app, ["replay", str(recorded.save(tmp_path / "a"))])
    assert same.exit_code == 0
    assert "commands are equal, compared bit by bit" in same.output
    folder = recorded.save(tmp_path / "b", plan=altered(recorded.plan, velocity=(2.0, 2.0, 0.05)))
    other = run(app, ["replay", str(folder), "--json"])
    assert other.exit_code == 1
    assert json.loads(other.output)["first"]["limited"]["axis"] == "arm1.2"
    shown = run(app, ["replay", str(folder)])
    assert "commands differ" in shown.output


# ------------------------------------------------------------------------------------------------------- the policy's


def policy_log(folder, *, reports=(), pictures=()):
    log = LogWriter(folder, {})
    log.declare(Channel.json("/policy"))
    log.declare(log_file.image_channel("/camera/top"))
    log.reopen()
    for report in reports:
        log.write_json("/policy", report, 10)
    for at in pictures:
        log.write("/camera/top", ros.compressed_image(at, "top", b"jpeg"), at)
    log.close()
    return folder


def seen(query, captured_ns, camera="top"):
    return {"query": query, "frames": {camera: {"captured_ns": captured_ns}}}


def test_each_query_gets_the_picture_nearest_to_what_it_saw(tmp_path):
    reports = [{"wait": "no frame of top yet"}, *(seen(n, at) for n, at in enumerate((0, 100, 149, 151, 200, 999)))]
    folder = policy_log(tmp_path, reports=reports, pictures=(100, 200, 300))
    found = replay_policy.queries(folder, ("top",))
    assert [query.pictures["top"] for query in found] == [100, 100, 100, 200, 200, 300]
    assert [query.apart_ns for query in found] == [100, 0, 49, 49, 0, 699]
    assert len(replay_policy.queries(folder, ("top",), 2)) == 2


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ({"pictures": (1,)}, "found no answered query"),
        ({"reports": [seen(0, 1)]}, "found no pictures of top"),
        ({"reports": [seen(0, 1, "wrist")], "pictures": (1,)}, "query 0 saw wrist; the bundle asks for top"),
    ],
)
def test_a_log_that_cannot_be_asked_again_says_why(tmp_path, log, words):
    with pytest.raises(ValueError, match=words):
        replay_policy.queries(policy_log(tmp_path, **log), ("top",))


# ----------------------------------------------------------------------------------------------------------- a real run


@pytest.mark.slow
@on_a_machine_that_runs
def test_a_session_of_the_daemon_is_replayed_and_its_queries_asked_again(tmp_path, bundle):
    with DaemonRig(tmp_path, bundle, "--frame-rate", "15") as rig:
        rig.until_mode("READY", at_most=60)
        rig.arm()
        queries = rig.status["policy"]["queries"]
        rig.until(lambda: rig.status["policy"]["queries"] > queries + 4, "answers")
        assert rig.ask("stop")["ok"]
        rig.until(rig.standing, "standing after stop")
        rig.end()
    found = replay(rig.session)
    assert found.equal, found.first
    assert found.different == {}
    assert found.same_build
    assert found.moving > 200
    assert found.complete or rig.gaps(), found.stops

    plan = Replay(rig.session).plan
    jerk = tuple(0.9 * bound for bound in plan.arms[1].limits.jerk)
    found = Replay(rig.session, altered(plan, jerk=jerk)).run()
    assert not found.equal
    assert found.first["limited"]["axis"].startswith("right.")

    answers = replay_policy.replay(rig.session, bundle)
    span = np.array(([0.08] * 6 + [0.02]) * 2)
    assert len(answers["queries"]) > 4
    assert answers["components"][0]["name"] == "left.joint1"
    # The same bundle: what is left is JPEG's doing. Other noise alone would change the chunks by 0.4 of their span.
    assert (np.array([part["rms"] for part in answers["components"]]) < 0.1 * span).all()
    assert answers["texts_equal"] > 0.5 * len(answers["queries"])
    said = CliRunner().invoke(app, ["replay", str(rig.session), "--bundle", str(bundle), "--queries", "2"])
    assert said.exit_code == 0, said.output
    assert "pictures went through JPEG" in " ".join(said.output.split())
