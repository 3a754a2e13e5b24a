"""Moments of the game as arrays: what the camera sees, what is true, what the expert does. Made from seeds, in shards.

A shard is a file of SHARD moments. A folder of shards is a data set: what is missing is made, what is there is kept.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chatvla_edge.benchmarks.math_matching.expert import DT, HORIZON, chunk, example, goal
from chatvla_edge.drivers.sim.tabletop import ACTIONS, VIEW, Equation, Split
from chatvla_edge.export.checkpoint.statistics import Statistics
from chatvla_edge.export.model.images import Preprocessing
from chatvla_edge.export.robots import load
from chatvla_edge.runtime.bundle import Resize

SHARD = 500
ROBOT = "sim_arx_r5_bimanual"
OPS = "+-*"
# Training uses seeds from 0, tests from here.
TEST_SEEDS = 10_000_000


@dataclass(frozen=True)
class Moments:
    """N moments.

    frames: [N, 112, 168, 3] uint8; equation: [N, 3] (a, index in OPS, b); numbers: [N, 3] on the cards; card: [N, 3, 2]
    where the cards are, glyph: [N, 3, 2] where a, op and b are (m); place: [N] of the right card; held: [N] index of
    the picked card, -1 before; goal: [N, 2] where the arm goes (m); state: [N, 14]; actions: [N, 50, 14].
    """

    frames: NDArray[np.uint8]
    equation: NDArray[np.int8]
    numbers: NDArray[np.int8]
    card: NDArray[np.float32]
    glyph: NDArray[np.float32]
    place: NDArray[np.int8]
    held: NDArray[np.int8]
    goal: NDArray[np.float32]
    state: NDArray[np.float32]
    actions: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.frames)

    def said(self, index: int) -> tuple[Equation, tuple[int, ...], int, int | None]:
        """Equation, numbers, place and held of one moment, as Python values."""
        a, op, b = (int(value) for value in self.equation[index])
        held = int(self.held[index])
        numbers = tuple(int(number) for number in self.numbers[index])
        return Equation(a, OPS[op], b), numbers, int(self.place[index]), held if held >= 0 else None


def make(start: int, count: int, split: Split, highest: int) -> Moments:
    """Moments of the seeds start .. start + count - 1."""
    # Drawn in the size that the robot's first resize makes of a camera's frame: four times cheaper.
    first, *rest = load(ROBOT).cameras[0].preprocessing
    assert isinstance(first, Resize)
    preprocessing = Preprocessing(tuple(rest))
    rows: list[tuple[object, ...]] = []
    for seed in range(start, start + count):
        world = example(seed, split, highest)
        scene = world.scene
        aim = goal(world)
        held = next((index for index in world.held if index is not None), -1)
        strokes = scene.strokes[:-2]  # the last two are the equals sign's
        sign = np.mean([end for a, b, _ in strokes for end in (a, b)], axis=0)
        digits = [(glyph[1], glyph[2]) for glyph in scene.glyphs]
        rows.append(
            (
                preprocessing(world.render(first.height, first.width)),
                (scene.equation.a, OPS.index(scene.equation.op), scene.equation.b),
                [card.number for card in scene.cards],
                [(card.x, card.y) for card in scene.cards],
                [digits[0], tuple(sign), digits[1]],
                scene.right_place,
                held,
                (aim.x, aim.y),
                world.state,
                chunk(world.state, aim),
            )
        )
    types = (np.uint8, np.int8, np.int8, np.float32, np.float32, np.int8, np.int8, np.float32, np.float32, np.float32)
    return Moments(*(np.asarray(column, dtype) for column, dtype in zip(zip(*rows, strict=True), types, strict=True)))


def _shard(folder: Path, split: Split, highest: int, first: int, number: int) -> Path:
    path = folder / f"{split}-{highest}-{first + number * SHARD}.npz"
    if not path.is_file():
        moments = make(first + number * SHARD, SHARD, split, highest)
        part = path.with_suffix(f".{os.getpid()}.tmp")
        with part.open("wb") as file:
            np.savez(file, **{field.name: getattr(moments, field.name) for field in fields(Moments)})
        part.replace(path)
    return path


def moments(
    folder: Path,
    shards: int,
    split: Split,
    highest: int,
    *,
    first: int = 0,
    workers: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> Moments:
    """`shards` shards of a split from seed `first` on; made where they are not in the folder yet."""
    folder.mkdir(parents=True, exist_ok=True)
    job = partial(_shard, folder, split, highest, first)
    paths: list[Path] = []
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            for path in pool.map(job, range(shards)):
                paths.append(path)
                progress()
    else:
        for number in range(shards):
            paths.append(job(number))
            progress()
    files = [np.load(path) for path in paths]
    return Moments(**{field.name: np.concatenate([file[field.name] for file in files]) for field in fields(Moments)})


def statistics(data: Moments) -> Statistics:
    """The normalisation of a data set, by the rules of the public training code: std >= 1e-2, range widened by 1e-4."""
    actions = data.actions.reshape(-1, ACTIONS)
    return Statistics(
        action_mean=actions.mean(0, dtype=np.float64).astype(np.float32),
        action_std=np.maximum(actions.std(0, dtype=np.float64), 1e-2).astype(np.float32),
        action_min=actions.min(0) - np.float32(1e-4),
        action_max=actions.max(0) + np.float32(1e-4),
        qpos_mean=data.state.mean(0, dtype=np.float64).astype(np.float32),
        qpos_std=np.maximum(data.state.std(0, dtype=np.float64), 1e-2).astype(np.float32),
    )


def cells(
    points: NDArray[np.float32], rows: int = 4, columns: int = 6
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The cell (merged image token) of points [..., 2] m, and the offset from its centre in cells, [..., 2]."""
    left, right, bottom, top = VIEW
    across = (points[..., 0] - left) / (right - left) * columns
    down = (top - points[..., 1]) / (top - bottom) * rows
    column = np.clip(np.floor(across), 0, columns - 1)
    row = np.clip(np.floor(down), 0, rows - 1)
    offset = np.stack([across - column - 0.5, down - row - 0.5], axis=-1).astype(np.float32)
    return (row * columns + column).astype(np.int64), offset


__all__ = ["DT", "HORIZON", "ROBOT", "SHARD", "TEST_SEEDS", "Moments", "cells", "make", "moments", "statistics"]
