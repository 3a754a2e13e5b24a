"""How much a seam is felt: velocity steps near seams against those elsewhere, of what was fused and of what was sent.

A tape of smooth random motion (minimum-jerk moves between random postures) is executed through each fusion mode at
500 Hz, by a policy that needs a fixed time per query and predicts the tape with errors of three kinds: an offset per
chunk, a drift that grows along the chunk, and jitter from action to action. The measure is |velocity step| from tick
to tick: its 99th percentile within 100 ms of a seam divided by that elsewhere. 1.0 means that a seam cannot be told
from the motion around it. Velocity steps in tau and in host time are the same here: the clock runs at rate 1.

Fused is the fusion's own output; sent is what leaves after jerk-limited tracking and limits, those of the ARX rigs.

A query takes the delay give or take 15 %, or the seams would lock to one phase of the 20 ms between actions. Where
seams fall on the tape is chance, and the tape's own fast moves would decide the ratio. Each tape is therefore run
at several phases of the policy, spread over one query, so that every instant of it lies near a seam in as large a
share of the runs as any other. The row `tape` is the control: the motion itself, measured at the seams of `blend`; and
each mode's ratio stands beside that of the motion at the mode's own seams, tape by tape.

`rtc` assumes a sampler that honours the committed prefix and is otherwise itself: rows with mask 1 are the prefix; the
others' offset and drift lie between the prefix's and its own in proportion to the mask, and their jitter keeps its
spread (m and sqrt(1 - m^2): averaging it away would make the middle of a chunk smoother than any policy is). The row
`rtc (prefix ignored)` shows what the servo makes of a sampler that does not honour the prefix at all.

    python -m chatvla_edge.benchmarks.seams [--quick] [--json FILE] [--delay SECONDS]
"""

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.benchmarks import script
from chatvla_edge.benchmarks.report import Report
from chatvla_edge.runtime.chunks import Chunk
from chatvla_edge.runtime.fusion import Fusion
from chatvla_edge.runtime.knots import ActionLayout
from chatvla_edge.runtime.limits import Limiter
from chatvla_edge.runtime.tau import TauClock
from chatvla_edge.runtime.tracking import Tracker

SUMMARY = "Seams between chunks: velocity steps within 100 ms of them over those elsewhere, per fusion mode."

Array = NDArray[np.float64]

NEAR = 0.1  # s around a seam
GOAL = 1.0
SIGNALS = ("fused", "sent")
RANGE = 20.0  # rad: further than any tape goes, since only velocity, acceleration and jerk are asked about
VELOCITY, ACCELERATION, JERK = (3.0, 3.0, 3.0, 4.0, 4.0, 4.0), (15.0,) * 3 + (20.0,) * 3, (400.0,) * 3 + (500.0,) * 3
MARGIN = 0.95  # the share of them that the tracker uses, as in a servo's plan


@dataclass(frozen=True)
class Setting:
    """One robot and one policy: seconds, radians. The defaults are an ARX arm at its public rates."""

    joints: int = 6
    horizon: int = 50
    dt: float = 0.02
    first_step: int = -1
    delay: float = 0.3
    servo_dt: float = 0.002
    duration: float = 30.0
    offset: float = 0.004
    drift: float = 0.008  # per second along the chunk
    jitter: float = 0.0005
    fade: float = 0.5
    cubic: bool = True
    prefix_schedule: str = "smooth"
    delay_spread: float = 0.15  # a query takes delay * (1 +- spread), uniformly


