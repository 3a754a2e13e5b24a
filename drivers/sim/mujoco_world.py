"""The rigs of `drivers/sim/mujoco_models.py` as worlds that arms and a camera share (extra `sim`).

Physics runs in the world's process, in real time; the camera draws what it reads there, as fast as the renderer can:
its health says how long a picture takes. `tell(reset=seed)` puts the cubes elsewhere, `tell()` says where they are.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import model_validator

from chatvla_edge.drivers.errors import DeviceUnsuitableError, MissingLibraryError
from chatvla_edge.drivers.protocols import AxisBounds, Image, Manners, Options
from chatvla_edge.drivers.sim.bodies import BODIES
from chatvla_edge.drivers.sim.mujoco_models import CAMERAS, CUBES, MIDDLE, MOUNTS, Scene, mjcf
from chatvla_edge.drivers.sim.shared import WORLD_MANNERS, WorldArm, WorldArmOptions, WorldCamera, WorldCameraOptions
from chatvla_edge.drivers.sim.world import WorldSpec

Array = npt.NDArray[np.float64]

START: dict[str, tuple[float, ...]] = {"fr3": (0.0, -0.6283, 0.0, -2.5133, 0.0, 1.885, 0.0)}


_refused: list[str] = []  # why mujoco could not be imported with a renderer, for the message of who wants to draw


def _mujoco() -> Any:
    """The library, without a renderer where none can be loaded. Raises ModuleNotFoundError."""
    if not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is imported; a software renderer serves it, too
    try:
        return import_module("mujoco")
    except ModuleNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001  # PyOpenGL raises whatever it likes when its library is missing
        _refused.append(f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}: {type(error).__name__}: {error}")
        os.environ["MUJOCO_GL"] = "disable"
        return import_module("mujoco")


class MujocoWorld:
    """Physics, one step of 2 ms at a time."""

    dt = 0.002

    def __init__(self, scene: Scene) -> None:
        mujoco = _mujoco()
        self._mujoco = mujoco
        self._model = mujoco.MjModel.from_xml_string(mjcf(scene))
        self._data = mujoco.MjData(self._model)
        self._arms: dict[str, tuple[int, int]] = {}
        self._joints: list[list[int]] = []  # addresses in qpos of each axis: one, or two of fingers
        self._servos: list[list[int]] = []
        start: list[float] = []
        for mount in MOUNTS[scene]:
            body = BODIES[mount.body]
            axes = [[joint] for joint in mount.joints] + ([list(mount.fingers)] if mount.fingers else [])
            self._arms[mount.name] = (len(self._joints), len(self._joints) + len(axes))
            self._joints += [[int(self._model.joint(name).qposadr[0]) for name in axis] for axis in axes]
            self._servos += [[int(self._model.actuator(name).id) for name in axis] for axis in axes]
            start += START.get(mount.body, body.start)
        self._lower = np.concatenate([BODIES[mount.body].lower for mount in MOUNTS[scene]])
        self._upper = np.concatenate([BODIES[mount.body].upper for mount in MOUNTS[scene]])
        self._start = np.array(start)
        self._middle = MIDDLE[scene]
        self._place(None)

    @property
    def arms(self) -> dict[str, tuple[int, int]]:
        """As the rig names them."""
        return self._arms

    def step(self, targets: Array) -> None:
        """One step of physics towards the targets, as far as they lie in the ranges."""
        for axis, target in enumerate(np.clip(targets, self._lower, self._upper).tolist()):
            for servo in self._servos[axis]:
                self._data.ctrl[servo] = target / len(self._servos[axis])
        self._mujoco.mj_step(self._model, self._data)

    def position(self) -> Array:
        """Joints (rad), openings (m)."""
        qpos = self._data.qpos
        return np.array([sum(qpos[joint] for joint in axis) for axis in self._joints])

    def scene(self) -> Array:
        """MuJoCo's generalised positions: all there is to draw."""
        return np.array(self._data.qpos)

    def tell(self, message: dict[str, Any]) -> dict[str, Any]:
        """``reset``: everything at its start, the cubes where the seed says."""
        if message.get("reset") is not None:
            self._place(int(message["reset"]))
        cubes = [self._data.body(f"cube{i}").xpos.tolist() for i in range(CUBES)]
        return {"time": self._data.time, "cubes": cubes}

    def _place(self, seed: int | None) -> None:
        self._mujoco.mj_resetData(self._model, self._data)
        for axis, value in enumerate(self._start.tolist()):
            for joint, servo in zip(self._joints[axis], self._servos[axis], strict=True):
                self._data.qpos[joint] = self._data.ctrl[servo] = value / len(self._joints[axis])
        if seed is not None:
            random = np.random.default_rng(seed)
            for i in range(CUBES):
                first = int(self._model.body(f"cube{i}").jntadr[0])
                at = int(self._model.jnt_qposadr[first])
                x = self._middle + (i - 1) * 0.12 + random.uniform(-0.03, 0.03)
                self._data.qpos[at : at + 2] = (x, 0.05 + random.uniform(-0.08, 0.08))
        self._mujoco.mj_forward(self._model, self._data)


