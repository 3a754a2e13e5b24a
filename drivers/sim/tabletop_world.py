"""The math-matching table (`drivers/sim/tabletop.py`) as a world that arms and a camera share.

`tell(reset=seed, split="in_domain")` lays a new scene; `tell(result=True)` says how the present one stands.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from chatvla_edge.drivers.protocols import AxisBounds, Image, Options
from chatvla_edge.drivers.sim.bodies import BODIES
from chatvla_edge.drivers.sim.shared import WorldArm, WorldArmOptions, WorldCamera, WorldCameraOptions
from chatvla_edge.drivers.sim.tabletop import SPLITS, Tabletop
from chatvla_edge.drivers.sim.world import WorldSpec

Array = npt.NDArray[np.float64]
Split = Literal["in_domain", "held_out_writers", "held_out"]

ARMS = {"left": (0, 7), "right": (7, 14)}
CARDS = 3
_NOBODY = -1.0


class TabletopWorld:
    """The table, 2 ms at a time."""

    dt = 0.002

    def __init__(self, seed: int, split: Split, highest: int) -> None:
        self._table = Tabletop(highest)
        self._seed, self._split, self._scenes = seed, split, 0
        self._table.reset(seed, split)

    @property
    def arms(self) -> dict[str, tuple[int, int]]:
        """Both arms, each with six joints and its gripper."""
        return ARMS

    def step(self, targets: Array) -> None:
        """Let time pass."""
        self._table.step(targets, self.dt)

    def position(self) -> Array:
        """[14] rad, m."""
        return self._table.state.astype(np.float64)

    def scene(self) -> Array:
        """Which scene, what the grippers hold, the arms, where the cards lie."""
        held = [_NOBODY if card is None else float(card) for card in self._table.held]
        cards = [number for card in self._table.scene.cards for number in (card.x, card.y, card.angle)]
        which = [float(self._seed), float(SPLITS.index(self._split)), float(self._scenes)]
        return np.array([*which, *held, *self._table.state.tolist(), *cards])

    def tell(self, message: dict[str, Any]) -> dict[str, Any]:
        """A new scene, or how this one stands. Raises ValueError."""
        if message.get("reset") is not None:
            split = message.get("split", self._split)
            if split not in SPLITS:
                raise ValueError(f"found the split {split!r}, expected one of: {', '.join(SPLITS)}")
            self._seed, self._split, self._scenes = int(message["reset"]), split, self._scenes + 1
            self._table.reset(self._seed, self._split)
        table = self._table
        return {
            "seed": self._seed,
            "split": self._split,
            "time": table.time,
            "equation": str(table.scene.equation),
            "cards": [card.number for card in table.scene.cards],
            "right_card": table.scene.right_place,
            "held": list(table.held),
            "picks": [list(pick) for pick in table.picks],
            "placed": table.placed,
        }


class TabletopArtist:
    """Draws the table in the camera's process: the same seed gives the same scene."""

    def __init__(self, highest: int) -> None:
        self._table = Tabletop(highest)
        self._which: tuple[float, ...] = ()
        self._held: tuple[float, ...] = ()

    facts: ClassVar[dict[str, str | int | float | bool]] = {"world": "tabletop"}

    def draw(self, scene: Array, height: int, width: int) -> Image:
        """The table from straight above."""
        which, held = tuple(scene[:3].tolist()), tuple(scene[3:5].tolist())
        table = self._table
        if which != self._which:
            table.reset(int(which[0]), SPLITS[int(which[1])])
            self._which, self._held = which, ()
        state, cards = scene[5:19], scene[19:].reshape(CARDS, 3)
        lifted: list[int | None] = [None if card == _NOBODY else int(card) for card in held]
        for card, (x, y, angle) in zip(table.scene.cards, cards.tolist(), strict=True):
            card.x, card.y, card.angle = x, y, angle
        # Setting what is held draws the table anew, so it is done only when that has changed.
        if held != self._held:
            table.put(state, (lifted[0], lifted[1]))
            self._held = held
        table._state = state  # `put` would draw table and cards anew, which cost most of a picture
        return table.render(height, width)


class _Table(Options):
    """Which table."""

    seed: int = Field(default=0, ge=0)
    split: Split = "in_domain"
    highest: int = Field(default=9, ge=1, le=81)


class TabletopArmOptions(_Table, WorldArmOptions):
    """Options of the driver `tabletop` of arms.

    Attributes:
        side: which of the two arms.
        seed, split, highest: the first scene; all devices of a world say the same.
    """

    side: Literal["left", "right"]


class TabletopCameraOptions(WorldCameraOptions, _Table):
    """Options of the driver `tabletop` of cameras; what its arms say, and what every simulated camera may."""


def _spec(options: TabletopArmOptions | TabletopCameraOptions) -> WorldSpec:
    arguments = {"seed": options.seed, "split": options.split, "highest": options.highest}
    return WorldSpec(kind=f"{__name__}:TabletopWorld", name=options.world, arguments=arguments)


class TabletopArm(WorldArm):
    """One of the two arms of the table: six joints and the gripper's opening."""

    OPTIONS: ClassVar[type[Options]] = TabletopArmOptions

    def __init__(self, options: TabletopArmOptions) -> None:
        super().__init__(options.side, _spec(options), options)
        self._body = BODIES["arx_r5"]

    @property
    def axes(self) -> Sequence[str]:
        """Names of the axes."""
        return self._body.axes

    def bounds(self) -> AxisBounds:
        """Those of the ARX R5, in whose range the table is played."""
        return self._body.bounds()


class TabletopCamera(WorldCamera):
    """The camera straight above the table."""

    OPTIONS: ClassVar[type[Options]] = TabletopCameraOptions

    def __init__(self, options: TabletopCameraOptions) -> None:
        super().__init__(_spec(options), options, lambda: TabletopArtist(options.highest))
