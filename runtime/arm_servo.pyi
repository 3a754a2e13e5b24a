from chatvla_edge.runtime.kinematics import Kinematics
from chatvla_edge.runtime.limits import Limiter
from chatvla_edge.runtime.servo_plan import ArmPlan
from chatvla_edge.runtime.slots import Slot
from chatvla_edge.runtime.tracking import Tracker

class ArmServo:
    plan: ArmPlan
    limiter: Limiter
    tracker: Tracker
    kinematics: Kinematics | None
    def __init__(
        self,
        plan: ArmPlan,
        command_slot: Slot,
        state_slot: Slot,
        *,
        period_ns: int,
        action_dim: int,
        margin: float,
        gap_ns: int,
    ) -> None: ...
