"""What the supervisor sees of its run, every 20 ms: for the arbiter, for the operator's screen, for the summary."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from chatvla_edge.drivers.rig import Rig
from chatvla_edge.runtime.bundle import Contents
from chatvla_edge.runtime.camera_frames import CameraStatus
from chatvla_edge.runtime.daemon.mapping import axes_of
from chatvla_edge.runtime.daemon.records import POLICY, RECORDER, REPORT_BYTES, unpacked
from chatvla_edge.runtime.daemon.run_segments import RunSegments
from chatvla_edge.runtime.device_plan import DevicePlan
from chatvla_edge.runtime.histogram import SNAPSHOT
from chatvla_edge.runtime.modes import MS, S
from chatvla_edge.runtime.observations import Camera, Child, Observations
from chatvla_edge.runtime.rig_segments import HISTOGRAMS
from chatvla_edge.runtime.rig_view import RigView
from chatvla_edge.runtime.servo_plan import ServoPlan
from chatvla_edge.runtime.servo_records import REASONS, SERVO_DOING, STATE, STATUS, names
from chatvla_edge.runtime.slots import Slot, SlotBusyError

WINDOW_NS = 2 * S  # over which rates are counted


class Meter:
    """Events per second of a counter that is looked at now and then."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, int]] = deque()
        self.first: tuple[int, int] | None = None
        self.last: tuple[int, int] | None = None

    def see(self, now_ns: int, count: int) -> None:
        """Take down a count. One that fell belongs to a process that was started anew."""
        if self.last is not None and count < self.last[1]:
            self._seen.clear()
            self.first = None
        self.last = (now_ns, count)
        if self.first is None and count:
            self.first = self.last
        if not self._seen or now_ns - self._seen[-1][0] >= WINDOW_NS // 20:
            self._seen.append(self.last)
        while self._seen and now_ns - self._seen[0][0] > WINDOW_NS:
            self._seen.popleft()

    @property
    def rate(self) -> float:
        """Over the last two seconds; 0 before there are two looks."""
        if len(self._seen) < 2:
            return 0.0
        (then, before), (now, count) = self._seen[0], self._seen[-1]
        return (count - before) / (1e-9 * (now - then))

    @property
    def mean(self) -> float:
        """Since the first event."""
        if self.first is None or self.last is None or self.last[0] == self.first[0]:
            return 0.0
        return (self.last[1] - self.first[1]) / (1e-9 * (self.last[0] - self.first[0]))


