import numpy as np
import numpy.typing as npt

from chatvla_edge.runtime.arm_model import ArmModel

class Kinematics:
    joints: int
    position_residual: float
    rotation_residual: float
    iterations: int

    def __init__(
        self,
        model: ArmModel,
        *,
        flange_to_tool: npt.ArrayLike | None = None,
        posture: npt.ArrayLike | None = None,
        posture_gain: float = 0.02,
        posture_step: float = 1e-3,
        length: float = 0.25,
        bias: float = 1e-6,
        position_tolerance: float = 1e-6,
        rotation_tolerance: float = 1e-5,
        most_iterations: int = 8,
    ) -> None: ...
    def tool_pose(self, q: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]: ...
    def tool_jacobian(self, q: npt.ArrayLike) -> npt.NDArray[np.float64]: ...
    def joints_for(
        self, rotation: npt.ArrayLike, position: npt.ArrayLike, start: npt.ArrayLike
    ) -> tuple[npt.NDArray[np.float64], bool]: ...