class Tape:
    """Random minimum-jerk motion: dwells and moves of 0.5 to 1.5 s between postures, each joint on its own clock."""

    def __init__(self, joints: int, duration: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.starts: list[Array] = []
        self.postures: list[Array] = []
        for _ in range(joints):
            lengths = rng.uniform(0.5, 1.5, int(duration / 0.5) + 4)
            self.starts.append(np.concatenate([[0.0], np.cumsum(lengths)]))
            posture = np.cumsum(rng.normal(0, 0.3, len(lengths) + 1))
            posture -= np.convolve(posture, np.ones(9) / 9, "same")  # wanders around zero, as an arm in its workspace
            posture[1::5] = posture[0::5][: len(posture[1::5])]  # some dwells
            self.postures.append(posture)

    def at(self, tau: NDArray[np.floating[Any]]) -> Array:
        """[T] s -> [T, A] rad."""
        tau = np.maximum(tau, 0.0)
        columns = []
        for starts, postures in zip(self.starts, self.postures, strict=True):
            k = np.clip(np.searchsorted(starts, tau, "right") - 1, 0, len(starts) - 2)
            u = np.clip((tau - starts[k]) / (starts[k + 1] - starts[k]), 0, 1)
            blend = u * u * u * (10 - 15 * u + 6 * u * u)
            columns.append(postures[k] + blend * (postures[k + 1] - postures[k]))
        return np.stack(columns, axis=1)


@dataclass(frozen=True)
class Run:
    """One run at the servo's rate: ``fused`` and ``sent`` [T, A], ``tau`` and ``seam`` [T], and ticks clipped."""

    fused: Array
    sent: Array
    tau: Array
    seam: NDArray[np.bool_]
    clipped: int


def follow(wanted: Array, servo_dt: float) -> tuple[Array, int]:
    """``wanted`` [T, A] after tracking and limits, [T, A]; and the ticks in which the limits had to touch it."""
    joints = wanted.shape[1]
    period = round(1e9 * servo_dt)
    lower, upper = [-RANGE] * joints, [RANGE] * joints
    bounds = [limit[:joints] for limit in (VELOCITY, ACCELERATION, JERK)]
    limiter = Limiter(lower, upper, bounds[0], bounds[1], bounds[2], period)
    velocity, acceleration, jerk = (MARGIN * np.array(bound) for bound in bounds)
    tracker = Tracker(lower, upper, velocity, acceleration, jerk, period)
    limiter.reset(wanted[0].tolist(), 0)
    tracker.reset(wanted[0])
    target, position = np.asarray(tracker.target), np.asarray(tracker.position)
    asked, command = np.asarray(limiter.wanted), np.asarray(limiter.command)
    sent = np.empty_like(wanted)
    clipped = 0
    for tick, row in enumerate(wanted):
        target[:] = row
        tracker.advance()
        asked[:] = position
        if limiter.tick((tick + 1) * period):
            clipped += 1
            tracker.resume(limiter)
        sent[tick] = command
    return sent, clipped


def execute(setting: Setting, mode: str, seed: int, *, phase: float = 0.0, prefix_honoured: bool = True) -> Run:
    """Run the tape through one fusion mode, policy and servo in lock step; the first query starts at ``phase`` s."""
    tape = Tape(setting.joints, setting.duration, seed)
    rng = np.random.default_rng([seed, 1])
    layout = ActionLayout(["joint"] * setting.joints)
    fusion = Fusion(
        layout,
        setting.horizon,
        mode=mode,
        cubic=setting.cubic,
        fade=setting.fade,
        prefix_schedule=setting.prefix_schedule,
    )
    clock = TauClock()
    fusion.reset(tape.at(np.zeros(1))[0])
    # A chunk that does not move bridges the time to the first query, so that the phase shifts the queries along tau.
    still = np.repeat(tape.at(np.zeros(1)), setting.horizon, axis=0)
    fusion.push(Chunk(still, 0.0, setting.dt, setting.first_step))
    rows = np.arange(setting.horizon)
    ticks = int(setting.duration / setting.servo_dt)
    low, high = (
        max(setting.delay * (1 + s) / setting.servo_dt, 1) for s in (-setting.delay_spread, setting.delay_spread)
    )
    value, tau = np.empty((ticks, setting.joints)), np.empty(ticks)
    seam = np.zeros(ticks, bool)
    query, latency = round(phase / setting.servo_dt), 0
    chunk = None
    for tick in range(ticks):
        if chunk is not None and tick == query + latency:
            fusion.push(chunk)
            chunk, query = None, tick
        if tick == query:
            latency = round(rng.uniform(low, high))
            due = clock.tau + (rows + setting.first_step) * setting.dt
            actions = tape.at(due)
            ahead = np.maximum(due - clock.tau, 0.0)[:, None]
            own = rng.normal(0, setting.offset, setting.joints) + ahead * rng.normal(0, setting.drift, setting.joints)
            jitter = rng.normal(0, setting.jitter, (setting.horizon, setting.joints))
            mask = np.zeros((setting.horizon, 1))
            held = np.zeros_like(actions)
            if mode == "rtc" and prefix_honoured:
                prefix = fusion.committed_prefix(clock.tau, setting.first_step, setting.dt, high * setting.servo_dt)
                mask, held = prefix.mask[:, None], prefix.actions - actions
            actions = actions + mask * held + (1 - mask) * own + np.sqrt(1 - mask**2) * jitter
            chunk = Chunk(actions, clock.tau, setting.dt, setting.first_step, sequence=tick + 1)
        clock.advance(setting.servo_dt, 1.0, fusion.path_end())
        fused = fusion.sample(clock.tau)
        value[tick], tau[tick], seam[tick] = fused.value, clock.tau, fused.seam
    sent, clipped = follow(value, setting.servo_dt)
    return Run(value, sent, tau, seam, clipped)


def velocity_steps(value: Array, seam: NDArray[np.bool_], servo_dt: float) -> tuple[Array, Array]:
    """|velocity step| per tick and joint, rad/s: (near seams, elsewhere), both flat. The first 1.5 s are left out."""
    steps = np.abs(np.diff(value, 2, axis=0)) / servo_dt
    reach = round(NEAR / servo_dt)
    # steps[i] compares ticks i, i+1, i+2: it is the step at tick i+1, and it is a seam's if any of the three is near.
    near = np.convolve(seam.astype(float), np.ones(2 * reach + 3), "same")[1:-1] > 0
    late = np.arange(len(steps)) * servo_dt > 1.5
    return steps[near & late].ravel(), steps[~near & late].ravel()


def measure(
    setting: Setting, mode: str, seeds: int, *, phases: int = 6, prefix_honoured: bool = True
) -> dict[str, dict[str, float]]:
    """Of ``fused`` and ``sent``: the seam ratio over all runs pooled, its spread over tapes, and what it costs.

    Mode ``tape`` takes the tape itself for the fused signal and the seams of ``blend``.
    """
    pools = {signal: Pool(setting.servo_dt) for signal in SIGNALS}
    control = {signal: Pool(setting.servo_dt) for signal in SIGNALS}  # the tape, at these very seams
    for seed in range(seeds):
        tape = Tape(setting.joints, setting.duration, seed)
        then, tracked = np.empty(0), np.empty(0)
        for phase in range(phases):
            shift = phase / phases * setting.delay
            run = execute(
                setting, "blend" if mode == "tape" else mode, seed, phase=shift, prefix_honoured=prefix_honoured
            )
            truth = tape.at(run.tau)
            if not np.array_equal(then, run.tau):
                then, tracked = run.tau, follow(truth, setting.servo_dt)[0]
            if mode == "tape":
                run = replace(run, fused=truth, sent=tracked)
            pools["fused"].add(run.fused, run.seam, truth, 0)
            pools["sent"].add(run.sent, run.seam, truth, run.clipped)
            control["fused"].add(truth, run.seam, truth, 0)
            control["sent"].add(tracked, run.seam, truth, 0)
        for pool in (*pools.values(), *control.values()):
            pool.end_of_tape()
    return {signal: pool.figures() | pool.beside(control[signal]) for signal, pool in pools.items()}


class Pool:
    """Velocity steps of one signal over all runs of all tapes."""

    def __init__(self, servo_dt: float) -> None:
        self.servo_dt = servo_dt
        self.near: list[Array] = []
        self.elsewhere: list[Array] = []
        self.ratios: list[float] = []
        self.errors: list[float] = []
        self.jerks: list[float] = []
        self.clipped = self.ticks = self.begun = 0

    def add(self, value: Array, seam: NDArray[np.bool_], truth: Array, clipped: int) -> None:
        """One run."""
        near, elsewhere = velocity_steps(value, seam, self.servo_dt)
        self.near.append(near)
        self.elsewhere.append(elsewhere)
        self.errors.append(float(np.sqrt(np.mean((value - truth) ** 2))))
        self.jerks.append(rms_jerk(value, self.servo_dt) / rms_jerk(truth, self.servo_dt))
        self.clipped += clipped
        self.ticks += len(value)

    def end_of_tape(self) -> None:
        """The runs since the last call were of one tape."""
        self.ratios.append(_p99(self.near[self.begun :]) / _p99(self.elsewhere[self.begun :]))
        self.begun = len(self.near)

    def figures(self) -> dict[str, float]:
        """What they amount to; velocity steps in rad/s, errors in rad."""
        near, elsewhere = _p99(self.near), _p99(self.elsewhere)
        return {
            "near_p99": near,
            "elsewhere_p99": elsewhere,
            "ratio": near / elsewhere,
            "ratio_error": float(np.std(self.ratios) / max(len(self.ratios) - 1, 1) ** 0.5),
            "ratio_lowest": min(self.ratios),
            "ratio_highest": max(self.ratios),
            "near_max": max(float(values.max()) for values in self.near),
            "error_rms": float(np.mean(self.errors)),
            "jerk": float(np.mean(self.jerks)),
            "clipped": self.clipped / self.ticks,
        }

    def beside(self, control: "Pool") -> dict[str, float]:
        """The ratio of each tape over that of the motion itself, which sees where the seams fell on it: mean, error."""
        over = np.array(self.ratios) / np.array(control.ratios)
        return {"excess": float(over.mean()), "excess_error": float(over.std() / max(len(over) - 1, 1) ** 0.5)}


def _p99(parts: list[Array]) -> float:
    return float(np.percentile(np.concatenate(parts), 99))


def rms_jerk(value: Array, servo_dt: float) -> float:
    """Third differences over 20 ms, so that jitter at the servo's own rate does not drown the motion; rad/s^3."""
    stride = max(round(0.02 / servo_dt), 1)
    third = (
        value[3 * stride :] - 3 * value[2 * stride : -stride] + 3 * value[stride : -2 * stride] - value[: -3 * stride]
    )
    return float(np.sqrt(np.mean(third**2))) / (stride * servo_dt) ** 3


# name, mode, honours the prefix, schedule of the mask
ROWS = (
    ("tape", "tape", True, "smooth"),
    ("switch", "switch", True, "smooth"),
    ("blend", "blend", True, "smooth"),
    ("ensemble", "ensemble", True, "smooth"),
    ("rtc", "rtc", True, "smooth"),
    ("rtc (mask of the paper)", "rtc", True, "exp"),
    ("rtc (prefix ignored)", "rtc", False, "smooth"),
)
JUDGED = ("blend", "ensemble", "rtc")
LITTLE = 0.0001  # rad


def add_arguments(parser: ArgumentParser) -> None:
    """The policy and the fade."""
    parser.add_argument("--delay", type=float, default=Setting.delay, metavar="SECONDS", help="policy delay")
    parser.add_argument("--jitter", type=float, default=Setting.jitter, metavar="RADIANS", help="from action to action")
    parser.add_argument("--fade", type=float, default=Setting.fade, metavar="SECONDS")


def run(options: Namespace) -> Report:
    """Every mode over the same tapes; and those with a goal again with a policy that has little jitter."""
    seeds, duration = (3, 15.0) if options.quick else (12, 40.0)
    setting = Setting(delay=options.delay, duration=duration, fade=options.fade, jitter=options.jitter)
    report = Report(title=f"Velocity steps near seams, {setting.delay * 1e3:.0f} ms policy delay")
    for name, mode, honoured, schedule in ROWS:
        noisy = replace(setting, prefix_schedule=schedule)
        for signal, result in measure(noisy, mode, seeds, prefix_honoured=honoured).items():
            _tell(report, f"{name}, {signal}", result)
            report.figure(f"{name}, {signal}: rms error", result["error_rms"] * 1e3, "mrad")
            report.figure(f"{name}, {signal}: jerk over the tape's", result["jerk"], "x")
    for mode in ("switch", *JUDGED):
        for signal, result in measure(replace(setting, jitter=LITTLE), mode, seeds).items():
            _tell(report, f"{mode}, {signal}, little jitter", result)
    report.method.append(
        f"{seeds} tapes of {duration:g} s; " + ", ".join(f"{k} {v}" for k, v in asdict(setting).items())
    )
    report.method.append(f"little jitter: {LITTLE} rad from action to action instead of {setting.jitter}")
    report.note(
        "At the full jitter the sent signal is bounded by the rig's acceleration everywhere, so that even `switch` has "
        "a ratio of about 1 there: what tells the modes apart is the fused signal, the error, and the rows with little "
        "jitter."
    )
    return report


def _tell(report: Report, name: str, result: dict[str, float]) -> None:
    report.figure(f"{name}: ratio of p99s", result["ratio"], "x")
    report.figure(f"{name}: p99 near seams", result["near_p99"], "rad/s")
    report.figure(f"{name}: ratio over the motion's own at the same seams", result["excess"], "x")
    report.note(
        f"{name}: ratio {result['ratio']:.3f} ± {2 * result['ratio_error']:.3f}, over tapes "
        f"{result['ratio_lowest']:.3f} to {result['ratio_highest']:.3f}; over the motion's own {result['excess']:.3f} "
        f"± {2 * result['excess_error']:.3f}; largest step near seams {result['near_max']:.4f} rad/s; clipped by the "
        f"limits {result['clipped']:.2%} of the ticks"
    )
    if name.partition(",")[0] in JUDGED:
        # A method that adds nothing measures 1.0 give or take the error of the mean over tapes, and would miss a bare
        # "<= 1.0" every other time: missed is what lies above by more than two such errors.
        report.goal(
            f"seam ratio less two standard errors over tapes, {name}",
            result["ratio"] - 2 * result["ratio_error"],
            "<=",
            GOAL,
            unit="x",
        )


if __name__ == "__main__":
    sys.exit(script.main(__file__))
