"""The supervisor: brings a rig up, watches it, decides every 20 ms through the arbiter, and brings it down.

One thread, one loop at absolute deadlines. Nothing in it waits: children are looked at, sockets polled, files written
by others. Where it stands still all the same, the lease runs out and the arms come to rest by themselves.
"""

import json
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.protocols import EnableInput
from chatvla_edge.runtime import processes, servo_plan
from chatvla_edge.runtime.arbiter import Act, Arbiter, Decision, Order, Request
from chatvla_edge.runtime.bundle import Bundle
from chatvla_edge.runtime.camera_process import start_camera
from chatvla_edge.runtime.daemon import mapping, replay
from chatvla_edge.runtime.daemon.children import Child, Process, spawn
from chatvla_edge.runtime.daemon.control import Server
from chatvla_edge.runtime.daemon.notify import notify, watchdog_period
from chatvla_edge.runtime.daemon.places import Run
from chatvla_edge.runtime.daemon.records import EVENT_BYTES, EVENTS, TEXT_BYTES, packed
from chatvla_edge.runtime.daemon.run_segments import RunSegments
from chatvla_edge.runtime.daemon.settings import Settings
from chatvla_edge.runtime.daemon.watch import Watch
from chatvla_edge.runtime.modes import ARMED, MS, Mode, Want
from chatvla_edge.runtime.pages import Lease
from chatvla_edge.runtime.realtime import now_ns, sleep_until_ns
from chatvla_edge.runtime.rig_view import Orders
from chatvla_edge.runtime.riglock import RigClaim
from chatvla_edge.runtime.slots import Ring, Slot

log = logging.getLogger(__name__)

TURN_NS = 20 * MS
SERVO_PRIORITY, DEVICE_PRIORITY = 80, 75  # of SCHED_FIFO
START_S = {"camera": 20.0, "device": 20.0, "servo": 10.0, "policy": 600.0, "recorder": 10.0}
STOP_S = 3.0  # to come to rest, when asked to end
LEAVE_S = 5.0  # for a child to end by itself
POLICY_MODULE = "chatvla_edge.runtime.daemon.policy_process"
RECORDER_MODULE = "chatvla_edge.runtime.daemon.recorder"
DRIVER = "chatvla_edge.runtime.daemon.device_process:arm"

Progress = Callable[[str], None]


class StartError(RuntimeError):
    """The rig did not come up; the message says which part, and its last words."""