class Watch:
    """Reads every slot of the run. One thread."""

    def __init__(
        self, rig: Rig, manifest: Contents, plan: ServoPlan, devices: Sequence[DevicePlan], segments: RunSegments
    ) -> None:
        self.rig, self.plan, self.segments = rig, plan, segments
        self.used = {camera.name for camera in manifest.cameras}
        self.axes = {name: axes.names for name, axes in axes_of(rig).items()}
        self.cameras = {name: camera.frames() for name, camera in segments.cameras.items()}
        self.camera_states: dict[str, CameraStatus | None] = dict.fromkeys(self.cameras)
        self.frames = {name: Meter() for name in self.cameras}
        self.arrivals = dict.fromkeys(self.cameras, 0)
        self.servo = np.zeros((), STATUS)
        self.states = [np.zeros((), STATE) for _ in plan.arms]
        self.state_stamps = [(0, 0) for _ in plan.arms]  # published, captured
        self.state_meters = [Meter() for _ in plan.arms]
        self.tick_meter = Meter()
        self.query_meter = Meter()
        self.policy = np.zeros((), POLICY)
        self.recorder = np.zeros((), RECORDER)
        self.reader = segments.reports.reader()
        self.report: dict[str, Any] = {}
        self.last_wait = ""
        self.query_ms: deque[float] = deque(maxlen=1000)
        self.counted = 0
        self.view = RigView(plan, devices, segments.plane)
        self.wall_ns = time.time_ns() - time.monotonic_ns()

    def _read(self, slot: Slot, into: Any) -> tuple[int, int]:
        """Stamps (published, captured); the old value and (0, 0) where there is none."""
        try:
            found = slot.read_into(into)
        except SlotBusyError:
            return 0, 0
        return (0, 0) if found is None else (found.published_ns, found.captured_ns)

    def _gather(self, now_ns: int) -> None:
        segments = self.segments
        self._read(segments.plane.status, self.servo)
        self.tick_meter.see(now_ns, int(self.servo["tick"]))
        for number, slot in enumerate(segments.plane.states):
            stamps = self._read(slot, self.states[number])
            if stamps[0]:
                self.state_stamps[number] = stamps
            self.state_meters[number].see(now_ns, slot.sequence)
        for name, camera in self.cameras.items():
            status = camera.status()
            if status is not None:
                before = self.camera_states[name]
                # A camera whose pictures stand still has no new frame, whatever its counter says.
                if status.frames and status.identical == 0 and (before is None or status.frames != before.frames):
                    self.arrivals[name] = status.beat_ns
                self.camera_states[name] = status
                self.frames[name].see(now_ns, status.frames)
        self._read(segments.policy, self.policy)
        self.query_meter.see(now_ns, int(self.policy["queries"]))
        if int(self.policy["queries"]) != self.counted:
            self.counted = int(self.policy["queries"])
            self.query_ms.append(1e-6 * float(self.policy["query_ns"]))
        self._read(segments.recorder, self.recorder)
        record = np.zeros((4, REPORT_BYTES), np.uint8)
        while count := self.reader.read(record):
            for row in record[:count]:
                report = unpacked(row.tobytes()) or {}
                if "text" in report:
                    self.report = report
                elif report:
                    self.last_wait = str(report.get("wait", report.get("error", "")))

    def look(self, children: Mapping[str, Child], enable: bool | None) -> Observations:
        """What the arbiter decides on. ``children``: by the names that the supervisor gives them."""
        now_ns = time.monotonic_ns()
        self._gather(now_ns)
        cameras = [
            Camera(
                name,
                required=self.rig.cameras[name].required and name in self.used,
                period_ns=round(1e9 / self.rig.cameras[name].rate),
                received_ns=self.arrivals[name],
                process=children[f"camera {name}"],
            )
            for name in self.cameras
        ]
        wall_ns = time.time_ns() - time.monotonic_ns()
        step, self.wall_ns = wall_ns - self.wall_ns, wall_ns
        return self.view.observe(
            cameras=cameras,
            cycle_ns=round(1e9 * self.rig.policy.cycle),
            policy_ready=bool(self.policy["ready"]),
            children={name.removeprefix("device "): child for name, child in children.items()},
            recorder=children.get("recorder"),
            enable=enable,
            clock_step_ns=step,
        )

    def works(self, name: str) -> bool:
        """Whether a child has shown, since it was started, that it does its work."""
        now_ns = time.monotonic_ns()
        self._gather(now_ns)
        kind, _, subject = name.partition(" ")
        if kind == "camera":
            status = self.camera_states[subject]
            return status is not None and status.frames > 0
        if kind == "device":
            number = [arm.name for arm in self.plan.arms].index(subject)
            return self.state_stamps[number][1] > 0 and not np.isnan(self.states[number]["q"][0])
        if kind == "servo":
            return bool(self.servo["tick"])
        if kind == "recorder":
            return self.segments.recorder.sequence > 0
        return self.segments.policy.sequence > 0

    def servo_beats(self, now_ns: int) -> bool:
        """Whether the servo has ticked within a lease."""
        return bool(abs(now_ns - int(self.servo["tick_ns"])) < 100 * MS)

    # ----------------------------------------------------------------------------------------------- screen and summary

    def _streams(self, now_ns: int) -> list[dict[str, Any]]:
        rows = []

        def row(name: str, declared: float, meter: Meter, stamp_ns: int, note: str = "") -> None:
            age = None if not stamp_ns else 1e-6 * (now_ns - stamp_ns)
            rows.append(
                {
                    "name": name,
                    "declared": declared,
                    "rate": meter.rate,
                    "mean": meter.mean,
                    "age_ms": age,
                    "note": note,
                }
            )

        for name, status in self.camera_states.items():
            note = "never seen" if status is None else status.state
            if status is not None and (status.lost or status.repeated):
                note += f", {status.lost} lost, {status.repeated} repeated"
            row(f"camera {name}", self.rig.cameras[name].rate, self.frames[name], self.arrivals[name], note)
        for number, arm in enumerate(self.plan.arms):
            rate = self.rig.arms[arm.name].rate
            row(f"device {arm.name}", rate, self.state_meters[number], self.state_stamps[number][1])
        row("servo", self.plan.rate, self.tick_meter, int(self.servo["tick_ns"]))
        row("policy", 1.0 / self.rig.policy.cycle, self.query_meter, int(self.policy["chunk_ns"]), self.last_wait)
        return rows

    def status(self, now_ns: int) -> dict[str, Any]:
        """For the operator's screen, as JSON values."""
        servo, policy = self.servo, self.policy
        return {
            "streams": self._streams(now_ns),
            "servo": {
                "doing": SERVO_DOING[int(servo["doing"])],
                "reasons": list(names(int(servo["reasons"]), REASONS)),
                "standing": bool(servo["standing"]),
                "tau": float(servo["tau"]),
                "tau_rate": float(servo["tau_rate"]),
                "chunk_age_ms": 1e-6 * float(servo["chunk_age_ns"]),
                "chunks": int(servo["chunks_taken"]),
                "refused": int(servo["chunks_refused"]),
                "overruns": int(servo["overruns"]),
                "clipped_ticks": int(servo["clipped_ticks"]),
                "lateness_us": [1e-3 * float(servo[f"lateness_{p}_ns"]) for p in ("p50", "p99", "max")],
                "cost_us": [1e-3 * float(servo[f"cost_{p}_ns"]) for p in ("p50", "p99", "max")],
            },
            "devices": [
                {
                    "name": arm.name,
                    "axes": list(self.axes[arm.name]),
                    "measured": _numbers(state["q"][: arm.axes]),
                    "sent": _numbers(state["sent"][: arm.axes]),
                    "words": state["words"].item().decode(errors="replace"),
                }
                for arm, state in zip(self.plan.arms, self.states, strict=True)
            ],
            "policy": {
                "ready": bool(policy["ready"]),
                "queries": int(policy["queries"]),
                "errors": int(policy["errors"]),
                "waits": int(policy["waits"]),
                "query_ms": 1e-6 * float(policy["query_ns"]),
                "passes": int(policy["passes"]),
                "tokens": int(policy["tokens"]),
                "text": str(self.report.get("text", "")),
            },
            "recorder": {name: int(self.recorder[name]) for name in RECORDER.names or ()},
        }

    def summary(self, began_ns: int, now_ns: int) -> dict[str, Any]:
        """What a run leaves behind, as JSON values."""
        self._gather(now_ns)
        status = self.status(now_ns)
        queries = sorted(self.query_ms)
        histograms = np.zeros(len(HISTOGRAMS), SNAPSHOT)
        self._read(self.segments.plane.histograms, histograms)
        facts: dict[str, Any] = {
            "queries answered": status["policy"]["queries"],
            "queries failed": status["policy"]["errors"],
            "queries put off": status["policy"]["waits"],
            "chunks taken by the servo": status["servo"]["chunks"],
            "chunks refused": status["servo"]["refused"],
            "ticks skipped": status["servo"]["overruns"],
            "ticks with a clip": status["servo"]["clipped_ticks"],
            "wake-up late p50 / p99 (us)": " / ".join(f"{v:.0f}" for v in status["servo"]["lateness_us"][:2]),
            "cost of a tick p50 / p99 (us)": " / ".join(f"{v:.1f}" for v in status["servo"]["cost_us"][:2]),
            "ticks logged / in gaps": f"{status['recorder']['ticks']} / {status['recorder']['ticks_lost']}",
            "frames logged / passed over": f"{status['recorder']['frames']} / {status['recorder']['frames_passed']}",
            "log (MB)": round(status["recorder"]["bytes"] / 1e6, 1),
        }
        if queries:
            facts["query p50 / worst (ms)"] = f"{queries[len(queries) // 2]:.0f} / {queries[-1]:.0f}"
        return {
            "seconds": (now_ns - began_ns) * 1e-9,
            "streams": [
                {"name": row["name"], "declared": row["declared"], "rate": row["mean"]} for row in status["streams"]
            ],
            "facts": facts,
            "servo": status["servo"],
            "policy": {**status["policy"], "query_ms": [round(value, 3) for value in self.query_ms]},
            "recorder": status["recorder"],
        }


def _numbers(values: Any) -> list[float | None]:
    """JSON knows no NaN."""
    return [float(value) if np.isfinite(value) else None for value in values]
