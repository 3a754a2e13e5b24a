"""Demonstrations in closed form: minimum-jerk motion in joint space, as a function of the present state alone.

The nearest arm reaches for the card with the answer and closes its gripper; an arm that holds a card carries it to the
board and opens. How far along its path an arm is follows from how far it still has to go, so a chunk that starts half
way continues the chunk that led there: re-planning in closed loop does not start the motion anew.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.drivers.sim.planar_arm import JOINTS
from chatvla_edge.drivers.sim.tabletop import (
    ARMS,
    BOARD,
    CARDS,
    CLOSED,
    HOLDS,
    HOME,
    LETS_GO,
    OPEN,
    SLOT,
    Scene,
    Split,
    Tabletop,
    home_state,
)

Array = NDArray[np.float64]

HORIZON, DT = 50, 0.02
REACH_SECONDS, CARRY_SECONDS = 1.0, 1.3
GRIP_SPEED = 0.35  # m/s
ARRIVED = 0.9  # share of a motion's time after which the gripper moves: the hand is 1 % of its way off
_ARM_OF_PLACE = (0, 1, 1)
_IDLE_WAY = 0.5  # rad


def arm_for(place: int) -> int:
    """Which arm picks the card of a place."""
    return _ARM_OF_PLACE[place]


def minimum_jerk(u: NDArray[np.floating] | float) -> Array:
    """Share of the way after the share u of the time, both 0..1."""
    u = np.clip(u, 0.0, 1.0)
    share: Array = u * u * u * (10 - 15 * u + 6 * u * u)
    return share


_TIMES = np.linspace(0, 1, 2001)
_SHARES = minimum_jerk(_TIMES)


@dataclass(frozen=True)
class Goal:
    """What the arms should do: `arm` goes to (x, y) and then closes, or opens when it was `holding` a card."""

    arm: int
    x: float
    y: float
    holding: bool


def goal(world: Tabletop) -> Goal:
    """The goal of the present moment."""
    for arm, held in enumerate(world.held):
        if held is not None:
            x, y = world.slot
            return Goal(arm, float(x), float(y), True)
    card = world.scene.cards[world.scene.right_place]
    return Goal(arm_for(world.scene.right_place), card.x, card.y, False)


def _whole_way(arm: int, holding: bool, target: Array) -> float:
    """How far it usually is to a target, rad over joints 1 and 2: the scale of progress."""
    place = (CARDS[0], CARDS[1])[arm] if holding else HOME[arm]
    return float(np.hypot(*(ARMS[arm].joints(*place) - target)[:2]))


def chunk(state: NDArray[np.floating], aim: Goal) -> Array:
    """The next HORIZON commands, [HORIZON, 14], DT apart, the first due now."""
    now = np.asarray(state, np.float64)
    t = np.arange(HORIZON) * DT
    out = np.empty((HORIZON, len(now)))
    for arm in range(2):
        first, grip = 7 * arm, 7 * arm + 6
        q, opening = now[first : first + JOINTS], now[grip]
        active = arm == aim.arm
        target = ARMS[arm].joints(aim.x, aim.y) if active else ARMS[arm].joints(*HOME[arm])
        way = _whole_way(arm, aim.holding, target) if active else _IDLE_WAY
        seconds = CARRY_SECONDS if active and aim.holding else REACH_SECONDS
        done = np.clip(1 - np.hypot(*(q - target)[:2]) / way, 0.0, 0.9995)
        start = float(np.interp(done, _SHARES, _TIMES))
        left = (1 - minimum_jerk(start + t / seconds)) / (1 - minimum_jerk(start))
        out[:, first : first + JOINTS] = target + left[:, None] * (q - target)
        if not active:
            out[:, grip] = np.minimum(opening + GRIP_SPEED * t, OPEN)
            continue
        at = max(ARRIVED - start, 0.0) * seconds
        before, after = (CLOSED, OPEN) if aim.holding else (OPEN, CLOSED)
        out[:, grip] = _towards(opening, before, np.minimum(t, at))
        moved = _towards(opening, before, np.array(at))
        late = t > at
        out[late, grip] = _towards(float(moved), after, t[late] - at)
    return out


def _towards(opening: float, wanted: float, seconds: NDArray[np.floating]) -> Array:
    """The opening after so long, on its way to the wanted one."""
    reach = GRIP_SPEED * seconds
    moved: Array = opening + np.clip(wanted - opening, -reach, reach)
    return moved


# ------------------------------------------------------------------------------------------- states to learn from


def place_arms(world: Tabletop, rng: np.random.Generator) -> None:
    """Put the arms somewhere on (or near) the path of a trial: at its start, under way, gripping, carrying, laying."""
    state = home_state()
    for first in (0, 7):
        state[first : first + JOINTS] += rng.normal(0, 0.02, JOINTS)
    scene, kind = world.scene, rng.choice(6, p=(0.2, 0.35, 0.1, 0.05, 0.2, 0.1))
    held: list[int | None] = [None, None]
    if kind in (1, 2, 3):
        place = scene.right_place if kind != 3 else int(rng.integers(3))
        arm = arm_for(place)
        card = scene.cards[place]
        share = float(minimum_jerk(rng.uniform(0, 0.95))) if kind != 2 else 1.0
        _place(state, arm, (card.x, card.y), HOME[arm], share, rng)
        if kind == 2:
            state[7 * arm + 6] = rng.uniform(HOLDS, OPEN)
    elif kind in (4, 5):
        place = scene.right_place
        arm, card = arm_for(place), scene.cards[place]
        held[arm] = place
        share = float(minimum_jerk(rng.uniform(0, 1))) if kind == 4 else float(rng.integers(2))
        _place(state, arm, _slot(scene), (card.x, card.y), share, rng)
        high = LETS_GO if kind == 5 and share == 1.0 else HOLDS
        state[7 * arm + 6] = CLOSED if rng.random() < 0.5 else rng.uniform(CLOSED, high)
    world.put(state, (held[0], held[1]))


def _slot(scene: Scene) -> tuple[float, float]:
    x, y, _ = scene.board
    return x - BOARD[0] + SLOT[0], y - BOARD[1] + SLOT[1]


def _place(
    state: Array,
    arm: int,
    end: tuple[float, float],
    start: tuple[float, float],
    share: float,
    rng: np.random.Generator,
) -> None:
    """Put an arm at a share of the way, off the path by a little, the less the nearer its end."""
    q0, q1 = ARMS[arm].joints(*start), ARMS[arm].joints(*end)
    off = rng.normal(0, 0.008 + 0.02 * share * (1 - share) * 4, JOINTS)
    state[7 * arm : 7 * arm + JOINTS] = q0 + share * (q1 - q0) + off


def example(seed: int, split: Split, highest: int) -> Tabletop:
    """One moment of one trial."""
    world = Tabletop(highest)
    world.reset(seed, split)
    place_arms(world, np.random.default_rng([seed, 44]))
    return world
