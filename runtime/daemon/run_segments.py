"""Every segment of a run, created once by the supervisor: the servo plane's, the cameras', the policy's, the log's."""

from dataclasses import dataclass

import numpy as np

from chatvla_edge.drivers.rig import Rig
from chatvla_edge.runtime.camera_frames import CameraSegments
from chatvla_edge.runtime.daemon.policy_process import PolicyWires
from chatvla_edge.runtime.daemon.recorder import RecorderWires
from chatvla_edge.runtime.daemon.records import (
    EVENT_BYTES,
    EVENTS,
    POLICY,
    RECORDER,
    REPORT_BYTES,
    REPORTS,
    TEXT_BYTES,
)
from chatvla_edge.runtime.rig_segments import RigSegments
from chatvla_edge.runtime.servo_plan import ServoPlan
from chatvla_edge.runtime.slots import Ring, Slot


@dataclass(frozen=True)
class RunSegments:
    """The segments; the supervisor is the writer of `instruction` and `events`."""

    plane: RigSegments
    cameras: dict[str, CameraSegments]
    instruction: Slot
    policy: Slot
    reports: Ring
    events: Ring
    recorder: Slot

    @classmethod
    def create(cls, rig: Rig, plan: ServoPlan) -> "RunSegments":
        """Empty ones, of the rig's and the plan's shape. The rings hold 8 s of ticks and states."""
        rows = max(256, 1 << int(np.ceil(np.log2(8 * plan.rate))))
        states = max(256, 1 << int(np.ceil(np.log2(8 * max(arm.rate for arm in rig.arms.values())))))
        return cls(
            plane=RigSegments.create(plan, telemetry_rows=rows, history_rows=states),
            cameras={name: CameraSegments.create(name, c.height, c.width) for name, c in rig.cameras.items()},
            instruction=Slot.create("instruction", TEXT_BYTES),
            policy=Slot.create("policy", POLICY.itemsize),
            reports=Ring.create("reports", REPORT_BYTES, REPORTS),
            events=Ring.create("events", EVENT_BYTES, EVENTS),
            recorder=Slot.create("recorder", RECORDER.itemsize),
        )

    def _frames(self) -> dict[str, tuple[int, int]]:
        return {name: (camera.frame.fd, camera.status.fd) for name, camera in self.cameras.items()}

    @property
    def policy_wires(self) -> PolicyWires:
        """What the policy's process attaches to."""
        plane = self.plane
        return PolicyWires(
            frames=self._frames(),
            states=tuple(ring.fd for ring in plane.histories),
            state_rows=plane.history_rows,
            status=plane.status.fd,
            telemetry=plane.telemetry.fd,
            telemetry_rows=plane.telemetry_rows,
            chunks=plane.chunks.fd,
            prefix=plane.prefix.fd if plane.prefix_used else None,
            instruction=self.instruction.fd,
            policy=self.policy.fd,
            reports=self.reports.fd,
        )

    def recorder_wires(self, plan: ServoPlan) -> RecorderWires:
        """What the recorder's process attaches to."""
        plane = self.plane
        return RecorderWires(
            telemetry=plane.telemetry.fd,
            telemetry_rows=plane.telemetry_rows,
            states={arm.name: ring.fd for arm, ring in zip(plan.arms, plane.histories, strict=True)},
            state_rows=plane.history_rows,
            frames=self._frames(),
            reports=self.reports.fd,
            events=self.events.fd,
            own=self.recorder.fd,
        )