class Supervisor:
    """One run of one rig. `run` returns when it is over; `leave` asks it to end, from a signal handler or a thread."""

    def __init__(self, settings: Settings, bundle: Bundle, progress: Progress = lambda _: None) -> None:
        self.settings = settings
        self.rig = settings.rig
        self.manifest = bundle.manifest
        self.seal = bundle.seal
        self.progress = progress
        # All that can be refused is refused here, before anything is opened.
        self.plan = mapping.servo_plan(self.rig, self.manifest)
        if settings.kind != "live":
            # An arm that is told nothing does not follow, and that is no fault of it.
            self.plan = replace(
                self.plan, arms=tuple(replace(arm, limits=replace(arm.limits, lag=None)) for arm in self.plan.arms)
            )
        self.device_plans = mapping.device_plans(self.rig, self.plan)
        self.children: dict[str, Child] = {}
        self.leaving = False
        self.began_ns = 0
        self.requests: list[Request] = []
        self.news: deque[dict[str, Any]] = deque(maxlen=200)
        self.decision: Decision | None = None
        self.instruction = settings.instruction
        self.spoken = 0
        self.enable: EnableInput | None = None

    # ---------------------------------------------------------------------------------------------------------- life

    def run(self) -> dict[str, Any]:
        """Bring up, run, bring down. Returns the summary. Raises StartError, and what the rig's parts raise."""
        with ExitStack() as stack:
            claim = stack.enter_context(RigClaim(self.rig.name))
            self._create(claim)
            stack.callback(self._end_children)
            self._start_children()
            self.server = Server(self.place.socket)
            stack.callback(self.server.close)
            self.place.write()
            stack.callback(self.place.remove)
            notify("READY=1", f"STATUS={self.rig.name} is up")
            try:
                self._loop()
            finally:
                notify("STOPPING=1")
                self._come_to_rest()
                summary = self.watch.summary(self.began_ns, now_ns())
                summary |= self._about() | {"mode": self.arbiter.state.mode.value, "events": self.counts}
        return summary

    def leave(self) -> None:
        """Ask the loop to end."""
        self.leaving = True

    def _create(self, claim: RigClaim) -> None:
        settings = self.settings
        self.folder = settings.folder
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self.claim = claim
        self.counts: dict[str, int] = {}
        self.segments = RunSegments.create(self.rig, self.plan)
        plane = self.segments.plane
        self.estop = plane.estop
        lease = Lease.attach(plane.lease.fd, write=True)
        self.orders = Orders(plane)
        self.arbiter = Arbiter(lease, self.estop, self.orders)
        self.speaker = Slot.attach(self.segments.instruction.fd, TEXT_BYTES, write=True)
        self.event_ring = Ring.attach(self.segments.events.fd, EVENT_BYTES, EVENTS, write=True)
        self.watch = Watch(self.rig, self.manifest, self.plan, self.device_plans, self.segments)
        given = (settings.given or settings.bundle).absolute()
        self.place = Run(self.rig.name, os.getpid(), self.estop.fd, str(given))
        if self.rig.enable is not None:
            self.enable = registry.create("enable", self.rig.enable.driver, self.rig.enable.options)
            self.enable.open()
        if self.instruction:
            self.speak(self.instruction)

    def speak(self, text: str) -> None:
        """Give the policy an instruction. Raises ValueError for one that is too long."""
        self.speaker.publish(packed({"number": self.spoken + 1, "text": text}, TEXT_BYTES))
        self.spoken += 1
        self.instruction = text

    # ------------------------------------------------------------------------------------------------------ children

    def _start_children(self) -> None:
        logs = self.folder / "logs"

        def add(name: str, begin: Callable[[IO[bytes]], Process], *, restarts: bool) -> None:
            self.children[name] = Child(name, begin, logs, restarts)

        if self.settings.record:
            add("recorder", self._begin_recorder, restarts=True)
        for name in self.rig.cameras:
            add(f"camera {name}", partial(self._begin_camera, name), restarts=True)
        for number in range(len(self.plan.arms)):
            add(f"device {self.plan.arms[number].name}", partial(self._begin_device, number), restarts=False)
        add("servo", self._begin_servo, restarts=False)
        add("policy", self._begin_policy, restarts=True)
        self.began_ns = now_ns()
        for name in self.children:
            if name != "policy":
                self._start(name)
        for name in self.children:
            if name != "policy":
                self._await(name)
        self._start("policy")
        self._await("policy")

    def _begin_camera(self, name: str, log: IO[bytes]) -> Process:
        camera = self.rig.cameras[name]
        return start_camera(
            self.segments.cameras[name],
            camera.driver,
            camera.options,
            camera.rate,
            native=camera.native,
            cpus=self.rig.cores.cameras or None,
            python=camera.python,
            stderr=log,
        )

    def _begin_device(self, number: int, log: IO[bytes]) -> Process:
        plan = self.device_plans[number]
        arm = self.rig.arms[plan.name]
        return processes.start_device(
            plan,
            self.segments.plane,
            number,
            DRIVER,
            {"driver": arm.driver, "options": arm.options, "dry": self.settings.kind != "live"},
            priority=DEVICE_PRIORITY if self.settings.realtime else None,
            cpus=self.rig.cores.devices or None,
            claim=self.claim,
            stderr=log,
        )

    def _begin_servo(self, log: IO[bytes]) -> Process:
        return processes.start_servo(
            self.plan,
            self.segments.plane,
            priority=SERVO_PRIORITY if self.settings.realtime else None,
            cpus=self.rig.cores.servo or None,
            claim=self.claim,
            stderr=log,
        )

    def _begin_policy(self, log: IO[bytes]) -> Process:
        settings = self.settings
        wires = self.segments.policy_wires
        spec = {
            "rig": self.rig.model_dump(mode="json", by_alias=True),
            "bundle": str(settings.bundle.resolve()),
            "wires": asdict(wires),
            "threads": settings.threads,
            "parent": os.getpid(),
        }
        return spawn(POLICY_MODULE, spec, wires.fds, log)

    def _begin_recorder(self, log: IO[bytes]) -> Process:
        wires = self.segments.recorder_wires(self.plan)
        spec = {
            "rig": self.rig.model_dump(mode="json", by_alias=True),
            "wires": asdict(wires),
            "folder": str(self.folder.resolve()),
            "components": len(self.plan.components),
            "axes": self.plan.axes,
            "axis_names": [f"{name}.{axis}" for name, axes in self.watch.axes.items() for axis in axes],
            "about": {key: json.dumps(value) for key, value in self._about().items()},
            "frame_rate": self.settings.frame_rate,
            "rotate_bytes": self.settings.rotate_bytes,
            "parent": os.getpid(),
        }
        return spawn(RECORDER_MODULE, spec, wires.fds, log)

    def _about(self) -> dict[str, Any]:
        provenance = self.manifest.provenance
        return {
            "rig_name": self.rig.name,
            "simulated": self.rig.simulated,
            "kind": self.settings.kind,
            "bundle": self.seal,
            "checkpoint": provenance.checkpoint_sha256,
            "variant": provenance.variant,
            "plan": json.loads(servo_plan.to_json(self.plan)),
            "build": replay.build(),
            "first_step": self.manifest.timing.first_step,
        }

    def _start(self, name: str) -> None:
        self.progress(f"starting {name}")
        self.children[name].start(now_ns())
        self.tell("start", name, f"{name} started")

    def _await(self, name: str) -> None:
        """Wait until a child does its work. Raises StartError with its last words."""
        child = self.children[name]
        seconds = START_S[name.split()[0]]
        end = time.monotonic() + seconds
        self.progress(f"waiting for {name}")
        while not self.watch.works(name):
            if self.leaving:
                raise StartError("asked to end while starting")
            assert child.process is not None
            if child.process.poll() is not None:
                raise StartError(f"{name} did not start: {child.last_words()}. Its log: {child.log}")
            if time.monotonic() > end:
                raise StartError(f"{name} did nothing within {seconds:g} s. Its log: {child.log}")
            time.sleep(0.02)

    def _end_children(self) -> None:
        """First who commands, then who obeys; the recorder last, so that it has seen it all."""
        for group in (("policy",), ("servo",), ("device",), ("camera",), ("recorder",)):
            members = [child for name, child in self.children.items() if name.split()[0] in group]
            for child in members:
                child.terminate()
            end = time.monotonic() + LEAVE_S
            for child in members:
                if not child.reap(end - time.monotonic()):
                    log.warning("%s did not end by itself and was killed", child.name)
        if self.enable is not None:
            self.enable.close()

    # ---------------------------------------------------------------------------------------------------------- loop

    def _loop(self) -> None:
        duration = self.settings.duration
        end_ns = None if duration is None else now_ns() + round(1e9 * duration)
        arm = self.settings.arm_at_once
        deadline = now_ns()
        watchdog = watchdog_period()
        fed = 0.0
        while not self.leaving:
            now = now_ns()
            if end_ns is not None and now >= end_ns:
                return
            self._turn()
            if arm and self.arbiter.state.mode is Mode.READY:
                self.requests.append(Request(Act.ARM))
                arm = False
            # Fed for the servo's sake, not for ours: a rig whose servo is silent is not alive.
            if watchdog is not None and time.monotonic() - fed >= watchdog and self.watch.servo_beats(now):
                notify("WATCHDOG=1")
                fed = time.monotonic()
            deadline += TURN_NS
            if deadline < (now := now_ns()):
                deadline = now
            sleep_until_ns(deadline)

    def _turn(self) -> None:
        requests, self.requests = tuple(self.requests), []
        self._decide(requests)
        self.server.turn(self.serve)

    def _decide(self, requests: tuple[Request, ...]) -> Decision:
        now = now_ns()
        children = {name: child.look(now) for name, child in self.children.items()}
        enable = None if self.enable is None else self.enable.enabled()
        decision = self.arbiter.turn(self.watch.look(children, enable), requests)
        self.decision = decision
        for event in decision.events:
            self.tell(event.kind, event.name, event.text, event.at_ns)
        return decision

    def tell(self, kind: str, name: str, text: str, at_ns: int | None = None) -> None:
        """A line for log and screen."""
        at_ns = now_ns() if at_ns is None else at_ns
        values = {"at_ns": at_ns, "kind": kind, "name": name, "text": text[:1500]}
        self.news.append(values)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.event_ring.append(packed(values, EVENT_BYTES))
        log.info("%s %s", kind, text)

    def _come_to_rest(self) -> None:
        """Stop along the path, then disarm; bounded whatever happens."""
        end = time.monotonic() + STOP_S
        if self.arbiter.state.mode in ARMED:
            self.requests.append(Request(Act.STOP))
        while time.monotonic() < end and self.arbiter.state.mode in ARMED:
            self._turn()
            time.sleep(1e-9 * TURN_NS)
        self.arbiter.lease.revoke()
        self.orders(Order(Want.REST, self.arbiter.state.arming, 1.0))

    # ------------------------------------------------------------------------------------------------------- operator

    def serve(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request of the control socket. What moves the rig takes effect in a turn of its own, at once."""
        act = request.get("act")
        try:
            if act == "status":
                return {"ok": True, **self.status()}
            if act == "log":
                return {"ok": True, "lines": list(self.news)[-int(request.get("count", 50)) :]}
            if act == "quit":
                self.leave()
                return {"ok": True, "text": "ending"}
            if act == "instruct":
                self.speak(str(request["text"]))
                self.tell("instruct", "operator", self.instruction)
                return {"ok": True, "text": f"the instruction is now: {self.instruction}"}
            if act == "arm" and self.settings.kind == "shadow":
                return {"ok": False, "text": "shadow run: the arms are driven by your own controller, not from here"}
            asked = Request(Act(act), float(request.get("speed", 1.0)), request.get("seen"))
        except (KeyError, TypeError, ValueError) as error:
            known = ", ".join(("status", "log", "quit", "instruct", *(a.value for a in Act)))
            return {"ok": False, "text": f"found {json.dumps(request)[:200]} ({error}), expected one of: {known}"}
        return self.ask(asked)

    def ask(self, request: Request) -> dict[str, Any]:
        """Put a request to the arbiter now, and say what it says."""
        decision = self._decide((request,))
        (reply,) = decision.replies
        if request.act is Act.CLEAR and reply.accepted:
            # What the arms themselves have latched (a reflex, a motor's fault) ends on the operator's word only, too.
            for name, child in self.children.items():
                if name.startswith("device ") and child.process is not None and child.process.poll() is None:
                    child.process.send_signal(processes.CLEAR)
        return {"ok": reply.accepted, "text": reply.text, "reasons": reply.sentences()[1:], "mode": self.mode}

    @property
    def mode(self) -> str:
        """The arbiter's."""
        return self.arbiter.state.mode.value

    def status(self) -> dict[str, Any]:
        """All that an operator looks at, as JSON values."""
        state, decision = self.arbiter.state, self.decision
        reasons = () if decision is None else decision.reasons
        return {
            "rig": self.rig.name,
            "simulated": self.rig.simulated,
            "kind": self.settings.kind,
            "mode": state.mode.value,
            "since_s": (now_ns() - state.entered_ns) * 1e-9 if state.entered_ns else 0.0,
            "speed": state.speed,
            "arming": state.arming,
            "estop_count": self.estop.count,
            "estop": self.estop.raised,
            "reasons": [reason.sentence() for reason in reasons],
            "causes": [reason.sentence() for reason in state.causes],
            "instruction": self.instruction,
            "uptime_s": (now_ns() - self.began_ns) * 1e-9,
            "folder": str(self.folder),
            **self.watch.status(now_ns()),
        }


@contextmanager
def ending_on_signals(supervisor: Supervisor) -> Iterator[None]:
    """SIGTERM and SIGINT end the run in order; a second one changes nothing: the end is bounded as it is."""

    def leave(*_: object) -> None:
        supervisor.leave()

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_summary(folder: Path, summary: dict[str, Any]) -> Path:
    """`summary.json` in the session's folder."""
    path = folder / "summary.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    return path