class MujocoArtist:
    """Draws in the camera's process. Raises MissingLibraryError."""

    def __init__(self, scene: Scene) -> None:
        try:
            self._mujoco = _mujoco()
        except ModuleNotFoundError as error:
            remedy = "pip install 'chatvla-edge[sim]'"
            raise MissingLibraryError(f"a MuJoCo world needs the module `mujoco`: {remedy}") from error
        self._camera = CAMERAS[scene]
        self._model = self._mujoco.MjModel.from_xml_string(mjcf(scene))
        self._data = self._mujoco.MjData(self._model)
        self._renderer: Any = None
        self._size = (0, 0)

    @property
    def facts(self) -> dict[str, str | int | float | bool]:
        """Which way pictures come about."""
        return {"renderer": os.environ.get("MUJOCO_GL", "glfw")}

    def draw(self, scene: Array, height: int, width: int) -> Image:
        """What the rig's camera sees. Raises DeviceUnsuitableError where nothing can be rendered."""
        if self._size != (height, width):
            if self._renderer is not None:
                self._renderer.close()
            self._renderer = self._make(height, width)
            self._size = (height, width)
        self._data.qpos[:] = scene
        self._mujoco.mj_kinematics(self._model, self._data)
        self._mujoco.mj_camlight(self._model, self._data)
        self._renderer.update_scene(self._data, self._camera)
        image: Image = self._renderer.render()
        return image

    def _make(self, height: int, width: int) -> Any:
        if _refused:
            raise self._unable(_refused[0])
        windowed = any(name.startswith("mujoco.") and name.endswith("glfw") for name in sys.modules)
        if windowed and not os.environ.get("DISPLAY"):  # would end in a segmentation fault
            raise self._unable("mujoco was imported for windows, and there is no display; set MUJOCO_GL=egl before")
        try:
            return self._mujoco.Renderer(self._model, height, width)
        except ValueError as error:  # larger than the model's buffer
            raise DeviceUnsuitableError(f"the MuJoCo world cannot draw {width}x{height}: {error}") from error
        except Exception as error:
            way = os.environ.get("MUJOCO_GL", "glfw")
            raise self._unable(f"MUJOCO_GL={way}: {type(error).__name__}: {error}") from error

    def _unable(self, why: str) -> DeviceUnsuitableError:
        return DeviceUnsuitableError(
            f"the MuJoCo world cannot draw here: {why}. apt-get install libegl1 libgl1-mesa-dri, or libosmesa6 and "
            "MUJOCO_GL=osmesa, or take `sim_camera` for the camera of this rig: its arms need no pictures"
        )


class MujocoArmOptions(WorldArmOptions):
    """Options of the driver `mujoco` of arms.

    Attributes:
        scene: which rig; all devices of a world say the same.
        arm: which of its arms.
    """

    scene: Scene
    arm: Literal["left", "right", "franka", "gripper"]

    @model_validator(mode="after")
    def _there(self) -> "MujocoArmOptions":
        names = [mount.name for mount in MOUNTS[self.scene]]
        if self.arm not in names:
            raise ValueError(f"found the arm {self.arm!r} for {self.scene}, expected one of: {', '.join(names)}")
        return self


class MujocoCameraOptions(WorldCameraOptions):
    """Options of the driver `mujoco` of cameras; ``scene`` as for its arms."""

    scene: Scene


def _spec(options: MujocoArmOptions | MujocoCameraOptions) -> WorldSpec:
    return WorldSpec(kind=f"{__name__}:MujocoWorld", name=options.world, arguments={"scene": options.scene})


class MujocoArm(WorldArm):
    """One arm or gripper of the scene."""

    OPTIONS: ClassVar[type[Options]] = MujocoArmOptions
    MANNERS: ClassVar[Manners] = WORLD_MANNERS

    def __init__(self, options: MujocoArmOptions) -> None:
        super().__init__(options.arm, _spec(options), options)
        (mount,) = (mount for mount in MOUNTS[options.scene] if mount.name == options.arm)
        self._body = BODIES[mount.body]

    @property
    def axes(self) -> Sequence[str]:
        """Names of the axes."""
        return self._body.axes

    def bounds(self) -> AxisBounds:
        """Those of the device that this one stands for."""
        return self._body.bounds()


class MujocoCamera(WorldCamera):
    """The rig's camera."""

    OPTIONS: ClassVar[type[Options]] = MujocoCameraOptions

    def __init__(self, options: MujocoCameraOptions) -> None:
        super().__init__(_spec(options), options, lambda: MujocoArtist(options.scene))
