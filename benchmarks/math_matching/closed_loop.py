"""One trial of the game in closed loop: a policy, the servo plane and the world on one virtual clock.

The servo is the real one, ticked by hand. A query sees the frame and the state of one instant and posts its chunk
LATENCY later, whatever it really took; the next query starts then. The diffusion noise of a query follows from the
trial's seed and the query's number. So a trial depends on its seed and on the policy's numbers, on no machine's speed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.benchmarks.math_matching import texts
from chatvla_edge.drivers.sim.planar_arm import JOINTS, LOWER, UPPER
from chatvla_edge.drivers.sim.tabletop import ACTIONS, OPEN, Split, Tabletop
from chatvla_edge.runtime.mailbox import ChunkMailbox
from chatvla_edge.runtime.pages import Lease
from chatvla_edge.runtime.rig_segments import RigSegments
from chatvla_edge.runtime.servo import Servo
from chatvla_edge.runtime.servo_plan import ArmPlan, AxisLimits, DirectAxis, FusionPlan, ServoPlan
from chatvla_edge.runtime.servo_records import COMMAND, DEVICE_DOING, MODE, STATE, WANTED
from chatvla_edge.runtime.slots import Slot

Float = NDArray[np.float32]

LATENCY = 0.3  # s from observation to chunk, the same for all
RATE = 200.0
LONGEST = 10.0  # s; the expert needs 3
_LEASE_NS = 100_000_000
_START_NS = 1_000_000_000  # a second after boot: a lease until then is one that may be granted


@dataclass(frozen=True)
class Said:
    """What a policy answers: text and its tokens, chunk [H, 14], routing [layers, E], language passes, draft hits."""

    text: str
    token_ids: list[int]
    chunk: Float
    routing: NDArray[np.int64]
    passes: int
    accepted: int


class Player(Protocol):
    """A policy under test. first_step and dt are its timing."""

    name: str
    first_step: int
    dt: float

    def query(self, frame: NDArray[np.uint8], state: Float, seed: int, draft: list[int]) -> Said:
        """Answer; `seed` is of the diffusion noise."""


@dataclass
class Outcome:
    """What a trial was.

    first: the first query's text and its score; picked: the first card taken; success: the right card was the first
    and lies on the board; answers: all queries; sent: [T, 14] commands, one per tick; posted: ticks at which a chunk
    came; frames: (seconds, picture) if they were kept.
    """

    seed: int
    split: Split
    truth: texts.Situation
    score: texts.Score
    picked: int | None = None
    success: bool = False
    seconds: float = 0.0
    answers: list[Said] = field(default_factory=list)
    sent: Float = field(default_factory=lambda: np.zeros((0, ACTIONS), np.float32))
    posted: list[int] = field(default_factory=list)
    frames: list[tuple[float, str, NDArray[np.uint8]]] = field(default_factory=list)


def plan() -> ServoPlan:
    """The servo of the simulated table: both arms with their grippers, chunks blended."""
    limits = AxisLimits(
        lower=(*LOWER.tolist(), 0.0),
        upper=(*UPPER.tolist(), OPEN),
        # Those of the rig sim_arx_r5_bimanual.
        velocity=(3.0, 3.0, 3.0, 4.0, 4.0, 4.0, 0.25),
        acceleration=(15.0, 15.0, 15.0, 20.0, 20.0, 20.0, 3.0),
        jerk=(400.0, 400.0, 400.0, 500.0, 500.0, 500.0, 100.0),
    )
    axes = JOINTS + 1
    return ServoPlan(
        rate=RATE,
        components=(*("joint",) * JOINTS, "gripper") * 2,
        horizon=50,
        arms=tuple(
            ArmPlan(
                name=name,
                limits=limits,
                direct=tuple(DirectAxis(axis=axis, component=arm * axes + axis) for axis in range(axes)),
            )
            for arm, name in enumerate(("left", "right"))
        ),
        fusion=FusionPlan(mode="blend", fade=0.2),
        gripper_range=(0.0, OPEN),
        approach_speed=0.5,
    )


class _Plane:
    """The servo plane around a world: ticks, states, commands."""

    def __init__(self, world: Tabletop) -> None:
        self.world, self.plan = world, plan()
        self.segments = RigSegments.create(self.plan, telemetry_rows=64)
        wires = self.segments.servo_wires
        self.lease = Lease.attach(wires.lease, write=True)
        self.chunks = ChunkMailbox.attach(wires.chunks, self.plan.horizon, ACTIONS, write=True)
        self.states = [Slot.attach(state, STATE.itemsize, write=True) for _, state in wires.arms]
        self.now, self.period = _START_NS, self.plan.period_ns
        self.doing = ["idle", "idle"]
        self.command = np.zeros((), COMMAND)
        self.record = np.zeros((), STATE)
        self._publish()
        self.servo = Servo(self.plan, wires)
        mode = np.zeros((), MODE)
        mode["wanted"], mode["speed"], mode["arming"] = WANTED.index("track"), 1.0, 1
        Slot.attach(wires.mode, MODE.itemsize, write=True).publish(mode)

    @property
    def tau(self) -> float:
        return float(self.servo.read_status()["tau"])

    def post(self, said: Said, tau: float, observed_ns: int, player: Player) -> None:
        actions = np.ascontiguousarray(said.chunk, np.float64)
        self.chunks.publish(
            actions,
            epoch=0,
            tau_observation=tau,
            first_step=player.first_step,
            dt=player.dt,
            captured_ns=observed_ns,
        )

    def tick(self) -> NDArray[np.float64]:
        """One tick of servo and world; returns the commands [14]."""
        self.now += self.period
        self.lease.grant_until(self.now + _LEASE_NS)
        self.servo.tick(self.now)
        wanted = self.world.state.astype(np.float64)
        for arm, slot in enumerate(self.segments.commands):
            slot.read_into(self.command)
            moving = bool(self.command["moving"])
            self.doing[arm] = "following" if moving else "idle"
            if moving:
                wanted[7 * arm : 7 * arm + 7] = self.command["q"][:7]
        self.world.step(wanted, self.period * 1e-9)
        self._publish()
        return wanted

    def _publish(self) -> None:
        state = self.world.state.astype(np.float64)
        for arm, slot in enumerate(self.states):
            record = self.record
            for name in ("q", "dq", "effort", "sent"):
                record[name] = np.nan
            record["axes"], record["q"][:7] = 7, state[7 * arm : 7 * arm + 7]
            record["doing"] = DEVICE_DOING.index(self.doing[arm])
            record["arming"] = 1
            slot.publish(record, self.now)


def play(
    player: Player,
    seed: int,
    split: Split,
    *,
    highest: int,
    size: tuple[int, int],
    keep_frames: Callable[[float], bool] = lambda _: False,
) -> Outcome:
    """One trial from the arms' home to the end: a card on the board, a wrong card taken, or LONGEST seconds.

    size: height and width of the camera's frame.
    """
    world = Tabletop(highest)
    world.reset(seed, split)
    truth = texts.situation(world.scene, None)
    plane = _Plane(world)
    answers: list[Said] = []
    sent, posted = [], []
    out = Outcome(seed, split, truth, texts.Score(0, 0, False, None))
    wait = round(LATENCY * RATE)
    draft: list[int] = []
    waiting: tuple[int, Said, float, int] | None = None
    for tick in range(round(LONGEST * RATE)):
        if waiting is not None and tick == waiting[0]:
            _, said, tau, observed = waiting
            plane.post(said, tau, observed, player)
            posted.append(tick)
            waiting = None
        if waiting is None:
            frame = world.render(*size)
            said = player.query(frame, world.state, seed * 100 + len(answers), draft)
            if keep_frames(world.time):
                out.frames.append((world.time, said.text, frame))
            answers.append(said)
            draft = said.token_ids
            waiting = (tick + wait, said, plane.tau, plane.now)
        sent.append(plane.tick())
        if world.placed is not None or (world.picks and world.picks[0][1] != truth.place):
            break
    out.frames.append((world.time, answers[-1].text, world.render(*size)))
    out.score = texts.score(answers[0].text, truth)
    out.picked = world.picks[0][1] if world.picks else None
    out.success = world.placed == truth.place and out.picked == truth.place
    out.seconds, out.answers, out.posted = world.time, answers, posted
    out.sent = np.asarray(sent, np.float32)
    return out
